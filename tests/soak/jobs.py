"""The six programs as small jobs on generated data: how they are started, what a unit of their work is, what they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from dinov2.data import write_datalist
from dinov2.data.downstream.lists import write_downstream_datalist
from dinov2.data.volumes.opening import describe
from dinov2.features.embed_table import ROWS_PER_PART
from dinov2.models.vision_transformer import vit_tiny_3d
from tests.conftest import SMALL, TIMING

NUM_SCANS = 96
FROZEN = [word for word in SMALL if word.startswith(("student.", "crops.", "train.num_threads"))]
SEGMENTATION = """task: segmentation
classes: {0: background, 1: ball}
space: {orientation: RAS}
train: {crop: pos_neg, crops_per_volume: 2, flip_p: 0.0, scale: 0.1, shift: 0.1, loss: dice_ce}
"""
CLASSIFICATION = """task: classification
classes: {0: dark, 1: bright}
train: {foreground_crop: true, flip_p: 0.5, scale: 0.1, shift: 0.1}
"""

Content = dict[str, str]  # what a part of a result is called -> its hash


@dataclass(frozen=True)
class Job:
    """One program on the generated data.

    Attributes:
        name: Of the program.
        words: Of `python -m dinov2`, for an output folder.
        units: How much of its work an output folder shows.
        result: What it made, to be compared bit for bit.
        stride: A kill comes at most so many units after the last one.
        spread_s: And at most so long after the unit, about the time of one.
        kills: Of one job, before it is left alone to end.
        share: Of all kills.
    """

    name: str
    words: Callable[[Path], list[str]]
    units: Callable[[Path], int]
    result: Callable[[Path], Content]
    stride: int
    spread_s: float
    kills: int
    share: float


def make_data(folder: Path) -> None:
    """Scans with a bright ball each, their lists for every program, and a network."""
    scans = folder / "scans"
    scans.mkdir(parents=True)
    rng = np.random.default_rng(0)
    axes = np.stack(np.meshgrid(*[np.arange(n) for n in (30, 28, 26)], indexing="ij"), -1)
    for i in range(NUM_SCANS):
        ball = np.linalg.norm(axes - rng.integers(10, 16, 3), axis=-1) < 6
        voxels = (rng.normal(100, 8, ball.shape) + (60 + 90 * (i % 2)) * ball).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), scans / f"{i:03}.nii.gz")
        if i < 10:
            nib.save(nib.Nifti1Image(ball.astype(np.uint8), np.eye(4)), folder / f"label{i}.nii.gz")
    files = sorted(scans.iterdir())
    write_datalist(folder / "list.json", [describe(path) for path in files])
    write_datalist(folder / "few.json", [describe(path) for path in files[:8]])
    pairs = [{"image": str(files[i]), "label": str(folder / f"label{i}.nii.gz")} for i in range(10)]
    write_downstream_datalist(folder / "balls_100_datalist.json", _parts(pairs, 6, 8), seed=0)
    (folder / "balls.yaml").write_text(SEGMENTATION)
    rows = [{"image": str(path), "label": i % 2} for i, path in enumerate(files[:28])]
    write_downstream_datalist(folder / "shades_cls_datalist.json", _parts(rows, 16, 22), seed=0)
    (folder / "shades.yaml").write_text(CLASSIFICATION)
    torch.manual_seed(0)
    torch.save(vit_tiny_3d(patch_size=8, img_size=32, init_values=0.5).state_dict(), folder / "network.pth")


def _parts(rows: list[dict[str, Any]], first: int, second: int) -> dict[str, list[dict[str, Any]]]:
    return {"training": rows[:first], "validation": rows[first:second], "test": rows[second:]}


def jobs(data: Path) -> list[Job]:
    """All six, of the data that `make_data` wrote."""
    steps = ["train.num_workers=1", "optim.epochs=8", "train.checkpoint_period=7"]

    def train(out: Path) -> list[str]:
        return ["train", "--output-dir", str(out), *SMALL, *steps, f"train.dataset_path={data / 'few.json'}"]

    def cache(out: Path) -> list[str]:
        return ["cache", "build", str(data / "list.json"), "--cache-dir", str(out), "--workers", "2", "--min-axis", "8"]

    def index(out: Path) -> list[str]:
        out.mkdir(exist_ok=True)
        return ["index", str(data / "scans"), "--output", str(out / "list.json"), "--workers", "2", "--id-salt", "one"]

    def embed(out: Path) -> list[str]:
        out.mkdir(exist_ok=True)
        windows = ["--mode", "sliding_window", "--size", "16", "--patch-tokens"]  # so that a part takes a second
        words = ["--output", str(out / "f.parquet"), "--device", "cpu", "--workers", "2", *windows]
        return ["embed", str(data / "list.json"), "--weights", str(data / "network.pth"), *words]

    def segment(out: Path) -> list[str]:
        own = ["--segmentation-head", "UNETR", "--epochs", "4", "--epoch-length", "10", "--eval-iters", "10"]
        return ["segment", *_frozen(data, out, "balls"), *own, "--warmup-iters", "2", "--batch-size", "2", *_network()]

    def linear(out: Path) -> list[str]:
        own = ["--epochs", "12", "--epoch-length", "5", "--save-checkpoint-frequency", "1", "--eval-period-iterations", "20"]
        return ["linear", *_frozen(data, out, "shades"), *own, "--batch-size", "6", *_network()]

    return [
        Job("train", train, lines_of("training_metrics.json"), trained, 6, 0.5, 7, 0.14),
        Job("cache", cache, count_of("??/*.vol"), files_of("??/*.vol", "cache.json"), 14, 0.1, 7, 0.32),
        Job("index", index, lines_of("list.index.jsonl"), files_of("list*"), 14, 0.1, 7, 0.32),
        Job(
            "embed",
            embed,
            parts_of_a_table,
            files_of("f.parquet", "f.quarantine.json", "f.patches/*"),
            1,
            0.5,
            5,
            0.06,
        ),
        Job("segmentation", segment, lines_of("training_metrics.json"), segmented, 1, 1.0, 4, 0.08),
        Job("linear probe", linear, lines_of("training_metrics.json"), probed, 2, 0.5, 4, 0.08),
    ]


def _frozen(data: Path, out: Path, recipe: str) -> list[str]:
    words = {"pretrained-weights": "random", "output-dir": out, "dataset-name": data / f"{recipe}.yaml", "base-data-dir": data}
    own = {"image-size": 16, "num-workers": 1, "cache-dir": data / "cases"}
    return [word for key, value in (words | own).items() for word in (f"--{key}", str(value))]


def _network() -> list[str]:
    return ["--opts", *FROZEN, "segmentation.decoder_channels=[12,8,6,4]", "segmentation.inplanes=4"]


def lines_of(name: str) -> Callable[[Path], int]:
    """Whole lines of a file."""

    def count(out: Path) -> int:
        path = out / name
        return path.read_bytes().count(b"\n") if path.exists() else 0

    return count


def count_of(pattern: str) -> Callable[[Path], int]:
    """Files of a pattern."""
    return lambda out: len(list(out.glob(pattern)))


def parts_of_a_table(out: Path) -> int:
    """Parts that `embed` has made; they go when the table is there."""
    return -(-NUM_SCANS // ROWS_PER_PART) if (out / "f.parquet").exists() else len(list(out.glob("f.parts/0*.parquet")))


def files_of(*patterns: str) -> Callable[[Path], Content]:
    """Files by their bytes."""
    return lambda out: {str(path.relative_to(out)): _hash(path.read_bytes()) for p in patterns for path in out.glob(p)}


def trained(out: Path) -> Content:
    """Teachers, and metrics without what the clock decides."""
    found = {str(path.relative_to(out)): _tensors(path) for path in out.glob("eval/*/teacher_checkpoint.pth")}
    return found | {"metrics": _metrics(out)}


def segmented(out: Path) -> Content:
    """The network, the scores of every case, the results and the metrics."""
    results = json.loads((out / "results.json").read_text())
    assert results.pop("seconds_per_volume") > 0
    found = {
        "weights": _tensors(out / "best_model.pth"),
        "metrics": _metrics(out),
        "results": _hash(json.dumps(results).encode()),
    }
    return found | files_of("per_case.csv")(out)


def probed(out: Path) -> Content:
    """All heads, the chosen one, predictions, results."""
    heads = {name: _tensors(out / name) for name in ("checkpoint.pth", "probe.pth")}
    return heads | files_of("predictions.csv", "results.json")(out)


def _metrics(out: Path) -> str:
    rows = [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]
    return _hash(json.dumps([{k: v for k, v in row.items() if k not in TIMING} for row in rows]).encode())


def _tensors(path: Path) -> str:
    """All tensors of a file, wherever in it they are."""
    parts = (f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.contiguous().numpy().tobytes() for name, t in _walk(_load(path)))
    return _hash(b"".join(parts))


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


def _walk(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _walk(value, f"{name}.{key}")


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
