"""The command line: `sharpcore score`, `sharpcore evaluate` and `sharpcore doctor`."""

from __future__ import annotations

import hashlib
import importlib.resources
import inspect
import json
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from sharpcore import __version__
from sharpcore.errors import InvalidInput, MissingDependency, SharpcoreError, UnsupportedModel
from sharpcore.journal import Journal, check_output
from sharpcore.prompts import PromptRow, read_prompts
from sharpcore.table import ScoreTable, parquet_metadata, write_rows

# As in sharpcore.pipeline, which is imported only when something is scored: it brings in torch.
FIRST_SEED, MOST_SEEDS = 42, 100_000
LABEL = "memorized"
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_SECONDS_BETWEEN_LINES = 30.0


class _Group(TyperGroup):
    """Turns the errors of sharpcore and of the system into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SharpcoreError as error:
            _say(f"error: {error}")
            raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
        except OSError as error:
            _say(f"error: {error.filename or ''}{': ' if error.filename else ''}{error.strerror or error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _say("stopped")
            raise typer.Exit(130) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Column = Annotated[str, typer.Option(help="Column with the prompts.")]
Format = Annotated[str | None, typer.Option(help="text, csv, jsonl or parquet; default: by the extension.")]


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Scoring", **settings)


@dataclass(frozen=True)
class Scoring:
    """The options that `score` and `evaluate` share."""

    model: Annotated[
        str | None, _option("Folder or hub id of a pipeline; default: the small one shipped here.")
    ] = None
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...; default: cuda where there is one.")] = None
    dtype: Annotated[str, _option(", ".join(_DTYPES))] = "float32"
    seeds: Annotated[str, _option('How many ("4": 42, 43, 44, 45) or which ("42,43", "7,").')] = "4"
    steps: Annotated[str, _option('Indices of denoising steps, e.g. "0,10".')] = "0"
    num_inference_steps: Annotated[int, _option("Length of the scheduler's trajectory.", min=1)] = 50
    guidance: Annotated[float, _option("Guidance scale of the trajectory to later steps.")] = 7.5
    metrics: Annotated[str, _option("Comma-separated.")] = "score_difference,hessian_score_difference"
    units: Annotated[str, _option("score or eps")] = "score"
    squared: Annotated[bool, _option("||H_D s_D||^2 as in the paper, or the norm.", "--squared/--norm")] = (
        True
    )
    backend: Annotated[str, _option("auto, or one that `sharpcore doctor` lists.")] = "auto"
    precision: Annotated[str, _option("Of the products: float32 or bfloat16.")] = "float32"
    memory_budget: Annotated[str | None, _option('Memory for a batch, e.g. "8GiB".')] = None
    height: Annotated[int | None, _option("Image height in pixels; default: the model's.")] = None
    width: Annotated[int | None, _option("Image width in pixels; default: the model's.")] = None
    limit: Annotated[int | None, _option("Only the first N prompts.", min=1)] = None
    resume: Annotated[bool, _option("Go on with an interrupted run.", "--resume")] = False
    overwrite: Annotated[bool, _option("Replace an existing output.", "--overwrite")] = False
    quiet: Annotated[bool, _option("No progress.", "--quiet", "-q")] = False


def _with_scoring_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every field of `Scoring` as an option, handed to it as its argument `scoring`."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = get_type_hints(Scoring, include_extras=True)
    parameters = [parameter for name, parameter in own.items() if name != "scoring"]
    parameters += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=shared[field.name]
        )
        for field in fields(Scoring)
    ]

    def run(**values: Any) -> None:
        scoring = Scoring(**{field.name: values.pop(field.name) for field in fields(Scoring)})
        command(**values, scoring=scoring)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Scores of how strongly a diffusion pipeline has memorized prompts."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
@_with_scoring_options
def score(
    input: Annotated[
        str, typer.Argument(help="Prompts: .txt, .csv, .jsonl, .parquet, or - for standard input.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write: .parquet, .csv or .jsonl.")],
    column: Column = "prompt",
    format: Format = None,
    *,
    scoring: Scoring,
) -> None:
    """Score every prompt of a file; other columns of the file are carried over.

    A row that cannot be scored says why in its `error` column. --resume goes on with an interrupted run.
    """
    _score(read_prompts(input, column=column, format=format), output, scoring)


@app.command()
@_with_scoring_options
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
    scoring: Scoring,
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
    if (out / "evaluation.json").exists() and not (scoring.resume or scoring.overwrite):
        raise InvalidInput(f"{out / 'evaluation.json'}: it exists already; --overwrite replaces it")
    if from_scores is None:
        prompts = _labelled(input, memorized, others, label_column, column, format)
        for row in prompts:
            is_positive(row.columns[label_column], label_column, positive)
        out.mkdir(parents=True, exist_ok=True)
        _score(prompts, scores, scoring)
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


def default_model() -> Path:
    """Folder of the pipeline that is shipped with the package."""
    return Path(str(importlib.resources.files("sharpcore"))) / "models" / "tiny-sd-eps"


def _say(text: str) -> None:
    typer.echo(f"sharpcore: {text}", err=True)


def _labelled(
    input: str | None, memorized: str | None, others: str | None, label: str, column: str, format: str | None
) -> list[PromptRow]:
    if input is not None:
        prompts = read_prompts(input, column=column, format=format)
        if label not in prompts[0].columns:
            there = ", ".join(prompts[0].columns) or "none"
            raise InvalidInput(
                f"{input}: there is no column {label!r} (--label-column); the other columns are: {there}"
            )
        return prompts
    rows = []
    for source, value in ((memorized, True), (others, False)):
        for row in read_prompts(str(source), column=column, format=format):
            error = f"{source}, {row.error}" if row.error else None
            rows.append(PromptRow(row.row, row.line, row.prompt, error, row.columns | {label: value}))
    return rows


def _score(prompts: Sequence[PromptRow], output: Path, scoring: Scoring) -> None:
    """Score prompts into a table; on any error the finished rows are kept for --resume."""
    from sharpcore.conditioning import latent_shape
    from sharpcore.detect import make_metrics
    from sharpcore.pipeline import SharpnessScorer

    prompts = prompts[: scoring.limit]
    check_output(output, resume=scoring.resume, overwrite=scoring.overwrite)
    seeds, steps = _seeds(scoring.seeds), _integers("--steps", scoring.steps)
    metrics = [
        metric.name for metric in make_metrics(scoring.metrics.replace(" ", "").split(","), squared=True)
    ]
    budget = _bytes(scoring.memory_budget)
    own = {"prompt", "step", "timestep", "error"}
    own |= {f"{name}{suffix}" for name in metrics for suffix in ("", "_se", "_seeds")}
    carried = list(dict.fromkeys(name for row in prompts for name in row.columns))
    if taken := [name for name in carried if name in own]:
        raise InvalidInput(
            f"the input has a column {taken[0]!r}, which the scores need for themselves; rename it"
        )

    folder, name = _model_folder(scoring.model)
    pipe = _load(folder, scoring)
    settings = {
        "version": __version__,
        "model": f"{name} {_fingerprint(folder)}",
        "dtype": scoring.dtype,
        "backend": scoring.backend,
        "precision": scoring.precision,
        "seeds": seeds,
        "steps": steps,
        "num_inference_steps": scoring.num_inference_steps,
        "guidance": scoring.guidance,
        "metrics": metrics,
        "units": scoring.units,
        "squared": scoring.squared,
        "latent_size": list(latent_shape(pipe, scoring.height, scoring.width)[1:]),
        "columns": carried,
    }
    scorer = SharpnessScorer(
        pipe,
        num_inference_steps=scoring.num_inference_steps,
        guidance_scale=scoring.guidance,
        backend=scoring.backend,
        precision=scoring.precision,
        memory_budget=budget,
    )
    with Journal(output, settings, prompts, resume=scoring.resume, overwrite=scoring.overwrite) as journal:
        if journal.complete:
            certain = "" if journal.format == "parquet" else f"; a {journal.format} file holds no settings"
            _say(f"nothing left to do: {output} has all {len(prompts)} prompts{certain}")
            return
        remaining = [row for row in prompts[journal.finished :] if row.error is None]
        options: dict[str, Any] = {
            name: settings[name] for name in ("steps", "seeds", "metrics", "units", "squared", "latent_size")
        }
        texts = [row.prompt for row in remaining if row.prompt is not None]
        blocks = scorer.iterate(texts, **options, on_error="record") if texts else ()
        timesteps = [float(scorer.timesteps[step]) for step in steps]
        try:
            with (
                _silence(),
                _warnings_as_lines(remaining),
                _progress(len(prompts), journal.finished, scoring.quiet) as advance,
            ):
                for finished in journal.record(blocks, timesteps):
                    advance(finished)
            failed = journal.failed()
            journal.finish()
        except BaseException:
            if journal.finished:
                _say(journal.keep())
            raise
    _say(
        f"{len(prompts)} prompts written to {output}"
        + (f", {failed} of them with an error" if failed else "")
    )


@contextmanager
def _warnings_as_lines(prompts: Sequence[PromptRow]) -> Iterator[None]:
    """Print warnings as one line each, and name the row of the file instead of the scorer's `prompts[i]`."""

    def place(match: re.Match[str]) -> str:
        row = prompts[int(match[1])]
        return f"row {row.row}" + (f" (line {row.line})" if row.line is not None else "")

    def show(message: Warning | str, *_: Any) -> None:
        _say("warning: " + re.sub(r"^prompts\[(\d+)\]", place, str(message)))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def _progress(total: int, finished: int, quiet: bool) -> Iterator[Any]:
    """Progress on standard error: a bar on a terminal, else lines; yields `advance(finished)`."""
    start, first, last = time.monotonic(), finished, 0.0

    def rate(done: int) -> float:
        return (done - first) / max(time.monotonic() - start, 1e-9)

    if quiet:
        yield lambda done: None
    elif sys.stderr.isatty():
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("scoring"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
        with progress.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total, completed=finished, rate="")
            yield lambda done: bar.update(task, completed=done, rate=f"{rate(done):.2f} prompts/s")
    else:

        def line(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES or done == total:
                last = now
                left = (total - done) / max(rate(done), 1e-9)
                _say(f"{done} of {total} prompts, {rate(done):.2f} prompts/s, {left:.0f} s left")

        yield line


def _model_folder(model: str | None) -> tuple[Path, str]:
    """Folder of a pipeline, fetched from the hub if it is an id, and the name to record."""
    folder = Path(model) if model is not None else default_model()
    if model is not None and not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        try:
            from diffusers import DiffusionPipeline

            return Path(DiffusionPipeline.download(model)), model
        except ImportError:
            raise _no_diffusers() from None
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InvalidInput(
                f"--model {model}: neither a folder nor a model that the hub gives: {reason}"
            ) from None
    if not folder.is_dir():
        raise InvalidInput(f"--model {folder}: there is no such folder")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UnsupportedModel(
            f"--model {folder}: not a diffusers pipeline: there is no model_index.json in it"
        )
    try:
        parts = [name for name in json.loads(index.read_text(encoding="utf-8")) if not name.startswith("_")]
    except ValueError as error:
        raise UnsupportedModel(f"--model {folder}: model_index.json is not readable: {error}") from None
    if "unet" not in parts or not (folder / "unet" / "config.json").is_file():
        raise UnsupportedModel(
            f"--model {folder}: this pipeline has no UNet; its parts are: {', '.join(parts)}"
        )
    return folder, folder.resolve().name


def _load(folder: Path, scoring: Scoring) -> Any:
    if scoring.dtype not in _DTYPES:
        raise InvalidInput(f"--dtype: expected one of {', '.join(_DTYPES)}, got {scoring.dtype!r}")
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise _no_diffusers() from None
    import torch

    wanted = scoring.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"--device: expected a device that works here, got {wanted!r}: {reason}") from None
    try:
        with _silence():
            pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
            if scoring.dtype == "float64":
                # Exactness is asked of the curvature; prompts are encoded in the precision that the model was
                # trained with.
                pipe.to(device).unet.to(torch.float64)
                return pipe
            return pipe.to(device, getattr(torch, scoring.dtype))
    except (OSError, TypeError, ValueError, RuntimeError, ImportError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(f"--model {folder}: it cannot be loaded: {reason}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """No progress bars and advice from diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    try:
        for module, _ in before:
            module.set_verbosity_error()
            module.disable_progress_bar()
        yield
    finally:
        for module, verbosity in before:
            module.set_verbosity(verbosity)
            module.enable_progress_bar()


def _no_diffusers() -> MissingDependency:
    return MissingDependency('loading a pipeline needs diffusers: pip install "sharpcore[diffusers]"')


def _fingerprint(folder: Path) -> str:
    """A hash of the files that decide the scores."""
    digest = hashlib.blake2b(digest_size=8)
    for part in ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        for path in sorted((folder / part).glob("*")):
            digest.update(f"{part}/{path.name}\0".encode())
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def _integers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidInput(f'{option}: expected numbers like "0,10", got {text!r}')
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise InvalidInput(f"{option}: expected different numbers, got {text!r}")
    return numbers


def _seeds(text: str) -> list[int]:
    numbers = _integers("--seeds", text)
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= MOST_SEEDS:
        raise InvalidInput(f"--seeds: expected a number of seeds from 1 to {MOST_SEEDS}, got {text!r}")
    return [FIRST_SEED + k for k in range(numbers[0])]


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise InvalidInput(f'--memory-budget: expected a size like "8GiB", got {text!r}')
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


if __name__ == "__main__":
    main()
