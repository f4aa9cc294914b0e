"""The methods that can be compared (`--model-name`): one row says all that tells one from another.

Source: 3DINO paper, "SOTA segmentation comparisons", "Linear decoder segmentation", "3DINO classification".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dinov2.configs.errors import nearest
from dinov2.errors import BadInput
from dinov2.geometry import Edges, edges, not_whole

VIT_HEADS = ("ViTAdapterUNETR", "UNETR", "Linear")
HEADS = ("UNETR", "ViTAdapterUNETR", "Linear", "SwinUNETR", "DynUNet")
OURS = "3DINO"
SWIN_STRIDE = 32  # voxels of a cell of SwinUNETR's last map
EDGE = 96  # voxels, where nothing says one
LEARNING_RATE, LINEAR_LEARNING_RATE = 1e-4, 1e-3  # of a segmentation
BATCH, LINEAR_BATCH = 2, 4  # cases a step of a segmentation; four crops of each in the paper's sets
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Method:
    """A row of the registry.

    Attributes:
        name: As `--model-name` has it.
        kind: What its network is: `vit` (ours), `swin`, `unet`, or `encoder` (anyone's).
        what: A line for people.
        weights: `any` (trained, or random), `trained`, or `none`.
        heads: Of a segmentation; the first is the default.
        image_size: Edge of the input (voxels); None: planned from the list (`unet`), or the encoder's own.
        end_to_end: Its segmentation trains the encoder too, at one rate; a Linear head always leaves it frozen.
        classifies: It has a feature for classifications.
        batch_of_channels: Cases a step of a segmentation where scans have several channels; None: as with one.
        unit_range: It takes intensities in [0, 1] instead of [-1, 1].
        pooled: Its probe also tries the mean of the patch tokens.
        one_head: Why it has no other head.
    """

    name: str
    kind: str
    what: str
    weights: str
    heads: tuple[str, ...]
    image_size: int | None
    end_to_end: bool = False
    classifies: bool = True
    batch_of_channels: int | None = None
    unit_range: bool = False
    pooled: bool = True
    one_head: str = ""

    def misfit(self, task: str, head: str | None, image_size: Edges | None) -> str:
        """Why it cannot be run so; empty where it can, as far as its weights need not be known.

        Args:
            task: segmentation or classification.
            head: Of a segmentation; None: its own.
            image_size: Of the network's input (voxels); None: its own.
        """
        if task == "classification" and not self.classifies:
            have = ", ".join(m.name for m in METHODS.values() if m.classifies)
            return f"--model-name {self.name}: has no feature for a classification: use {have} or module:function"
        if head and head not in self.heads:
            why = f", {self.one_head}" if self.one_head else ""
            return f"--segmentation-head {head}: {self.name} has {' or '.join(self.heads)}{why}: leave the flag out"
        if self.kind == "swin" and image_size:
            if task == "segmentation" and edges(image_size) == edges(SWIN_STRIDE):
                return (
                    f"--image-size {SWIN_STRIDE} makes one voxel of SwinUNETR's last map, which has no spread: use 64 or more"
                )
            return not_whole(edges(image_size)[0], SWIN_STRIDE, "SwinUNETR's stride")
        return ""

    def trains_encoder(self, head: str) -> bool:
        """Whether a segmentation with this head trains all of the network unless told otherwise."""
        return self.end_to_end and head != "Linear"

    def cases_a_step(self, head: str, channels: int) -> int:
        """Of a segmentation, unless told otherwise."""
        if head == "Linear":
            return LINEAR_BATCH
        return self.batch_of_channels if channels > 1 and self.batch_of_channels else BATCH


_SWIN = Method(
    name="SwinRandom",
    kind="swin",
    what="MONAI's SwinUNETR from scratch",
    weights="none",
    heads=("SwinUNETR",),
    image_size=96,
    end_to_end=True,
    classifies=False,
    batch_of_channels=1,
    pooled=False,
    one_head="its last map is 3 voxels an edge",
)
METHODS = {
    m.name: m
    for m in (
        Method(OURS, "vit", "a frozen ViT of this package, and a decoder", "any", VIT_HEADS, 112),
        Method("MONAI-ViT", "vit", "the same at 96 cubed, pretrained with the Swin recipe's tasks", "trained", VIT_HEADS, 96),
        Method(
            "Random",
            "vit",
            "a ViT with UNETR's decoder from scratch",
            "none",
            ("UNETR", "ViTAdapterUNETR", "Linear"),
            112,
            True,
        ),
        _SWIN,
        replace(
            _SWIN,
            name="SwinTransfer",
            what="SwinUNETR from MONAI's self-supervised weights (model_swinvit.pt)",
            weights="trained",
            classifies=True,
            unit_range=True,
        ),
        Method(
            "UNet",
            "unet",
            "MONAI's DynUNet from scratch, planned by nnU-Net's rules",
            "none",
            ("DynUNet",),
            None,
            end_to_end=True,
            classifies=False,
            one_head="it is a whole network",
        ),
    )
}


def find_method(name: str) -> Method:
    """The method of a name, or of a `module:function`, whose encoder is used frozen.

    Raises:
        BadInput: There is none.
    """
    if name in METHODS:
        return METHODS[name]
    if _FUNCTION.fullmatch(name):
        return Method(name, "encoder", "an encoder of your own, frozen", "any", ("Linear", "ViTAdapterUNETR", "UNETR"), None)
    hint = nearest(name, METHODS)
    known = f"{', '.join(METHODS)}, or module:function of your own encoder"
    raise BadInput(f"--model-name {name}: no such method{hint}: one of {known}")
