"""Growth of orthonormal bases by blocks of vectors on the cpu backend."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import computable, dtype_code
from sharpcore.backends.cpu.native import extension
from sharpcore.backends.reference.grow_basis import Growth, check_growth


def grow_basis(basis: Tensor, sizes: Tensor, block: Tensor, *, floor: Tensor, limit: int) -> Growth:
    """As its namesake in sharpcore.backends.reference; a [d] of the block that has gaps is copied."""
    check_growth(basis, sizes, block, floor, limit)
    native = extension()
    if native is None or not computable((basis,)) or not computable((block,)):
        return reference.KERNELS["grow_basis"](basis, sizes, block, floor=floor, limit=limit)
    samples, rows, dimension = basis.shape
    count = block.shape[0]
    if dimension > 1 and block.stride(2) != 1:
        block = block.contiguous()
    sizes, floor = sizes.contiguous(), floor.contiguous()
    growth = Growth(
        coefficients=basis.new_empty(samples, rows, count),
        triangle=basis.new_empty(samples, count, count),
        ranks=torch.empty_like(sizes),
        dropped=basis.new_empty(samples, count),
    )
    native.grow_basis(
        basis=basis.data_ptr(),
        sizes=sizes.data_ptr(),
        block=block.data_ptr(),
        block_strides=block.stride()[:2],
        floor=floor.data_ptr(),
        coefficients=growth.coefficients.data_ptr(),
        triangle=growth.triangle.data_ptr(),
        dropped=growth.dropped.data_ptr(),
        ranks=growth.ranks.data_ptr(),
        dtype=dtype_code(block.dtype),
        count=count,
        batch=samples,
        rows=rows,
        size=dimension,
        limit=limit,
        threads=torch.get_num_threads(),
    )
    return growth
