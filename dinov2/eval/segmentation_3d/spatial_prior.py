"""The convolutional side of the adapter: features of the image itself at 1/2, 1/4, 1/8 and 1/16 of its size.

# B batch, C channels, E width of the transformer
"""

from __future__ import annotations

from torch import Tensor, nn


def _conv(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv3d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(channels_out), nn.ReLU(inplace=True))


class SpatialPriorModule(nn.Module):
    """Image to a pyramid of width E; all channels of a volume go in together.

    Args:
        in_chans: C.
        embed_dim: E.
        inplanes: Channels at 1/2; twice as many at 1/4, four times at 1/8 and 1/16.

    Source: ViT-Adapter (Chen et al., 2022), spatial prior module; 3DINO paper, "3D ViT-Adapter": one octave finer, since 32
    does not divide 112.
    """

    def __init__(self, in_chans: int, embed_dim: int, inplanes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(in_chans, inplanes, 2), _conv(inplanes, inplanes, 1), _conv(inplanes, inplanes, 1))
        self.conv2 = _conv(inplanes, 2 * inplanes, 2)
        self.conv3 = _conv(2 * inplanes, 4 * inplanes, 2)
        self.conv4 = _conv(4 * inplanes, 4 * inplanes, 2)
        widths = (inplanes, 2 * inplanes, 4 * inplanes, 4 * inplanes)
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv3d(width, embed_dim, 1) for width in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, C, H, W, D] -> four [B, E, h, w, d] at 1/2, 1/4, 1/8 and 1/16 (rounded up)."""
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)
