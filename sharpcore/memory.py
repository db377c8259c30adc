"""How much memory there is, and how running out of it shows."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:  # not Linux
            return None
        found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return int(found[0]) * 1024 if found else None
    return None


def give_back_freed() -> None:
    """Let the C library return the pages between what is allocated to the system, where it can (glibc).

    It would keep them for later: after a trace, whose small objects lie between freed tensors, they were
    twice what is in use.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    return getattr(ctypes.CDLL(None), "malloc_trim", None)


# How allocators that raise a plain RuntimeError say it: the CPU's (worded by platform), cuBLAS and cuDNN.
_ALLOCATION_FAILED = ("DefaultCPUAllocator", "can't allocate memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _ALLOCATION_FAILED)
