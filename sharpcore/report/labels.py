"""What a table says of each prompt: memorized or not, its group, its scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpcore.errors import InvalidInput
from sharpcore.table import Row, ScoreTable

POSITIVE_LABELS = {"1", "true", "yes", "memorized", "positive"}
NEGATIVE_LABELS = {"0", "false", "no", "other", "not memorized", "negative"}

#: A metric and a step.
Place = tuple[str, int]


@dataclass(frozen=True)
class LabelledScores:
    """The prompts of a table, each once, with what was measured at each metric and step.

    `positive` [n] are the labels; `scores[metric, step]` [n] has None where there is none; `failed[step]` [n]
    says where a row has an error; `columns` [n] are the rows that the prompts came from (one of each).
    """

    positive: NDArray[np.bool_]
    columns: list[Row]
    scores: dict[Place, list[float | None]]
    seeds: dict[Place, list[list[float] | None]]
    failed: dict[int, NDArray[np.bool_]]

    @classmethod
    def of(
        cls,
        table: ScoreTable,
        label_column: str | None = None,
        others: ScoreTable | None = None,
        *,
        positive: Collection[str] | None = None,
    ) -> LabelledScores:
        """Of a table with a label column, or of two tables (positives, then `others`).

        A prompt that a table has more than once counts as often. Raises InvalidInput for a label column that
        is missing or not understood, and for a table without scores.
        """
        if (label_column is None) == (others is None):
            raise InvalidInput("expected either label_column or a second table (others)")
        if others is not None:
            rows = [(row, True) for row in table] + [(row, False) for row in others]
            metrics = [name for name in table.metrics if name in others.metrics]
        else:
            assert label_column is not None
            if label_column not in table.columns:
                raise InvalidInput(
                    f"label_column: expected one of {', '.join(table.columns)}, got {label_column!r}"
                )
            rows = [(row, is_positive(row.get(label_column), label_column, positive)) for row in table]
            metrics = list(table.metrics)
        if not metrics:
            columns = ", ".join(table.columns) or "none"
            raise InvalidInput(f"the table has no scores: its columns are {columns}")
        return cls._of_rows(rows, metrics)

    @classmethod
    def _of_rows(cls, rows: list[tuple[Row, bool]], metrics: list[str]) -> LabelledScores:
        seen: Counter[tuple[Any, ...]] = Counter()
        units: dict[tuple[Any, ...], list[tuple[Row, bool]]] = {}
        for row, label in rows:
            step, prompt = row.get("step"), row.get("prompt")
            if step is None:
                continue
            number = seen[prompt, label, step]
            seen[prompt, label, step] += 1
            units.setdefault((prompt, label, number), []).append((row, label))
        steps = sorted({row["step"] for unit in units.values() for row, _ in unit})
        at = [{row["step"]: row for row, _ in unit} for unit in units.values()]
        nothing: Row = {}
        found = {
            (metric, step): [rows.get(step, nothing) for rows in at] for metric in metrics for step in steps
        }
        return cls(
            np.array([unit[0][1] for unit in units.values()], dtype=bool),
            [unit[0][0] for unit in units.values()],
            {place: [row.get(place[0]) for row in rows] for place, rows in found.items()},
            {place: [row.get(f"{place[0]}_seeds") for row in rows] for place, rows in found.items()},
            {
                step: np.array([rows.get(step, nothing).get("error") is not None for rows in at], dtype=bool)
                for step in steps
            },
        )

    def measured(self) -> list[Place]:
        """The metrics and steps that were measured: a metric that no row without an error has at a step was
        not.

        Raises InvalidInput where that leaves none.
        """
        places = [
            place
            for place, scores in self.scores.items()
            if any(score is not None for score in scores) or self.failed[place[1]].all()
        ]
        if not places:
            raise InvalidInput("the table has no scores: no metric was measured at any step")
        return places

    def split(
        self, place: Place, among: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The indices of the positives (those in `among`, [n]) and of the negatives with a score here.

        Raises InvalidInput where one of the two is empty.
        """
        scored = np.array([score is not None for score in self.scores[place]], dtype=bool)
        sides = (self.positive if among is None else self.positive & among, ~self.positive)
        indices = [np.flatnonzero(scored & side) for side in sides]
        for group, name in zip(indices, ("memorized", "other"), strict=True):
            if not len(group):
                raise InvalidInput(f"{place[0]} at step {place[1]}: there is no {name} prompt with a score")
        return indices[0], indices[1]

    def values(self, place: Place, indices: NDArray[np.int64]) -> list[Any]:
        """The scores of the prompts with these indices."""
        scores = self.scores[place]
        return [scores[index] for index in indices]

    def column(self, name: str) -> list[Any]:
        """A column of the prompts, [n]. Raises InvalidInput where no prompt has it."""
        if not any(name in row for row in self.columns):
            there = ", ".join(dict.fromkeys(key for row in self.columns for key in row))
            raise InvalidInput(f"expected a column out of {there}; got {name!r}")
        return [row.get(name) for row in self.columns]

    def prompts(self, positive: bool) -> list[str]:
        """The texts of the positives, or of the negatives; rows without one are left out."""
        texts = [row.get("prompt") for row in self.columns]
        return [text for text, side in zip(texts, self.positive, strict=True) if text and side == positive]


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
