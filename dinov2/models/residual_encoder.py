"""The encoder of nnU-Net's ResEnc presets, which nnssl pretrains: residual blocks with average-pooled shortcuts (ResNet-D).

Names of its tensors are those of published weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class _Conv(nn.Module):
    """Convolution and instance norm."""

    def __init__(self, channels_in: int, channels: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class _Residual(nn.Module):
    """Two convolutions; the shortcut is pooled where they step, and projected where channels differ."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Conv(channels_in, channels, stride=stride), _Conv(channels, channels)
        pool: list[nn.Module] = [nn.AvgPool3d(stride)] if stride > 1 else []
        projected = [_Conv(channels_in, channels, 1, bias=False)] if channels_in != channels else []
        self.skip = nn.Sequential(*pool, *projected)
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.act(self.conv1(x))) + self.skip(x))


class ResidualEncoder(nn.Module):
    """Stem and stages, each but the first at half of the size before.

    Args:
        widths: Channels of each stage.
        blocks: Of each stage.
    """

    def __init__(
        self, widths: Sequence[int] = (32, 64, 128, 256, 320, 320), blocks: Sequence[int] = (1, 3, 4, 6, 6, 6)
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.stem = nn.ModuleDict({"convs": nn.Sequential(_Conv(1, widths[0]))})
        stages, before = [], widths[0]
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            first = _Residual(before, width, 2 if number else 1)
            rest = [_Residual(width, width, 1) for _ in range(count - 1)]
            stages.append(nn.ModuleDict({"blocks": nn.Sequential(first, *rest)}))
            before = width
        self.stages = nn.ModuleList(stages)
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, H, W, D] -> the last stage's map [B, C, H / 2^(stages - 1), ...]."""
        x = self.act(self.stem["convs"](x))
        for stage in self.stages:
            x = stage.get_submodule("blocks")(x)
        return x
