"""The baseline MONAI-ViT: a vision transformer trained on the three tasks of Swin UNETR's pretraining, by the loop of 3DINO.

From corrupted views: the rotation of each, which views are of one cube, and the views as they were before. The first two read
the class token. There are no teacher's targets; the teacher is the student's moving average all the same (with a momentum of 0
the student itself), so that weights are saved, resumed and opened as those of any run.

Shapes: V views (2), B volumes, S edge of a view, N patches, E embedding, F contrastive features. View-major: [V*B, ...].

Source: Tang et al., "Self-supervised pre-training of Swin transformers for 3D medical image analysis", section 3; 3DINO paper,
"MONAI-ViT".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.data.swin_views import NUM_TURNS
from dinov2.distributed import gather_rows
from dinov2.distributed.precision import at_least_fp32
from dinov2.loss.contrastive_loss import contrastive_loss
from dinov2.models import DinoVisionTransformer3d
from dinov2.train.meta_arch import Batch, MetaArch, Pass, linear_flops
from dinov2.train.monitors import effective_rank, mean_cosine


class SwinTasksHead(nn.Module):
    """Linear heads for rotation and contrast, transposed convolutions for reconstruction.

    Args:
        embed_dim: E.
        patch_size: Edge of a patch (voxels), a power of 2: each convolution doubles the size and halves the channels, but the
            last, which gives one.
        contrastive_dim: F.
    """

    def __init__(self, embed_dim: int, patch_size: int, contrastive_dim: int) -> None:
        super().__init__()
        self.rotation_head = nn.Linear(embed_dim, NUM_TURNS)
        self.contrastive_head = nn.Linear(embed_dim, contrastive_dim)
        widths = [max(1, embed_dim >> i) for i in range(int(math.log2(patch_size)))]
        pairs = zip(widths, [*widths[1:], 1], strict=True)
        self.conv = nn.Sequential(*(nn.ConvTranspose3d(a, b, kernel_size=2, stride=2) for a, b in pairs))

    def forward(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[R, E], [R, N, E] -> rotations [R, 4], contrastive features [R, F], volumes [R, 1, S, S, S]."""
        edge = round(patches.shape[1] ** (1 / 3))
        grid = patches.transpose(1, 2).unflatten(2, (edge,) * 3)  # [R, E, h, w, d]
        return self.rotation_head(cls), self.contrastive_head(cls), self.conv(grid)


def head_flops(head: nn.Module, rows: int, patches: int) -> int:
    """Of a forward pass of `SwinTasksHead`; each convolution sees eight times the places of the one before."""
    convolutions = [m for m in head.modules() if isinstance(m, nn.ConvTranspose3d)]
    return rows * linear_flops(head) + sum(2 * rows * patches * 8**i * m.weight.numel() for i, m in enumerate(convolutions))


class SwinMetaArch(MetaArch):
    """The objective of `train.objective: swin`; `student` and `teacher` are `Networks` with `backbone` and `swin_head`."""

    def build_heads(self, backbone: DinoVisionTransformer3d) -> dict[str, nn.Module]:
        return {"swin_head": SwinTasksHead(backbone.embed_dim, backbone.patch_size, self.cfg.swin.contrastive_dim)}

    def forward_backward(self, batch: Batch | list[Batch], teacher_temp: float, monitor: bool = False) -> dict[str, Tensor]:
        """As `MetaArch.forward_backward`; there is no temperature of a teacher.

        Returns:
            Scalars on the device: `rotation_loss` (nats), `contrastive_loss` (nats), `reconstruction_loss` (mean absolute
            error; intensities lie in [-1, 1]), `total_loss` their weighted sum, `rotation_accuracy`; to monitor,
            `feature_rank` and `mean_cosine` of the class tokens of the update's last pass.
        """
        batches = [batch] if isinstance(batch, dict) else batch
        logged: list[dict[str, Tensor]] = []
        for i, micro_batch in enumerate(batches):
            with self.gradient_sync(i == len(batches) - 1):
                losses, tokens = self.losses(micro_batch)
                self.grad_scaler.scale(losses["total_loss"] / len(batches)).backward()
            logged.append({k: v.detach() for k, v in losses.items()})
        report = _monitors(tokens.detach()) if monitor else {}
        return {k: torch.stack([d[k] for d in logged]).mean() for k in logged[0]} | report

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The terms as they are logged, and the class tokens [V*B, E].

        Args:
            batch: `collated_global_crops` the views [V*B, 1, S, S, S], `collated_local_crops` what is seen of them (the same
                shape), `rotations` [V*B], `collated_masks` [V*B, N] of none.
        """
        no_patch = batch["collated_masks"]  # masked: given, so that the mask token has a gradient, which ranks wait for
        out = self._run("student", "backbone", batch["collated_local_crops"], no_patch, is_training=True)
        tokens = out["x_norm_clstoken"]
        turns, features, volumes = self._run("student", "swin_head", tokens, out["x_norm_patchtokens"])
        turns, wanted = at_least_fp32(turns), at_least_fp32(batch["collated_global_crops"])
        one, other = features.chunk(2)  # views
        losses = {
            "rotation_loss": F.cross_entropy(turns, batch["rotations"]),
            "contrastive_loss": contrastive_loss(one, other, self.cfg.swin.contrastive_temperature),
            "reconstruction_loss": F.l1_loss(at_least_fp32(volumes), wanted),
        }
        swin = self.cfg.swin
        losses["total_loss"] = (
            swin.rotation_loss_weight * losses["rotation_loss"]
            + swin.contrastive_loss_weight * losses["contrastive_loss"]
            + swin.reconstruction_loss_weight * losses["reconstruction_loss"]
        )
        losses["rotation_accuracy"] = (turns.detach().argmax(1) == batch["rotations"]).to(turns.dtype).mean()
        return losses, tokens

    def passes(self, batch: Batch) -> list[Pass]:
        seen, patch_size = batch["collated_local_crops"], self.student.backbone.patch_size
        flops = head_flops(self.student["swin_head"], len(seen), seen[0].numel() // patch_size**3)
        return [Pass(self.student.backbone, [seen], 3, flops)]


def _monitors(tokens: Tensor) -> dict[str, Tensor]:
    rows = gather_rows(at_least_fp32(tokens))
    return {"feature_rank": effective_rank(rows), "mean_cosine": mean_cosine(rows)}
