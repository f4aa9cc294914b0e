"""Volumes to patch tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dinov2.geometry import Size3


class PatchEmbed3d(nn.Module):
    """Non-overlapping cubic patches, each projected linearly (a Conv3d of stride = kernel, named `proj`)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

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
        """[B, C, H, W, D] -> [B, N, E], patches in C order of (H, W, D).

        The same convolution as `self.proj(x)`, written as a matrix product: kernel and stride are equal, and a general
        convolution is several times slower on a CPU.
        """
        b, c, *size_hwd = x.shape
        p = self.patch_size
        h, w, d = self.grid(size_hwd)
        x = x.reshape(b, c, h, p, w, p, d, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
        x = x.reshape(b, h * w * d, c * p**3)
        return nn.functional.linear(x, self.proj.weight.flatten(1), self.proj.bias)
