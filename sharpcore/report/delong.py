"""DeLong's variance of an AUC and covariance of several, by midranks."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from sharpcore.report.resampling import Floats, Interval

CONFIDENCE = 0.95
# Rounding leaves a variance of at most some 1e-32 where all placement values are equal.
_NO_VARIANCE = 1e-24


def placements(positive: Floats, negative: Floats) -> tuple[Floats, Floats]:
    """The share of negatives below each positive [P] and of positives above each negative [N], ties half.

    By midranks, in O(n log n) (Sun and Xu, Fast implementation of DeLong's algorithm, IEEE Signal Processing
    Letters 21, 2014, equations 5 to 7). The mean of either is the AUC.
    """
    ranks = midranks(np.concatenate([positive, negative]))
    below = (ranks[: len(positive)] - midranks(positive)) / len(negative)
    above = 1 - (ranks[len(positive) :] - midranks(negative)) / len(positive)
    return below, above


def midranks(values: Floats) -> Floats:
    """Ranks from 1, ties at their mean, [n]."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def variance(below: Floats, above: Floats) -> float | None:
    """Variance of the mean of placement values, or of their differences; None where a group has one member.

    DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988. With the differences of two detectors' placement
    values it is the variance of the difference of their AUCs, covariance included. Exactly 0 where all are
    equal.
    """
    if min(len(below), len(above)) < 2:
        return None
    value = float(below.var(ddof=1) / len(below) + above.var(ddof=1) / len(above))
    return value if value > _NO_VARIANCE else 0.0


def delong_interval(positive: Floats, negative: Floats) -> tuple[float | None, Interval | None]:
    """DeLong's variance of the AUC and its 95 % interval on the logit scale, which stays within [0, 1].

    The variance is 0, and says nothing, at an AUC of exactly 1 or 0 and where all scores are equal. The
    interval is then exact, and wide for small groups: k = min(P, N) pairs can be formed that share no member,
    they are independent and had the same outcome, so any other has a probability of at most 1 - 0.025^(1/k)
    (Clopper and Pearson 1934). Both are None where a group of one gives no such certainty either.
    """
    below, above = placements(positive, negative)
    auc, spread = float(below.mean()), variance(below, above)
    if np.ptp(below) == 0 and np.ptp(above) == 0 and auc in (0.0, 0.5, 1.0):
        other = 1 - ((1 - CONFIDENCE) / 2) ** (1 / min(len(positive), len(negative)))
        return spread, (auc * (1 - other), auc + (1 - auc) * other)
    if not spread:
        return None, None
    logit, width = math.log(auc / (1 - auc)), normal_quantile() * math.sqrt(spread) / (auc * (1 - auc))
    return spread, (_expit(logit - width), _expit(logit + width))


def normal_quantile() -> float:
    """How many standard errors a two-sided interval reaches to each side."""
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
