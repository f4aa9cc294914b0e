"""Fine-tuning a segmentation network: the loop, its state on disk, and the test.

Reading order: `train` (the loop) -> `step` -> `validate`; `test` afterwards.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from dinov2.checkpointer.saving import save_atomically
from dinov2.checkpointer.teacher import open_weights
from dinov2.data.downstream.cases import Case, Cases
from dinov2.data.downstream.check import draw_prepared
from dinov2.distributed import any_rank, barrier, is_main_process, mean_over_ranks
from dinov2.distributed.precision import autocast, evaluation_dtype, grad_scaler
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_OK, EXIT_RESUMABLE, BadInput, is_out_of_memory
from dinov2.eval.metrics.segmentation import Score, published_dice, summarise, write_per_case_csv
from dinov2.eval.segmentation_3d.batches import CropBatches
from dinov2.eval.segmentation_3d.build import Task, save_segmentation, set_training
from dinov2.eval.segmentation_3d.heads import SegmentationNetwork
from dinov2.eval.segmentation_3d.inference import TEST_OVERLAP, VALIDATION_OVERLAP, predict_masks, score_cases
from dinov2.eval.segmentation_3d.losses import build_loss
from dinov2.files import write_json
from dinov2.logging import MetricWriter
from dinov2.logging.progress import Progress
from dinov2.models import DinoVisionTransformer3d
from dinov2.optional import left_out
from dinov2.signals import stop_requests
from dinov2.streams import Kind, torch_seed
from dinov2.train.schedules import CosineSchedule

logger = logging.getLogger(__name__)

CHECKPOINT, BEST = "checkpoint.pth", "best_model.pth"
MAX_SKIPPED_IN_ROW = 5
NONE_YET = -1.0  # best Dice while no validation had one: before the first, or where no class counted (NaN)
NUM_WORST = 3  # test cases drawn


@dataclass(frozen=True)
class Plan:
    """The length and speed of a training (the flags of segmentation3d.py)."""

    total_iters: int
    warmup_iters: int
    eval_iters: int
    batch_size: int
    learning_rate: float
    train_backbone: bool
    num_workers: int
    log_period: int = 10


@dataclass
class Run:
    """What changes while training, and what it is written to."""

    model: SegmentationNetwork
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    output_dir: Path
    draws: bool = True  # pictures of cases
    iteration: int = -1  # the last finished one
    skipped_in_row: int = 0
    best: float = NONE_YET
    history: dict[str, list[Any]] = field(
        default_factory=lambda: {"iters_list": [], "train_loss_list": [], "val_dice_list": [], "val_per_cls_dice_list": []}
    )

    def save(self) -> None:
        """Everything that a resume needs; a frozen backbone is read from its own weights again."""
        state = {"model": self._own_weights(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        plain = {"iteration": self.iteration, "best": self.best, "history": self.history, "skipped": self.skipped_in_row}
        save_atomically({**state, **plain}, self.output_dir / CHECKPOINT)

    def resume(self) -> None:
        """Go on where the folder's checkpoint is, if there is one.

        Raises:
            BadInput: It is damaged or of another network.
        """
        path = self.output_dir / CHECKPOINT
        if not path.exists():
            return
        saved = open_weights(path)
        try:
            self.model.load_state_dict({**self.model.state_dict(), **saved["model"]})
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        except (RuntimeError, ValueError, KeyError) as err:
            if is_out_of_memory(err) or isinstance(err, torch.OutOfMemoryError):  # no fault of the file
                raise
            raise BadInput(f"{path}: of another network ({str(err).splitlines()[0][:120]}): use another --output-dir") from err
        self.iteration = saved["iteration"]
        self.best = saved["best"] if math.isfinite(saved["best"]) else NONE_YET
        self.history, self.skipped_in_row = saved["history"], saved["skipped"]

    def _own_weights(self) -> dict[str, Tensor]:
        frozen = {id(p) for p in self.model.parameters() if not p.requires_grad}
        return {k: v for k, v in self.model.state_dict(keep_vars=True).items() if id(v) not in frozen}


def build_optimizer(model: SegmentationNetwork, plan: Plan, decay: float) -> AdamW:
    """AdamW with torch's betas and weight decay, as the paper.

    Args:
        decay: Learning rate of each block of a trained backbone over that of the one above; 1, the paper's: one for all.

    Raises:
        BadInput: A decay for a network without blocks in a row.
    """
    if decay == 1:
        return AdamW([{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0}], lr=plan.learning_rate)
    backbone = model.backbone
    if not isinstance(backbone, DinoVisionTransformer3d):
        raise BadInput(f"segmentation.layerwise_decay={decay:g}: this network is no row of blocks: use 1")
    depth = len(backbone.block_list)
    level = {id(p): i + 1 for i, block in enumerate(backbone.block_list) for p in block.parameters()}
    level |= {id(p): 0 for p in backbone.parameters() if id(p) not in level}
    level |= {id(p): depth + 1 for p in backbone.norm.parameters()}
    groups: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault(decay ** (depth + 1 - level.get(id(p), depth + 1)), []).append(p)
    return AdamW([{"params": ps, "lr_scale": scale} for scale, ps in groups.items()], lr=plan.learning_rate)


def start_run(model: SegmentationNetwork, cfg: DictConfig, plan: Plan, output_dir: Path, runtime: Runtime) -> Run:
    """A run at its beginning, or where its folder's checkpoint left it."""
    scaler = grad_scaler(runtime.device.type, evaluation_dtype(cfg, runtime.device.type))
    run = Run(model, build_optimizer(model, plan, cfg.segmentation.layerwise_decay), scaler, output_dir)
    note = left_out("pictures of cases", "matplotlib")
    if note is not None:
        run.draws = False
        logger.warning("%s", note)
    run.resume()
    return run


def train(run: Run, cfg: DictConfig, task: Task, plan: Plan, cases: dict[str, Cases], seed: int, runtime: Runtime) -> int:
    """The loop; returns the exit code. The best network on the validation part is kept as `best_model.pth`."""
    first, total = run.iteration + 1, plan.total_iters
    schedule = CosineSchedule(plan.learning_rate, 0.0, total, plan.warmup_iters)
    loss = build_loss(task.recipe)
    call: nn.Module = run.model
    if runtime.world_size > 1:
        device_ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        call = DistributedDataParallel(run.model, device_ids)
    batches = CropBatches(cases["training"], task.image_size, plan.batch_size, seed, first, plan.num_workers, runtime)
    losses: list[Tensor] = []
    with (
        MetricWriter(run.output_dir, first, is_main_process()) as metrics,
        stop_requests() as stop_asked,
        closing(iter(batches)) as steps,
        Progress(total, "iterations", done=first) as progress,
    ):
        set_training(run.model, plan.train_backbone)
        for iteration in range(first, total):
            began = time.perf_counter()
            images, labels = next(steps)
            waited = time.perf_counter() - began
            torch.manual_seed(torch_seed(seed, Kind.STEP, iteration))
            rate = schedule(iteration)
            losses.append(step(run, call, loss, images, labels, rate, evaluation_dtype(cfg, runtime.device.type)))
            run.iteration = iteration
            progress.update()
            last = iteration + 1 == total
            if iteration % plan.log_period == 0 or last:
                value = float(mean_over_ranks({"loss": losses[-1]})["loss"])
                timing = {"iter_time": time.perf_counter() - began, "data_time": waited}
                metrics.write({"iteration": iteration, "lr": rate, "loss": value, **timing})
            if (iteration + 1) % plan.eval_iters == 0 or last:
                mean = float(mean_over_ranks({"loss": torch.stack(losses).mean()})["loss"])
                losses.clear()
                validate(run, cfg, task, cases["validation"], mean, metrics, runtime)
                set_training(run.model, plan.train_backbone)
            stop = any_rank(bool(stop_asked), runtime.device)
            if not losses or stop:  # at every validation, and where the run is asked to stop
                run.save() if is_main_process() else None
                barrier()
            if stop and not last:
                logger.info("stopped after iteration %d: start the same command again", iteration)
                return EXIT_RESUMABLE
    return EXIT_OK


def step(run: Run, call: nn.Module, loss: Any, images: Tensor, labels: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """One update; the loss, on its device. One that is not finite changes nothing, and several in a row end the run.

    Raises:
        BadInput: Several in a row.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    run.optimizer.zero_grad(set_to_none=True)
    with autocast(images.device.type, dtype):
        logits = call(images)
    value = loss(logits, labels)
    run.scaler.scale(value).backward()
    if any_rank(not bool(value.detach().isfinite()), images.device):
        run.skipped_in_row += 1
        logger.warning("iteration %d: the loss is not finite, step skipped", run.iteration + 1)
        if run.skipped_in_row >= MAX_SKIPPED_IN_ROW:
            raise BadInput(f"{MAX_SKIPPED_IN_ROW} steps in a row without a finite loss: lower --learning-rate")
        return torch.zeros_like(value.detach())
    run.skipped_in_row = 0
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return value.detach()


def validate(run: Run, cfg: DictConfig, task: Task, cases: Cases, loss: float, metrics: MetricWriter, runtime: Runtime) -> None:
    """Score the validation part, note it, keep the network where it is the best so far, and draw one case."""
    window = (task.image_size, VALIDATION_OVERLAP, cfg.segmentation.window_batch, evaluation_dtype(cfg, runtime.device.type))
    scores, _ = score_cases(run.model, cases, *window, runtime, surfaces=False)
    summary = summarise(scores, task.recipe.output_names, not task.recipe.overlapping)
    mean = summary["mean"]["dice"]
    run.history["iters_list"].append(run.iteration)
    run.history["train_loss_list"].append(loss)
    dice, dice_per_class = published_dice(scores, task.recipe.output_names)
    run.history["val_dice_list"].append(dice)
    run.history["val_per_cls_dice_list"].append(dice_per_class)
    logger.info("iteration %d: loss %.4f, validation Dice %.4f (best %.4f)", run.iteration, loss, mean, max(mean, run.best))
    if not is_main_process():
        return
    if mean > run.best or run.best == NONE_YET:
        run.best = mean if math.isfinite(mean) else NONE_YET
        save_segmentation(run.model, cfg, task, run.output_dir / BEST)
    if not run.draws:
        return
    case, picture = cases[0], run.output_dir / "validation_case.png"
    masks = predict_masks(run.model, case, task.recipe, *window)
    title = f"{case.name}: prediction after iteration {run.iteration}"
    draw_prepared(as_predicted(case, masks, task), task.recipe, picture, title, case)
    metrics.write_image("validation", picture, run.iteration)


def as_predicted(case: Case, masks: Tensor, task: Task) -> Case:
    """The case with a prediction in the label's place."""
    return Case(case.item, case.image, task.recipe.compose(masks), case.grid)


def test(model: nn.Module, cfg: DictConfig, task: Task, cases: Cases, run: Run, runtime: Runtime) -> dict[str, Any]:
    """Score the test part; writes `per_case.csv`, `results.json` and pictures of the worst cases."""
    window = (task.image_size, TEST_OVERLAP, cfg.segmentation.window_batch, evaluation_dtype(cfg, runtime.device.type))
    scores, seconds = score_cases(model, cases, *window, runtime, surfaces=True)
    summary = summarise(scores, task.recipe.output_names, not task.recipe.overlapping)
    dice, dice_per_class = published_dice(scores, task.recipe.output_names)
    results = {
        **run.history,
        "test_dice": dice,
        "test_per_cls_dice": dice_per_class,
        "test": summary,
        "seconds_per_volume": seconds,
        "parameters_trained": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }
    if is_main_process():
        write_per_case_csv(run.output_dir / "per_case.csv", scores)
        if run.draws:
            draw_worst(model, cases, scores, window, task, run.output_dir)
        write_json(run.output_dir / "results.json", results)
    logger.info("test: Dice %.4f without the background, %.2f s a volume", summary["mean"]["dice"], seconds)
    return results


def draw_worst(
    model: nn.Module, cases: Cases, scores: list[Score], window: tuple[Any, ...], task: Task, output_dir: Path
) -> None:
    """The test cases with the lowest Dice: the prediction beside the truth, in the same planes, in `worst/`."""
    foreground = task.recipe.output_names if task.recipe.overlapping else task.recipe.output_names[1:]
    by_case: dict[str, list[float]] = {}
    for s in scores:
        if s.name in foreground and s.dice == s.dice:
            by_case.setdefault(s.case, []).append(s.dice)
    dice = {name: sum(values) / len(values) for name, values in by_case.items()}
    worst = sorted(dice, key=lambda name: dice[name])[:NUM_WORST]
    folder = output_dir / "worst"
    folder.mkdir(exist_ok=True)
    index = {item.case: i for i, item in enumerate(cases.items)}
    for rank, name in enumerate(worst, 1):
        case = cases[index[name]]
        masks = predict_masks(model, case, task.recipe, *window)
        stem = f"{rank}_{Path(name).name}"
        draw_prepared(case, task.recipe, folder / f"{stem}_truth.png", f"{name}: truth")
        title = f"{name}: prediction, mean Dice {dice[name]:.3f}"
        draw_prepared(as_predicted(case, masks, task), task.recipe, folder / f"{stem}_prediction.png", title, case)
