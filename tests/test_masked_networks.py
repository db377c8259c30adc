"""Masks of attention inside a network: one operation still, and no matrix of scores in memory."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from oracles import oracle_jvp, oracle_vjp
from small_network import normal
from torch import Tensor

from sharpcore import Linearization, linearize
from sharpcore.testing.tolerance import relative_error

LENGTH = 96


def layers(x: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, keys: int = LENGTH) -> Tensor:
    """Three layers of attention; x [2, 3, 96, 8]."""
    for _ in range(3):
        hidden = x[:, :, :keys]
        x = x + F.scaled_dot_product_attention(
            x, hidden.sin(), hidden.cos(), attn_mask=mask, is_causal=is_causal
        )
    return x


def check(linearization: Linearization, f: object, x: Tensor) -> None:
    """Measured at most 1e-15."""
    tangents = normal(2, *x.shape, seed=7)
    names = [node.name for node in linearization.program.nodes]
    assert names.count("attention") == 3
    assert "_softmax" not in names
    for _ in range(3):
        assert relative_error(linearization.jvp(tangents), oracle_jvp(f, x, tangents)) < 1e-13
        assert relative_error(linearization.vjp(tangents), oracle_vjp(f, x, tangents)) < 1e-13


@pytest.mark.parametrize("keys", [LENGTH, 40, 1])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_causal_attention_has_no_matrix_in_memory(backend: str, keys: int) -> None:
    x = normal(2, 3, LENGTH, 8)

    def f(x: Tensor) -> Tensor:
        return layers(x, is_causal=True, keys=keys)

    linearization = linearize(f, x, backend=backend)
    check(linearization, f, x)
    kept = [tensor for _, tensor in linearization._residuals.tensors()]
    kept += [arg for node in linearization.program.nodes for arg in node.args if isinstance(arg, Tensor)]
    assert max(tensor.untyped_storage().nbytes() for tensor in kept) <= x.nbytes < LENGTH * LENGTH * 8


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_mask_may_be_bound(backend: str, boolean: bool) -> None:
    """It is another one at the next point, as that of another prompt is."""
    x, other = normal(2, 3, LENGTH, 8), normal(2, 3, LENGTH, 8, seed=2)
    masks = [normal(2, 1, 1, LENGTH, seed=seed) for seed in (3, 4)]
    masks = [mask > 0 for mask in masks] if boolean else masks
    linearization = linearize(layers, x, masks[0], backend=backend)
    check(linearization, lambda x: layers(x, masks[0]), x)
    linearization.relinearize(other, masks[1])
    check(linearization, lambda x: layers(x, masks[1]), other)
    assert relative_error(linearization.value, layers(other, masks[1])) < 1e-14
