"""Functions beyond diffusers: exact products, or a refusal that names the operation."""

from __future__ import annotations

import re

import pytest
import torch
from functions import FUNCTIONS
from oracles import central_difference, double_backward_jvp, oracle_jvp

import sharpcore
from sharpcore.testing.tolerance import relative_error

# Functions whose central difference says nothing: steps, roundings and stopped gradients.
NOT_SMOOTH = {
    "through_float32",
    "mixed_dtypes",
    "detached_factor",
    "zero_derivative",
    "digamma",
    "copy_across_dtypes",
}
NOT_SMOOTH |= {"scalar_promotion"}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_function_is_exact_or_refused(name: str, backend: str) -> None:
    function = FUNCTIONS[name]
    case = function.build(torch.float64)
    try:
        linearization = sharpcore.linearize(case.f, case.x, backend=backend)
    except sharpcore.UnsupportedOperation as error:
        if not (function.refusal and re.search(function.refusal, str(error))):
            raise
        return
    generator = torch.Generator().manual_seed(12)
    tangents = torch.randn((4, *case.x.shape), generator=generator, dtype=torch.float64)
    for x in (case.x, case.x2, case.x):
        linearization.relinearize(x)
        expected = oracle_jvp(case.f, x, tangents)
        value = case.f(x).detach()
        products = linearization.jvp(tangents)
        assert relative_error(linearization.value, value) <= function.tolerance
        assert products.dtype == value.dtype
        assert relative_error(products, expected) <= function.tolerance

        cotangents = torch.randn((4, *value.shape), generator=generator, dtype=torch.float64)
        pulled = linearization.vjp(cotangents)
        assert pulled.shape == (4, *x.shape)
        forward = cotangents.reshape(4, -1) @ products.reshape(4, -1).T
        backward = pulled.reshape(4, -1) @ tangents.reshape(4, -1).T
        scale = cotangents.norm() * products.norm() + 1e-300
        assert (forward - backward).abs().max() <= function.tolerance * scale


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_oracles_agree(name: str) -> None:
    """The comparison above is worth as much as its oracle, so three independent ones are compared."""
    function = FUNCTIONS[name]
    case = function.build(torch.float64)
    tangents = torch.randn(
        (2, *case.x.shape), generator=torch.Generator().manual_seed(13), dtype=torch.float64
    )
    forward = oracle_jvp(case.f, case.x, tangents)
    try:
        # Backward mode refuses writes into tensors that it has saved.
        backward = double_backward_jvp(case.f, case.x, tangents)
    except RuntimeError:
        backward = forward
    assert relative_error(backward, forward) <= max(1e-12, function.tolerance)
    if name not in NOT_SMOOTH:
        # Measured at most 1e-8.
        assert relative_error(central_difference(case.f, case.x, tangents), forward) <= 1e-7
