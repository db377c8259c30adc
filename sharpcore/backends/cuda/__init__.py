"""The cuda backend: Triton kernels for tangents, CUDA C++ for Krylov bases; one file per stem that checks tensors and
launches. Imported when first asked for, as importing Triton takes time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sharpcore.backends.cuda.layout import DTYPES, interpreted

__all__ = ["DTYPES", "KERNELS", "interpreted"]

KERNELS: Mapping[str, Callable[..., Any]] = {kernel.__name__: kernel for kernel in ()}
