"""The transformer's feed-forward part."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, GELU, linear; parameter names `fc1`, `fc2` as DINOv2's."""

    ends = ("fc1", "fc2")  # see layers/folding.py

    def __init__(self, in_features: int, hidden_features: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
