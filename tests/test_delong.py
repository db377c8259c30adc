"""Tests of DeLong's variance and interval: the slow formula, ties, coverage, groups where it says nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sharpcore.report import evaluate
from sharpcore.report.delong import delong_interval, midranks, placements, variance


def kernel(positive, negative):
    """[P, N]: 1 where the positive scores higher, half for a tie."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None]
    return (difference > 0) + 0.5 * (difference == 0)


def slow_variance(positive, negative):
    """The variance as DeLong, DeLong and Clarke-Pearson write it, over all pairs."""
    wins = kernel(positive, negative)
    m, n = wins.shape
    auc = wins.mean()
    s10 = sum((wins[i].mean() - auc) ** 2 for i in range(m)) / (m - 1)
    s01 = sum((wins[:, j].mean() - auc) ** 2 for j in range(n)) / (n - 1)
    return s10 / m + s01 / n


def groups(sizes, ties, seed=0):
    generator = np.random.default_rng(seed)
    positive, negative = generator.normal(0.8, 1.5, sizes[0]), generator.normal(0, 1, sizes[1])
    return (positive.round(), negative.round()) if ties else (positive, negative)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 50), (41, 7), (60, 120)])
def test_agrees_with_the_sum_over_pairs_and_with_scikit_learn(sizes, ties):
    metrics = pytest.importorskip("sklearn.metrics")
    positive, negative = groups(sizes, ties, seed=sum(sizes))
    below, above = placements(positive, negative)
    wins = kernel(positive, negative)
    np.testing.assert_allclose(below, wins.mean(axis=1), atol=1e-14)
    np.testing.assert_allclose(above, wins.mean(axis=0), atol=1e-14)
    auc = metrics.roc_auc_score(np.repeat([1, 0], sizes), np.concatenate([positive, negative]))
    assert abs(below.mean() - auc) <= 1e-12
    assert abs(above.mean() - auc) <= 1e-12
    assert abs(variance(below, above) - slow_variance(positive, negative)) <= 1e-14


def test_midranks_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).integers(0, 9, 40).astype(float)
    np.testing.assert_array_equal(midranks(values), stats.rankdata(values))


def test_interval_is_symmetric_on_the_logit_scale_and_under_exchange_of_sign():
    positive, negative = groups((30, 40), ties=True)
    spread, (low, high) = delong_interval(positive, negative)
    auc = kernel(positive, negative).mean()
    logits = [math.log(p / (1 - p)) for p in (low, auc, high)]
    assert logits[1] - logits[0] == pytest.approx(logits[2] - logits[1], rel=1e-9)
    assert logits[2] - logits[1] == pytest.approx(1.959964 * spread**0.5 / (auc * (1 - auc)), rel=1e-6)
    _, mirrored = delong_interval(-positive, -negative)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=1e-12)
    result = evaluate(positive, negative, bootstrap=5)
    assert (result.auc_variance, result.delong_interval) == (spread, (low, high))


@pytest.mark.parametrize(("shift", "sizes"), [(0.5, (25, 40)), (1.8, (40, 60))])
def test_interval_covers_the_true_auc(shift, sizes):
    generator = np.random.default_rng(7)
    truth = 0.5 * (1 + math.erf(shift / 2))  # of two normal distributions of variance 1
    rounds = 1000
    covered = 0
    for _ in range(rounds):
        _, (low, high) = delong_interval(
            generator.normal(shift, 1, sizes[0]), generator.normal(0, 1, sizes[1])
        )
        covered += low <= truth <= high
    # 0.95 within three standard errors of 0.007; measured 0.949 and 0.958.
    assert 0.93 <= covered / rounds <= 0.972


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_perfect_separation_has_an_exact_wide_interval(value):
    stats = pytest.importorskip("scipy.stats")
    positive, negative = (np.arange(7.0) + 10, np.arange(5.0))
    pair = (positive, negative) if value else (negative, positive)
    spread, interval = delong_interval(*pair)
    assert spread == 0
    # Five pairs that share no member, all with the same outcome.
    exact = stats.binomtest(5 if value else 0, 5).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(interval, (exact.low, exact.high), atol=1e-12)


def test_perfect_separation_interval_covers():
    # 4 pairs with a true AUC of 0.9: the interval misses it at most as often as it says.
    generator = np.random.default_rng(3)
    shift = 1.8124
    missed = 0
    for _ in range(1000):
        positive, negative = generator.normal(shift, 1, 4), generator.normal(0, 1, 4)
        _, interval = delong_interval(positive, negative)
        missed += interval is not None and not interval[0] <= 0.9 <= interval[1]
    assert missed / 1000 <= 0.05  # measured 0.01


def test_equal_scores_say_little():
    spread, (low, high) = delong_interval(np.zeros(3), np.zeros(9))
    assert spread == 0
    assert low == pytest.approx(0.5 - high + 0.5)
    assert 0.1 < low < 0.2  # 0.5 (0.025 ** (1 / 3)) = 0.146


def test_one_member_gives_no_variance():
    assert delong_interval(np.array([1.0]), np.array([0.0, 2.0, 3.0])) == (None, None)
    spread, (low, high) = delong_interval(np.array([5.0]), np.array([0.0, 2.0]))
    assert (spread, high) == (None, 1.0)
    assert low == pytest.approx(0.025)
    result = evaluate([1.0], [0.0, 2.0], bootstrap=5)
    assert result.delong_interval is None
    assert result.to_row()["auc_delong_low"] is None
