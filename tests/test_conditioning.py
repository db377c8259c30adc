"""Conditioning: prompts encoded as the pipelines do it, batching, and pipelines that are refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers

import sharpcore
from sharpcore import InvalidInput, ScoreFunction, UnsupportedModel
from sharpcore.conditioning import (
    check_pipeline,
    concat_conditioning,
    dropped_tokens,
    encode_prompts,
    encode_unconditional,
    latent_shape,
    repeat_conditioning,
    select_conditioning,
)

MODEL = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
PROMPTS = ["a thin upright handwritten zero by birick", "a bold slanted nine", "one"]


@pytest.fixture(scope="module")
def pipe():
    return diffusers.StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)


@pytest.fixture(scope="module")
def xl_pipe(pipe):
    """A Stable Diffusion XL pipeline with two random text encoders of widths 16 and 24."""

    def text_config(width):
        return transformers.CLIPTextConfig(
            vocab_size=len(pipe.tokenizer),
            hidden_size=width,
            intermediate_size=32,
            projection_dim=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=pipe.tokenizer.model_max_length,
            bos_token_id=pipe.tokenizer.bos_token_id,
            eos_token_id=pipe.tokenizer.eos_token_id,
            pad_token_id=pipe.tokenizer.pad_token_id,
        )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=40,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        )
        encoders = (
            transformers.CLIPTextModel(text_config(16)).eval(),
            transformers.CLIPTextModelWithProjection(text_config(24)).eval(),
        )
    return diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def with_parts(pipe, **parts):
    """A shallow stand-in for a pipeline with some of its parts replaced."""
    names = ("unet", "scheduler", "tokenizer", "text_encoder", "encode_prompt", "vae_scale_factor")
    return SimpleNamespace(**{**{name: getattr(pipe, name) for name in names}, **parts})


def with_config(pipe, **options):
    config = SimpleNamespace(**{**dict(pipe.unet.config), **options})
    return with_parts(pipe, unet=SimpleNamespace(config=config))


# --- prompts ------------------------------------------------------------------------------------------------


def test_prompts_as_the_pipeline_encodes_them(pipe):
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    found = encode_prompts(pipe, PROMPTS)
    assert found.keys() == {"encoder_hidden_states"}
    assert not found["encoder_hidden_states"].requires_grad
    # 1e-6: the pipeline encodes the batch at once, here each prompt is encoded alone (float32).
    torch.testing.assert_close(found["encoder_hidden_states"], prompt, rtol=1e-6, atol=1e-6)
    empty = encode_unconditional(pipe)["encoder_hidden_states"]
    assert empty.shape == (1, 32, 64)
    torch.testing.assert_close(empty, negative[:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["pipe", "xl_pipe"])
def test_an_embedding_does_not_depend_on_its_batch(name, request):
    pipe = request.getfixturevalue(name)
    together = encode_prompts(pipe, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone, selected = encode_prompts(pipe, [prompt]), select_conditioning(together, row)
        assert torch.equal(alone["encoder_hidden_states"], selected["encoder_hidden_states"])
        if name == "xl_pipe":
            for key, value in alone["added_cond_kwargs"].items():
                assert torch.equal(value, selected["added_cond_kwargs"][key])


@pytest.mark.parametrize("zeros", [True, False])
def test_xl_prompts_as_the_pipeline_encodes_them(xl_pipe, zeros):
    xl_pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    with torch.no_grad():
        prompt, negative, pooled, negative_pooled = xl_pipe.encode_prompt(PROMPTS, device="cpu")
    found, empty = encode_prompts(xl_pipe, PROMPTS), encode_unconditional(xl_pipe)
    added, empty_added = found["added_cond_kwargs"], empty["added_cond_kwargs"]
    for ours, theirs in (
        (found["encoder_hidden_states"], prompt),
        (added["text_embeds"], pooled),
        (empty["encoder_hidden_states"], negative[:1]),
        (empty_added["text_embeds"], negative_pooled[:1]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert bool((empty["encoder_hidden_states"] == 0).all()) == zeros
    size = 8 * xl_pipe.vae_scale_factor
    assert added["time_ids"].tolist() == [[size, size, 0, 0, size, size]] * 3
    assert empty_added["time_ids"].tolist() == [[size, size, 0, 0, size, size]]


def test_xl_image_size(xl_pipe):
    found = encode_prompts(xl_pipe, ["one"], height=32, width=48)
    assert found["added_cond_kwargs"]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]]
    with pytest.raises(InvalidInput, match="height"):
        encode_prompts(xl_pipe, ["one"], height=33)


@pytest.mark.parametrize("unconditional", [False, True])
def test_xl_network_runs_on_it(xl_pipe, unconditional):
    score = ScoreFunction.from_pipeline(xl_pipe, PROMPTS, step=[0, 3, 20], unconditional=unconditional)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = score(x)
        row = ScoreFunction.from_pipeline(xl_pipe, PROMPTS[1:2], step=3, unconditional=unconditional)(x[1:2])
    # Measured 4e-7: float32 products of other batch sizes.
    torch.testing.assert_close(together[1:2], row, rtol=1e-5, atol=1e-5)


def test_prompts_come_in_the_networks_dtype(pipe):
    mixed = copy.copy(pipe)
    mixed.unet = copy.deepcopy(pipe.unet).double()
    found = encode_prompts(mixed, ["one"])["encoder_hidden_states"]
    assert found.dtype == torch.float64
    assert torch.equal(found.float(), encode_prompts(pipe, ["one"])["encoder_hidden_states"])


def test_long_prompts_are_cut_and_counted(pipe):
    """The tokenizer's window is 32 tokens, of which 30 are the prompt's."""
    fits, long = " ".join(["thin"] * 30), " ".join(["thin"] * 33)
    assert [dropped_tokens(pipe, prompt) for prompt in ("thin", fits, long)] == [0, 0, 3]
    cut, whole = encode_prompts(pipe, [long]), encode_prompts(pipe, [fits])
    assert torch.equal(cut["encoder_hidden_states"], whole["encoder_hidden_states"])


def test_dropped_tokens_of_two_tokenizers(xl_pipe):
    assert dropped_tokens(xl_pipe, " ".join(["thin"] * 31)) == 1


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "at least one"),
        ("one", "list of strings"),
        (["one", ""], r"prompts\[1\].*blank"),
        (["one", " \t"], r"prompts\[1\].*blank"),
        (["one", 2], r"prompts\[1\].*int"),
        (None, "list of strings"),
    ],
)
def test_prompts_that_are_refused(pipe, prompts, words):
    with pytest.raises(InvalidInput, match=words):
        encode_prompts(pipe, prompts)


# --- batching -----------------------------------------------------------------------------------------------


def nested(rows: int, start: int = 0) -> dict:
    values = torch.arange(start, start + rows)
    return {"a": values[:, None] * 10, "b": {"c": values}, "scale": 0.5}


def test_repeat_select_and_concat():
    repeated = repeat_conditioning(nested(2), 3)
    assert repeated["b"]["c"].tolist() == [0, 1, 0, 1, 0, 1]
    assert repeated["a"].shape == (6, 1)
    assert repeated["scale"] == 0.5
    for rows, expected in (
        ([2, 0], [2, 0]),
        (1, [1]),
        (-1, [2]),
        (slice(1, 3), [1, 2]),
        (torch.tensor([1, 1]), [1, 1]),
    ):
        selected = select_conditioning(nested(3), rows)
        assert selected["b"]["c"].tolist() == expected
        assert selected["a"].flatten().tolist() == [10 * value for value in expected]
    joined = concat_conditioning([nested(1), nested(2, 5)])
    assert joined["b"]["c"].tolist() == [0, 5, 6]
    assert joined["a"].flatten().tolist() == [0, 50, 60]


def test_batching_that_is_refused():
    with pytest.raises(InvalidInput, match="n: "):
        repeat_conditioning(nested(1), 0)
    with pytest.raises(InvalidInput, match="parts"):
        concat_conditioning([])
    with pytest.raises(InvalidInput, match="keys"):
        concat_conditioning([nested(1), {"a": torch.ones(1)}])


# --- pipelines ----------------------------------------------------------------------------------------------


def test_pipelines_that_are_accepted(pipe, xl_pipe):
    for accepted in (pipe, xl_pipe):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_pipeline(accepted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unet": None}, "no UNet"),
        ({"encode_prompt": None}, "encode_prompt"),
        ({"text_encoder": None}, "text encoder"),
        ({"tokenizer": None}, "text encoder"),
        ({"scheduler": None}, "scheduler"),
        ({"scheduler": diffusers.DDIMScheduler(prediction_type="noise")}, "prediction type 'noise'"),
    ],
)
def test_pipelines_without_a_part(pipe, change, words):
    with pytest.raises(UnsupportedModel, match=words):
        check_pipeline(with_parts(pipe, **change))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time_cond_proj_dim": 256}, "guidance-distilled"),
        ({"in_channels": 9}, "9 channels"),
        ({"addition_embed_type": "image"}, "'image'"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_class_embeds": 7}, "num_class_embeds"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "ip_image_proj"),
    ],
)
def test_networks_that_need_more_than_a_prompt(pipe, options, words):
    check_pipeline(with_config(pipe))
    with pytest.raises(UnsupportedModel, match=words):
        check_pipeline(with_config(pipe, **options))


def test_an_xl_refiner_is_refused(xl_pipe):
    """Its added conditions hold an aesthetic score, so their width is another."""
    refiner = copy.copy(xl_pipe)
    refiner.unet = copy.deepcopy(xl_pipe.unet)
    refiner.unet.add_embedding.linear_1 = torch.nn.Linear(5 * 4 + 12, 4)
    with pytest.raises(UnsupportedModel, match="refiner"):
        encode_prompts(refiner, ["one"])


def test_the_pipeline_is_left_alone(pipe):
    state = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    training = [module.training for module in pipe.text_encoder.modules()]
    encode_prompts(pipe, PROMPTS)
    encode_unconditional(pipe)
    assert all(torch.equal(value, state[name]) for name, value in pipe.text_encoder.state_dict().items())
    assert training == [module.training for module in pipe.text_encoder.modules()]
    assert torch.is_grad_enabled()


def test_latent_shape(pipe, xl_pipe):
    assert latent_shape(pipe) == (4, 16, 16)
    assert latent_shape(pipe, height=64) == (4, 32, 16)
    assert latent_shape(pipe, 32, 64) == (4, 16, 32)
    rectangular = with_config(pipe, sample_size=[6, 9])
    assert latent_shape(rectangular) == (4, 6, 9)
    for size in ({"height": 33}, {"width": 0}, {"width": -2}):
        with pytest.raises(InvalidInput, match=next(iter(size))):
            latent_shape(pipe, **size)
