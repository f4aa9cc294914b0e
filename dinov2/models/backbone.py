"""What features and evaluations need of a frozen network: any that has this can take the place of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Backbone(Protocol):
    """A network of volumes that sees them as a grid of patches.

    Attributes:
        embed_dim: E.
        patch_size: Edge of a patch (voxels).
        num_layers: Blocks, whose outputs `get_intermediate_layers` gives.
        num_prefix_tokens: Tokens before those of the patches: the class token and registers.
        input_size: Edge of the volumes it was trained on (voxels).
    """

    embed_dim: int
    patch_size: int

    @property
    def num_layers(self) -> int: ...

    @property
    def num_prefix_tokens(self) -> int: ...

    @property
    def input_size(self) -> int: ...

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As of DINOv2: patch tokens [B, N, E] or [B, E, h, w, d] of the last n layers, or pairs with class tokens [B, E]."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...
