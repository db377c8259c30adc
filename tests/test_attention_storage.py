"""Attention kernels: bfloat16 storage, and results written into `out`."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from attention_cases import ACTIVE, Case, banded_mask, judge, plain_attention
from kernel_checks import available_isas
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sharpcore.backends import cpu, get_backend
from sharpcore.errors import InvalidInput
from sharpcore.testing.tolerance import relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Rows, keys, head size, tangents: every stress size of each at least once.
SIZES = [
    (1, 7, 8, 1),
    (7, 1, 40, 2),
    (33, 77, 59, 3),
    (77, 33, 64, 8),
    (144, 1025, 80, 1),
    (1025, 144, 111, 2),
    (33, 144, 160, 17),
    (144, 77, 8, 17),
    (77, 7, 111, 3),
]
# The last rounding, 2^-9 at most, is all that plain PyTorch errs by in some small cases.
FLOOR = 4e-3
needs_extension = pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")


def half_case(*sizes: int, **options: Any) -> Case:
    return Case(*sizes[:3], count=sizes[3], **{"batch": 1, "dtype": torch.bfloat16, **options})


def plain_tangent(case: Case) -> Tensor:
    """Forward mode of mathematical attention, each operation in the dtype of the case."""
    tangents = [
        torch.zeros(case.count, *primal.shape, dtype=primal.dtype) if tangent is None else tangent
        for primal, tangent in zip(case.qkv, (case.tensors[n] for n in ("dq", "dk", "dv")), strict=True)
    ]

    def attention(*qkv: Tensor) -> Tensor:
        return plain_attention(*qkv, case.mask_as(), case.scale)

    each = [torch.func.jvp(attention, case.qkv, tuple(t[i] for t in tangents))[1] for i in range(case.count)]
    return torch.stack(each)


def plain_adjoint(case: Case, cotangent: Tensor) -> list[Tensor]:
    def attention(*qkv: Tensor) -> Tensor:
        return plain_attention(*qkv, case.mask_as(), case.scale)

    pull = torch.func.vjp(attention, *case.qkv)[1]
    return [torch.stack(grads) for grads in zip(*map(pull, cotangent), strict=True)]


def check_half(case: Case, floor: float = FLOOR) -> None:
    """Forward, tangent and transpose in bfloat16 against float64, judged by plain PyTorch in bfloat16."""
    exact = case.as_float64()
    o, lse = case.forward("cpu")
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    plain = plain_attention(*case.qkv, case.mask_as(), case.scale)
    judge(o, plain, exact.tensors["out"], floor)
    # Products of bfloat16 are exact in float32: only their sums are rounded.
    judge(lse, lse.double(), exact.tensors["lse"], 2e-6)
    assert float((lse - exact.tensors["lse"]).abs().max()) < 1e-5 * (
        1 + float(exact.tensors["lse"].abs().max())
    )
    # Measured over SIZES: tangents 0.34 to 0.93 of plain PyTorch's error; transposes at most 0.99 of it where
    # they exceed FLOOR.
    judge(case.tangent("cpu"), plain_tangent(case), exact.tangent("reference"), floor)
    cotangent = case.cotangent()
    truths = exact.adjoint("reference", cotangent.double())
    grads = case.adjoint("cpu", cotangent)
    for truth, ours, usual in zip(truths, grads, plain_adjoint(case, cotangent), strict=True):
        assert (truth is None) == (ours is None)
        if truth is not None and ours is not None:
            assert ours.dtype == torch.bfloat16
            judge(ours, usual, truth, floor)


@needs_extension
@pytest.mark.parametrize("sizes", SIZES)
def test_bfloat16_over_sizes(sizes: tuple[int, ...]) -> None:
    check_half(half_case(*sizes, value_width=sizes[2] if sizes[0] % 3 else sizes[2] + 5))


@needs_extension
@pytest.mark.parametrize("heads", [1, 9])
@pytest.mark.parametrize("active", ACTIVE)
def test_bfloat16_for_every_set_of_operands(active: tuple[bool, bool, bool], heads: int) -> None:
    check_half(half_case(33, 71, 24, 2, active=active, heads=heads))


@needs_extension
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_with_masks_of_either_dtype(mask_dtype: torch.dtype) -> None:
    mask = banded_mask(33, 77, 2).bfloat16()
    mask[..., 5, :] = torch.finfo(torch.bfloat16).min
    mask[..., 6, :] = float("-inf")
    mask[..., 6, 3] = 0.0
    case = half_case(33, 77, 16, 2, mask=mask.double())
    check_half(case)
    kernels = get_backend("cpu", device="cpu", dtype=torch.bfloat16)
    t = case.tensors
    result = kernels.attention_tangent(
        *(t[n] for n in ("q", "k", "v", "out", "lse", "dq", "dk", "dv")),
        mask=mask.to(mask_dtype),
        scale=case.scale,
    )
    assert torch.equal(result, case.tangent("cpu"))
    o, lse = kernels.attention_forward(*case.qkv, mask=mask.to(mask_dtype), scale=case.scale)
    assert torch.equal(o, case.forward("cpu")[0])
    assert torch.equal(lse, case.forward("cpu")[1])


@needs_extension
def test_bfloat16_statistics_are_widened() -> None:
    case = half_case(9, 20, 8, 2)
    case.tensors["lse"] = case.tensors["lse"].bfloat16()
    assert bool(case.tangent("cpu").isfinite().all())
    assert case.tangent("cpu").dtype == torch.bfloat16


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_without_entries_average_the_values(dtype: torch.dtype) -> None:
    case = Case(9, 20, 8, heads=9, dtype=dtype)
    for name in ("q", "k", "dq", "dk"):
        case.tensors[name] = case.tensors[name][..., :0]
    o, lse = case.forward("cpu")
    v, dv = case.tensors["v"].double(), case.tensors["dv"].double()
    case.tensors.update(out=o, lse=lse)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(o, v.mean(-2, keepdim=True).expand_as(o)) < tolerance
    moved = case.tangent("cpu")
    assert relative_error(moved, dv.mean(-2, keepdim=True).expand_as(moved)) < tolerance


@needs_extension
@pytest.mark.parametrize("gain", [1e-38, 1e-22, 30.0])
def test_bfloat16_of_denormals_and_huge_logits(gain: float) -> None:
    # With gain 30 nearly all of dS cancels: o, which is rounded, leaves more than the product itself.
    check_half(half_case(33, 40, 16, 2, gain=gain), floor=5e-2 if gain > 1 else FLOOR)


@needs_extension
@pytest.mark.parametrize("name", ["q", "k", "v", "out", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bfloat16_nan_goes_on(name: str, value: float) -> None:
    case = half_case(9, 21, 8, 2, batch=2, heads=5)
    case.tensors[name][..., 1, 0, 3, 2 if name != "lse" else ...] = value
    results = [case.tangent("cpu")]
    if name in ("q", "k", "v"):
        results.append(case.forward("cpu")[0].unsqueeze(0))
    for result in results:
        bad = ~result.isfinite()
        # P = exp(score - inf) is zero, which is what an infinite log-sum-exp says.
        assert bool(bad.any()) or (name == "lse" and value == float("inf"))
        bad[:, 1, 0] = False
        assert not bool(bad.any())


@needs_extension
@pytest.mark.parametrize("active", [(True, True, True), (True, False, False)])
def test_bfloat16_bits_do_not_depend_on_threads(active: tuple[bool, bool, bool]) -> None:
    case = half_case(77, 144, 40, 3, heads=9, active=active)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            grads = case.adjoint("cpu", case.cotangent())
            results.append([*case.forward("cpu"), case.tangent("cpu"), *(g for g in grads if g is not None)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Outputs:
    """A case and NaN-filled memory for all its results, in one of several layouts."""

    def __init__(self, dtype: torch.dtype, layout: str, heads: int = 3) -> None:
        self.case = Case(33, 77, 12, 20, count=3, heads=heads, dtype=dtype)
        self.layout = layout
        o, lse = self.case.forward("cpu")
        self.forward = (self.empty(o), self.empty(lse.unsqueeze(-1)).squeeze(-1))
        self.tangent = self.empty(self.case.tangent("cpu"))
        grads = self.case.adjoint("cpu", self.case.cotangent())
        self.adjoint = tuple(self.empty(grad) for grad in grads if grad is not None)

    def empty(self, like: Tensor) -> Tensor:
        shape = like.shape
        if self.layout == "heads first":
            memory = torch.empty(shape, dtype=like.dtype)
        elif self.layout == "rows first":
            memory = torch.empty((*shape[:-3], shape[-2], shape[-3], shape[-1]), dtype=like.dtype).transpose(
                -2, -3
            )
        elif self.layout == "part":
            memory = torch.empty((*shape[:-1], shape[-1] + 5), dtype=like.dtype)[..., 2 : 2 + shape[-1]]
        else:
            memory = torch.empty((*shape[:-2], shape[-1], shape[-2]), dtype=like.dtype).mT
        return memory.fill_(float("nan"))

    def run(self, backend: str) -> None:
        case, t = self.case, self.case.tensors
        kernels = get_backend(backend, device="cpu", dtype=case.dtype)
        fixed: dict[str, Any] = {"mask": None, "scale": case.scale}
        returned = kernels.attention_forward(*case.qkv, **fixed, out=self.forward)
        assert all(a is b for a, b in zip(returned, self.forward, strict=True))
        primal = [t[name] for name in ("q", "k", "v", "out", "lse")]
        tangents = [t[name] for name in ("dq", "dk", "dv")]
        assert kernels.attention_tangent(*primal, *tangents, **fixed, out=self.tangent) is self.tangent
        returned = kernels.attention_adjoint(
            *primal, self.cotangent, **fixed, needed=case.active, out=self.adjoint
        )
        assert all(a is b for a, b in zip(returned, self.adjoint, strict=True))

    @property
    def cotangent(self) -> Tensor:
        if not hasattr(self, "_cotangent"):
            self._cotangent = self.case.cotangent()
        return self._cotangent


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["heads first", "rows first", "part", "columns"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_out_takes_the_results(backend: str, layout: str, dtype: torch.dtype) -> None:
    outputs = Outputs(dtype, layout)
    case = outputs.case
    outputs.run(backend)
    for ours, expected in zip(
        (*outputs.forward, outputs.tangent, *outputs.adjoint),
        (*case.forward(backend), case.tangent(backend), *case.adjoint(backend, outputs.cotangent)),
        strict=True,
    ):
        assert expected is not None
        assert torch.equal(ours, expected)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["heads first", "rows first", "part"])
def test_out_is_written_without_allocating(layout: str, dtype: torch.dtype) -> None:
    outputs = Outputs(dtype, layout, heads=9)
    outputs.run("cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        outputs.run("cpu")
    allocated = {event.key: event.self_cpu_memory_usage for event in measured.key_averages()}
    assert not {name: size for name, size in allocated.items() if size != 0 and name != "[memory]"}
    assert "aten::empty" not in allocated
    assert "aten::copy_" not in allocated


@needs_extension
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_out_that_cannot_hold_the_result_is_refused(backend: str) -> None:
    outputs = Outputs(torch.float32, "rows first")
    outputs.tangent = outputs.tangent[..., :-1]
    with pytest.raises(InvalidInput, match="out: expected shape"):
        outputs.run(backend)
    outputs = Outputs(torch.float32, "rows first")
    outputs.forward = (outputs.forward[0], outputs.forward[1].double())
    with pytest.raises(InvalidInput, match="out: expected shape"):
        outputs.run(backend)
    outputs = Outputs(torch.float32, "rows first")
    outputs.adjoint = (*outputs.adjoint[:2], outputs.adjoint[0])
    with pytest.raises(InvalidInput, match="out: expected shape"):
        outputs.run(backend)


@needs_extension
def test_out_for_what_is_not_needed_may_be_none() -> None:
    case = Case(9, 20, 8, active=(True, False, False))
    primal = [case.tensors[name] for name in ("q", "k", "v", "out", "lse")]
    cotangent = case.cotangent()
    target = torch.full((2, *case.tensors["q"].shape), float("nan"), dtype=torch.float64)
    grads = cpu.KERNELS["attention_adjoint"](
        *primal, cotangent, mask=None, scale=case.scale, needed=case.active, out=(target, None, None)
    )
    assert grads[0] is target
    assert grads[1] is grads[2] is None
    assert torch.equal(target, case.adjoint("cpu", cotangent)[0])


ISA = """
import sys
sys.path.insert(0, sys.argv[2])
from test_attention_storage import ACTIVE, SIZES, check_half, half_case, banded_mask
from sharpcore.backends import cpu
assert cpu.extension().isa() == sys.argv[1]
for sizes in SIZES[:4]:
    check_half(half_case(*sizes))
for active in ACTIVE:
    check_half(half_case(33, 71, 24, 3, heads=9, active=active))
check_half(half_case(33, 77, 16, 2, mask=banded_mask(33, 77).bfloat16().double()))
"""


@needs_extension
@pytest.mark.parametrize("isa", available_isas())
def test_bfloat16_on_every_instruction_set(isa: str) -> None:
    subprocess.run(
        [sys.executable, "-c", ISA, isa, os.path.dirname(__file__)],
        env={**os.environ, "SHARPCORE_CPU_ISA": isa, "OMP_NUM_THREADS": "2"},
        check=True,
        timeout=300,
    )
