"""Self-attention over packed sequences: crops of every size share one token matrix, and attend only within themselves.

Shapes: T all tokens of a pass, n sequences of one length, N tokens a sequence, h heads, d channels a head, E = h*d.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.rope import RotaryTable, rotate
from dinov2.optional import install_words


class Segment(NamedTuple):
    """A run of equally long sequences in the packed token matrix: `num_sequences * length` consecutive rows."""

    num_sequences: int
    length: int
    rotary: RotaryTable | None = None  # of one sequence, where positions are rotary

    @property
    def num_rows(self) -> int:
        return self.num_sequences * self.length


def resolve_attention(kind: str, device_type: str) -> str:
    """`sdpa` or `xformers` for the configured `student.attention`.

    Raises:
        ValueError: xformers is asked for where it is not installed or the device is not CUDA.
    """
    can_xformers = device_type == "cuda" and importlib.util.find_spec("xformers") is not None
    if kind == "xformers" and not can_xformers:
        raise ValueError(f"student.attention=xformers needs CUDA and xformers ({install_words('xformers')}): use sdpa or auto")
    return "xformers" if kind != "sdpa" and can_xformers else "sdpa"


def packed_attention(qkv: Tensor, segments: list[Segment], kind: str = "sdpa") -> Tensor:
    """Softmax attention within each sequence of a packed batch.

    Args:
        qkv: [T, 3, h, d], rows in the order of `segments`.
        segments: The runs of sequences; their rows add up to T.
        kind: `sdpa` (one call per sequence length, any device) or `xformers` (one block-diagonal call, CUDA).

    Returns:
        [T, h, d].
    """
    if kind == "xformers":
        return _xformers_attention(qkv, segments)
    num_rows = [seg.num_sequences * seg.length for seg in segments]  # torch 2.6 compiles no property of what holds a table
    out = []
    for seg, rows in zip(segments, qkv.split(num_rows), strict=True):
        q, k, v = rows.view(seg.num_sequences, seg.length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)  # 3 x [n, h, N, d]
        q, k = rotate(q, seg.rotary), rotate(k, seg.rotary)
        attended = F.scaled_dot_product_attention(q, k, v)  # [n, h, N, d]
        out.append(attended.transpose(1, 2).reshape(rows.shape[0], *qkv.shape[2:]))
    return torch.cat(out) if len(out) > 1 else out[0]


def _xformers_attention(qkv: Tensor, segments: list[Segment]) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    q, k, v = qkv.unbind(1)  # 3 x [T, h, d]
    if segments[0].rotary is not None:
        tables = [seg.rotary.repeat(seg.num_sequences) for seg in segments if seg.rotary is not None]
        table = RotaryTable(torch.cat([t.cos for t in tables])[:, None], torch.cat([t.sin for t in tables])[:, None])
        q, k = rotate(q, table), rotate(k, table)
    lengths = [seg.length for seg in segments for _ in range(seg.num_sequences)]
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


class Attention(nn.Module):
    """Multi-head self-attention with DINOv2's parameter names (`qkv`, `proj`)."""

    ends = ("qkv", "proj")  # see layers/folding.py

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, proj_bias: bool = True, kind: str = "sdpa") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kind = kind
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, segments: list[Segment] | None = None) -> Tensor:
        """[T, E] -> [T, E]; without segments, as DINOv2 calls it, [B, N, E] -> [B, N, E]."""
        if segments is None:
            return self.forward(x.flatten(0, 1), [Segment(*x.shape[:2])]).view(x.shape)
        qkv = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1)
        return self.proj(packed_attention(qkv, segments, self.kind).flatten(1))

    def weights(self, x: Tensor, queries: Sequence[int] | None = None, rotary: RotaryTable | None = None) -> Tensor:
        """Softmax weights, which `forward` never holds: rows of the given tokens, in at least float32.

        Args:
            x: [B, N, E].
            queries: Tokens whose rows are wanted; None: all, N x N of them.
            rotary: As of the segment.

        Returns:
            [B, h, Q, N], rows sum to 1.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, h, d]
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).to(torch.promote_types(qkv.dtype, torch.float32))  # 3 x [B, h, N, d]
        q, k = rotate(q, rotary), rotate(k, rotary)
        if queries is not None:
            q = q[:, :, list(queries)]
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


class MemEffAttention(Attention):
    """DINOv2's name and arguments of `Attention`; crops of several sizes are told by `segments`, not by `attn_bias`."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        if attn_drop or proj_drop:
            raise NotImplementedError("MemEffAttention: there is no dropout here, as in the published networks: leave it at 0")
        super().__init__(dim, num_heads, qkv_bias, proj_bias)

    def forward(self, x: Tensor, segments: list[Segment] | None = None, attn_bias: object = None) -> Tensor:
        """[B, N, E] -> [B, N, E], or as of `Attention`."""
        if attn_bias is not None:
            raise NotImplementedError("MemEffAttention: attn_bias has no counterpart here: tell sequences by `segments`")
        return super().forward(x, segments)
