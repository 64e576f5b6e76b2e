"""Drives CMake for deltazip._C; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def run(command: list[str]) -> None:
    """Runs a command; its own output says what went wrong, so no traceback follows."""
    status = subprocess.run(command).returncode
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}, see above")


class CMakeExtension(Extension):
    """An extension whose sources are known to CMake only."""

    def __init__(self, name: str, target: str) -> None:
        super().__init__(name, sources=[])
        self.target = target


class CMakeBuild(build_ext):
    """Builds a CMake target and puts the module where setuptools wants it.

    DELTAZIP_BUILD_DIR names a configured CMake tree to build in, so that tests in C++ and the
    module share one compilation. DELTAZIP_CMAKE_ARGS adds arguments to the configure step.
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
        else:
            tree = Path(self.build_temp).resolve()
            self._configure(tree)
        run(["cmake", "--build", str(tree), "--target", ext.target])

        suffix = self.get_ext_filename(ext.name).rpartition(os.sep)[2]
        modules = list(tree.rglob(suffix))
        if len(modules) != 1:
            raise SystemExit(f"expected one {suffix} under {tree}, found {len(modules)}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a running process keeps the old module mapped
        shutil.copy2(modules[0], target)

    def _configure(self, tree: Path) -> None:
        build_type = "Debug" if self.debug else "Release"
        # --fresh: an isolated build leaves paths of a vanished environment in the cache.
        command = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja"]
        command += [f"-DCMAKE_BUILD_TYPE={build_type}", "-DDELTAZIP_PYTHON=ON"]
        command += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ]
        command += os.environ.get("DELTAZIP_CMAKE_ARGS", "").split()
        run(command)


setup(
    ext_modules=[CMakeExtension("deltazip._C", target="_C")],
    cmdclass={"build_ext": CMakeBuild},
)
