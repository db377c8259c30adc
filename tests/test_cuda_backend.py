"""The linear program on the cuda backend: whole networks whose kernels run in Triton's interpreter."""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Any

import pytest
import torch
from interpreted import DEVICE, needs_triton
from torch import Tensor, nn

from sharpcore import linearize
from sharpcore.backends import get_backend
from sharpcore.testing.tolerance import assert_error_at_most, relative_error

pytestmark = needs_triton


class Block(nn.Module):
    """What a UNet is made of, small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 12)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.layer_norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.q, self.kv = nn.Linear(12, 12), nn.Linear(5, 24)
        self.wide, self.narrow = nn.Linear(12, 32), nn.Linear(16, 12)
        self.last = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden + self.conv(nn.functional.silu(self.norm(hidden)))
        tokens = hidden.flatten(2).transpose(1, 2)
        tokens = tokens + self._attend(*self.qkv(self.layer_norm(tokens)).chunk(3, -1))
        tokens = tokens + self._attend(self.q(tokens), *self.kv(prompt).chunk(2, -1))
        value, gate = self.wide(tokens).chunk(2, -1)
        tokens = tokens + self.narrow(value * nn.functional.gelu(gate))
        image = tokens.transpose(1, 2).reshape(hidden.shape)
        return self.last(nn.functional.interpolate(image, scale_factor=2.0, mode="nearest"))

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def network() -> tuple[Any, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block().to(DEVICE).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x, prompt = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((2, 3, 10, 6), (2, 7, 5)))
    return block, x, prompt


def test_kernels_of_the_backend_run(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of kernel is launched in a product, its transpose and a move: nothing falls back unseen."""
    get_backend("cuda", device=DEVICE, dtype=torch.float32)
    launched, run = set(), importlib.import_module("sharpcore.kernels.tuning").run

    def counted(kernel: Any, *arguments: Any) -> None:
        launched.add(kernel.fn.__module__.removeprefix("sharpcore.kernels."))
        run(kernel, *arguments)

    for name, module in list(sys.modules.items()):
        if name.startswith("sharpcore.kernels.") and hasattr(module, "run"):
            monkeypatch.setattr(module, "run", counted)
    block, x, prompt = network
    lin = linearize(block, x, prompt, backend="cuda")
    lin.jvp(torch.ones(1, *x.shape, device=DEVICE))
    lin.vjp(torch.ones(1, *x.shape, device=DEVICE))
    lin.relinearize(x + 1)
    assert launched >= {
        "attention_tangent",
        "geglu_tangent",
        "group_norm_silu_forward",
        "group_norm_silu_tangent",
        "layer_norm_tangent",
        "upsample_nearest_tangent",
    }


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_products_of_a_network(network: Any, precision: str) -> None:
    block, x, prompt = network
    generator = torch.Generator().manual_seed(2)
    given = torch.randn((3, *x.shape), generator=generator).to(DEVICE)
    exact = linearize(copy.deepcopy(block).double(), x.double(), prompt.double(), backend="reference")
    plain = linearize(block, x, prompt, backend="reference", precision=precision)
    ours = linearize(block, x, prompt, backend="cuda", precision=precision)
    for point in (x, x + 0.5):
        if point is not x:
            for lin in (exact, plain, ours):
                lin.relinearize(point.to(lin.x.dtype))
        assert relative_error(ours.value, exact.value) < 2e-6
        for name in ("jvp", "vjp"):
            expected = getattr(exact, name)(given.double())
            for _ in range(2):
                error = relative_error(getattr(ours, name)(given), expected)
                rival = relative_error(getattr(plain, name)(given), expected)
                assert_error_at_most(error, rival, factor=2.0, floor=2e-6)


def test_networks_in_16_bits(network: Any) -> None:
    """Their own dtype is that of the products."""
    block, x, prompt = network
    given = torch.ones(2, *x.shape, device=DEVICE)
    exact = linearize(copy.deepcopy(block).double(), x.double(), prompt.double(), backend="reference")
    expected = exact.jvp(given.double())
    low = [t.bfloat16() for t in (x, prompt, given)]
    small = copy.deepcopy(block).bfloat16()
    errors = [
        relative_error(linearize(small, *low[:2], backend=backend).jvp(low[2]), expected)
        for backend in ("cuda", "reference")
    ]
    assert_error_at_most(errors[0], errors[1], factor=2.0)
