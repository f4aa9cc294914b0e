"""The 3D vision transformer of 3DINO: DINOv2's network with cubic patches and trilinear position interpolation.

Shapes: B batch, C channels, H W D voxels, h w d patches, N = h*w*d, R registers, E embedding, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.configs.schema import ARCH_SHAPES
from dinov2.geometry import Size3
from dinov2.layers import Block, Mlp, PatchEmbed3d, Segment, SwiGLUFFN
from dinov2.layers.recompute import run_block
from dinov2.layers.rope import rotary_table

FFN_LAYERS = {"mlp": Mlp, "swiglu": SwiGLUFFN, "swiglufused": SwiGLUFFN}


class BlockChunk(nn.ModuleList):
    """A group of blocks (`block_chunks`), in front of them empty places, so that a block keeps its index."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, E] -> [B, N, E], as DINOv2 calls it; positions are learned ones."""
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer3d(nn.Module):
    """Vision transformer on volumes, with the parameter names of DINOv2.

    Args:
        img_size: Edge of the volume (voxels) that the learned positions are laid out for.
        patch_size: Edge of a cubic patch (voxels).
        in_chans: Input channels.
        embed_dim: Token width E.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over E.
        qkv_bias, proj_bias, ffn_bias: Biases of the linear layers.
        drop_path_rate: Stochastic depth.
        drop_path_uniform: The same rate in every block; False rises linearly from 0.
        init_values: Start of LayerScale; None leaves it out.
        ffn_layer: `mlp`, `swiglu` or `swiglufused`.
        block_chunks: Groups in the names of the blocks (`blocks.1.13` for `blocks.13`); 0 is flat.
        num_register_tokens: R.
        pos_encoding: `learned` (added to the tokens) or `rope` (no parameters).
        interpolate_offset: Added to the grid size in the scale of the interpolation, as the published weights were
            trained; 0 interpolates to the exact size.
        init: Linear layers `trunc_normal` (std 0.02) or `xavier` (uniform; the patch embedding too).
        attention: `sdpa` or `xformers`.
    """

    def __init__(
        self,
        img_size: int = 96,
        patch_size: int = 16,
        in_chans: int = 1,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        ffn_layer: str = "mlp",
        block_chunks: int = 0,
        num_register_tokens: int = 0,
        pos_encoding: str = "learned",
        interpolate_offset: float = 0.1,
        init: str = "trunc_normal",
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.embed_dim = self.num_features = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_offset = interpolate_offset
        self.recompute_blocks = False  # see run_block
        self.patch_embed = PatchEmbed3d(img_size, patch_size, in_chans, embed_dim)
        self.grid_hwd = self.patch_embed.patches_resolution  # of the learned positions
        num_patches = self.patch_embed.num_patches

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        learned = pos_encoding == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dim)) if learned else None
        self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))

        rates = [drop_path_rate * (1.0 if drop_path_uniform else i / max(depth - 1, 1)) for i in range(depth)]
        make_block = partial(
            Block, embed_dim, num_heads, mlp_ratio, qkv_bias, proj_bias, ffn_bias,
            init_values=init_values, ffn_layer=FFN_LAYERS[ffn_layer], attention=attention,
        )  # fmt: skip
        self.blocks = _chunked([make_block(drop_path=r) for r in rates], block_chunks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        self._init_weights(init)

    def _init_weights(self, init: str) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight) if init == "xavier" else nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if init == "xavier":
            projection = self.patch_embed.proj
            nn.init.xavier_uniform_(projection.weight.data.flatten(1))  # a view: fills the weight
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        token_std = 0.02 if init == "xavier" else 1e-6
        nn.init.normal_(self.cls_token, std=token_std)
        if init == "xavier":
            nn.init.normal_(self.mask_token, std=token_std)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=token_std)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def block_list(self) -> list[Block]:
        """The blocks in order, whether their names are chunked or flat."""
        return [b for b in self.blocks.modules() if isinstance(b, Block)]

    @property
    def num_layers(self) -> int:
        return len(self.block_list)

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.num_register_tokens

    @property
    def input_size(self) -> int:
        """Edge of the volumes that positions are laid out for (voxels)."""
        return self.patch_size * self.grid_hwd[0]

    def interpolate_pos_encoding(self, grid_hwd: Size3) -> Tensor:
        """Learned positions brought trilinearly to another grid: [1, 1 + N, E], the class token's first.

        Raises:
            ValueError: Positions are rotary.
        """
        if self.pos_embed is None:
            raise ValueError("pos_encoding=rope: there are no learned positions to interpolate")
        if grid_hwd == self.grid_hwd:
            return self.pos_embed
        return resize_pos_embed(self.pos_embed, self.grid_hwd, grid_hwd, self.interpolate_offset)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """[B, C, H, W, D] (and [B, N] bool, True = masked) -> [B, 1 + R + N, E]."""
        tokens = self.patch_embed(x)  # [B, N, E]
        if masks is not None:
            tokens = torch.where(masks[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(x.shape[0], -1, -1), tokens], 1)
        if self.pos_embed is not None:
            tokens = tokens + self.interpolate_pos_encoding(self.patch_embed.grid(x.shape[2:])).to(tokens.dtype)
        if self.register_tokens is not None:
            registers = self.register_tokens.to(tokens.dtype).expand(x.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1)
        return tokens

    def segment(self, x: Tensor, tokens: Tensor) -> Segment:
        """How the tokens [B, 1 + R + N, E] of a batch [B, C, H, W, D] lie in a pass of their own."""
        if self.pos_embed is not None:
            return Segment(tokens.shape[0], tokens.shape[1])
        grid, head_dim = self.patch_embed.grid(x.shape[2:]), self.embed_dim // self.num_heads
        table = rotary_table(grid, head_dim, 1 + self.num_register_tokens, tokens)
        return Segment(tokens.shape[0], tokens.shape[1], table)

    def _pack(self, xs: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, list[Segment]]:
        """Crops of any sizes to one token matrix [T, E] and its segments."""
        tokens = [self.prepare_tokens_with_masks(x, m) for x, m in zip(xs, masks, strict=True)]
        segments = [self.segment(x, t) for x, t in zip(xs, tokens, strict=True)]
        return torch.cat([t.flatten(0, 1) for t in tokens]), segments

    def run_blocks(self, tokens: Tensor, segment: Segment, first: int, last: int) -> Tensor:
        """Blocks `first` to `last` (exclusive) on one batch, [B, 1 + R + N, E] -> the same."""
        packed = tokens.flatten(0, 1)
        for block in self.block_list[first:last]:
            packed = run_block(block, packed, [segment], self.recompute_blocks)
        return packed.view(tokens.shape)

    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """Tokens of one batch, or of a list of batches of different crop size in one pass.

        Args:
            x: [B, C, H, W, D], or a list of such.
            masks: [B, N] bool, True = replaced by the mask token; or a list, None = nothing masked.

        Returns:
            A dict (a list of them for a list): `x_norm_clstoken` [B, E], `x_norm_regtokens` [B, R, E],
            `x_norm_patchtokens` [B, N, E], `x_prenorm` [B, 1 + R + N, E], `masks`.

        Raises:
            ValueError: A side is not a multiple of the patch size.
        """
        xs = x if isinstance(x, list) else [x]
        mask_list = masks if isinstance(masks, list) else [masks] * len(xs)
        packed, segments = self._pack(xs, mask_list)
        for block in self.block_list:
            packed = run_block(block, packed, segments, self.recompute_blocks)
        normed = self.norm(packed)  # [T, E]

        rows = [seg.num_rows for seg in segments]
        out = []
        for seg, pre, post, mask in zip(segments, packed.split(rows), normed.split(rows), mask_list, strict=True):
            pre, post = (t.view(seg.num_sequences, seg.length, -1) for t in (pre, post))
            out.append(
                {
                    "x_norm_clstoken": post[:, 0],
                    "x_norm_regtokens": post[:, 1 : 1 + self.num_register_tokens],
                    "x_norm_patchtokens": post[:, 1 + self.num_register_tokens :],
                    "x_prenorm": pre,
                    "masks": mask,
                }
            )
        return out if isinstance(x, list) else out[0]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens after chosen blocks.

        Args:
            x: [B, C, H, W, D].
            n: The last n blocks, or the indices of the blocks.
            reshape: Patches as [B, E, h, w, d] instead of [B, N, E].
            return_class_token: Pairs (patches, class token [B, E]) instead of patches.
            norm: Apply the final LayerNorm.

        Raises:
            ValueError: `n` names blocks that do not exist, or a side is not a multiple of the patch size.
        """
        depth = len(self.block_list)
        take = list(range(depth - n, depth)) if isinstance(n, int) else list(n)
        if not take or min(take) < 0 or max(take) >= depth:
            raise ValueError(f"n={n} names blocks outside 0..{depth - 1}")
        packed, segments = self._pack([x], [None])
        outputs = {}
        for i, block in enumerate(self.block_list):
            packed = run_block(block, packed, segments)
            if i in take:
                outputs[i] = packed.view(x.shape[0], segments[0].length, -1)
        tokens = [self.norm(outputs[i]) if norm else outputs[i] for i in take]
        patches = [t[:, 1 + self.num_register_tokens :] for t in tokens]
        if reshape:
            grid = self.patch_embed.grid(x.shape[2:])
            patches = [p.transpose(1, 2).reshape(x.shape[0], -1, *grid) for p in patches]
        if return_class_token:
            return tuple((p, t[:, 0]) for p, t in zip(patches, tokens, strict=True))
        return tuple(patches)

    def get_self_attention(self, x: Tensor, block: int = -1, queries: Sequence[int] | None = None) -> Tensor:
        """Attention weights of a block.

        Args:
            x: [B, C, H, W, D].
            block: Its index; negative ones count from the last.
            queries: Tokens whose rows are wanted (0: the class token, `num_prefix_tokens + i`: patch i), which is all that
                memory is taken for; None: all of them.

        Returns:
            [B, heads, Q, 1 + R + N] in at least float32, rows sum to 1.

        Raises:
            ValueError: No such block, or a side is not a multiple of the patch size.
        """
        depth = self.num_layers
        if not -depth <= block < depth:
            raise ValueError(f"block={block}: the network has {depth}, 0..{depth - 1} or -{depth}..-1")
        tokens = self.prepare_tokens_with_masks(x)
        segment = self.segment(x, tokens)
        index = block % depth
        of_block = self.block_list[index]
        tokens = of_block.norm1(self.run_blocks(tokens, segment, 0, index))
        return of_block.attn.weights(tokens, queries, segment.rotary)

    def forward(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None, is_training: bool = False
    ) -> Tensor | dict[str, Tensor | None] | list[dict[str, Tensor | None]]:
        """All tokens with `is_training`, otherwise the normed class token [B, E] alone."""
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            raise TypeError("a list of batches is for is_training=True: pass one batch for its class tokens")
        return self.head(features["x_norm_clstoken"])


def resize_pos_embed(pos_embed: Tensor, old_hwd: Size3, new_hwd: Size3, offset: float = 0.1) -> Tensor:
    """Position encoding [1, 1 + N, E] of one grid brought trilinearly to another; the class token's row stays.

    Args:
        offset: The scale is (new + offset) / old, as DINOv2 does it; 0 interpolates to the exact size.
    """
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    grid = pos_embed[:, 1:].to(dtype).reshape(1, *old_hwd, -1).permute(0, 4, 1, 2, 3)  # [1, E, h, w, d]
    size = None if offset else new_hwd
    scale = tuple((n + offset) / o for n, o in zip(new_hwd, old_hwd, strict=True)) if offset else None
    grid = F.interpolate(grid, size, scale, mode="trilinear")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], 1)


def _chunked(blocks: list[Block], num_chunks: int) -> nn.ModuleList:
    """Blocks as a flat list, or in groups whose inner index stays the block's own (empty places in front)."""
    if num_chunks == 0:
        return nn.ModuleList(blocks)
    size = len(blocks) // num_chunks
    starts = range(0, len(blocks), size)
    return nn.ModuleList(BlockChunk([*[nn.Identity()] * s, *blocks[s : s + size]]) for s in starts)


def _factory(embed_dim: int, depth: int, num_heads: int, **defaults: Any) -> Callable[..., DinoVisionTransformer3d]:
    def build(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer3d:
        sizes: dict[str, Any] = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        return DinoVisionTransformer3d(patch_size=patch_size, **{**sizes, **defaults, **kwargs})

    return build


vit_tiny_3d = _factory(*ARCH_SHAPES["vit_tiny_3d"])
vit_small_3d = _factory(*ARCH_SHAPES["vit_small_3d"])
vit_base_3d = _factory(*ARCH_SHAPES["vit_base_3d"])
vit_large_3d = _factory(*ARCH_SHAPES["vit_large_3d"])
vit_giant2_3d = _factory(*ARCH_SHAPES["vit_giant2_3d"], ffn_layer="swiglufused")

FACTORIES = {
    "vit_tiny_3d": vit_tiny_3d,
    "vit_small_3d": vit_small_3d,
    "vit_base_3d": vit_base_3d,
    "vit_large_3d": vit_large_3d,
    "vit_giant2_3d": vit_giant2_3d,
}
