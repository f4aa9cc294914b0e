"""Everything a run continues from, and the folder it lives in."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import AdamW

from dinov2.checkpointer.checkpointer import Checkpointer
from dinov2.checkpointer.saving import save_atomically
from dinov2.configs import default_yaml
from dinov2.configs.loader import without_path_keys
from dinov2.data.datalist import Datalist
from dinov2.data.preprocess import PREPROCESSING
from dinov2.distributed import gather_objects, is_main_process
from dinov2.errors import BadInput
from dinov2.files import read_json
from dinov2.fsdp.tensors import whole
from dinov2.logging.provenance import RUN_FILE, versions
from dinov2.train.flags import FlagExchange
from dinov2.train.meta_arch import MetaArch

logger = logging.getLogger(__name__)


def check_same_on_all_ranks(cfg: DictConfig, datalist: Datalist) -> None:
    """Raise `BadInput` where ranks were started with different configurations or see different datalists."""
    for what, value in (("configuration", default_yaml(cfg)), ("datalist", datalist.sha256)):
        if len(set(gather_objects(value))) > 1:
            raise BadInput(f"the ranks of this job have different {what}s: start all with the same command and files")


class TrainState:
    """Model, optimiser and counters as one dictionary of tensors, in the form the checkpoint stores.

    Args:
        model: Student, teacher, centres.
        optimizer: AdamW over `model.get_params_groups()`.
    """

    def __init__(self, model: MetaArch, optimizer: AdamW) -> None:
        self.model = model
        self.optimizer = optimizer
        self.iteration = -1  # the last finished one
        self.skipped_steps = 0
        self.skipped_in_row = 0
        self.stop_seen = False  # a rank was asked to stop
        self.flags = FlagExchange(lag=1 if next(model.parameters()).is_cuda else 0)  # of steps not in the counters yet
        _materialise_moments(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Nested dictionary of tensors; model and optimiser share memory with the live ones."""
        named = [(n, p) for g in self.optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)]
        scaler = self.model.grad_scaler.state_dict()
        counters = {"iteration": self.iteration, "skipped_steps": self.skipped_steps, "skipped_in_row": self.skipped_in_row}
        counters |= {k: scaler.get(k, 0) for k in ("scale", "_growth_tracker")}
        return {
            "model": self.model.state_dict(),
            "optimizer": {n: self.optimizer.state[p] for n, p in named},
            "counters": {k: torch.tensor(float(v), dtype=torch.float64) for k, v in counters.items()},
        }

    def resume(self, checkpointer: Checkpointer) -> bool:
        """Load the newest checkpoint, if there is one.

        Raises:
            BadInput: It is damaged or of another architecture.
        """
        saved = checkpointer.newest()
        if saved is None:
            return False
        state = self.state_dict()
        checkpointer.load(state, saved)
        counters: dict[str, Tensor] = state["counters"]
        self.iteration, self.skipped_steps, self.skipped_in_row = (
            int(counters[k]) for k in ("iteration", "skipped_steps", "skipped_in_row")
        )
        if self.model.grad_scaler.is_enabled():
            scaler = self.model.grad_scaler.state_dict()
            growth_tracker = int(counters["_growth_tracker"])
            scaler |= {"scale": float(counters["scale"]), "_growth_tracker": growth_tracker}
            self.model.grad_scaler.load_state_dict(scaler)
        return True


def _materialise_moments(optimizer: AdamW) -> None:
    """Create AdamW's state at zero now, as its first step would, so that every checkpoint has the same entries.

    torch's own `get_state_dict` runs a hidden step for this, which changes the trajectory; and a parameter that never
    gets a gradient would have no entry at all.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def save_teacher(model: MetaArch, cfg: DictConfig, folder: Path, iteration: int, data: dict[str, Any]) -> Path:
    """Write `teacher_checkpoint.pth`: `{"teacher": state dict, "meta": plain JSON types}`, self-describing; all ranks call it.

    `data` is of `data_record`. `torch.load(path, weights_only=True)` opens it.
    """
    meta = {
        "config": without_path_keys(cfg),
        "preprocessing": PREPROCESSING,
        **data,
        "iteration": iteration,
        "versions": versions(),
        "licence": "the weights' owner decides; the code is Apache-2.0",
    }
    path = folder / "teacher_checkpoint.pth"
    teacher = {k: whole(v.detach()) for k, v in model.teacher.state_dict().items()}  # a collective where it is sharded
    if is_main_process():
        teacher = {k: v.cpu() for k, v in teacher.items()}
        save_atomically({"teacher": teacher, "meta": json.loads(json.dumps(meta))}, path)
    return path


def check_same_run(output_dir: Path, datalist_sha256: str, effective_batch: int, world_size: int, allow_changed: bool) -> None:
    """Refuse to continue a run on another datalist or with another effective batch.

    Raises:
        BadInput: The list's content changed and that was not allowed, or the batch did.
    """
    path = output_dir / RUN_FILE
    if not path.exists():
        return
    remedy = "use --no-resume, or move it away to continue without knowing that batch and datalist are the same"
    record = read_json(path, remedy=remedy)
    batch = record.get("effective_batch", effective_batch) if isinstance(record, dict) else None
    before = record.get("datalist_sha256") if isinstance(record, dict) else None
    if type(batch) is not int or batch < 1 or not isinstance(before, str):
        raise BadInput(f"{path}: is damaged, it does not say its batch and datalist: {remedy}")
    if batch != effective_batch:
        fits = f"batch_size_per_gpu x accumulation_steps = {batch // world_size}" if batch % world_size == 0 else None
        raise BadInput(
            f"{output_dir}: this run has {batch} volumes a step, {world_size} ranks as configured have {effective_batch}: "
            + (f"set train.{fits}" if fits else f"{world_size} ranks do not divide {batch}; use a number that does")
        )
    if before == datalist_sha256:
        return
    message = f"{output_dir}: this run was started on another datalist (sha256 {before[:12]}..., now {datalist_sha256[:12]}...)"
    if not allow_changed:
        raise BadInput(f"{message}: use the old list, another --output-dir, or --allow-changed-data")
    logger.warning("%s: continued on the new one as asked", message)
