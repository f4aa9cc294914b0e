"""Public encoders of others as `Backbone`s, by `module:function`; their weights are the user's to give, none is here.

Networks are MONAI's classes, or this package's layers put together by published facts; tensors go in by name. docs/encoders.md
says what is known of each, its licence, and which encoders cannot be had so.

# B batch, H W D voxels, h w d cells, N = h * w, E embedding, S slices
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import BadInput
from dinov2.layers import Block, Mlp, Segment, SwiGLUFFN
from dinov2.models.backbone import Preparation
from dinov2.models.swin import SwinEncoder3d, load_swin, swin_width
from dinov2.models.weights import StateDict, plain_names

logger = logging.getLogger(__name__)

MODULE = __name__
_FAMILIES = (  # what a tensor's name and number of axes tell; the first that fits
    (r"(^|\.)conv_init\.weight$", 5, "a SegResNet (CT-FM)"),
    (r"(^|\.)layers1\.0\.blocks\.0\.attn\.qkv\.weight$", 2, "a 3D Swin transformer (VoCo, MONAI's model_swinvit.pt)"),
    (r"(^|\.)(rope_embed\.periods|storage_tokens)$", 0, "DINOv3"),
    (r"(^|\.)patch_embed\.proj\.weight$", 4, "a 2D ViT in Meta's layout (DINOv2)"),
    (r"(^|\.)patch_embed\.proj\.weight$", 5, "a 3D ViT (this package, 3DINO, SPECTRE)"),
    (r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$", 0, "a ViT in the layout of transformers"),
    (r"(^|\.)stem\.convs\.0\.conv\.weight$", 0, "an nnU-Net network (ResEnc of nnssl)"),
    (r"(^|\.)eva\.blocks\.", 0, "a Primus (nnssl)"),
)
SEGRES, SWIN, VIT_2D = (_FAMILIES[i][2] for i in (0, 1, 3))


def ct_fm(state: StateDict) -> SegResFeatures:
    """CT-FM's feature extractor (or the encoder of its SegResNet): MONAI's SegResEncoder.

    Raises:
        BadInput: Weights of another family.
    """
    first = tensor_of_family(state, SEGRES)
    encoder = SegResFeatures(32 if first is None else len(state[first]))
    if first is not None:
        prefix = first.removesuffix("conv_init.weight")
        taken = {
            k.removeprefix(prefix): v for k, v in state.items() if k.startswith((prefix + "conv_init.", prefix + "layers."))
        }
        _fill(encoder.net, taken, len(state))
    return encoder


def voco(state: StateDict) -> SwinEncoder3d:
    """The encoder of VoCo's SwinUNETR (B, L and H, with the convolutions of its second version where they are there).

    Raises:
        BadInput: Weights of another family, or a part of them.
    """
    first = tensor_of_family(state, SWIN)
    is_v2 = first is None or any(".layers1c." in f".{k}" for k in state)
    width = 48 if first is None else swin_width(state, "of VoCo")
    encoder = SwinEncoder3d(width, unit_range=True, v2=is_v2)
    if first is not None:
        load_swin(encoder, state, "of VoCo", "give the whole file, such as VoComni_B.pt")
        logger.info("%s", encoder.used)
    encoder.preparation = Preparation((-175.0, 250.0), "RAS", "CT")
    encoder.licence = "VoCo's weights: ask their authors (github.com/Luffy03/Large-Scale-Medical)"
    return encoder


def dinov2_slices(state: StateDict) -> SliceViT:
    """DINOv2's 2D ViTs (S, B, L, g; with registers or not), slice by slice.

    Raises:
        BadInput: Weights of another family.
    """
    first = tensor_of_family(state, VIT_2D)
    if first is None:
        return SliceViT(384, 12, 16, 0, is_gated=False)
    prefix = first.removesuffix("patch_embed.proj.weight")
    plain = plain_names({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    plain = {k: v for k, v in plain.items() if not k.split(".")[0].endswith("head") and k != "mask_token"}
    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", k) for k in plain) if m}
    registers = plain["register_tokens"].shape[1] if "register_tokens" in plain else 0
    if "pos_embed" not in plain or plain[_EMBEDDING].shape[1:] != (3, PATCH, PATCH):
        raise BadInput(
            f"a 2D ViT on patches of {tuple(plain[_EMBEDDING].shape[1:])}: give one of DINOv2's, with patches of {PATCH}"
        )
    edge = round((plain["pos_embed"].shape[1] - 1) ** 0.5)
    encoder = SliceViT(len(plain[_EMBEDDING]), len(blocks), edge, registers, is_gated="blocks.0.mlp.w12.weight" in plain)
    _fill(encoder, plain, len(state))
    return encoder


class _LastMap(nn.Module):
    """A `Backbone` of one layer: the cells of a network's last map, and their mean as class token."""

    num_layers, num_prefix_tokens = 1, 0

    def last_map(self, x: Tensor) -> Tensor:
        """[B, 1, H, W, D] in [-1, 1] -> [B, E, h, w, d]."""
        raise NotImplementedError

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As of `Backbone`.

        Raises:
            ValueError: `n` names layers that are not there.
        """
        if (n if isinstance(n, int) else list(n)) not in (1, [0], [-1]):
            raise ValueError(f"n={n}: this network gives its last map alone")
        cells = self.last_map(x)
        patches = cells if reshape else cells.flatten(2).transpose(1, 2)
        return ((patches, cells.mean((2, 3, 4))),) if return_class_token else (patches,)


class SegResFeatures(_LastMap):
    """MONAI's SegResEncoder as CT-FM has it: five levels, the last one at a sixteenth of the size.

    Args:
        filters: Of the first level (32 published).
    """

    patch_size, input_size = 16, 96
    preparation = Preparation((-1024.0, 2048.0), "LPS", "CT")
    licence = "CT-FM's weights: see huggingface.co/project-lighter/ct_fm_feature_extractor"

    def __init__(self, filters: int = 32) -> None:
        super().__init__()
        from monai.networks.nets.segresnet_ds import SegResEncoder

        self.net = SegResEncoder(init_filters=filters, blocks_down=(1, 2, 2, 4, 4))
        self.embed_dim = 16 * filters

    def last_map(self, x: Tensor) -> Tensor:
        """Of volumes [L, P, S], shown as CT-FM saw them: [S, P, L] in [0, 1]."""
        return self.net((x.transpose(2, 4) + 1) / 2)[-1].transpose(2, 4)


PATCH = 14  # pixels of DINOv2's patches
CELL = 8  # voxels of a slice that a patch shows, and slices whose tokens make one cell
_EMBEDDING = "patch_embed.proj.weight"
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, which DINOv2 takes
_SLICES = 4 * CELL  # in one pass


class SliceViT(nn.Module):
    """DINOv2's 2D ViT on axial slices, frozen: the tokens of eight neighbouring slices are averaged into one cell.

    A slice is enlarged by 14/8 (a patch then shows 8 voxels, and cells are cubes), mapped to [0, 1], given three equal channels
    and normed by ImageNet's colours. The class token is the mean of the slices'.

    Args:
        embed_dim: E; a head has 64.
        depth: Blocks.
        edge: Of the grid that positions are learned for (37 published).
        registers: Tokens between class token and patches.
        is_gated: SwiGLU in place of an MLP (ViT-g).
    """

    patch_size, input_size = CELL, 14 * CELL
    preparation = Preparation(None, "PLS", None)
    licence = "DINOv2's weights: Apache-2.0 (Meta)"

    mean: Tensor
    std: Tensor

    def __init__(self, embed_dim: int, depth: int, edge: int, registers: int, is_gated: bool) -> None:
        super().__init__()
        self.embed_dim, self.num_layers, self.num_prefix_tokens = embed_dim, depth, 1 + registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + edge**2, embed_dim) * 0.02)
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        ffn: Callable[..., nn.Module] = SwiGLUFFN if is_gated else Mlp
        self.blocks = nn.ModuleList(Block(embed_dim, embed_dim // 64, init_values=1.0, ffn_layer=ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.register_buffer("mean", torch.tensor(COLOUR_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(COLOUR_STD).view(1, 3, 1, 1), persistent=False)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As of `Backbone`.

        Raises:
            ValueError: `n` names blocks that do not exist, or a side is not a multiple of a cell.
        """
        take = list(range(self.num_layers - n, self.num_layers)) if isinstance(n, int) else [i % self.num_layers for i in n]
        b, _, *size = x.shape
        if not take or min(take) < 0 or any(s % CELL for s in size):
            raise ValueError(f"layers {n} of {self.num_layers}, volume of {tuple(size)} voxels: sides are multiples of {CELL}")
        h, w, d = (s // CELL for s in size)
        slices = x[:, 0].movedim(-1, 1).flatten(0, 1)[:, None]  # [B * D, 1, H, W], whole cells in a pass
        parts = [self._of_slices(part, take, norm) for part in slices.split(_SLICES)]
        outputs = []
        for tokens, cls in (
            (torch.cat([p[i][0] for p in parts]), torch.cat([p[i][1] for p in parts])) for i in range(len(take))
        ):
            maps = tokens.unflatten(1, (h, w)).unflatten(0, (b, d)).permute(0, 4, 2, 3, 1)  # [B, E, h, w, d]
            patches = maps if reshape else maps.flatten(2).transpose(1, 2)
            outputs.append((patches, cls.unflatten(0, (b, d)).mean(1)) if return_class_token else patches)
        return tuple(outputs)

    def _of_slices(self, slices: Tensor, take: list[int], norm: bool) -> list[tuple[Tensor, Tensor]]:
        """[S, 1, H, W] in [-1, 1] -> for each block taken cells [S / 8, N, E] and class tokens [S / 8, E]."""
        size = [s // CELL * PATCH for s in slices.shape[2:]]
        images = F.interpolate((slices + 1) / 2, size, mode="bilinear", align_corners=False)
        tokens = self.patch_embed["proj"]((images - self.mean) / self.std)  # [S, E, h, w]
        grid = tokens.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(slices), -1, -1), tokens.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + self._positions(grid[0], grid[1]).to(tokens.dtype)
        if self.register_tokens is not None:
            tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(len(slices), -1, -1), tokens[:, 1:]], 1)
        packed, segment = tokens.flatten(0, 1), [Segment(*tokens.shape[:2])]
        found = {}
        for i, block in enumerate(self.blocks):
            packed = block(packed, segment)
            if i in take:
                out = (self.norm(packed) if norm else packed).view(tokens.shape).unflatten(0, (-1, CELL)).mean(1)
                found[i] = out[:, self.num_prefix_tokens :], out[:, 0]
        return [found[i] for i in take]

    def _positions(self, h: int, w: int) -> Tensor:
        """[1, 1 + N, E] brought to another grid as DINOv2 does it: with an offset; of networks with registers anti-aliased."""
        edge = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if (h, w) == (edge, edge):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (edge, edge)).permute(0, 3, 1, 2)
        if self.register_tokens is None:
            scale = ((h + 0.1) / edge, (w + 0.1) / edge)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        else:
            grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], 1)


def tensor_of_family(state: StateDict, wanted: str) -> str | None:
    """The name of the tensor that tells a family (`VIT_2D`, ...); None of an untrained network.

    Raises:
        BadInput: The weights are of another family, which is named.
    """
    if not state:
        return None
    for pattern, ndim, family in _FAMILIES:
        found = next((k for k, v in state.items() if re.search(pattern, k) and (not ndim or v.ndim == ndim)), None)
        if found is not None:
            if family != wanted:
                raise BadInput(f"they are of {family}, not of {wanted}")
            return found
    raise BadInput(f"none of their {len(state)} tensors is one of {wanted}")


def _fill(module: nn.Module, state: StateDict, num_saved: int) -> None:
    """Load tensors by name, all of the module's and no others.

    Raises:
        BadInput: They do not fit; the first names of each kind are given.
    """
    own = module.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    other = [f"{k} {tuple(v.shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", other))
    problems = [f"{len(names)} {kind} ({', '.join(names[:2])})" for kind, names in kinds if names]
    if problems:
        raise BadInput(f"their tensors fit only in part: {'; '.join(problems)}: give the published file whole")
    module.load_state_dict(state)
    logger.info("%d of %d tensors used", len(own), num_saved)
