"""The command `sharpcore score`, and the scoring of prompts that other commands begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sharpcore import __version__
from sharpcore.cli_run import (
    Column,
    Format,
    Running,
    carried_columns,
    files_fingerprint,
    integers,
    load_pipeline,
    memory_bytes,
    model_folder,
    say,
    seed_list,
    with_options,
    write_table,
)
from sharpcore.errors import InvalidInput
from sharpcore.journal import check_output
from sharpcore.prompts import PromptRow, read_prompts
from sharpcore.table import Row, ScoreTable

if TYPE_CHECKING:
    from sharpcore.calibration import Calibration

DEFAULT_FPR = 0.01


@dataclass(frozen=True)
class Scoring(Running):
    """The options of the commands that score prompts."""

    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated; `sharpcore detectors` lists them. Options: p_laplace:p=2:probes=8.",
            rich_help_panel="Scoring",
        ),
    ] = "score_difference,hessian_score_difference"
    units: Annotated[str, typer.Option(help="score or eps", rich_help_panel="Scoring")] = "score"
    squared: Annotated[
        bool,
        typer.Option(
            "--squared/--norm", help="||H_D s_D||^2 as in the paper, or the norm.", rich_help_panel="Scoring"
        ),
    ] = True


@with_options
def score(
    input: Annotated[
        str, typer.Argument(help="Prompts: .txt, .csv, .jsonl, .parquet, or - for standard input.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write: .parquet, .csv or .jsonl.")],
    calibration: Annotated[
        Path | None, typer.Option(help="File of `sharpcore calibrate`: adds p-values and decisions.")
    ] = None,
    fpr: Annotated[
        float | None, typer.Option(help=f"False positive rate of the decisions; default: {DEFAULT_FPR}.")
    ] = None,
    column: Column = "prompt",
    format: Format = None,
    *,
    options: Scoring,
) -> None:
    """Score every prompt of a file; other columns of the file are carried over.

    A row that cannot be scored says why in its `error` column. --resume goes on with an interrupted run.
    """
    from sharpcore.calibration import Calibration

    if fpr is not None and calibration is None:
        raise InvalidInput("--fpr belongs to --calibration")
    rate = DEFAULT_FPR if fpr is None else fpr
    if not 0 < rate < 1:
        raise InvalidInput(f"--fpr: expected a number between 0 and 1, both excluded; got {rate!r}")
    loaded = None if calibration is None else Calibration.load(calibration)
    write_scores(read_prompts(input, column=column, format=format), output, options, loaded, rate)


def write_scores(
    prompts: Sequence[PromptRow],
    output: Path,
    options: Scoring,
    calibration: Calibration | None = None,
    fpr: float = DEFAULT_FPR,
) -> None:
    """Score prompts into a table; on any error the finished rows are kept for --resume.

    With a calibration each score has its p-value and the decision at this false positive rate beside it.
    """
    from sharpcore.calibration import calibrated_table
    from sharpcore.conditioning import latent_shape
    from sharpcore.detect import make_detectors
    from sharpcore.pipeline import SharpnessScorer

    prompts = prompts[: options.limit]
    check_output(output, resume=options.resume, overwrite=options.overwrite)
    seeds, steps = seed_list(options.seeds), integers("--steps", options.steps)
    asked_metrics = options.metrics.replace(" ", "").split(",")
    detectors = make_detectors(asked_metrics, squared=options.squared)
    metrics = [detector.name for detector in detectors]
    budget = memory_bytes(options.memory_budget)
    own = {"prompt", "step", "timestep", "error"}
    ends = ("", "_se", "_seeds", *(() if calibration is None else ("_p", "_flagged")))
    own |= {f"{name}{end}" for name in metrics for end in ends}
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
        "options": {detector.name: detector.options() for detector in detectors},
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
        name: settings[name] for name in ("steps", "seeds", "units", "squared", "latent_size")
    } | {"metrics": detectors}
    # Some detectors have a step of their own.
    rows_at = scorer.row_steps(steps, detectors)
    settings |= {"steps": list(rows_at), "asked_steps": steps}
    size = latent_shape(pipe, options.height, options.width)[1:]
    settings["costs"] = {
        detector.name: asdict(scorer.cost([detector], steps=steps, latent_size=size))
        for detector in detectors
    }
    if calibration is not None:
        calibration.check(settings)
        places = [(d.name, step) for d in detectors for step in d.steps(steps, len(scorer.timesteps))]
        for metric, step in places:
            calibration.at(metric, step)  # says which there are, before anything is scored
        settings["calibration"] = {"checksum": calibration.checksum, "fpr": fpr}
        _say_what_cannot_be_flagged(calibration, metrics, rows_at, fpr)
    timesteps = [float(scorer.timesteps[step]) for step in rows_at]

    def blocks(texts: list[str]) -> Iterator[list[Row]]:
        for rows in scorer.iterate(texts, **asked, on_error="record"):
            yield rows if calibration is None else calibration.decided(rows, metrics, fpr=fpr)

    table = ScoreTable if calibration is None else calibrated_table(metrics)
    write_table(output, prompts, settings, timesteps, blocks, options, table)


def _say_what_cannot_be_flagged(
    calibration: Calibration, metrics: Sequence[str], steps: Sequence[int], fpr: float
) -> None:
    from sharpcore.calibration import needed

    for (metric, step), negatives in calibration.negatives.items():
        if metric in metrics and step in steps and negatives.threshold(fpr) is None:
            say(
                f"warning: {metric} at step {step}: nothing will be flagged, a false positive rate of "
                f"{fpr:g} takes {needed(fpr)} negatives, the calibration has {len(negatives.scores)}"
            )
