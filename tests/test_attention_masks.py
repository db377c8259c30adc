"""Attention with additive and boolean masks: every shape that broadcasts, rows that have no key at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import ACTIVE, Case, banded_mask, check, check_forward, normal, plain_attention
from kernel_checks import needs_extension, poisoned_memory
from torch import Tensor

from sharpcore.backends import get_backend
from sharpcore.errors import InvalidInput
from sharpcore.testing.tolerance import relative_error


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gain", [1e-22, 1.0, 30.0])
def test_forward_with_masks(gain: float, dtype: torch.dtype) -> None:
    mask = banded_mask(33, 144, 2)
    for part in (mask, mask[:, :, :1], mask[0, 0]):
        check_forward(Case(33, 144, 16, dtype=dtype, mask=part, gain=gain, count=0))
    # No admissible key for a whole row, and for the first block of keys of another.
    mask[..., 4, :] = float("-inf")
    mask[..., 5, :100] = float("-inf")
    case = Case(33, 144, 16, dtype=dtype, mask=mask, gain=gain, count=0)
    check_forward(case)
    out, lse = case.forward("cpu")
    assert bool((out[..., 4, :] == 0).all())
    assert bool((lse[..., 4] == float("-inf")).all())


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [1, 2])
def test_kernel_with_masks(heads: int, dtype: torch.dtype) -> None:
    mask = banded_mask(33, 77, heads)
    check(Case(33, 77, 16, dtype=dtype, mask=mask))
    check(Case(33, 77, 16, dtype=dtype, mask=mask[:, :, :1]))
    check(Case(33, 77, 16, dtype=dtype, mask=mask[0, 0]))
    check(Case(33, 77, 16, dtype=dtype, mask=mask, active=(True, False, False)))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_without_an_admissible_key_do_not_move(backend: str) -> None:
    mask = banded_mask(9, 20)
    mask[..., 4, :] = float("-inf")
    case = Case(9, 20, 8, mask=mask)
    result = case.tangent(backend)
    assert bool(torch.isfinite(result).all())
    assert bool((result[..., 4, :] == 0).all())
    assert float(result[..., 3, :].abs().max()) > 0
    for grad in case.adjoint(backend, case.cotangent()):
        assert grad is not None
        assert bool(torch.isfinite(grad).all())


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_far_below_the_largest_give_zero(dtype: torch.dtype) -> None:
    mask = torch.zeros(9, 20)
    mask[:, 10:] = -torch.tensor([1e2, 2e2, 1e3, 1e5, 1e10, 1e20, 1e30, 3e38, float("inf"), 1e4])
    case = Case(9, 20, 8, dtype=dtype, mask=mask.double())
    check(case)
    grads = case.adjoint("cpu", case.cotangent())
    assert all(bool((grad[..., 12:, :] == 0).all()) for grad in grads[1:] if grad is not None)


# Boolean masks. The shapes broadcast to [2, 3, 9, 70]: several blocks of keys, more rows than one tile has in
# float64.
SHAPES = [(2, 3, 9, 70), (3, 9, 70), (2, 1, 1, 70), (1, 3, 9, 1), (9, 70), (1, 70), (70,)]


def boolean_mask(*shape: int) -> Tensor:
    """True where a key takes part: about half of them."""
    return normal(*shape, seed=60) > 0


def as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask, 0.0, float("-inf")).to(dtype)


def results(case: Case, backend: str) -> list[Tensor]:
    """Everything that attention's kernels compute."""
    grads = case.adjoint(backend, case.cotangent())
    return [*case.forward(backend), case.tangent(backend), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boolean_mask_is_the_additive_one_of_zero_and_minus_infinity(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype
) -> None:
    mask = boolean_mask(*shape)
    settings: dict[str, Any] = {"heads": 3, "dtype": dtype}
    boolean = Case(9, 70, 16, 11, **settings, mask=mask)
    additive = Case(9, 70, 16, 11, **settings, mask=as_numbers(mask, dtype))
    open_to_all = Case(9, 70, 16, 11, **settings)
    with poisoned_memory():
        got, expected = results(boolean, backend), results(additive, backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(got[0], results(open_to_all, backend)[0])


@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_derivative_with_a_boolean_mask(backend: str, active: tuple[bool, bool, bool]) -> None:
    mask = boolean_mask(1, 2, 7, 33)
    mask[..., 0] = True
    case = Case(7, 33, 8, 5, active=active, mask=mask)
    tangents = [
        torch.zeros(case.count, *t.shape, dtype=t.dtype) if d is None else d
        for t, d in zip(case.qkv, (case.tensors[n] for n in ("dq", "dk", "dv")), strict=True)
    ]

    def attention(*qkv: Tensor) -> Tensor:
        return plain_attention(*qkv, as_numbers(mask, torch.float64), case.scale)

    expected = torch.stack(
        [torch.func.jvp(attention, case.qkv, tuple(d[i] for d in tangents))[1] for i in range(case.count)]
    )
    assert relative_error(case.tangent(backend), expected) < 1e-13
    cotangent = case.cotangent()
    _, pull = torch.func.vjp(attention, *case.qkv)
    for pulled, position in zip(case.adjoint(backend, cotangent), range(3), strict=True):
        assert (pulled is None) != active[position]
        if pulled is not None:
            exact = torch.stack([pull(c)[position] for c in cotangent])
            assert relative_error(pulled, exact) < 1e-13


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (7, 33), (33, 7), (77, 144), (144, 77)])
def test_kernel_with_boolean_masks(rows: int, keys: int, dtype: torch.dtype) -> None:
    for shape in ((2, 2, rows, keys), (rows, keys), (2, 1, 1, keys)):
        mask = boolean_mask(*shape)
        mask[..., -1] = True
        check(Case(rows, keys, 40, dtype=dtype, mask=mask))
        check_forward(Case(rows, keys, 40, dtype=dtype, mask=mask, count=0))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_a_boolean_mask_leaves_without_a_key(dtype: torch.dtype, backend: str) -> None:
    mask = boolean_mask(1, 2, 9, 70)
    mask[..., 0] = True
    mask[..., 4, :] = False  # a whole row
    mask[..., 5, :66] = False  # the first block of keys of another
    mask[..., 5, 66] = True
    mask[:, :, :, 3] = False  # a key in every row
    case = Case(9, 70, 16, dtype=dtype, mask=mask)
    out, lse, tangent, dq, dk, dv = results(case, backend)
    for result in (out, tangent, dq, dk, dv):
        assert bool(result.isfinite().all())
    for result in (out, tangent, dq):
        assert bool((result[..., 4, :] == 0).all())
        assert bool((result[..., 5, :] != 0).any())
    assert bool((lse[..., 4] == float("-inf")).all())
    assert bool(lse[..., 5].isfinite().all())
    for result in (dk, dv):
        assert bool((result[..., 3, :] == 0).all())
    # None of it moves with what is left out: cotangents of the row, and tangents of the key.
    cotangent = case.cotangent()
    for grad, moved in zip((dq, dk, dv), case.adjoint(backend, _raised(cotangent, 4)), strict=True):
        assert moved is not None
        assert torch.equal(grad, moved)
    for name in ("dk", "dv"):
        case.tensors[name] = _raised(case.tensors[name], 3)
    assert torch.equal(tangent, case.tangent(backend))


def _raised(vectors: Tensor, row: int) -> Tensor:
    """The same but for one row of each head."""
    raised = vectors.clone()
    raised[..., row, :] += 1
    return raised


@needs_extension
def test_boolean_masks_in_any_memory() -> None:
    """Every second entry of a larger mask, and a transposed one."""
    mask = boolean_mask(1, 2, 9, 70)
    wide = torch.zeros(1, 2, 18, 140, dtype=torch.bool)
    wide[:, :, ::2, ::2] = mask
    expected = results(Case(9, 70, 16, mask=mask), "cpu")
    for other in (wide[:, :, ::2, ::2], mask.mT.contiguous().mT):
        found = results(Case(9, 70, 16, mask=other), "cpu")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_masks_of_integers_and_of_other_shapes_are_refused(backend: str) -> None:
    case = Case(9, 20, 8)
    case.mask = torch.ones(9, 20, dtype=torch.int64)
    kernels = get_backend(backend, device="cpu", dtype=torch.float64)
    with pytest.raises(
        InvalidInput, match=r"^mask: expected booleans or floating-point numbers, got torch\.int64"
    ):
        kernels.attention_forward(*case.qkv, mask=case.mask, scale=case.scale)
    if backend == "cpu":
        case.mask = torch.ones(9, 19, dtype=torch.bool)
        with pytest.raises(InvalidInput, match=r"^mask: expected a shape"):
            case.tangent(backend)
