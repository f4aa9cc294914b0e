"""Batch and instance norms that get right gradients whatever the order of voxels in memory, on a CPU.

Where channels are last in memory and an axis has length 1, as of one crop, the stride of that axis may be any number. By it
torch (2.6 to 2.13 at least) may take a norm's input or its gradient for contiguous in the backward pass, and reads the values
in the wrong order without a word. Maps that are made from tokens have their channels last.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def in_plain_memory(network: nn.Module) -> None:
    """Let every batch and instance norm of a network get such inputs and gradients in plain order; no other is copied."""
    for module in network.modules():
        if isinstance(module, _NormBase) and _plain_gradient not in module._forward_hooks.values():
            module.register_forward_pre_hook(_plain_input)
            module.register_forward_hook(_plain_gradient)


def _plain(x: Tensor) -> Tensor:
    return x.contiguous() if x.device.type == "cpu" and 1 in x.shape else x


def _plain_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_plain(args[0]), *args[1:])


def _plain_gradient(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(_plain)
