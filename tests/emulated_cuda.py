"""The CUDA kernels on the CPU: the sources of csrc/cuda, built with the header that runs them in threads
(tests/native/cuda_emulation) into a Python module like sharpcore._cuda."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "native" / "cuda_emulation"
SOURCES = ROOT / "csrc" / "cuda"
NAME = "_cuda_emulated"
# As CMakeLists.txt has it: no product of probes fuses with a sum.
FLAGS = {"philox.cu": ["-ffp-contract=off"]}


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def _key() -> str:
    """What the module is made of."""
    state = hashlib.sha256(f"{sysconfig.get_config_var('EXT_SUFFIX')} {_compiler()}".encode())
    headers = (ROOT / "csrc" / "include").rglob("*.h")
    for file in sorted([*SOURCES.iterdir(), *EMULATION.rglob("*.h"), *headers, Path(__file__)]):
        state.update(file.read_bytes())
    return state.hexdigest()[:16]


def build() -> ModuleType:
    """The emulated module, built unless it is there. Skips where there is no compiler."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = _compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = ROOT / "build" / "cuda-emulation"
    library = folder / f"{NAME}-{_key()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, pybind11.get_include(), library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(compiler: str, pybind11: str, library: Path) -> None:
    includes = [EMULATION, ROOT / "csrc", ROOT / "csrc" / "include", pybind11, sysconfig.get_path("include")]
    common = [
        *(compiler, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-DSHARPCORE_CUDA_MODULE={NAME}"),
        *(f"-I{path}" for path in includes),
    ]
    scratch = library.with_suffix(f".{os.getpid()}")
    scratch.mkdir()
    try:
        running, objects = [], []
        for source in sorted([*SOURCES.glob("*.cu"), SOURCES / "bindings.cpp"]):
            objects.append(scratch / f"{source.stem}.o")
            command = [*common, *FLAGS.get(source.name, []), "-x", "c++", "-c", source, "-o", objects[-1]]
            running.append(subprocess.Popen(command))
            if len(running) == 2:
                assert running.pop(0).wait() == 0
        assert all(process.wait() == 0 for process in running)
        made = scratch / library.name
        subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", made], check=True)
        # Another process may have been faster.
        os.replace(made, library)
    finally:
        shutil.rmtree(scratch)


@contextlib.contextmanager
def in_place_of_the_gpu(module: ModuleType) -> Iterator[None]:
    """The wrappers of the cuda backend take CPU tensors to `module` meanwhile."""
    from sharpcore.backends.cuda import native

    before = native._extension
    native._extension = module
    try:
        yield
    finally:
        native._extension = before
