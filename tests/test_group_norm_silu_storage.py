"""GroupNorm + SiLU: memory of operands and results, refusals, threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from group_norm_cases import Shape, each_kernel, identify, make_arguments
from kernel_checks import each_layout, for_threads, needs_extension, to_channels_last
from torch import Tensor

from sharpcore.backends import cpu, reference
from sharpcore.errors import InvalidInput


@pytest.fixture
def set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_extension
@each_kernel
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [Shape(2, 320, 32, (8, 8)), Shape(2, 12, 3, (7,)), Shape(3, 40, 5, (1, 1))], ids=identify
)
def test_out_is_written_without_new_memory(
    kernel: str, channels_last: bool, dtype: torch.dtype, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make_arguments(shape, 3, channels_last=channels_last, dtype=dtype)
    expected = cpu.KERNELS[kernel](*arguments, shape.groups, True)
    out = torch.full_like(expected, float("nan"))
    # Slices of larger memory: every second vector, and samples with something in between.
    wide = torch.full((6, 2 * shape.batch, *expected.shape[2:]), float("nan"), dtype=dtype)
    wide = to_channels_last(wide, 2) if channels_last else wide
    apart = wide[::2, ::2]
    with torch.profiler.profile(profile_memory=True) as profile:
        assert cpu.KERNELS[kernel](*arguments, shape.groups, True, out=out) is out
        assert cpu.KERNELS[kernel](*arguments, shape.groups, True, out=apart) is apart
    assert not [event for event in profile.events() if event.cpu_memory_usage > 0]
    assert torch.equal(out, expected)
    assert torch.equal(apart, expected)
    assert wide[1::2].isnan().all()
    assert wide[:, 1::2].isnan().all()


@pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_extension)], ids=["reference", "cpu"]
)
@each_kernel
@each_layout
def test_out_of_any_strides(backend: object, kernel: str, channels_last: bool) -> None:
    shape = Shape(2, 12, 3, (4, 6))
    arguments = make_arguments(shape, 3, channels_last=channels_last, dtype=torch.float32)
    expected = backend.KERNELS[kernel](*arguments, shape.groups, True)
    size = expected.shape
    for out in (
        torch.empty(size),
        to_channels_last(torch.empty(size), 2),
        torch.empty(*size[:-1], 2 * size[-1])[..., ::2],
        torch.empty(size[::-1]).permute(4, 3, 2, 1, 0),
        torch.empty(size[1], size[0], *size[2:]).transpose(0, 1),
    ):
        out.fill_(float("nan"))
        assert backend.KERNELS[kernel](*arguments, shape.groups, True, out=out) is out
        # The layout of the result does not change the order of additions.
        assert torch.equal(out, expected)
    for wrong in (torch.empty(2, *size[1:]), torch.empty(size, dtype=torch.float64)):
        with pytest.raises(InvalidInput, match="out"):
            backend.KERNELS[kernel](*arguments, shape.groups, True, out=wrong)


@needs_extension
@each_kernel
@each_layout
def test_large_results_are_stored_past_the_cache(kernel: str, channels_last: bool) -> None:
    """36 MiB of results, in memory that allows it and in memory that does not."""
    shape = Shape(1, 64, 4, (48, 48))
    arguments = make_arguments(shape, 64, channels_last=channels_last, dtype=torch.float32)
    expected = reference.KERNELS[kernel](*arguments, shape.groups, True)
    size = expected.shape
    for start in (0, 1):
        memory = torch.full((expected.numel() + 16,), float("nan"))[start : start + expected.numel()]
        out = memory.view(size)
        if channels_last:
            out = memory.view(*size[:2], *size[3:], size[2]).movedim(-1, 2)
        cpu.KERNELS[kernel](*arguments, shape.groups, True, out=out)
        # Measured: 2e-7.
        assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()


@needs_extension
@each_kernel
@each_layout
def test_number_of_threads_changes_no_bit(kernel: str, channels_last: bool) -> None:
    for shape in (Shape(1, 6, 1, (9, 11)), Shape(2, 320, 32, (8, 8))):
        arguments = make_arguments(shape, 17, channels_last=channels_last, dtype=torch.float32)
        first, *others = for_threads(lambda a=arguments, n=shape.groups: cpu.KERNELS[kernel](*a, n, True))
        assert all(torch.equal(first, other) for other in others)


@needs_extension
@each_kernel
@each_layout
def test_strides(kernel: str, channels_last: bool) -> None:
    """Views of every kind give what their contiguous copies give, and read nothing beside themselves."""
    shape = Shape(2, 12, 3, (4, 6))
    arguments = make_arguments(shape, 4, channels_last=channels_last, dtype=torch.float32)
    vectors, x, mean, rstd, weight, bias = arguments
    expected = cpu.KERNELS[kernel](*arguments, shape.groups, True)

    def embed(tensor: Tensor, dim: int) -> Tensor:
        """The same values as every second slice along `dim` of a tensor of NaN."""
        size = list(tensor.shape)
        size[dim] *= 2
        view = torch.full(size, float("nan")).index_select(dim, torch.arange(size[dim]))
        index = tuple(slice(None, None, 2) if d == dim else slice(None) for d in range(tensor.ndim))
        view[index] = tensor
        return view[index]

    variants = {
        "every second tangent": embed(vectors, 0),
        "every second sample": embed(vectors, 1),
        "every second channel": embed(vectors, 2),
        "every second column": embed(vectors, 4),
        "transposed image": vectors.mT.contiguous().mT,
        "flipped": vectors.flip(0).flip(0),
    }
    for name, variant in variants.items():
        result = cpu.KERNELS[kernel](variant, x, mean, rstd, weight, bias, shape.groups, True)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6, msg=name)
    result = cpu.KERNELS[kernel](
        vectors, embed(x, 1), embed(mean, 1), embed(rstd, 0), embed(weight, 0), embed(bias, 0), 3, True
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    repeated = vectors[:1].expand(4, *vectors.shape[1:])
    result = cpu.KERNELS[kernel](repeated, x, mean, rstd, weight, bias, shape.groups, True)
    assert torch.equal(result[3], expected[0])


@needs_extension
@each_kernel
@pytest.mark.parametrize("empty", ["count", "batch", "positions"])
def test_empty(kernel: str, empty: str) -> None:
    shape = Shape(0 if empty == "batch" else 2, 8, 4, (0, 3) if empty == "positions" else (2, 3))
    x = torch.ones(shape.batch, 8, *shape.spatial)
    vectors = torch.ones(0 if empty == "count" else 3, *x.shape)
    statistic = torch.ones(shape.batch, 4)
    for backend in (reference, cpu):
        result = backend.KERNELS[kernel](vectors, x, statistic, statistic, None, None, 4, True)
        assert result.shape == vectors.shape


@needs_extension
def test_what_the_kernel_cannot_do_is_left_to_the_reference() -> None:
    shape = Shape(2, 8, 4, (5,))
    half = make_arguments(shape, 2, dtype=torch.float16)
    result = cpu.group_norm_silu_tangent(*half, 4, True)
    assert result.dtype == torch.float16
    assert torch.equal(result, reference.group_norm_silu_tangent(*half, 4, True))
    recorded = make_arguments(shape, 2)
    recorded[0].requires_grad_()
    assert cpu.group_norm_silu_tangent(*recorded, 4, True).requires_grad
    mixed = make_arguments(shape, 2, dtype=torch.float32)
    mixed[4] = mixed[4].double()
    assert cpu.group_norm_silu_tangent(*mixed, 4, True).dtype == torch.float32


@needs_extension
@each_kernel
@pytest.mark.parametrize(
    ("position", "wrong", "named"),
    [
        (0, (2, 2, 8, 6), "tangent"),
        (1, (2, 8, 4), "tangent"),
        (2, (2, 5), "mean"),
        (3, (1, 4), "rstd"),
        (4, (7,), "weight"),
        (4, (1, 8), "weight"),
        (5, (8, 1), "bias"),
        (5, (3, 8), "bias"),
    ],
)
def test_wrong_shapes_are_refused(kernel: str, position: int, wrong: tuple[int, ...], named: str) -> None:
    arguments = make_arguments(Shape(2, 8, 4, (5,)), 2)
    arguments[position] = torch.ones(wrong, dtype=torch.float64)
    with pytest.raises(InvalidInput, match=named):
        cpu.KERNELS[kernel](*arguments, 4, True)
    with pytest.raises(InvalidInput, match="groups"):
        cpu.KERNELS[kernel](*make_arguments(Shape(2, 8, 4, (5,)), 2), 3, True)


@needs_extension
@pytest.mark.usefixtures("set_threads")
def test_two_threads_at_once() -> None:
    torch.set_num_threads(2)
    shape = Shape(2, 64, 32, (8, 8))
    inputs = [make_arguments(shape, count, dtype=torch.float32) for count in (3, 8)]
    expected = [cpu.group_norm_silu_tangent(*arguments, 32, True) for arguments in inputs]
    equal: list[bool] = []

    def work(which: int) -> None:
        # numpy compares without PyTorch's own thread pool.
        reference_bytes = expected[which].numpy().tobytes()
        for _ in range(200):
            result = cpu.group_norm_silu_tangent(*inputs[which], 32, True)
            equal.append(result.numpy().tobytes() == reference_bytes)

    threads = [threading.Thread(target=work, args=(which % 2,), daemon=True) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(equal) == 800
    assert all(equal)


FORK = """
import os, signal, torch
from sharpcore.backends import cpu
torch.set_num_threads(2)
x = torch.randn(2, 64, 8, 8)
arguments = (torch.randn(5, *x.shape), x, torch.zeros(2, 32), torch.ones(2, 32), None, None, 32, True)
expected = cpu.group_norm_silu_tangent(*arguments).numpy().tobytes()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        same = all(cpu.group_norm_silu_tangent(*arguments).numpy().tobytes() == expected for _ in range(20))
        os._exit(0 if same else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cpu.group_norm_silu_tangent(*arguments).numpy().tobytes() == expected
"""


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_children_made_by_fork_work() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=300)
