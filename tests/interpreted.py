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


def _mend_precisions() -> None:
    """bfloat16 and tf32 as GPUs have them.

    Triton's interpreter truncates to bfloat16 where they round, multiplies its bits, and knows no tf32.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    precisions = interpreter._ir.INPUT_PRECISION

    builder: Any = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        # A copy: torch takes no array that is read-only or has negative steps.
        rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def precise_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = cast(self, a, tl.float32), cast(self, b, tl.float32)
        elif a.dtype.scalar == tl.float32 and precision != precisions.IEEE:
            (a, a_low), (b, b_low) = halves(a), halves(b)
            if precision == precisions.TF32x3:
                total = dot(self, a_low, b, total, precision, *others)
                total = dot(self, a, b_low, total, precision, *others)
        return dot(self, a, b, total, precision, *others)

    def halves(x: Any) -> list[Any]:
        high = rounded_to_tf32(x.data)
        # What is infinite has no lower half.
        low = rounded_to_tf32(np.where(np.isfinite(x.data), x.data - np.where(np.isfinite(high), high, 0), 0))
        return [interpreter.TensorHandle(part, tl.float32) for part in (high, low)]

    def rounded_to_tf32(values: Any) -> Any:
        return ((values.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(~0x1FFF & 0xFFFFFFFF)).view(
            np.float32
        )

    builder.cast_impl, builder.create_dot = rounding_cast, precise_dot


if DEVICE == "cpu" and importlib.util.find_spec("triton") is not None:
    _mend_precisions()
