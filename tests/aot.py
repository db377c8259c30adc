"""Triton kernels compiled ahead of time for GPUs that are not there: registers, spills, shared memory, PTX.

Compiles in a process of its own, as kernels of this one may be interpreted.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

# Bytes of shared memory that one block may ask for.
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
ARCHITECTURES = (80, 90)
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Request:
    """One kernel of `sharpcore.kernels.<module>` with the types of its arguments.

    `types` are Triton's ("*bf16", "i32", "fp32"); `constants` the values of its constexpr arguments,
    those of a configuration included; `aligned` the arguments whose values are multiples of 16.
    """

    module: str
    kernel: str
    types: Mapping[str, str | Sequence[str]]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    architecture: int
    aligned: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a kernel: registers of a thread, bytes of its stack and of what it spills, and the
    shared memory of a block."""

    registers: int
    stack: int
    spilled: int
    shared: int
    ptx: str

    def assert_fits(self, architecture: int, request: object = None, spilled: int = 0) -> None:
        """No spills, or at most so many bytes of a thread, and a block's shared memory exists."""
        assert self.spilled <= spilled, (f"{self.spilled} bytes spilled", request)
        assert self.shared <= SHARED_LIMITS[architecture], (f"{self.shared} bytes of shared memory", request)

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether matrix instructions are there."""
        return re.search(r"\b(mma\.sync|wgmma\.mma_async)", self.ptx) is not None


def recorded(
    module: Any, launch: Callable[[], None], architecture: int, *, configuration: int = 0
) -> list[Request]:
    """The kernels of a module that a launching function launches, with the types that its arguments give.

    Tensors may be those of the meta device. `configuration` counts; kernels that have fewer are left out.
    """
    requests: list[Request] = []

    def record(
        kernel: Any,
        _grid: Any,
        arguments: Mapping[str, Any],
        configurations: Sequence[Any],
        _key: Sequence[str] = (),
    ) -> None:
        if configuration >= len(configurations):
            return
        chosen = configurations[configuration]
        constants, types, aligned = dict(chosen.kwargs), {}, []
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                types[name] = _POINTERS[value.dtype]
                aligned.append(name)
            elif value is None or name in kernel.fn.__annotations__ or (type(value) is int and value == 1):
                constants[name] = value
            elif isinstance(value, float):
                types[name] = "fp32"
            elif isinstance(value, tuple):
                types[name] = [_integer(entry) for entry in value]
                aligned += [f"{name}.{i}" for i, entry in enumerate(value) if entry % 16 == 0]
                constants |= {f"{name}.{i}": 1 for i, entry in enumerate(value) if entry == 1}
            else:
                types[name] = _integer(value)
                aligned += [name] if value % 16 == 0 else []
        stem = module.__name__.rpartition(".")[2]
        name = kernel.fn.__name__
        requests.append(
            Request(stem, name, types, constants, chosen.num_warps, chosen.num_stages, architecture, aligned)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", record)
        launch()
    return requests


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_all(requests: Sequence[Request]) -> list[Compiled]:
    """Compile kernels one after the other in a new process."""
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([asdict(request) for request in requests]),
            env={**environment, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return [Compiled(**result) for result in json.loads(done.stdout)]


def _compile(request: Request) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"sharpcore.kernels.{request.module}"), request.kernel)
    place = {name: index for index, name in enumerate(kernel.arg_names)}
    missing = set(place) - set(request.types) - set(request.constants)
    assert not missing, f"{request.kernel}: nothing is said of {sorted(missing)}"

    def path(name: str) -> tuple[int, ...]:
        name, _, entry = name.partition(".")
        return (place[name], int(entry)) if entry else (place[name],)

    def kind(name: str) -> str | tuple[str, ...]:
        given = "constexpr" if name in request.constants else request.types[name]
        if isinstance(given, str):
            return given
        return tuple("constexpr" if f"{name}.{i}" in request.constants else t for i, t in enumerate(given))

    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in kernel.arg_names},
        constexprs={path(name): value for name, value in request.constants.items()},
        attrs={path(name): [["tt.divisibility", 16]] for name in request.aligned},
    )
    options = {"num_warps": request.warps, "num_stages": request.stages}
    target = GPUTarget("cuda", request.architecture, 32)
    made = triton.compile(source, target=target, options=options)
    registers, stack, spilled = _resources(made.asm["cubin"])
    return Compiled(registers, stack, spilled, made.metadata.shared, made.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    # What ptxas spills lies on the stack; kernels that index no array of their own have nothing else there.
    return found["REG"], found["STACK"], found["STACK"] + found["LOCAL"]


if __name__ == "__main__":
    json.dump([asdict(_compile(Request(**request))) for request in json.load(sys.stdin)], sys.stdout)
