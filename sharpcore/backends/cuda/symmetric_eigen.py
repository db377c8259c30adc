"""Eigenpairs of many small symmetric matrices, and residuals of Ritz pairs, on the cuda backend."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cuda.native import launch, usable, where
from sharpcore.backends.reference.symmetric_eigen import Eigen, RitzResiduals, check_eigen, check_residuals


def symmetric_eigen(matrices: Tensor, sizes: Tensor | None = None) -> Eigen:
    """As its namesake in sharpcore.backends.reference, which matrices of more than 128 rows go to."""
    native = usable((matrices,))
    if native is None or matrices.shape[-1] > native.most_eigen_rows:
        return reference.KERNELS["symmetric_eigen"](matrices, sizes)
    check_eigen(matrices, sizes)
    problems, rows, _ = matrices.shape
    matrices = matrices.contiguous()
    lengths = None if sizes is None else sizes.contiguous()
    made = Eigen(matrices.new_empty(problems, rows), torch.empty_like(matrices))
    launch(
        native,
        "symmetric_eigen",
        matrices.device,
        matrices=matrices.data_ptr(),
        sizes=0 if lengths is None else lengths.data_ptr(),
        values=made.values.data_ptr(),
        vectors=made.vectors.data_ptr(),
        batch=problems,
        rows=rows,
    )
    return made


def ritz_residuals(
    projected: Tensor, lost: Tensor, processed: Tensor, sizes: Tensor, values: Tensor, weights: Tensor
) -> RitzResiduals:
    """As its namesake in sharpcore.backends.reference."""
    native = usable((projected, lost, values, weights))
    if native is None:
        return reference.KERNELS["ritz_residuals"](projected, lost, processed, sizes, values, weights)
    check_residuals(projected, lost, processed, sizes, values, weights)
    given = [tensor.contiguous() for tensor in (projected, lost, processed, sizes, values, weights)]
    names = ("projected", "lost", "processed", "sizes", "values", "weights")
    made = RitzResiduals(torch.empty_like(given[4]), torch.empty_like(given[4]))
    native.ritz_residuals(
        **where(projected.device),
        **{name: tensor.data_ptr() for name, tensor in zip(names, given, strict=True)},
        coupling=made.coupling.data_ptr(),
        noise=made.noise.data_ptr(),
        batch=projected.shape[0],
        rows=projected.shape[1],
        count=values.shape[1],
    )
    return made
