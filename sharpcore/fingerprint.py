"""A cheap fingerprint of a network's state, to notice that it changed since something was computed with it."""

from __future__ import annotations

from typing import Any

import torch


def fingerprint(network: torch.nn.Module) -> tuple[Any, ...]:
    """Equal as long as weights, adapters, processors, hooks and training mode of the network are the same.

    Weights are compared by in-place version and by their sum, which also moves when something writes through `.data` (as merging
    a LoRA does). One read of the weights: small beside a forward pass.
    """
    with torch.no_grad():
        weights = tuple(
            (name, id(tensor), 0 if tensor.is_inference() else tensor._version, float(tensor.sum(dtype=torch.float64)))
            for name, tensor in (*network.named_parameters(), *network.named_buffers())
        )
    modules = tuple(
        (
            name,
            type(module).__name__,
            module.training,
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks),
            id(getattr(module, "processor", None)),
            # PEFT layers: which adapters act, and how strongly.
            repr(getattr(module, "scaling", None)),
            repr(getattr(module, "active_adapters", None)) if hasattr(module, "lora_A") else None,
            getattr(module, "_disable_adapters", None),
        )
        for name, module in network.named_modules()
    )
    return (weights, modules)
