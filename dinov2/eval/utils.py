"""DINOv2's frozen extractor as a module; `dinov2.features.features` is how this package takes features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.models import DinoVisionTransformer3d


class ModelWithIntermediateLayers(nn.Module):
    """The last blocks of a frozen backbone.

    Args:
        feature_model: Put into evaluation mode.
        n_last_blocks: How many.
        autocast_ctx: Makes the context of a pass, such as `partial(torch.autocast, "cuda", dtype=autocast_dtype)`.
    """

    def __init__(
        self,
        feature_model: DinoVisionTransformer3d,
        n_last_blocks: int,
        autocast_ctx: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.feature_model = feature_model.eval()
        self.n_last_blocks = n_last_blocks
        self.autocast_ctx = autocast_ctx

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """[B, 1, H, W, D] -> for each block patch tokens [B, N, E] and class tokens [B, E], normed."""
        with self.autocast_ctx():
            return self.feature_model.get_intermediate_layers(images, self.n_last_blocks, return_class_token=True)
