"""MONAI's SwinUNETR around an encoder of this package, scans of several channels one channel at a time.

# B batch, K channels, R outputs
"""

from __future__ import annotations

from torch import Tensor, nn

from dinov2.eval.segmentation_3d.adapter import ChannelMerge
from dinov2.layers.plain_memory import in_plain_memory
from dinov2.models.swin import DEPTHS, NUM_HEADS, SwinEncoder3d


class ChannelwiseSwin(nn.Module):
    """The encoder in SwinUNETR's place for it: its maps of each channel side by side -> linear -> GELU; of one as they are.

    Source: 3DINO paper, "Multi-channel inputs".
    """

    def __init__(self, encoder: SwinEncoder3d, num_channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        widths = [encoder.width * 2**i for i in range(len(DEPTHS) + 1)]
        self.merges = nn.ModuleList(ChannelMerge(num_channels, w) for w in widths) if num_channels > 1 else None

    def forward(self, x: Tensor, normalize: bool = True) -> list[Tensor]:
        """[B, K, H, W, D] -> the five maps."""
        maps = self.encoder(x.flatten(0, 1)[:, None], normalize)  # [B*K, c, h, w, d] each
        if self.merges is None:
            return maps
        merged = [merge(m.flatten(2).transpose(1, 2)) for merge, m in zip(self.merges, maps, strict=True)]
        return [t.transpose(1, 2).unflatten(2, m.shape[2:]) for t, m in zip(merged, maps, strict=True)]


class SwinUNETR3d(nn.Module):
    """SwinUNETR with its own decoder; the image itself joins at the full size, all channels at once.

    Args:
        encoder: Its width and intensities are the network's.
        num_channels, num_outputs: K, R.

    Source: Hatamizadeh et al. (2022), MONAI's `SwinUNETR`; 3DINO paper, "SOTA segmentation comparisons".
    """

    def __init__(self, encoder: SwinEncoder3d, num_channels: int, num_outputs: int) -> None:
        super().__init__()
        from monai.networks.nets import SwinUNETR

        self.network = SwinUNETR(
            in_channels=num_channels, out_channels=num_outputs, depths=DEPTHS, num_heads=NUM_HEADS, feature_size=encoder.width
        )
        self.network.add_module("swinViT", ChannelwiseSwin(encoder, num_channels))  # in the place of MONAI's own
        in_plain_memory(self)

    @property
    def backbone(self) -> SwinEncoder3d:
        encoder = self.network.get_submodule("swinViT.encoder")
        assert isinstance(encoder, SwinEncoder3d)
        return encoder

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W, D] in [-1, 1], edges multiples of 32 -> logits [B, R, H, W, D]."""
        return self.network(self.backbone.in_own_range(x))
