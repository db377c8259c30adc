"""One HTML file that tells what `sharpcore evaluate` found, and needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpcore.errors import InvalidInput
from sharpcore.report import sections
from sharpcore.report.labels import LabelledScores
from sharpcore.report.page import element, page
from sharpcore.report.sections import FIGURES
from sharpcore.table import ScoreTable

if TYPE_CHECKING:
    from torch import Tensor

    from sharpcore.calibration import Calibration
    from sharpcore.localization import HeatMap

TITLE = "Memorization scores"
Figures = Mapping[str, bytes]


@dataclass(frozen=True)
class ReportParts:
    """What a report is made of.

    Attributes
    ----------
    evaluation
        What `sharpcore evaluate` writes as evaluation.json.
    scores
        The table that was evaluated, or None.
    figures
        PNG pictures by the names of FIGURES.
    calibration
        Thresholds to hold beside the scores; it must be one of their settings.
    heat_maps, images
        Maps, and pictures with captions: files (PNG, JPEG) or tensors [3, H, W] in 0 to 1.
    title, date
        Of the page. No date is shown unless it is given, so that the same parts make the same file.
    """

    evaluation: Mapping[str, Any]
    scores: ScoreTable | None = None
    figures: Figures = field(default_factory=dict)
    calibration: Calibration | None = None
    heat_maps: Sequence[HeatMap] = ()
    images: Sequence[tuple[str, str | Path | Tensor]] = ()
    title: str = TITLE
    date: str | None = None

    @classmethod
    def read(cls, folder: str | Path, **others: Any) -> ReportParts:
        """Of a folder that `sharpcore evaluate` has written; `others` are further attributes.

        Raises InvalidInput where it is none.
        """
        folder = Path(folder)
        path = folder / "evaluation.json"
        if not path.is_file():
            raise InvalidInput(f"{folder}: expected a folder of `sharpcore evaluate`; it has no {path.name}")
        try:
            evaluation = json.loads(path.read_bytes())
        except ValueError as error:
            raise InvalidInput(f"{path}: not what `sharpcore evaluate` writes: {error}") from None
        if not isinstance(evaluation, dict) or not evaluation.get("evaluations"):
            raise InvalidInput(f"{path}: not what `sharpcore evaluate` writes: there are no evaluations")
        scores = folder / evaluation.get("scores", "scores.parquet")
        figures = {name: file.read_bytes() for name in FIGURES if (file := folder / f"{name}.png").is_file()}
        return cls(evaluation, ScoreTable.read(scores) if scores.is_file() else None, figures, **others)

    def labelled(self) -> LabelledScores | None:
        """The prompts of the table with their labels, or None without a table."""
        if self.scores is None:
            return None
        labels = self.evaluation.get("labels") or {"column": "memorized"}
        return LabelledScores.of(self.scores, labels["column"], positive=labels.get("positive"))


def write_report(source: str | Path | ReportParts, path: str | Path) -> None:
    """Write the report of a folder of `sharpcore evaluate`, or of parts, to one HTML file.

    The file fetches nothing and is the same, byte for byte, for the same parts. Raises InvalidInput for a
    folder that is none, a calibration that was made for other settings, and for pictures that are none.
    """
    parts = source if isinstance(source, ReportParts) else ReportParts.read(source)
    Path(path).write_text(render(parts), encoding="utf-8", newline="\n")


def render(parts: ReportParts) -> str:
    """The report as text of HTML. Raises as `write_report`."""
    evaluation, labelled = parts.evaluation, parts.labelled()
    _check_calibration(parts)
    found = [
        sections.warnings(parts),
        sections.what_was_run(evaluation),
        sections.results(evaluation["evaluations"]),
        sections.comparisons(evaluation.get("comparisons", ())),
        sections.text_alone(evaluation),
        sections.curves(parts),
        sections.thresholds(parts.calibration, labelled),
        sections.heat_maps(parts.heat_maps),
        sections.images(parts.images),
        sections.errors(parts.scores),
        sections.prompts(parts, labelled),
    ]
    first = evaluation["evaluations"][0]
    settings = evaluation.get("settings") or {}
    header = [
        element(
            "p",
            f"{first['n_positive']} memorized and {first['n_negative']} other prompts",
            f" on {settings['model']}" if "model" in settings else "",
            ".",
            class_="lead",
        ),
        element("p", parts.date, class_="quiet") if parts.date else "",
    ]
    from sharpcore import __version__

    footer = element("p", f"Made by sharpcore {__version__}. This file fetches nothing from anywhere.")
    return page(parts.title, header, [part for part in found if part], footer)


def _check_calibration(parts: ReportParts) -> None:
    settings = parts.evaluation.get("settings")
    if parts.calibration is not None and settings:
        parts.calibration.check(settings)
