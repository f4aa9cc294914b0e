"""The demo recipe measured while it learns: kNN, a linear probe, a read-out and retrieval beside its losses.

    python scripts/results/online.py DATA_FOLDER OUTPUT_FOLDER [key=value ...]
    python scripts/results/online.py DATA_FOLDER OUTPUT_FOLDER [key=value ...] --weights WEIGHTS ...

`DATA_FOLDER` is as in `scripts/local_datalist.py`, with `hippocampus` and `brain_t1`. Trained on: the training parts of both
(of hippocampus 85 of its 145 scans); measured on people that are in neither: the other 60 and the validation scans of
hippocampus, the validation people of brain_t1. Classes are made of the brains: from which of eight places, moved at random by
up to 10 mm along each axis, is a cube of 32 mm? Start it again to continue. Writes `course.png` and `course.md`.
With `--weights` nothing is trained: these (a file, `demo`, `random`) are measured by the same tasks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dinov2.configs import load_and_merge_config_3d
from dinov2.data import read_datalist, write_datalist
from dinov2.data.downstream.lists import write_downstream_datalist
from dinov2.data.volumes.opening import describe
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_OK, EXIT_RESUMABLE
from dinov2.eval.online.tasks import open_tasks
from dinov2.features.scans import load_scan
from dinov2.features.setup import build_model_for_eval
from dinov2.files import write_text
from dinov2.logging import read_metrics
from dinov2.logging.metrics import EVALUATION_FILE, METRICS_FILE
from dinov2.run.train import pretrain
from dinov2.visual.figures.training import draw_course

RECIPE = "pretrain/demo_weights"
NUM_TRAINED = 85  # hippocampus scans
CUBE_VOX, MOVED_VOX = 16, 5  # at 2 mm
PERIOD = 100
TASKS = {"knn": "places", "linear": "places", "readout": "MSD-Hippocampus", "retrieval": "places"}


def make_lists(data: Path, out: Path) -> None:
    """The pretraining list, and the labelled ones with their recipes."""
    splits = json.loads((data / "splits.json").read_text())
    named = splits["hippocampus"]["training"]
    hippocampus = {
        "training": named[:NUM_TRAINED],
        "validation": named[NUM_TRAINED:] + splits["hippocampus"]["validation"],
        "test": splits["hippocampus"]["test"],
    }
    brains = splits["brain_t1"]
    trained = [data / "hippocampus" / "images" / name for name in hippocampus["training"]]
    trained += [data / "brain_t1" / "images" / name for name in brains["training"]]
    write_datalist(out / "list.json", [describe(path.absolute()) for path in trained])
    labelled = {
        part: [{key: data / "hippocampus" / f"{key}s" / name for key in ("image", "label")} for name in names]
        for part, names in hippocampus.items()
    }
    write_downstream_datalist(out / "MSD-Hippocampus_100_datalist.json", labelled, 0)
    cubes = {part: cut_cubes(data, out / "cubes", names, part) for part, names in brains.items()}
    write_downstream_datalist(out / "places_cls_datalist.json", cubes, 0)
    classes = ", ".join(f"{k}: place{k}" for k in range(8))
    write_text(out / "places.yaml", f"task: classification\nclasses: {{{classes}}}\n")
    whole = {
        part: [{"image": data / "brain_t1" / "images" / name, "label": 0} for name in names] for part, names in brains.items()
    }
    write_downstream_datalist(out / "brains_cls_datalist.json", whole, 0)
    write_text(out / "brains.yaml", "task: classification\nclasses: {0: brain, 1: none}\n")


def cut_cubes(data: Path, folder: Path, names: list[str], part: str) -> list[dict]:
    """Eight cubes of each brain: about 0.3 and 0.7 of its box along each axis."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, name in enumerate(names):
        values = load_scan([data / "brain_t1" / "images" / name]).data[0].numpy()
        rng = np.random.default_rng([number, len(part)])
        for place in range(8):
            shares = [0.7 if place >> axis & 1 else 0.3 for axis in range(3)]
            centre = np.array(shares) * values.shape + rng.uniform(-MOVED_VOX, MOVED_VOX, 3)
            start = np.clip(np.round(centre - CUBE_VOX / 2).astype(int), 0, np.array(values.shape) - CUBE_VOX)
            cube = values[tuple(slice(a, a + CUBE_VOX) for a in start)]
            path = folder / f"{name.removesuffix('.nii.gz')}_{place}.nii"
            nib.save(nib.Nifti1Image(np.round((cube + 1) * 500).astype(np.int16), np.diag([2.0, 2.0, 2.0, 1.0])), path)
            rows.append({"image": path.absolute(), "label": place, "patient": name})
    return rows


def words(out: Path) -> list[str]:
    """What the run is told beside its recipe."""
    lists = {"places": str(out / "places.yaml"), "MSD-Hippocampus": "MSD-Hippocampus", "brains": str(out / "brains.yaml")}
    chosen = {**TASKS, "retrieval": "brains"}
    tasks = [f'{{kind: {kind}, dataset: "{lists[name]}", base_data_dir: "{out}"}}' for kind, name in chosen.items()]
    online = [f"evaluation.tasks=[{', '.join(tasks)}]", f"evaluation.tasks_period_iterations={PERIOD}"]
    return [*online, "train.keep_best=readout-MSD-Hippocampus/dice", f"train.dataset_path={out / 'list.json'}"]


def table(rows: list[dict], is_higher_better: dict[str, bool]) -> str:
    """A row a metric: untrained, at the end, and when some gain, half and nine tenths of it were there for good."""
    head = "| metric | untrained | at the end | best | above untrained from | half of the gain from | nine tenths from |"
    lines = [head, "| --- " * 7 + "|"]
    for name, is_higher in is_higher_better.items():
        values, steps = np.array([row[name] for row in rows]), [row["iteration"] for row in rows]
        sign = 1 if is_higher else -1
        gained = sign * (values - values[0])
        whole = gained[-3:].mean()  # a single measurement is noisy
        since = []
        for share in (0.0, 0.5, 0.9):
            short = np.flatnonzero(gained <= share * whole)
            at = short[-1] + 1 if len(short) else 0
            since.append(f"step {steps[at] + 1}" if whole > 0 and at < len(steps) else "never")
        best = values.max() if sign > 0 else values.min()
        lines.append(f"| {name} | {values[0]:.3f} | {values[-1]:.3f} | {best:.3f} | {' | '.join(since)} |")
    return "\n".join(lines) + "\n"


def measure(weights: list[str], cfg: DictConfig, out: Path) -> None:
    """Print what the tasks say of finished networks, a line each."""
    evaluators = open_tasks(cfg, read_datalist(cfg.train.dataset_path), out)
    for source in weights:
        backbone = build_model_for_eval(cfg, source, Runtime(torch.device("cpu")))
        row = {
            f"{one.name}/{name}": round(value, 3) for one in evaluators for name, value in one(backbone, lambda: None).items()
        }
        print(json.dumps({"weights": source, **row}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--weights", nargs="+", help="measure these instead")
    args = parser.parse_args()
    out = args.output.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "brains.yaml").exists():  # the last that is made
        make_lists(args.data_folder.absolute(), out)
    run, given = out / "run", [*words(out), *args.overrides]
    if args.weights:
        measure(args.weights, load_and_merge_config_3d(RECIPE, [*given, f"train.cache_dir={out / 'cache'}"]), out)
        return EXIT_OK
    where = ["--output-dir", str(run), "--cache-dir", str(out / "cache")]
    code = pretrain.main(["--config-file", RECIPE, *where, *given])
    if code in (EXIT_OK, EXIT_RESUMABLE):  # of a stopped one as far as it came
        cfg = load_and_merge_config_3d(RECIPE, given)
        rows, training = (read_metrics(run / name) for name in (EVALUATION_FILE, METRICS_FILE))
        prototypes = (cfg.dino.head_n_prototypes, cfg.ibot.head_n_prototypes)
        is_higher_better = {name: "median_mm" not in name for name in rows[0] if name != "iteration"}
        draw_course(training, rows, is_higher_better, prototypes, out / "course.png")
        write_text(out / "course.md", table(rows, is_higher_better))
    return code


if __name__ == "__main__":
    sys.exit(main())
