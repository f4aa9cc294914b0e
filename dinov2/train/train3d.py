"""Pretrain a 3D vision transformer: `python dinov2/train/train3d.py --config-file F --output-dir D [key=value ...]`.

Reading order: `main` -> `run` (what a run needs) -> `do_train` (the loop) -> `train_step` (one update) ->
`ssl_meta_arch.py` (targets and losses).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from dinov2.start import start_program  # its package comes before torch and decides how threads wait

    start_program()

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import AdamW

from dinov2.checkpointer.checkpointer import Checkpointer
from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.data import Datalist, TrainLoader, read_datalist
from dinov2.data.collate import Batch
from dinov2.distributed import gather_objects, is_enabled, is_main_process, mean_over_ranks
from dinov2.distributed.precision import training_dtype
from dinov2.distributed.runtime import Runtime, lost_rank_explained, start_runtime
from dinov2.errors import EXIT_OK, BadInput
from dinov2.files import write_json, write_text
from dinov2.fsdp.parallel import num_shards, resolve_strategy
from dinov2.fsdp.tensors import whole
from dinov2.logging import MetricWriter, setup_logging
from dinov2.logging.folder import refuse_another_programs_run, run_folder, set_aside
from dinov2.logging.provenance import RUN_FILE, run_record
from dinov2.program import run_program
from dinov2.signals import stop_requests
from dinov2.streams import Kind, torch_seed
from dinov2.train.alerts import Alerts
from dinov2.train.build import build, build_checkpointer, data_record
from dinov2.train.compiling import first_compiled
from dinov2.train.evaluation import UNTRAINED, OnlineEvaluation, OpenEvaluators, open_evaluation
from dinov2.train.flops import step_flops
from dinov2.train.forecast import out_of_memory_explained
from dinov2.train.meta_arch import MetaArch
from dinov2.train.pictures import Pictures
from dinov2.train.progress import Progress, progress_line
from dinov2.train.schedules import Schedules, StepParams, apply_schedules, build_schedules, with_derived_lr
from dinov2.train.stages import read_stages
from dinov2.train.state import TrainState, check_same_on_all_ranks, check_same_run, save_teacher

logger = logging.getLogger("dinov2.train.train3d")

MAX_SKIPPED_IN_ROW = 5


def get_args_parser() -> argparse.ArgumentParser:
    """3DINO's flags; what follows them are `key=value` overrides of the configuration."""
    parser = argparse.ArgumentParser("train3d.py", description="Pretrain a 3D vision transformer with 3DINO.")
    parser.add_argument("--config-file", help="YAML file or name (pretrain/tiny_cpu); default: the published defaults")
    parser.add_argument("--stages", help="YAML list of stages instead of one configuration (pretrain/two_stage)")
    parser.add_argument("--output-dir", "--output_dir", help="folder of the run (train.output_dir)")
    parser.add_argument("--cache-dir", help="folder of preprocessed volumes (train.cache_dir), filled as they are used")
    parser.add_argument("--no-resume", action="store_true", help="start over; an earlier run in the folder is moved aside")
    parser.add_argument("--allow-changed-data", action="store_true", help="continue although the datalist changed")
    parser.add_argument("--eval-only", action="store_true", help="write the latest teacher to eval/manual_<iteration> and exit")
    parser.add_argument("--eval", default="", help="accepted for old commands, no effect")
    parser.add_argument("--local-rank", type=int, default=0, help="accepted for old launchers, no effect")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="configuration overrides")
    return parser


@dataclass(frozen=True)
class Request:
    """What a training is asked for: the flags of the command line, by their names."""

    config_file: str | None
    stages: str | None
    output_dir: str | None
    cache_dir: str | None
    no_resume: bool
    allow_changed_data: bool
    eval_only: bool
    eval: str
    opts: list[str]
    open_evaluators: OpenEvaluators | None = None  # no flag: of `main`


def main(argv: Sequence[str] | None = None, open_evaluators: OpenEvaluators | None = None) -> int:
    """Parse, run, and turn a user's mistake into one line and exit code 2.

    Args:
        argv: The command line; None: this process's.
        open_evaluators: Makes what `evaluation.tasks` asks for, which training knows nothing of.
    """
    return run_program(lambda args: run_request(args, open_evaluators), get_args_parser(), argv)


def run_request(args: argparse.Namespace, open_evaluators: OpenEvaluators | None) -> int:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Request) if f.name != "open_evaluators"}
    asked = Request(**given, open_evaluators=open_evaluators)
    return run_stages(asked) if asked.stages else run(asked)


def run(asked: Request) -> int:
    """Everything around the loop: configuration, ranks, folder, data, model, resume."""
    named = {"train.output_dir": asked.output_dir, "train.cache_dir": asked.cache_dir}
    overrides = [*asked.opts, *(f"{key}={value}" for key, value in named.items() if value)]
    cfg = load_and_merge_config_3d(asked.config_file, overrides)
    runtime = start_runtime(cfg.train.num_threads, cfg.train.backend, cfg.train.timeout_s)
    setup_logging(rank=runtime.rank)
    with lost_rank_explained(runtime.rank), run_folder(cfg.train.output_dir, runtime) as output_dir:
        setup_logging(output_dir, runtime.rank)
        return prepare_and_train(asked, cfg, runtime, output_dir)


def run_stages(asked: Request) -> int:
    """One training after the other; each resumes by itself, a finished one is passed over."""
    if asked.config_file or not asked.stages or not asked.output_dir:
        raise BadInput("--stages needs --output-dir, and names the configurations itself: leave out --config-file")
    refuse_another_programs_run(Path(asked.output_dir))
    for stage in read_stages(asked.stages, asked.output_dir, asked.opts):
        logger.info("stage %s", stage.name)
        own = dataclasses.replace(asked, config_file=stage.config, output_dir=str(stage.output_dir), opts=list(stage.overrides))
        code = run(own)
        if code != EXIT_OK:
            return code
    return EXIT_OK


def prepare_and_train(asked: Request, cfg: DictConfig, runtime: Runtime, output_dir: Path) -> int:
    """Data, model, resume; then the loop."""
    say_what_has_no_effect(cfg, asked, runtime)
    cfg = with_derived_lr(cfg, runtime.world_size)
    datalist = read_datalist(cfg.train.dataset_path).larger_than(cfg.train.data_min_axis_size)
    effective_batch = cfg.train.batch_size_per_gpu * cfg.train.accumulation_steps * runtime.world_size
    if asked.no_resume and is_main_process():
        set_aside(output_dir)
    check_same_on_all_ranks(cfg, datalist)
    check_same_run(output_dir, datalist.sha256, effective_batch, runtime.world_size, asked.allow_changed_data)

    checkpointer = build_checkpointer(cfg, output_dir)
    state = TrainState(*build(cfg, runtime, load_start=checkpointer.newest() is None))
    state.resume(checkpointer)
    if asked.eval_only:
        return write_teacher_only(state, cfg, output_dir, data_record(datalist, cfg))
    schedules = build_schedules(cfg, runtime.world_size)
    if state.iteration + 1 >= schedules.total_iters:
        logger.info("%s: finished already, all %d iterations are done", output_dir, schedules.total_iters)
        return EXIT_OK
    evaluation = open_evaluation(asked.open_evaluators, cfg, datalist, runtime, output_dir)
    if is_main_process():
        write_text(output_dir / "config.yaml", default_yaml(cfg))
        strategy = resolve_strategy(cfg.train.strategy, runtime)
        layout = {"ranks": runtime.world_size, "strategy": strategy, "device": runtime.device.type}
        write_json(output_dir / RUN_FILE, run_record(datalist.sha256, len(datalist), effective_batch, layout))
    return do_train(state, cfg, runtime, schedules, datalist, checkpointer, output_dir, evaluation)


def do_train(
    state: TrainState,
    cfg: DictConfig,
    runtime: Runtime,
    schedules: Schedules,
    datalist: Datalist,
    checkpointer: Checkpointer,
    output_dir: Path,
    evaluation: OnlineEvaluation,
) -> int:
    """The loop: one update per iteration, metrics, evaluations, checkpoints; returns the exit code."""
    model, total, first = state.model, schedules.total_iters, state.iteration + 1
    loader = TrainLoader(cfg, datalist, first, runtime.rank, runtime.world_size, runtime.device)
    progress = progress_of(cfg, runtime)
    data = data_record(datalist, cfg)
    pictures = Pictures(loader.datalist, cfg.crops.global_crops_size, cfg.student.patch_size, cfg.train.cache_dir)
    what = "iterations %d to %d, %d volumes a step from %d, on %s"
    logger.info(what, first, total - 1, progress.volumes_per_step, len(datalist), runtime.device)
    with (
        MetricWriter(output_dir, first, is_main_process()) as metrics,
        Alerts(cfg, output_dir, first, runtime) as alerts,
        stop_requests() as stop_asked,
        closing(iter(loader)) as batches,  # ends the loader processes, whatever happens
    ):
        if first == 0:
            evaluation.visit(UNTRAINED, total, model, metrics, data, progress)
        for iteration in range(first, total):
            with progress.waiting_for_data():
                batch = next(batches)
            torch.manual_seed(torch_seed(cfg.train.seed, Kind.STEP, iteration))
            hp = schedules(iteration)
            is_logged = iteration % cfg.train.log_period == 0 or iteration == total - 1
            progress.flops_per_step = progress.flops_per_step or step_flops(model, batch)
            with out_of_memory_explained(cfg, model.compile_state != "off", num_shards(cfg, runtime)):
                values = train_step(state, hp, batch, cfg.optim.clip_grad, is_logged, bool(stop_asked))
            state.iteration = iteration
            progress.step_done()
            checkpointer.finish(wait=False)
            if is_logged:
                note_arrived(state, drain=True)  # reading the values waits for the device anyway
                row = metric_row(iteration, hp, values, state, progress)
                metrics.write(row)
                logger.info("%s", progress_line(iteration, total, row))
                alerts.see(row)
            if checkpointer.is_milestone(iteration) and is_main_process():
                with progress.paused():
                    metrics.write_pictures(pictures.draw(model, batch[0], num_shards(cfg, runtime) == 1), iteration)
            if checkpointer.is_milestone(iteration) or iteration == total - 1:
                save_teacher(model, cfg, output_dir / "eval" / f"training_{iteration}", iteration, data)
            evaluation.visit(iteration, total, model, metrics, data, progress)  # before the checkpoint, so that it has the row
            stop = state.stop_seen or (bool(stop_asked) and not is_enabled())  # all ranks stop after the same step
            collapsed = is_logged and alerts.is_to_stop()
            if is_checkpoint_due(cfg, checkpointer, iteration, total) or stop or collapsed:
                note_arrived(state, drain=True)  # so that its counters are those of this step
                checkpointer.save(state.state_dict(), iteration)
            if (stop or collapsed) and iteration < total - 1:
                checkpointer.finish()
                return alerts.collapsed(progress, iteration) if collapsed else alerts.stopped(progress, iteration, stop_asked)
        checkpointer.finish()
        say_bad_volumes(loader, datalist)
        return alerts.done(progress, output_dir / "eval" / f"training_{total - 1}" / "teacher_checkpoint.pth")


def progress_of(cfg: DictConfig, runtime: Runtime) -> Progress:
    """Timings of steps of the effective batch."""
    volumes_per_step = cfg.train.batch_size_per_gpu * cfg.train.accumulation_steps * runtime.world_size
    return Progress(runtime, volumes_per_step, training_dtype(cfg.compute_precision.student.backbone, runtime.device.type))


def say_bad_volumes(loader: TrainLoader, datalist: Datalist) -> None:
    """How many there were; each was named when it was met."""
    if loader.bad_volumes:
        logger.warning("%d of %d volumes could not be used; they are named above", len(loader.bad_volumes), len(datalist))


def train_step(
    state: TrainState, hp: StepParams, micro_batches: list[Batch], clip_grad: float, monitor: bool, stop: bool = False
) -> dict[str, Tensor]:
    """One update, one line per act; scalars stay on the device until they are logged, and the host waits for nothing.

    `stop` says that this rank was asked to stop; every rank hears of it with the step's flags (`state.stop_seen`).
    """
    model, optimizer = state.model, state.optimizer
    apply_schedules(optimizer, hp)  # lr, weight decay, frozen last layer
    optimizer.zero_grad(set_to_none=True)
    values = first_compiled(model, lambda: model.forward_backward(micro_batches, hp.teacher_temp, monitor))
    model.grad_scaler.unscale_(optimizer)
    grad_norms = clip_grad_norms(model.student, clip_grad)  # per submodule, as DINOv2
    names = [sample for batch in micro_batches for sample in batch["sample_ids"]]
    is_bad = not_finite(model, values["total_loss"], grad_norms)
    skip = state.flags.post(state.iteration + 1, names, is_bad, stop)  # on the device, the same on every rank
    step_unless(skip, optimizer, model.grad_scaler)
    model.update_teacher(hp.mom, skip)
    model.grad_scaler.update()
    note_arrived(state)
    return values | grad_norms


def not_finite(model: MetaArch, loss: Tensor, grad_norms: dict[str, Tensor]) -> Tensor:
    """Whether the step must not change weights, as a scalar on the device.

    Under a gradient scaler an overflow of the gradients alone is its business: it skips the update and lowers the scale.
    """
    checked = [loss] if model.grad_scaler.is_enabled() else [loss, *grad_norms.values()]
    return ~torch.stack(checked).isfinite().all()


def step_unless(skip: Tensor, optimizer: AdamW, scaler: torch.amp.GradScaler) -> None:
    """Update the weights; where `skip` is 1 the fused AdamW leaves weights, moments and step count as they are."""
    if not scaler.is_enabled():  # an enabled one hands over a flag of its own
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # torch's own handshake with its scaler, not declared there
    scaler.step(optimizer)


def clip_grad_norms(student: nn.ModuleDict, max_norm: float) -> dict[str, Tensor]:
    """Clip each submodule's gradient to `max_norm` (0: not at all); the norms before clipping, by name."""
    norms = {}
    for name, net in student.items():
        params = [p for p in net.parameters() if p.grad is not None]
        norm = clip_grad_norm_(params, max_norm) if max_norm else get_total_norm([p.grad for p in params if p.grad is not None])
        norms[f"grad_norm_{name}"] = whole(norm)
    return norms


def note_arrived(state: TrainState, drain: bool = False) -> None:
    """Count the steps whose flags have reached the host, or all; of one that was not finite name the volumes.

    Raises:
        BadInput: Several in a row.
    """
    for step in state.flags.arrived(drain):
        state.stop_seen |= step.stop
        state.skipped_in_row = state.skipped_in_row + 1 if step.is_bad else 0
        if not step.is_bad:
            continue
        state.skipped_steps += 1
        names = sorted({name for of_rank in gather_objects(step.names if step.is_bad_here else []) for name in of_rank})
        what = "iteration %d: loss or gradient is not finite, step skipped; its volumes: %s"
        logger.warning(what, step.iteration, ", ".join(names))
        if state.skipped_in_row >= MAX_SKIPPED_IN_ROW:
            raise BadInput(
                f"{MAX_SKIPPED_IN_ROW} non-finite steps in a row up to iteration {step.iteration}: lower optim.base_lr, "
                "use bf16 or fp32 as param_dtype, or check the volumes named above; the last checkpoint is before them"
            )


def metric_row(
    iteration: int, hp: StepParams, values: dict[str, Tensor], state: TrainState, progress: Progress
) -> dict[str, float]:
    """One line of `training_metrics.json`: this step's values (so that a resumed run writes the same), and timings.

    `current_batch_size` is this rank's, as published; `effective_batch`, of all ranks, is named as in `run.json`.
    """
    scheduled = {"lr": hp.lr, "wd": hp.wd, "mom": hp.mom, "last_layer_lr": hp.last_layer_lr, "teacher_temp": hp.teacher_temp}
    values = mean_over_ranks(values)
    losses = dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))
    volumes = progress.volumes_per_step
    batch = {"current_batch_size": volumes // progress.runtime.world_size, "effective_batch": volumes}
    counts = {**batch, "skipped_steps": state.skipped_steps}
    return {"iteration": iteration, **progress.report(), **scheduled, **counts, **losses}


def is_checkpoint_due(cfg: DictConfig, checkpointer: Checkpointer, iteration: int, total: int) -> bool:
    periodic = (iteration + 1) % cfg.train.checkpoint_period == 0
    return periodic or checkpointer.is_milestone(iteration) or iteration == total - 1


def write_teacher_only(state: TrainState, cfg: DictConfig, output_dir: Path, data: dict[str, Any]) -> int:
    """`--eval-only`: the latest checkpoint's teacher as a file of its own."""
    if state.iteration < 0:
        raise BadInput(f"{output_dir}: no checkpoint to take a teacher from")
    folder = output_dir / "eval" / f"manual_{state.iteration}"
    logger.info("wrote %s", save_teacher(state.model, cfg, folder, state.iteration, data))
    return EXIT_OK


def say_what_has_no_effect(cfg: DictConfig, asked: Request, runtime: Runtime) -> None:
    """Accepted for compatibility, said once."""
    if cfg.train.saveckp_freq != 20:
        logger.info("train.saveckp_freq has no effect: use train.checkpoint_period (iterations)")
    if not cfg.train.cache_dataset:
        logger.info(
            "train.cache_dataset has no effect: see train.cache_dir, and train.memory_store_mb=0 to keep none in memory"
        )
    if asked.eval:
        logger.info("--eval has no effect: evaluate the teacher checkpoints with the programs in dinov2/eval")
    fp16 = cfg.compute_precision.student.backbone.mixed_precision.param_dtype == "fp16"
    if fp16 and runtime.device.type == "cpu":
        logger.info("param_dtype fp16 is computed as fp32 on a CPU")


if __name__ == "__main__":  # started as a program: the layer above hands in who evaluates
    from dinov2.run.train.pretrain import main as program

    sys.exit(program())
