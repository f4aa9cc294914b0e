"""Training the heads of a probe: the loop, its state on disk, and the choice of a head by the validation part.

Reading order: `train` (the loop) -> `Inputs` (features of a step) -> `validate`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from dinov2.checkpointer.saving import save_atomically
from dinov2.checkpointer.teacher import open_weights
from dinov2.data.downstream.cases import Cases
from dinov2.data.downstream.crops import training_cube
from dinov2.data.samplers import EndlessOrder, PositionSampler
from dinov2.data.workers import compute_in_order
from dinov2.distributed import all_reduce_sum, any_rank, barrier, gather_objects, gather_rows, is_main_process
from dinov2.distributed.precision import evaluation_autocast
from dinov2.errors import EXIT_OK, EXIT_RESUMABLE, BadInput
from dinov2.eval.metrics.classification import auc_per_class
from dinov2.eval.probing.linear_heads import LinearHeads, cosine_factor, head_grid
from dinov2.eval.probing.parts import feature_layers, labels_of
from dinov2.eval.run import Setting
from dinov2.features.features import class_features
from dinov2.files import read_json, write_json
from dinov2.logging import MetricWriter
from dinov2.logging.progress import Progress, track
from dinov2.models import BackboneModule
from dinov2.signals import stop_requests
from dinov2.streams import Kind, stream, torch_seed

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pth"
LOG_PERIOD = 10


@dataclass(frozen=True)
class Plan:
    """The length and speed of a training (the flags of linear3d.py)."""

    total_iters: int
    save_iters: int
    eval_iters: int
    learning_rates: tuple[float, ...]
    scale_rates: bool
    cached_views: int
    backbone_rate: float | None  # None: frozen
    classifier: str | None


@dataclass
class Probe:
    """What changes while training, and where it is kept."""

    heads: LinearHeads
    backbone: BackboneModule
    optimizer: AdamW | None  # of a backbone that is trained
    folder: Path
    iteration: int = -1  # the last finished one
    history: list[dict[str, Any]] = field(default_factory=list)  # a validation each

    def save(self) -> None:
        """Everything that a resume needs; a frozen backbone is read from its own weights again."""
        state: dict[str, Any] = {"heads": self.heads.state_dict(), "iteration": self.iteration, "history": self.history}
        if self.optimizer:
            state |= {"backbone": self.backbone.state_dict(), "optimizer": self.optimizer.state_dict()}
        save_atomically(state, self.folder / CHECKPOINT)

    def load(self, path: Path) -> dict[str, Any]:
        """Take a checkpoint's heads; what else it holds is returned.

        Raises:
            BadInput: It is damaged, no checkpoint, or of other heads.
        """
        saved = open_weights(path)
        if not isinstance(saved, dict) or "heads" not in saved:
            raise BadInput(f"{path}: holds no heads of a probe: give a checkpoint.pth of linear3d.py")
        try:
            self.heads.load_state_dict(saved["heads"])
        except ValueError as err:
            raise BadInput(f"{path}: {err}: use the flags and the network it was made with") from err
        return saved

    def resume(self) -> None:
        """Go on where the folder's checkpoint is, if there is one.

        Raises:
            BadInput: As `load`.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        saved = self.load(path)
        self.iteration, self.history = saved["iteration"], saved["history"]
        if self.optimizer:
            self.backbone.load_state_dict(saved["backbone"])
            self.optimizer.load_state_dict(saved["optimizer"])
        logger.info("continuing after iteration %d", self.iteration)

    def best_head(self) -> int:
        """The head that the last validation chose."""
        return self.history[-1]["head"]


def start_probe(setting: Setting, backbone: BackboneModule, plan: Plan, seed: int) -> Probe:
    """A probe at its beginning.

    Raises:
        BadInput: The plan's classifier does not fit.
    """
    scale = setting.request.batch_size * setting.runtime.world_size / 256 if plan.scale_rates else 1.0
    layers = feature_layers(backbone)
    grid = head_grid([rate * scale for rate in plan.learning_rates], layers, setting.request.method.pooled)
    generator = torch.Generator().manual_seed(torch_seed(seed, Kind.INIT, 0))
    classes, device = setting.recipe.num_outputs, setting.runtime.device
    heads = LinearHeads(grid, layers, backbone.embed_dim, classes, generator, device)
    optimizer = None
    if plan.backbone_rate is not None:
        backbone.requires_grad_(True)
        optimizer = AdamW([p for p in backbone.parameters() if p.requires_grad], lr=plan.backbone_rate)
    probe = Probe(heads, backbone, optimizer, setting.output_dir)
    if plan.classifier:
        probe.load(Path(plan.classifier))
    return probe


class Inputs:
    """Features and labels of each step: a function of (seed, position), for any number of loader processes and ranks.

    Args:
        cases: The seed's training part.
        first: First step to deliver.
    """

    def __init__(
        self,
        setting: Setting,
        probe: Probe,
        plan: Plan,
        cases: Cases,
        seed: int,
        first: int,
    ) -> None:
        self.setting, self.probe, self.plan, self.cases, self.seed = setting, probe, plan, cases, seed
        self.request = setting.request
        self.order = EndlessOrder(len(cases), seed)
        runtime = setting.runtime
        self.sampler = PositionSampler(self.request.batch_size, 1, runtime.rank, runtime.world_size, first)
        self.labels = labels_of(cases.items)
        self.layers = feature_layers(probe.backbone)

    def __iter__(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This rank's features [B, F], with a graph where the backbone is trained, and labels [B]."""
        device = self.setting.runtime.device
        if self.plan.cached_views:
            kept = self._cached()
            n = len(self.cases)
            for positions in self.sampler:
                rows = [(p // n % self.plan.cached_views) * n + self.order(p) for p in positions]
                yield kept[rows].to(device), self._labels(positions)
            return
        for positions, images in compute_in_order(self._views, self.sampler, self.request.num_workers):
            yield self._features(images, bool(self.probe.optimizer)), self._labels(positions)

    def _labels(self, positions: list[int]) -> Tensor:
        return self.labels[[self.order(p) for p in positions]].to(self.setting.runtime.device)

    def _features(self, images: Tensor, with_graph: bool) -> Tensor:
        device = self.setting.runtime.device
        with torch.set_grad_enabled(with_graph), evaluation_autocast(self.setting.cfg, device.type):
            return class_features(self.probe.backbone, images.to(device, non_blocking=True), self.layers)

    def _view(self, index: int, number: int) -> Tensor:
        """The view of a case that stands at a place of the sample sequence."""
        image = self.cases[index].image
        return training_cube(image, self.cases.recipe, self.request.cube, stream(self.seed, Kind.SAMPLE, number))

    def _views(self, positions: list[int]) -> tuple[list[int], Tensor]:
        return positions, torch.stack([self._view(self.order(p), p) for p in positions])

    def _cached(self) -> Tensor:
        """[views * n, F]: every view of every case once; the ranks share the work."""
        runtime, total = self.setting.runtime, self.plan.cached_views * len(self.cases)
        mine = range(runtime.rank, total, runtime.world_size)
        batches = [list(mine[a : a + self.request.batch_size]) for a in range(0, len(mine), self.request.batch_size)]
        endless = (batches[i % len(batches)] for i in range(10**12)) if batches else iter(())

        def compute(numbers: list[int]) -> tuple[list[int], Tensor]:
            return numbers, torch.stack([self._view(number % len(self.cases), number) for number in numbers])

        rows: dict[int, Tensor] = {}
        with closing(compute_in_order(compute, endless, min(self.request.num_workers, len(batches)))) as views:
            for _ in track(batches, "batches of training features"):
                numbers, images = next(views)
                rows |= dict(zip(numbers, self._features(images, False).cpu(), strict=True))
        rows = {i: row for of_rank in gather_objects(rows) for i, row in of_rank.items()}
        return torch.stack([rows[i] for i in range(total)])


def train(
    setting: Setting,
    probe: Probe,
    plan: Plan,
    cases: Cases,
    seed: int,
    validation_features: Callable[[], Tensor],
) -> int:
    """The loop; returns the exit code. All ranks take the same step on the whole batch's features."""
    first, total = probe.iteration + 1, plan.total_iters
    if first >= total:
        return EXIT_OK
    inputs = Inputs(setting, probe, plan, cases, seed, first)
    with (
        MetricWriter(setting.output_dir, first, is_main_process()) as metrics,
        stop_requests() as stop_asked,
        closing(iter(inputs)) as batches,
        Progress(total, "iterations", done=first) as progress,
    ):
        for iteration in range(first, total):
            losses = step(setting, probe, plan, *next(batches), cosine_factor(iteration, total))
            probe.iteration = iteration
            progress.update()
            last = iteration + 1 == total
            if iteration % LOG_PERIOD == 0 or last:
                finite = losses[losses.isfinite()]
                best = float(finite.min()) if len(finite) else math.inf
                metrics.write({"iteration": iteration, "lr_factor": cosine_factor(iteration, total), "lowest_loss": best})
            evaluated = (iteration + 1) % plan.eval_iters == 0 or last
            if evaluated:
                validate(setting, probe, validation_features())
            stop = any_rank(bool(stop_asked), setting.runtime.device)
            if evaluated or stop or (iteration + 1) % plan.save_iters == 0:
                probe.save() if is_main_process() else None
                barrier()
            if stop and not last:
                logger.info("stopped after iteration %d: start the same command again", iteration)
                return EXIT_RESUMABLE
    return EXIT_OK


def step(setting: Setting, probe: Probe, plan: Plan, features: Tensor, labels: Tensor, factor: float) -> Tensor:
    """One update of all heads, and of the backbone where it is trained; the heads' losses.

    Raises:
        BadInput: The features are not finite.
    """
    whole = gather_rows(features.detach())
    if not bool(whole.isfinite().all()):
        advice = "the weights are damaged or overflow" if plan.backbone_rate is None else "lower --backbone-learning-rate"
        raise BadInput(f"iteration {probe.iteration + 1}: the features are not finite: {advice}")
    losses, gradient = probe.heads.step(whole, gather_rows(labels), factor, want_gradient=probe.optimizer is not None)
    if probe.optimizer is not None and gradient is not None:
        first = setting.runtime.rank * len(features)
        probe.optimizer.zero_grad(set_to_none=True)
        features.backward(gradient[first : first + len(features)])
        for group in probe.optimizer.param_groups:
            group["lr"] = probe.optimizer.defaults["lr"] * factor  # the default: plan.backbone_rate
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = all_reduce_sum(p.grad)
        probe.optimizer.step()
    return losses


def validate(setting: Setting, probe: Probe, features: Tensor) -> None:
    """Note every head's AUC and choose the best: the highest mean AUC, among equals the lowest cross-entropy.

    Raises:
        BadInput: No head is finite.
    """
    labels = labels_of(setting.cases["validation"].items)
    logits = probe.heads.logits(features.to(setting.runtime.device)).double().cpu()  # [n, heads, K]
    auc = auc_per_class(logits.softmax(-1).movedim(1, 0).numpy(), labels.numpy()).mean(-1)  # [heads]
    loss = torch.stack([cross_entropy(logits[:, i], labels) for i in range(logits.shape[1])]).numpy()
    usable = np.isfinite(auc) & np.isfinite(loss)
    if not usable.any():
        raise BadInput("no head has finite weights: lower --learning-rates")
    best = min(np.flatnonzero(usable), key=lambda i: (-auc[i], loss[i]))
    head = probe.heads.heads[best]
    found = {
        "iteration": probe.iteration,
        "head": int(best),
        "name": head.name,
        "auc": float(auc[best]),
        "loss": float(loss[best]),
    }
    probe.history.append({**found, "auc_of_heads": [float(a) if np.isfinite(a) else None for a in auc]})
    what = "iteration %d: validation AUC %.4f with %s; %d of %d heads are finite"
    logger.info(what, probe.iteration, auc[best], head.name, usable.sum(), len(usable))


def summarise_seeds(folder: Path, seeds: list[int]) -> None:
    """`results.json` of several seeds: mean and standard deviation of each score, and each seed's own."""
    runs = [read_json(folder / f"seed_{seed}" / "results.json", remedy="use --no-resume") for seed in seeds]
    scores = ("test_auc", "test_f1", "test_balanced_accuracy", "test_calibration_error")
    table = {name: [run[name] for run in runs] for name in scores}
    means = {name: float(np.mean(np.array(values, float))) for name, values in table.items()}
    stds = {f"{name}_std": float(np.std(np.array(values, float), ddof=1)) for name, values in table.items()}
    common = {name: runs[0][name] for name in ("classes", "percent", "n_train", "n_test")}
    best = [run["best_head"] for run in runs]
    write_json(folder / "results.json", {**means, **stds, "by_seed": table, "best_head": best, "seeds": seeds, **common})
    logger.info("%d seeds: test AUC %.4f, standard deviation %.4f", len(seeds), means["test_auc"], stds["test_auc_std"])
