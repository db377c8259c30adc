"""Builds sharpcore and, where a C++17 compiler is found, its extension sharpcore._C (CMake and ninja)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


REQUIRED = enabled("SHARPCORE_REQUIRE_EXTENSION")
SKIPPED = enabled("SHARPCORE_NO_EXTENSION")


class CMakeBuild(build_ext):
    """Runs CMake; unless SHARPCORE_REQUIRE_EXTENSION=1 is set, a failure leaves a pure-Python install."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._run_cmake(library.parent)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if REQUIRED:
                raise
            cmake_failed = isinstance(error, subprocess.CalledProcessError)
            reason = "see CMake's output above" if cmake_failed else error
            self.warn(
                f"sharpcore._C was not built ({reason}): sharpcore will use its PyTorch reference kernels. "
                "Install a C++17 compiler and try again; SHARPCORE_REQUIRE_EXTENSION=1 makes this an error, "
                "SHARPCORE_NO_EXTENSION=1 skips the build."
            )

    def _run_cmake(self, output: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        # CMake's cache of an earlier run names paths of pip's build environment, which is gone.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSHARPCORE_SANITIZE={os.environ.get('SHARPCORE_SANITIZE', '')}",
            f"-DSHARPCORE_NATIVE_TESTS={'ON' if enabled('SHARPCORE_NATIVE_TESTS') else 'OFF'}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    # kernels/ is no top-level package: one of that name would hide the `kernels` that diffusers may import.
    # The link sharpcore/kernels serves the source tree and editable installs, whose finder knows no namespace
    # package inside a regular one.
    packages=[*find_packages(include=["sharpcore", "sharpcore.*"]), "sharpcore.kernels"],
    package_dir={"sharpcore.kernels": "kernels"},
    package_data={"sharpcore": ["py.typed", "models/**/*"], "sharpcore.kernels": ["*.md"]},
    ext_modules=[] if SKIPPED else [Extension("sharpcore._C", sources=[], optional=not REQUIRED)],
    cmdclass={"build_ext": CMakeBuild},
)
