"""Any network with the protocol can take our place below features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2.features.encoder import Encoder
from dinov2.features.views import View
from dinov2.models import Backbone
from dinov2.models.vision_transformer import vit_tiny_3d


class Means:
    """A network of one layer whose tokens are the means of patches."""

    embed_dim, patch_size, num_layers, num_prefix_tokens, input_size = 2, 4, 1, 1, 8

    def get_intermediate_layers(self, x: Tensor, n: Any = 1, *_: Any, return_class_token: bool = False, **__: Any) -> Any:
        patch = nn.functional.avg_pool3d(x, 4).expand(-1, 2, -1, -1, -1)
        return ((patch, patch.mean((2, 3, 4))),)

    def parameters(self) -> Iterator[nn.Parameter]:
        yield nn.Parameter(torch.zeros(1))

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def test_ours_says_what_the_protocol_asks() -> None:
    ours = vit_tiny_3d(patch_size=4, img_size=16, num_register_tokens=2)
    assert isinstance(ours, Backbone)
    assert (ours.num_layers, ours.num_prefix_tokens, ours.input_size) == (12, 3, 16)


@pytest.mark.parametrize("mode", ["full_image", "resize", "sliding_window"])
def test_another_network_gives_features_in_every_view(mode: str) -> None:
    assert isinstance(Means(), Backbone)
    found = Encoder(Means())(torch.full((1, 1, 8, 8, 8), 0.5), mode=mode)
    assert found.patch.shape == (1, 2, 2, 2, 2) and found.cls.tolist() == [[0.5, 0.5]]
    assert View(mode).fitted(Means()) == Means.input_size
