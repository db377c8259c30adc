"""Metrics of memorization: one file a metric, functions of what the two guidance branches show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpcore.detect.evidence import Evidence as Evidence
from sharpcore.detect.evidence import Metric as Metric
from sharpcore.detect.hessian_score_difference import HessianScoreDifference
from sharpcore.detect.score_difference import ScoreDifference
from sharpcore.errors import InvalidInput, NonFiniteError

METRICS: dict[str, type[Metric]] = {
    metric.name: metric for metric in (ScoreDifference, HessianScoreDifference)
}


def make_metrics(names: Sequence[str], *, squared: bool) -> list[Metric]:
    """The metrics of the given names; `squared` is for those that can be given with or without the square.

    Raises InvalidInput for an empty list, an unknown name, or a name given twice.
    """
    names = [names] if isinstance(names, str) else names
    strings = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    if not strings or not names or len(set(names)) != len(names):
        raise InvalidInput(f"metrics: expected different names out of {', '.join(METRICS)}; got {names!r}")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise InvalidInput(f"metrics: expected names out of {', '.join(METRICS)}; got {unknown[0]!r}")
    return [METRICS[name](squared=squared) for name in names]


def compute_metrics(metrics: Sequence[Metric], evidence: Evidence) -> Tensor:
    """The metrics of B samples, [len(metrics), B], float64. Raises NonFiniteError for NaN or infinity."""
    values = torch.stack([metric.compute(evidence) for metric in metrics])
    for metric, row in zip(metrics, values, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise NonFiniteError(
                f"{metric.name}: NaN or infinity; the network's prediction or derivative is not finite here"
            )
    return values
