"""GEGLU in a trace: where it is seen as one operation, where it must not be. Functions of x [2, 3, 8]."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import oracle_jvp
from torch import Tensor

from sharpcore import linearize
from sharpcore.testing.tolerance import relative_error


def project(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return F.linear(x, torch.randn(8, 8, generator=generator, dtype=torch.float64).to(x.dtype))


def feed_forward(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def gate_first_in_product(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=2)
    return F.gelu(gate, approximate="tanh") * hidden


def split_by_sizes(x: Tensor) -> Tensor:
    hidden, gate = project(x).split([4, 4], dim=-1)
    return hidden * F.gelu(gate)


def of_a_vector(x: Tensor) -> Tensor:
    hidden, gate = project(x)[0, 1].chunk(2)
    return hidden * F.gelu(gate)


def two_of_them(x: Tensor) -> Tensor:
    return feed_forward(torch.cat([feed_forward(x), feed_forward(x.sin())], -1))


def everything_used_elsewhere(x: Tensor) -> Tensor:
    projection = project(x)
    hidden, gate = projection.chunk(2, dim=-1)
    activated = F.gelu(gate)
    return hidden * activated + activated.sin() + gate * hidden + projection.sum(-1, keepdim=True)


def product_written_into_gelu(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return F.gelu(gate).mul_(hidden)


def projection_overwritten_afterwards(x: Tensor) -> Tensor:
    projection = project(x)
    hidden, gate = projection.chunk(2, dim=-1)
    product = hidden * F.gelu(gate)
    projection.mul_(3).add_(x)
    return product + projection[..., :4]


FUSED: dict[Callable[[Tensor], Tensor], int] = {
    feed_forward: 1,
    gate_first_in_product: 1,
    split_by_sizes: 1,
    of_a_vector: 1,
    two_of_them: 3,
    everything_used_elsewhere: 1,
    product_written_into_gelu: 1,
    projection_overwritten_afterwards: 1,
}


def another_axis(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=0)
    return hidden * F.gelu(gate)


def unequal_pieces(x: Tensor) -> Tensor:
    hidden, gate = project(x).split([5, 3], dim=-1)
    return hidden[..., :3] * F.gelu(gate)


def three_pieces(x: Tensor) -> Tensor:
    hidden, gate, _ = project(x)[..., :6].chunk(3, dim=-1)
    return hidden * F.gelu(gate)


def one_column_broadcast(x: Tensor) -> Tensor:
    hidden, gate = project(x)[..., 3:6].chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def first_half_is_the_gate(x: Tensor) -> Tensor:
    gate, hidden = project(x).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def halves_of_two_projections(x: Tensor) -> Tensor:
    hidden, _ = project(x).chunk(2, dim=-1)
    _, gate = project(x.sin()).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def hidden_transposed(x: Tensor) -> Tensor:
    hidden, gate = project(x)[..., :6].chunk(2, dim=-1)
    return hidden.mT * F.gelu(gate)


def silu_gate(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return hidden * F.silu(gate)


def gate_changed_before(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return hidden * F.gelu(gate + 1)


def gate_overwritten_before_the_product(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    activated = F.gelu(gate)
    gate.mul_(7)
    return hidden * activated + gate


def gate_filled_before_the_product(x: Tensor) -> Tensor:
    projection = project(x)
    hidden, gate = projection.chunk(2, dim=-1)
    activated = F.gelu(gate)
    projection[..., 4:].zero_()
    return hidden * activated + gate


def product_written_into_the_projection(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    hidden.mul_(F.gelu(gate))
    return hidden + gate


def halves_without_a_tangent(x: Tensor) -> Tensor:
    hidden, gate = project(x).detach().chunk(2, dim=-1)
    return hidden * F.gelu(gate) * x[..., :4]


def gate_without_a_tangent(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return hidden * F.gelu(gate.detach())


NOT_FUSED = (
    another_axis,
    unequal_pieces,
    three_pieces,
    one_column_broadcast,
    first_half_is_the_gate,
    halves_of_two_projections,
    hidden_transposed,
    silu_gate,
    gate_changed_before,
    gate_overwritten_before_the_product,
    gate_filled_before_the_product,
    product_written_into_the_projection,
    halves_without_a_tangent,
    gate_without_a_tangent,
)
CASES = [*FUSED.items(), *((f, 0) for f in NOT_FUSED)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("f", "fused"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_fusion_is_seen_and_exact(f: Callable[[Tensor], Tensor], fused: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x, other = (torch.randn(2, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    tangents = torch.randn(3, *x.shape, generator=generator, dtype=torch.float64)
    linearization = linearize(f, x, backend=backend)
    cotangents = torch.randn(3, *linearization.value.shape, generator=generator, dtype=torch.float64)
    operations = [line.split()[1] for line in linearization.program.explain().splitlines()[1:-1]]
    assert operations.count("geglu") == fused
    for point in (None, other, x):
        if point is not None:
            linearization.relinearize(point)
        at = x if point is None else point
        # Worst measured: 1.2e-14 of a product.
        assert relative_error(linearization.value, f(at)) <= 1e-14
        products, pulled = linearization.jvp(tangents), linearization.vjp(cotangents)
        assert relative_error(products, oracle_jvp(f, at, tangents)) <= 1e-13
        # Autograd refuses some of the writes in place, so that the transpose is compared with the product.
        pairing = (cotangents * products).sum(), (pulled * tangents).sum()
        assert (pairing[0] - pairing[1]).abs() <= 1e-13 * cotangents.norm() * products.norm()


def test_fused_operation_replaces_its_parts() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    linearization = linearize(feed_forward, x)
    operations = [line.split()[1] for line in linearization.program.explain().splitlines()[1:-1]]
    assert operations == ["linear", "geglu"]
    # The weight of the projection, and the two factors.
    assert linearization.nbytes == (8 * 8 + x.numel()) * 8
