"""The command `sharpcore repair`: prompts generated with and without repairs, compared in a table."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    load_pipeline,
    model_folder,
    say,
    seed_list,
    with_options,
    write_table,
)
from sharpcore.errors import InvalidInput, MissingDependency
from sharpcore.journal import check_output
from sharpcore.prompts import PromptRow, read_prompts
from sharpcore.table import Row, write_rows

if TYPE_CHECKING:
    from torch import Tensor

    from sharpcore.repair import Generation, Repair

#: Column of the prompts' file that names the training image of each.
TRAINING_IMAGE = "training_image"
_LATENTS = ("safetensors", "npz")


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Repair", **settings)


@dataclass(frozen=True)
class RepairOptions(Running):
    """The options of `sharpcore repair`."""

    method: Annotated[str, _option("Comma-separated; `none` is always the first.")] = "sail"
    option: Annotated[list[str] | None, _option("A method's option, e.g. sail.threshold=0.05.")] = None
    seeds: Annotated[str, _option('How many ("2": 42, 43) or which ("42,43", "7,").')] = "4"
    training_images: Annotated[Path | None, _option("Folder of training images to compare with.")] = None
    reconstructed: Annotated[
        bool, _option("Compare with the decoder's reconstructions of them.", "--reconstructed")
    ] = False
    copy_distance: Annotated[
        float | None, _option("Generations nearer than this (pixels) count as copies in the summary.")
    ] = None
    sscd: Annotated[Path | None, _option("TorchScript file of a copy detector such as SSCD.")] = None
    clip: Annotated[Path | None, _option("Folder of a CLIP model, for prompt fidelity.")] = None
    latents: Annotated[str, _option(f"File format of the latents: {' or '.join(_LATENTS)}.")] = "safetensors"
    grid_rows: Annotated[int, _option("Prompts in the picture; 0: no picture.", min=0)] = 12
    # Nothing of these concerns a repair: it looks at the first step, in the network's own precision.
    steps: Annotated[str, typer.Option(hidden=True)] = "0"
    precision: Annotated[str, typer.Option(hidden=True)] = "float32"
    memory_budget: Annotated[str | None, typer.Option(hidden=True)] = None


@with_options
def repair(
    input: Annotated[
        str, typer.Argument(help="Prompts: .txt, .csv, .jsonl, .parquet, or - for standard input.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for table, latents, images and picture.")],
    column: Column = "prompt",
    format: Format = None,
    *,
    options: RepairOptions,
) -> None:
    """Generate from prompts with and without repairs against memorization, and compare them.

    A column `training_image` of the input names the file of a prompt's own training image; without one the
    nearest counts. --resume goes on with an interrupted run.
    """
    for name, unused in (("steps", "0"), ("precision", "float32"), ("memory_budget", None)):
        if getattr(options, name) != unused:
            raise InvalidInput(f"--{name.replace('_', '-')}: `sharpcore repair` has no such option")
    if options.latents not in _LATENTS:
        raise InvalidInput(f"--latents: expected {' or '.join(_LATENTS)}, got {options.latents!r}")
    if options.latents == "safetensors" and importlib.util.find_spec("safetensors") is None:
        raise MissingDependency("--latents safetensors: pip install safetensors, or take --latents npz")
    prompts = read_prompts(input, column=column, format=format)[: options.limit]
    _write(prompts, out, options)


def _write(prompts: Sequence[PromptRow], out: Path, options: RepairOptions) -> None:
    from sharpcore.conditioning import check_pipeline, latent_shape
    from sharpcore.repair.evaluation import RepairTable, compare_repairs
    from sharpcore.score import schedule

    if out.exists() and not out.is_dir():
        raise InvalidInput(f"--out {out}: expected a folder, this is a file")
    output = out / "repair.csv"
    if out.is_dir():
        check_output(output, resume=options.resume, overwrite=options.overwrite)
    seeds, methods = seed_list(options.seeds), _methods(options)
    carried = carried_columns(prompts, RepairTable.standard)
    own = _own_images(prompts, options)
    folder, name = model_folder(options.model)
    pipe = load_pipeline(folder, options)
    check_pipeline(pipe)
    size = latent_shape(pipe, options.height, options.width)[1:]
    first = float(schedule(pipe.scheduler, options.num_inference_steps).timesteps[0])
    settings = {
        "version": __version__,
        "model": f"{name} {files_fingerprint(folder)}",
        "dtype": options.dtype,
        "backend": options.backend,
        "methods": list(methods),
        "options": sorted(options.option or []),
        "seeds": seeds,
        "steps": [0],
        "num_inference_steps": options.num_inference_steps,
        "guidance": options.guidance,
        "latent_size": list(size),
        "training_images": str(options.training_images) if options.training_images else None,
        "reconstructed": options.reconstructed,
        "sscd": str(options.sscd) if options.sscd else None,
        "clip": str(options.clip) if options.clip else None,
        "columns": carried,
    }
    judges = _judges(pipe, size, options)
    for row, image in zip(prompts, own, strict=True):
        if image is not None and judges.training is not None and row.error is None:
            judges.training.index(image)
    for part in ("latents", "images"):
        (out / part).mkdir(parents=True, exist_ok=True)
    good = [(i, own[i]) for i, row in enumerate(prompts) if row.error is None]

    def blocks(texts: list[str]) -> Iterator[list[Row]]:
        # What is left to do are the last of the prompts without an error.
        places = good[len(good) - len(texts) :]
        compared = compare_repairs(
            pipe,
            texts,
            methods,
            seeds=seeds,
            judges=judges,
            training_images=[image for _, image in places],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance,
            latent_size=(size[0], size[1]),
            backend=options.backend,
            on_error="record",
        )
        for (place, _), (rows, found) in zip(places, compared, strict=True):
            # Files first: a row in the table says that they are there.
            _save(out, place, found, options.latents)
            yield rows

    write_table(output, prompts, settings, [first], blocks, options, RepairTable)
    _conclude(out, output, prompts, own, methods, seeds, judges.training, options)


def _methods(options: RepairOptions) -> dict[str, str | Repair]:
    """The repairs by name, `none` first, with the options that were given for them."""
    from sharpcore.repair import make_repair

    names = [name.strip() for name in options.method.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InvalidInput(f"--method: expected different names, got {options.method!r}")
    names = ["none", *(name for name in names if name != "none")]
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in options.option or []:
        where, sign, value = text.partition("=")
        method, _, name = where.partition(".")
        if not sign or not name or method not in values:
            raise InvalidInput(
                f"--option: expected METHOD.NAME=VALUE with one of {', '.join(names)}, got {text!r}"
            )
        try:
            values[method][name] = json.loads(value)
        except ValueError:
            values[method][name] = value
    return {name: make_repair(name, values[name]) for name in names}


def _own_images(prompts: Sequence[PromptRow], options: RepairOptions) -> list[str | None]:
    if options.training_images is None:
        return [None] * len(prompts)
    return [row.columns.get(TRAINING_IMAGE) or None for row in prompts]


def _judges(pipe: Any, size: Sequence[int], options: RepairOptions) -> Any:
    from sharpcore.repair.evaluation import ClipModel, CopyDetector, Judges, TrainingImages

    device = str(pipe.unet.device)
    if options.training_images is None and (options.reconstructed or options.sscd):
        raise InvalidInput("--reconstructed and --sscd compare with --training-images, which is not given")
    copies = CopyDetector(options.sscd, device=device) if options.sscd else None
    clip = ClipModel(options.clip, device=device) if options.clip else None
    training = None
    if options.training_images is not None:
        height, width = (n * pipe.vae_scale_factor for n in size)
        training = TrainingImages.read(
            pipe, options.training_images, (height, width), reconstructed=options.reconstructed
        )
    return Judges(training, copies, clip)


def _save(out: Path, place: int, found: Mapping[str, Generation], format: str) -> None:
    """The images of a prompt and its latents: as drawn, as started from, and final."""
    for name, made in found.items():
        for image, seed in zip(made.to_pil(), made.seeds, strict=True):
            image.save(out / "images" / _image_name(place, name, seed))
        tensors = {"initial": made.initial, "latents": made.latents, "final": made.final.float()}
        path = out / "latents" / f"{place:05d}-{name}.{format}"
        if format == "npz":
            import numpy as np

            np.savez(path, allow_pickle=False, **{key: tensor.numpy() for key, tensor in tensors.items()})
        else:
            from safetensors.torch import save_file

            seeds = ",".join(map(str, made.seeds))
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"seeds": seeds}
            )


def _image_name(place: int, method: str, seed: int) -> str:
    return f"{place:05d}-{method}-{seed}.png"


def _conclude(
    out: Path,
    output: Path,
    prompts: Sequence[PromptRow],
    own: Sequence[str | None],
    methods: Mapping[str, Any],
    seeds: Sequence[int],
    training: Any,
    options: RepairOptions,
) -> None:
    """The summary, on the terminal and as a table, and the picture."""
    from rich.console import Console
    from rich.table import Table

    from sharpcore.repair.evaluation import RepairTable

    table = RepairTable.read(output)
    rows = table.summary(copy_distance=options.copy_distance)
    if not rows:
        say(f"no summary: no row of {output} has an image")
        return
    columns = {name: "text" if name == "method" else "float" for row in rows for name in row}
    write_rows(out / "summary.csv", rows, columns)
    shown = [
        name
        for name in (
            "method", "pixel_distance", "copies", "copied_prompts", "pairwise", "clip_score", "rounds",
            "noise_norm", "time_ratio",
        )
        if any(row.get(name) is not None for row in rows)
    ]  # fmt: skip
    lines = Table(title=f"{rows[0]['prompts']} prompts, {len(seeds)} seeds")
    for name in shown:
        lines.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        lines.add_row(*(_brief(row.get(name)) for name in shown))
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(lines)
    if options.grid_rows:
        _draw(out, table, prompts, own, list(methods), seeds, training, options.grid_rows)


def _draw(
    out: Path,
    table: Any,
    prompts: Sequence[PromptRow],
    own: Sequence[str | None],
    methods: Sequence[str],
    seeds: Sequence[int],
    training: Any,
    most: int,
) -> None:
    from sharpcore.repair.grid import plot_grid

    per_prompt = len(methods) * len(seeds)
    lines: list[tuple[str, dict[str, list[Tensor]]]] = []
    for place, row in enumerate(prompts):
        made = table.rows[place * per_prompt : (place + 1) * per_prompt]
        if len(lines) == most or any(entry["error"] is not None for entry in made):
            continue
        groups: dict[str, list[Tensor]] = {}
        if training is not None:
            name = own[place] or made[0]["compared_with"]
            groups["training" if own[place] else "nearest"] = [training.images[training.index(name)]]
        for method in methods:
            paths = [out / "images" / _image_name(place, method, seed) for seed in seeds]
            groups[method] = [_read(path) for path in paths]
        lines.append((str(row.prompt), groups))
    if lines:
        plot_grid(lines, path=out / "grid.png")


def _read(path: Path) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _brief(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
