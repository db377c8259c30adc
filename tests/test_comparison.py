"""Tests of the paired comparison: the covariance over all pairs, error rates, Holm, missing scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_delong import kernel

from sharpcore.errors import InvalidInput
from sharpcore.report import LabelledScores, compare
from sharpcore.report.comparison import compare_labelled, comparison_table, holm
from sharpcore.table import ScoreTable


def correlated(generator, sizes, shifts, correlation):
    """Scores of two detectors [2, P + N] that share noise, and the labels."""
    labels = np.repeat([True, False], sizes)
    common, own = generator.normal(size=len(labels)), generator.normal(size=(2, len(labels)))
    noise = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
    return noise + np.array(shifts)[:, None] * labels, labels


def slow_covariance(scores, labels):
    """[2, 2], over all pairs of prompts."""
    wins = [kernel(values[labels], values[~labels]) for values in scores]
    m, n = wins[0].shape
    by_positive = np.cov([w.mean(axis=1) for w in wins], ddof=1)
    by_negative = np.cov([w.mean(axis=0) for w in wins], ddof=1)
    return by_positive / m + by_negative / n


@pytest.mark.parametrize("ties", [False, True])
def test_difference_and_its_variance_agree_with_the_sum_over_pairs(ties):
    stats = pytest.importorskip("scipy.stats")
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = correlated(np.random.default_rng(0), (23, 31), (1.0, 0.4), 0.6)
    scores = scores.round() if ties else scores
    (item,) = compare({"a": scores[0], "b": scores[1]}, labels, bootstrap=4000)
    aucs = [metrics.roc_auc_score(labels, values) for values in scores]
    assert (item.auc_first, item.auc_second) == pytest.approx(aucs, abs=1e-12)
    covariance = slow_covariance(scores, labels)
    error = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5
    assert item.difference == pytest.approx(aucs[0] - aucs[1], abs=1e-12)
    assert np.diff(item.interval) == pytest.approx(2 * 1.959964 * error, rel=1e-6)
    assert item.p_value == pytest.approx(2 * stats.norm.sf(abs(item.difference) / error), rel=1e-9)
    # The same prompts are drawn for both: measured ratio 0.99; apart it would be 1.6 and 1.7.
    assert np.diff(item.bootstrap_interval) / np.diff(item.interval) == pytest.approx(1, abs=0.08)
    assert (item.n_positive, item.n_negative) == (23, 31)


def test_p_values_of_equally_good_detectors_are_uniform():
    generator = np.random.default_rng(5)
    p_values = []
    for _ in range(600):
        scores, labels = correlated(generator, (30, 40), (0.8, 0.8), 0.5)
        (item,) = compare({"a": scores[0], "b": scores[1]}, labels, bootstrap=1)
        p_values.append(item.p_value)
    # 0.05 and 0.5 within three standard errors; measured 0.050 and 0.49.
    assert 0.023 <= np.mean(np.array(p_values) <= 0.05) <= 0.077
    assert 0.44 <= np.mean(np.array(p_values) <= 0.5) <= 0.56


def test_agrees_with_a_permutation_test():
    # Exchanging the two detectors' ranks within prompts, of detectors that differ clearly or not.
    generator = np.random.default_rng(9)
    for shifts in ((1.0, 0.6), (0.7, 0.6)):
        scores, labels = correlated(generator, (40, 50), shifts, 0.5)
        (item,) = compare({"a": scores[0], "b": scores[1]}, labels, bootstrap=1)
        exceeded, rounds = 0, 400
        for _ in range(rounds):
            swap = generator.random(len(labels)) < 0.5
            mixed = np.where(swap, scores[::-1], scores)
            aucs = [kernel(values[labels], values[~labels]).mean() for values in mixed]
            exceeded += abs(aucs[0] - aucs[1]) >= abs(item.difference) - 1e-12
        # Measured 0.069 and 0.073, 0.512 and 0.513.
        assert item.p_value == pytest.approx(exceeded / rounds, abs=0.08)


def test_equal_detectors_and_differences_without_variance():
    labels = [True, True, False, False]
    same, perfect, constant = compare(
        {"a": [3.0, 1.0, 2.0, 0.0], "b": [30.0, 10.0, 20.0, 0.0], "p": [2, 2, 1, 1], "c": [5, 5, 5, 5]},
        labels,
        pairs=[("a", "b"), ("p", "c"), ("a", "c")],
        bootstrap=50,
    )
    assert (same.difference, same.interval, same.p_value, same.bootstrap_interval) == (0, (0, 0), 1, (0, 0))
    # Every bootstrap sample has the same difference of 0.5: nothing to test it with.
    assert (perfect.difference, perfect.p_value, perfect.interval, perfect.p_adjusted) == (
        0.5,
        None,
        None,
        None,
    )
    assert constant.p_value is not None
    json.dumps([item.to_dict() for item in (same, perfect)], allow_nan=False)
    assert perfect.to_row()["difference_low"] is None


def test_holm():
    # The worked example of Holm's procedure: 4, 3, 2, 1 times the ordered values, never decreasing.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.5]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_only_prompts_that_both_scored():
    scores = {"a": [5.0, None, 4.0, 1.0, 0.0], "b": [5.0, 6.0, 4.0, None, 0.0]}
    (item,) = compare(scores, [True, True, True, False, False], bootstrap=5)
    assert (item.n_positive, item.n_negative) == (2, 1)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"a": [1.0, 0.0], "b": [float("nan"), 0.0]}, {}, "b: expected finite numbers, got nan at index 0"),
        ({"a": [1.0, 0.0], "b": [1.0]}, {}, "b: expected 2 scores"),
        ({"a": [1.0, 0.0]}, {}, "at least two detectors"),
        ({"a": [1.0, 0.0], "b": [None, 0.0]}, {}, "there is no memorized prompt that both scored"),
        ({"a": [1.0, 0.0], "b": [1.0, 0.0]}, {"pairs": [("a", "c")]}, "out of a, b; got"),
        ({"a": [1.0, 0.0], "b": [1.0, 0.0]}, {"pairs": [("a", "a")]}, "two different ones"),
        ({"a": [1.0, 0.0], "b": [1.0, 0.0]}, {"bootstrap": 0}, "bootstrap"),
    ],
)
def test_bad_input(scores, options, message):
    with pytest.raises(InvalidInput, match=message):
        compare(scores, [True, False], **options)


def make_labelled():
    rows = [
        {"prompt": f"p{k}", "memorized": k < 6, "step": step, "timestep": 1.0, "error": None}
        | {f"{name}{end}": value for name, value in scores.items() for end in ("", "_seeds")}
        for k in range(12)
        for step in (0, 5)
        for scores in [{"a": k % 5 - (k >= 6), "b": k % 3 + step, "c": k % 4 if step else None}]
    ]
    return LabelledScores.of(ScoreTable(rows), "memorized")


def test_of_a_table():
    labelled = make_labelled()
    found = compare_labelled(labelled, bootstrap=5)
    assert [(item.first, item.second) for item in found] == [("b@0", "a@0"), ("b@5", "a@5"), ("c@5", "a@5")]
    across = compare_labelled(labelled, pairs=[("a@0", "a@5"), ("c", "b")], bootstrap=5)
    assert [(item.first, item.second) for item in across] == [("a@0", "a@5"), ("c@5", "b@5")]
    assert across[0].p_value == 1
    assert comparison_table(found).row_count == 3
    with pytest.raises(InvalidInput, match="got 'z'"):
        compare_labelled(labelled, pairs=[("a", "z")])
