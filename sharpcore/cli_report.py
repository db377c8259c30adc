"""The command `sharpcore report`: one HTML page of what `sharpcore evaluate` has found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sharpcore.cli_run import say
from sharpcore.errors import InvalidInput


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `sharpcore evaluate` has written.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; default: report.html in the folder.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File of `sharpcore calibrate`: its thresholds, and p-values.")
    ] = None,
    heat_map: Annotated[
        list[Path] | None, typer.Option(help="A heat map that was saved (.npz); may be repeated.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A PNG or JPEG picture; may be repeated.")] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    date: Annotated[str | None, typer.Option(help="Date to show; without it none is shown.")] = None,
) -> None:
    """Write the page of an evaluation again, with more beside it: a calibration, heat maps, pictures.

    The file fetches nothing from the network and is the same for the same folder.
    """
    from sharpcore.calibration import Calibration
    from sharpcore.localization import HeatMap
    from sharpcore.report.html import TITLE, ReportParts, write_report

    target = folder / "report.html" if output is None else output
    if target.is_dir() or not target.parent.is_dir():
        raise InvalidInput(f"{target}: expected a file in a folder that exists")
    parts = ReportParts.read(
        folder,
        calibration=None if calibration is None else Calibration.load(calibration),
        heat_maps=[HeatMap.load(path) for path in heat_map or ()],
        images=[(path.name, path) for path in image or ()],
        title=TITLE if title is None else title,
        date=date,
    )
    write_report(parts, target)
    say(f"report written to {target}")
