"""`dinov2 bench`: measure, name what holds a run up, say what the whole run takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig

from dinov2.bench.measure import Measured, measure
from dinov2.bench.projection import memory_lines, projection
from dinov2.bench.verdict import Verdict, judge
from dinov2.configs import load_and_merge_config_3d
from dinov2.data import Datalist, read_datalist
from dinov2.distributed.runtime import Runtime, start_runtime
from dinov2.errors import EXIT_OK, BadInput
from dinov2.logging.setup import Say
from dinov2.ops import compiled_operators
from dinov2.program import run_program
from dinov2.train.build import build
from dinov2.train.forecast import USABLE, forecast_gib
from dinov2.train.state import TrainState


@dataclass(frozen=True)
class BenchRequest:
    """What is asked for.

    Attributes:
        datalist: JSON.
        config_file: As of a training.
        cache_dir: As of a training; filled where it is new.
        seconds: That it should take.
        devices: That the run will have.
        overrides: key=value.
    """

    datalist: Path
    config_file: str | None
    cache_dir: Path | None = None
    seconds: float = 90.0
    devices: int = 1
    overrides: list[str] = field(default_factory=list)


def get_args_parser() -> argparse.ArgumentParser:
    """The list, a training's flags, and `key=value` overrides of the configuration."""
    parser = argparse.ArgumentParser("dinov2 bench", description="Time a configuration on this machine before a run of it.")
    parser.add_argument("list", type=Path, help="datalist (JSON) to train on")
    parser.add_argument("--config-file", help="as of train; default: the published defaults")
    parser.add_argument("--cache-dir", type=Path, help="as of train; filled where it is new")
    parser.add_argument("--seconds", type=float, default=90.0, help="that it should take; default: %(default)g")
    parser.add_argument("--gpus", type=int, default=1, help="that the run will have, for what is said of it; default: 1")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="configuration overrides")
    return parser


def main(argv: Sequence[str] | None, say: Say) -> int:
    """Parse and run; a user's mistake is one line and exit code 2."""

    def run(args: argparse.Namespace) -> int:
        return bench(BenchRequest(args.list, args.config_file, args.cache_dir, args.seconds, args.gpus, args.opts), say)

    return run_program(run, get_args_parser(), argv)


def bench(request: BenchRequest, say: Say) -> int:
    """Measure and say.

    Raises:
        BadInput: No list, none that can be used, or nothing fits the card.
    """
    if request.seconds <= 0 or request.devices < 1:
        raise BadInput(f"--seconds {request.seconds:g} --gpus {request.devices}: both must be positive")
    named = {"train.dataset_path": request.datalist, "train.cache_dir": request.cache_dir}
    cfg = load_and_merge_config_3d(
        request.config_file, [*request.overrides, *(f"{key}={value}" for key, value in named.items() if value)]
    )
    datalist = read_datalist(cfg.train.dataset_path).larger_than(cfg.train.data_min_axis_size)
    runtime = start_runtime(cfg.train.num_threads)
    card_gib = None
    if runtime.device.type == "cuda":
        card_gib = torch.cuda.get_device_properties(runtime.device).total_memory / 2**30
        refuse_what_does_not_fit(cfg, request.devices, card_gib)
    measured, verdict = bench_of(cfg, datalist, runtime, request.seconds)
    kind = "CPU process" if card_gib is None else "GPU"
    lines = [
        *measured_lines(measured, cfg),
        *verdict_lines(verdict),
        *projection(cfg, measured.rate, request.devices, kind),
        *memory_lines(cfg, request.devices, card_gib),
    ]
    say("\n".join(lines))
    return EXIT_OK


def bench_of(cfg: DictConfig, datalist: Datalist, runtime: Runtime, seconds: float) -> tuple[Measured, Verdict]:
    """Times, and what they mean."""
    measured = measure(cfg, datalist, TrainState(*build(cfg, runtime)), runtime, seconds)
    is_compiled = compiled_operators()[0] and cfg.train.augmentation != "monai"
    return measured, judge(measured, bool(cfg.train.cache_dir), is_compiled, runtime.device.type == "cpu")


def refuse_what_does_not_fit(cfg: DictConfig, devices: int, card_gib: float) -> None:
    """Say before anything runs that a pass is too large for the card, and what fits.

    Raises:
        BadInput: It is, by the forecast.
    """
    compiled, batch = cfg.train.compile is not False, cfg.train.batch_size_per_gpu
    if forecast_gib(cfg, batch, compiled) > card_gib * USABLE:
        raise BadInput("; ".join(line.strip() for line in memory_lines(cfg, devices, card_gib)))


def measured_lines(m: Measured, cfg: DictConfig) -> list[str]:
    """The times, one line each."""
    ms = {"reading": m.disk_s, "decoding": m.decode_s, "crops": m.augment_s, "copy": m.transfer_s, "update": m.compute_s}
    asked = cfg.train.batch_size_per_gpu
    note = "" if m.batch == asked else f" (timed with {m.batch} volumes a pass instead of {asked}, to end in time)"
    return [
        f"loader alone  {m.loader_rate:8.1f} volumes/s, {m.num_workers} loader processes",
        f"network alone {m.model_rate:8.1f} volumes/s{note}",
        f"end to end    {m.rate:8.1f} volumes/s, waiting for data {m.data_wait:.0%}, {m.memory_gib:.1f} GiB",
        "a volume, ms: " + ", ".join(f"{name} {1e3 * s:.1f}" for name, s in ms.items()) + f"; no core free {m.queued:.0%}",
    ]


def verdict_lines(verdict: Verdict) -> list[str]:
    return [f"bottleneck: {verdict.name}", *(f"  {line}" for line in verdict.advice)]
