"""DINOv2's and DINOv3's 2D ViTs on axial slices, as `Backbone`s of volumes.

# B batch, H W D voxels, h w d cells, N = h * w, E embedding, S slices
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers import Block, Mlp, Segment, SwiGLUFFN
from dinov2.layers.rope import centred_periods, centred_table
from dinov2.models.backbone import Preparation
from dinov2.models.weights import StateDict

CELL = 8  # voxels of a slice that a patch shows, and slices whose tokens make one cell
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, which DINOv2 takes
_SLICES = 4 * CELL  # in one pass


class SliceViT(nn.Module):
    """A 2D ViT on axial slices, frozen: the tokens of eight neighbouring slices are averaged into one cell.

    A slice is enlarged until a patch shows 8 voxels, so that cells are cubes, mapped to [0, 1], given three equal channels and
    normed by ImageNet's colours. The class token is the mean of the slices'.

    Args:
        embed_dim: E.
        depth: Blocks.
        edge: Of the grid that positions are learned for (37 of DINOv2's); 0: they are rotary (DINOv3).
        registers: Tokens between class token and patches.
        is_gated: SwiGLU in place of an MLP.
        patch: Its edge (pixels).
        head_dim: Channels of a head.
        mlp_ratio: Hidden width of the MLP over E, of a gated one 3/2 of it.
        eps: Of the layer norms.
    """

    patch_size, input_size = CELL, 14 * CELL
    preparation = Preparation(None, "PLS", None)
    licence: str

    mean: Tensor
    std: Tensor
    periods: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        edge: int,
        registers: int,
        is_gated: bool,
        patch: int = 14,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed_dim, self.num_layers, self.num_prefix_tokens = embed_dim, depth, 1 + registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + edge**2, embed_dim) * 0.02) if edge else None
        self.register_buffer("periods", None if edge else centred_periods(head_dim // 4, 100.0))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        ffn: Callable[..., nn.Module] = SwiGLUFFN if is_gated else Mlp
        heads = embed_dim // head_dim
        self.blocks = nn.ModuleList(Block(embed_dim, heads, mlp_ratio, init_values=1.0, ffn_layer=ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
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
        size = [s // CELL * self.patch for s in slices.shape[2:]]
        images = F.interpolate((slices + 1) / 2, size, mode="bilinear", align_corners=False)
        tokens = self.patch_embed["proj"]((images - self.mean) / self.std)  # [S, E, h, w]
        grid = tokens.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(slices), -1, -1), tokens.flatten(2).transpose(1, 2)], 1)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(self.pos_embed, grid[0], grid[1]).to(tokens.dtype)
        if self.register_tokens is not None:
            tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(len(slices), -1, -1), tokens[:, 1:]], 1)
        table = None if self.periods is None else centred_table(tuple(grid), self.periods, self.num_prefix_tokens)
        packed, segment = tokens.flatten(0, 1), [Segment(len(slices), tokens.shape[1], table)]
        found = {}
        for i, block in enumerate(self.blocks):
            packed = block(packed, segment)
            if i in take:
                out = (self.norm(packed) if norm else packed).view(tokens.shape).unflatten(0, (-1, CELL)).mean(1)
                found[i] = out[:, self.num_prefix_tokens :], out[:, 0]
        return [found[i] for i in take]

    def _positions(self, learned: Tensor, h: int, w: int) -> Tensor:
        """[1, 1 + N, E] brought to another grid as DINOv2 does it: with an offset; of networks with registers anti-aliased."""
        edge = round((learned.shape[1] - 1) ** 0.5)
        if (h, w) == (edge, edge):
            return learned
        grid = learned[:, 1:].float().unflatten(1, (edge, edge)).permute(0, 3, 1, 2)
        if self.register_tokens is None:
            scale = ((h + 0.1) / edge, (w + 0.1) / edge)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        else:
            grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=True)
        return torch.cat([learned[:, :1], grid.flatten(2).transpose(1, 2).to(learned.dtype)], 1)


_FROM_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(?:model\.)?layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
)
_NOT_FOR_FEATURES = ("mask_token", "local_cls_norm.")


def dinov3_tensors(state: StateDict) -> StateDict:
    """DINOv3's tensors, in Meta's layout or that of transformers, by the names of `SliceViT`.

    Args:
        state: Names without a prefix.
    """
    is_gated = any(".mlp.gate_proj." in k or ".mlp.w1." in k for k in state)
    plain = {}
    for name, tensor in state.items():
        for pattern, new in _FROM_TRANSFORMERS:
            name = re.sub(pattern, new, name)
        name = name.replace(".mlp.up_proj.", ".mlp.w2." if is_gated else ".mlp.fc1.")
        name = name.replace(".mlp.down_proj.", ".mlp.w3." if is_gated else ".mlp.fc2.")
        name = name.replace("storage_tokens", "register_tokens").replace("rope_embed.periods", "periods")
        if not name.startswith(_NOT_FOR_FEATURES):
            plain[name] = tensor
    for block in sorted({m[1] for m in (re.match(r"(blocks\.\d+)\.", k) for k in plain) if m}):
        _join_block(plain, block)
    width = plain["cls_token"].shape[-1] if "cls_token" in plain else 0
    plain.setdefault("periods", centred_periods((128 if width == 4096 else 64) // 4, 100.0))  # of the largest and all others
    return plain


def _join_block(plain: StateDict, block: str) -> None:
    """One tensor each, in place, of what our blocks hold together; biases that are masked or not there are zero."""
    attention = f"{block}.attention"
    if f"{attention}.q_proj.weight" in plain:
        weights = [plain.pop(f"{attention}.{part}_proj.weight") for part in "qkv"]
        zero = weights[0].new_zeros(len(weights[0]))
        biases = [plain.pop(f"{attention}.{part}_proj.bias", zero) for part in "qkv"]
        plain[f"{block}.attn.qkv.weight"], plain[f"{block}.attn.qkv.bias"] = torch.cat(weights), torch.cat(biases)
    mask = plain.pop(f"{block}.attn.qkv.bias_mask", None)
    if mask is not None and f"{block}.attn.qkv.bias" in plain:
        plain[f"{block}.attn.qkv.bias"] = plain[f"{block}.attn.qkv.bias"] * mask
    for kind in ("weight", "bias"):
        halves = [plain.pop(f"{block}.mlp.{part}.{kind}", None) for part in ("w1", "w2")]
        if halves[0] is not None and halves[1] is not None:
            plain[f"{block}.mlp.w12.{kind}"] = torch.cat([halves[0], halves[1]])
