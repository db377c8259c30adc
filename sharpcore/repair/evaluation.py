"""What a repair does: likeness to training images, diversity, prompt fidelity and time, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.arguments import is_integer
from sharpcore.autoencoder import decode_latents, encode_images
from sharpcore.branches import predict
from sharpcore.errors import InvalidInput, MissingDependency, NonFiniteError, UnsupportedModel
from sharpcore.repair.generation import Generation, generate
from sharpcore.repair.method import Repair
from sharpcore.score import noise_level, prediction_type_of, score_from_prediction
from sharpcore.table import Row, ScoreTable
from sharpcore.trajectory import pixels

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# Mean and deviation of ImageNet's colours, by which the networks of SSCD are trained.
_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Root mean square differences [A, B], float64, between tensors [A, ...] and [B, ...] of one shape."""
    if first.shape[1:] != second.shape[1:]:
        raise InvalidInput(
            f"second: expected entries of shape {list(first.shape[1:])}; got {list(second.shape[1:])}"
        )
    a, b = first.flatten(1).double(), second.flatten(1).double()
    # The matrix product's cancellation would leave little of the distance of near copies.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[1] ** 0.5


def mean_distance_to_others(images: Tensor) -> Tensor:
    """For each of A images its mean distance to the A - 1 others, [A] (NaN for one): their mean is the
    diversity."""
    between = distances(images, images)
    return between.sum(1) / (len(images) - 1) if len(images) > 1 else between.sum(1) * torch.nan


class CopyDetector:
    """SSCD (Pizzi et al., arXiv 2202.10261) or another TorchScript file that embeds images.

    `path` is loaded with `torch.jit.load`; images are resized to `size` x `size` and normalized with the
    colours of ImageNet. Raises InvalidInput for a file that is none.
    """

    def __init__(self, path: str | Path, *, size: int = 320, device: str = "cpu") -> None:
        if not Path(path).is_file():
            raise InvalidInput(f"{path}: there is no such file")
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise InvalidInput(f"{path}: not a TorchScript file: {reason}") from None
        if not is_integer(size) or size < 1:
            raise InvalidInput(f"size: expected a positive integer; got {size!r}")
        self.size, self.device = size, device

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors [N, F] of images [N, 3, H, W] in [0, 1]."""
        resized = torch.nn.functional.interpolate(
            images.float(), (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in _COLOURS)
        found = self.network(((resized - mean) / deviation).to(self.device))
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            raise InvalidInput("copy detector: expected a network that gives one vector for each image")
        return torch.nn.functional.normalize(found.float().cpu(), dim=1)

    def similarity(self, images: Tensor, others: Tensor) -> Tensor:
        """Cosine similarities [A, B] of the embeddings."""
        return self.embed(images) @ self.embed(others).T


class ClipModel:
    """A CLIP model in a folder, for the similarity of images to texts and to each other.

    Loaded with transformers, from the disk alone. Raises MissingDependency without transformers, InvalidInput
    for a folder that holds no CLIP model with its tokenizer and image processor.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu") -> None:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError:
            raise MissingDependency("a CLIP model needs transformers: pip install transformers") from None
        if not Path(path).is_dir():
            raise InvalidInput(f"{path}: there is no such folder")
        try:
            self.network = CLIPModel.from_pretrained(path, local_files_only=True).to(device).eval()
            self.processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidInput(f"{path}: not a CLIP model: {reason}") from None
        self.device = device

    @torch.no_grad()
    def _outputs(self, images: Tensor, texts: Sequence[str]) -> Any:
        values = self.processor(
            text=list(texts),
            images=[image.permute(1, 2, 0).mul(255).round().byte().numpy() for image in images],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        return self.network(**{name: value.to(self.device) for name, value in values.items()})

    def prompt_similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine similarity of each image [N, 3, H, W] in [0, 1] to its prompt, [N]."""
        found = self._outputs(images, prompts)
        return (found.image_embeds * found.text_embeds).sum(1).float().cpu()

    def similarity(self, images: Tensor, others: Tensor) -> Tensor:
        """Cosine similarities [A, B] of images."""
        a, b = (self._outputs(part, ["-"]).image_embeds.float().cpu() for part in (images, others))
        return a @ b.T


@torch.no_grad()
def denoising_errors(
    pipe: Any,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    levels: Sequence[float] = (0.3, 0.5, 0.7),
    draws: int = 2,
    seed: int = 0,
) -> Tensor:
    """How badly the network denoises final latents [N, C, H, W] with each of P prompts: [N, P], float64.

    The mean squared error of the predicted noise over `draws` drawings at each of `levels` of the training
    timesteps, the same for all: the prompt with the least is what the network takes the image for, a
    classifier that every diffusion model implies (Li et al., arXiv 2303.16203). Costs N P levels draws
    forward passes.
    """
    scheduler, unet = pipe.scheduler, pipe.unet
    place = next(unet.parameters())
    length = scheduler.config.num_train_timesteps
    x0 = latents.to(place.device, place.dtype)
    size = pixels(pipe, (x0.shape[1], x0.shape[2], x0.shape[3]))
    conditioning = text.encode_prompts(pipe, list(prompts), **size)
    generator = torch.Generator("cpu").manual_seed(seed)
    total = torch.zeros(len(x0), len(prompts), dtype=torch.float64)
    for level in levels:
        timestep = int(level * (length - 1))
        alpha, sigma = noise_level(scheduler, timestep)
        for _ in range(draws):
            noise = torch.randn((1, *x0.shape[1:]), generator=generator, dtype=torch.float32, device="cpu")
            noise = noise.to(x0)
            x = float(alpha) * x0 + float(sigma) * noise
            for column in range(len(prompts)):
                given = text.repeat_conditioning(text.select_conditioning(conditioning, column), len(x))
                t = torch.full((len(x),), timestep, device=x.device)
                prediction = predict(unet, x, t, given)
                eps = score_from_prediction(
                    prediction, x, alpha, sigma, prediction_type_of(scheduler), units="eps"
                )
                total[:, column] += (eps - noise).flatten(1).double().square().mean(1).cpu()
    return total / (len(levels) * draws)


class TrainingImages:
    """Images that a model was trained with, to compare generations with.

    `images` are [M, 3, H, W] in [0, 1] with M `names`. With `reconstructed` their pixels are those of the
    pipeline's decoder after its encoder, which is the nearest that a latent model comes to a copy.
    """

    def __init__(
        self, pipe: Any, images: Tensor, names: Sequence[str], *, reconstructed: bool = False
    ) -> None:
        if images.dim() != 4 or images.shape[1] != 3 or len(images) != len(names) or not len(images):
            raise InvalidInput(
                f"images: expected [M, 3, H, W] with M names; got {list(images.shape)} and {len(names)} names"
            )
        if getattr(pipe, "vae", None) is None:
            raise UnsupportedModel(f"pipeline {type(pipe).__name__}: it has no encoder (`pipe.vae`)")
        self.names = list(names)
        self.latents = torch.cat([encode_images(pipe, part) for part in images.split(16)])
        if reconstructed:
            images = torch.cat([decode_latents(pipe, part) for part in self.latents.split(16)])
        self.images = images

    @classmethod
    def read(
        cls, pipe: Any, folder: str | Path, size: tuple[int, int], *, reconstructed: bool = False
    ) -> TrainingImages:
        """All images of a folder, scaled to `size` (height, width). Raises InvalidInput without any."""
        try:
            import numpy as np
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise MissingDependency("reading images needs Pillow: pip install Pillow") from None
        if not Path(folder).is_dir():
            raise InvalidInput(f"{folder}: there is no such folder")
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in _IMAGES)
        if not paths:
            raise InvalidInput(f"{folder}: there are no images in it ({', '.join(_IMAGES)})")
        found = []
        for path in paths:
            try:
                with Image.open(path) as image:
                    scaled = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
            except UnidentifiedImageError:
                raise InvalidInput(f"{path}: not an image") from None
            found.append(torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 255)
        return cls(pipe, torch.stack(found), [path.name for path in paths], reconstructed=reconstructed)

    def index(self, name: str) -> int:
        """Place of the image of this name. Raises InvalidInput where there is none."""
        if name not in self.names:
            raise InvalidInput(f"training_image: there is none called {name!r}")
        return self.names.index(name)


@dataclass(frozen=True)
class Judges:
    """What generations are compared with; what is None is left out of the table."""

    training: TrainingImages | None = None
    copies: CopyDetector | None = None
    clip: ClipModel | None = None


class RepairTable(ScoreTable):
    """Repairs compared, one row (a dict) per prompt, method and seed.

    Columns: `prompt`, `method`, `seed`, `step` (0, the step that repairs of the noise look at); `rounds`,
    `stopped` (1: below the threshold, 0: not, None: there is none), `loss_before`, `loss_after` (of the
    method's own optimization), `noise_norm` (of the initial latent, over the root of its entries: 1 for
    standard normal noise); `forwards`, `backwards`, `products`, `seconds` of the sample, `time_ratio` to
    those of the same prompt with the first method; `pairwise` (mean distance to the images of the other
    seeds); `compared_with` (a training image: the prompt's own, or the nearest), `pixel_distance`,
    `latent_distance` to it (root mean square, of pixels in [0, 1]), `copy_similarity` (cosine of a copy
    detector, the largest where a prompt has no image of its own), `clip_score`; `error` (None or a sentence;
    the numbers are None then).
    """

    standard: ClassVar[Mapping[str, str]] = {
        "prompt": "text",
        "method": "text",
        "seed": "int",
        "step": "int",
        "rounds": "int",
        "stopped": "int",
        "loss_before": "float",
        "loss_after": "float",
        "noise_norm": "float",
        "forwards": "int",
        "backwards": "int",
        "products": "int",
        "seconds": "float",
        "time_ratio": "float",
        "pairwise": "float",
        "compared_with": "text",
        "pixel_distance": "float",
        "latent_distance": "float",
        "copy_similarity": "float",
        "clip_score": "float",
        "error": "text",
    }

    @classmethod
    def empty_rows(cls, settings: Mapping[str, Any], timesteps: Sequence[float]) -> list[Row]:
        """The rows of one prompt without their numbers, for a run with these settings."""
        names = [name for name in cls.standard if name not in ("prompt", "method", "seed", "step", "error")]
        return [
            {"method": method, "seed": seed, "step": 0} | dict.fromkeys(names)
            for method in settings["methods"]
            for seed in settings["seeds"]
        ]

    def summary(self, *, copy_distance: float | None = None) -> list[Row]:
        """One row for each method: means over prompts and seeds, and what share are copies.

        A copy is a generation within `copy_distance` (pixels) of its training image; `copied_prompts` is the
        share of prompts that most seeds copy. `time_ratio` is the median.
        """
        methods: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.get("error") is None:
                methods.setdefault(row["method"], []).append(row)
        return [_summary(method, rows, copy_distance) for method, rows in methods.items()]

    def _shown(self) -> list[str]:
        return ["prompt", "method", "seed", "rounds", "pixel_distance", "pairwise", "time_ratio", "error"]


def _summary(method: str, rows: Sequence[Row], copy_distance: float | None) -> Row:
    def values(name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows if row.get(name) is not None], dtype=torch.float64)

    def mean(name: str) -> float | None:
        found = values(name)
        return float(found.mean()) if len(found) else None

    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    found: Row = {"method": method, "prompts": len(prompts), "generations": len(rows)}
    near = values("pixel_distance")
    if len(near):
        for name, share in (("quarter", 0.25), ("median", 0.5), ("three_quarters", 0.75)):
            found[f"pixel_distance_{name}"] = float(near.quantile(share))
    for name in (
        "pixel_distance", "latent_distance", "copy_similarity", "pairwise", "clip_score", "noise_norm",
        "rounds", "forwards", "backwards", "products", "seconds",
    ):  # fmt: skip
        found[name] = mean(name)
    ratios = values("time_ratio")
    found["time_ratio"] = float(ratios.median()) if len(ratios) else None
    if copy_distance is not None and len(near):
        found["copies"] = float((near < copy_distance).double().mean())
        shares = [
            [row["pixel_distance"] < copy_distance for row in rows if row["prompt"] == prompt]
            for prompt in prompts
        ]
        found["copied_prompts"] = sum(2 * sum(share) > len(share) for share in shares) / len(shares)
    return found


def compare_repairs(
    pipe: Any,
    prompts: Sequence[str],
    methods: Mapping[str, str | Repair],
    *,
    seeds: Sequence[int],
    judges: Judges | None = None,
    training_images: Sequence[str | None] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    latent_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    backend: str = "auto",
    on_error: str = "raise",
) -> Iterator[tuple[list[Row], dict[str, Generation]]]:
    """Generate each prompt with each method, and compare: yields the rows and generations of one prompt.

    `methods` are repairs by the name that they have in the table; the first is what times are compared with,
    usually "none". `training_images` names the training image of each prompt, or None for the nearest of all.
    Rows are those of `RepairTable`. Arguments and errors otherwise as in `generate`; with on_error="record" a
    prompt for which the network is not finite gives rows with its `error`.
    """
    judges = judges or Judges()
    own = training_images or [None] * len(prompts)
    for prompt, image in zip(prompts, own, strict=True):
        found: dict[str, Generation] = {}
        rows: list[Row] = []
        try:
            for name, method in methods.items():
                found[name] = generate(
                    pipe,
                    prompt,
                    repair=method,
                    seeds=seeds,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    latent_size=latent_size,
                    batch_size=batch_size,
                    backend=backend,
                )
            plain = sum(next(iter(found.values())).seconds) / len(seeds)
            for name, generation in found.items():
                rows += _rows(prompt, name, generation, plain, judges, image)
        except NonFiniteError as error:
            if on_error != "record":
                raise
            empty = RepairTable.empty_rows({"methods": list(methods), "seeds": seeds}, [0.0])
            rows, found = [{"prompt": prompt} | row | {"error": str(error)} for row in empty], {}
        yield rows, found


def _rows(
    prompt: str, name: str, made: Generation, plain: float, judges: Judges, image: str | None
) -> list[Row]:
    assert made.images is not None
    apart = mean_distance_to_others(made.images)
    norms = made.latents.flatten(1).double().square().mean(1).sqrt()
    rows: list[Row] = []
    for i, seed in enumerate(made.seeds):
        path, stopped = made.path[i], made.stopped[i]
        rows.append(
            {
                "prompt": prompt,
                "method": name,
                "seed": seed,
                "step": 0,
                "rounds": made.rounds[i],
                "stopped": None if stopped is None else int(stopped),
                "loss_before": path[0] if path else None,
                "loss_after": path[-1] if path else None,
                "noise_norm": float(norms[i]),
                "forwards": made.forwards[i],
                "backwards": made.backwards[i],
                "products": made.products[i],
                "seconds": made.seconds[i],
                "time_ratio": made.seconds[i] / plain,
                "pairwise": None if len(made) == 1 else float(apart[i]),
                "compared_with": None,
                "pixel_distance": None,
                "latent_distance": None,
                "copy_similarity": None,
                "clip_score": None,
                "error": None,
            }
        )
    training = judges.training
    if training is not None:
        near = distances(made.images, training.images)
        which = near.argmin(1).tolist() if image is None else [training.index(image)] * len(rows)
        far = distances(made.final.float(), training.latents)
        alike = judges.copies.similarity(made.images, training.images) if judges.copies else None
        for i, (row, j) in enumerate(zip(rows, which, strict=True)):
            row |= {
                "compared_with": training.names[j],
                "pixel_distance": float(near[i, j]),
                "latent_distance": float(far[i, j]),
            }
            if alike is not None:
                row["copy_similarity"] = float(alike[i].max() if image is None else alike[i, j])
    if judges.clip is not None:
        scores = judges.clip.prompt_similarity(made.images, [prompt] * len(rows))
        for row, score in zip(rows, scores.tolist(), strict=True):
            row["clip_score"] = score
    return rows
