"""What a timing depends on and what memory a process holds: one dictionary for every row of every table."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).parent
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_tile",
)
PACKAGES = {"torch": "torch", "diffusers": "diffusers"}


def describe(command: str) -> dict[str, str | int]:
    """Machine, versions, commit, date, and the command that the rows come from."""
    return {**_unchanging(), "threads": torch.get_num_threads(), "command": command}


@functools.cache
def _unchanging() -> dict[str, str | int]:
    import sharpcore
    from sharpcore.backends import cpu

    native = cpu.extension()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "cpu_features": " ".join(f for f in FEATURES if f in _cpuinfo("flags").split()) or "unknown",
        "kernels": native.isa() if native else "not built",
        **{package: _version(package) for package in PACKAGES},
        "sharpcore": sharpcore.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit, marked where sources differ from it; results and charts, being written, do not count."""
    ours = ("--", ":/", ":!/benchmarks/results", ":!/docs")
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no", *ours) else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def reset_peak() -> int | None:
    """Give freed memory back, start a new high-water mark, and return the resident bytes; None if not Linux.

    The mark is the kernel's own (VmHWM), so that nothing between two samples is missed. `ru_maxrss` would not
    do: it cannot be reset, and a child starts with its parent's.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def peak_since(before: int | None) -> float | None:
    """MiB by which the resident memory has exceeded `before` since `reset_peak`."""
    return None if before is None else (_status("VmHWM") - before) / 2**20


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
