"""A linearization under a memory budget: the same numbers, fewer bytes, and an error where nothing fits."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_unet import prediction, vectors
from torch import Tensor

from sharpcore import Linearization, linearize
from sharpcore.errors import InvalidInput, OutOfMemory
from sharpcore.residuals import Segment
from sharpcore.rules import LinearMap
from sharpcore.testing.tolerance import assert_error_at_most, relative_error


def taken(linearization: Linearization) -> int:
    """What products with one vector take beside the network, once there was one."""
    linearization.jvp(vectors(1, linearization.x))
    return linearization.residual_bytes + linearization.weight_bytes + linearization._workspace.nbytes


# Checkpoints stay in float32, so that bfloat16 residuals cannot be cut down as far.
@pytest.mark.parametrize(
    ("share", "precision"),
    [(0.7, "float32"), (0.5, "float32"), (0.4, "float32"), (0.7, "bfloat16"), (0.6, "bfloat16")],
)
def test_a_budget_is_kept_and_changes_no_number(share: float, precision: str) -> None:
    f, x = prediction()
    tangents = vectors(3, x)
    full = linearize(f, x, precision=precision)
    budget = int(share * taken(full))
    tight = linearize(f, x, precision=precision, memory_budget=budget)
    assert taken(tight) <= budget
    assert tight._residuals.segments
    assert torch.equal(tight.value, full.value)
    # Transposed convolutions that are packed or not differ by a rounding; measured 1e-6 and, of bfloat16
    # products, 6e-3.
    tolerance = 1e-5 if precision == "float32" else 2e-2
    for point in (x, 2 * x):
        tight.relinearize(point)
        full.relinearize(point)
        for _ in range(2):
            assert torch.equal(tight.jvp(tangents), full.jvp(tangents))
            assert relative_error(tight.vjp(tangents), full.vjp(tangents)) < tolerance
        assert tight.residual_bytes + tight.weight_bytes <= budget


def test_copies_of_weights_go_before_residuals() -> None:
    f, x = prediction()
    full = linearize(f, x)
    budget = taken(full) - full.weight_bytes // 2
    tight = linearize(f, x, memory_budget=budget)
    assert tight._residuals.segments == ()
    assert 0 < tight.weight_bytes < full.weight_bytes // 2
    assert taken(tight) <= budget
    assert re.search(r"every residual is kept.* [1-9]\d* copies of weights are made again", tight.explain())
    for _ in range(4):
        assert torch.equal(tight.jvp(vectors(2, x)), full.jvp(vectors(2, x)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_workspace_is_foreseen(precision: str) -> None:
    f, x = prediction()
    linearization = linearize(f, x, precision=precision, memory_budget=2**30)
    linearization.jvp(vectors(1, x))
    foreseen = re.search(r"([\d.]+) of tangents", linearization.explain())
    assert foreseen is not None
    # To what is rounded in the text, and what aligning each tangent adds.
    assert float(foreseen[1]) * 1e6 == pytest.approx(linearization._workspace.nbytes, rel=0.1)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_what_is_held_during_a_product_is_within_the_budget(share: float) -> None:
    """The segment that is made again counts as well."""
    f, x = prediction(torch.float64)
    budget = int(share * taken(linearize(f, x)))
    tight = linearize(f, x, memory_budget=budget)
    kept = taken(tight)
    known = {t.untyped_storage()._cdata for _, t in tight._residuals.tensors()}
    assert tight._residuals.segments
    for segment in tight._residuals.segments:
        made = tight._residuals.make(segment)
        seen = {t.untyped_storage()._cdata: t for m in made.values() for _, t in m.residuals()}
        own = sum(
            t.untyped_storage().nbytes()
            for key, t in seen.items()
            if key not in known and not isinstance(t, torch.nn.Parameter)
        )
        assert kept + own <= budget


def test_expensive_results_are_kept_and_cheap_ones_made_again() -> None:
    """Attention is not run again where its operands are: only projections, norms and GEGLU are."""
    f, x = prediction()
    tight = linearize(f, x, memory_budget=int(0.45 * taken(linearize(f, x))))
    ran = [tight.program.nodes[i].name for s in tight._residuals.segments for i in s.runs]
    remade = [
        tight.program.nodes[i].name
        for s in tight._residuals.segments
        for i in range(s.start, s.stop)
        if tight.program.nodes[i].remade
    ]
    assert "geglu" in ran
    assert remade.count("attention") > ran.count("attention")


def test_products_do_not_hold_on_to_what_they_recompute() -> None:
    f, x = prediction()
    tight = linearize(f, x, memory_budget=taken(linearize(f, x)) // 2)
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


def test_several_threads_share_what_is_made_again() -> None:
    """Of a recomputed segment there is one at a time, whichever product wants it."""
    f, x = prediction()
    tight = linearize(f, x, memory_budget=int(0.45 * taken(linearize(f, x))))
    assert len(tight._residuals.segments) > 1
    given = [vectors(number + 1, x) for number in range(2)]
    expected = [(tight.jvp(g), tight.vjp(g)) for g in given]
    made: list[bool] = []

    def multiply(number: int) -> None:
        for turn in range(6):
            which = (number + turn) % len(given)
            pushed, pulled = expected[which]
            made.append(torch.equal(tight.jvp(given[which]), pushed))
            made.append(torch.equal(tight.vjp(given[which]), pulled))

    threads = [threading.Thread(target=multiply, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert made == [True] * 48


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_transposed_products_stay_within_the_budget(precision: str) -> None:
    f, x = prediction()
    full = linearize(f, x, precision=precision)
    budget = taken(full) + 2**18
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
    for share in (1.05, 0.95):
        budget = int(share * taken(full))
        tight = linearize(attention, x, precision="bfloat16", memory_budget=budget)
        assert taken(tight) <= budget
        assert relative_error(tight.jvp(vectors(1, x)), full.jvp(vectors(1, x))) < 1e-2


def test_exact_under_a_budget_in_float64() -> None:
    f, x = prediction(torch.float64)
    full = linearize(f, x)
    tight = linearize(f, x, memory_budget=taken(full) // 2)
    assert tight._residuals.segments
    given = vectors(2, x)
    assert relative_error(tight.jvp(given), full.jvp(given)) < 1e-13
    assert relative_error(tight.vjp(given), full.vjp(given)) < 1e-13


def test_an_ample_budget_keeps_everything() -> None:
    f, x = prediction()
    linearization = linearize(f, x, memory_budget=2**30)
    assert linearization._residuals.segments == ()
    assert "every residual is kept" in linearization.explain()


def test_the_choice_is_explained() -> None:
    f, x = prediction()
    text = linearize(f, x, memory_budget=taken(linearize(f, x)) // 2).explain(1)
    chosen = re.search(r"(\d+) segments are run again in every product; checkpoints take ([\d.]+) MB", text)
    assert chosen is not None
    assert int(chosen[1]) > 0
    assert text.count("recomputed") > 3


def test_too_small_a_budget_says_what_would_do() -> None:
    f, x = prediction()
    enough = needed(f, x)
    linearization = linearize(f, x, memory_budget=enough)
    assert taken(linearization) <= enough
    assert relative_error(linearization.jvp(vectors(1, x)), linearize(f, x).jvp(vectors(1, x))) < 1e-5


def needed(f: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> int:
    """The smallest budget."""
    with pytest.raises(OutOfMemory, match=r"at least (\d+) bytes") as caught:
        linearize(f, x, memory_budget=1000, **options)
    found = re.search(r"at least (\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


def plainly_rounded(f: Callable[[Tensor], Tensor], x: Tensor) -> Linearization:
    """With everything that is kept of the point rounded to bfloat16 where it lies, but for statistics."""
    linearization = linearize(f, x)
    for node, instruction in zip(linearization.program.nodes, linearization._residuals, strict=True):
        for name, tensor in instruction.residuals() if instruction is not None and node.remade else []:
            constant = tensor.untyped_storage()._cdata in node.constants()
            if not constant and name not in ("mean", "rstd", "lse", "weight", "bias"):
                tensor.copy_(tensor.bfloat16())
    return linearization


def errors(linearization: Linearization) -> list[float]:
    """Of both products against those in float64 at the same point."""
    f, _ = prediction(torch.float64)
    exact = linearize(f, linearization.x.double())
    given = vectors(3, linearization.x)
    return [
        relative_error(linearization.jvp(given), exact.jvp(given.double())),
        relative_error(linearization.vjp(given), exact.vjp(given.double())),
    ]


def stored(linearization: Linearization) -> tuple[int, int]:
    """The numbers of instructions and of checkpoints that are in bfloat16, as explained."""
    text = linearization.explain()
    said = re.search(r"bfloat16.* the residuals of (\d+) instructions, and (\d+) checkpoints", text)
    assert said is not None
    residuals, checkpoints = int(said[1]), int(said[2])
    assert len(re.findall(r"(?m)^\d+ .* from bfloat16 ", text)) == residuals
    kept = linearization._residuals.checkpoints.values()
    assert sum(tensor.dtype == torch.bfloat16 for tensor in kept) == checkpoints
    return residuals, checkpoints


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_residuals_are_rounded_rather_than_made_again(share: float) -> None:
    f, x = prediction()
    budget = int(share * taken(linearize(f, x)))
    exact = linearize(f, x, memory_budget=budget)
    rounded = linearize(f, x, memory_budget=budget, round_residuals=True)
    assert taken(rounded) <= budget
    assert stored(rounded)[0] > 0
    assert len(rounded._residuals.segments) < len(exact._residuals.segments)
    for point in (x, 2 * x):
        rounded.relinearize(point)
        plain = errors(plainly_rounded(f, point))
        for _ in range(3):
            for error, usual in zip(errors(rounded), plain, strict=True):
                assert_error_at_most(error, usual)


def test_a_budget_that_only_rounded_residuals_fit() -> None:
    f, x = prediction()
    least = needed(f, x, round_residuals=True)
    assert least < 0.9 * needed(f, x)
    rounded = linearize(f, x, memory_budget=least, round_residuals=True)
    kept = taken(rounded)
    assert kept <= least
    assert stored(rounded)[1] > 0
    plain = errors(plainly_rounded(f, x))
    for error, usual in zip(errors(rounded), plain, strict=True):
        assert_error_at_most(error, usual)
    for segment in rounded._residuals.segments:
        made = rounded._residuals.make(segment)
        seen = {t.untyped_storage()._cdata: t for m in made.values() for _, t in m.residuals()}
        own = sum(
            t.untyped_storage().nbytes() for t in seen.values() if not isinstance(t, torch.nn.Parameter)
        )
        assert kept + own <= least


def test_nothing_is_rounded_without_need() -> None:
    f, x = prediction()
    full = linearize(f, x)
    ample = linearize(f, x, memory_budget=2**30, round_residuals=True)
    assert stored(ample) == (0, 0)
    assert torch.equal(ample.jvp(vectors(2, x)), full.jvp(vectors(2, x)))


def test_rounding_copies_no_constants() -> None:
    """Factors that are weights stay the weights."""
    weight, matrix = vectors(2, torch.zeros(64, 64))

    def network(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh((x * weight) @ matrix / 64)
        return x

    x = vectors(1, torch.zeros(64, 64))[0]
    full = linearize(network, x)
    saved = 4 * x.nbytes // 2
    # One residual at a time is cast back.
    rounded = linearize(network, x, memory_budget=taken(full) - saved + x.nbytes, round_residuals=True)
    assert stored(rounded) == (4, 0)
    assert rounded.residual_bytes == full.residual_bytes - saved
    assert relative_error(rounded.jvp(vectors(1, x)), full.jvp(vectors(1, x))) < 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"memory_budget": None},
        {"memory_budget": 2**20, "precision": "bfloat16"},
        {"memory_budget": 2**20, "dtype": torch.float64},
    ],
)
def test_rounding_needs_a_budget_and_float32(options: dict[str, Any]) -> None:
    f, x = prediction(options.pop("dtype", torch.float32))
    with pytest.raises(InvalidInput, match="round_residuals"):
        linearize(f, x, round_residuals=True, **options)


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
    tight = linearize(branching, x, torch.tensor(1.0), memory_budget=taken(full) // 2)
    expected = full.jvp(vectors(1, x))
    assert relative_error(tight.jvp(vectors(1, x)), expected) < 1e-5
    tight.relinearize(x, torch.tensor(-1.0))
    assert relative_error(tight.jvp(vectors(1, x)), 2 * expected) < 1e-5
