"""A 3D vision transformer of medical volumes for transformers. This file stands alone: it needs torch and transformers.

Shapes: B scans, C channels, H W D voxels (slice axis last), h w d patches, N = h*w*d, R registers, T = 1 + R + N tokens,
E embedding, n heads, f rotary frequencies of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

Rotary = tuple[Tensor, Tensor]  # cosine and sine of every token's angles, [T, f] each


class Dinov2Vit3dConfig(PretrainedConfig):
    """What the network is.

    Args:
        hidden_size: E.
        num_hidden_layers, num_attention_heads: Blocks, heads of each.
        patch_size: Edge of a cubic patch (voxels).
        image_size: Edge of the volumes that learned positions are laid out for (voxels); others are interpolated.
        ffn_layer: `mlp` or `swiglu`.
        qkv_bias, proj_bias, ffn_bias: Biases of the linear layers.
        layerscale: A learned factor per channel on each residual branch.
        num_register_tokens: R.
        pos_encoding: `learned` or `rope`.
        interpolate_offset: Added to the grid in the scale of an interpolation, as in training; 0 is the exact size.
    """

    model_type = "dinov2_vit_3d"

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        patch_size: int = 16,
        image_size: int = 96,
        ffn_layer: str = "mlp",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        layerscale: bool = True,
        num_register_tokens: int = 0,
        pos_encoding: str = "learned",
        interpolate_offset: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.patch_size = patch_size
        self.image_size = image_size
        self.ffn_layer = ffn_layer
        self.qkv_bias = qkv_bias
        self.proj_bias = proj_bias
        self.ffn_bias = ffn_bias
        self.layerscale = layerscale
        self.num_register_tokens = num_register_tokens
        self.pos_encoding = pos_encoding
        self.interpolate_offset = interpolate_offset
        super().__init__(**kwargs)


class PatchEmbedding(nn.Module):
    """Cubic patches, each projected linearly."""

    def __init__(self, config: Dinov2Vit3dConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv3d(1, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, H, W, D] -> [B, N, E]; a matrix product, which a CPU computes faster than the same convolution."""
        p = self.proj.kernel_size[0]
        b, _, *size = x.shape
        h, w, d = (n // p for n in size)
        x = x.reshape(b, h, p, w, p, d, p).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, h * w * d, p**3)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class SelfAttention(nn.Module):
    """Multi-head attention, queries and keys turned where positions are rotary."""

    def __init__(self, config: Dinov2Vit3dConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, n, T, E / n]
        attended = F.scaled_dot_product_attention(turned(q, rotary), turned(k, rotary), v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config: Dinov2Vit3dConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.fc1 = nn.Linear(dim, 4 * dim, bias=config.ffn_bias)
        self.fc2 = nn.Linear(4 * dim, dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """SiLU-gated MLP of about as many parameters as the plain one."""

    def __init__(self, config: Dinov2Vit3dConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden, bias=config.ffn_bias)
        self.w3 = nn.Linear(hidden, dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Dinov2Vit3dConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(config)
        self.ls1 = LayerScale(dim) if config.layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGlu(config) if config.ffn_layer == "swiglu" else Mlp(config)
        self.ls2 = LayerScale(dim) if config.layerscale else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """[B, T, E] -> [B, T, E]."""
        x = x + self.ls1(self.attn(self.norm1(x), rotary))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Dinov2Vit3dModel(PreTrainedModel):
    """Class token, registers and patch tokens of volumes in [-1, 1], as the folder's image processor makes them."""

    config_class = Dinov2Vit3dConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: Dinov2Vit3dConfig) -> None:
        super().__init__(config)
        dim, num_registers = config.hidden_size, config.num_register_tokens
        self.grid = (config.image_size // config.patch_size,) * 3  # of the learned positions
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        learned = config.pos_encoding == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim)) if learned else None
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, dim)) if num_registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # of pretraining; not read here
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Of a network without weights."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif module is self and self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def patch_grid(self, size_hwd: tuple[int, int, int]) -> tuple[int, int, int]:
        """Patches along H, W, D of volumes of a size; the last N tokens are these, in C order."""
        h, w, d = (-(-n // self.config.patch_size) for n in size_hwd)
        return h, w, d

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Tokens of a batch.

        Each channel goes through the network alone, and tokens are averaged over channels.

        Args:
            pixel_values: [B, C, H, W, D] in [-1, 1]; padded with -1 at the far ends to whole patches.
            output_hidden_states: Also give the tokens before the first block and after each.
            return_dict: False gives a tuple.

        Returns:
            `last_hidden_state` [B, T, E], normed: the class token, R registers, N patches; `pooler_output` [B, E], the class
            token; `hidden_states`, not normed.
        """
        if pixel_values.ndim != 5:
            raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)}: expected [B, C, H, W, D]")
        num, channels = pixel_values.shape[:2]
        p = self.config.patch_size
        missing = [-n % p for n in pixel_values.shape[2:]]
        volumes = F.pad(pixel_values.flatten(0, 1)[:, None], (0, missing[2], 0, missing[1], 0, missing[0]), value=-1.0)
        h, w, d = volumes.shape[2:]
        grid = self.patch_grid((h, w, d))
        x, rotary = self._tokens(volumes.to(self.cls_token.dtype), grid), self._rotary(grid)
        mean = lambda t: t.unflatten(0, (num, channels)).mean(1)  # noqa: E731 - over channels
        states = [x]
        for block in self.blocks:
            x = block(x, rotary)
            states.append(x)
        tokens = mean(self.norm(x))  # [B, T, E]
        hidden = tuple(mean(s) for s in states) if output_hidden_states else None
        if return_dict is False:
            return (tokens, tokens[:, 0]) if hidden is None else (tokens, tokens[:, 0], hidden)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0], hidden_states=hidden)

    def _tokens(self, volumes: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, 1, H, W, D] -> tokens before the first block [B, T, E]."""
        x = self.patch_embed(volumes)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.pos_embed is not None:
            x = x + self._positions(self.pos_embed, grid).to(x.dtype)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        return x

    def _positions(self, learned: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Learned positions brought trilinearly to a grid, [1, 1 + N, E]; the class token's stays."""
        if grid == self.grid:
            return learned
        offset = self.config.interpolate_offset
        cells = learned[:, 1:].float().reshape(1, *self.grid, -1).permute(0, 4, 1, 2, 3)  # [1, E, h, w, d]
        scale = [(n + offset) / old for n, old in zip(grid, self.grid)] if offset else None  # noqa: B905
        cells = F.interpolate(cells, None if scale else grid, scale, mode="trilinear")
        return torch.cat([learned[:, :1].float(), cells.flatten(2).transpose(1, 2)], 1)

    def _rotary(self, grid: tuple[int, int, int]) -> Rotary | None:
        """Angles of all tokens where positions are rotary: three axes with f / 3 frequencies each."""
        if self.config.pos_encoding != "rope":
            return None
        device = self.cls_token.device
        num_freqs = self.config.hidden_size // self.config.num_attention_heads // 6
        steps = torch.arange(num_freqs, device=device, dtype=torch.float32) / max(num_freqs - 1, 1)
        freqs = math.pi * 0.05 * 12.0**steps
        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        angles = (places[:, :, None] * freqs).flatten(1)  # [N, f]
        still = angles.new_zeros(1 + self.config.num_register_tokens, angles.shape[1])  # the class token and registers
        angles = torch.cat([still, angles])
        return angles.cos(), angles.sin()


def turned(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Channel pairs (i, f + i) of [B, n, T, c] turned by their tokens' angles; channels from 2f on stay."""
    if rotary is None:
        return x
    cos, sin = (t.to(x.dtype) for t in rotary)
    f = cos.shape[-1]
    a, b, rest = x[..., :f], x[..., f : 2 * f], x[..., 2 * f :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
