"""Evaluates a score as a detector: AUC, true positive rates at low false positive rates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sharpcore.errors import InvalidInput
from sharpcore.table import ScoreTable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Interval = tuple[float, float]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

TARGET_FPRS = (0.01, 0.03)
POSITIVE_LABELS = {"1", "true", "yes", "memorized", "positive"}
NEGATIVE_LABELS = {"0", "false", "no", "other", "not memorized", "negative"}
_CELLS_PER_CHUNK = 2**22


@dataclass(frozen=True)
class OperatingPoint:
    """The detector that flags scores above `threshold`, where its empirical false positive rate is at most
    `target_fpr`.

    `threshold` is the lowest such one: a negative score that is itself not flagged. `interval` is the 95 %
    interval of `tpr`, with the threshold chosen anew in each bootstrap sample.
    """

    target_fpr: float
    threshold: float
    fpr: float
    tpr: float
    interval: Interval


@dataclass(frozen=True)
class Evaluation:
    """How well a score separates positives (expected to score higher) from negatives.

    `positive` and `negative` are the scores it was computed from; `metric`, `step` and `n_errors` (rows left
    out because they have no score) are set by `evaluate_table`.
    """

    auc: float
    auc_interval: Interval
    operating_points: tuple[OperatingPoint, ...]
    n_positive: int
    n_negative: int
    bootstrap: int
    seed: int
    positive: Floats = field(repr=False, compare=False)
    negative: Floats = field(repr=False, compare=False)
    metric: str | None = None
    step: int | None = None
    n_errors: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All but the scores, as a nested object that JSON can hold."""
        values = asdict(self)
        del values["positive"], values["negative"]
        return values

    def to_row(self) -> dict[str, Any]:
        """All but the scores, as one flat row of a table; e.g. `tpr_at_1pct`, `tpr_at_1pct_low`."""
        row = {name: value for name, value in self.to_dict().items() if not isinstance(value, tuple | list)}
        row["auc_low"], row["auc_high"] = self.auc_interval
        for point in self.operating_points:
            name = f"at_{100 * point.target_fpr:g}pct"
            row |= {f"tpr_{name}": point.tpr, f"fpr_{name}": point.fpr, f"threshold_{name}": point.threshold}
            row[f"tpr_{name}_low"], row[f"tpr_{name}_high"] = point.interval
        first = ("metric", "step", "n_positive", "n_negative", "n_errors", "auc", "auc_low", "auc_high")
        return {name: row[name] for name in first} | row

    def curve(self) -> tuple[Floats, Floats]:
        """The ROC curve: false and true positive rates, each [points], from (0, 0) to (1, 1)."""
        positive, negative = (
            _from_top(counts[None])[0] for counts in _Tally(self.positive, self.negative).counts
        )
        return negative / self.n_negative, positive / self.n_positive


def evaluate(
    scores_positive: ArrayLike,
    scores_negative: ArrayLike,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    target_fprs: Sequence[float] = TARGET_FPRS,
) -> Evaluation:
    """Evaluate a score as a detector of positives, which are expected to score higher.

    `scores_positive` [P] and `scores_negative` [N] are finite numbers. The intervals are the 2.5 and 97.5 %
    quantiles over `bootstrap` samples drawn with replacement within each group (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 13). Ties count half in the AUC and are never split at a
    threshold, so the empirical false positive rate does not exceed its target. Raises InvalidInput for an
    empty group, NaN, or infinity.
    """
    positive, negative = (
        _scores(scores_positive, "scores_positive"),
        _scores(scores_negative, "scores_negative"),
    )
    if bootstrap < 1:
        raise InvalidInput(f"bootstrap: expected at least 1 sample, got {bootstrap}")
    if not all(0 <= target < 1 for target in target_fprs):
        raise InvalidInput(f"target_fprs: expected numbers in [0, 1), got {list(target_fprs)}")
    tally = _Tally(positive, negative)
    auc = float(_auc(*(counts[None] for counts in tally.counts))[0])
    samples = tally.resample(bootstrap, np.random.Generator(np.random.Philox(seed)), target_fprs)
    low_high = np.quantile(samples, (0.025, 0.975), axis=0)
    intervals = [(float(low), float(high)) for low, high in low_high.T]
    points = []
    for target, interval in zip(target_fprs, intervals[1:], strict=True):
        threshold = float(np.sort(negative)[len(negative) - 1 - _allowed(target, len(negative))])
        fpr, tpr = (float(np.mean(group > threshold)) for group in (negative, positive))
        points.append(OperatingPoint(target, threshold, fpr, tpr, interval))
    return Evaluation(
        auc, intervals[0], tuple(points), len(positive), len(negative), bootstrap, seed, positive, negative
    )


def evaluate_table(
    table: ScoreTable,
    label_column: str | None = None,
    others: ScoreTable | None = None,
    *,
    positive: Collection[str] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> list[Evaluation]:
    """Evaluate every metric at every step of a table with a label column, or of two tables (positives, then
    `others`).

    A label is positive if it is true, 1, yes or memorized, negative if false, 0, no or other (any case, also
    as text); with `positive` given, labels whose text is in it are positive and all others negative. Rows
    with an error are left out and counted. Raises InvalidInput for a label column that is missing or not
    understood, and as `evaluate`.
    """
    if (label_column is None) == (others is None):
        raise InvalidInput("expected either label_column or a second table (others)")
    if others is not None:
        pairs = [(row, True) for row in table] + [(row, False) for row in others]
        metrics = [name for name in table.metrics if name in others.metrics]
    else:
        assert label_column is not None
        if label_column not in table.columns:
            raise InvalidInput(
                f"label_column: expected one of {', '.join(table.columns)}, got {label_column!r}"
            )
        pairs = [(row, is_positive(row.get(label_column), label_column, positive)) for row in table]
        metrics = list(table.metrics)
    if not metrics:
        raise InvalidInput(f"the table has no scores: its columns are {', '.join(table.columns) or 'none'}")
    evaluations = []
    for metric in metrics:
        for step in sorted({row["step"] for row, _ in pairs if row.get("step") is not None}):
            here = [(row.get(metric), label) for row, label in pairs if row.get("step") == step]
            groups = [
                [score for score, label in here if score is not None and label is side]
                for side in (True, False)
            ]
            for group, name in zip(groups, ("memorized", "other"), strict=True):
                if not group:
                    raise InvalidInput(f"{metric} at step {step}: there is no {name} prompt with a score")
            result = evaluate(*groups, bootstrap=bootstrap, seed=seed)
            missing = sum(score is None for score, _ in here)
            evaluations.append(
                Evaluation(**(vars(result) | {"metric": metric, "step": step, "n_errors": missing}))
            )
    return evaluations


def evaluation_table(evaluations: Sequence[Evaluation]) -> RichTable:
    """The evaluations as a rich table for the terminal, one row each."""
    from rich.table import Table

    table = Table(title="memorized against other prompts (95 % intervals)")
    for name in ("metric", "step", "memorized", "others", "errors", "AUC"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for point in evaluations[0].operating_points:
        table.add_column(f"TPR at {100 * point.target_fpr:g} % FPR", justify="right")
    for item in evaluations:
        values = [
            (item.auc, item.auc_interval),
            *((point.tpr, point.interval) for point in item.operating_points),
        ]
        table.add_row(
            item.metric or "",
            *map(str, (item.step, item.n_positive, item.n_negative, item.n_errors)),
            *(f"{value:.3f} ({low:.3f} to {high:.3f})" for value, (low, high) in values),
        )
    return table


def is_positive(label: Any, column: str, wanted: Collection[str] | None = None) -> bool:
    """Whether a label of the column called `column` names a positive, as `evaluate_table` says."""
    if wanted:
        return str(label) in wanted
    text = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip().lower()
    if text not in POSITIVE_LABELS | NEGATIVE_LABELS:
        known = " or ".join(", ".join(sorted(labels)) for labels in (POSITIVE_LABELS, NEGATIVE_LABELS))
        raise InvalidInput(
            f"label column {column!r}: expected {known}, got {label!r}; name the positive one (--positive)"
        )
    return text in POSITIVE_LABELS


def _scores(values: ArrayLike, name: str) -> Floats:
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInput(f"{name}: expected a list of numbers, got {values!r}") from None
    if scores.ndim != 1 or scores.size == 0:
        raise InvalidInput(
            f"{name}: expected a non-empty list of numbers, got an array of shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        index = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InvalidInput(f"{name}: expected finite numbers, got {scores[index]} at index {index}")
    return scores


def _allowed(target: float, count: int) -> int:
    """The largest k with k / count <= target, safe against the rounding of target * count."""
    k = int(target * count)
    return k + 1 if (k + 1) / count <= target else k


class _Tally:
    """Both groups as counts over the distinct scores, ascending."""

    def __init__(self, positive: Floats, negative: Floats) -> None:
        values, place = np.unique(np.concatenate([positive, negative]), return_inverse=True)
        self.size = len(values)
        self.places = np.split(place, [len(positive)])
        self.counts = tuple(np.bincount(places, minlength=self.size) for places in self.places)

    def resample(self, samples: int, generator: np.random.Generator, target_fprs: Sequence[float]) -> Floats:
        """[samples, 1 + targets]: AUC and the true positive rates of stratified bootstrap samples."""
        chunk = max(1, _CELLS_PER_CHUNK // self.size)
        blocks = [min(chunk, samples - start) for start in range(0, samples, chunk)]
        return np.concatenate([self._resample_block(block, generator, target_fprs) for block in blocks])

    def _resample_block(
        self, block: int, generator: np.random.Generator, target_fprs: Sequence[float]
    ) -> Floats:
        offsets = self.size * np.arange(block)[:, None]
        drawn = []
        for places in self.places:
            cells = places[generator.integers(len(places), size=(block, len(places)))] + offsets
            drawn.append(np.bincount(cells.ravel(), minlength=block * self.size).reshape(block, self.size))
        positive, negative = drawn
        flagged_positive, flagged_negative = _from_top(positive), _from_top(negative)
        columns = [_auc(positive, negative)]
        for target in target_fprs:
            reached = flagged_negative <= _allowed(target, len(self.places[1]))
            columns.append(np.where(reached, flagged_positive, 0).max(axis=1) / len(self.places[0]))
        return np.stack(columns, axis=1)


def _from_top(counts: Counts) -> Counts:
    """[B, D] counts over ascending scores -> [B, D + 1]: how many lie among the j highest distinct scores."""
    summed = np.cumsum(counts[:, ::-1], axis=1)
    return np.concatenate([np.zeros_like(summed[:, :1]), summed], axis=1)


def _auc(positive: Counts, negative: Counts) -> Floats:
    """[B] areas: the share of pairs where the positive scores higher, ties counting half (Mann-Whitney)."""
    below = np.cumsum(negative, axis=1) - negative
    pairs = (positive * (2 * below + negative)).sum(axis=1)
    return pairs / (2.0 * positive.sum(axis=1) * negative.sum(axis=1))
