"""The command `sharpcore calibrate`: a file of thresholds with a guaranteed false positive rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sharpcore.cli_run import LABEL, Column, Format, say, with_options
from sharpcore.cli_score import Scoring, write_scores
from sharpcore.errors import InvalidInput
from sharpcore.prompts import read_prompts
from sharpcore.table import Row, ScoreTable, parquet_metadata

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from sharpcore.calibration import Calibration


@with_options
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Calibration file to write (JSON).")],
    input: Annotated[
        str | None, typer.Argument(help="Prompts that are not memorized: .txt, .csv, .jsonl, .parquet, or -.")
    ] = None,
    from_scores: Annotated[
        list[Path] | None,
        typer.Option(help="Parquet table of `score` or `evaluate`, in INPUT's place; may be repeated."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Where INPUT's scores go; default: beside the file, .scores.parquet.")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help=f"Column that says which prompts are memorized; default: {LABEL}, if there."),
    ] = None,
    positive: Annotated[
        list[str] | None, typer.Option(help="Label of the memorized ones; may be repeated.")
    ] = None,
    fpr: Annotated[str, typer.Option(help="False positive rates to report.")] = "0.01,0.03",
    validation_share: Annotated[
        float, typer.Option(help="Share of the negatives that is kept apart to check the rates with.")
    ] = 0.1,
    validation_seed: Annotated[int, typer.Option(min=0, help="Seed of their choice.")] = 0,
    column: Column = "prompt",
    format: Format = None,
    *,
    options: Scoring,
) -> None:
    """Thresholds, and what they guarantee, from prompts that are known not to be memorized.

    `sharpcore score --calibration FILE` then adds p-values and decisions. Prompts that are labelled as
    memorized are left out.
    """
    from rich.console import Console

    from sharpcore.calibration import calibrate_table
    from sharpcore.report.labels import is_positive

    if (input is None) == (not from_scores):
        raise InvalidInput("expected one source: INPUT, or --from-scores")
    rates = _rates(fpr)
    if not 0 <= validation_share < 1:
        raise InvalidInput(f"--validation-share: expected a number in [0, 1), got {validation_share!r}")
    if not out.parent.is_dir():
        raise InvalidInput(f"{out}: there is no folder {out.parent}")
    if out.is_dir():
        raise InvalidInput(f"{out}: expected a file, this is a folder")
    if out.exists() and not (options.overwrite or options.resume):
        raise InvalidInput(f"{out}: it exists already; --overwrite replaces it")
    tables = list(from_scores or [])
    if input is not None:
        tables = [scores or out.with_name(f"{out.stem}.scores.parquet")]
        _require_parquet(tables[0])
        prompts = read_prompts(input, column=column, format=format)
        label = label_column or LABEL
        if label in prompts[0].columns:
            prompts = [row for row in prompts if not is_positive(row.columns[label], label, positive)]
        elif label_column is not None:
            there = ", ".join(prompts[0].columns) or "none"
            raise InvalidInput(
                f"{input}: there is no column {label!r} (--label-column); the other columns are: {there}"
            )
        if not prompts:
            raise InvalidInput(
                f"{input}: all prompts are labelled as memorized, there is none to calibrate with"
            )
        write_scores(prompts, tables[0], options)
    rows, settings = _negatives(tables, label_column, positive)
    failed = len({(row.get("prompt"), row["error"]) for row in rows if row.get("error") is not None})
    calibration = calibrate_table(
        ScoreTable(rows), settings=settings, validation_share=validation_share, seed=validation_seed
    )
    calibration.save(out)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(calibration_table(calibration, rates))
    for (metric, step), negatives in calibration.negatives.items():
        for rate in rates:
            if negatives.threshold(rate) is None:
                say(_too_few(metric, step, rate, len(negatives.scores), len(negatives.held_out)))
    first = next(iter(calibration.negatives.values()))
    used = len(first.scores) + len(first.held_out)
    say(
        f"calibration with {used} different negatives written to {out}"
        + (f"; {failed} with an error were left out" if failed else "")
    )


def calibration_table(calibration: Calibration, rates: Sequence[float]) -> RichTable:
    """Thresholds and guarantees as a rich table for the terminal, a row for each metric, step and rate."""
    from rich.table import Table

    table = Table(title="thresholds (95 % bounds)")
    for name in ("metric", "step", "negatives", "FPR at most", "threshold", "FPR, 95 % of calibrations"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    table.add_column("flagged of those held out", justify="right")
    for (metric, step), negatives in calibration.negatives.items():
        for rate in rates:
            threshold, checked = negatives.threshold(rate), negatives.validation(rate)
            seen = ""
            if checked is not None:
                low, high = checked.interval
                seen = f"{checked.flagged} of {checked.count} ({low:.3f} to {high:.3f})"
            table.add_row(
                metric,
                str(step),
                str(len(negatives.scores)),
                f"{rate:g}",
                "flags nothing" if threshold is None else f"{threshold:.6g}",
                f"at most {negatives.bound(rate):.3f}",
                seen,
            )
    return table


def _negatives(
    paths: Sequence[Path], label_column: str | None, positive: list[str] | None
) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the prompts that are not memorized, and the settings that all tables share."""
    from sharpcore.report.labels import is_positive

    rows: list[Row] = []
    common: dict[str, Any] | None = None
    for path in paths:
        _require_parquet(path)
        table = ScoreTable.read(path)
        settings = parquet_metadata(path).get("settings")
        if settings is None:
            raise InvalidInput(f"{path}: it does not say with which settings it was made")
        settings = {name: value for name, value in settings.items() if name not in ("columns", "calibration")}
        if common is not None and settings != common:
            names = [name for name in {**common, **settings} if common.get(name) != settings.get(name)]
            differing = "; ".join(f"{name} ({common.get(name)!r}, {settings.get(name)!r})" for name in names)
            raise InvalidInput(f"{path}: mixed settings, it differs from {paths[0]} in {differing}")
        common = settings
        label = label_column or LABEL
        if label in table.columns:
            rows += [row for row in table if not is_positive(row.get(label), label, positive)]
        elif label_column is None:
            rows += table.rows
        else:
            there = ", ".join(table.columns)
            raise InvalidInput(f"{path}: there is no column {label!r} (--label-column); there are: {there}")
    assert common is not None
    return rows, common


def _require_parquet(path: Path) -> None:
    if path.suffix.lower() not in (".parquet", ".pq"):
        raise InvalidInput(
            f"{path}: expected a Parquet table, others do not say with which settings they were made"
        )


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise InvalidInput(f'--fpr: expected numbers between 0 and 1 like "0.01,0.03", got {text!r}')
    return rates


def _too_few(metric: str | None, step: int | None, rate: float, count: int, held_out: int) -> str:
    from sharpcore.calibration import needed

    hint = f" ({held_out} more are held out: --validation-share)" if held_out else ""
    return (
        f"warning: {metric} at step {step}: nothing will be flagged, a false positive rate of {rate:g} takes "
        f"{needed(rate)} negatives, there are {count}{hint}"
    )
