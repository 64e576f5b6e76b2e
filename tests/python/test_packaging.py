"""What is installed: one version, no torch for serving, a module that keeps to itself."""

from __future__ import annotations

import ast
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


def readelf(*arguments: str) -> str:
    """The output of readelf on the module."""
    if not shutil.which("readelf"):
        pytest.skip("readelf (binutils) is not installed")
    command = ["readelf", "--wide", *arguments, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
    allowed = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux.*)\.so")
    assert [name for name in needed if not allowed.match(name)] == []


def test_the_module_has_no_search_path_of_the_build_machine() -> None:
    assert re.findall(r"\((?:RPATH|RUNPATH)\).*", readelf("--dynamic")) == []


def test_the_module_exports_no_name_of_ours_or_of_libcrypto() -> None:
    defined = re.findall(
        r"(?:GLOBAL|WEAK)\s+DEFAULT\s+\d+\s+(\S+)$", readelf("--dyn-syms"), re.MULTILINE
    )
    assert "PyInit__C" in defined
    foreign = re.compile(r"^(EVP_|SHA256|OPENSSL_|CRYPTO_|_ZNK?8deltazip|_ZNK?8nlohmann)")
    assert [name for name in defined if foreign.search(name)] == []


def test_the_package_is_typed(repository: Path) -> None:
    package = Path(_C.__file__).parent
    assert (package / "py.typed").exists()
    stub = (package / "_C.pyi").read_text(encoding="utf-8")
    assert {node.name for node in ast.parse(stub).body if isinstance(node, ast.ClassDef)} >= {
        "Engine",
        "EngineConfig",
        "SamplingParams",
    }
