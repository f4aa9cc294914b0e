"""Layer norms and LayerScales that become part of the weights of the products beside them.

With x' the normalised rows, W and c of the first linear layer, V and d of the last:

    (x' * w + b) Wt + c = x' (W * w)t + (c + W b),        g * (a Vt + d) = a (g * V)t + g * d

so that gradients of w, b and g come from those of weights and no pass over all rows is made for them. What goes back through
the norm needs its result only, which the first product keeps anyway: rows are neither kept nor read again for the norm.

Shapes: R rows, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dinov2.distributed.precision import at_least_fp32
from dinov2.layers.layer_scale import LayerScale


def run_branch(layer: nn.Module, norm: nn.Module, scale: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """`scale(layer(norm(x), *args))`, [R, E] -> [R, E]; folded where it pays and can be, the same to rounding."""
    usual = modules_to_fold(layer, norm)
    if usual is None:
        return scale(layer(norm(x), *args))
    layer_norm, first, last = usual
    ends: Any = layer.ends
    weights = norm_in_weights(layer_norm, ends[0], first)
    y = normalised(x, layer_norm.eps)
    # LayerScale begins near 1e-5, and so small a weight is no normal number in float16
    if isinstance(scale, LayerScale) and y.dtype != torch.float16:
        weights[f"{ends[1]}.weight"] = last.weight * scale.gamma[:, None]
        if last.bias is not None:
            weights[f"{ends[1]}.bias"] = last.bias * scale.gamma
        scale = nn.Identity()
    return scale(functional_call(layer, weights, (y, *args)))


def modules_to_fold(layer: nn.Module, norm: nn.Module) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear] | None:
    """The norm and the first and last linear layer, `layer.ends`, where a training is compiled and they are the usual ones.

    Folding multiplies whole weights, which costs more than it saves where every operation is one by itself.
    """
    ends: Any = getattr(layer, "ends", None)
    if not (layer.training and torch.compiler.is_compiling() and ends):
        return None
    first, last = (layer.get_submodule(name) for name in ends)
    if type(norm) is nn.LayerNorm and type(first) is nn.Linear and type(last) is nn.Linear:
        return (norm, first, last) if norm.bias is not None and first.bias is not None else None
    return None


def norm_in_weights(norm: nn.LayerNorm, name: str, linear: nn.Linear) -> dict[str, Tensor]:
    """Weight and bias for `functional_call` of a linear layer, `name`, that gets normalised rows instead of the norm's."""
    folded = {"weight": linear.weight * norm.weight, "bias": linear.bias + (linear.weight * norm.bias).sum(1)}
    return {f"{name}.{key}": value for key, value in folded.items()}


def normalised(x: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, [..., E] -> [..., E], computed in fp32 and rounded to autocast's dtype; `x` is not kept."""
    device = x.device.type
    return _Normalise.apply(x, eps, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


class _Normalise(torch.autograd.Function):
    """`normalised`; its backward pass needs the result and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.kernel_is_fp32 = x.is_cuda and not torch.compiler.is_compiling()  # inside, whatever it reads and writes
        y, _, rstd = torch.native_layer_norm(
            x if ctx.kernel_is_fp32 else at_least_fp32(x), x.shape[-1:], None, None, eps
        )  # rstd [..., 1]
        if y.dtype != dtype:  # torch 2.11 compiles wrong gradients where a result is converted to the dtype that it has
            y = y.to(dtype)
        ctx.save_for_backward(y, rstd)
        ctx.x_dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, rstd = ctx.saved_tensors
        if not ctx.kernel_is_fp32:
            y, grad = at_least_fp32(y), at_least_fp32(grad)
        # the gradient of normalising rows that are normal, one kernel; then what the rows were divided by
        none, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        to_x = torch.ops.aten.native_layer_norm_backward(grad, y, y.shape[-1:], none, one, None, None, [True, False, False])[0]
        return (to_x * rstd).to(ctx.x_dtype), None, None
