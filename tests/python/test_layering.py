"""The law of the house: who may include or import whom. Read from the sources, nothing is built."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "include" / "deltazip"
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "deltazip"

# What each folder of csrc/ and include/deltazip/ may include besides itself.
MAY_INCLUDE = {
    "base": set(),
    "backend": {"base"},
    "schedule": {"base"},
    "io": {"base"},
    "delta": {"base", "backend", "io"},
    "model": {"base", "backend", "io", "delta"},
    "engine": {"base", "backend", "io", "delta", "model", "schedule"},
    "bindings": {"base", "backend", "io", "delta", "model", "schedule", "engine"},
}
CPP_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
INCLUDE_LINE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)

# The only folders of the core that may name these libraries, in headers or sources.
CONFINED_LIBRARIES = {
    "CUDA": (
        re.compile(r"^(cuda|cublas|cutlass|cute|flashinfer|nccl|nvcomp|nvrtc|cooperative_groups)"),
        "csrc/backend/cuda",
    ),
    "pybind11": (re.compile(r"^(pybind11/|Python\.h)"), "csrc/bindings"),
    "OpenSSL": (re.compile(r"^openssl/"), "csrc/base"),
    "zstd": (re.compile(r"^zstd"), "csrc/delta"),
}
NEVER_IN_PUBLIC_HEADERS = re.compile(
    r"^(nlohmann/|spdlog/|fmt/|glog/|openssl/|zstd|pybind11/|Python\.h|cuda|cublas)"
)
# A .cu may hold only an instantiation of what the .cuh files that it includes define.
DEVICE_CODE = re.compile(r"__global__|__device__|<<<|#include \"[^\"]+\.cuh\"")

# Python, lowest first: a module may import those of lower ranks and of its own package.
PYTHON_RANKS = {"_C": 0, "compress": 2, "server": 2, "bench": 2, "cli": 3, "__main__": 4}
TOP_LEVEL_RANK = 1  # engine, tokenizer, chat_template, llm and what else stands in deltazip/
COMPRESS_ONLY = {"torch", "transformers", "accelerate"}
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
}

MAX_LINES = 450  # about 400 is the rule; a reviewer asks long before this
MAX_ENTRIES = 16  # modules of a folder: x.h and x.cpp are one


def cpp_files(*folders: Path) -> list[Path]:
    return sorted(
        path for folder in folders for path in folder.rglob("*") if path.suffix in CPP_SUFFIXES
    )


def includes(path: Path) -> list[tuple[str, str]]:
    """(quote or angle, name) of every include of a file."""
    return INCLUDE_LINE.findall(path.read_text(encoding="utf-8"))


def folder_of(path: Path) -> str:
    """The folder of the house a file lies in: base, backend, ..."""
    parent = INCLUDE if path.is_relative_to(INCLUDE) else CSRC
    return path.relative_to(parent).parts[0]


def resolve(name: str, path: Path) -> Path | None:
    """The file of ours that an include means, or None for a library's."""
    for candidate in (ROOT / "include" / name, path.parent / name, CSRC / name):
        if candidate.is_file():
            return candidate.resolve()
    return None


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def core_files() -> list[Path]:
    files = cpp_files(INCLUDE, CSRC)
    assert len(files) > 20, f"the core has only {len(files)} files under {CSRC}: wrong folder?"
    return files


def test_every_folder_of_the_core_has_a_rule() -> None:
    folders = {
        path.name for parent in (INCLUDE, CSRC) for path in parent.iterdir() if path.is_dir()
    }
    assert folders == set(MAY_INCLUDE)


def test_the_rules_allow_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_INCLUDE):
        ready = {name for name, lower in MAY_INCLUDE.items() if lower <= done} - done
        assert ready, f"a cycle among {sorted(set(MAY_INCLUDE) - done)}"
        done |= ready


def test_folders_include_only_what_lies_below(core_files: list[Path]) -> None:
    wrong = []
    for path in core_files:
        own = folder_of(path)
        for _, name in includes(path):
            target = resolve(name, path)
            if target is None:
                continue
            other = folder_of(target)
            if other != own and other not in MAY_INCLUDE[own]:
                wrong.append(f"{relative(path)} includes {name}: {own} may not include {other}")
    assert not wrong, "\n".join(wrong)


def test_private_headers_stay_in_their_folder(core_files: list[Path]) -> None:
    wrong = []
    for path in core_files:
        for _, name in includes(path):
            target = resolve(name, path)
            if target is None or target.is_relative_to(INCLUDE):
                continue
            if path.is_relative_to(INCLUDE):
                wrong.append(f"{relative(path)} is public and includes the private {name}")
            elif folder_of(target) != folder_of(path):
                wrong.append(f"{relative(path)} includes the private {name} of another folder")
    assert not wrong, "\n".join(wrong)


def test_a_header_is_public_only_when_another_folder_needs_it(core_files: list[Path]) -> None:
    """Needed by another folder, by the tests or benchmarks, or by a header that is so needed."""
    outside = cpp_files(ROOT / "tests" / "cpp", ROOT / "benchmarks" / "cpp")
    needed: set[Path] = set()
    waiting = [
        target
        for path in [*core_files, *outside]
        for _, name in includes(path)
        if (target := resolve(name, path)) is not None
        and target.is_relative_to(INCLUDE)
        and (path in outside or folder_of(target) != folder_of(path))
    ]
    while waiting:
        header = waiting.pop()
        if header not in needed:
            needed.add(header)
            found = (resolve(name, header) for _, name in includes(header))
            waiting += [target for target in found if target is not None]
    unused = [relative(path) for path in cpp_files(INCLUDE) if path.resolve() not in needed]
    assert not unused, f"needed by no other folder, so they belong in csrc/: {unused}"


def test_own_headers_are_named_from_the_include_root(core_files: list[Path]) -> None:
    wrong = []
    for path in core_files:
        for bracket, name in includes(path):
            if ".." in Path(name).parts:
                wrong.append(f"{relative(path)}: {name} climbs out of its folder")
            if bracket == "<" and name.startswith("deltazip/"):
                wrong.append(f"{relative(path)}: <{name}> is ours, so it takes quotes")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", sorted(CONFINED_LIBRARIES))
def test_libraries_stay_where_they_belong(library: str, core_files: list[Path]) -> None:
    pattern, home = CONFINED_LIBRARIES[library]
    wrong = [
        f"{relative(path)} includes {name}"
        for path in core_files
        for _, name in includes(path)
        if pattern.match(name) and not path.is_relative_to(ROOT / home)
    ]
    assert not wrong, f"{library} belongs under {home} only:\n" + "\n".join(wrong)


def test_public_headers_name_no_library() -> None:
    wrong = [
        f"{relative(path)} includes {name}"
        for path in cpp_files(INCLUDE)
        for _, name in includes(path)
        if NEVER_IN_PUBLIC_HEADERS.match(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_device_code_lies_in_cuda_files_only(core_files: list[Path]) -> None:
    wrong = []
    for path in core_files:
        is_device_file = path.suffix in {".cu", ".cuh"}
        has_device_code = bool(DEVICE_CODE.search(path.read_text(encoding="utf-8")))
        if is_device_file != has_device_code:
            wrong.append(relative(path))
        if is_device_file and not path.is_relative_to(CSRC / "backend" / "cuda"):
            wrong.append(f"{relative(path)} lies outside csrc/backend/cuda")
    assert not wrong, f".cu and .cuh if and only if there is device code: {wrong}"


def test_every_folder_states_its_charter() -> None:
    wrong = []
    for name in MAY_INCLUDE:
        lines = (CSRC / name / "CMakeLists.txt").read_text(encoding="utf-8").splitlines()
        charter = "\n".join(lines[:4])
        if not lines[0].startswith("# ") or "May include:" not in charter:
            wrong.append(name)
    assert not wrong, (
        f"CMakeLists.txt must open with what the folder is for and may include: {wrong}"
    )


# ---- Python


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> tuple[str, ...]:
    """("deltazip", "server", "app") for deltazip/server/app.py; a package is its __init__."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module a file imports anywhere, functions included, made absolute; with its line.

    `from deltazip import engine` counts as deltazip.engine if there is such a module.
    """
    module = module_name(path)
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            if node.module:
                base += node.module.split(".")
            for alias in node.names:
                candidate = PACKAGE.parent.joinpath(*base, alias.name)
                is_module = candidate.is_dir() or candidate.with_suffix(".py").exists()
                is_module = is_module or (base == ["deltazip"] and alias.name == "_C")
                yield ".".join([*base, alias.name] if is_module else base), node.lineno


def room(module: str) -> str:
    """The part of the package a module belongs to: compress, server, cli, _C or its own name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def rank(name: str) -> int:
    return PYTHON_RANKS.get(name, TOP_LEVEL_RANK)


def test_python_imports_go_downwards() -> None:
    files = python_files()
    assert files, f"no Python files under {PACKAGE}"
    wrong = []
    for path in files:
        own = room(".".join(module_name(path)))
        for name, line in imports(path):
            if name.split(".")[0] != "deltazip" or not room(name):
                continue
            other = room(name)
            if other != own and rank(other) >= rank(own) and rank(own) != TOP_LEVEL_RANK:
                wrong.append(f"{relative(path)}:{line} imports {name}: {own} may not use {other}")
            if rank(own) == TOP_LEVEL_RANK and rank(other) > TOP_LEVEL_RANK:
                wrong.append(f"{relative(path)}:{line} imports {name}, which lies above it")
    assert not wrong, "\n".join(wrong)


def test_only_the_compressor_knows_torch() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for path in python_files()
        for name, line in imports(path)
        if name.split(".")[0] in COMPRESS_ONLY and room(".".join(module_name(path))) != "compress"
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles() -> None:
    """A model file is data. Safetensors only: no pickle, no torch.load, no allow_pickle."""
    wrong = []
    for folder in ("python", "tests", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, line in imports_anywhere(path):
                if name.split(".")[0] in FORBIDDEN_MODULES:
                    wrong.append(f"{relative(path)}:{line} imports {name}")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                    "torch.load",
                    "torch.save",
                }:
                    wrong.append(f"{relative(path)}:{node.lineno} calls {ast.unparse(node.func)}")
                if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                    wrong.append(f"{relative(path)}:{node.value.lineno} names allow_pickle")
    assert not wrong, "\n".join(wrong)


def imports_anywhere(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno


# ---- Size


def test_files_and_folders_stay_small() -> None:
    folders = [
        ROOT / name for name in ("include", "csrc", "python", "tests", "benchmarks", "examples")
    ]
    suffixes = CPP_SUFFIXES | {".py", ".pyi"}
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    long = [
        f"{relative(path)}: {count} lines"
        for path in sorted(files)
        if (count := path.read_text(encoding="utf-8").count("\n")) > MAX_LINES
    ]
    assert not long, f"more than {MAX_LINES} lines:\n" + "\n".join(long)

    modules: dict[Path, set[str]] = {}
    for path in files:
        if not path.stem.startswith("__"):
            modules.setdefault(path.parent, set()).add(path.stem)
    full = [
        f"{relative(path)}: {len(names)}"
        for path, names in sorted(modules.items())
        if len(names) > MAX_ENTRIES
    ]
    assert not full, f"more than {MAX_ENTRIES} modules in a folder:\n" + "\n".join(full)
