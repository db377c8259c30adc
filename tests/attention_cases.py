"""Cases of attention that the tests of every backend share, and how their errors are judged."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharpcore.backends import get_backend, reference
from sharpcore.testing.tolerance import assert_error_at_most, relative_error

LENGTHS = (1, 7, 33, 77, 144, 1025)
WIDTHS = (8, 40, 59, 64, 80, 111, 160)
COUNTS = (1, 2, 3, 8, 17)
# Every operand that can carry a tangent, alone and together.
ACTIVE = [active for active in itertools.product((True, False), repeat=3) if any(active)]
# The last rounding, 2^-9 or 2^-12 at most, is all that plain PyTorch errs by in some small cases.
_HALF_FLOORS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Case:
    """One attention with its primal results and K tangents, [B, H, L, E] views of [B, L, H, E] memory.

    A backend is a name, or whatever has its kernels as attributes.
    """

    length: int
    keys: int
    width: int
    value_width: int | None = None
    count: int = 2
    batch: int = 2
    heads: int = 2
    gain: float = 1.0
    mask: Tensor | None = None
    active: tuple[bool, bool, bool] = (True, True, True)
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    tensors: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wide = self.value_width or self.width
        sizes = {"q": (self.length, self.width), "k": (self.keys, self.width), "v": (self.keys, wide)}
        for seed, (name, (rows, columns)) in enumerate(sizes.items()):
            shape = (self.batch, rows, self.heads, columns)
            primal = self.gain * normal(*shape, seed=seed)
            self.tensors[name] = primal.to(self.device, self.dtype).transpose(1, 2)
            tangent = normal(self.count, *shape, seed=10 + seed)
            tangent = tangent.to(self.device, self.dtype).transpose(2, 3)
            self.tensors["d" + name] = tangent if self.active[seed] else None
        self.scale = self.width**-0.5
        out, lse = reference.KERNELS["attention_forward"](*self.qkv, mask=self.mask_as(), scale=self.scale)
        self.tensors.update(out=out, lse=lse)

    def mask_as(self) -> Tensor | None:
        if self.mask is None or self.mask.dtype == torch.bool:
            return None if self.mask is None else self.mask.to(self.device)
        return self.mask.to(self.device, self.dtype)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors["q"], self.tensors["k"], self.tensors["v"]

    def kernels(self, backend: Any) -> Any:
        if isinstance(backend, str):
            return get_backend(backend, device=self.device, dtype=self.dtype)
        return backend

    def forward(self, backend: Any) -> tuple[Tensor, Tensor]:
        kernel = self.kernels(backend).attention_forward
        return kernel(*self.qkv, mask=self.mask_as(), scale=self.scale)

    def tangent(self, backend: Any) -> Tensor:
        t = self.tensors
        kernel = self.kernels(backend).attention_tangent
        names = ("q", "k", "v", "out", "lse", "dq", "dk", "dv")
        return kernel(*(t[name] for name in names), mask=self.mask_as(), scale=self.scale)

    def adjoint(self, backend: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        kernel = self.kernels(backend).attention_adjoint
        primal = (self.tensors[name] for name in ("q", "k", "v", "out", "lse"))
        return kernel(*primal, cotangent, mask=self.mask_as(), scale=self.scale, needed=self.active)

    def cotangent(self) -> Tensor:
        return normal(self.count, *self.tensors["out"].shape, seed=30).to(self.device, self.dtype)

    def as_float64(self) -> Case:
        """The same numbers in float64, with primal results of that precision."""
        wide = Case(**{**self.arguments(), "dtype": torch.float64})
        for name in ("q", "k", "v", "dq", "dk", "dv"):
            value = self.tensors[name]
            wide.tensors[name] = None if value is None else value.double()
        out, lse = reference.KERNELS["attention_forward"](*wide.qkv, mask=wide.mask_as(), scale=self.scale)
        wide.tensors.update(out=out, lse=lse)
        return wide

    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Case.__dataclass_fields__ if name != "tensors"}


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = q @ k.mT * scale
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def banded_mask(length: int, keys: int, heads: int = 1) -> Tensor:
    """Additive, with -inf for part of the keys of each row and finite biases elsewhere."""
    bias = normal(1, heads, length, keys, seed=50)
    hidden = normal(1, heads, length, keys, seed=51) > 0.5
    hidden[..., 0] = False
    return bias.masked_fill(hidden, float("-inf"))


def plain_tangent(case: Case) -> Tensor:
    """Forward mode of mathematical attention, each operation in the dtype of the case."""
    tangents = [
        primal.new_zeros(case.count, *primal.shape) if tangent is None else tangent
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


def check_forward(case: Case, backend: Any = "cpu") -> None:
    """The results of the forward kernel against the float64 reference."""
    exact = case.as_float64().forward("reference")
    for ours, plain, truth in zip(case.forward(backend), case.forward("reference"), exact, strict=True):
        assert ours.shape == truth.shape
        assert ours.dtype == case.dtype
        finite = truth.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        # Measured: float64 at most 3e-15; float32 at most 1.1 times the reference, single rows apart, whose
        # scores PyTorch sums in more parts.
        # Without fused multiply-adds, which GCC makes none of in the sanitizers' -O1, 2.9 times it.
        floor = 1e-13 if case.dtype is torch.float64 else 1e-6
        factor = 4.0 if os.environ.get("SHARPCORE_SANITIZE") else 2.0
        errors = [relative_error(result[finite], truth[finite]) for result in (ours, plain)]
        assert_error_at_most(*errors, factor=factor, floor=floor)


def check(case: Case, floor: float = 0.0, backend: Any = "cpu") -> None:
    """The kernel against the float64 reference, for the tangent and its transpose."""
    floor = floor or (1e-13 if case.dtype is torch.float64 else 2e-6)
    exact = case.as_float64()
    truth, ours, plain = exact.tangent("reference"), case.tangent(backend), case.tangent("reference")
    assert ours.shape == truth.shape
    assert ours.dtype == case.dtype
    # Measured: float64 within 3e-15. In float32, inputs of a single row or key can exceed twice the
    # reference's error, which is then close to zero: hence the floor.
    judge(ours, plain, truth, floor)
    cotangent = case.cotangent()
    for name, *grads in zip(
        "qkv",
        exact.adjoint("reference", cotangent.double()),
        case.adjoint(backend, cotangent),
        case.adjoint("reference", cotangent),
        strict=True,
    ):
        expected, got, usual = grads
        assert (expected is None) == (got is None), name
        if expected is not None and got is not None and usual is not None:
            judge(got, usual, expected, floor)


def check_half(case: Case, floor: float = 0.0, backend: Any = "cpu") -> None:
    """Forward, tangent and transpose in 16 bits against float64, judged by plain PyTorch in that dtype."""
    floor = floor or _HALF_FLOORS[case.dtype]
    exact = case.as_float64()
    o, lse = case.forward(backend)
    assert (o.dtype, lse.dtype) == (case.dtype, torch.float32)
    plain = plain_attention(*case.qkv, case.mask_as(), case.scale)
    judge(o, plain, exact.tensors["out"], floor)
    # Products of 16 bits are exact in float32: only their sums are rounded.
    judge(lse, lse.double(), exact.tensors["lse"], 2e-6)
    assert float((lse - exact.tensors["lse"]).abs().max()) < 1e-5 * (
        1 + float(exact.tensors["lse"].abs().max())
    )
    # Measured in bfloat16 on the CPU: tangents 0.34 to 0.93 of plain PyTorch's error; transposes at most 0.99
    # of it where they exceed the floor.
    judge(case.tangent(backend), plain_tangent(case), exact.tangent("reference"), floor)
    cotangent = case.cotangent()
    truths = exact.adjoint("reference", cotangent.double())
    grads = case.adjoint(backend, cotangent)
    for truth, ours, usual in zip(truths, grads, plain_adjoint(case, cotangent), strict=True):
        assert (truth is None) == (ours is None)
        if truth is not None and ours is not None:
            assert ours.dtype == case.dtype
            judge(ours, usual, truth, floor)


def judge(ours: Tensor, plain: Tensor, truth: Tensor, floor: float) -> None:
    if float(truth.norm()) < 1e-12:
        # With one key the probabilities do not move: only rounding is left of terms of order one.
        assert float(ours.abs().max()) < max(10 * floor, 4 * float(plain.abs().max()))
        return
    assert_error_at_most(relative_error(ours, truth), relative_error(plain, truth), floor=floor)
