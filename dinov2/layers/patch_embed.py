"""Volumes to patch tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dinov2.geometry import Size3


class PatchEmbed3d(nn.Module):
    """Non-overlapping cubic patches, each projected linearly (a Conv3d of stride = kernel, named `proj`).

    Args:
        img_size: Edge, or edges, of the volumes (voxels) that `patches_resolution` and `num_patches` are told for; any size
            that is a multiple of the patch passes.
        patch_size: Edge of a patch (voxels).
        in_chans: Input channels.
        embed_dim: E.
        norm_layer: Made for E and applied to the patches; None: none.
        flatten_embedding: False leaves the patches on their grid.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 96,
        patch_size: int = 16,
        in_chans: int = 1,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patches_resolution = self.grid((img_size,) * 3 if isinstance(img_size, int) else img_size)
        self.num_patches = math.prod(self.patches_resolution)
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def grid(self, size_hwd: Sequence[int]) -> Size3:
        """Patches along H, W, D.

        Raises:
            ValueError: A side is not a multiple of the patch size.
        """
        p = self.patch_size
        if any(s % p or s < p for s in size_hwd):
            raise ValueError(f"volume of {tuple(size_hwd)} voxels: every side must be a multiple of the patch size {p}")
        h, w, d = size_hwd
        return h // p, w // p, d // p

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W, D] -> [B, N, E], patches in C order of (H, W, D), or [B, h, w, d, E].

        The same convolution as `self.proj(x)`, written as a matrix product: kernel and stride are equal, and a general
        convolution is several times slower on a CPU.
        """
        b, c, *size_hwd = x.shape
        p = self.patch_size
        h, w, d = self.grid(size_hwd)
        x = x.reshape(b, c, h, p, w, p, d, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
        x = x.reshape(b, h * w * d, c * p**3)
        tokens = self.norm(nn.functional.linear(x, self.proj.weight.flatten(1), self.proj.bias))
        return tokens if self.flatten_embedding else tokens.unflatten(1, (h, w, d))
