"""What the tests of pointwise kernels share: odd layouts, poisoned memory, threads, instruction sets."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharpcore.backends import cpu

needs_extension = pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")


class NoAllocation(TorchDispatchMode):
    """Refuses every PyTorch operation whose result is not memory that was there before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert all(returned.alias_info is not None for returned in func._schema.returns), func
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes PyTorch fill uninitialized tensors with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def for_threads(run: Callable[[], Tensor], numbers: Sequence[int] = (1, 2, 5)) -> list[Tensor]:
    """The results with each number of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in numbers:
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def embed(tensor: Tensor, dim: int) -> Tensor:
    """The same values as every second slice along `dim` of a tensor of NaN."""
    size = list(tensor.shape)
    size[dim] *= 2
    view = torch.full(size, float("nan"), dtype=tensor.dtype, device=tensor.device)
    index = tuple(slice(None, None, 2) if d == dim % tensor.ndim else slice(None) for d in range(tensor.ndim))
    view[index] = tensor
    return view[index]


def to_channels_last(tensor: Tensor, channel_dim: int) -> Tensor:
    """The same values with the channels of each position side by side."""
    return tensor.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN counted as equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def available_isas() -> list[str]:
    """The instruction sets that this CPU has."""
    native = cpu.extension()
    features = {} if native is None else native.cpu_features()
    needed = {"avx2": "avx2", "avx512": "avx512", "avx512bf16": "avx512_bf16"}
    return ["portable", *(isa for isa, feature in needed.items() if features.get(feature))]


each_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
each_isa = pytest.mark.parametrize("isa", available_isas())


def run_with_isa(isa: str, code: str) -> None:
    """Run `code` in a process whose kernels use an instruction set."""
    check = f"from sharpcore.backends import cpu, reference\nassert cpu.extension().isa() == {isa!r}\n"
    subprocess.run(
        [sys.executable, "-c", check + code],
        env={**os.environ, "SHARPCORE_CPU_ISA": isa, "OMP_NUM_THREADS": "2"},
        check=True,
        timeout=300,
    )
