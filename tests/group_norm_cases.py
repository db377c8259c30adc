"""What the tests of GroupNorm + SiLU share: shapes, arguments, and what errors are measured in."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import to_channels_last
from torch import Tensor

KERNELS = ("group_norm_silu_tangent", "group_norm_silu_adjoint")
COUNTS = (1, 2, 3, 8, 17)


@dataclass(frozen=True)
class Shape:
    batch: int
    channels: int
    groups: int
    spatial: tuple[int, ...]

    @property
    def group_size(self) -> int:
        return self.channels // self.groups * torch.Size(self.spatial).numel()


SHAPES = (
    Shape(2, 12, 4, ()),  # no positions at all
    Shape(1, 6, 6, (1,)),  # groups of one element: the derivative is zero
    Shape(2, 6, 3, (1, 1)),  # groups of two elements
    Shape(3, 40, 5, (1, 1)),  # one position
    Shape(2, 12, 3, (7,)),  # shorter than a vector
    Shape(2, 9, 9, (5, 3)),  # as many groups as channels
    Shape(1, 6, 1, (3, 2, 4)),  # three spatial dimensions, one group
    Shape(1, 96, 2, (5, 5)),
    Shape(1, 80, 8, (33, 17)),  # several accumulation blocks and a remainder
    Shape(2, 320, 32, (8, 8)),  # a layer of Stable Diffusion 1.x
    Shape(1, 59, 1, (7,)),
    Shape(2, 40, 4, (77,)),
    Shape(1, 111, 3, (12, 12)),
    Shape(1, 8, 2, (33,)),
    Shape(2, 160, 32, (7, 11)),
    # One position more than whole vectors; channels-last blocks that the cache does not hold.
    Shape(1, 64, 8, (1025,)),
)
WELL_CONDITIONED = tuple(shape for shape in SHAPES if shape.group_size > 2)


def identify(shape: Shape) -> str:
    return f"{shape.batch}x{shape.channels}/{shape.groups}x{'x'.join(map(str, shape.spatial))}"


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=identify)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_silu = pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
each_affine = pytest.mark.parametrize(
    "affine", [(True, True), (True, False), (False, True), (False, False)], ids=["wb", "w", "b", "none"]
)
each_by_sample = pytest.mark.parametrize("by_sample", [False, True], ids=["shared", "by sample"])


def make_arguments(
    shape: Shape,
    count: int,
    *,
    affine: tuple[bool, bool] = (True, True),
    channels_last: bool = False,
    by_sample: bool = False,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """vectors, x, mean, rstd, weight, bias; x has a mean well away from zero. With bfloat16 the last four are
    float32."""
    generator = torch.Generator().manual_seed(1000 * count + shape.channels)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = draw(shape.batch, shape.channels, *shape.spatial) * 1.5 + 3
    vectors = draw(count, *x.shape)
    parameter = (shape.batch, shape.channels) if by_sample else (shape.channels,)
    weight = draw(*parameter) if affine[0] else None
    bias = draw(*parameter) if affine[1] else None
    grouped = x.reshape(shape.batch, shape.groups, -1)
    mean = grouped.mean(-1)
    rstd = (grouped.var(-1, unbiased=False) + 1e-5).rsqrt()
    if channels_last:
        x, vectors = to_channels_last(x, 1), to_channels_last(vectors, 2)
    statistics_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    return [
        vectors.to(dtype),
        x.to(dtype),
        *(None if t is None else t.to(statistics_dtype) for t in (mean, rstd, weight, bias)),
    ]


def in_double(arguments: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in arguments]


def size_of_terms(arguments: list[Tensor | None]) -> float:
    """Norm of what the kernel adds up: the unit for errors where the terms cancel."""
    vectors, _, _, rstd, weight, _ = arguments
    gain = 1.0 if weight is None else float(weight.abs().max())
    return gain * float(rstd.max()) * float(vectors.norm())
