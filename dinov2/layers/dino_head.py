"""The projection head from tokens to prototype scores."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Bias-free linear layer whose rows are `weight_g * weight_v / |weight_v|`.

    A module of its own, with the names that DINOv2's checkpoints use, so that they do not depend on which of torch's
    weight-norm implementations is current.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)  # of nn.utils.weight_norm: one pass each way, not ten
        return F.linear(x, weight)


class DINOHead(nn.Module):
    """MLP, L2 normalisation, weight-normalised prototypes (DINO, "Network architecture").

    Args:
        in_dim: Token width.
        out_dim: Prototypes K.
        use_bn: A BatchNorm before each GELU; inputs are then [rows, in_dim].
        nlayers: Linear layers of the MLP, at least 1, with GELU in between.
        hidden_dim: Width of the MLP.
        bottleneck_dim: Width in front of the prototypes.
        mlp_bias: Biases of the MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        nlayers = max(nlayers, 1)
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b, bias=mlp_bias), *([nn.BatchNorm1d(b)] if use_bn else []), nn.GELU()]
        self.mlp = layers[0] if nlayers == 1 else nn.Sequential(*layers[: -2 if use_bn else -1])
        for layer in self.mlp.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., K], scores in [-g, g]."""
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return self.last_layer(x)
