"""Evaluates a score as a detector: AUC, true positive rates at low false positive rates."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from sharpcore.errors import InvalidInput
from sharpcore.report.delong import delong_interval
from sharpcore.report.duplicates import beginnings, effective_number, find_duplicates, numbered
from sharpcore.report.labels import POSITIVE_LABELS as POSITIVE_LABELS
from sharpcore.report.labels import LabelledScores
from sharpcore.report.labels import is_positive as is_positive
from sharpcore.report.resampling import (
    Counts,
    Floats,
    Interval,
    Tally,
    allowed,
    areas,
    draws,
    from_top,
    middle,
)
from sharpcore.table import ScoreTable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from sharpcore.report.confounds import Confounds

TARGET_FPRS = (0.01, 0.03)
#: The ways to find prompts that belong together, beside a column.
CLUSTERS = ("near", "beginning")
#: More groups of positives than this are no groups.
MOST_GROUPS = 20


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
class Clusters:
    """How independent the prompts are: numbers of clusters, and the AUC's interval when clusters are drawn.

    `effective_positive` is P^2 / sum of squared cluster sizes: P where all prompts stand alone, near 1 where
    one cluster holds nearly all.
    """

    n_positive: int
    n_negative: int
    effective_positive: float
    effective_negative: float
    auc_interval: Interval


@dataclass(frozen=True)
class Evaluation:
    """How well a score separates positives (expected to score higher) from negatives.

    `auc_interval` is the bootstrap's, `delong_interval` and `auc_variance` are those of
    `sharpcore.report.delong`. `positive` and `negative` are the scores it was computed from. The rest is set
    by `evaluate_table`: `metric`, `step`, `group` (the positives are only those of one group), `n_errors`
    (rows left out because they have an error), `n_unmeasured` (rows without an error and without a score),
    `cost` (what the metric costs, e.g. forward passes of a prompt).
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
    auc_variance: float | None = None
    delong_interval: Interval | None = None
    clusters: Clusters | None = None
    group: str | None = None
    n_unmeasured: int = 0
    cost: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All but the scores, as a nested object that JSON can hold."""
        values = asdict(replace(self, cost=dict(self.cost)))
        del values["positive"], values["negative"]
        return values

    def to_row(self) -> dict[str, Any]:
        """All but the scores, as one flat row of a table; e.g. `tpr_at_1pct`, `tpr_at_1pct_low`,
        `cost_forwards`."""
        row = {
            name: value
            for name, value in self.to_dict().items()
            if name not in ("clusters", "delong_interval") and not isinstance(value, tuple | list | dict)
        }
        row["auc_low"], row["auc_high"] = self.auc_interval
        row["auc_delong_low"], row["auc_delong_high"] = self.delong_interval or (None, None)
        for point in self.operating_points:
            name = f"at_{100 * point.target_fpr:g}pct"
            row |= {f"tpr_{name}": point.tpr, f"fpr_{name}": point.fpr, f"threshold_{name}": point.threshold}
            row[f"tpr_{name}_low"], row[f"tpr_{name}_high"] = point.interval
        if self.clusters is not None:
            counts = asdict(self.clusters)
            row["auc_clusters_low"], row["auc_clusters_high"] = counts.pop("auc_interval")
            row |= {f"clusters_{name}": count for name, count in counts.items()}
        row |= {f"cost_{name}": value for name, value in self.cost.items()}
        first = ("metric", "step", "group", "n_positive", "n_negative", "n_errors", "auc")
        ends = ("auc_low", "auc_high", "auc_delong_low", "auc_delong_high")
        return {name: row[name] for name in first + ends} | row

    def curve(self) -> tuple[Floats, Floats]:
        """The ROC curve: false and true positive rates, each [points], from (0, 0) to (1, 1)."""
        counts = Tally(self.positive, self.negative).count_once()
        positive, negative = (from_top(group)[0] for group in counts)
        return negative / self.n_negative, positive / self.n_positive


def evaluate(
    scores_positive: ArrayLike,
    scores_negative: ArrayLike,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    target_fprs: Sequence[float] = TARGET_FPRS,
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> Evaluation:
    """Evaluate a score as a detector of positives, which are expected to score higher.

    `scores_positive` [P] and `scores_negative` [N] are finite numbers. The intervals are the 2.5 and 97.5 %
    quantiles over `bootstrap` samples drawn with replacement within each group (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapter 13), beside DeLong's. `clusters` (a label for each positive
    and for each negative) adds an interval for which whole clusters are drawn (Davison and Hinkley, Bootstrap
    Methods and their Application, 1997, section 3.8). Ties count half in the AUC and are never split at a
    threshold, so the empirical false positive rate does not exceed its target. Raises InvalidInput for an
    empty group, NaN, or infinity.
    """
    positive, negative = (
        finite_scores(scores_positive, "scores_positive"),
        finite_scores(scores_negative, "scores_negative"),
    )
    check_bootstrap(bootstrap)
    if not all(0 <= target < 1 for target in target_fprs):
        raise InvalidInput(f"target_fprs: expected numbers in [0, 1), got {list(target_fprs)}")
    tally = Tally(positive, negative)
    auc = float(areas(*tally.count_once())[0])
    alone = (np.arange(len(positive)), np.arange(len(negative)))
    intervals = middle(_resampled(tally, alone, bootstrap, seed, target_fprs))
    points = []
    for target, interval in zip(target_fprs, intervals[1:], strict=True):
        flagged = int(allowed(target, np.array(len(negative))))
        threshold = float(np.sort(negative)[len(negative) - 1 - flagged])
        fpr, tpr = (float(np.mean(group > threshold)) for group in (negative, positive))
        points.append(OperatingPoint(target, threshold, fpr, tpr, interval))
    variance, delong = delong_interval(positive, negative)
    return Evaluation(
        auc,
        intervals[0],
        tuple(points),
        len(positive),
        len(negative),
        bootstrap,
        seed,
        positive,
        negative,
        auc_variance=variance,
        delong_interval=delong,
        clusters=None if clusters is None else _clusters(tally, alone, clusters, bootstrap, seed),
    )


def evaluate_table(
    table: ScoreTable,
    label_column: str | None = None,
    others: ScoreTable | None = None,
    *,
    positive: Collection[str] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    group_column: str | None = None,
    clusters: str | None = None,
    costs: Mapping[str, Any] | None = None,
) -> list[Evaluation]:
    """Evaluate every metric at every step of a table with a label column, or of two tables (positives, then
    `others`).

    A label is positive if it is true, 1, yes or memorized, negative if false, 0, no or other (any case, also
    as text); with `positive` given, labels whose text is in it are positive and all others negative. Rows
    with an error are left out and counted; a metric that was not measured at a step (no row without an error
    has it) is left out there.

    With `group_column` each evaluation is followed by those of each group of positives against all negatives;
    `clusters` is as in `cluster_labels`; `costs` says for each metric what it costs, by name. Raises
    InvalidInput for a column that is missing, labels that are not understood, and as `evaluate`.
    """
    labelled = LabelledScores.of(table, label_column, others, positive=positive)
    return evaluate_labelled(
        labelled, bootstrap=bootstrap, seed=seed, group_column=group_column, clusters=clusters, costs=costs
    )


def evaluate_labelled(
    labelled: LabelledScores,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    group_column: str | None = None,
    clusters: str | None = None,
    costs: Mapping[str, Any] | None = None,
) -> list[Evaluation]:
    """As `evaluate_table`, of what `LabelledScores.of` made of a table."""
    labels = None if clusters is None else cluster_labels(labelled, clusters)
    groups = {} if group_column is None else _groups(labelled, group_column)
    expenses = _costs(costs)
    evaluations = []
    for place in labelled.measured():
        metric, step = place
        missing = np.array([score is None for score in labelled.scores[place]])
        failed = labelled.failed[step]
        for group, members in [(None, None), *groups.items()]:
            indices = labelled.split(place, members)
            drawn = [] if labels is None else [[labels[index] for index in side] for side in indices]
            result = evaluate(
                *(labelled.values(place, side) for side in indices),
                bootstrap=bootstrap,
                seed=seed,
                clusters=(drawn[0], drawn[1]) if drawn else None,
            )
            evaluations.append(
                replace(
                    result,
                    metric=metric,
                    step=step,
                    group=group,
                    n_errors=int(failed.sum()),
                    n_unmeasured=int((missing & ~failed).sum()),
                    cost=expenses.get(metric, {}),
                )
            )
    return evaluations


def auc_over_seeds(labelled: LabelledScores) -> list[dict[str, Any]]:
    """The AUC when the score is the mean of the first n values that a prompt has for its seeds, n = 1 to N.

    Rows with `metric`, `step`, `n_seeds`, `auc`, and DeLong's 95 % interval `auc_low`, `auc_high` (None where
    it says nothing). N is the smallest number of values that a scored prompt has; a metric without values for
    each seed has no rows.
    """
    rows = []
    for place in labelled.measured():
        metric, step = place
        indices = labelled.split(place)
        values = [[labelled.seeds[place][index] for index in side] for side in indices]
        if any(seeds is None for side in values for seeds in side):
            continue
        most = min(len(seeds or ()) for side in values for seeds in side)
        for n in range(1, most + 1):
            groups = [
                finite_scores(
                    [float(np.mean((seeds or ())[:n])) for seeds in side], f"{metric}_seeds at step {step}"
                )
                for side in values
            ]
            auc = float(areas(*Tally(*groups).count_once())[0])
            low, high = delong_interval(*groups)[1] or (None, None)
            rows.append(
                {"metric": metric, "step": step, "n_seeds": n, "auc": auc, "auc_low": low, "auc_high": high}
            )
    return rows


def cluster_labels(labelled: LabelledScores, clusters: str) -> list[Hashable]:
    """Which prompts belong together, [n].

    `clusters` is "near" (near-duplicates, `find_duplicates`), "beginning" (also those with the same first two
    words, `beginnings`), or the name of a column whose values say so (an empty one stands alone).
    """
    if clusters in CLUSTERS:
        texts = [row.get("prompt") for row in labelled.columns]
        there = [text for text in texts if text]
        found = iter(
            (find_duplicates(there).clusters if clusters == "near" else beginnings(there)) if there else ()
        )
        return [("cluster", next(found)) if text else ("alone", n) for n, text in enumerate(texts)]
    try:
        values = labelled.column(clusters)
    except InvalidInput as error:
        raise InvalidInput(f"clusters: expected {' or '.join(CLUSTERS)}, or a column; {error}") from None
    return [("alone", n) if value is None else ("cluster", str(value)) for n, value in enumerate(values)]


def evaluation_table(evaluations: Sequence[Evaluation], confounds: Confounds | None = None) -> RichTable:
    """The evaluations as a rich table for the terminal, one row each, and below them what the text of the
    prompts alone achieves."""
    from rich.table import Table

    table = Table(title="memorized against other prompts (95 % intervals)")
    costs = list(dict.fromkeys(name for item in evaluations for name in item.cost))
    grouped = any(item.group is not None for item in evaluations)
    clustered = any(item.clusters is not None for item in evaluations)
    names = [
        "metric",
        "step",
        *(["group"] if grouped else []),
        "memorized",
        "others",
        "errors",
        "AUC",
        "DeLong",
    ]
    names += ["by clusters"] if clustered else []
    names += [f"TPR at {100 * point.target_fpr:g} % FPR" for point in evaluations[0].operating_points]
    for name in names + costs:
        table.add_column(name, justify="left" if name in ("metric", "group") else "right")
    for item in evaluations:
        table.add_row(
            item.metric or "",
            _text(item.step),
            *([_text(item.group)] if grouped else []),
            *map(str, (item.n_positive, item.n_negative, item.n_errors)),
            f"{item.auc:.3f} {_range(item.auc_interval)}",
            _range(item.delong_interval),
            *([_range(item.clusters.auc_interval if item.clusters else None)] if clustered else []),
            *(f"{point.tpr:.3f} {_range(point.interval)}" for point in item.operating_points),
            *(_text(item.cost.get(name)) for name in costs),
        )
    if confounds is not None:
        table.add_section()
        blank = [""] if grouped else []
        for row in confounds.to_rows():
            counts = (str(row["n_positive"]), str(row["n_negative"]), "")
            shown = f"{row['auc']:.3f}" + (f" ({row['direction']})" if row["direction"] else "")
            interval = (
                None if row["auc_delong_low"] is None else (row["auc_delong_low"], row["auc_delong_high"])
            )
            table.add_row(row["metric"], "", *blank, *counts, shown, _range(interval))
    return table


def finite_scores(values: ArrayLike, name: str) -> Floats:
    """A list of finite numbers, [n] float64. Raises InvalidInput that names it otherwise."""
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


def check_bootstrap(samples: int) -> None:
    """Raise InvalidInput unless there is a sample."""
    if samples < 1:
        raise InvalidInput(f"bootstrap: expected at least 1 sample, got {samples}")


def _resampled(
    tally: Tally, clusters: tuple[Counts, Counts], samples: int, seed: int, target_fprs: Sequence[float]
) -> Floats:
    """[samples, 1 + targets]: AUC and the true positive rates of stratified bootstrap samples."""
    rows = []
    for drawn in draws(samples, np.random.Generator(np.random.Philox(seed)), clusters, tally.size):
        positive, negative = tally.count(*drawn)
        flagged_positive, flagged_negative = from_top(positive), from_top(negative)
        columns = [areas(positive, negative)]
        for target in target_fprs:
            reached = flagged_negative <= allowed(target, flagged_negative[:, -1:])
            flagged = np.where(reached, flagged_positive, 0).max(axis=1)
            columns.append(flagged / flagged_positive[:, -1])
        rows.append(np.stack(columns, axis=1))
    return np.concatenate(rows)


def _clusters(
    tally: Tally,
    alone: tuple[Counts, Counts],
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]],
    bootstrap: int,
    seed: int,
) -> Clusters:
    for side, labels, items in zip(("positive", "negative"), clusters, alone, strict=True):
        if len(labels) != len(items):
            raise InvalidInput(
                f"clusters: expected a label for each of {len(items)} {side} scores, got {len(labels)}"
            )
    places = (numbered(clusters[0]), numbered(clusters[1]))
    (interval,) = middle(_resampled(tally, places, bootstrap, seed, ()))
    counts = [int(group.max()) + 1 for group in places]
    effective = [effective_number(group.tolist()) for group in places]
    return Clusters(counts[0], counts[1], effective[0], effective[1], interval)


def _groups(labelled: LabelledScores, column: str) -> dict[str, Any]:
    """The positives of each group, [n] booleans; those without a group are in none."""
    try:
        values = labelled.column(column)
    except InvalidInput as error:
        raise InvalidInput(f"group_column: {error}") from None
    texts = [None if value is None else str(value) for value in values]
    names = {text for text, side in zip(texts, labelled.positive, strict=True) if side and text is not None}
    if not 1 <= len(names) <= MOST_GROUPS:
        raise InvalidInput(
            f"group_column: expected 1 to {MOST_GROUPS} groups of memorized prompts, "
            f"{column!r} has {len(names)}"
        )
    return {name: np.array([text == name for text in texts]) for name in sorted(names, key=_natural)}


def _natural(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _costs(costs: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    found = {}
    for metric, cost in (costs or {}).items():
        if not isinstance(cost, Mapping):
            raise InvalidInput(
                f"costs: expected a mapping of names to numbers for {metric}, such as forwards and products; "
                f"got {cost!r}"
            )
        found[metric] = dict(cost)
    return found


def _range(interval: Iterable[float] | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"({low:.3f} to {high:.3f})"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
