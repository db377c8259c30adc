"""Spectra of prompts: recorded spectra, exact numbers and estimates, errors, memory, the table, pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sharpcore import curvature_at, spectrum
from sharpcore.curvature import Trajectories
from sharpcore.eigenvalues import _watched
from sharpcore.errors import InvalidInput, NonFiniteError, OutOfMemory
from sharpcore.krylov import as_batched
from sharpcore.report.spectra import plot_densities, plot_groups, plot_steps
from sharpcore.spectra import SpectrumTable, iterate_spectra

PROMPTS = ["a bold one", "a thin two", "a thin nine"]
# The pipeline with v-prediction has 256 entries a state.
SMALL = {"num_inference_steps": 5, "k": 3, "seeds": 2, "steps": (0, 3)}
EXACT = (
    "nonnegative",
    "nonnegative_fraction",
    "nonnegative_mass",
    "trace",
    "frobenius",
    "asymmetry",
    "flipd",
)


@pytest.fixture(scope="module")
def table(sd2_pipe):
    return spectrum(sd2_pipe, PROMPTS, eigenvalues=True, **SMALL)


def hessian_matrix(c, jacobian):
    """The Hessian of the first sample by one product with all unit vectors."""
    identity = torch.eye(c.x.numel(), dtype=c.x.dtype).reshape(-1, *c.x.shape)
    matrix = (jacobian @ identity).reshape(c.x.numel(), -1).mT.double()
    return matrix, (matrix + matrix.mT) / 2


# --- exact numbers ------------------------------------------------------------------------------------------


def test_rows_are_in_order_and_complete(table):
    assert list(table.columns) == list(SpectrumTable.standard)
    places = [(row["prompt"], row["seed"], row["step"]) for row in table]
    assert places == [(prompt, seed, step) for prompt in PROMPTS for seed in (42, 43) for step in (0, 3)]
    assert all(row["error"] is None and row["method"] == "dense" for row in table)
    assert "SpectrumTable: 12 rows, steps [0, 3]" in repr(table)


def test_numbers_are_those_of_the_matrix(sd2_pipe, table):
    (row,) = [r for r in table if (r["prompt"], r["seed"], r["step"]) == (PROMPTS[1], 43, 3)]
    c = curvature_at(sd2_pipe, PROMPTS[1], step=3, seeds=[43], num_inference_steps=5)
    jacobian, hessian = hessian_matrix(c, c.jacobian)
    values = torch.linalg.eigvalsh(hessian)
    # Other batches of float32 products: measured 3e-6 at most.
    close = {"rel": 1e-4, "abs": 1e-4}
    assert row["eigenvalues"] == pytest.approx(values.tolist(), **close)
    assert row["smallest"] == row["eigenvalues"][:3]
    assert row["largest"] == row["eigenvalues"][:-4:-1]
    assert (row["smallest_eigenvalue"], row["largest_eigenvalue"]) == (row["smallest"][0], row["largest"][0])
    assert max(row["smallest_residuals"] + row["largest_residuals"]) < 1e-12
    kept = np.array(row["eigenvalues"])
    assert row["nonnegative"] == (kept >= 0).sum()
    assert row["nonnegative_fraction"] == row["nonnegative"] / 256
    assert row["nonnegative_mass"] == pytest.approx(kept[kept >= 0].sum())
    assert row["trace"] == pytest.approx(kept.sum())
    assert row["frobenius"] == pytest.approx(float(jacobian.norm()), **close)
    skew = float((jacobian - jacobian.mT).norm() / jacobian.norm())
    assert row["asymmetry"] == pytest.approx(skew, **close)
    assert row["score_norm"] == pytest.approx(float(c.score.norm()), **close)
    assert (row["alpha"], row["sigma"]) == (c.alpha, c.sigma)
    flipd = 256 + c.sigma**2 * (row["trace"] + row["score_norm"] ** 2)
    assert row["flipd"] == pytest.approx(flipd)
    small = np.abs(kept) * c.sigma**2 / 0.7
    assert row["lhsd"] == pytest.approx((1 / (1 + small**4)).sum())
    assert [row[f"{name}_se"] for name in [*EXACT, "lhsd"]] == [0.0] * 8
    assert (row["products"], row["dimension"], row["result"]) == (256, 256, "exact")


def test_density_is_one_in_all_and_where_the_eigenvalues_are(table):
    for row in table:
        x, y = np.array(row["density_grid"]), np.array(row["density"])
        assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-4)
        # Smoothing by a hundredth of the width moves nothing much over the median.
        median = np.median(row["eigenvalues"])
        below = np.trapezoid(np.where(x <= median, y, 0), x)
        assert below == pytest.approx(0.5, abs=0.06)
        assert x[0] < row["smallest_eigenvalue"] < row["largest_eigenvalue"] < x[-1]


@pytest.mark.parametrize("condition", ["none", "difference"])
def test_other_conditions(sd2_pipe, condition):
    (row,) = spectrum(sd2_pipe, PROMPTS[:1], condition=condition, **SMALL | {"seeds": 1, "steps": (3,)})
    c = curvature_at(sd2_pipe, PROMPTS[0], step=3, num_inference_steps=5)
    operator = c.operator(condition)
    _, hessian = hessian_matrix(c, operator.jacobian)
    values = torch.linalg.eigvalsh(hessian)
    assert row["smallest"] == pytest.approx(values[:3].tolist(), abs=1e-4)
    assert row["largest"] == pytest.approx(values.flip(0)[:3].tolist(), abs=1e-4)
    assert row["condition"] == condition
    if condition == "difference":
        assert row["flipd"] is None
        assert row["products"] == 512
        norm = (c.score - c.unconditional_score).norm()
    else:
        norm = c.unconditional_score.norm()
        assert row["flipd"] == pytest.approx(256 + c.sigma**2 * (row["trace"] + float(norm) ** 2), rel=1e-4)
    assert row["score_norm"] == pytest.approx(float(norm), rel=1e-4)


# --- ends and estimates -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def estimated(sd2_pipe):
    return spectrum(sd2_pipe, PROMPTS[:2], method="lanczos", depth=24, **SMALL | {"steps": (3,)})


def test_lanczos_finds_the_ends(table, estimated):
    for row, exact in zip(estimated, [r for r in table if r["step"] == 3], strict=False):
        assert (row["prompt"], row["seed"]) == (exact["prompt"], exact["seed"])
        assert (row["method"], row["result"]) == ("lanczos", "converged")
        # Measured 3e-8: eigenvalues are much better than residuals.
        assert row["smallest"] == pytest.approx(exact["smallest"], abs=1e-5)
        assert row["largest"] == pytest.approx(exact["largest"], abs=1e-5)
        norm = max(-exact["smallest_eigenvalue"], exact["largest_eigenvalue"])
        assert 0 < max(row["smallest_residuals"] + row["largest_residuals"]) <= 1.01e-5 * norm
        assert "eigenvalues" not in row


def test_estimates_have_the_error_they_say(table, estimated):
    for row, exact in zip(estimated, [r for r in table if r["step"] == 3], strict=False):
        for name in [*EXACT, "lhsd"]:
            # Measured 1.4 standard errors at most; the products' own rounding beside it.
            allowed = 4 * row[f"{name}_se"] + 1e-5 * abs(exact[name])
            assert abs(row[name] - exact[name]) <= allowed, (name, row[name], exact[name], row[f"{name}_se"])
            assert row[f"{name}_se"] < 0.1 * abs(exact[name]) + 1e-3, name
        values, grid = np.array(exact["eigenvalues"]), np.array(row["density_grid"])
        width = (values[-1] - values[0]) / 24
        kernel = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        off = np.abs(np.array(row["density"]) - kernel.mean(1))
        assert (off <= 4 * np.array(row["density_se"]) + 1e-3 * kernel.max()).all()
        assert np.trapezoid(row["density"], grid) == pytest.approx(1, abs=0.02)


def test_estimates_do_not_depend_on_the_batch(sd2_pipe, estimated):
    options = SMALL | {"steps": (3,), "seeds": [43]}
    (row,) = spectrum(sd2_pipe, PROMPTS[1:2], method="lanczos", depth=24, **options)
    other = estimated.rows[3]
    for name in [*EXACT, "lhsd"]:
        # float32 products of other batch sizes.
        assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
        assert row[f"{name}_se"] == pytest.approx(other[f"{name}_se"], rel=1e-2, abs=1e-4), name


def test_lanczos_says_when_it_has_not_converged(sd2_pipe):
    options = SMALL | {"steps": (3,), "seeds": 1}
    (row,) = spectrum(sd2_pipe, PROMPTS[:1], method="lanczos", max_products=20, depth=8, **options)
    assert row["result"] == "not_converged"
    assert max(row["largest_residuals"]) > 1e-4
    assert row["error"] is None
    (row,) = spectrum(sd2_pipe, PROMPTS[:1], method="lanczos", condition="difference", depth=8, **options)
    assert (row["flipd"], row["lhsd"]) == (None, None)
    assert row["nonnegative"] > 0


@pytest.mark.parametrize(
    ("options", "found"),
    [({"method": "lanczos", "max_products": 9, "block": 3, "k": 10}, 9), ({"k": 200}, 256)],
)
def test_no_pair_is_of_both_ends(sd2_pipe, options, found):
    options = SMALL | {"steps": (3,), "seeds": 1} | options
    (row,) = spectrum(sd2_pipe, PROMPTS[:1], depth=8, **options)
    low, high = row["smallest"], row["largest"]
    assert len(low) + len(high) == len(set(low + high)) == found
    assert abs(len(low) - len(high)) <= 1
    assert low == sorted(low)
    assert high == sorted(high, reverse=True)
    assert low[-1] < high[-1]
    assert (row["smallest_eigenvalue"], row["largest_eigenvalue"]) == (low[0], high[0])
    assert [len(row[f"{end}_residuals"]) for end in ("smallest", "largest")] == [len(low), len(high)]


def test_products_are_searched_for_nan_once(monkeypatch):
    calls = []
    monkeypatch.setattr("sharpcore.krylov.operator.checking", lambda: calls.append("nan") or True)
    watched = as_batched(_watched(as_batched(torch.eye(4)), lambda: calls.append("time")))
    watched.multiply(torch.ones(2, 1, 4))
    watched.multiply_transposed(torch.ones(2, 1, 4))
    assert calls == ["time", "nan"] * 2
    with pytest.raises(NonFiniteError, match="matrix: NaN or infinity in its product number 4 of sample 0"):
        watched.multiply(torch.full((1, 1, 4), float("nan")))


# --- batches, errors, limits --------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_batch(sd2_pipe, table):
    alone = spectrum(sd2_pipe, PROMPTS[2:], eigenvalues=True, **SMALL)
    for row, other in zip(alone, table.rows[8:], strict=True):
        assert (row["prompt"], row["seed"], row["step"]) == (other["prompt"], other["seed"], other["step"])
        # float32 products of other batch sizes; measured 3e-6.
        assert row["eigenvalues"] == pytest.approx(other["eigenvalues"], abs=1e-4)


def test_bad_prompts_give_rows_with_an_error(sd2_pipe, table, monkeypatch):
    prompts = [PROMPTS[0], " ", "not finite", PROMPTS[2]]
    encode = type(sd2_pipe).encode_prompt

    def poisoned(self, prompt, **options):
        parts = encode(self, prompt=prompt, **options)
        bad = prompt == "not finite"
        return tuple(part * float("nan") if bad and part is not None else part for part in parts)

    monkeypatch.setattr(type(sd2_pipe), "encode_prompt", poisoned)
    found = spectrum(sd2_pipe, prompts, on_error="record", **SMALL)
    assert [row["prompt"] for row in found][::4] == prompts
    errors = [row["error"] for row in found]
    assert errors[:4] == errors[12:] == [None] * 4
    assert errors[4:8] == ["prompts[1]: expected words; got an empty or blank prompt"] * 4
    assert all("NaN or infinity" in error for error in errors[8:12])
    assert all(row["trace"] is None and row["largest"] is None for row in found.rows[4:12])
    assert [row["timestep"] for row in found] == [table.rows[0]["timestep"], table.rows[1]["timestep"]] * 8
    for row, other in zip(found.rows[12:], table.rows[8:], strict=True):
        assert row["largest"] == pytest.approx(other["largest"], abs=1e-4)
    with pytest.raises(NonFiniteError):
        spectrum(sd2_pipe, prompts[2:], **SMALL)
    with pytest.raises(InvalidInput, match=r"prompts\[1\]: expected words"):
        spectrum(sd2_pipe, prompts, **SMALL)


def test_a_weight_that_is_not_finite_is_named(fresh_pipe):
    fresh_pipe.unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"its parameter conv_in\.weight"):
        spectrum(fresh_pipe, PROMPTS, on_error="record", steps=(0,))


@pytest.mark.parametrize("most", [1, 2])
def test_out_of_memory_halves_the_batch(sd2_pipe, table, monkeypatch, most):
    tried = []
    walk = Trajectories.from_seeds

    def limited(self, prompts, *arguments):
        tried.append(len(prompts))
        if len(prompts) > most:
            raise MemoryError
        return walk(self, prompts, *arguments)

    monkeypatch.setattr(Trajectories, "from_seeds", limited)
    found = spectrum(sd2_pipe, PROMPTS, **SMALL)
    assert tried == {1: [1, 4, 2, 1, 1, 1, 1, 1], 2: [1, 4, 2, 2, 1]}[most]
    for row, other in zip(found, table, strict=True):
        assert row["largest"] == pytest.approx(other["largest"], abs=1e-4)
    most = 0
    with pytest.raises(OutOfMemory, match=r"one sample with a latent of \(4, 8, 8\) does not fit"):
        spectrum(sd2_pipe, PROMPTS, **SMALL)


def test_a_budget_limits_the_batch(sd2_pipe, monkeypatch):
    sizes = []
    walk = Trajectories.from_seeds

    def seen(self, prompts, *arguments):
        sizes.append(len(prompts))
        return walk(self, prompts, *arguments)

    c = curvature_at(sd2_pipe, PROMPTS[0], num_inference_steps=5)
    # The residuals of two samples and the workspace of 32 vectors, half as much for each.
    budget = c.conditional.weight_bytes + (2.5 + 16) * c.conditional.residual_bytes
    monkeypatch.setattr(Trajectories, "from_seeds", seen)
    spectrum(sd2_pipe, PROMPTS, memory_budget=budget, **SMALL)
    assert sizes == [1, 2, 2, 1]  # prompts and seeds, in order


def test_progress_and_time_limit(sd2_pipe):
    calls = []
    found = spectrum(
        sd2_pipe, PROMPTS, progress=lambda done, total: calls.append((done, total)), time_limit=1e-9, **SMALL
    )
    assert calls == [(4, 12), (8, 12), (12, 12)]
    assert [row["error"] for row in found] == ["not computed: the time limit of 1e-09 s had passed"] * 12
    assert all(row["trace"] is None for row in found)


def test_rows_come_prompt_by_prompt(sd2_pipe, work):
    blocks = iterate_spectra(sd2_pipe, PROMPTS, **SMALL | {"seeds": 1})
    assert [row["prompt"] for row in next(blocks)] == [PROMPTS[0]] * 2
    before = work.products
    assert before == 2 * 256  # the first sample alone
    assert [row["prompt"] for block in blocks for row in block] == [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": (5,)}, "steps: expected different indices from 0 to 4"),
        ({"seeds": []}, "seeds: expected a number"),
        ({"k": 0}, "k: expected an integer of at least 1"),
        ({"k": 257}, "k: expected at most the 256 entries of a state; got 257"),
        ({"method": "exact"}, "method: expected one of auto, dense, lanczos"),
        ({"method": "dense", "latent_size": (64, 64)}, "'dense' is for at most 4096"),
        ({"condition": "both"}, "condition: expected one of prompt, none, difference"),
        ({"block": 0}, "block: expected an integer of at least 1"),
        ({"depth": 0}, "depth: expected an integer of at least 1"),
        ({"probes": 1}, "probes: expected an integer of at least 2"),
        ({"tolerance": -1e-3}, "tolerance: expected a positive number"),
        ({"max_products": 0}, "max_products: expected a positive integer"),
        ({"max_products": 3, "method": "lanczos"}, "max_products: expected at least those of one block, 4"),
        ({"time_limit": math.inf}, "time_limit: expected a positive number"),
        ({"on_error": "ignore"}, "on_error: expected 'raise' or 'record'"),
        ({"latent_size": 8}, "latent_size: expected"),
    ],
)
def test_bad_arguments(sd2_pipe, options, message):
    with pytest.raises(InvalidInput, match=message):
        iterate_spectra(sd2_pipe, PROMPTS, **SMALL | options)  # before the first row is asked for
    with pytest.raises(InvalidInput, match="prompts: expected a list of strings; got str"):
        spectrum(sd2_pipe, "a prompt", **SMALL)


# --- the table and its pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_the_table_comes_back_as_it_was(table, tmp_path, extension):
    path = tmp_path / f"spectra.{extension}"
    rows = [*table.rows, table.rows[0] | dict.fromkeys(list(SpectrumTable.standard)[4:]) | {"error": "no"}]
    getattr(SpectrumTable(rows), f"to_{extension}")(path)
    assert SpectrumTable.read(path).rows == rows
    assert len(table.to_pandas()) == 12


def test_pictures(table, tmp_path):
    labelled = SpectrumTable([row | {"memorized": row["prompt"] == PROMPTS[0]} for row in table])
    for name, plot in (("density", plot_densities), ("steps", plot_steps), ("groups", plot_groups)):
        figure = plot(labelled, path=tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert {text.split(" (")[0] for text in names} == {"memorized: True", "memorized: False"}
    plain = plot_densities(table)
    assert [text.get_text() for text in plain.axes[0].get_legend().get_texts()] == PROMPTS
    # One curve per prompt and seed, and the line at zero.
    assert [len(axes.lines) for axes in plain.axes] == [7, 7]
    assert len(table.plot(tmp_path / "plot.png").axes) == 3
    with pytest.raises(InvalidInput, match="label_column: expected a column that says"):
        plot_groups(table)
    with pytest.raises(InvalidInput, match="label_column: expected one of prompt"):
        plot_steps(table, label_column="kind")
    with pytest.raises(InvalidInput, match="the table has no spectra"):
        plot_densities(SpectrumTable([]))
    with pytest.raises(InvalidInput, match="at most 6 distinct labels"):
        plot_densities(SpectrumTable([row | {"label": n} for n, row in enumerate(table)]))
