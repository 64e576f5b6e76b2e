"""Drives CMake for the compiled parts; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_TARGET = "deltazip_cuda"
CUDA_LIBRARY = "libdeltazip_cuda.so"


def run(command: list[str]) -> None:
    """Runs a command; its own output says what went wrong, so no traceback follows."""
    status = subprocess.run(command).returncode
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}, see above")


def find_nvcc() -> str | None:
    """CUDA's compiler, where it is looked for by CMake too."""
    places = (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((found for place in places if place and (found := shutil.which(place))), None)


def cuda_choice() -> str:
    """DELTAZIP_CUDA: 1 builds the CUDA library or fails, 0 does not, auto where nvcc is found."""
    choice = os.environ.get("DELTAZIP_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"DELTAZIP_CUDA must be 0, 1 or auto, got '{choice}'")
    if choice == "1" and not find_nvcc():
        raise SystemExit("DELTAZIP_CUDA=1: no nvcc on PATH, in CUDACXX or in /usr/local/cuda/bin")
    return choice if find_nvcc() else "0"


class CMakeExtension(Extension):
    """An extension whose sources are known to CMake only."""

    def __init__(self, name: str, target: str) -> None:
        super().__init__(name, sources=[])
        self.target = target


class CMakeBuild(build_ext):
    """Builds CMake targets and puts the libraries where setuptools wants them.

    DELTAZIP_BUILD_DIR names a configured CMake tree to build in, so that tests in C++ and the
    module share one compilation. DELTAZIP_CMAKE_ARGS adds arguments to the configure step.
    The CUDA library goes beside the module, which opens it only when a GPU is asked for.
    """

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            super().build_extension(ext)
            return
        shared_tree = os.environ.get("DELTAZIP_BUILD_DIR")
        if shared_tree:
            tree = Path(shared_tree).resolve()
            if not (tree / "CMakeCache.txt").exists():
                raise SystemExit(f"DELTAZIP_BUILD_DIR={tree} is not a configured CMake tree")
            cuda = "1" if "DELTAZIP_CUDA:BOOL=ON" in (tree / "CMakeCache.txt").read_text() else "0"
        else:
            tree = Path(self.build_temp).resolve()
            cuda = self._configure(tree, cuda_choice())
        run(["cmake", "--build", str(tree), "--target", ext.target])
        suffix = self.get_ext_filename(ext.name).rpartition(os.sep)[2]
        target = Path(self.get_ext_fullpath(ext.name))
        modules = list(tree.rglob(suffix))
        if len(modules) != 1:
            raise SystemExit(f"expected one {suffix} under {tree}, found {len(modules)}")
        install(modules[0], target)
        if cuda != "0":
            self._build_cuda(tree, target.parent, may_fail=cuda == "auto")

    def _build_cuda(self, tree: Path, folder: Path, *, may_fail: bool) -> None:
        try:
            run(["cmake", "--build", str(tree), "--target", CUDA_TARGET])
        except SystemExit as error:
            if not may_fail:
                raise
            self.warn(f"going on without the CUDA library ({error}); DELTAZIP_CUDA=0 spares this")
            return
        install(tree / CUDA_LIBRARY, folder / CUDA_LIBRARY)

    def _configure(self, tree: Path, cuda: str) -> str:
        """Configures, and returns whether CUDA is part of it: "0", "1" or "auto"."""
        build_type = "Debug" if self.debug else "Release"
        # --fresh: an isolated build leaves paths of a vanished environment in the cache.
        command = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja"]
        command += [f"-DCMAKE_BUILD_TYPE={build_type}", "-DDELTAZIP_PYTHON=ON"]
        command += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ]
        if cuda != "0":
            command += ["-DDELTAZIP_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        command += os.environ.get("DELTAZIP_CMAKE_ARGS", "").split()
        try:
            run(command)
        except SystemExit as error:
            if cuda != "auto":
                raise
            self.warn(f"going on without the CUDA library ({error})")
            return self._configure(tree, "0")
        return cuda


def install(built: Path, target: Path) -> None:
    """Copies to a new file: a running process keeps the old one mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copy2(built, target)


setup(
    ext_modules=[CMakeExtension("deltazip._C", target="_C")],
    cmdclass={"build_ext": CMakeBuild},
)
