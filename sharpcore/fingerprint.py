"""A cheap fingerprint of a network's state, to notice that it has changed between two computations."""

from __future__ import annotations

import math
from typing import Any

import torch

from sharpcore.errors import NonFiniteError


def fingerprint(network: torch.nn.Module) -> tuple[Any, ...]:
    """Equal as long as weights, adapters, processors, hooks and settings of the network are the same.

    Weights are compared by in-place version and by their sum, which also moves when something writes through
    `.data` (as merging a LoRA does); settings are the numbers and strings among the modules' attributes
    (training mode, the strength of an adapter, FreeU). One read of the weights: small beside a forward pass.
    Raises NonFiniteError naming a parameter that holds NaN or infinity.
    """
    with torch.no_grad():
        parameters = tuple(_weight(name, tensor) for name, tensor in network.named_parameters())
        buffers = tuple(_weight(name, tensor) for name, tensor in network.named_buffers())
    for name, *_, total in parameters:
        if not math.isfinite(total):
            raise NonFiniteError(f"{type(network).__name__}: its parameter {name} holds NaN or infinity")
    return (parameters, buffers, tuple(_settings(name, module) for name, module in network.named_modules()))


def _weight(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    # `.to(dtype)` and the like exchange the memory of a parameter, which stays the same object.
    memory = (tensor.data_ptr(), tensor.dtype, str(tensor.device), tuple(tensor.stride()))
    return (name, id(tensor), memory, version, float(tensor.sum(dtype=torch.float64)))


def _settings(name: str, module: torch.nn.Module) -> tuple[Any, ...]:
    attributes = vars(module)
    processor = attributes.get("processor")
    return (
        name,
        type(module).__name__,
        tuple(module._forward_hooks),
        tuple(module._forward_pre_hooks),
        id(attributes.get("forward")),  # set on the instance by code that replaces a module's forward
        id(processor),
        _plain(attributes),
        _plain(getattr(processor, "__dict__", {})),
    )


def _plain(attributes: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, repr(value)) for name, value in attributes.items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
