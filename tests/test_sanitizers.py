"""Whether the sanitizers of the build really watch the kernels: faults that they must report."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sharpcore.backends import cpu

pytestmark = pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")
SANITIZERS = "" if cpu.extension() is None else cpu.extension().sanitizers()
needs_address = pytest.mark.skipif("address" not in SANITIZERS, reason="built without the address sanitizer")
needs_undefined = pytest.mark.skipif(
    "undefined" not in SANITIZERS, reason="built without that of undefined behaviour"
)


def report_of(code: str, *arguments: str) -> str:
    """What Python code that sees to its own end says before it ends."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


PRELUDE = """
import sys
import torch
from sharpcore.backends import cpu

def ones(*shape):
    return torch.ones(shape)

ARGUMENTS = {
    "attention_tangent": (*[ones(1, 2, 9, 5)] * 4, ones(1, 2, 9), *[ones(3, 1, 2, 9, 5) for _ in range(3)]),
    "group_norm_silu_tangent": (ones(3, 1, 4, 9), ones(1, 4, 9), ones(1, 2), ones(1, 2), None, None, 2, True),
    "layer_norm_tangent": (ones(3, 9, 5), ones(9, 5), ones(9, 1), ones(9, 1), None, 1),
    "geglu_tangent": (ones(3, 9, 10), ones(9, 10)),
}
KEYWORDS = {"attention_tangent": {"mask": None, "scale": 1.0}}
new_empty, data_ptr = torch.Tensor.new_empty, torch.Tensor.data_ptr

def move(moved):
    # Kernels are told of addresses one element behind those of the storage.
    storage = moved.untyped_storage().data_ptr()
    def data_ptr_of(tensor):
        inside = tensor.untyped_storage().data_ptr() == storage
        return data_ptr(tensor) + (tensor.element_size() if inside else 0)
    torch.Tensor.data_ptr = data_ptr_of
    return moved

def run(stem):
    cpu.KERNELS[stem](*ARGUMENTS[stem], **KEYWORDS.get(stem, {}))
"""

READ = """
move(next(t for t in ARGUMENTS[sys.argv[1]] if isinstance(t, torch.Tensor) and t.shape[0] == 3))
run(sys.argv[1])
"""

WRITE = """
torch.Tensor.new_empty = lambda *arguments, **keywords: move(new_empty(*arguments, **keywords))
run(sys.argv[1])
"""

MISALIGNED = """
factors = torch.frombuffer(bytearray(361), dtype=torch.float32, offset=1).view(9, 10)
cpu.geglu_tangent(ones(3, 9, 10), factors)
"""

STEMS = ["attention_tangent", "group_norm_silu_tangent", "layer_norm_tangent", "geglu_tangent"]


def test_the_build_is_the_one_that_was_asked_for() -> None:
    assert os.environ.get("SHARPCORE_SANITIZE", "") == SANITIZERS


# PyTorch takes the memory of tensors from the allocator that the address sanitizer replaces, which leaves a
# poisoned zone behind each of them.


@needs_address
@pytest.mark.parametrize("stem", STEMS)
def test_reading_one_element_past_a_tensor_is_reported(stem: str) -> None:
    report = report_of(READ, stem)
    assert "AddressSanitizer: heap-buffer-overflow" in report
    assert f"{stem}.cpp" in report
    assert "\nREAD of size" in report


@needs_address
@pytest.mark.parametrize("stem", STEMS)
def test_writing_one_element_past_a_tensor_is_reported(stem: str) -> None:
    report = report_of(WRITE, stem)
    assert "AddressSanitizer: heap-buffer-overflow" in report
    assert f"{stem}.cpp" in report
    assert "\nWRITE of size" in report


@needs_undefined
def test_undefined_behaviour_is_reported() -> None:
    assert "runtime error: load of misaligned address" in report_of(MISALIGNED)
