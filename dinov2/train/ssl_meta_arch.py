"""One step of 3DINO: the teacher makes targets, the student predicts them, the losses leave their gradients.

Shapes: G global crops (2), L local crops, B volumes, N patches of a global crop, M masked patches, K prototypes,
E embedding, A micro-batches of one update. Crops are crop-major: [G*B, ...] holds all volumes' first crop, then all second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2.configs.schema import NUM_GLOBAL_CROPS
from dinov2.distributed import all_reduce_sum
from dinov2.layers import DINOHead
from dinov2.loss import TeacherCenter, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from dinov2.models import DinoVisionTransformer3d
from dinov2.train.meta_arch import Batch, MetaArch, Pass, linear_flops
from dinov2.train.monitors import collapse_monitors, mean_entropy


class Targets(NamedTuple):
    """What the student has to predict in one micro-batch."""

    cls: Tensor  # [G, B, K] distributions, one per global crop, summing to 1 over K
    patch: Tensor  # [M, K] distributions at the masked patches


class StudentOutputs(NamedTuple):
    """Student scores of one micro-batch, before any softmax."""

    global_cls: Tensor  # [G, B, K]
    local_cls: Tensor  # [L, B, K]
    patch: Tensor  # [M, K]
    global_cls_before_head: Tensor  # [G, B, E]


class SSLMetaArch(MetaArch):
    """3DINO's objective.

    `student` and `teacher` are `Networks` with `backbone`, `dino_head` and, unless shared, `ibot_head`.
    """

    def __init__(self, cfg: DictConfig, attention: str = "sdpa") -> None:
        super().__init__(cfg, attention)
        self.dino_center = TeacherCenter(cfg.dino.head_n_prototypes)
        self.ibot_center = TeacherCenter(self._ibot_head_cfg().head_n_prototypes)
        self.to(next(self.student.parameters()).dtype)

    @property
    def separate_ibot_head(self) -> bool:
        return self.cfg.ibot.separate_head

    def _ibot_head_cfg(self) -> DictConfig:
        return self.cfg.ibot if self.separate_ibot_head else self.cfg.dino

    def build_heads(self, backbone: DinoVisionTransformer3d) -> dict[str, nn.Module]:
        heads = {"dino_head": self.cfg.dino} | ({"ibot_head": self.cfg.ibot} if self.separate_ibot_head else {})
        return {
            name: DINOHead(
                backbone.embed_dim,
                h.head_n_prototypes,
                nlayers=h.head_nlayers,
                hidden_dim=h.head_hidden_dim,
                bottleneck_dim=h.head_bottleneck_dim,
            )
            for name, h in heads.items()
        }

    # ------------------------------------------------------------------ the step

    def forward_backward(self, batch: Batch | list[Batch], teacher_temp: float, monitor: bool = False) -> dict[str, Tensor]:
        """Losses by name; the gradients are left on the student.

        Args:
            batch: A collated batch, or the micro-batches of one update: targets are made for all of them together
                (Sinkhorn and centring see the effective batch), then each is passed and differentiated in turn.
            teacher_temp: Temperature of the teacher's softmax.
            monitor: Add the collapse monitors (entropies, prototype use, rank, cosine) to the returned dict.

        Returns:
            Scalars on the device: `dino_local_crops_loss`, `dino_global_crops_loss`, `koleo_loss`, `ibot_loss` scaled
            as 3DINO logs them, `total_loss` their sum, and `dino_cross_entropy` (mean over all pairs) and
            `ibot_cross_entropy` (mean over masked patches), both comparable with log K.
        """
        batches = [batch] if isinstance(batch, dict) else batch
        targets, teacher_report = self.teacher_targets(batches, teacher_temp, monitor)  # no gradient
        logged: list[dict[str, Tensor]] = []
        mean_masked = self.mean_masked_patches(batches)
        for i, (micro_batch, target) in enumerate(zip(batches, targets, strict=True)):
            with self.gradient_sync(i == len(batches) - 1):
                student = self.student_outputs(micro_batch)
                losses = self.losses(student, target, micro_batch)
                self.grad_scaler.scale(self.weighted_sum(losses) / len(batches)).backward()
            # so that the mean over micro-batches and ranks is the mean over all masked patches
            share = (len(target.patch) / mean_masked).to(losses["ibot_loss"].dtype)
            losses["ibot_cross_entropy"] = losses["ibot_cross_entropy"] * share
            if monitor:
                losses["student_entropy"] = mean_entropy(student.global_cls.detach())
            logged.append({k: v.detach() for k, v in losses.items()})
        return {k: torch.stack([d[k] for d in logged]).mean() for k in logged[0]} | teacher_report

    def mean_masked_patches(self, batches: list[Batch]) -> Tensor:
        """Masked patches of the whole update over its passes (micro-batches of all ranks)."""
        count = batches[0]["masks_weight"].new_zeros(2, dtype=torch.float64)
        count[0] += sum(len(b["mask_indices_list"]) for b in batches)  # a copy from the host would wait for the device
        count[1] += len(batches)
        total, passes = all_reduce_sum(count).unbind()
        return total.clamp_min(1.0) / passes

    @torch.no_grad()
    def teacher_targets(
        self, batches: list[Batch], teacher_temp: float, monitor: bool = False
    ) -> tuple[list[Targets], dict[str, Tensor]]:
        """Targets of every micro-batch, normalised over all of them (and all ranks) at once."""
        tokens, cls_scores, patch_scores = [], [], []
        for batch in batches:
            out = self._run("teacher", "backbone", batch["collated_global_crops"], is_training=True)
            patches = out["x_norm_patchtokens"].flatten(0, 1).index_select(0, batch["mask_indices_list"])  # [M, E]
            cls, patch = self._project("teacher", out["x_norm_clstoken"], patches)
            tokens.append(out["x_norm_clstoken"])  # [G*B, E]
            cls_scores.append(cls)  # [G*B, K]
            patch_scores.append(patch)  # [M, K]
        cls_all, patch_all = (x[0] if len(x) == 1 else torch.cat(x) for x in (cls_scores, patch_scores))
        if self.cfg.train.centering == "centering":
            cls_target, patch_target = self.dino_center(cls_all, teacher_temp), self.ibot_center(patch_all, teacher_temp)
        else:
            cls_target, patch_target = (sinkhorn_knopp(x, teacher_temp, math=self.row_math) for x in (cls_all, patch_all))
        cls_parts = cls_target.split([len(x) for x in cls_scores])
        patch_parts = patch_target.split([len(x) for x in patch_scores])
        targets = [Targets(c.view(NUM_GLOBAL_CROPS, -1, c.shape[-1]), p) for c, p in zip(cls_parts, patch_parts, strict=True)]
        return targets, collapse_monitors(torch.cat(tokens), cls_all, cls_target) if monitor else {}

    def student_outputs(self, batch: Batch) -> StudentOutputs:
        """All crops through the student in one packed pass; only global crops are masked."""
        crops, masks = [batch["collated_global_crops"]], [batch["collated_masks"]]
        if len(batch["collated_local_crops"]):
            crops, masks = [*crops, batch["collated_local_crops"]], [*masks, None]
        outs = self._run("student", "backbone", crops, masks, is_training=True)
        global_cls = outs[0]["x_norm_clstoken"]  # [G*B, E]
        patches = outs[0]["x_norm_patchtokens"].flatten(0, 1).index_select(0, batch["mask_indices_list"])  # [M, E]
        all_cls = torch.cat([o["x_norm_clstoken"] for o in outs])  # [(G+L)*B, E]
        cls, patch = self._project("student", all_cls, patches)  # [(G+L)*B, K], [M, K]
        cls = cls.view(-1, len(global_cls) // NUM_GLOBAL_CROPS, cls.shape[-1])  # [G+L, B, K]
        before_head = global_cls.view(NUM_GLOBAL_CROPS, -1, global_cls.shape[-1])
        global_cls_scores, local_cls_scores = cls.split([NUM_GLOBAL_CROPS, len(cls) - NUM_GLOBAL_CROPS])
        return StudentOutputs(global_cls_scores, local_cls_scores, patch, before_head)

    def losses(self, student: StudentOutputs, target: Targets, batch: Batch) -> dict[str, Tensor]:
        """The terms as they are logged, and their sum.

        DINOv2 pairs every student crop with the teacher's *other* global crops: T = 2 + 2L pairs of crops. KoLeo and iBOT are
        means over the two global crops.
        """
        cfg = self.cfg
        num_pairs = NUM_GLOBAL_CROPS * (NUM_GLOBAL_CROPS - 1) + NUM_GLOBAL_CROPS * len(student.local_cls)
        dino_local = dino_loss(student.local_cls, target.cls, math=self.row_math) / num_pairs
        dino_global = dino_loss(student.global_cls, target.cls, True, self.row_math) / num_pairs
        koleo = sum(koleo_loss(x, all_ranks=cfg.dino.koleo_distributed) for x in student.global_cls_before_head)
        ibot, ibot_cross_entropy = ibot_loss(
            student.patch, target.patch, batch["masks_weight"], len(batch["collated_masks"]), self.row_math
        )
        losses = {
            "dino_local_crops_loss": dino_local,
            "dino_global_crops_loss": dino_global,
            "koleo_loss": cfg.dino.koleo_loss_weight * koleo / NUM_GLOBAL_CROPS,
            "ibot_loss": ibot / NUM_GLOBAL_CROPS,
        }
        losses["total_loss"] = sum(losses.values())
        losses["dino_cross_entropy"] = dino_local + dino_global
        losses["ibot_cross_entropy"] = ibot_cross_entropy
        return losses

    def weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """What is differentiated: KoLeo and iBOT count once for each of the global crops, as in DINOv2."""
        dino, ibot = self.cfg.dino.loss_weight, self.cfg.ibot.loss_weight
        of_images = dino * (losses["dino_local_crops_loss"] + losses["dino_global_crops_loss"])
        return of_images + NUM_GLOBAL_CROPS * (losses["koleo_loss"] + ibot * losses["ibot_loss"])

    def passes(self, batch: Batch) -> list[Pass]:
        crops = [c for c in (batch["collated_global_crops"], batch["collated_local_crops"]) if len(c)]
        masked, counted = len(batch["mask_indices_list"]), []
        for net, passed, times in ((self.student, crops, 3), (self.teacher, crops[:1], 1)):
            patch_head = net["ibot_head"] if "ibot_head" in net else net["dino_head"]
            heads = linear_flops(net["dino_head"]) * sum(len(c) for c in passed) + linear_flops(patch_head) * masked
            counted.append(Pass(net.backbone, passed, times, heads))
        return counted

    def _project(self, side: str, cls: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
        """Prototype scores of class tokens and patches, through two heads or one shared head."""
        if self.separate_ibot_head:
            return self._run(side, "dino_head", cls), self._run(side, "ibot_head", patch)
        return self._run(side, "dino_head", torch.cat([cls, patch])).split([len(cls), len(patch)])
