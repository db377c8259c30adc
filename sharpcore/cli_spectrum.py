"""The command `sharpcore spectrum`: spectra of the Hessian for every prompt of a file, with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sharpcore import __version__
from sharpcore.arguments import check_steps
from sharpcore.cli_run import (
    LABEL,
    Column,
    Format,
    Running,
    carried_columns,
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
from sharpcore.errors import InvalidInput
from sharpcore.journal import check_output
from sharpcore.prompts import PromptRow, read_prompts


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Spectrum", **settings)


@dataclass(frozen=True)
class SpectrumOptions(Running):
    """The options of `sharpcore spectrum`."""

    seeds: Annotated[str, _option('How many ("2": 42, 43) or which ("42,43", "7,").')] = "1"
    steps: Annotated[str, _option('Indices of denoising steps, e.g. "0,25,49".')] = "0,25,49"
    k: Annotated[int, _option("Eigenvalues at each end.", "--k", "-k", min=1)] = 10
    condition: Annotated[str, _option("Hessian with the prompt, with none, or their difference.")] = "prompt"
    method: Annotated[str, _option("auto, dense (exact, d <= 4096) or lanczos.")] = "auto"
    block: Annotated[int, _option("Vectors of block Lanczos multiplied at once.", min=1)] = 4
    tolerance: Annotated[float | None, _option("Residuals of Lanczos, relative to the norm.")] = None
    max_products: Annotated[int | None, _option("Products of Lanczos per state at most.", min=1)] = None
    probes: Annotated[int, _option("Random vectors for each estimate.", min=2)] = 8
    depth: Annotated[int, _option("Lanczos steps of each random vector.", min=1)] = 32
    eigenvalues: Annotated[bool, _option("Keep all eigenvalues (dense).", "--eigenvalues")] = False


@with_options
def spectrum(
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write: .parquet, .csv or .jsonl.")],
    input: Annotated[
        str | None, typer.Argument(help="Prompts: .txt, .csv, .jsonl, .parquet, or - for standard input.")
    ] = None,
    memorized: Annotated[str | None, typer.Option(help="Memorized prompts, in INPUT's place.")] = None,
    others: Annotated[str | None, typer.Option(help="Prompts that are not.")] = None,
    label_column: Annotated[
        str, typer.Option(help="Column that says which prompts are memorized, where there is one.")
    ] = LABEL,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures of the table.")] = None,
    column: Column = "prompt",
    format: Format = None,
    *,
    options: SpectrumOptions,
) -> None:
    """Eigenvalues of the Hessian of log p at the states of every prompt; other columns are carried over.

    A row that cannot be computed says why in its `error` column. --resume goes on with an interrupted run.
    """
    if (memorized is None) != (others is None):
        raise InvalidInput("--memorized and --others belong together")
    if (input is None) == (memorized is None):
        raise InvalidInput("expected one source: INPUT, or --memorized and --others")
    if input is not None:
        prompts = read_prompts(input, column=column, format=format)
    else:
        prompts = labelled_prompts(None, memorized, others, label_column, column, format)
    if plot is not None and plot.exists() and not plot.is_dir():
        raise InvalidInput(f"--plot {plot}: expected a folder, this is a file")
    _write(prompts[: options.limit], output, options)
    if plot is not None:
        _plot(output, plot, label_column)


def _write(prompts: Sequence[PromptRow], output: Path, options: SpectrumOptions) -> None:
    from sharpcore.conditioning import check_pipeline, latent_shape
    from sharpcore.score import schedule
    from sharpcore.spectra import SpectrumTable, iterate_spectra

    check_output(output, resume=options.resume, overwrite=options.overwrite)
    seeds, steps = seed_list(options.seeds), integers("--steps", options.steps)
    budget = memory_bytes(options.memory_budget)
    carried = carried_columns(prompts, SpectrumTable.standard)
    folder, name = model_folder(options.model)
    pipe = load_pipeline(folder, options)
    asked: dict[str, Any] = {
        "seeds": seeds,
        "steps": steps,
        "k": options.k,
        "condition": options.condition,
        "method": options.method,
        "block": options.block,
        "tolerance": options.tolerance,
        "max_products": options.max_products,
        "probes": options.probes,
        "depth": options.depth,
        "eigenvalues": options.eigenvalues,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance,
        "latent_size": list(latent_shape(pipe, options.height, options.width)[1:]),
        "backend": options.backend,
        "precision": options.precision,
    }
    settings = {
        "version": __version__,
        "model": f"{name} {files_fingerprint(folder)}",
        "dtype": options.dtype,
        "columns": carried,
        **asked,
    }

    def blocks(texts: list[str]) -> Any:
        return iterate_spectra(pipe, texts, **asked, memory_budget=budget, on_error="record")

    check_pipeline(pipe)
    timesteps = schedule(pipe.scheduler, options.num_inference_steps).timesteps.double().tolist()
    check_steps(steps, len(timesteps))
    write_table(
        output, prompts, settings, [timesteps[step] for step in steps], blocks, options, SpectrumTable
    )


def _plot(output: Path, folder: Path, label_column: str) -> None:
    from sharpcore.report.spectra import plot_densities, plot_groups, plot_steps
    from sharpcore.spectra import SpectrumTable

    table = SpectrumTable.read(output)
    if all(row["error"] is not None for row in table):
        say(f"no pictures: no row of {output} has a spectrum")
        return
    folder.mkdir(parents=True, exist_ok=True)
    label = label_column if label_column in table.columns else None
    plot_densities(table, path=folder / "density.png", label_column=label)
    plot_steps(table, path=folder / "steps.png", label_column=label)
    if label is not None:
        plot_groups(table, path=folder / "groups.png", label_column=label)
    say(f"pictures written to {folder}")
