"""The measurements of gpu.py: a function for each section, which prints its rows through the report.

Training: a ViT-L step with 96 and 48 cubed crops, 8 local ones, 65,536 prototypes; the time is the mean of steps that follow
each other without a look at the device in between. Its share of the card's rate: matrix products of a step (counted once in
eager mode, attention's included, what is computed again not) over their rate on random data.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

import dinov2.features.encoder
from benchmarks import embed as embed_benchmark
from benchmarks import index as index_benchmark
from benchmarks import ms_deform_attn_3d as operator
from benchmarks import train_step
from dinov2.configs import load_and_merge_config_3d
from dinov2.data import read_datalist
from dinov2.data.cache.commands import build as build_cache
from dinov2.data.corpus.index.command import IndexRequest, index
from dinov2.data.downstream.recipes import Recipe
from dinov2.data.pool import default_workers
from dinov2.distributed.precision import autocast, evaluation_dtype
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval.probing.linear_heads import LEARNING_RATES, LinearHeads, head_grid
from dinov2.eval.segmentation_3d import engine
from dinov2.eval.segmentation_3d.build import Task, build_segmentation
from dinov2.eval.segmentation_3d.inference import predict_masks
from dinov2.eval.segmentation_3d.losses import build_loss
from dinov2.features.setup import build_model_for_eval
from dinov2.layers import folding
from dinov2.models.vision_transformer import vit_tiny_3d
from dinov2.ops import cuda_kernels
from dinov2.signals import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
LARGE = ["student.arch=vit_large_3d", "dino.head_n_prototypes=65536", "ibot.head_n_prototypes=65536"]
MODULES = [(side, module) for side in ("student", "teacher") for module in ("backbone", "dino_head", "ibot_head")]
WARM_UP = 3
NUM_KERNELS = 10
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BTCV_SHAPE = (256, 256, 200)  # a scan of BTCV at 1.5 x 1.5 x 2 mm
Args = argparse.Namespace


def has_gpu() -> bool:
    """Asked in a way that leaves CUDA untouched in this process, which is to be forked."""
    tool = shutil.which("nvidia-smi")
    return (
        torch.version.cuda is not None
        and tool is not None
        and subprocess.run([tool, "-L"], capture_output=True).returncode == 0
    )


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], rounds: int = 1) -> float:
    """Mean of calls that follow each other."""
    synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        function()
    synchronize()
    return (time.perf_counter() - start) / rounds


def peak_gib(device: str) -> float:
    return Runtime(torch.device(device)).peak_memory_gib()


# machine


def machine(report: Any, args: Args) -> None:
    """The card, its two ceilings on random data, and what a training step multiplies."""
    if args.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        what = f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GiB"
        version = f"CUDA {torch.version.cuda}, kernels: {cuda_kernels()[1]}"
    else:
        what, version = "CPU", "no CUDA"
    report.row("machine", f"{what}; torch {torch.__version__}, {version}")
    n = 8192 if args.device == "cuda" else 256
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
        a @ b
        rate = 2.0 * n**3 / min(seconds_of(lambda a=a, b=b: a @ b, 5) for _ in range(3))
        report.row(f"matrix products, {name}, {n} cubed, random data", f"{rate / 1e12:.1f} TFLOP/s", **{f"rate_{name}": rate})
    x = torch.randn(n * n, 4 if args.device == "cuda" else 1, device=args.device)
    y = torch.empty_like(x)
    y.copy_(x)
    copied = 2 * x.nbytes / min(seconds_of(lambda: y.copy_(x), 5) for _ in range(3))
    report.row("copy on the device, read and written", f"{copied / 1e12:.2f} TB/s", copy=copied)
    volumes = 4
    setup = make_setup(args, "bf16", volumes, ["train.compile=false"])
    with FlopCounterMode(display=False) as counter:
        setup.step()
    flops = counter.get_total_flops() / volumes
    report.row("matrix products of a training step, a volume", f"{flops / 1e12:.3f} TFLOP", flops_per_volume=flops)


# train


def overrides(args: Args, precision: str) -> list[str]:
    words = [f"compute_precision.{s}.{m}.mixed_precision.param_dtype={precision}" for s, m in MODULES]
    return [*(LARGE if args.device == "cuda" else train_step.SMALL), *words]


def make_setup(args: Args, precision: str, batch: int, keys: list[str]) -> train_step.Setup:
    return train_step.Setup([*overrides(args, precision), *keys], batch, args.device)


def batches_of(args: Args) -> list[int]:
    return [int(n) for n in args.batches.split(",")] if args.device == "cuda" else [2]


def train_compiled(report: Any, args: Args) -> None:
    train(report, args, "bf16", batches_of(args), ["train.compile=true"], profiled=True)


def train_eager(report: Any, args: Args) -> None:
    train(report, args, "bf16", [*batches_of(args), 16], ["train.compile=false"])


def train_fp16(report: Any, args: Args) -> None:
    train(report, args, "fp16", batches_of(args)[:1], ["train.compile=true"])


def train_small_batch(report: Any, args: Args) -> None:
    train(report, args, "bf16", [16], ["train.compile=true"])


def train_unfolded(report: Any, args: Args) -> None:
    """What folding norms and LayerScales into weights is worth: the step without it."""
    with patch.object(folding, "modules_to_fold", lambda layer, norm: None):
        train(report, args, "bf16", batches_of(args)[:1], ["train.compile=true"], note=", not folded")


def train_budget(report: Any, args: Args) -> None:
    """Less is kept for the backward pass: what the compiler computes again by its budget, or whole blocks."""
    keys = ["train.compile=true", "train.activation_checkpointing=budget:0.8"]
    try:
        load_and_merge_config_3d(None, keys)
    except BadInput:
        keys = ["train.compile=true", "train.activation_checkpointing=full"]
    train(report, args, "bf16", batches_of(args)[-1:], keys)


def train(
    report: Any, args: Args, precision: str, batches: list[int], keys: list[str], profiled: bool = False, note: str = ""
) -> None:
    """Steps of each batch size with one network."""
    setup = make_setup(args, precision, batches[0], keys)
    cfg = load_and_merge_config_3d(None, [*train_step.BASE, *overrides(args, precision), *keys])
    how = ", ".join(k.removeprefix("train.").replace("activation_checkpointing", "checkpointing") for k in keys)
    for batch in batches if args.device == "cuda" else [2]:
        dynamo = importlib.import_module("torch._dynamo")  # not before the fork: it may look at the GPU
        dynamo.reset()  # graphs of another size count against a limit
        dynamo.utils.counters.clear()
        setup.state.optimizer.zero_grad(set_to_none=True)
        setup.batch = None
        what = f"step, {precision}, {how}{note}, {batch} volumes"
        try:
            setup.batch = {
                k: v.to(args.device) if isinstance(v, Tensor) else v for k, v in train_step.random_batch(cfg, batch).items()
            }
            time_steps(report, args, setup, batch, precision, what)
            if profiled and batch == batches[0]:
                largest_kernels(report, setup.step, f"of a step with {batch} volumes")
        except torch.OutOfMemoryError as err:
            report.row(what, f"out of memory: {str(err).split('.')[0]}")


def time_steps(report: Any, args: Args, setup: train_step.Setup, batch: int, precision: str, what: str) -> None:
    """A row: time, rate, share, memory, compilation."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    first = seconds_of(setup.step)
    for _ in range(WARM_UP - 1):
        setup.step()
    before = compiled_graphs()
    best = min(seconds_of(setup.step, args.rounds) for _ in range(2))
    loss = float(setup.step()["total_loss"])
    text = f"{best:.3f} s, {batch / best:.1f} volumes/s"
    rate, flops = report.figure(f"rate_{precision}"), report.figure("flops_per_volume")
    if rate and flops:
        text += f", {flops * batch / best / rate:.1%} of the rate"
    text += f", {peak_gib(args.device):.1f} GiB; first step {first:.0f} s"
    if before:
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        text += f", {before} graphs, {breaks} breaks, {compiled_graphs() - before} graphs after step {WARM_UP}"
    text += f"; loss {loss:.3f}{'' if math.isfinite(loss) else ': NOT FINITE'}"
    report.row(what, text, **{f"alone_{precision}_{batch}": best})


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def largest_kernels(report: Any, step: Callable[[], Any], what: str, count: int = NUM_KERNELS) -> None:
    """The kernels that take most of one step (on a CPU: operators)."""
    on_gpu = torch.cuda.is_initialized()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        seconds_of(step)
    times = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key) for e in profile.key_averages()]
    times = [row for row in times if row[0] > 0]  # the host's calls have no time on the device
    total = sum(t for t, _, _ in times) or 1.0
    for i, (micros, calls, name) in enumerate(sorted(times, reverse=True)[:count], 1):
        short = name.replace("|", "/").replace("`", "")[:90]
        report.row(f"kernel {i} {what}", f"{micros / total:.1%}, {micros / 1e3:.1f} ms, {calls} calls: `{short}`")
    report.row(f"all kernels {what}", f"{total / 1e3:.1f} ms in {sum(n for _, n, _ in times)} calls")


# end to end


def end_to_end(report: Any, args: Args) -> None:
    """The training program itself on volumes cached before, stopped when it has run long enough."""
    on_gpu = args.device == "cuda"
    batch = batches_of(args)[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = args.data
        if source is None:
            source = folder / "made"
            source.mkdir()
            index_benchmark.generate(source, 0, 8, [96] * 3 if on_gpu else [24] * 3)
        index([source], IndexRequest(folder / "list.json", num_workers=default_workers()), lambda line: None)
        datalist = read_datalist(folder / "list.json")
        build_cache(datalist, folder / "cache", None, default_workers(), lambda line: None)
        report.row("end to end, data", f"{len(datalist)} {'generated' if args.data is None else 'real'} volumes, cached")
        for workers in (8, 15) if on_gpu else (1,):
            keys = [
                f"train.dataset_path={folder / 'list.json'}",
                f"train.cache_dir={folder / 'cache'}",
                f"train.batch_size_per_gpu={batch}",
                f"train.num_workers={workers}",
                "train.memory_store_mb=0",  # every volume is read from the cache, as of a large list
                "train.log_period=5" if on_gpu else "train.log_period=1",
                "train.checkpoint_period=100000",
                "train.compile=true" if on_gpu else "train.compile=false",
                *([] if on_gpu else ["train.data_min_axis_size=8"]),
            ]
            words = [*train_step.BASE, *overrides(args, "bf16"), *keys]
            rows = run_training(words, folder / f"run{workers}", (15, 45) if on_gpu else (1, 4))
            if not rows:
                report.row(f"end to end, {workers} loader processes", "no steps; see the log above")
                continue
            step, waited = (sum(r[k] for r in rows) / len(rows) for k in ("iter_time", "data_time"))
            text = (
                f"{step:.3f} s, {batch / step:.1f} volumes/s, data wait {waited / step:.1%}, {rows[-1]['memory_gib']:.1f} GiB"
            )
            alone = report.figure(f"alone_bf16_{batch}")
            text += f"; {alone / step:.1%} of the step alone" if alone else ""
            report.row(f"end to end, bf16, compiled, {batch} volumes, {workers} loader processes", text)


def run_training(words: list[str], output: Path, iterations: tuple[int, int]) -> list[dict[str, float]]:
    """The lines of metrics after the first of these iterations; the program is ended at the second."""
    program = [sys.executable, str(ROOT / "dinov2/train/train3d.py"), "--output-dir", str(output), *words]
    with (output.parent / f"{output.name}.log").open("w") as log:
        process = subprocess.Popen(
            program, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent
        )  # and where this section is ended for its time, the training is too
        try:
            metrics = output / "training_metrics.json"
            rows: list[dict[str, float]] = []
            while process.poll() is None and (not rows or rows[-1]["iteration"] < iterations[1]):
                time.sleep(0.5)
                text = metrics.read_text() if metrics.exists() else ""
                rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its loader processes: nothing is to be saved
            process.wait()
    if not rows or rows[-1]["iteration"] < iterations[1]:
        sys.stderr.write(Path(log.name).read_text()[-2000:])
    return [r for r in rows if r["iteration"] > iterations[0]]


# deformable attention


def attention(report: Any, args: Args) -> None:
    """Forward and backward of each case; grid_sample and the operator taking turns."""
    on_gpu = args.device == "cuda"
    for dtype in (torch.float32, torch.bfloat16):
        for case in operator.CASES if on_gpu else ("injector",):
            value, shapes, locations, weights = operator.make_arguments(case, False, args.device)
            arguments = (value.detach().to(dtype).requires_grad_(), shapes, locations, weights)
            best = {(way, i): math.inf for way in operator.WAYS for i in (0, 1)}
            for _ in range(args.rounds + 2):  # the first ones also load kernels
                for way, function in operator.WAYS.items():
                    for i, taken in enumerate(passes(function, arguments)):
                        best[way, i] = min(best[way, i], taken)
            for i, name in enumerate(("forward", "backward")):
                reference, ours = best["grid_sample", i], best["ours", i]
                what = f"deformable attention, {case}, {str(dtype).removeprefix('torch.')}, {name}"
                found = f"grid_sample {1e3 * reference:.3f} ms; ours {1e3 * ours:.3f} ms: {reference / ours:.1f} times"
                report.row(what, found)


def passes(way: Callable[..., Tensor], arguments: tuple) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass; on a GPU the device's own."""
    value, _, locations, weights = arguments
    if not value.is_cuda:
        return operator.passes(way, arguments)
    grad = torch.ones_like(way(*arguments))

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(way(*arguments), (value, locations, weights), grad)

    forward = device_seconds(lambda: way(*arguments))
    return forward, device_seconds(both) - forward


def device_seconds(function: Callable[[], Any], calls: int = 10) -> float:
    """Of a call, on the device: the calls are captured in a graph, so that their launches cost nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()

    def calls_in_turn() -> None:
        for _ in range(calls):
            function()

    run: Callable[[], None] = graph.replay
    try:
        with torch.cuda.graph(graph):
            calls_in_turn()
    except RuntimeError as err:
        print(f"no graph, launches count too: {err}", file=sys.stderr)
        run = calls_in_turn
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


# segmentation


def segmentation(report: Any, args: Args) -> None:
    """A step of the adapter with 8 crops, what each part keeps for the backward pass, and a sliding window."""
    on_gpu = args.device == "cuda"
    size, crops = (112, 8) if on_gpu else (32, 1)
    arch = "vit_large_3d" if on_gpu else "vit_tiny_3d"
    recipe = Recipe(classes={i: str(i) for i in range(14)}, name="timing")
    precision = [f"compute_precision.{s}.{m}.mixed_precision.param_dtype=bf16" for s, m in MODULES]
    cfg = load_and_merge_config_3d(None, [f"student.arch={arch}", *precision])
    runtime = Runtime(torch.device(args.device))
    backbone = build_model_for_eval(cfg, "random", runtime)
    model = build_segmentation(cfg, backbone, Task(recipe, "ViTAdapterUNETR", size, 1.0), False, runtime)
    loss = build_loss(recipe)
    plan = engine.Plan(10, 0, 10, crops, 1e-4, False, 0)
    with tempfile.TemporaryDirectory() as folder:
        run = engine.start_run(model, cfg, plan, Path(folder), runtime)
        dtype = evaluation_dtype(cfg, args.device)
        images = torch.randn(crops, 1, *(size,) * 3, device=args.device)
        labels = torch.randint(0, 14, (crops, 1, *(size,) * 3), device=args.device)

        def step() -> None:
            engine.step(run, model, loss, images, labels, 1e-4, dtype)

        what = f"segmentation step, {arch}, adapter, {crops} crops of {size} cubed, bf16"
        time_segmentation(report, args, step, what)
        if on_gpu:
            kept = kept_by_part(model, lambda: forward(model, images, dtype))
            parts = ", ".join(f"{name} {gib:.2f}" for name, gib in kept.items())
            report.row("  kept for the backward pass, GiB", parts)
        largest_kernels(report, step, "of a segmentation step", 6)
        model.eval()
        shape = BTCV_SHAPE if on_gpu else (40, 40, 32)
        case = engine.Case(None, torch.randn(1, *shape), None, None)
        window = (size, engine.TEST_OVERLAP, cfg.segmentation.window_batch, dtype)
        taken = seconds_of(lambda: predict_masks(model, case, recipe, *window))
        what = f"sliding window over {'x'.join(map(str, shape))}, overlap {engine.TEST_OVERLAP}"
        report.row(what, f"{taken:.1f} s, {cfg.segmentation.window_batch} windows a pass")
        model.train()
        model.backbone.eval()
        model.adapter.checkpointing = True
        time_segmentation(report, args, step, "  stages computed again")
        model.adapter.checkpointing = False
        model.to(memory_format=torch.channels_last_3d)
        images = images.to(memory_format=torch.channels_last_3d)
        time_segmentation(report, args, step, "  channels last")
        torch.backends.cudnn.benchmark = True
        time_segmentation(report, args, step, "  channels last, convolutions chosen by time")
        model.to(memory_format=torch.contiguous_format)
        images = images.contiguous()
        time_segmentation(report, args, step, "  convolutions chosen by time")
        if on_gpu:
            for block in model.backbone.block_list:
                block.compile(dynamic=False)
            time_segmentation(report, args, step, "  and compiled blocks")


def time_segmentation(report: Any, args: Args, step: Callable[[], None], what: str) -> None:
    """A row; more than the card's memory is one too."""
    try:
        first = best = seconds_of(step)
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            step()
            best = min(seconds_of(step, 2) for _ in range(2))
        report.row(what, f"{best:.3f} s, {peak_gib(args.device):.1f} GiB; first step {first:.1f} s")
    except torch.OutOfMemoryError as err:
        report.row(what, f"out of memory: {str(err).split('.')[0]}")


def forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    with autocast(images.device.type, dtype):
        return model(images)


def kept_by_part(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, float]:
    """GiB that are allocated after each part's forward pass beyond what was before it, the result kept alive."""
    adapter = model.adapter
    parts = {
        "spatial prior": [adapter.spm],
        "injectors": adapter.injectors,
        "extractors": adapter.extractors,
        "blocks": adapter.backbone.block_list,
        "norms": adapter.norms,
        "image block": [model.image_block],
        **{f"decoder {i}": [block] for i, block in enumerate(model.up_blocks)},
    }
    kept = dict.fromkeys(parts, 0.0)
    hooks = []
    for name, modules in parts.items():

        def before(*_: Any, name: str = name) -> None:
            kept[name] -= torch.cuda.memory_allocated() / 2**30

        def after(*_: Any, name: str = name) -> None:
            kept[name] += torch.cuda.memory_allocated() / 2**30

        for module in modules:
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    start = torch.cuda.memory_allocated()
    out = run()
    kept["all"] = (torch.cuda.memory_allocated() - start) / 2**30
    del out
    for hook in hooks:
        hook.remove()
    return kept


# embed, probe, nccl


def embed(report: Any, args: Args) -> None:
    """Scans a second: the network alone, and `dinov2 embed` from files."""
    on_gpu = args.device == "cuda"
    weights, size, batch = ("vit_large_3d", 96, 16) if on_gpu else ("vit_tiny_3d", 32, 1)
    encoder = dinov2.features.encoder.load_encoder(weights, args.device)
    x = torch.rand(batch, 1, *(size,) * 3, device=args.device) * 2 - 1
    encoder(x)
    best = min(seconds_of(lambda: encoder(x), 3) for _ in range(2))
    report.row(f"features, {weights}, {batch} scans of {size} cubed on the device", f"{batch / best:.1f} scans/s")
    shape, scans = [64, 64, 48] if on_gpu else [20, 20, 16], 192 if on_gpu else 4
    with fast_folder() as folder:
        index_benchmark.generate(folder, 0, scans, shape)
        paths = sorted(folder.rglob("*.nii.gz"))
        embed_benchmark.write_list(paths, shape, folder / "list.json")
        options = argparse.Namespace(weights=weights, mode="resize", size=size, workers=default_workers())
        taken, in_network, _, _ = embed_benchmark.run_embed(folder / "list.json", options)
    report.row(
        f"dinov2 embed, {weights}, {scans} files of {'x'.join(map(str, shape))}, resized to {size} cubed",
        f"{scans / taken:.1f} scans/s with {options.workers} processes, {in_network / taken:.0%} of it in the network",
    )


@contextmanager
def fast_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def probe(report: Any, args: Args) -> None:
    """The paper's grid of linear heads on features of a ViT-L."""
    width, layers, rows, classes = 1024, 4, 32, 4
    heads = LinearHeads(head_grid(LEARNING_RATES, layers), layers, width, classes, device=args.device)
    features = torch.randn(rows, (layers + 1) * width, device=args.device)
    labels = torch.randint(classes, (rows,), device=args.device)
    heads.step(features, labels, 1.0)
    best = min(seconds_of(lambda: heads.step(features, labels, 1e-3), 50) for _ in range(3))
    report.row(f"linear probe, 52 heads, {width} x {layers + 1} features, {rows} rows", f"{1e3 * best:.2f} ms an iteration")


def nccl(report: Any, args: Args) -> None:
    """A step of a sharded network on every GPU."""
    ranks = torch.cuda.device_count() if args.device == "cuda" else 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = [str(ROOT / "benchmarks/gpu.py"), "--sharded-step", "--device", args.device]
    result = subprocess.run([*launcher, *program], capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("SHARDED ")]
    if not lines:
        raise RuntimeError(result.stderr[-2000:])
    backend, seconds, error = lines[0].split()[1:]
    measured = f"{float(seconds):.2f} s; differs from one process by {float(error):.1e}"
    report.row(f"sharded step on {ranks} ranks, {backend}", measured)


def sharded_step(device: str) -> None:
    """One step of a sharded network, in each process that torchrun starts; rank 0 says what came out."""
    rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)
    network = vit_tiny_3d(patch_size=8, img_size=32).to(device)
    x = torch.randn(2, 1, 32, 32, 32, device=device)
    alone = network(x, None, is_training=True)["x_norm_clstoken"].float()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in network.block_list:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    optimizer = torch.optim.AdamW(network.parameters())

    def step() -> Tensor:
        out = network(x, None, is_training=True)["x_norm_clstoken"].float()
        out.square().sum().backward()
        optimizer.step()
        return out.detach()

    start = time.perf_counter()
    error = float((step() - alone).detach().abs().max())
    if rank == 0:
        print(f"SHARDED {dist.get_backend()} {time.perf_counter() - start} {error}", flush=True)
    dist.destroy_process_group()
