"""What features and evaluations need of a frozen network: any that has this can take the place of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class Preparation(NamedTuple):
    """How scans in files are prepared for a network, which names it in an attribute `preparation` where it is not as ours.

    Attributes:
        window: Stored values (HU of CT) that become -1 and 1; None: percentiles.
        orientation: Where H, W and D point (`LPS`), whichever axis is across slices; None: as stored, slice axis last.
        modality: The only one that it was trained on.
    """

    window: tuple[float, float] | None = None
    orientation: str | None = None
    modality: str | None = None


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


class BackboneModule(Backbone, Protocol):
    """A `Backbone` that is an `nn.Module`, as whatever is put around it or trained needs it."""

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


@runtime_checkable
class BlockBackbone(BackboneModule, Protocol):
    """One whose blocks can be run a few at a time, as the adapter does."""

    def prepare_tokens_with_masks(self, x: Tensor) -> Tensor:
        """[B, 1, H, W, D] -> tokens before the first block [B, num_prefix_tokens + N, E]."""

    def segment(self, x: Tensor, tokens: Tensor) -> Any:
        """What `run_blocks` must know of a batch beside its tokens; may be None."""

    def run_blocks(self, tokens: Tensor, segment: Any, first: int, last: int) -> Tensor:
        """Blocks `first` to `last` (exclusive): [B, num_prefix_tokens + N, E] -> the same."""


@runtime_checkable
class AttendingBackbone(Backbone, Protocol):
    """One that shows its attention weights."""

    def get_self_attention(self, x: Tensor, block: int = -1, queries: Sequence[int] | None = None) -> Tensor:
        """[B, 1, H, W, D] -> rows of a block's attention [B, heads, Q, num_prefix_tokens + N], which sum to 1."""
