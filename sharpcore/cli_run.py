"""What the commands share that run a pipeline over a file of prompts: options, loading, progress, journal."""

from __future__ import annotations

import hashlib
import importlib.resources
import inspect
import json
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sharpcore.arguments import FIRST_SEED, MOST_SEEDS
from sharpcore.errors import InvalidInput, MissingDependency, UnsupportedModel
from sharpcore.journal import Journal
from sharpcore.prompts import PromptRow, read_prompts
from sharpcore.table import Row, ScoreTable

LABEL = "memorized"
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_SECONDS_BETWEEN_LINES = 30.0

Column = Annotated[str, typer.Option(help="Column with the prompts.")]
Format = Annotated[str | None, typer.Option(help="text, csv, jsonl or parquet; default: by the extension.")]


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Running", **settings)


@dataclass(frozen=True)
class Running:
    """The options that every command has which runs a pipeline."""

    model: Annotated[
        str | None, _option("Folder or hub id of a pipeline; default: the small one shipped here.")
    ] = None
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...; default: cuda where there is one.")] = None
    dtype: Annotated[str, _option(", ".join(_DTYPES))] = "float32"
    seeds: Annotated[str, _option('How many ("4": 42, 43, 44, 45) or which ("42,43", "7,").')] = "4"
    steps: Annotated[str, _option('Indices of denoising steps, e.g. "0,10".')] = "0"
    num_inference_steps: Annotated[int, _option("Length of the scheduler's trajectory.", min=1)] = 50
    guidance: Annotated[float, _option("Guidance scale of the trajectory to later steps.")] = 7.5
    backend: Annotated[str, _option("auto, or one that `sharpcore doctor` lists.")] = "auto"
    precision: Annotated[str, _option("Of the products: float32, tf32 (on a GPU), bfloat16 or float16.")] = (
        "float32"
    )
    memory_budget: Annotated[str | None, _option('Memory for a batch, e.g. "8GiB".')] = None
    height: Annotated[int | None, _option("Image height in pixels; default: the model's.")] = None
    width: Annotated[int | None, _option("Image width in pixels; default: the model's.")] = None
    limit: Annotated[int | None, _option("Only the first N prompts.", min=1)] = None
    resume: Annotated[bool, _option("Go on with an interrupted run.", "--resume")] = False
    overwrite: Annotated[bool, _option("Replace an existing output.", "--overwrite")] = False
    quiet: Annotated[bool, _option("No progress.", "--quiet", "-q")] = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its argument `options`, a dataclass such as `Running`, as options."""
    own = inspect.signature(command, eval_str=True).parameters
    kind = own["options"].annotation
    shared = get_type_hints(kind, include_extras=True)
    parameters = [parameter for name, parameter in own.items() if name != "options"]
    parameters += [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=shared[field.name]
        )
        for field in fields(kind)
    ]

    def run(**values: Any) -> None:
        options = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values, options=options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def command_line(context: typer.Context) -> str:
    """The command as it was given, for a report of what was run: options that were left out are left out."""
    arguments, options = ["sharpcore", str(context.info_name)], []
    for parameter in context.command.params:
        name = str(parameter.name)
        source, value = context.get_parameter_source(name), context.params.get(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if parameter.param_type_name == "argument":
            arguments.append(str(value))
        elif isinstance(value, bool):
            options.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            several = value if isinstance(value, list | tuple) else [value]
            options += [word for item in several for word in (parameter.opts[0], str(item))]
    return shlex.join(arguments + options)


def print_table(table: Any) -> None:
    """Print a rich table, wide enough where the output is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(table)


def write_table(
    output: Path,
    prompts: Sequence[PromptRow],
    settings: dict[str, Any],
    timesteps: Sequence[float],
    blocks: Callable[[list[str]], Iterable[list[Row]]],
    options: Running,
    table: type[ScoreTable] = ScoreTable,
) -> None:
    """Write what `blocks` yields for the unfinished prompts; on any error finished rows are kept for
    --resume."""
    with Journal(
        output, settings, prompts, resume=options.resume, overwrite=options.overwrite, table=table
    ) as journal:
        if journal.complete:
            certain = "" if journal.format == "parquet" else f"; a {journal.format} file holds no settings"
            say(f"nothing left to do: {output} has all {len(prompts)} prompts{certain}")
            return
        remaining = [row for row in prompts[journal.finished :] if row.error is None]
        texts = [row.prompt for row in remaining if row.prompt is not None]
        found = blocks(texts) if texts else ()
        try:
            with (
                silence(),
                warnings_as_lines(remaining),
                progress_shown(len(prompts), journal.finished, options.quiet) as advance,
            ):
                for finished in journal.record(found, timesteps):
                    advance(finished)
            failed = journal.failed()
            journal.finish()
        except BaseException:
            if journal.finished:
                say(journal.keep())
            raise
    say(
        f"{len(prompts)} prompts written to {output}"
        + (f", {failed} of them with an error" if failed else "")
    )


def carried_columns(prompts: Sequence[PromptRow], own: Collection[str]) -> list[str]:
    """The input's other columns. Raises InvalidInput where one has the name of a column of the output."""
    carried = list(dict.fromkeys(name for row in prompts for name in row.columns))
    if taken := [name for name in carried if name in own]:
        raise InvalidInput(
            f"the input has a column {taken[0]!r}, which the scores need for themselves; rename it"
        )
    return carried


def default_model() -> Path:
    """Folder of the pipeline that is shipped with the package."""
    return Path(str(importlib.resources.files("sharpcore"))) / "models" / "tiny-sd-eps"


def say(text: str) -> None:
    typer.echo(f"sharpcore: {text}", err=True)


def labelled_prompts(
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


@contextmanager
def warnings_as_lines(prompts: Sequence[PromptRow]) -> Iterator[None]:
    """Print warnings as one line each, and name the row of the file instead of the scorer's `prompts[i]`."""

    def place(match: re.Match[str]) -> str:
        row = prompts[int(match[1])]
        return f"row {row.row}" + (f" (line {row.line})" if row.line is not None else "")

    def show(message: Warning | str, *_: Any) -> None:
        say("warning: " + re.sub(r"^prompts\[(\d+)\]", place, str(message)))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def progress_shown(total: int, finished: int, quiet: bool) -> Iterator[Any]:
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
                say(f"{done} of {total} prompts, {rate(done):.2f} prompts/s, {left:.0f} s left")

        yield line


def model_folder(model: str | None) -> tuple[Path, str]:
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


def load_pipeline(folder: Path, options: Running) -> Any:
    if options.dtype not in _DTYPES:
        raise InvalidInput(f"--dtype: expected one of {', '.join(_DTYPES)}, got {options.dtype!r}")
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise _no_diffusers() from None
    import torch

    wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"--device: expected a device that works here, got {wanted!r}: {reason}") from None
    try:
        with silence():
            pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
            if options.dtype == "float64":
                # Exactness is asked of the curvature; prompts are encoded in the precision that the model was
                # trained with.
                pipe.to(device).unet.to(torch.float64)
                return pipe
            return pipe.to(device, getattr(torch, options.dtype))
    except (OSError, TypeError, ValueError, RuntimeError, ImportError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(f"--model {folder}: it cannot be loaded: {reason}") from error


@contextmanager
def silence() -> Iterator[None]:
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


def files_fingerprint(folder: Path) -> str:
    """A hash of the files that decide the scores."""
    digest = hashlib.blake2b(digest_size=8)
    for part in ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        for path in sorted((folder / part).glob("*")):
            digest.update(f"{part}/{path.name}\0".encode())
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def integers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidInput(f'{option}: expected numbers like "0,10", got {text!r}')
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise InvalidInput(f"{option}: expected different numbers, got {text!r}")
    return numbers


def seed_list(text: str) -> list[int]:
    numbers = integers("--seeds", text)
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= MOST_SEEDS:
        raise InvalidInput(f"--seeds: expected a number of seeds from 1 to {MOST_SEEDS}, got {text!r}")
    return [FIRST_SEED + k for k in range(numbers[0])]


def memory_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise InvalidInput(f'--memory-budget: expected a size like "8GiB", got {text!r}')
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
