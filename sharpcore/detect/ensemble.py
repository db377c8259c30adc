"""Detectors put together: a calibrated combination of their scores, and a cascade that stops early."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sharpcore.arguments import is_integer
from sharpcore.detect.detector import Cost
from sharpcore.errors import InvalidInput, MissingDependency
from sharpcore.table import ScoreTable

if TYPE_CHECKING:
    from sharpcore.pipeline import SharpnessScorer

Floats = NDArray[np.float64]
_VERSION = 1
# Strengths of the penalty among which cross-validation chooses, and the folds of that choice.
_STRENGTHS = np.logspace(-2, 2, 5)
_FOLDS = 5


@dataclass(frozen=True)
class Features:
    """Scores of prompts as a matrix: a row a prompt, a column for each detector at each step."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    values: Floats
    labels: NDArray[np.bool_]


def features_of(
    table: ScoreTable,
    label_column: str | None = None,
    others: ScoreTable | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Features:
    """The scores of a labelled table (or of one of memorized prompts and one of `others`), a row a prompt.

    Columns are called `detector@step`; `names` are those to take, by default all that were measured. Prompts
    of which one is missing are left out. Raises InvalidInput for a name that is not there, where no prompt is
    left, and as `sharpcore.report.evaluate_table` does.
    """
    from sharpcore.report.labels import LabelledScores

    labelled = LabelledScores.of(table, label_column, others)
    columns = {f"{metric}@{step}": labelled.scores[metric, step] for metric, step in labelled.measured()}
    chosen = tuple(columns if names is None else names)
    for name in chosen:
        if name not in columns:
            raise InvalidInput(f"names: expected columns out of {', '.join(columns)}; got {name!r}")
    values = np.array([columns[name] for name in chosen], dtype=np.float64).T
    complete = np.isfinite(values).all(1) if chosen else np.zeros(0, bool)
    if not complete.any():
        raise InvalidInput("table: expected prompts with all scores; it has none")
    kept = [row for row, whole in zip(labelled.columns, complete, strict=True) if whole]
    return Features(
        chosen, tuple(row["prompt"] for row in kept), values[complete], labelled.positive[complete]
    )


@dataclass(frozen=True)
class Ensemble:
    """A penalized logistic regression on detectors' scores: log-odds, or a probability, for each prompt.

    `names` are the columns, `centres` and `scales` standardize them, `weights` and `offset` give the
    log-odds. Made by `fit_ensemble`, kept as JSON.
    """

    names: tuple[str, ...]
    centres: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    offset: float
    strength: float

    def log_odds(self, values: Floats) -> Floats:
        """[n, names] scores to [n] log-odds that the prompt is memorized."""
        standard = (values - np.array(self.centres)) / np.array(self.scales)
        return standard @ np.array(self.weights) + self.offset

    def probability(self, values: Floats) -> Floats:
        """[n, names] scores to [n] probabilities, at the share of memorized prompts it was fitted to."""
        return 1 / (1 + np.exp(-np.clip(self.log_odds(values), -700, 700)))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        content = {"sharpcore_ensemble": _VERSION, **asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Ensemble:
        """Read what `save` wrote. Raises InvalidInput for another file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("sharpcore_ensemble") != _VERSION:
                raise KeyError("version")
            content = {
                name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
            }
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path}: expected an ensemble that `save` wrote ({error})") from error


def fit_ensemble(features: Features, *, seed: int = 0) -> Ensemble:
    """Fit the combination to labelled scores; the penalty is chosen by cross-validation (log-loss).

    Raises InvalidInput unless both kinds of prompts are there, at least as many as there are folds,
    MissingDependency without scikit-learn.
    """
    labels = _labels(features)
    strength = _choose(features.values, labels, seed)
    return _fit(features.names, features.values, labels, strength)


def cross_validated(features: Features, *, folds: int = 10, seed: int = 0) -> Floats:
    """The log-odds of each prompt, [n], by an ensemble that was fitted, penalty included, without its fold.

    What an honest evaluation of the ensemble starts from. Raises as `fit_ensemble` does.
    """
    labels = _labels(features)
    if not is_integer(folds) or folds < 2:
        raise InvalidInput(f"folds: expected an integer of at least 2; got {folds!r}")
    splits = _sklearn().model_selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    if min(labels.sum(), (~labels).sum()) < folds:
        raise InvalidInput(f"folds: expected at most the prompts of either kind; got {folds}")
    found = np.empty(len(labels))
    for train, test in splits.split(features.values, labels):
        strength = _choose(features.values[train], labels[train], seed)
        ensemble = _fit(features.names, features.values[train], labels[train], strength)
        found[test] = ensemble.log_odds(features.values[test])
    return found


@dataclass(frozen=True)
class Decision:
    """What a cascade decided of a prompt, and by which scores; the expensive one is None where it was not
    needed."""

    prompt: str
    flagged: bool
    cheap: float
    expensive: float | None


@dataclass(frozen=True)
class Cascade:
    """Decide by a cheap score where that is clear, and by an expensive one only between two limits.

    A prompt whose cheap score is below `low` is let pass, one above `high` is flagged; for the others the
    expensive score is compared with `threshold`. Made by `fit_cascade`.
    """

    cheap: str
    expensive: str
    low: float
    high: float
    threshold: float

    def undecided(self, cheap: Floats) -> NDArray[np.bool_]:
        """Which prompts need the expensive score, [n]."""
        return (cheap >= self.low) & (cheap <= self.high)

    def flagged(self, cheap: Floats, expensive: Floats) -> NDArray[np.bool_]:
        """The decisions, [n]; `expensive` is looked at only where it is needed, and may be NaN elsewhere."""
        later = self.undecided(cheap)
        return np.where(later, expensive > self.threshold, cheap > self.high)

    def decide(
        self, scorer: SharpnessScorer, prompts: Sequence[str], *, seeds: int | Sequence[int] = 4
    ) -> list[Decision]:
        """Score prompts by the cheap detector, and by the expensive one those that it leaves undecided.

        The scorer and the seeds are those of the table that the cascade was fitted to. Raises as the scorer.
        """
        cheap = _scores(scorer, prompts, self.cheap, seeds)
        later = self.undecided(cheap)
        expensive = np.full(len(cheap), np.nan)
        if later.any():
            left = [prompt for prompt, undecided in zip(prompts, later, strict=True) if undecided]
            expensive[later] = _scores(scorer, left, self.expensive, seeds)
        flagged = self.flagged(cheap, expensive)
        return [
            Decision(prompt, bool(flag), float(first), float(second) if undecided else None)
            for prompt, flag, first, second, undecided in zip(
                prompts, flagged, cheap, expensive, later, strict=True
            )
        ]

    def expected_cost(self, cheap: Floats, costs: Mapping[str, Cost]) -> float:
        """Passes of the network and products a prompt and seed, on average over prompts with these scores.

        `costs` are those of the two columns (`detector@step`) alone; a pass that both need is counted once.
        """
        share = float(self.undecided(cheap).mean())
        first, second = (costs[name] for name in (self.cheap, self.expensive))
        further = max(0, second.passes - first.passes) + max(0, second.products - first.products)
        return first.passes + first.products + share * further


def fit_cascade(
    features: Features, cheap: str, expensive: str, *, fpr: float = 0.01, undecided: float = 0.3
) -> Cascade:
    """Limits at which at most a share of `undecided` prompts needs the expensive score.

    Half of the allowed false positives (`fpr` of the negatives) may be flagged by each score; the lower
    limit is where no more than the share is left between. Raises InvalidInput for unknown names, or shares
    outside (0, 1).
    """
    labels = _labels(features)
    for name, share in (("fpr", fpr), ("undecided", undecided)):
        if not 0 < share < 1:
            raise InvalidInput(f"{name}: expected a number between 0 and 1; got {share!r}")
    columns = []
    for name in (cheap, expensive):
        if name not in features.names:
            raise InvalidInput(f"names: expected columns out of {', '.join(features.names)}; got {name!r}")
        columns.append(features.values[:, features.names.index(name)])
    first, second = columns
    allowed = int(fpr / 2 * (~labels).sum())
    high = float(np.sort(first[~labels])[::-1][allowed])
    order = np.sort(first[first <= high])
    count = min(int(undecided * len(first)), len(order))
    # A score that is as high as the next one below stays out: ties would make the share larger.
    below = order[len(order) - count - 1] if count < len(order) else -np.inf
    chosen = order[len(order) - count :]
    chosen = chosen[chosen > below]
    low = float(chosen[0]) if len(chosen) else float(np.nextafter(high, np.inf))
    between = (first >= low) & (first <= high) & ~labels
    rest = np.sort(second[between])[::-1]
    threshold = float(rest[min(allowed, len(rest) - 1)]) if len(rest) else float(second.min())
    return Cascade(cheap, expensive, low, high, threshold)


def _scores(
    scorer: SharpnessScorer, prompts: Sequence[str], column: str, seeds: int | Sequence[int]
) -> Floats:
    """The scores of a column `detector@step`, [n]."""
    name, _, step = column.partition("@")
    table = scorer(prompts, metrics=[name], steps=(int(step),), seeds=seeds)
    return np.array([row[name] for row in table if row["step"] == int(step)], dtype=np.float64)


def _labels(features: Features) -> NDArray[np.bool_]:
    labels = features.labels
    if labels.all() or not labels.any():
        raise InvalidInput("features: expected labels, memorized prompts and others; one kind is missing")
    if min(labels.sum(), (~labels).sum()) < _FOLDS:
        raise InvalidInput(f"features: expected at least {_FOLDS} prompts of either kind")
    return labels


def _standard(values: Floats) -> tuple[Floats, Floats]:
    spread = values.std(0)
    return values.mean(0), np.where(spread > 0, spread, 1.0)


def _choose(values: Floats, labels: NDArray[np.bool_], seed: int) -> float:
    """The strength of the penalty with the least log-loss in folds within these prompts."""
    sklearn = _sklearn()
    splits = sklearn.model_selection.StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    losses = np.zeros(len(_STRENGTHS))
    for train, test in splits.split(values, labels):
        for i, strength in enumerate(_STRENGTHS):
            ensemble = _fit((), values[train], labels[train], float(strength))
            odds = ensemble.log_odds(values[test])
            losses[i] += np.logaddexp(0, np.where(labels[test], -odds, odds)).sum()
    return float(_STRENGTHS[int(losses.argmin())])


def _fit(names: tuple[str, ...], values: Floats, labels: NDArray[np.bool_], strength: float) -> Ensemble:
    centres, scales = _standard(values)
    model = _sklearn().linear_model.LogisticRegression(C=strength, max_iter=2000)
    model.fit((values - centres) / scales, labels)
    return Ensemble(
        names,
        tuple(centres.tolist()),
        tuple(scales.tolist()),
        tuple(model.coef_[0].tolist()),
        float(model.intercept_[0]),
        strength,
    )


def _sklearn() -> Any:
    try:
        import sklearn.linear_model
        import sklearn.model_selection
    except ImportError as error:
        raise MissingDependency("ensembles need scikit-learn: pip install scikit-learn") from error
    return sklearn
