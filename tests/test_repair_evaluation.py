"""Evaluation of repairs: distances, copy detectors, the implied classifier, the table, the picture."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

import sharpcore
from sharpcore import InvalidInput
from sharpcore.autoencoder import encode_images
from sharpcore.repair.evaluation import (
    ClipModel,
    CopyDetector,
    Judges,
    RepairTable,
    TrainingImages,
    compare_repairs,
    denoising_errors,
    distances,
    mean_distance_to_others,
)
from sharpcore.repair.grid import plot_grid

PROMPT = "a bold slanted handwritten zero by hounard"


def pictures(count, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_distances():
    a, b = pictures(3), pictures(2, seed=1)
    found = distances(a, b)
    for i in range(3):
        for j in range(2):
            assert float(found[i, j]) == pytest.approx(float((a[i] - b[j]).square().mean().sqrt()), rel=1e-6)
    # Near copies keep their digits.
    near = distances(a, a + 1e-6)
    assert torch.allclose(near.diagonal(), torch.full((3,), 1e-6, dtype=torch.float64), rtol=0.1)
    apart = mean_distance_to_others(a)
    between = distances(a, a)
    assert float(apart[0]) == pytest.approx(float(between[0, 1] + between[0, 2]) / 2)
    assert bool(mean_distance_to_others(a[:1]).isnan())
    with pytest.raises(InvalidInput, match="second: expected entries of shape"):
        distances(a, pictures(2, size=16))


class Embed(torch.nn.Module):
    """Means of colours and halves: a copy has the same."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left, right = images.chunk(2, 3)
        return torch.cat([left.mean((2, 3)), right.mean((2, 3))], 1)


def test_copy_detector(tmp_path):
    path = tmp_path / "sscd.torchscript.pt"
    torch.jit.script(Embed()).save(str(path))
    detector = CopyDetector(path, size=24)
    images = pictures(2)
    images[1, :, :, 16:] = 0
    alike = detector.similarity(images, images)
    assert torch.allclose(alike.diagonal(), torch.ones(2), atol=1e-5)
    assert float(alike[0, 1]) < 0.9
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    constant = torch.tensor([0.2, 0.5, 0.7]).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    expected = ((torch.tensor([0.2, 0.5, 0.7]) - mean) / deviation).repeat(2)
    assert torch.allclose(detector.embed(constant)[0], expected / expected.norm(), atol=1e-5)
    with pytest.raises(InvalidInput, match="there is no such file"):
        CopyDetector(tmp_path / "none.pt")
    (tmp_path / "other.pt").write_bytes(b"no archive")
    with pytest.raises(InvalidInput, match="not a TorchScript file"):
        CopyDetector(tmp_path / "other.pt")
    torch.jit.script(torch.nn.Identity()).save(str(path))
    with pytest.raises(InvalidInput, match="one vector for each image"):
        CopyDetector(path).embed(images)


@pytest.fixture(scope="module")
def clip_folder(tiny_pipe, tmp_path_factory):
    """A CLIP model of random weights, with its tokenizer and image processor."""
    tokenizer = tiny_pipe.tokenizer
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **small, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


def test_clip(clip_folder, tmp_path):
    clip = ClipModel(clip_folder)
    images, prompts = pictures(2), [PROMPT, "a thin upright handwritten one"]
    scores = clip.prompt_similarity(images, prompts)
    # The diagonal of the model's own logits, without their scale.
    found = clip._outputs(images, prompts)
    expected = found.logits_per_image.diagonal() / clip.network.logit_scale.exp()
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(clip.similarity(images, images).diagonal(), torch.ones(2), atol=1e-5)
    for folder, message in ((tmp_path / "none", "no such folder"), (tmp_path, "not a CLIP model")):
        with pytest.raises(InvalidInput, match=message):
            ClipModel(folder)


def test_the_implied_classifier_knows_a_training_image(tiny_pipe):
    """Made from a memorized prompt, an image is denoised best with it."""
    made = sharpcore.generate(tiny_pipe, PROMPT, repair="none", seeds=2, num_inference_steps=12)
    prompts = [PROMPT, PROMPT.replace("zero", "one"), PROMPT.replace("zero", "seven")]
    errors = denoising_errors(tiny_pipe, made.final, prompts, levels=(0.6,), draws=2)
    assert errors.shape == (2, 3)
    assert errors.argmin(1).tolist() == [0, 0]
    again = denoising_errors(tiny_pipe, made.final[:1], prompts[1:], levels=(0.6,), draws=2)
    torch.testing.assert_close(again, errors[:1, 1:], rtol=1e-4, atol=1e-8)


def test_training_images_from_a_folder(tiny_pipe, tmp_path):
    images = pictures(2)
    for name, image in zip(("b.png", "a.png"), images, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    found = TrainingImages.read(tiny_pipe, tmp_path, (32, 32))
    assert found.names == ["a.png", "b.png"]
    torch.testing.assert_close(found.images, images.flip(0), rtol=0, atol=0.003)
    torch.testing.assert_close(found.latents, encode_images(tiny_pipe, found.images), rtol=0, atol=1e-5)
    assert found.index("b.png") == 1
    again = TrainingImages.read(tiny_pipe, tmp_path, (32, 32), reconstructed=True)
    assert float(distances(again.images, found.images).diagonal().min()) > 0.01
    with pytest.raises(InvalidInput, match=r"none called 'c\.png'"):
        found.index("c.png")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "there are no images"),
    ):
        with pytest.raises(InvalidInput, match=message):
            TrainingImages.read(tiny_pipe, folder, (32, 32))
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(InvalidInput, match=r"c\.png: not an image"):
        TrainingImages.read(tiny_pipe, tmp_path, (32, 32))


def test_compare_repairs(tiny_pipe, clip_folder, tmp_path):
    path = tmp_path / "sscd.pt"
    torch.jit.script(Embed()).save(str(path))
    plain = sharpcore.generate(tiny_pipe, PROMPT, repair="none", seeds=[1], num_inference_steps=2)
    training = TrainingImages(tiny_pipe, torch.cat([pictures(1), plain.images]), ["noise", "copy"])
    judges = Judges(training, CopyDetector(path, size=24), ClipModel(clip_folder))
    methods = {"none": "none", "gentle": sharpcore.repair.DelayedGuidance(transition=0)}
    found = list(
        compare_repairs(
            tiny_pipe,
            [PROMPT, "a thin one"],
            methods,
            seeds=[1, 2],
            judges=judges,
            training_images=[None, "noise"],
            num_inference_steps=2,
        )
    )
    rows = [row for part, _ in found for row in part]
    assert [(row["prompt"], row["method"], row["seed"]) for row in rows] == [
        (prompt, method, seed) for prompt in (PROMPT, "a thin one") for method in methods for seed in (1, 2)
    ]
    first = rows[0]
    assert first["compared_with"] == "copy"
    assert first["pixel_distance"] < 1e-4
    assert first["copy_similarity"] == pytest.approx(1, abs=1e-4)
    assert rows[4]["compared_with"] == "noise"
    assert rows[4]["latent_distance"] > 0.1
    assert [row["time_ratio"] for row in rows[:2]] == pytest.approx(
        [row["seconds"] * 2 / (rows[0]["seconds"] + rows[1]["seconds"]) for row in rows[:2]]
    )
    assert rows[0]["pairwise"] == pytest.approx(rows[1]["pairwise"])
    assert all(-1 <= row["clip_score"] <= 1 for row in rows)
    assert set(rows[0]) == set(RepairTable.standard)
    table = RepairTable(rows)
    summary = {row["method"]: row for row in table.summary(copy_distance=0.01)}
    assert summary["none"]["prompts"] == 2
    assert summary["none"]["generations"] == 4
    assert summary["none"]["copies"] == 0.25
    assert summary["none"]["copied_prompts"] == 0
    assert summary["gentle"]["copies"] == 0
    assert summary["none"]["pixel_distance"] == pytest.approx(
        sum(row["pixel_distance"] for row in rows if row["method"] == "none") / 4
    )
    table.to_csv(tmp_path / "repair.csv")
    again = RepairTable.read(tmp_path / "repair.csv")
    for row, other in zip(table, again, strict=True):
        assert row == other
    groups = {name: list(made.images) for name, made in found[0][1].items()}
    figure = plot_grid(
        [(PROMPT, {"training": [training.images[1]], **groups}), ("other", groups)],
        path=tmp_path / "grid.png",
    )
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["training", "none", "gentle"]
    assert (tmp_path / "grid.png").stat().st_size > 1000
    with pytest.raises(InvalidInput, match="images of one size"):
        plot_grid([(PROMPT, {"none": []})])


def test_a_prompt_that_fails_is_recorded(fresh_pipe):
    fresh_pipe.unet.conv_out.bias.data[0] = float("nan")
    found = list(
        compare_repairs(
            fresh_pipe, [PROMPT], {"none": "none"}, seeds=[1], num_inference_steps=2, on_error="record"
        )
    )
    (rows, made) = found[0]
    assert made == {}
    assert "NaN or infinity" in rows[0]["error"]
    assert rows[0]["seconds"] is None
    assert RepairTable(rows).summary() == []
