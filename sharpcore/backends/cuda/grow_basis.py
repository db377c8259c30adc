"""Growth of orthonormal bases by blocks of vectors on the cuda backend."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cpu.layout import dtype_code
from sharpcore.backends.cuda.native import launch, usable
from sharpcore.backends.reference.grow_basis import Growth, check_growth


def grow_basis(basis: Tensor, sizes: Tensor, block: Tensor, *, floor: Tensor, limit: int) -> Growth:
    """As its namesake in sharpcore.backends.reference; `sizes` and `floor` may also lie on the basis' device.

    Then `ranks` do as well, nothing waits for the device, and sizes are not checked: they must be at most
    `limit`. A [d] of the block that has gaps is copied.
    """
    check_growth(basis, sizes, block, floor, limit, devices=("cpu", basis.device.type))
    native = usable((basis, block))
    if native is None or block.numel() == 0:
        growth = reference.KERNELS["grow_basis"](basis, sizes.cpu(), block, floor=floor.cpu(), limit=limit)
        return growth._replace(ranks=growth.ranks.to(sizes.device))
    samples, rows, dimension = basis.shape
    count = block.shape[0]
    # Rows are written while later groups of vectors have not been read.
    shared = block.untyped_storage().data_ptr() == basis.untyped_storage().data_ptr()
    if (dimension > 1 and block.stride(2) != 1) or (shared and count > native.most_columns):
        block = block.clone(memory_format=torch.contiguous_format)
    lengths = sizes.to(basis.device, non_blocking=True).contiguous()
    floor = floor.to(basis.device, non_blocking=True).contiguous()
    growth = Growth(
        coefficients=basis.new_empty(samples, rows, count),
        triangle=basis.new_empty(samples, count, count),
        ranks=torch.empty_like(lengths),
        dropped=basis.new_empty(samples, count),
    )
    launch(
        native,
        "grow_basis",
        basis.device,
        basis=basis.data_ptr(),
        sizes=lengths.data_ptr(),
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
    )
    return growth._replace(ranks=growth.ranks.to(sizes.device))
