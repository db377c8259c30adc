"""Thresholds with a guarantee: conformal p-values of scores against prompts that are not memorized."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sharpcore.errors import InvalidInput, MissingDependency
from sharpcore.table import Row, ScoreTable

Interval = tuple[float, float]
Floats = NDArray[np.float64]
#: A metric and a step; both None where scores were given without names.
Place = tuple[str | None, int | None]

CONFIDENCE = 0.95
DEFAULT_FPRS = (0.01, 0.03)
_SCHEMA = "sharpcore_calibration"
_VERSION = 1
# What a run may do differently from the calibration without another meaning of its scores: which of the
# calibrated metrics and steps it takes, which columns it carries, and how (not how exactly) it computes.
_FREE = {"metrics", "steps", "columns", "backend", "costs", "calibration", "asked_steps", "options"}


@dataclass(frozen=True)
class Negatives:
    """Scores of prompts that are not memorized, at one metric and step, ascending.

    `scores` [n] calibrate; `held_out` [m] were kept apart to see how often the calibrated detector flags.
    """

    scores: Floats
    held_out: Floats

    def p_value(self, scores: ArrayLike) -> Floats:
        """Conformal p-values (1 + #{negatives >= score}) / (n + 1), like `scores` in shape.

        Split conformal, ties counted against the prompt (Vovk, Gammerman and Shafer, Algorithmic Learning in
        a Random World, 2005; Angelopoulos and Bates, arXiv 2107.07511): for a prompt exchangeable with the
        negatives, P(p <= alpha) <= alpha. Raises InvalidInput for NaN or infinity.
        """
        values = _finite(scores, "scores")
        below = np.searchsorted(self.scores, values, side="left")
        p: Floats = (1 + len(self.scores) - below) / (len(self.scores) + 1.0)
        return p

    def threshold(self, fpr: float) -> float | None:
        """The conformal quantile: scores above it have p <= fpr. None, flag nothing, where n < 1/fpr - 1."""
        k = self.allowed(fpr)
        return float(self.scores[-k]) if k else None

    def allowed(self, fpr: float) -> int:
        """The largest k with k / (n + 1) <= fpr: a score is flagged if fewer than k negatives reach it."""
        _check_rate(fpr, "fpr")
        count = len(self.scores) + 1
        # The product is rounded, the quotient decides, as it does for a p-value.
        k = int(fpr * count) + 1
        while k / count > fpr:
            k -= 1
        return k

    def expected_fpr(self, fpr: float) -> float:
        """k / (n + 1): the false positive rate that the threshold has on average over calibrations."""
        return self.allowed(fpr) / (len(self.scores) + 1)

    def probability(self, fpr: float, at_most: float) -> float:
        """P(false positive rate of the threshold <= `at_most`) over the draw of the negatives.

        For n independent negatives with a continuous distribution the rate is Beta(k, n + 1 - k), ties make
        it smaller (Vovk, Conditional validity of inductive conformal predictors, 2012; arXiv 2107.07511,
        section 3.2).
        """
        _check_rate(at_most, "at_most")
        k = self.allowed(fpr)
        return float(_stats().beta.cdf(at_most, k, len(self.scores) + 1 - k)) if k else 1.0

    def bound(self, fpr: float, confidence: float = CONFIDENCE) -> float:
        """The rate that the threshold's false positive rate exceeds in at most 1 - confidence of
        calibrations."""
        _check_rate(confidence, "confidence")
        k = self.allowed(fpr)
        return float(_stats().beta.ppf(confidence, k, len(self.scores) + 1 - k)) if k else 0.0

    def validation(self, fpr: float) -> Validation | None:
        """How many of the held-out negatives are flagged; None where none were held out."""
        _check_rate(fpr, "fpr")
        if not len(self.held_out):
            return None
        flagged = int((self.p_value(self.held_out) <= fpr).sum())
        return Validation(flagged, len(self.held_out), clopper_pearson(flagged, len(self.held_out)))


@dataclass(frozen=True)
class Validation:
    """How many of `count` negatives that were not used for calibration are flagged, with the exact 95 %
    interval of the false positive rate."""

    flagged: int
    count: int
    interval: Interval


@dataclass(frozen=True)
class Calibration:
    """Negatives' scores for each metric and step, with the settings that they were computed with.

    Made by `calibrate` or `calibrate_tables`; what it decides holds for these settings and for prompts like
    the negatives. `version` is that of sharpcore; `validation_share` and `seed` say how negatives were held
    out.
    """

    negatives: Mapping[Place, Negatives]
    settings: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    validation_share: float = 0.0
    seed: int = 0

    def at(self, metric: str | None = None, step: int | None = None) -> Negatives:
        """The negatives of a metric and a step; both may be left out where there is only one.

        Raises InvalidInput, naming what there is, otherwise.
        """
        found = [
            negatives
            for (name, place), negatives in self.negatives.items()
            if metric in (None, name) and step in (None, place)
        ]
        if len(found) != 1:
            there = ", ".join(f"{name} at step {place}" for name, place in self.negatives)
            raise InvalidInput(f"expected metric and step out of: {there}; got {metric!r} and {step!r}")
        return found[0]

    def p_value(self, scores: ArrayLike, metric: str | None = None, step: int | None = None) -> Floats:
        """Conformal p-values, as `Negatives.p_value`."""
        return self.at(metric, step).p_value(scores)

    def decide(
        self, scores: ArrayLike, *, fpr: float, metric: str | None = None, step: int | None = None
    ) -> NDArray[np.bool_]:
        """Which scores are flagged: those with a p-value of at most `fpr`, like `scores` in shape."""
        _check_rate(fpr, "fpr")
        return np.asarray(self.at(metric, step).p_value(scores) <= fpr)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise InvalidInput, naming what differs, unless scores of these settings may be compared.

        `settings` are those of a run of `sharpcore score`: model, seeds, units, guidance and the like must be
        equal, `metrics` and `steps` among those that were calibrated. The model is told by its hash, not by
        the name of its folder.
        """
        names = [*self.settings, *(name for name in settings if name not in self.settings)]
        differing = [
            f"{name} (there {self.settings.get(name)!r}, now {settings.get(name)!r})"
            for name in names
            if name not in _FREE
            and _identity(name, self.settings.get(name)) != _identity(name, settings.get(name))
        ]
        options, others = (found.get("options", {}) for found in (self.settings, settings))
        for metric in settings.get("metrics", ()):
            if metric in options and options[metric] != others.get(metric, options[metric]):
                differing.append(f"{metric} (there {options[metric]!r}, now {others[metric]!r})")
        for name, index in (("metrics", 0), ("steps", 1)):
            there = list(dict.fromkeys(place[index] for place in self.negatives))
            if any(value not in there for value in settings.get(name, ())):
                differing.append(f"{name} (there {there!r}, now {list(settings[name])!r})")
        if differing:
            raise InvalidInput(f"the calibration was made for another setting: {'; '.join(differing)}")

    def decided(self, rows: Iterable[Row], metrics: Sequence[str], *, fpr: float) -> list[Row]:
        """Rows of a table of scores with `<metric>_p` and `<metric>_flagged` before their `error`; None where
        there is no score."""
        _check_rate(fpr, "fpr")
        decided = []
        for row in rows:
            extended = {name: value for name, value in row.items() if name != "error"}
            for metric in metrics:
                score = row.get(metric)
                p = None if score is None else float(self.p_value(score, metric, row["step"]))
                extended |= {f"{metric}_p": p, f"{metric}_flagged": None if p is None else p <= fpr}
            decided.append(extended | {"error": row.get("error")})
        return decided

    @property
    def checksum(self) -> str:
        """A hash of everything in it."""
        return _checksum(self._content())

    def save(self, path: str | Path) -> None:
        """Write a JSON file. Raises InvalidInput for settings that JSON cannot hold."""
        content = self._content()
        document = {_SCHEMA: _VERSION, **content, "checksum": _checksum(content)}
        Path(path).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises InvalidInput for a missing file, another kind of file, a version of the format that this one
        does not know, or contents that are not those that were written.
        """
        if not Path(path).is_file():
            raise InvalidInput(f"{path}: there is no such file")
        try:
            document = json.loads(Path(path).read_bytes(), parse_constant=_no_number)
        except ValueError as error:
            raise InvalidInput(f"{path}: not a calibration file, or damaged: {error}") from None
        if not isinstance(document, dict) or _SCHEMA not in document:
            raise InvalidInput(f"{path}: not a calibration file: it has no {_SCHEMA!r}")
        if document[_SCHEMA] != _VERSION:
            raise InvalidInput(
                f"{path}: its format has the version {document[_SCHEMA]!r}, this sharpcore knows {_VERSION}"
            )
        content = {name: value for name, value in document.items() if name not in (_SCHEMA, "checksum")}
        if document.get("checksum") != _checksum(content):
            raise InvalidInput(f"{path}: damaged or edited: its contents do not have its checksum")
        try:
            negatives = {
                (entry["metric"], entry["step"]): Negatives(
                    np.array(entry["scores"], dtype=np.float64), np.array(entry["held_out"], dtype=np.float64)
                )
                for entry in content["negatives"]
            }
            return cls(
                negatives,
                content["settings"],
                content["version"],
                content["validation_share"],
                content["seed"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path}: damaged: {type(error).__name__}: {error}") from None

    def _content(self) -> dict[str, Any]:
        try:
            settings = json.loads(json.dumps(self.settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"settings: expected what JSON can hold: {error}") from None
        return {
            "version": self.version,
            "settings": settings,
            "validation_share": self.validation_share,
            "seed": self.seed,
            "thresholds": [
                {"metric": metric, "step": step, "fpr": fpr, "threshold": negatives.threshold(fpr)}
                for (metric, step), negatives in self.negatives.items()
                for fpr in DEFAULT_FPRS
            ],
            "negatives": [
                {
                    "metric": metric,
                    "step": step,
                    "scores": negatives.scores.tolist(),
                    "held_out": negatives.held_out.tolist(),
                }
                for (metric, step), negatives in self.negatives.items()
            ],
        }


def calibrate(
    scores: ArrayLike | Mapping[Place, ArrayLike],
    *,
    settings: Mapping[str, Any] | None = None,
    validation_share: float = 0.0,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Calibration:
    """Calibrate a detector with scores of prompts that are not memorized, [n], or with several such lists by
    (metric, step), all of the same prompts in the same order.

    `validation_share` of the prompts, chosen by `seed`, are held out; `groups` [n] (say, the clusters of
    near-duplicates) are held out as a whole. `settings` say how the scores were made. Raises InvalidInput for
    no scores, NaN or infinity, lists of different lengths, or a share that leaves nothing to calibrate with.
    """
    from sharpcore import __version__

    given: Mapping[Any, Any] = scores if isinstance(scores, Mapping) else {(None, None): scores}
    lists = {place: _list(values, place) for place, values in given.items()}
    sizes = {len(values) for values in lists.values()}
    if len(sizes) != 1:
        raise InvalidInput(f"scores: expected lists of the same prompts, got lengths {sorted(sizes)}")
    (count,) = sizes
    held_out = _held_out(count, validation_share, seed, groups)
    negatives = {
        place: Negatives(np.sort(values[~held_out]), np.sort(values[held_out]))
        for place, values in lists.items()
    }
    return Calibration(negatives, dict(settings or {}), __version__, validation_share, seed)


def calibrate_table(
    table: ScoreTable,
    *,
    settings: Mapping[str, Any] | None = None,
    validation_share: float = 0.0,
    seed: int = 0,
) -> Calibration:
    """Calibrate every metric at every step of a table whose prompts are not memorized.

    Prompts with an error are left out; of prompts with the same text (but for case and space) only the first
    is used, and near-duplicates are held out together. Raises InvalidInput for a table without scores, a
    metric that some of the prompts lack, and as `calibrate`.
    """
    from sharpcore.report.duplicates import find_duplicates, normalize

    prompts: dict[str, dict[int, Row]] = {}
    for row in table:
        if row.get("error") is None and row.get("prompt") and row.get("step") is not None:
            prompts.setdefault(normalize(row["prompt"]), {}).setdefault(row["step"], row)
    measured = [
        (metric, step)
        for metric in table.metrics
        for step in table.steps
        if any(rows.get(step, {}).get(metric) is not None for rows in prompts.values())
    ]
    if not measured:
        raise InvalidInput("there is no score of a negative to calibrate with")
    scores: dict[Place, list[Any]] = {}
    for metric, step in measured:
        scores[metric, step] = [rows.get(step, {}).get(metric) for rows in prompts.values()]
        missing = sum(score is None for score in scores[metric, step])
        if missing:
            raise InvalidInput(
                f"{metric} at step {step}: {missing} of {len(prompts)} prompts without an error have no score"
            )
    clusters = find_duplicates(list(prompts)).clusters
    return calibrate(scores, settings=settings, validation_share=validation_share, seed=seed, groups=clusters)


def clopper_pearson(successes: int, count: int, confidence: float = CONFIDENCE) -> Interval:
    """The exact interval of a binomial proportion (Clopper and Pearson, Biometrika 26, 1934).

    Raises InvalidInput unless 0 <= successes <= count and count >= 1.
    """
    if not 0 <= successes <= count or count < 1:
        raise InvalidInput(f"successes: expected 0 to {count} of at least 1, got {successes} of {count}")
    _check_rate(confidence, "confidence")
    beta, tail = _stats().beta, (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, count - successes + 1))
    high = 1.0 if successes == count else float(beta.isf(tail, successes + 1, count - successes))
    return low, high


def calibrated_table(metrics: Sequence[str]) -> type[ScoreTable]:
    """The kind of table that has a p-value and a decision beside each metric."""
    own = {name: kind for m in metrics for name, kind in ((f"{m}_p", "float"), (f"{m}_flagged", "bool"))}

    class CalibratedTable(ScoreTable):
        """Scores of prompts with conformal p-values and decisions."""

        standard: ClassVar[Mapping[str, str]] = {**ScoreTable.standard, **own}

        @classmethod
        def empty_rows(cls, settings: Mapping[str, Any], timesteps: Sequence[float]) -> list[Row]:
            return [row | dict.fromkeys(own) for row in super().empty_rows(settings, timesteps)]

    return CalibratedTable


def _held_out(count: int, share: float, seed: int, groups: Sequence[Hashable] | None) -> NDArray[np.bool_]:
    """Which prompts are held out, [n]: whole groups in random order, until the share is reached."""
    if not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise InvalidInput(f"validation_share: expected a number in [0, 1), got {share!r}")
    labels: Sequence[Hashable] = range(count) if groups is None else groups
    if len(labels) != count:
        raise InvalidInput(f"groups: expected {count}, one for each prompt, got {len(labels)}")
    wanted = round(share * count)
    members: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    held_out = np.zeros(count, dtype=bool)
    whole = list(members.values())
    for place in np.random.Generator(np.random.Philox(seed)).permutation(len(whole)):
        if held_out.sum() + len(whole[place]) <= wanted:
            held_out[whole[place]] = True
    if held_out.all():
        raise InvalidInput(f"validation_share: {share} of {count} prompts leaves none to calibrate with")
    return held_out


def _list(values: Any, place: Place) -> Floats:
    name = "scores" if place == (None, None) else f"{place[0]} at step {place[1]}"
    scores = _finite(values, name)
    if scores.ndim != 1 or not scores.size:
        raise InvalidInput(f"{name}: expected a non-empty list of numbers, got shape {scores.shape}")
    return scores


def _finite(values: ArrayLike, name: str) -> Floats:
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInput(f"{name}: expected numbers, got {values!r}") from None
    if not np.isfinite(scores).all():
        place = int(np.flatnonzero(~np.isfinite(scores.ravel()))[0])
        raise InvalidInput(f"{name}: expected finite numbers, got {scores.ravel()[place]} at index {place}")
    return scores


def _check_rate(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InvalidInput(f"{name}: expected a number between 0 and 1, both excluded; got {value!r}")


def _identity(name: str, value: Any) -> Any:
    """What a setting is compared by: lists and tuples alike, and a model by its hash where it has one."""
    if isinstance(value, tuple):
        return list(value)
    if name == "model" and (match := re.fullmatch(r".* ([0-9a-f]{16})", str(value))):
        return match[1]
    return value


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no score")


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise MissingDependency("exact intervals need scipy: pip install scipy") from None
    return stats


def needed(fpr: float) -> int:
    """How many negatives a threshold for this false positive rate needs: the smallest n with
    1 / (n + 1) <= fpr."""
    _check_rate(fpr, "fpr")
    count = math.ceil(1 / fpr)
    # 1 / fpr is rounded: one to either side may be the right one.
    return next(n for n in range(max(1, count - 2), count + 2) if 1 / (n + 1) <= fpr)
