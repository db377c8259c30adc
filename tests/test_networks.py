"""Every network configuration: products, transposes, re-linearization, float32 error, no side effects."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from networks import EXACT, NETWORKS, Case, Network
from oracles import oracle_jvp, oracle_vjp
from torch import Tensor

import sharpcore
from sharpcore.testing.tolerance import assert_error_at_most, relative_error

TANGENTS = 8
COTANGENTS = 3
EPS32 = torch.finfo(torch.float32).eps


@dataclass
class Reference:
    """One network in float64 with what autograd says about it."""

    network: Network
    case: Case
    value: Tensor
    tangents: Tensor
    products: Tensor
    cotangents: Tensor
    pulled: Tensor


@pytest.fixture(scope="module", params=list(NETWORKS))
def reference(request: pytest.FixtureRequest) -> Reference:
    network = NETWORKS[request.param]
    case = network.build(torch.float64)
    generator = torch.Generator().manual_seed(11)
    tangents = torch.randn((TANGENTS, *case.x.shape), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        value = case.f(case.x)
    cotangents = torch.randn((COTANGENTS, *value.shape), generator=generator, dtype=torch.float64)
    products = oracle_jvp(case.f, case.x, tangents)
    return Reference(
        network, case, value, tangents, products, cotangents, oracle_vjp(case.f, case.x, cotangents)
    )


def linearize(reference: Reference, case: Case, backend: str = "auto") -> sharpcore.Linearization:
    """The linearization, or a skip where the table allows a refusal and the refusal names the operation."""
    try:
        return sharpcore.linearize(case.f, case.x, backend=backend)
    except sharpcore.UnsupportedOperation as error:
        if reference.network.expectation == EXACT or "aten" not in str(error):
            raise
        pytest.skip(f"refused: {error}")


# Measured over all networks with tolerance 1e-10: jvp at most 3.5e-15, vjp 3.5e-15.
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_products_are_exact(reference: Reference, backend: str) -> None:
    case, tolerance = reference.case, reference.network.tolerance
    linearization = linearize(reference, case, backend)
    assert relative_error(linearization.value, reference.value) <= tolerance
    for count in (1, 3, TANGENTS):
        products = linearization.jvp(reference.tangents[:count])
        assert relative_error(products, reference.products[:count]) <= tolerance
    pulled = linearization.vjp(reference.cotangents)
    assert relative_error(pulled, reference.pulled) <= tolerance
    # From the second time on a product runs in planned memory.
    assert relative_error(linearization.jvp(reference.tangents), reference.products) <= tolerance
    assert relative_error(linearization.vjp(reference.cotangents), reference.pulled) <= tolerance

    forward = reference.cotangents.flatten(1) @ products.flatten(1).T
    backward = pulled.flatten(1) @ reference.tangents.flatten(1).T
    scale = reference.cotangents.norm() * products.norm()
    assert (forward - backward).abs().max() <= tolerance * scale

    linearization.relinearize(case.x2)
    with torch.no_grad():
        assert relative_error(linearization.value, case.f(case.x2)) <= tolerance
    expected = oracle_jvp(case.f, case.x2, reference.tangents[:2])
    # The two points must differ enough for a stale residual to show.
    assert relative_error(expected, reference.products[:2]) > 1e-3
    assert relative_error(linearization.jvp(reference.tangents[:2]), expected) <= tolerance
    linearization.relinearize(case.x)
    assert relative_error(linearization.jvp(reference.tangents[:3]), reference.products[:3]) <= tolerance


# Measured: at most 1.3 times autograd's error for products, 1.35 times for transposed ones.
def test_float32_error_is_that_of_autograd(reference: Reference) -> None:
    case = reference.network.build(torch.float32)
    linearization = linearize(reference, case)
    # Tangents that float32 and float64 both hold exactly.
    tangents, cotangents = reference.tangents[:3].float(), reference.cotangents.float()
    for ours, plain, exact in [
        (
            linearization.jvp(tangents),
            oracle_jvp(case.f, case.x, tangents),
            oracle_jvp(reference.case.f, reference.case.x, tangents.double()),
        ),
        (
            linearization.vjp(cotangents),
            oracle_vjp(case.f, case.x, cotangents),
            oracle_vjp(reference.case.f, reference.case.x, cotangents.double()),
        ),
    ]:
        assert ours.dtype == torch.float32
        assert_error_at_most(
            relative_error(ours, exact), relative_error(plain, exact), factor=2.0, floor=2 * EPS32
        )
    assert relative_error(linearization.jvp(tangents), linearization.jvp(tangents.clone())) == 0


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_module_is_left_as_it_was(reference: Reference, grad_enabled: bool) -> None:
    case = reference.case
    module = case.module
    assert module is not None
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    layout = {
        name: (tensor.data_ptr(), tensor.stride(), tensor.requires_grad) for name, tensor in tensors.items()
    }
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    methods = [sorted(vars(m)) for m in module.modules()]

    with torch.set_grad_enabled(grad_enabled):
        linearization = linearize(reference, case)
        linearization.jvp(reference.tangents[:1])
        linearization.vjp(reference.cotangents[:1])
        linearization.relinearize(case.x2)
        assert torch.is_grad_enabled() is grad_enabled

    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor is tensors[name]
        assert torch.equal(tensor, before[name])
        assert (tensor.data_ptr(), tensor.stride(), tensor.requires_grad) == layout[name]
        assert tensor.grad is None
    assert modes == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    assert methods == [sorted(vars(m)) for m in module.modules()]
