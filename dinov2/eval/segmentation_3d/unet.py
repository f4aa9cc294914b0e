"""MONAI's DynUNet by a plan, as a network of its own."""

from __future__ import annotations

from torch import Tensor, nn

from dinov2.eval.methods.unet_plan import UNetPlan
from dinov2.layers.plain_memory import in_plain_memory

WIDEST = 10  # times the first width


class UNet3d(nn.Module):
    """A U-Net of plain convolutions, instance norm and leaky ReLU, as nnU-Net's; all channels enter at once.

    Without deep supervision: one output and one loss, as the methods beside it.

    Args:
        plan: Strides and kernels.
        width: Features of the first stage; twice as many at each next one, up to ten times.
        num_channels, num_outputs: Of a scan, of the recipe.
    """

    backbone = None  # nothing of it was there before

    def __init__(self, plan: UNetPlan, width: int, num_channels: int, num_outputs: int) -> None:
        super().__init__()
        from monai.networks.nets import DynUNet

        filters = [min(width * 2**i, WIDEST * width) for i in range(len(plan.strides))]
        self.network = DynUNet(3, num_channels, num_outputs, plan.kernels, plan.strides, plan.strides[1:], filters)
        in_plain_memory(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W, D], edges multiples of the plan's divisor -> logits [B, R, H, W, D]."""
        return self.network(x)
