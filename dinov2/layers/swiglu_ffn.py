"""Gated feed-forward part of the largest network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLUFFN(nn.Module):
    """SiLU-gated MLP in one fused input product (`w12`) and one output product (`w3`), names as DINOv2's.

    The hidden width is two thirds of the asked one, rounded up to a multiple of 8, so that the parameter count stays
    near that of a plain MLP.
    """

    ends = ("w12", "w3")  # see layers/folding.py

    def __init__(self, in_features: int, hidden_features: int, bias: bool = True) -> None:
        super().__init__()
        hidden = (int(hidden_features * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)
