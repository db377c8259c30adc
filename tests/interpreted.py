"""Triton's interpreter for the tests: kernels run on CPU tensors where there is no GPU.

Import it before anything that imports triton; `conftest.py` does.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

# Where the kernels run. On a GPU the same tests compile them.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("SHARPCORE_AUTOTUNE", "0")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def _mend_bfloat16() -> None:
    """bfloat16 as GPUs have it: Triton's interpreter truncates where they round, and multiplies bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        # A copy: torch takes no array that is read-only or has negative steps.
        rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def widening_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    builder.cast_impl, builder.create_dot = rounding_cast, widening_dot


if DEVICE == "cpu" and importlib.util.find_spec("triton") is not None:
    _mend_bfloat16()
