"""Where in a picture a prompt is memorized: heat maps of detectors, in latent and pixel space, and masks."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.arguments import check_guidance, check_prompts, check_seeds, check_steps, is_number
from sharpcore.autoencoder import decode_latents, encode_images
from sharpcore.backends import get_backend
from sharpcore.branches import Branch
from sharpcore.curvature import latent_shape
from sharpcore.detect import Detector, Evidence, State, make_detectors
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.lowering import WeightCopies, check_precision
from sharpcore.score import UNITS, noise_level
from sharpcore.states import Linearized
from sharpcore.trajectory import (
    guided_states,
    initial_latents,
    pixels,
    seeded_generators,
    trajectory_scheduler,
    warn_if_cut,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Bins of the histogram in which Otsu's threshold is looked for.
_BINS = 256


@dataclass(frozen=True)
class HeatMap:
    """One detector's map of one sample at one step: higher where the prompt is memorized.

    Attributes
    ----------
    latent
        [h, w] float64, a number for each place of the latent, in the detector's units.
    error
        Its standard error, [h, w], where the detector estimates one, else None.
    metric, step, timestep, sample, prompt, seed
        What it is of; what is not known is None.
    scale
        Pixels of the image for each place of the latent.
    image
        The decoded picture, [3, H, W] in 0 to 1, or None.
    """

    latent: Tensor = field(repr=False)
    metric: str
    step: int | None
    timestep: float
    sample: int
    scale: int
    error: Tensor | None = field(default=None, repr=False)
    prompt: str | None = None
    seed: int | None = None
    image: Tensor | None = field(default=None, repr=False)

    def pixels(self) -> Tensor:
        """The map at the size of the image, [H, W] float64, by bilinear interpolation."""
        size = [side * self.scale for side in self.latent.shape]
        return F.interpolate(self.latent[None, None], size, mode="bilinear", align_corners=False)[0, 0]

    def mask(self, threshold: float | None = None, *, space: str = "pixels") -> Tensor:
        """Where the map is above `threshold`, a bool tensor [H, W], or [h, w] with space="latent".

        Without a threshold, that of Otsu (1979), which parts the map's values into two groups of the least
        variance. Raises InvalidInput for another space or a threshold that is no number.
        """
        if space not in ("pixels", "latent"):
            raise InvalidInput(f"space: expected 'pixels' or 'latent'; got {space!r}")
        if threshold is not None and not (is_number(threshold) and threshold == threshold):
            raise InvalidInput(f"threshold: expected a number; got {threshold!r}")
        values = self.pixels() if space == "pixels" else self.latent
        return values > (otsu_threshold(values) if threshold is None else threshold)

    def iou(self, mask: Tensor, threshold: float | None = None) -> float:
        """The overlap of the map's mask with a given one: intersection over union, 0 to 1.

        `mask` is bool, [H, W] of the image or [h, w] of the latent. Two empty masks have an overlap of 1.
        Raises InvalidInput for another shape or dtype.
        """
        sizes = {tuple(self.latent.shape): "latent"}
        sizes[tuple(side * self.scale for side in self.latent.shape)] = "pixels"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) not in sizes:
            found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            expected = " or ".join(str(list(size)) for size in sizes)
            raise InvalidInput(f"mask: expected a bool tensor of shape {expected}; got {found}")
        own = self.mask(threshold, space=sizes[tuple(mask.shape)])
        union = int((own | mask).sum())
        return float((own & mask).sum()) / union if union else 1.0

    def plot(self, path: str | Path | None = None) -> Figure:
        """The map over the picture, or alone where there is none, with the outline of its mask."""
        from sharpcore.report.heat_maps import plot_heat_map

        return plot_heat_map(self, path=path)

    def save(self, path: str | Path) -> None:
        """Write map, error, image and what they are of to an .npz file."""
        arrays = {"latent": self.latent.numpy(), "pixels": self.pixels().numpy()}
        for name, tensor in (("error", self.error), ("image", self.image)):
            if tensor is not None:
                arrays[name] = tensor.numpy()
        facts = ("metric", "step", "timestep", "sample", "scale", "prompt", "seed")
        arrays |= {name: np.asarray(getattr(self, name)) for name in facts if getattr(self, name) is not None}
        with open(path, "wb") as file:  # under this very name, whatever its extension
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> HeatMap:
        """Read what `save` wrote. Raises InvalidInput for a missing file, or another one."""
        if not Path(path).is_file():
            raise InvalidInput(f"{path}: there is no such file")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found: dict[str, Any] = {"step": None} | {
                    name: torch.from_numpy(array) if array.ndim else array.item()
                    for name, array in arrays.items()
                    if name != "pixels"
                }
            return cls(**found)
        except (ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise InvalidInput(f"{path}: expected a heat map that `save` wrote ({error})") from error


def otsu_threshold(values: Tensor) -> float:
    """The threshold between two groups of numbers with the least variance within them (Otsu 1979).

    For numbers that are all the same, that number.
    """
    numbers = values.detach().double().flatten().cpu().numpy()
    low, high = float(numbers.min()), float(numbers.max())
    if not low < high:
        return high
    counts, edges = np.histogram(numbers, _BINS, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    above = counts.sum() - below
    # The variance between the groups, up to a constant; empty groups cannot be: the ends hold a number each.
    between = (sums / below - ((counts * centres).sum() - sums) / above) ** 2 * below * above
    return float(edges[1:-1][int(between.argmax())])


def localize(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    metrics: Sequence[str | Detector] = ("curvature_difference",),
    steps: Sequence[int] | None = None,
    seeds: int | Sequence[int] = 1,
    units: str = "score",
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    latent_size: tuple[int, int] | None = None,
    decode: bool = True,
    backend: str = "auto",
    precision: str = "float32",
) -> list[HeatMap]:
    """Generate pictures and map where they are memorized: a map for each prompt, seed, step and metric.

    Args:
        pipe: SD 1.x, 2.x or XL; it is not changed.
        prompts: one or several.
        metrics: detectors that have a map, as in `SharpnessScorer`.
        steps: indices into the scheduler's timesteps; by default the one at four fifths of the trajectory. A
            detector that belongs to a step of its own is computed there.
        seeds: a number n (seeds 42, ..., 42 + n - 1) or a list.
        decode: whether to finish the pictures and put them into the maps.
        units, num_inference_steps, guidance_scale, latent_size, backend, precision: as in `SharpnessScorer`.

    Raises InvalidInput for bad arguments and for a detector without a map, UnsupportedModel for a pipeline
    whose scores are not defined, NonFiniteError where the network is not finite.
    """
    detectors = _detectors(metrics)
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    check_prompts(several, "raise")
    guidance_scale = check_guidance(guidance_scale)
    network = _Network(pipe, units, backend, precision)
    shape = latent_shape(pipe, latent_size)
    numbers = check_seeds(seeds)
    count = len(trajectory_scheduler(pipe, num_inference_steps).timesteps)
    asked = check_steps([count * 4 // 5] if steps is None else steps, count)
    at = {step: [d for d in detectors if step in d.steps(asked, count)] for step in range(count)}
    wanted = [step for step, here in at.items() if here] + [count] * decode
    found: list[HeatMap] = []
    for index, prompt in enumerate(several):
        warn_if_cut(pipe, index, prompt)
        conditional, unconditional = network.conditionings([prompt] * len(numbers), shape)
        scheduler, generators = trajectory_scheduler(pipe, num_inference_steps), seeded_generators(numbers)
        latents = initial_latents(pipe, generators, scheduler, shape)
        states = guided_states(
            pipe, latents, generators, scheduler, conditional, unconditional, guidance_scale, wanted
        )
        maps: list[HeatMap] = []
        image = None
        for step, t, x in states:
            if step == count:
                image = decode_latents(pipe, x)
                continue
            evidence = network.evidence(
                scheduler, step, t, x, numbers, conditional, unconditional, prompt, at[step]
            )
            maps += heat_maps(at[step], evidence, pipe, prompts=[prompt] * len(numbers), seeds=numbers)
        found += maps if image is None else [replace(part, image=image[part.sample]) for part in maps]
    return found


def localize_images(
    pipe: Any,
    images: Tensor,
    prompts: str | Sequence[str],
    *,
    timestep: int,
    metrics: Sequence[str | Detector] = ("curvature_difference",),
    seeds: int | Sequence[int] = 4,
    units: str = "score",
    backend: str = "auto",
    precision: str = "float32",
) -> list[HeatMap]:
    """Map where given pictures are memorized under their prompts: one map for each picture and metric.

    Args:
        images: [B, 3, H, W] float, in 0 to 1; sides that the autoencoder divides evenly.
        prompts: one for all, or one for each picture.
        timestep: how much noise is added, an integer timestep of the scheduler's training table.
        seeds: of the noise; the map is the mean over them, its error that of this mean where there are
            several, else the detector's own.

    The other arguments, and errors, as in `localize`.
    """
    detectors = _detectors(metrics)
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    check_prompts(several, "raise")
    network = _Network(pipe, units, backend, precision)
    factor, numbers = pipe.vae_scale_factor, check_seeds(seeds)
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InvalidInput(f"images: expected a tensor [B, 3, height, width]; got {found}")
    if images.shape[2] % factor or images.shape[3] % factor:
        raise InvalidInput(f"images: expected sides that {factor} divides; got {list(images.shape[2:])}")
    if not images.is_floating_point():
        raise InvalidInput(f"images: expected a floating dtype, numbers in 0 to 1; got {images.dtype}")
    if not bool(torch.isfinite(images).all()):
        raise NonFiniteError("images: expected finite numbers; got NaN or infinity")
    if float(images.min()) < -1e-3 or float(images.max()) > 1 + 1e-3:
        low, high = float(images.min()), float(images.max())
        raise InvalidInput(f"images: expected numbers in 0 to 1; got {low:g} to {high:g}")
    if len(several) not in (1, len(images)):
        raise InvalidInput(f"prompts: expected 1 or {len(images)}, one for each image; got {len(several)}")
    scheduler = pipe.scheduler
    t = torch.as_tensor(timestep)
    alpha, sigma = (float(level) for level in noise_level(scheduler, timestep))
    maps = []
    for index, prompt in enumerate(several * (len(images) // len(several))):
        clean = encode_images(pipe, images[index : index + 1]).to(pipe.unet.device, pipe.unet.dtype)
        shape = (clean.shape[1], clean.shape[2], clean.shape[3])
        noise = torch.cat(
            [torch.randn((1, *shape), generator=generator) for generator in seeded_generators(numbers)]
        )
        x = alpha * clean + sigma * noise.to(clean)
        conditional, unconditional = network.conditionings([prompt] * len(numbers), shape)
        evidence = network.evidence(
            scheduler, None, t, x, numbers, conditional, unconditional, prompt, detectors
        )
        parts = heat_maps(detectors, evidence, pipe, prompts=[prompt] * len(numbers))
        for detector in detectors:
            own = [part for part in parts if part.metric == detector.name]
            stacked, error = torch.stack([part.latent for part in own]), own[0].error
            if len(own) > 1:
                error = stacked.std(0) / len(own) ** 0.5
            maps.append(
                HeatMap(
                    stacked.mean(0),
                    detector.name,
                    None,
                    float(timestep),
                    index,
                    factor,
                    error,
                    prompt,
                    None,
                    images[index].detach().float().cpu(),
                )
            )
    return maps


def heat_maps(
    detectors: Sequence[Detector],
    evidence: Evidence,
    pipe: Any,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[HeatMap]:
    """The maps of all samples of a state, one detector after the other."""
    state = evidence.state
    found = []
    for detector in detectors:
        maps = detector.map(evidence).double().cpu()
        if not bool(torch.isfinite(maps).all()):
            raise NonFiniteError(f"{detector.name}: NaN or infinity in its map")
        errors = detector.error_map(evidence)
        for sample, latent in enumerate(maps):
            found.append(
                HeatMap(
                    latent,
                    detector.name,
                    state.step,
                    float(state.timestep[sample]),
                    sample,
                    pipe.vae_scale_factor,
                    None if errors is None else errors[sample].double().cpu(),
                    None if prompts is None else prompts[sample],
                    None if seeds is None else seeds[sample],
                )
            )
    return found


def check_maps(names: Any, detectors: Sequence[Detector]) -> tuple[str, ...]:
    """Names of detectors that have a map. Raises InvalidInput for others."""
    names = (names,) if isinstance(names, str) else tuple(names)
    able = [detector.name for detector in detectors if detector.has_map]
    for name in names:
        if name not in able:
            raise InvalidInput(
                f"maps: expected metrics with a map, here {', '.join(able) or 'none'}; got {name!r}"
            )
    return names


class _Network:
    """A pipeline's network with its two branches, linearized when a map asks for it."""

    def __init__(self, pipe: Any, units: str, backend: str, precision: str) -> None:
        text.check_pipeline(pipe)
        if units not in UNITS:
            raise InvalidInput(f"units: expected one of {', '.join(UNITS)}; got {units!r}")
        get_backend(backend, device="cpu", dtype=torch.float32)
        check_precision(precision, pipe.unet.dtype, pipe.unet.device)
        self.pipe, self.units = pipe, units
        how = (pipe.unet, backend, precision, WeightCopies())
        self._branches = Branch(*how), Branch(*how)
        self._embedding = Branch(*how, of_embedding=True)

    def conditionings(
        self, prompts: Sequence[str], shape: tuple[int, int, int]
    ) -> tuple[text.Conditioning, text.Conditioning]:
        size = pixels(self.pipe, shape)
        conditional = text.encode_prompts(self.pipe, prompts[:1], **size)
        unconditional = text.encode_unconditional(self.pipe, **size)
        both = (text.repeat_conditioning(part, len(prompts)) for part in (conditional, unconditional))
        return next(both), next(both)

    def evidence(
        self,
        scheduler: Any,
        step: int | None,
        t: Tensor,
        x: Tensor,
        seeds: Sequence[int],
        conditional: text.Conditioning,
        unconditional: text.Conditioning,
        prompt: str,
        detectors: Sequence[Detector],
    ) -> Evidence:
        timestep = t.to(x.device).expand(len(x))
        first, second = self._branches
        state = State(
            network=self.pipe.unet,
            scheduler=scheduler,
            step=step,
            x=x,
            timestep=timestep,
            seeds=seeds,
            conditional=conditional,
            unconditional=unconditional,
            units=self.units,
            end_tokens=[text.end_token(self.pipe, prompt)] * len(x),
            reads_attention=any(detector.needs_attention for detector in detectors),
            embedding_branch=self._embedding,
        )
        if any(detector.needs_product for detector in detectors):
            state.with_prompt = lambda: Linearized(first.at(x, timestep, conditional))
            state.without = lambda: Linearized(second.at(x, timestep, unconditional))
        return Evidence(state)


def _detectors(metrics: Sequence[str | Detector]) -> list[Detector]:
    made = make_detectors(metrics)
    check_maps([detector.name for detector in made], made)
    return made
