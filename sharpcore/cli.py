"""The command line: `sharpcore score`, `evaluate`, `spectrum` and `doctor`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sharpcore import __version__
from sharpcore.arguments import check_steps
from sharpcore.cli_repair import repair
from sharpcore.cli_run import (
    LABEL,
    Column,
    Format,
    Running,
    carried_columns,
    default_model,
    files_fingerprint,
    integers,
    labelled_prompts,
    load_pipeline,
    memory_bytes,
    model_folder,
    say,
    seed_list,
    with_options,
    write_table,
)
from sharpcore.cli_spectrum import spectrum
from sharpcore.errors import InvalidInput, SharpcoreError
from sharpcore.journal import check_output
from sharpcore.prompts import PromptRow, read_prompts
from sharpcore.table import ScoreTable, parquet_metadata, write_rows


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


@dataclass(frozen=True)
class Scoring(Running):
    """The options that `score` and `evaluate` share."""

    metrics: Annotated[str, typer.Option(help="Comma-separated.", rich_help_panel="Scoring")] = (
        "score_difference,hessian_score_difference"
    )
    units: Annotated[str, typer.Option(help="score or eps", rich_help_panel="Scoring")] = "score"
    squared: Annotated[
        bool,
        typer.Option(
            "--squared/--norm", help="||H_D s_D||^2 as in the paper, or the norm.", rich_help_panel="Scoring"
        ),
    ] = True


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Scores of how strongly a diffusion pipeline has memorized prompts."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
@with_options
def score(
    input: Annotated[
        str, typer.Argument(help="Prompts: .txt, .csv, .jsonl, .parquet, or - for standard input.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write: .parquet, .csv or .jsonl.")],
    column: Column = "prompt",
    format: Format = None,
    *,
    options: Scoring,
) -> None:
    """Score every prompt of a file; other columns of the file are carried over.

    A row that cannot be scored says why in its `error` column. --resume goes on with an interrupted run.
    """
    _score(read_prompts(input, column=column, format=format), output, options)


@app.command()
@with_options
def evaluate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for scores, evaluation and pictures.")],
    input: Annotated[str | None, typer.Argument(help="Prompts of both kinds, with --label-column.")] = None,
    memorized: Annotated[str | None, typer.Option(help="Prompts that are memorized.")] = None,
    others: Annotated[str | None, typer.Option(help="Prompts that are not.")] = None,
    from_scores: Annotated[
        Path | None, typer.Option(help="A table of scores; nothing is scored anew.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column that says which prompts are memorized.")] = LABEL,
    positive: Annotated[
        list[str] | None, typer.Option(help="Label of the memorized ones; may be repeated.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=1, help="Samples for the 95 % intervals.")] = 2000,
    bootstrap_seed: Annotated[int, typer.Option(min=0, help="Seed of these samples.")] = 0,
    column: Column = "prompt",
    format: Format = None,
    *,
    options: Scoring,
) -> None:
    """How well each metric separates memorized prompts from others: AUC, TPR at low FPR, intervals."""
    from rich.console import Console

    from sharpcore.report import evaluate_table
    from sharpcore.report.evaluation import evaluation_table, is_positive
    from sharpcore.report.figures import plot_histograms, plot_roc

    if (memorized is None) != (others is None):
        raise InvalidInput("--memorized and --others belong together")
    if sum(source is not None for source in (input, memorized, from_scores)) != 1:
        raise InvalidInput(
            "expected one source: INPUT with --label-column, --memorized and --others, or --from-scores"
        )
    scores = from_scores or out / "scores.parquet"
    if (out / "evaluation.json").exists() and not (options.resume or options.overwrite):
        raise InvalidInput(f"{out / 'evaluation.json'}: it exists already; --overwrite replaces it")
    if from_scores is None:
        prompts = labelled_prompts(input, memorized, others, label_column, column, format)
        for row in prompts:
            is_positive(row.columns[label_column], label_column, positive)
        out.mkdir(parents=True, exist_ok=True)
        _score(prompts, scores, options)
    table = ScoreTable.read(scores)
    evaluations = evaluate_table(
        table, label_column, positive=positive, bootstrap=bootstrap, seed=bootstrap_seed
    )
    out.mkdir(parents=True, exist_ok=True)
    plot_roc(evaluations, path=out / "roc.png")
    plot_histograms(evaluations, path=out / "histogram.png")
    lines = [item.to_row() for item in evaluations]
    write_rows(out / "evaluation.csv", lines, dict.fromkeys(lines[0], "text"))
    settings = parquet_metadata(scores).get("settings") if scores.suffix in (".parquet", ".pq") else None
    report = {"settings": settings, "evaluations": [item.to_dict() for item in evaluations]}
    (out / "evaluation.json").write_text(
        json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(evaluation_table(evaluations))


app.command()(spectrum)
app.command()(repair)


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


def _score(prompts: Sequence[PromptRow], output: Path, options: Scoring) -> None:
    """Score prompts into a table; on any error the finished rows are kept for --resume."""
    from sharpcore.conditioning import latent_shape
    from sharpcore.detect import make_metrics
    from sharpcore.pipeline import SharpnessScorer

    prompts = prompts[: options.limit]
    check_output(output, resume=options.resume, overwrite=options.overwrite)
    seeds, steps = seed_list(options.seeds), integers("--steps", options.steps)
    metrics = [
        metric.name for metric in make_metrics(options.metrics.replace(" ", "").split(","), squared=True)
    ]
    budget = memory_bytes(options.memory_budget)
    own = {"prompt", "step", "timestep", "error"}
    own |= {f"{name}{suffix}" for name in metrics for suffix in ("", "_se", "_seeds")}
    carried = carried_columns(prompts, own)

    folder, name = model_folder(options.model)
    pipe = load_pipeline(folder, options)
    settings = {
        "version": __version__,
        "model": f"{name} {files_fingerprint(folder)}",
        "dtype": options.dtype,
        "backend": options.backend,
        "precision": options.precision,
        "seeds": seeds,
        "steps": steps,
        "num_inference_steps": options.num_inference_steps,
        "guidance": options.guidance,
        "metrics": metrics,
        "units": options.units,
        "squared": options.squared,
        "latent_size": list(latent_shape(pipe, options.height, options.width)[1:]),
        "columns": carried,
    }
    scorer = SharpnessScorer(
        pipe,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance,
        backend=options.backend,
        precision=options.precision,
        memory_budget=budget,
    )
    asked: dict[str, Any] = {
        name: settings[name] for name in ("steps", "seeds", "metrics", "units", "squared", "latent_size")
    }
    check_steps(steps, len(scorer.timesteps))
    timesteps = [float(scorer.timesteps[step]) for step in steps]
    write_table(
        output,
        prompts,
        settings,
        timesteps,
        lambda texts: scorer.iterate(texts, **asked, on_error="record"),
        options,
    )


if __name__ == "__main__":
    main()
