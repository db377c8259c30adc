"""Heat maps: against the exact diagonal, in pixels, their masks and overlaps, and during generation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pipelines import latent

from sharpcore import HeatMap, InvalidInput, SharpnessCallback, curvature_at, localize, localize_images
from sharpcore.autoencoder import decode_latents, encode_images
from sharpcore.krylov import dense
from sharpcore.localization import otsu_threshold

PROMPT = "a thin upright handwritten zero by jackova"


@pytest.fixture(scope="module")
def pipe(sd2_pipe):
    pipe = copy.copy(sd2_pipe)
    pipe.unet = copy.deepcopy(sd2_pipe.unet).double()
    return pipe


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_curvature_maps_equal_the_exact_diagonal_within_their_errors(pipe, method):
    metric = f"curvature_difference:method={method}:probes=64"
    maps = localize(pipe, PROMPT, metrics=[metric], steps=(10,), seeds=8, decode=False)
    curvature = curvature_at(pipe, PROMPT, step=10, seeds=8)
    jacobians = dense(curvature.hessian_difference.jacobian)
    misses = []
    for part, matrix in zip(maps, jacobians, strict=True):
        exact = -matrix.diagonal().reshape(4, 8, 8).sum(0)
        misses.append((part.latent - exact) / part.error)
    misses = torch.stack(misses)
    # Standard normal if the errors are right: 512 places.
    assert 0.8 < float(misses.square().mean().sqrt()) < 1.25
    assert 0.6 < float((misses.abs() < 1).double().mean()) < 0.76
    assert float((misses.abs() < 2).double().mean()) > 0.92


def heat_map(values, scale=2, **facts):
    return HeatMap(torch.as_tensor(values, dtype=torch.float64), "m", 0, 1.0, 0, scale, **facts)


def test_masks_and_overlaps():
    part = heat_map([[0.0, 0.1, 5.0, 5.2], [0.0, 0.2, 5.1, 5.0]])
    right = torch.tensor([[False, False, True, True]] * 2)
    assert torch.equal(part.mask(space="latent"), right)
    assert torch.equal(part.mask(4.0, space="latent"), right)
    assert part.iou(right) == 1
    assert part.iou(~right) == 0
    assert part.iou(torch.ones(2, 4, dtype=torch.bool)) == 0.5
    assert part.pixels().shape == part.mask().shape == (4, 8)
    assert part.iou(torch.ones(4, 8, dtype=torch.bool), -1.0) == 1
    assert heat_map(torch.zeros(2, 2)).iou(torch.zeros(2, 2, dtype=torch.bool)) == 1
    for wrong in (torch.ones(2, 4), torch.ones(3, 4, dtype=torch.bool), [[True]]):
        with pytest.raises(InvalidInput, match="mask: expected a bool tensor of shape"):
            part.iou(wrong)
    with pytest.raises(InvalidInput, match="space: expected 'pixels' or 'latent'"):
        part.mask(space="image")
    with pytest.raises(InvalidInput, match="threshold: expected a number"):
        part.mask(float("nan"))


def test_otsu_against_a_search():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(300, generator=generator), 4 + 2 * torch.randn(100, generator=generator)])
    edges = torch.linspace(float(values.min()), float(values.max()), 257, dtype=torch.float64)[1:-1]

    def within(threshold):
        groups = [values[values <= threshold], values[values > threshold]]
        return sum(float(group.double().var(correction=0)) * len(group) for group in groups if len(group))

    best = min(within(edge) for edge in edges)
    # Bins are represented by their centres, which moves the optimum by less than a bin or two.
    assert within(otsu_threshold(values)) <= best * 1.002
    assert otsu_threshold(torch.full((5,), 2.0)) == 2.0


def test_pictures_come_with_the_maps(tiny_pipe, tmp_path):
    maps = localize(
        tiny_pipe, [PROMPT], metrics=["score_difference", "bright_ending"], steps=(2,), seeds=2,
        num_inference_steps=4,
    )  # fmt: skip
    assert [(m.metric, m.step, m.seed) for m in maps] == [
        ("score_difference", 2, 42), ("score_difference", 2, 43), ("bright_ending", 3, 42),
        ("bright_ending", 3, 43),
    ]  # fmt: skip
    with torch.no_grad():
        plain = tiny_pipe(
            [PROMPT] * 2, num_inference_steps=4, height=32, width=32, output_type="np",
            latents=torch.cat([latent(42), latent(43)]),
        ).images  # fmt: skip
    for part in maps:
        np.testing.assert_allclose(part.image.movedim(0, -1), plain[part.sample], atol=2e-3)
    maps[0].save(tmp_path / "map.npz")
    with np.load(tmp_path / "map.npz") as saved:
        assert saved["metric"] == "score_difference"
        assert saved["pixels"].shape == (32, 32)
        assert saved["image"].shape == (3, 32, 32)
    maps[0].plot(tmp_path / "map.png")
    heat_map([[0.0, 1.0], [2.0, 3.0]], 8).plot(tmp_path / "alone.png")
    assert all((tmp_path / name).stat().st_size > 3000 for name in ("map.png", "alone.png"))


def test_given_pictures(tiny_pipe):
    """The mean over seeds of the maps at noised latents, with the error of this mean."""
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (part,) = localize_images(tiny_pipe, image, PROMPT, timestep=401, metrics=["score_difference"], seeds=3)
    clean, abar = encode_images(tiny_pipe, image), float(tiny_pipe.scheduler.alphas_cumprod.double()[401])
    embeddings = tiny_pipe.encode_prompt(PROMPT, "cpu", 1, True)
    own = []
    for seed in (42, 43, 44):
        x = abar**0.5 * clean + (1 - abar) ** 0.5 * latent(seed)
        with torch.no_grad():
            c, u = (tiny_pipe.unet(x, 401, encoder_hidden_states=e).sample for e in embeddings)
        own.append((c - u).double().norm(dim=1)[0] / (1 - abar) ** 0.5)
    own = torch.stack(own)
    torch.testing.assert_close(part.latent, own.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(part.error, own.std(0) / 3**0.5, rtol=1e-3, atol=1e-6)
    # The autoencoder there and back.
    assert float((decode_latents(tiny_pipe, clean) - image).abs().mean()) < 0.35
    for wrong, message in (
        (image[0], "images: expected a tensor"),
        (image[..., :5], "images: expected sides"),
    ):
        with pytest.raises(InvalidInput, match=message):
            localize_images(tiny_pipe, wrong, PROMPT, timestep=401)
    with pytest.raises(InvalidInput, match="prompts: expected 1 or 1"):
        localize_images(tiny_pipe, image, [PROMPT] * 2, timestep=401)


def test_a_detector_without_a_map(tiny_pipe):
    with pytest.raises(InvalidInput, match="maps: expected metrics with a map, here none; got 'p_laplace'"):
        localize(tiny_pipe, PROMPT, metrics=["p_laplace"])


def test_the_callback_keeps_maps(tiny_pipe, tmp_path):
    callback = SharpnessCallback(
        tiny_pipe, steps=(2,), metrics=["score_difference", "bright_ending"], prompts=PROMPT,
        maps=["score_difference", "bright_ending"], latents=latent(42),
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="maps: there are none"):
        callback.save_maps(tmp_path)
    with torch.no_grad():
        made = tiny_pipe(
            PROMPT, num_inference_steps=4, height=32, width=32, output_type="latent", latents=latent(42),
            callback_on_step_end=callback, callback_on_step_end_tensor_inputs=callback.tensor_inputs,
        ).images  # fmt: skip
    expected = localize(
        tiny_pipe, PROMPT, metrics=["score_difference", "bright_ending"], steps=(2,), num_inference_steps=4,
        decode=False,
    )  # fmt: skip
    assert [(m.metric, m.step) for m in callback.heat_maps] == [(m.metric, m.step) for m in expected]
    for ours, theirs in zip(callback.heat_maps, expected, strict=True):
        torch.testing.assert_close(ours.latent, theirs.latent, rtol=1e-4, atol=1e-6)
    assert {part.prompt for part in callback.heat_maps} == {PROMPT}
    pictures = callback.save_maps(tmp_path / "maps", made)
    assert [path.name for path in pictures] == [
        "score_difference_step2_sample0.png", "bright_ending_step3_sample0.png",
    ]  # fmt: skip
    assert HeatMap.load(pictures[0].with_suffix(".npz")).image.shape == (3, 32, 32)
    rows = callback.table().rows
    assert [(row["step"], row["bright_ending"] is None) for row in rows] == [(2, True), (3, False)]
    with pytest.raises(InvalidInput, match="prompts: bright_ending needs them"):
        SharpnessCallback(tiny_pipe, metrics=["bright_ending"])
    with pytest.raises(InvalidInput, match="maps: expected metrics with a map, here none"):
        SharpnessCallback(tiny_pipe, metrics=["p_laplace"], maps=["p_laplace"])
