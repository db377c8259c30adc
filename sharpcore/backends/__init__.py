"""Executors of the linear program's kernels: selection by name, and the table of what each supports."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sharpcore.backends import cpu, reference
from sharpcore.errors import InvalidInput

NAMES = ("auto", "reference", "cpu")


@dataclass(frozen=True)
class Backend:
    """One executor; every kernel is an attribute: ``backend.group_norm_silu_tangent(...)``.

    A kernel that the executor lacks, or has not for a dtype or device, is the
    reference's: a call always works.
    """

    name: str
    kernels: Mapping[str, Callable[..., Any]]

    def __getattr__(self, kernel: str) -> Callable[..., Any]:
        try:
            return self.__dict__["kernels"][kernel]
        except KeyError:
            raise AttributeError(f"backend has no kernel {kernel!r}") from None


@dataclass(frozen=True)
class Support:
    """Whether a backend has its own kernel for a dtype and device; if not, the reason in words."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class SupportRow:
    """One line of :func:`support_table`."""

    backend: str
    kernel: str
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    available: bool
    reason: str


_REFERENCE = Backend("reference", reference.KERNELS)
_CPU = Backend("cpu", {**reference.KERNELS, **cpu.KERNELS})
_REFERENCE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_already_warned = False


def get_backend(name: str, *, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The executor called ``name`` for tensors of ``dtype`` on ``device``.

    Args:
        name: "reference" (plain PyTorch), "cpu" (C++ kernels), or "auto": cpu where its extension is built,
            the device is the CPU and the dtype is one it computes in; else reference.
        device: where the tensors live.
        dtype: what the network computes in.

    Raises:
        InvalidInput: ``name`` is not one of the backends.

    Asking for "cpu" where the extension is missing warns once per process and gives the reference.
    """
    if name == "reference":
        return _REFERENCE
    if name == "auto":
        usable = torch.device(device).type == "cpu" and dtype in cpu.DTYPES and cpu.extension() is not None
        return _CPU if usable else _REFERENCE
    if name == "cpu":
        if cpu.extension() is None:
            _warn_once(cpu.why_missing())
            return _REFERENCE
        return _CPU
    raise InvalidInput(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


def supports(backend: str, kernel: str, *, device: torch.device | str, dtype: torch.dtype) -> Support:
    """Whether ``backend`` has its own ``kernel`` for ``dtype`` on ``device``; if not, the reason in words.

    Raises:
        InvalidInput: there is no such backend or kernel.
    """
    if backend not in ("reference", "cpu"):
        raise InvalidInput(f"backend: expected reference or cpu, got {backend!r}")
    if kernel not in reference.KERNELS:
        raise InvalidInput(f"kernel: expected one of {', '.join(reference.KERNELS)}, got {kernel!r}")
    if backend == "reference":
        return (
            Support(True) if dtype.is_floating_point else Support(False, f"{dtype} is not a floating dtype")
        )
    if kernel not in cpu.KERNELS:
        return Support(False, f"the cpu backend has no {kernel}; the reference is used")
    if cpu.extension() is None:
        return Support(False, cpu.why_missing())
    if torch.device(device).type != "cpu":
        return Support(False, f"the cpu backend works on CPU tensors, not on {torch.device(device).type}")
    if dtype not in cpu.DTYPES:
        return Support(False, f"the cpu backend computes in {_names(cpu.DTYPES)}, not in {_short(dtype)}")
    return Support(True)


def support_table() -> list[SupportRow]:
    """One row per backend and kernel: dtypes, devices, whether it can be used here, and if not, why."""
    rows = [
        SupportRow("reference", kernel, tuple(map(_short, _REFERENCE_DTYPES)), ("any",), True, "")
        for kernel in reference.KERNELS
    ]
    for kernel in reference.KERNELS:
        own = kernel in cpu.KERNELS
        support = supports("cpu", kernel, device="cpu", dtype=cpu.DTYPES[0])
        rows.append(
            SupportRow(
                "cpu",
                kernel,
                tuple(map(_short, cpu.DTYPES)) if own else (),
                ("cpu",) if own else (),
                support.ok,
                support.reason,
            )
        )
    return rows


def _warn_once(message: str) -> None:
    global _already_warned
    if not _already_warned:
        _already_warned = True
        warnings.warn(f"{message}; the reference backend is used instead", RuntimeWarning, stacklevel=3)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(map(_short, dtypes))
