"""Triton's interpreter for the tests: kernels run on CPU tensors where there is no GPU.

Import it before anything that imports triton; `conftest.py` does.
"""

from __future__ import annotations

import importlib.util
import os

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
