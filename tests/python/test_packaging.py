"""What is installed: one version, no torch for serving, a module that keeps to itself."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import pytest
from deltazip import _C

# Everything that a server and offline batches need. Blocked modules raise ImportError.
SERVE_WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "accelerate"):
    sys.modules[name] = None
import deltazip, deltazip.engine, deltazip.llm, deltazip.tokenizer
import deltazip.server.app, deltazip.server.run
import deltazip.cli
deltazip.cli.make_app(["serve"])
assert deltazip.LLM is deltazip.llm.LLM
"""


CUDA_LIBRARY = "libdeltazip_cuda.so"
ALLOWED = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux.*)\.so")


def readelf(*arguments: str, path: str | Path = _C.__file__) -> str:
    """The output of readelf, on the module if nothing else is named."""
    if not shutil.which("readelf"):
        pytest.skip("readelf (binutils) is not installed")
    command = ["readelf", "--wide", *arguments, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def exported(path: str | Path) -> list[str]:
    """The names that a library defines for others."""
    symbols = readelf("--dyn-syms", path=path)
    return re.findall(r"(?:GLOBAL|WEAK)\s+DEFAULT\s+\d+\s+(\S+)$", symbols, re.MULTILINE)


@pytest.fixture
def cuda_library(repository: Path) -> Path:
    """The CUDA library: beside the module, or of the wheel that CI built."""
    folders = (Path(_C.__file__).parent, repository / "build" / "wheel" / "deltazip")
    found = [folder / CUDA_LIBRARY for folder in folders if (folder / CUDA_LIBRARY).exists()]
    if not found:
        pytest.skip("this build has no CUDA library (DELTAZIP_CUDA=1 makes one)")
    return found[0]


def test_one_version(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r'^version = "([0-9.]+)"$', text, re.MULTILINE)
    assert declared
    assert _C.__version__ == declared[1]
    try:
        assert version("deltazip") == declared[1]
    except PackageNotFoundError:
        pytest.skip("the package is not installed: run from a source tree")


def test_serving_starts_without_torch() -> None:
    command = [sys.executable, "-c", SERVE_WITHOUT_TORCH]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_torch_is_an_extra() -> None:
    try:
        needed = requires("deltazip") or []
    except PackageNotFoundError:
        pytest.skip("the package is not installed: run from a source tree")
    assert "compress" in (metadata("deltazip").get_all("Provides-Extra") or [])
    for requirement in needed:
        if re.match(r"(torch|transformers)\b", requirement):
            assert "extra ==" in requirement, requirement


def test_the_module_needs_no_library_that_a_wheel_must_not_expect() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("--dynamic"))
    assert needed
    assert [name for name in needed if not ALLOWED.match(name)] == []


def test_the_module_has_no_search_path_of_the_build_machine() -> None:
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*", readelf("--dynamic")) == []


def test_the_module_exports_no_name_of_ours_or_of_its_libraries() -> None:
    defined = exported(_C.__file__)
    assert "PyInit__C" in defined
    foreign = re.compile(r"^(EVP_|SHA256|OPENSSL_|CRYPTO_|ZSTD_|_ZNK?8deltazip|_ZNK?8nlohmann)")
    assert [name for name in defined if foreign.search(name)] == []


def test_the_cuda_library_needs_neither_driver_nor_toolkit_to_be_there(cuda_library: Path) -> None:
    """The driver's library and cuBLASLt are opened when a GPU is asked for."""
    dynamic = readelf("--dynamic", path=cuda_library)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    assert [name for name in needed if not ALLOWED.match(name)] == []
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic) == []


def test_the_cuda_library_exports_its_factory_alone(cuda_library: Path) -> None:
    # Templates of std over our types are std's, which has them exported.
    names = [name for name in exported(cuda_library) if not re.match(r"_ZNK?St", name)]
    ours = [name for name in names if re.search("deltazip|cublas|cuda[A-Z]", name)]
    assert ours == ["deltazip_make_cuda_backend"]


ASK_FOR_A_GPU = """
import sys
from pathlib import Path
from deltazip import _C
from deltazip.bench.shapes import SHAPES
from deltazip.bench.synthetic import make_base
make_base(Path(sys.argv[1]), SHAPES["tiny"], 1)
engine = _C.Engine(_C.EngineConfig(base=sys.argv[1]))
assert engine.device_description().startswith("cpu")
engine.shutdown()
try:
    _C.Engine(_C.EngineConfig(base=sys.argv[1], device="cuda"))
except ValueError as error:
    print(error)
"""


def test_without_a_gpu_the_cpu_serves_and_the_gpu_is_missed_by_name(
    tmp_path: Path, cuda_library: Path
) -> None:
    """In a copy of the package that holds the CUDA library, as a wheel built with nvcc does."""
    package = tmp_path / "site" / "deltazip"
    shutil.copytree(Path(_C.__file__).parent, package)
    if not (package / CUDA_LIBRARY).exists():
        shutil.copy(cuda_library, package)
    # No device is visible to the driver, if there is one at all.
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", ASK_FOR_A_GPU, str(tmp_path / "base")],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("device 'cuda': "), result.stdout


def test_the_package_is_typed(repository: Path) -> None:
    package = Path(_C.__file__).parent
    assert (package / "py.typed").exists()
    stub = (package / "_C.pyi").read_text(encoding="utf-8")
    assert {node.name for node in ast.parse(stub).body if isinstance(node, ast.ClassDef)} >= {
        "Engine",
        "EngineConfig",
        "SamplingParams",
    }
