"""Builds sharpcore with its extensions (CMake and ninja): sharpcore._C where a C++17 compiler is found, and
sharpcore._cuda where nvcc is found as well."""

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


def find_nvcc() -> str | None:
    """Path of the CUDA compiler, where it usually is."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home]
    return (
        os.environ.get("CUDACXX")
        or shutil.which("nvcc")
        or shutil.which("nvcc", path=os.pathsep.join(folders))
    )


REQUIRED = enabled("SHARPCORE_REQUIRE_EXTENSION")
SKIPPED = enabled("SHARPCORE_NO_EXTENSION")
SANITIZE = os.environ.get("SHARPCORE_SANITIZE", "")
# ON: sharpcore._cuda must be built. OFF: it is not. auto: where nvcc is found; a failure leaves it out.
CUDA = os.environ.get("SHARPCORE_CUDA", "auto").lower()
CUDA_REQUIRED = CUDA in ("on", "1")
CUDA_SKIPPED = SKIPPED or bool(SANITIZE) or CUDA in ("off", "0")


WITHOUT_CPU = (
    "sharpcore._C was not built ({reason}): sharpcore will use its PyTorch reference kernels. Install a "
    "C++17 compiler and try again; SHARPCORE_REQUIRE_EXTENSION=1 makes this an error, "
    "SHARPCORE_NO_EXTENSION=1 skips the build."
)
WITHOUT_CUDA = (
    "sharpcore._cuda was not built ({reason}): Krylov bases on a GPU will use PyTorch. Install nvcc of CUDA "
    "12.8 or newer and try again; SHARPCORE_CUDA=ON makes this an error, SHARPCORE_CUDA=OFF skips the build."
)


class CMakeBuild(build_ext):
    """Runs CMake for each extension; where one is not required, a failure leaves the package without it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name == "sharpcore._cuda"
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if cuda:
                self._run_cmake(
                    Path(f"{self.build_temp}-cuda"),
                    library.parent,
                    *("-DSHARPCORE_CUDA=ON", "-DSHARPCORE_MODULE=OFF"),
                    f"-DCMAKE_CUDA_COMPILER={find_nvcc() or 'nvcc'}",
                    target="_cuda",
                )
            else:
                self._run_cmake(
                    Path(self.build_temp),
                    library.parent,
                    f"-DSHARPCORE_SANITIZE={SANITIZE}",
                    f"-DSHARPCORE_NATIVE_TESTS={'ON' if enabled('SHARPCORE_NATIVE_TESTS') else 'OFF'}",
                )
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise
            cmake_failed = isinstance(error, subprocess.CalledProcessError)
            reason = "see CMake's output above" if cmake_failed else error
            self.warn((WITHOUT_CUDA if cuda else WITHOUT_CPU).format(reason=reason))

    def _run_cmake(self, build: Path, output: Path, *options: str, target: str = "all") -> None:
        import pybind11

        build = build.resolve()
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
            *options,
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", target], check=True)


def extensions() -> list[Extension]:
    """What is to be built here."""
    found = [] if SKIPPED else [Extension("sharpcore._C", sources=[], optional=not REQUIRED)]
    if CUDA_SKIPPED:
        return found
    if CUDA_REQUIRED or find_nvcc():
        return [*found, Extension("sharpcore._cuda", sources=[], optional=not CUDA_REQUIRED)]
    print("sharpcore._cuda is not built: nvcc was not found (SHARPCORE_CUDA=ON makes this an error)")
    return found


setup(
    # kernels/ is no top-level package: one of that name would hide the `kernels` that diffusers may import.
    # The link sharpcore/kernels serves the source tree and editable installs, whose finder knows no namespace
    # package inside a regular one.
    packages=[*find_packages(include=["sharpcore", "sharpcore.*"]), "sharpcore.kernels"],
    package_dir={"sharpcore.kernels": "kernels"},
    package_data={"sharpcore": ["py.typed", "models/**/*"], "sharpcore.kernels": ["*.md"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
