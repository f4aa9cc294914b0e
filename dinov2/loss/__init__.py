"""The objectives of 3DINO: image level (DINO), patch level (iBOT), spread (KoLeo), and the teacher's targets."""

from dinov2.loss.classes import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.dino_clstoken_loss import cross_entropy, dino_loss
from dinov2.loss.ibot_patch_loss import ibot_loss
from dinov2.loss.koleo_loss import koleo_loss
from dinov2.loss.row_math import compiled_row_math
from dinov2.loss.targets import TeacherCenter, sinkhorn_knopp

__all__ = [
    "DINOLoss", "KoLeoLoss", "TeacherCenter", "compiled_row_math", "cross_entropy", "dino_loss", "iBOTPatchLoss", "ibot_loss",
    "koleo_loss", "sinkhorn_knopp",
]  # fmt: skip
