"""The reference backend: every kernel in plain PyTorch, one file per operation; it is the specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sharpcore.backends.reference.attention_tangent import (
    attention_adjoint,
    attention_forward,
    attention_tangent,
)
from sharpcore.backends.reference.geglu_tangent import geglu_adjoint, geglu_forward, geglu_tangent
from sharpcore.backends.reference.group_norm_silu_forward import group_norm_silu_forward
from sharpcore.backends.reference.group_norm_silu_tangent import (
    group_norm_silu_adjoint,
    group_norm_silu_tangent,
)
from sharpcore.backends.reference.grow_basis import grow_basis
from sharpcore.backends.reference.lanczos_step import lanczos_step
from sharpcore.backends.reference.layer_norm_tangent import layer_norm_adjoint, layer_norm_tangent
from sharpcore.backends.reference.philox import philox_probes
from sharpcore.backends.reference.residual_add import residual_add
from sharpcore.backends.reference.symmetric_eigen import ritz_residuals, symmetric_eigen
from sharpcore.backends.reference.upsample_nearest_tangent import (
    upsample_nearest_adjoint,
    upsample_nearest_tangent,
)

KERNELS: Mapping[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (
        attention_forward,
        attention_tangent,
        attention_adjoint,
        group_norm_silu_forward,
        group_norm_silu_tangent,
        group_norm_silu_adjoint,
        layer_norm_tangent,
        layer_norm_adjoint,
        geglu_tangent,
        geglu_adjoint,
        geglu_forward,
        residual_add,
        grow_basis,
        lanczos_step,
        symmetric_eigen,
        ritz_residuals,
        upsample_nearest_tangent,
        upsample_nearest_adjoint,
        philox_probes,
    )
}
