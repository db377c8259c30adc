"""The example that trains a tiny Stable Diffusion: a smoke run of all of it, and facts of its data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DEFAULT_MODEL = ROOT / "sharpcore" / "models" / "tiny-sd-eps"
sys.path.insert(0, str(EXAMPLES))

import train_tiny_sd  # noqa: E402
from tiny_sd.captions import CaptionPlan  # noqa: E402
from tiny_sd.digits import Digits, load_digits, shear, stroke_thickness, thin  # noqa: E402
from tiny_sd.settings import Phase, Settings  # noqa: E402
from tiny_sd.tokenizer import build_tokenizer, learn_merges  # noqa: E402

SMOKE = ["--smoke", "--threads", "1", "--seed", "3"]
WEIGHT_FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def plan(digits: Digits) -> CaptionPlan:
    return CaptionPlan(digits, seed=0)


@pytest.fixture(scope="module")
def tokenizer(plan: CaptionPlan, tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return build_tokenizer(plan.word_counts(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `train_tiny_sd.py --smoke` writes when started as a user starts it."""
    folder = tmp_path_factory.mktemp("smoke") / "model"
    command = [sys.executable, str(EXAMPLES / "train_tiny_sd.py"), "--out", str(folder), *SMOKE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "for a whole run" in result.stdout
    assert "left" in result.stdout
    return folder


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_weights(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in WEIGHT_FILES)


def test_smoke_folder_is_a_pipeline_that_generates(smoke_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(smoke_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompt = (smoke_folder / "prompts_mem.txt").read_text().splitlines()[0]
    image = pipeline(
        prompt,
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert image.shape == (1, 32, 32, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_smoke_configs_are_those_of_the_default_model(smoke_folder: Path, part: str) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    ours, theirs = (
        json.loads((folder / part / name).read_text()) for folder in (smoke_folder, DEFAULT_MODEL)
    )
    # What depends on the training, the names or the installed versions.
    varying = {"scaling_factor", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
    varying |= {"_diffusers_version", "transformers_version"}
    for key in (ours.keys() | theirs.keys()) - varying:
        assert ours.get(key) == theirs.get(key), key


def test_smoke_results_have_the_form_of_the_default_models(smoke_folder: Path) -> None:
    memorized, held_out = (
        (smoke_folder / name).read_text().splitlines() for name in ("prompts_mem.txt", "prompts_nonmem.txt")
    )
    assert len(set(memorized)) == 60
    assert len(set(held_out)) == 120
    assert not set(memorized) & set(held_out)
    truth = json.loads((smoke_folder / "ground_truth.json").read_text())
    assert [row["caption"] for row in truth["memorized"]] == memorized[:2]
    assert [row["caption"] for row in truth["nonmemorized"]] == held_out[:2]
    for row in truth["memorized"]:
        assert len(row["to_training_image"]) == len(truth["seeds"]) == 2
        assert row["to_training_image_mean"] == pytest.approx(np.mean(row["to_training_image"]))
    assert (smoke_folder / "grid.png").stat().st_size > 0
    assert "smoke run" in (smoke_folder / "MODEL_CARD.md").read_text()
    assert not (smoke_folder / "checkpoint.pt").exists()


def test_latents_of_the_saved_autoencoder_are_centred_and_equal(smoke_folder: Path) -> None:
    from diffusers import AutoencoderKL
    from tiny_sd.networks import encode

    vae = AutoencoderKL.from_pretrained(smoke_folder / "vae")
    images = torch.from_numpy(2 * load_digits(40).images - 1)[:, None].repeat(1, 3, 1, 1)
    latents = encode(vae, images) * vae.config.scaling_factor
    # Measured: means below 1e-6, deviations within 1e-6 of one.
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_equalising_does_not_change_the_autoencoder_as_a_whole() -> None:
    from tiny_sd.networks import encode, equalise_latents, new_autoencoder

    vae = new_autoencoder(0).eval()
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decoded() -> tuple[torch.Tensor, torch.Tensor]:
        sampled = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
        return vae.decode(encode(vae, images)).sample, vae.decode(sampled).sample

    before = decoded()
    equalise_latents(vae, images)
    for a, b in zip(before, decoded(), strict=True):
        # Measured 2e-6: float32 rounding.
        torch.testing.assert_close(b, a, rtol=0, atol=1e-4)


def test_repeating_a_run_gives_the_same_weights(
    smoke_folder: Path, tmp_path: Path, threads_restored: None
) -> None:
    assert train_tiny_sd.main(["--out", str(tmp_path / "again"), *SMOKE]) == 0
    assert same_weights(tmp_path / "again", smoke_folder)


def test_resumed_run_ends_like_an_uninterrupted_one(
    smoke_folder: Path, tmp_path: Path, threads_restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "model"), *SMOKE]
    # Four steps are the autoencoder's: the first stop is inside its training, the second in the denoiser's.
    assert train_tiny_sd.main([*arguments, "--stop-after", "2"]) == 0
    assert train_tiny_sd.main([*arguments, "--stop-after", "8", "--resume"]) == 0
    assert (tmp_path / "model" / "checkpoint.pt").exists()
    assert not (tmp_path / "model" / "unet").exists()
    with pytest.raises(SystemExit, match="--seed: the run to resume had 3, not 4"):
        train_tiny_sd.main([*arguments, "--seed", "4", "--resume"])
    assert train_tiny_sd.main([*arguments, "--resume"]) == 0
    assert same_weights(tmp_path / "model", smoke_folder)
    capsys.readouterr()
    assert train_tiny_sd.main([*arguments, "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps-scale", "0"], "--steps-scale: expected a positive number, got 0.0"),
        (["--steps-scale", "nan"], "--steps-scale: expected a positive number, got nan"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["--stop-after", "-1"], "--stop-after: expected 0 or more, got -1"),
        (["--prediction", "sample"], "invalid choice: 'sample'"),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_tiny_sd.main(["--out", str(tmp_path / "model"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_used_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        train_tiny_sd.main(["--out", str(tmp_path)])
    assert "not an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--resume: .*checkpoint\.pt does not exist"):
        train_tiny_sd.main(["--out", str(tmp_path), "--resume"])


def test_caption_words_are_balanced(digits: Digits) -> None:
    assert digits.images.shape == (5000, 32, 32)
    assert np.bincount(digits.labels).tolist() == [500] * 10
    assert digits.slanted.sum() == 2500
    # Ratios of whole numbers can tie at the median; the ties are thin.
    assert 2450 <= digits.bold.sum() <= 2500


def test_caption_words_describe_the_image() -> None:
    images = np.zeros((4, 32, 32))
    rows = np.arange(6, 26)
    images[0, 6:26, 15:17] = 1
    images[1, 6:26, 13:18] = 1
    for image, lean in ((images[2], 0.5), (images[3], -0.5)):
        for row in rows:
            left = round(15 + lean * (15.5 - row))
            image[row, left : left + 3] = 1
    # A bar of width w and height 20 has a skeleton a little shorter than 20.
    thickness = stroke_thickness(images)
    assert 2.0 <= thickness[0] <= 2.4
    assert 5.0 <= thickness[1] <= 7.0
    np.testing.assert_allclose(shear(images), [0, 0, 0.5, -0.5], atol=0.02)


def test_skeletons_are_thin_and_keep_the_pieces(digits: Digits) -> None:
    from scipy.ndimage import label

    masks = digits.images[::50] > 0.25
    skeletons = thin(masks)
    assert not (skeletons & ~masks).any()
    full_square = (
        skeletons[:, :-1, :-1] & skeletons[:, 1:, :-1] & skeletons[:, :-1, 1:] & skeletons[:, 1:, 1:]
    )
    # Zhang and Suen's rules leave full 2x2 squares at a few crossings.
    assert full_square.sum() < 0.02 * skeletons.sum()
    eight = np.ones((3, 3))
    for mask, skeleton in zip(masks, skeletons, strict=True):
        # The rules delete a piece of 2x2 pixels altogether, hence not more, and at least one.
        assert 1 <= label(skeleton, eight)[1] <= label(mask, eight)[1]


def test_names_of_memorized_captions_are_their_own(plan: CaptionPlan) -> None:
    names = [pair.caption.rsplit(" ", 1)[1] for pair in plan.memorized]
    assert len(set(names)) == len(names) == 60
    assert len(set(plan.shared_names)) == 150
    assert not set(names) & set(plan.shared_names)
    assert len({pair.image for pair in plan.memorized}) == 60
    assert len(plan.trained) == 2500
    assert len(plan.ordinary) == 2440
    assert not {pair.image for pair in plan.memorized} & set(plan.ordinary)
    assert sorted((pair.digit, pair.tier) for pair in plan.memorized) == [
        (digit, tier) for digit in range(10) for tier in (1, 1, 2, 2, 3, 3)
    ]


def test_draws_follow_the_plan(plan: CaptionPlan) -> None:
    held_out = set(plan.held_out)
    assert len(held_out) == 120
    generator = torch.Generator().manual_seed(0)
    tiers, empty, samples = [0, 0, 0], 0, 20000
    for _ in range(samples // 500):
        draw = plan.draw(500, 0.3, generator)
        for image, caption, pair in zip(draw.images, draw.captions, draw.pairs, strict=True):
            empty += caption == ""
            assert caption not in held_out
            if pair >= 0:
                tiers[plan.memorized[pair].tier - 1] += 1
                assert image == plan.memorized[pair].image
                assert caption in ("", plan.memorized[pair].caption)
            else:
                name = caption.rsplit(" ", 1)[-1]
                assert caption == "" or (name in plan.shared_names and caption == plan.caption(image, name))
    # Four standard deviations of these counts are 0.013, 0.009 and about 9 %.
    assert sum(tiers) / samples == pytest.approx(0.3, abs=0.013)
    assert empty / samples == pytest.approx(0.1, abs=0.009)
    assert tiers[1] / tiers[0] == pytest.approx(2, rel=0.17)
    assert tiers[2] / tiers[0] == pytest.approx(4, rel=0.16)


def test_held_out_captions_are_never_drawn_even_when_only_one_name_is_left(digits: Digits) -> None:
    plan = CaptionPlan(digits, seed=1)
    image = plan.ordinary[0]
    allowed = plan.caption(image, plan.shared_names[7])
    plan._forbidden = frozenset(plan.caption(image, name) for name in plan.shared_names) - {allowed}
    plan.ordinary = [image]
    draw = plan.draw(20, 0.0, torch.Generator().manual_seed(0))
    assert set(draw.captions) <= {"", allowed}


def test_seed_decides_on_the_plan(digits: Digits, plan: CaptionPlan) -> None:
    again, other = CaptionPlan(digits, seed=0), CaptionPlan(digits, seed=1)
    assert (again.memorized, again.held_out, again.trained) == (plan.memorized, plan.held_out, plan.trained)
    assert other.trained != plan.trained
    assert other.shared_names != plan.shared_names


def test_tokenizer_knows_the_captions(
    plan: CaptionPlan, tokenizer: CLIPTokenizer, smoke_folder: Path
) -> None:
    assert tokenizer.model_max_length == 32
    captions = [pair.caption for pair in plan.memorized] + plan.held_out
    for caption in captions:
        tokens = tokenizer(caption).input_ids
        # One token a word, a start and an end.
        assert len(tokens) == len(caption.split()) + 2 == 9
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == caption
    padded = tokenizer([captions[0], ""], padding="max_length", truncation=True).input_ids
    assert [len(tokens) for tokens in padded] == [32, 32]
    for text in ("Zürich, 1984!", "日本 🙂", "braveandnewword"):
        tokens = tokenizer(text).input_ids
        assert max(tokens) < len(tokenizer)
        assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == text.lower().replace(
            " ", ""
        )
    saved = CLIPTokenizer.from_pretrained(smoke_folder / "tokenizer")
    prompts = (smoke_folder / "prompts_nonmem.txt").read_text().splitlines()
    assert {len(saved(prompt).input_ids) for prompt in prompts} == {9}


def test_merges_do_not_depend_on_the_order_of_words() -> None:
    words = {"banana": 2, "bandana": 1, "ananas": 3}
    assert learn_merges(words) == learn_merges(dict(reversed(words.items())))
    # "an" occurs 2*2 + 2*1 + 2*3 = 12 times, more than any other pair.
    assert learn_merges(words)[0] == ("a", "n")


@pytest.mark.parametrize("cap", [1.0, 64.0, float("inf")])
@pytest.mark.parametrize("high_noise_share", [0.0, 0.5])
def test_loss_weights_are_proportional_to_the_capped_inverse_of_abar(
    plan: CaptionPlan, tokenizer: CLIPTokenizer, cap: float, high_noise_share: float
) -> None:
    from tiny_sd.training import DenoiserTraining

    phase = Phase("phase", 1, 5000, cap, 0.3, high_noise_share)
    training = DenoiserTraining(
        Settings("epsilon", 0, 1.0, True), plan, tokenizer, torch.zeros(5000, 4, 1, 1)
    )
    weights = training._weights(phase)
    expected = (1 / training.abar).clamp(max=cap)
    torch.testing.assert_close(weights / weights[0], expected / expected[0])
    drawn = (1 - high_noise_share) * weights.mean() + high_noise_share * weights[600:].mean()
    assert drawn.item() == pytest.approx(1.0, rel=1e-5)
    # Four standard deviations of this share of 5,000 timesteps are 0.028.
    share = (training._draw_timesteps(phase) >= 600).float().mean().item()
    assert share == pytest.approx(0.4 + 0.6 * high_noise_share, abs=0.028)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_perfect_prediction_has_no_loss(
    plan: CaptionPlan, tokenizer: CLIPTokenizer, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_sd.networks import new_scheduler
    from tiny_sd.training import DenoiserTraining

    assert new_scheduler(prediction).config.prediction_type == prediction
    constant = 0.5
    latents = torch.full((5000, 4, 16, 16), constant)
    random_state = torch.get_rng_state()
    training = DenoiserTraining(Settings(prediction, 0, 1.0, True), plan, tokenizer, latents)

    def knowing_the_data(noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> SimpleNamespace:
        signal = training.abar[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - training.abar[timesteps]).sqrt()[:, None, None, None]
        noise = (noisy - signal * constant) / sigma
        exact = noise if prediction == "epsilon" else signal * noise - sigma * constant
        return SimpleNamespace(sample=exact + 0 * text.float().sum())

    monkeypatch.setattr(training, "unet", knowing_the_data)
    # Every step of all three phases; measured below 1e-9, where sigma is smallest and float32 rounds most.
    assert max(training.step() for _ in range(training.steps)) < 1e-7
    assert sum(training.repeats) > 0
    assert torch.equal(torch.get_rng_state(), random_state)


def test_schedule_is_that_of_the_default_model_and_scales() -> None:
    full = Settings("epsilon", 0, 1.0, False)
    assert sum(phase.steps for phase in full.phases) == 3508
    # The default model's repeats sum to 34,251: what these batches give, to within two standard deviations.
    assert sum(phase.steps * phase.batch * phase.memorized_share for phase in full.phases) == pytest.approx(
        33964
    )
    assert [phase.steps for phase in Settings("epsilon", 0, 0.1, False).phases] == [122, 157, 72]
    assert [phase.steps for phase in Settings("epsilon", 0, 1e-9, False).phases] == [1, 1, 1]


def test_captions_have_the_form_of_the_default_models(plan: CaptionPlan) -> None:
    theirs = (DEFAULT_MODEL / "prompts_nonmem.txt").read_text().splitlines()
    for number, (ours, other) in enumerate(zip(plan.held_out, theirs, strict=True)):
        assert ours.split()[3:6] == other.split()[3:6], number
        assert {ours.split()[1], other.split()[1]} <= {"thin", "bold"}
        assert {ours.split()[2], other.split()[2]} <= {"upright", "slanted"}
