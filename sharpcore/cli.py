"""The command line: `sharpcore score`, `evaluate`, `report`, `calibrate`, `spectrum` and `doctor`."""

from __future__ import annotations

import json
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sharpcore import __version__
from sharpcore.cli_calibrate import calibrate
from sharpcore.cli_evaluate import evaluate
from sharpcore.cli_repair import repair
from sharpcore.cli_report import report
from sharpcore.cli_run import default_model, print_table, say
from sharpcore.cli_score import score
from sharpcore.cli_spectrum import spectrum
from sharpcore.errors import SharpcoreError


class _Group(TyperGroup):
    """Turns the errors of sharpcore and of the system into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SharpcoreError as error:
            say(f"error: {error}")
            raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
        except OSError as error:
            say(f"error: {error.filename or ''}{': ' if error.filename else ''}{error.strerror or error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("stopped")
            raise typer.Exit(130) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Scores of how strongly a diffusion pipeline has memorized prompts."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


app.command()(score)
app.command()(evaluate)
app.command()(report)
app.command()(calibrate)
app.command()(spectrum)
app.command()(repair)


@app.command("detectors")
def list_detectors(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dimension: Annotated[int, typer.Option(min=1, help="Entries of a latent, for the costs.")] = 16384,
) -> None:
    """The detectors that `--metrics` takes: cost alone for one prompt and seed at the first step, source."""
    from sharpcore.report.detectors import describe, detectors_table

    rows = describe(dimension)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    print_table(detectors_table(rows))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What is installed, what the backends support here, and a self-test (exit code 1 if it fails)."""
    from sharpcore import doctor as examination

    report = examination.examine(default_model())
    typer.echo(json.dumps(report, indent=1) if as_json else examination.render(report))
    if not all(test["passed"] for test in report["self_test"]):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the command `sharpcore`."""
    # A service manager's SIGTERM ends a run as Ctrl-C does: finished rows are assembled.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
