"""fingerprint: equal for an untouched network, different after anything that changes what it computes."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from small_network import Small, small_network

from sharpcore import NonFiniteError
from sharpcore.fingerprint import fingerprint


def test_running_a_network_leaves_its_fingerprint(tiny_pipe):
    before = fingerprint(tiny_pipe.unet)
    with torch.no_grad():
        tiny_pipe.unet(torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, 32, 64))
    assert fingerprint(tiny_pipe.unet) == before
    assert hash(before) == hash(fingerprint(tiny_pipe.unet))


def test_another_network_with_the_same_weights_differs():
    network = small_network()
    assert fingerprint(copy.deepcopy(network)) != fingerprint(network)


def double_row(weight):
    weight.data[1] *= 2


SMALL_CHANGES = {
    "one weight in place": lambda net: net.head.bias[0].zero_(),
    "one weight through .data": lambda net: double_row(net.head.weight),
    "the last bit of one weight": lambda net: net.head.bias.data[1].mul_(1 + 2**-50),
    "a parameter replaced": lambda net: setattr(net.head, "bias", torch.nn.Parameter(net.head.bias.clone())),
    "a weight that is written with itself": lambda net: net.head.bias.copy_(net.head.bias.clone()),
    "a new module": lambda net: net.add_module("extra", torch.nn.Identity()),
    "a module replaced": lambda net: setattr(net.stem, "norm", torch.nn.Identity()),
    "a buffer": lambda net: net.register_buffer("extra", torch.ones(1)),
    "training": lambda net: net.stem.train(),
    "a setting": lambda net: setattr(net.stem.norm, "eps", 1e-3),
    "a setting in a list": lambda net: setattr(net.stem, "widths", [1, 2.5]),
    "a setting in a dictionary": lambda net: setattr(net.stem, "scaling", {"default": 0.5}),
    "a hook": lambda net: net.stem.register_forward_hook(lambda *_: None),
    "a hook before": lambda net: net.register_forward_pre_hook(lambda *_: None),
    "a forward of its own": lambda net: setattr(net.stem, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", SMALL_CHANGES)
def test_every_change_shows(change):
    network = small_network()
    network.stem.scaling, network.stem.widths = {"default": 1.0}, [1, 2]
    before = fingerprint(network)
    assert fingerprint(network) == before
    with torch.no_grad():
        SMALL_CHANGES[change](network)
    assert fingerprint(network) != before


def test_another_hook_in_the_place_of_one_that_was_removed():
    network = small_network()
    handle = network.stem.register_forward_hook(lambda *_: None)
    before = fingerprint(network)
    handle.remove()
    assert fingerprint(network) != before
    network.stem.register_forward_hook(lambda *_: None)
    assert fingerprint(network) != before


def scale_adapter(unet, scale):
    unet.set_adapters(["default"], [scale])


UNET_CHANGES = {
    "adapter": lambda unet: unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="other"
    ),
    "scale": lambda unet: scale_adapter(unet, 0.5),
    "disabled": lambda unet: unet.disable_adapters(),
    "fused": lambda unet: unet.fuse_lora(),
    "FreeU": lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "processor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "fused projections": lambda unet: unet.delete_adapters("default") or unet.fuse_qkv_projections(),
    "dtype": lambda unet: unet.double(),
}


@pytest.mark.parametrize("change", UNET_CHANGES)
def test_changes_of_a_unet_with_lora(fresh_pipe, change):
    unet = fresh_pipe.unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="default"
        )
        before = fingerprint(unet)
        assert fingerprint(unet) == before
        UNET_CHANGES[change](unet)
    assert fingerprint(unet) != before


def test_freeu_switched_off_again(fresh_pipe):
    """It leaves attributes behind; what matters is that both changes show."""
    seen = [fingerprint(fresh_pipe.unet)]
    fresh_pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    seen.append(fingerprint(fresh_pipe.unet))
    fresh_pipe.unet.disable_freeu()
    seen.append(fingerprint(fresh_pipe.unet))
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_that_is_not_finite_is_named(value):
    network = small_network()
    network.stem.norm.weight.data[2] = value
    with pytest.raises(NonFiniteError, match=r"^Small: its parameter stem\.norm\.weight holds"):
        fingerprint(network)


def test_buffers_may_hold_infinities_such_as_masks():
    network = Small()
    network.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    assert fingerprint(network) == fingerprint(network)


def test_weights_beyond_the_range_of_their_sum_in_their_own_dtype():
    network = torch.nn.Linear(100, 100).to(torch.float16)
    network.weight.data.fill_(6e4)
    assert fingerprint(network) == fingerprint(network)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        network = Small()
    before = fingerprint(network)
    with torch.inference_mode():
        network.head.bias.add_(1)
    assert fingerprint(network) != before
