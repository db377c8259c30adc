"""Norms whose scale and shift come from the timestep: fused where that is right, exact everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from oracles import oracle_jvp, oracle_vjp
from torch import Tensor, nn

from sharpcore import Linearization, linearize
from sharpcore.testing.tolerance import relative_error

BATCH, CHANNELS, GROUPS = 2, 12, 3


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, OTHER = draw(BATCH, CHANNELS, 5, 3, seed=1), draw(BATCH, CHANNELS, 5, 3, seed=2)
TOKENS, OTHER_TOKENS = draw(BATCH, 7, CHANNELS, seed=3), draw(BATCH, 7, CHANNELS, seed=4)
WEIGHT, BIAS, MIXING = draw(CHANNELS, seed=5), draw(CHANNELS, seed=6), draw(4, 2 * CHANNELS, seed=7)
EMBEDDING, OTHER_EMBEDDING = draw(BATCH, 4, seed=8), draw(BATCH, 4, seed=9)

Network = Callable[[Tensor, Tensor], Tensor]


def image_parameters(embedding: Tensor) -> tuple[Tensor, Tensor]:
    scale, shift = (embedding @ MIXING)[:, :, None, None].chunk(2, 1)
    return scale, shift


def token_parameters(embedding: Tensor) -> tuple[Tensor, Tensor]:
    scale, shift = (embedding @ MIXING).chunk(2, 1)
    return scale[:, None], shift[:, None]


def group_norm(x: Tensor, affine: bool = True) -> Tensor:
    return F.group_norm(x, GROUPS, WEIGHT if affine else None, BIAS if affine else None)


def layer_norm(x: Tensor, affine: bool = True) -> Tensor:
    return F.layer_norm(x, (CHANNELS,), WEIGHT if affine else None, BIAS if affine else None)


def instructions(linearization: Linearization) -> list[str]:
    """The operations of the linear program."""
    program = linearization.program
    return [program.nodes[step.node].name for step in program.steps]


def check(network: Network, x: Tensor, other: Tensor, backend: str = "auto") -> Linearization:
    """Value, jvp and vjp at two points with two embeddings; x is not a constant of the network."""
    linearization = linearize(network, x, EMBEDDING, backend=backend)
    for point, embedding in ((x, EMBEDDING), (other, OTHER_EMBEDDING), (x, EMBEDDING)):
        linearization.relinearize(point, embedding)

        def at_embedding(x: Tensor, embedding: Tensor = embedding) -> Tensor:
            return network(x, embedding)

        value = at_embedding(point)
        tangents = draw(3, *x.shape, seed=11)
        cotangents = draw(3, *value.shape, seed=12)
        # Worst measured of the three: 7e-16.
        assert relative_error(linearization.value, value) < 1e-13
        expected = oracle_jvp(at_embedding, point, tangents)
        assert relative_error(linearization.jvp(tangents), expected) < 1e-13
        assert (
            relative_error(linearization.vjp(cotangents), oracle_vjp(at_embedding, point, cotangents)) < 1e-13
        )
    return linearization


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_resnet_norm_is_one_instruction(backend: str, affine: bool, channels_last: bool) -> None:
    """The second norm of a ResnetBlock2D with scale_shift, and its SiLU."""

    def network(x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = image_parameters(embedding)
        return F.silu(group_norm(x, affine) * (1 + scale) + shift)

    x, other = X, OTHER
    if channels_last:
        x, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
    assert instructions(check(network, x, other, backend)) == ["group_norm_scale_shift"]


SCALE_SHIFT: dict[str, Network] = {
    "without SiLU": lambda x, e: group_norm(x) * (1 + image_parameters(e)[0]) + image_parameters(e)[1],
    "scale alone": lambda x, e: group_norm(x) * image_parameters(e)[0],
    "scale, SiLU": lambda x, e: F.silu(group_norm(x) * image_parameters(e)[0]),
    "shift, SiLU": lambda x, e: F.silu(group_norm(x) + image_parameters(e)[1]),
    "operands exchanged": lambda x, e: F.silu(
        image_parameters(e)[1] + (1 + image_parameters(e)[0]) * group_norm(x)
    ),
    "one for all samples": lambda x, e: F.silu(
        group_norm(x) * image_parameters(e)[0][:1] + BIAS[:, None, None]
    ),
    "one for all channels": lambda x, e: F.silu(group_norm(x) * image_parameters(e)[0][:, :1] + e.mean()),
    "in place": lambda x, e: F.silu(
        group_norm(x).mul_(1 + image_parameters(e)[0]).add_(image_parameters(e)[1]), inplace=True
    ),
    "constants": lambda x, e: (
        F.silu(group_norm(x) * WEIGHT.view(1, -1, 1, 1) + BIAS.view(1, -1, 1, 1)) + 0 * e.sum()
    ),
}


@pytest.mark.parametrize("name", SCALE_SHIFT)
def test_group_norm_variants_are_one_instruction(name: str) -> None:
    found = instructions(check(SCALE_SHIFT[name], X, OTHER))
    assert found == ["group_norm_scale_shift"]


TOKEN_SCALE: dict[str, Network] = {
    "adaptive": lambda x, e: layer_norm(x) * (1 + token_parameters(e)[0]) + token_parameters(e)[1],
    "no parameters of its own": lambda x, e: (
        layer_norm(x, False) * (1 + token_parameters(e)[0]) + token_parameters(e)[1]
    ),
    "one for all samples": lambda x, e: layer_norm(x) * (1 + token_parameters(e)[0][:1]),
    "operands exchanged": lambda x, e: token_parameters(e)[1] + (1 + token_parameters(e)[0]) * layer_norm(x),
    "constant": lambda x, e: layer_norm(x) * WEIGHT + e.sum(),
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", TOKEN_SCALE)
def test_layer_norm_variants_are_one_instruction(name: str, backend: str) -> None:
    assert instructions(check(TOKEN_SCALE[name], TOKENS, OTHER_TOKENS, backend)) == ["layer_norm_scale"]


def test_layer_norm_over_two_axes() -> None:
    def network(x: Tensor, embedding: Tensor) -> Tensor:
        scale = (embedding @ MIXING)[:, None, :].expand(-1, 7, -1)[..., :CHANNELS]
        return F.layer_norm(x, x.shape[1:]) * scale

    assert instructions(check(network, TOKENS, OTHER_TOKENS)) == ["layer_norm_scale"]


def reused(x: Tensor, embedding: Tensor) -> Tensor:
    scale, shift = image_parameters(embedding)
    normalized = group_norm(x)
    scaled = normalized * (1 + scale)
    shifted = scaled + shift
    return F.silu(shifted) + shifted.sin() + scaled.cos() + normalized.tanh()


def scaled_twice(x: Tensor, embedding: Tensor) -> Tensor:
    scale, shift = image_parameters(embedding)
    return F.silu((group_norm(x) * (1 + scale) + shift) * scale + shift)


NOT_FUSED: dict[str, Network] = {
    "scale depends on x": lambda x, e: group_norm(x) * (1 + x.mean((2, 3), keepdim=True)),
    "shift depends on x": lambda x, e: F.silu(group_norm(x) + x.mean((2, 3), keepdim=True)),
    "scale of each position": lambda x, e: F.silu(group_norm(x) * OTHER),
    "shift of each position": lambda x, e: F.silu(group_norm(x) + OTHER[:, :1]),
    "shift of each column": lambda x, e: F.silu(group_norm(x) + OTHER[0, 0]),
    "more samples than x": lambda x, e: F.silu(group_norm(x[:1]) * image_parameters(e)[0]),
    "a multiple of the shift": lambda x, e: F.silu(torch.add(group_norm(x), BIAS.view(-1, 1, 1), alpha=2)),
    "a number": lambda x, e: F.silu(group_norm(x) * 1.5),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_other_operands_stay_as_they_are(name: str) -> None:
    assert "group_norm_scale_shift" not in instructions(check(NOT_FUSED[name], X, OTHER))


NOT_FUSED_TOKENS: dict[str, Network] = {
    "scale depends on x": lambda x, e: layer_norm(x) * x.mean(1, keepdim=True),
    "scale of each token": lambda x, e: layer_norm(x) * OTHER_TOKENS,
    "scale of each row": lambda x, e: layer_norm(x) * OTHER_TOKENS[:1, :, :1],
    "more samples than x": lambda x, e: layer_norm(x[:1]) * token_parameters(e)[0],
    "statistics": lambda x, e: layer_norm(x) * torch.tensor(2.0, dtype=torch.float32),
}


@pytest.mark.parametrize("name", NOT_FUSED_TOKENS)
def test_other_operands_of_a_layer_norm_stay_as_they_are(name: str) -> None:
    assert "layer_norm_scale" not in instructions(check(NOT_FUSED_TOKENS[name], TOKENS, OTHER_TOKENS))


@pytest.mark.parametrize("network", [reused, scaled_twice])
def test_intermediate_results_may_be_read_again(network: Network) -> None:
    check(network, X, OTHER)


def test_scale_from_a_detached_x() -> None:
    """A scale that depends on x but carries no tangent moves with the point."""

    def network(x: Tensor, embedding: Tensor) -> Tensor:
        return F.silu(group_norm(x) * x.detach().mean((2, 3), keepdim=True) + embedding.sum())

    # Double backward: forward mode differentiates through detach().
    linearization = linearize(network, X, EMBEDDING)
    assert instructions(linearization) == ["group_norm_scale_shift"]
    for point in (X, OTHER):
        linearization.relinearize(point, EMBEDDING)
        cotangents = draw(2, *X.shape, seed=13)
        expected = oracle_vjp(lambda x: network(x, EMBEDDING), point, cotangents)
        # Measured: 4e-16.
        assert relative_error(linearization.vjp(cotangents), expected) < 1e-13


def test_scale_of_another_dtype_is_left_alone() -> None:
    """A float32 norm times a float64 scale is a float64 product."""

    def network(x: Tensor, embedding: Tensor) -> Tensor:
        normalized = F.group_norm(x, GROUPS)
        return F.silu(normalized * (1 + image_parameters(embedding)[0])).float()

    linearization = linearize(network, X.float(), EMBEDDING)
    assert "group_norm_scale_shift" not in instructions(linearization)


@pytest.mark.parametrize("name", ["scale_shift", "latent_upscaler", "unconditional_resnet_sampling"])
def test_networks_of_diffusers_are_fused(name: str) -> None:
    """Every norm that is scaled and shifted by the time embedding becomes one instruction."""
    case = NETWORKS[name].build(torch.float64)
    found = instructions(linearize(case.f, case.x))
    blocks = sum(
        type(m).__name__ in ("ResnetBlock2D", "ResnetBlockCondNorm2D") for m in case.module.modules()
    )
    assert found.count("group_norm_scale_shift") >= blocks
    assert "silu" not in found


def make_block(norm_type: str) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    extra = (
        {"num_embeds_ada_norm": 10}
        if norm_type.startswith("ada_norm") and norm_type != "ada_norm_single"
        else {}
    )
    return BasicTransformerBlock(CHANNELS, 2, 6, norm_type=norm_type, **extra).double().eval()


@pytest.mark.parametrize(("norm_type", "fused"), [("ada_norm_zero", 2), ("ada_norm_single", 2)])
def test_transformer_blocks_of_diffusers(norm_type: str, fused: int) -> None:
    """A block of DiT, and one of PixArt."""
    with torch.random.fork_rng(devices=[]):
        block = make_block(norm_type)
    labels = torch.tensor([3, 5])

    def network(x: Tensor, embedding: Tensor) -> Tensor:
        if norm_type == "ada_norm_single":
            timestep = (embedding @ draw(4, 6 * CHANNELS, seed=14)).view(BATCH, 1, -1)
            return block(x, timestep=timestep)
        return block(x, timestep=embedding[:, 0].exp(), class_labels=labels)

    found = instructions(check(network, TOKENS, OTHER_TOKENS))
    assert found.count("layer_norm_scale") >= fused
