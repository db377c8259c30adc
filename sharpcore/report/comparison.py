"""Paired comparison of detectors on the same prompts: DeLong's test and a joint bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sharpcore.errors import InvalidInput
from sharpcore.report.delong import normal_quantile, placements, variance
from sharpcore.report.evaluation import check_bootstrap, finite_scores
from sharpcore.report.labels import LabelledScores, Place
from sharpcore.report.resampling import Floats, Interval, Tally, areas, draws, middle

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Comparison:
    """The AUC of a first detector less that of a second, on the prompts that both scored.

    `interval` (95 %) and `p_value` are DeLong's, two-sided; None where the variance of the difference is 0
    although the AUCs differ, or cannot be estimated from a group of one: there is no test then.
    `bootstrap_interval` draws prompts for both detectors jointly. `p_adjusted` is Holm's for all pairs that
    were compared in one call.
    """

    first: str
    second: str
    auc_first: float
    auc_second: float
    difference: float
    interval: Interval | None
    bootstrap_interval: Interval
    p_value: float | None
    p_adjusted: float | None
    n_positive: int
    n_negative: int

    def to_dict(self) -> dict[str, Any]:
        """As an object that JSON can hold."""
        return asdict(self)

    def to_row(self) -> dict[str, Any]:
        """As one flat row of a table."""
        row = {name: value for name, value in self.to_dict().items() if "interval" not in name}
        row["difference_low"], row["difference_high"] = self.interval or (None, None)
        row["bootstrap_low"], row["bootstrap_high"] = self.bootstrap_interval
        return row


def compare(
    scores: Mapping[str, Sequence[float | None]],
    positive: Sequence[bool],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare detectors on the same prompts: DeLong's test of the difference of their AUCs.

    `scores` holds for each detector one number (or None) for each prompt, [n]; `positive` [n] says which
    prompts are memorized; `pairs` are those to compare, by default all of them. The p-values and intervals
    take the covariance of the two AUCs into account (DeLong, DeLong and Clarke-Pearson 1988; by midranks, Sun
    and Xu 2014); `p_adjusted` is Holm's (1979). Raises InvalidInput for NaN or infinity, other lengths, an
    unknown detector, fewer than two, or no prompts of one kind that both scored.
    """
    check_bootstrap(bootstrap)
    labels = np.asarray(positive, dtype=bool)
    values = {name: _values(name, given, len(labels)) for name, given in scores.items()}
    names = list(values)
    if pairs is None:
        pairs = [(first, second) for k, first in enumerate(names) for second in names[k + 1 :]]
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(names):
            raise InvalidInput(f"pairs: expected two different ones out of {', '.join(names)}; got {pair!r}")
    if not pairs:
        raise InvalidInput("scores: expected at least two detectors to compare")
    found = [
        _compare(first, second, values[first], values[second], labels, bootstrap, seed)
        for first, second in pairs
    ]
    return [
        replace(item, p_adjusted=p)
        for item, p in zip(found, holm([item.p_value for item in found]), strict=True)
    ]


def compare_labelled(
    labelled: LabelledScores,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> list[Comparison]:
    """As `compare`, of what `LabelledScores.of` made of a table; empty where there is nothing to compare.

    Detectors are called `metric@step`. A name without a step stands for the metric at each step, so that a
    pair of such names is compared at every step that both were measured at. By default each metric is
    compared with the table's first one: a choice that does not depend on the results.
    """
    places = labelled.measured()
    scores = {_name(place): labelled.scores[place] for place in places}
    if pairs is None:
        first = places[0][0]
        pairs = [
            (metric, first) for metric in dict.fromkeys(metric for metric, _ in places) if metric != first
        ]
    chosen = [pair for wanted in pairs for pair in _expanded(wanted, places)]
    if not chosen:
        return []
    return compare(scores, labelled.positive.tolist(), pairs=chosen, bootstrap=bootstrap, seed=seed)


def comparison_table(comparisons: Sequence[Comparison]) -> RichTable:
    """The comparisons as a rich table for the terminal, one row each."""
    from rich.table import Table

    table = Table(title="differences of AUC on the same prompts (95 % intervals)")
    for name in ("first", "second", "AUC", "AUC of second", "difference", "bootstrap", "p", "p (Holm)"):
        table.add_column(name, justify="left" if name in ("first", "second") else "right")
    for item in comparisons:
        shown = f"{item.difference:+.3f}"
        if item.interval is not None:
            shown += f" ({item.interval[0]:+.3f} to {item.interval[1]:+.3f})"
        low, high = item.bootstrap_interval
        p_values = ["" if p is None else f"{p:.2g}" for p in (item.p_value, item.p_adjusted)]
        aucs = (f"{item.auc_first:.3f}", f"{item.auc_second:.3f}")
        table.add_row(item.first, item.second, *aucs, shown, f"({low:+.3f} to {high:+.3f})", *p_values)
    return table


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (A simple sequentially rejective multiple test procedure, 1979); None stays
    None and does not count."""
    there = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(there):
        largest = max(largest, min(1.0, (len(there) - rank) * p))
        adjusted[index] = largest
    return adjusted


def _compare(
    first: str,
    second: str,
    scores_first: Floats,
    scores_second: Floats,
    labels: NDArray[np.bool_],
    bootstrap: int,
    seed: int,
) -> Comparison:
    both = ~(np.isnan(scores_first) | np.isnan(scores_second))
    sides = [both & labels, both & ~labels]
    for side, name in zip(sides, ("memorized", "other"), strict=True):
        if not side.any():
            raise InvalidInput(f"{first} and {second}: there is no {name} prompt that both scored")
    groups = [[scores[side] for side in sides] for scores in (scores_first, scores_second)]
    found = [placements(*pair) for pair in groups]
    aucs = [float(below.mean()) for below, _ in found]
    differences = [one - other for one, other in zip(*found, strict=True)]
    difference = float(differences[0].mean())
    spread = variance(differences[0], differences[1])
    interval, p = None, None
    if spread:
        error = math.sqrt(spread)
        width = normal_quantile() * error
        interval = (max(-1.0, difference - width), min(1.0, difference + width))
        p = math.erfc(abs(difference) / error / math.sqrt(2))
    elif spread == 0 and difference == 0:
        interval, p = (0.0, 0.0), 1.0
    tallies = [Tally(*pair) for pair in groups]
    alone = (np.arange(int(sides[0].sum())), np.arange(int(sides[1].sum())))
    width_of_block = max(tally.size for tally in tallies)
    samples = [
        areas(*tallies[0].count(*drawn)) - areas(*tallies[1].count(*drawn))
        for drawn in draws(bootstrap, np.random.Generator(np.random.Philox(seed)), alone, width_of_block)
    ]
    (resampled,) = middle(np.concatenate(samples)[:, None])
    return Comparison(
        first,
        second,
        auc_first=aucs[0],
        auc_second=aucs[1],
        difference=difference,
        interval=interval,
        bootstrap_interval=resampled,
        p_value=p,
        p_adjusted=None,
        n_positive=len(alone[0]),
        n_negative=len(alone[1]),
    )


def _values(name: str, given: Sequence[float | None], count: int) -> Floats:
    """The scores [n], NaN where there is none."""
    if len(given) != count:
        raise InvalidInput(f"{name}: expected {count} scores, one for each prompt, got {len(given)}")
    there = np.array([score is not None for score in given], dtype=bool)
    values = np.full(count, np.nan)
    if there.any():
        values[there] = finite_scores([score for score in given if score is not None], name)
    return values


def _name(place: Place) -> str:
    return f"{place[0]}@{place[1]}"


def _expanded(pair: tuple[str, str], places: Sequence[Place]) -> list[tuple[str, str]]:
    """A pair of metrics as pairs of metrics at steps."""
    known = {_name(place) for place in places}
    metrics = {metric for metric, _ in places}
    for name in pair:
        if name not in known | metrics:
            there = ", ".join(sorted(metrics | known))
            raise InvalidInput(f"expected two metrics, or metrics at a step, out of {there}; got {name!r}")
    steps = dict.fromkeys(step for _, step in places)
    at_steps = [tuple(name if name in known else f"{name}@{step}" for name in pair) for step in steps]
    return list(dict.fromkeys((one, two) for one, two in at_steps if {one, two} <= known and one != two))
