"""MONAI's Swin transformer as an encoder of this package, and its published self-supervised weights, by key.

# B batch, C its width times 16 (the last stage's channels)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import BadInput
from dinov2.models.backbone import Preparation
from dinov2.models.weights import StateDict, refuse_non_finite

DEPTHS, NUM_HEADS, WINDOW, PATCH = (2, 2, 2, 2), (3, 6, 12, 24), 7, 2  # of the published network
SMALLEST = 32  # voxels of a cell of the last stage
CONTRASTIVE_DIM = 512
_HEAD = "contrastive_head."
_EMBEDDING = "swinViT.patch_embed.proj.weight"
_ENCODER = re.compile(r"(swinViT\.|swin_vit\.|encoder\.)?(?=(patch_embed|layers[1-4]c?)\.)")


class Used(NamedTuple):
    """Names of a file's tensors, as saved: those that a network took, and those that it has no place for."""

    source: str
    taken: list[str]
    left: list[str]

    def __str__(self) -> str:
        """How many of each part were taken (each is whole, or the file would have been refused), and what is left, by name."""
        parts = Counter(_own_name(k).removeprefix("swinViT.").split(".")[0] for k in self.taken)
        taken = ", ".join(f"{name} {n}" for name, n in parts.items())
        left = f"; without a place here: {', '.join(self.left)}" if self.left else ""
        return f"weights {self.source}: {len(self.taken)} tensors used ({taken}){left}"


class SwinEncoder3d(nn.Module):
    """Five maps for SwinUNETR, and the contrastive head's output as a feature (a `Backbone`).

    A linear layer's output at the mean of the last stage's cells is the mean of its outputs at the cells: the class token here,
    beside the cells' own as patch tokens.

    Args:
        width: Channels at half of the size; a multiple of 12.
        contrastive: With the head that the pretraining had, which MONAI's class leaves out; its output is the feature.
        unit_range: Intensities are brought from [-1, 1] to [0, 1] first, as the published weights saw them.
        checkpointing: Blocks are computed again in the backward pass.
        window: Cells along an edge of its attention windows.
        v2: With a residual convolution before each stage, as MONAI's `use_v2`.

    Source: Tang et al. (2022); 3DINO paper, "SOTA segmentation comparisons" and "3DINO classification".
    """

    num_layers, num_prefix_tokens, patch_size, input_size = 1, 1, SMALLEST, 96
    used: Used | None = None  # of weights that it was filled from
    preparation = Preparation()  # of files; whoever takes it for published weights sets it
    licence: str | None = None

    def __init__(
        self,
        width: int = 48,
        contrastive: bool = False,
        unit_range: bool = False,
        checkpointing: bool = False,
        window: int = WINDOW,
        v2: bool = False,
    ) -> None:
        super().__init__()
        from monai.networks.nets.swin_unetr import SwinTransformer

        self.width, self.window, self.unit_range, self.v2 = width, window, unit_range, v2
        self.swinViT = SwinTransformer(
            1, width, (window,) * 3, (PATCH,) * 3, DEPTHS, NUM_HEADS, use_checkpoint=checkpointing, spatial_dims=3, use_v2=v2
        )
        last = width * 2 ** len(DEPTHS)
        self.contrastive_head = nn.Linear(last, CONTRASTIVE_DIM) if contrastive else nn.Identity()
        self.embed_dim = CONTRASTIVE_DIM if contrastive else last

    def in_own_range(self, x: Tensor) -> Tensor:
        """Intensities of [-1, 1] as the network takes them."""
        return (x + 1) / 2 if self.unit_range else x

    def forward(self, x: Tensor, normalize: bool = True) -> list[Tensor]:
        """[B, 1, H, W, D], in its own range -> maps at 1/2 to 1/32 of the size, width to 16 times as many channels.

        MONAI's own pass takes einops for what two permutations do here.

        Args:
            x: Edges multiples of 32.
            normalize: Each map over its channels, without parameters.
        """
        swin = self.swinViT
        x = swin.patch_embed(x)
        maps = [x]
        for stage in range(1, 1 + len(DEPTHS)):
            x = getattr(swin, f"layers{stage}c")[0](x) if self.v2 else x
            x = _stage(getattr(swin, f"layers{stage}")[0], x)
            maps.append(x)
        return [_over_channels(m) for m in maps] if normalize else maps

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As of `Backbone`; there is one layer.

        Raises:
            ValueError: `n` names others.
        """
        if (n if isinstance(n, int) else list(n)) not in (1, [0]):
            raise ValueError(f"n={n}: this network gives its last stage alone")
        last = self(self.in_own_range(x), norm)[-1]  # [B, C, h, w, d]
        cells = self.contrastive_head(last.flatten(2).transpose(1, 2))  # [B, N, E]
        cls = self.contrastive_head(last.flatten(2).mean(2))  # [B, E]
        patches = cells.transpose(1, 2).unflatten(2, last.shape[2:]) if reshape else cells
        return ((patches, cls),) if return_class_token else (patches,)


def _stage(layer: Any, x: Tensor) -> Tensor:
    """Blocks and merging of one of MONAI's stages: [B, c, h, w, d] -> [B, 2c, h/2, w/2, d/2]."""
    from monai.networks.nets.swin_unetr import compute_mask, get_window_size

    window, shift = get_window_size(x.shape[2:], layer.window_size, layer.shift_size)
    padded = [-(-n // w) * w for n, w in zip(x.shape[2:], window, strict=True)]
    mask = compute_mask(padded, window, shift, x.device)
    x = x.movedim(1, -1)  # [B, h, w, d, c]
    for block in layer.blocks:
        x = block(x, mask)
    return layer.downsample(x).movedim(-1, 1).contiguous()


def _over_channels(x: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def _own_name(key: str) -> str:
    """How `SwinEncoder3d` calls a tensor of MONAI's pretraining, of its SwinUNETR, or of the published file."""
    key = re.sub(r"^(module\.)+", "", key)
    key = _ENCODER.sub("swinViT.", key, count=1) if _ENCODER.match(key) else key
    return key.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")


def swin_width(state: StateDict, source: str | Path) -> int:
    """The width of the network that some weights are of.

    Raises:
        BadInput: They are of no Swin transformer on volumes of one channel.
    """
    embedding = next((v for k, v in state.items() if _own_name(k) == _EMBEDDING), None)
    if embedding is None or embedding.ndim != 5:
        raise BadInput(
            f"weights {source}: none of their {len(state)} tensors is a 3D Swin transformer's (patch_embed.proj.weight): "
            "give MONAI's model_swinvit.pt"
        )
    width, channels = embedding.shape[:2]
    if channels != 1 or width % 12:
        raise BadInput(
            f"weights {source}: of a Swin transformer on {channels} channels of width {width}: give one on single channels, "
            "of a width that is a multiple of 12, such as MONAI's model_swinvit.pt"
        )
    return width


def load_swin(
    encoder: SwinEncoder3d,
    state: StateDict,
    source: str | Path,
    advice: str = "give the whole file, such as MONAI's model_swinvit.pt",
) -> None:
    """Fill an encoder by key; its `used` says what was taken, and what the file holds beside it.

    Args:
        encoder: Filled in place.
        state: By the names that they were saved under.
        source: Named in messages.
        advice: What to do where they do not fit.

    Raises:
        BadInput: Nothing fits, or not all of it.
    """
    swin_width(state, source)
    saved = {_own_name(k): k for k in state}
    own = encoder.state_dict()
    missing = [k for k in own if k not in saved]
    both = [k for k in own if k in saved]
    reshaped = [
        f"{saved[k]} {tuple(state[saved[k]].shape)} for {tuple(own[k].shape)}"
        for k in both
        if state[saved[k]].shape != own[k].shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for kind, names in (("missing", missing), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise BadInput(f"weights {source}: fit this Swin transformer only in part: {'; '.join(problems)}: {advice}")
    taken = {k: state[saved[k]] for k in own}
    other = [k for k in own if k.endswith("relative_position_index") and not bool((taken[k] == own[k]).all())]
    if other:
        raise BadInput(
            f"weights {source}: {saved[other[0]]} is of other attention windows than {encoder.window} cubed: of another network"
        )
    refuse_non_finite(taken, f"weights {source}")
    encoder.load_state_dict(taken)
    encoder.used = Used(str(source), [saved[k] for k in own], sorted(set(state) - {saved[k] for k in own}))
