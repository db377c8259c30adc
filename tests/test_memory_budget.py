"""A linearization under a memory budget: the same numbers, fewer bytes, and an error where nothing fits."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
from small_unet import prediction, vectors

from sharpcore import linearize
from sharpcore.errors import InvalidInput, OutOfMemory
from sharpcore.residuals import Segment
from sharpcore.rules import LinearMap
from sharpcore.testing.tolerance import relative_error


# Checkpoints stay in float32, so that bfloat16 residuals cannot be cut down as far.
@pytest.mark.parametrize(
    ("share", "precision"),
    [(0.9, "float32"), (0.6, "float32"), (0.4, "float32"), (0.9, "bfloat16"), (0.7, "bfloat16")],
)
def test_a_budget_is_kept_and_changes_no_number(share: float, precision: str) -> None:
    f, x = prediction()
    tangents = vectors(3, x)
    full = linearize(f, x, precision=precision)
    residuals = full.residual_bytes
    weights = full.weight_bytes if precision == "bfloat16" else 0
    budget = int(share * residuals) + weights
    tight = linearize(f, x, precision=precision, memory_budget=budget)
    assert tight.residual_bytes + tight.weight_bytes <= budget
    assert tight._residuals.segments
    assert relative_error(tight.value, full.value) < 1e-5
    # Convolutions that are packed or not differ by a rounding; measured 2e-6 and, of bfloat16 products, 4e-3.
    tolerance = 1e-5 if precision == "float32" else 2e-2
    for point in (x, 2 * x):
        tight.relinearize(point)
        full.relinearize(point)
        for _ in range(2):
            assert relative_error(tight.jvp(tangents), full.jvp(tangents)) < tolerance
            assert relative_error(tight.vjp(tangents), full.vjp(tangents)) < tolerance
        assert tight.residual_bytes + tight.weight_bytes <= budget


def test_what_is_held_during_a_product_is_within_the_budget() -> None:
    """The segment that is made again counts as well."""
    f, x = prediction(torch.float64)
    full = linearize(f, x)
    budget = full.residual_bytes // 2
    tight = linearize(f, x, memory_budget=budget)
    for segment in tight._residuals.segments:
        made = tight._residuals.make(segment)
        seen = {t.untyped_storage()._cdata: t for m in made.values() for _, t in m.residuals()}
        own = sum(
            t.untyped_storage().nbytes() for t in seen.values() if not isinstance(t, torch.nn.Parameter)
        )
        assert tight.residual_bytes + own <= budget


def test_products_do_not_hold_on_to_what_they_recompute() -> None:
    f, x = prediction()
    full = linearize(f, x)
    tight = linearize(f, x, memory_budget=full.residual_bytes // 2)
    made: list[weakref.ref[object]] = []
    original = tight._residuals.make

    def watched(segment: Segment) -> dict[int, LinearMap]:
        maps = original(segment)
        made.extend(weakref.ref(instruction) for instruction in maps.values())
        return maps

    tight._residuals.make = watched  # type: ignore[method-assign]
    for k in (1, 2, 1, 1, 2):
        tight.jvp(vectors(k, x))
        tight.vjp(vectors(k, x))
    alive = {id(reference()) for reference in made} - {id(None)}
    last = {id(instruction) for instruction in tight._residuals._made[1].values()}
    assert alive == last


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_transposed_products_stay_within_the_budget(precision: str) -> None:
    f, x = prediction()
    full = linearize(f, x, precision=precision)
    budget = full.residual_bytes + full.weight_bytes
    exact = linearize(f, x, precision=precision, memory_budget=budget)
    before = exact.nbytes - exact._workspace.nbytes
    exact.vjp(vectors(1, x))
    assert exact.nbytes - exact._workspace.nbytes == before


def test_residuals_that_maps_share_are_counted_as_they_are_kept() -> None:
    """In bfloat16 every map has a copy of its own of the probabilities."""

    def attention(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = x + (x @ x.mT).softmax(-1) @ x
        return x

    x = vectors(1, torch.zeros(2, 48, 8))[0] / 4
    full = linearize(attention, x, precision="bfloat16")
    for share in (1.0, 0.95):
        budget = int(share * full.residual_bytes)
        tight = linearize(attention, x, precision="bfloat16", memory_budget=budget)
        assert tight.residual_bytes <= budget
        assert relative_error(tight.jvp(vectors(1, x)), full.jvp(vectors(1, x))) < 1e-2


def test_exact_under_a_budget_in_float64() -> None:
    f, x = prediction(torch.float64)
    full = linearize(f, x)
    tight = linearize(f, x, memory_budget=full.residual_bytes // 2)
    given = vectors(2, x)
    assert relative_error(tight.jvp(given), full.jvp(given)) < 1e-13
    assert relative_error(tight.vjp(given), full.vjp(given)) < 1e-13


def test_an_ample_budget_keeps_everything() -> None:
    f, x = prediction()
    linearization = linearize(f, x, memory_budget=2**30)
    assert linearization._residuals.segments == ()
    assert "everything is kept" in linearization.explain()


def test_the_choice_is_explained() -> None:
    f, x = prediction()
    full = linearize(f, x).residual_bytes
    text = linearize(f, x, memory_budget=full // 2).explain(1)
    chosen = re.search(r"(\d+) segments are run again in every product; checkpoints take ([\d.]+) MB", text)
    assert chosen is not None
    assert int(chosen[1]) > 0
    assert text.count("recomputed") > 3


def test_too_small_a_budget_says_what_would_do() -> None:
    f, x = prediction()
    with pytest.raises(OutOfMemory, match=r"at least (\d+) bytes") as caught:
        linearize(f, x, memory_budget=1000)
    enough = re.search(r"at least (\d+) bytes", str(caught.value))
    assert enough is not None
    linearization = linearize(f, x, memory_budget=int(enough[1]))
    assert linearization.residual_bytes <= int(enough[1])
    assert relative_error(linearization.jvp(vectors(1, x)), linearize(f, x).jvp(vectors(1, x))) < 1e-5


@pytest.mark.parametrize("bad", [0, -1, 1.5, "8GiB", True])
def test_a_bad_budget_is_named(bad: object) -> None:
    f, x = prediction()
    with pytest.raises(InvalidInput, match="memory_budget"):
        linearize(f, x, memory_budget=bad)  # type: ignore[arg-type]


def test_control_flow_that_reads_values() -> None:
    """A program that is traced anew at each point recomputes the branch that was taken there."""
    f, x = prediction()

    def branching(sample: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        return f(sample) if bool(sign > 0) else 2 * f(sample)

    full = linearize(f, x)
    tight = linearize(branching, x, torch.tensor(1.0), memory_budget=full.residual_bytes // 2)
    expected = full.jvp(vectors(1, x))
    assert relative_error(tight.jvp(vectors(1, x)), expected) < 1e-5
    tight.relinearize(x, torch.tensor(-1.0))
    assert relative_error(tight.jvp(vectors(1, x)), 2 * expected) < 1e-5
