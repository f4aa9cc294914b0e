"""What the demo encoder's frozen features can do, beside untrained networks and the voxels themselves: numbers and pictures.

    python scripts/results/demo_encoder.py DATA_FOLDER OUTPUT_FOLDER [--weights FILE]

Two measures, of `dinov2/eval/measures`: the dense read-out of hippocampus labels, and region retrieval across brains.
`DATA_FOLDER` is as in `scripts/local_datalist.py`, with `hippocampus` and `brain_t1`.
Writes `demo_encoder.json`, `dense_readout.png` and `region_retrieval.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dinov2 import load_encoder
from dinov2.errors import BadInput
from dinov2.eval.measures.dense_readout import LabelledCrops, ceiling, random_crops, raw_features, read_out
from dinov2.eval.measures.region_retrieval import median_errors, places_of
from dinov2.eval.metrics.statistics import bootstrap_interval
from dinov2.features.features import patch_features
from dinov2.features.scans import load_scan
from dinov2.features.setup import build_model_for_eval
from dinov2.models import DinoVisionTransformer3d

matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

UNTRAINED_SEEDS = (0, 1, 2)
CROP_VOX = (24, 32, 24)
CROPS_PER_SCAN = 8
LABELLED = (1, 5, 20, 145)
NUM_CLASSES = 3
REGION_VOX, ASK_VOX, SEARCH_VOX = 16, 8, 5  # 32 mm crops every 16 and 10 mm in scans of 2 mm
COLOURS = {
    "trained": "tab:blue",
    "untrained": "tab:orange",
    "raw patch": "tab:gray",
    "patch with neighbours and place": "tab:brown",
    "raw voxels": "tab:gray",
    "voxel means of 2": "tab:gray",
    "voxel means of 4": "tab:gray",
}

Extract = Callable[[Tensor], Tensor]
PerCase = dict[str, list[np.ndarray]]  # by features, of each seed a value a case


def hippocampus_crops(data: Path, splits: dict) -> dict[str, list[LabelledCrops]]:
    """Crops of each scan; the training part's order is the file's."""
    crops = {}
    for number, part in enumerate(("training", "validation", "test")):
        names = splits["hippocampus"][part]
        folder = data / "hippocampus"
        crops[part] = [
            random_crops(folder / "images" / n, folder / "labels" / n, CROP_VOX, CROPS_PER_SCAN, (number, i))
            for i, n in enumerate(tqdm(names, f"hippocampus {part}", disable=None))
        ]
    return crops


def crop_features(backbone: DinoVisionTransformer3d, windows: Tensor) -> dict[str, Tensor]:
    """What a crop can be found by, [N, F] each: the last block's class token, the mean of its patch tokens, and all patch
    tokens in their order (as raw voxels are compared), of the last and of the first block."""
    depth = len(backbone.block_list)
    with torch.inference_mode():
        parts = [backbone.get_intermediate_layers(part, depth, return_class_token=True) for part in windows.split(256)]
    first, _ = (torch.cat(found) for found in zip(*(blocks[0] for blocks in parts), strict=True))  # [N, L, E]
    last, cls = (torch.cat(found) for found in zip(*(blocks[-1] for blocks in parts), strict=True))
    return {
        "class token": cls,
        "mean patch": last.mean(1),
        "all patches": last.flatten(1),
        "all patches, first block": first.flatten(1),
    }


def dense(networks: dict[str, list[DinoVisionTransformer3d]], data: Path, splits: dict) -> tuple[dict[int, PerCase], float]:
    """Test Dice by the number of labelled scans, and the ceiling of the patch size."""
    crops = hippocampus_crops(data, splits)
    p = networks["trained"][0].patch_size
    extractors: dict[str, list[Extract]] = {
        name: [lambda w, net=net: patch_features(net, w) for net in nets] for name, nets in networks.items()
    }
    extractors["raw patch"] = [lambda w: raw_features(w, p)[..., : p**3]]
    extractors["patch with neighbours and place"] = [lambda w: raw_features(w, p)]
    found: dict[int, PerCase] = {n: {name: [] for name in extractors} for n in LABELLED}
    for name, functions in extractors.items():
        for extract in tqdm(functions, f"read-out {name}", disable=None):
            for n, values in read_out(extract, crops, LABELLED, p, NUM_CLASSES).items():
                found[n][name].append(np.array(values))
    return found, float(np.nanmean(ceiling(crops["test"], p, NUM_CLASSES)))


def retrieval(networks: dict[str, list[DinoVisionTransformer3d]], data: Path, names: list[str]) -> dict[str, PerCase]:
    """Median error (mm) of each brain, where the asking brain is as it is, and where it is turned with another contrast."""
    scans = [load_scan([data / "brain_t1" / "images" / name]) for name in names]
    searched = [places_of(scan, REGION_VOX, SEARCH_VOX) for scan in scans]
    asking = {
        "as they lie": [places_of(scan, REGION_VOX, ASK_VOX) for scan in scans],
        "turned": [places_of(scan, REGION_VOX, ASK_VOX, np.random.default_rng(i)) for i, scan in enumerate(scans)],
    }
    errors: dict[str, PerCase] = {way: {} for way in asking}

    def score(name: str, extract: Callable[[Tensor], dict[str, Tensor]]) -> None:
        found = [extract(p.windows) for p in searched]
        for way, places in asking.items():
            asked = [extract(p.windows) for p in places]
            for kind in found[0]:
                values = median_errors(places, [f[kind] for f in asked], searched, [f[kind] for f in found])
                errors[way].setdefault(f"{name}{kind}", []).append(np.array(values))

    for name, nets in networks.items():
        for net in tqdm(nets, f"retrieval {name}", disable=None):
            score(f"{name}, ", lambda w, net=net: crop_features(net, w))
    score("", lambda w: {"raw voxels": w.flatten(1), **{f"voxel means of {n}": F.avg_pool3d(w, n).flatten(1) for n in (2, 4)}})
    return errors


def summary(values: PerCase) -> dict:
    """Means over cases (and seeds), and paired differences trained - other with 95 % intervals over cases."""
    mean = {name: np.mean(v, axis=0) for name, v in values.items()}  # [cases]
    rows = {
        name: {"mean": float(np.nanmean(m)), "by_seed": [float(np.nanmean(v)) for v in values[name]]}
        for name, m in mean.items()
    }
    for name in (n for n in values if n.startswith("trained")):
        for other in (
            n for n in values if n == name.replace("trained", "untrained") or not (n.startswith(("trained", "untrained")))
        ):
            gain = mean[name] - mean[other]
            (interval,) = bootstrap_interval(lambda r, g=gain: [np.nanmean(g[r])], [str(i) for i in range(len(gain))])
            rows[f"{name} - {other}"] = {"mean": float(np.nanmean(gain)), "interval": interval}
    return rows


def draw_dense(found: dict[int, PerCase], top: float, path: Path) -> None:
    figure = Figure(figsize=(5.4, 4), layout="constrained")
    axis = figure.subplots()
    names = {"trained": "demo encoder", "untrained": "same network, untrained (3 seeds)"}
    for name in found[LABELLED[0]]:
        label = names.get(name, name)
        means = [np.nanmean(found[n][name]) for n in LABELLED]
        axis.plot(LABELLED, means, "o-", color=COLOURS[name], label=label)
        for one in zip(*[[np.nanmean(v) for v in found[n][name]] for n in LABELLED], strict=True):
            axis.plot(LABELLED, one, ".", color=COLOURS[name], alpha=0.5)
    axis.axhline(top, color="black", ls=":", lw=1)
    axis.text(LABELLED[0], top + 0.01, "ceiling of patches of 4 mm", fontsize=8)
    axis.set(xscale="log", xlabel="labelled scans", ylabel="Dice of both labels, 40 held-out scans", ylim=(0, 0.95))
    axis.set_xticks(LABELLED, LABELLED)
    axis.minorticks_off()
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def draw_retrieval(errors: dict[str, PerCase], path: Path) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, len(errors), sharey=True)
    for axis, (way, found) in zip(axes, errors.items(), strict=True):
        kinds = list(dict.fromkeys(name.split(", ", 1)[-1] for name in found))
        for name, values in found.items():
            whose, kind = name.split(", ", 1) if ", " in name else (name, name)
            x = kinds.index(kind) + {"trained": -0.2, "untrained": 0.2}.get(whose, 0.0)
            mean = np.mean(values, axis=0)
            axis.bar(x, mean.mean(), 0.38, color=COLOURS[whose], alpha=0.8)
            axis.plot(x + np.linspace(-0.12, 0.12, len(mean)), mean, "k.", ms=3)
            axis.text(x, 0.5, f"{mean.mean():.1f}", ha="center", color="white", weight="bold", fontsize=8)
        axis.set_xticks(range(len(kinds)), [kind.replace(", ", "\n").replace(" ", "\n", 1) for kind in kinds], fontsize=8)
        axis.set_title(f"the asking brain: {'as it lies' if way == 'as they lie' else 'turned, other contrast'}", fontsize=9)
    axes[0].set_ylabel("median distance from the same place, mm")
    names = {"trained": "demo encoder", "untrained": "same network, untrained (3 seeds)", "raw voxels": "voxels"}
    bars = [Patch(color=COLOURS[key], alpha=0.8, label=name) for key, name in names.items()]
    figure.legend(handles=bars, frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--weights", default="demo")
    args = parser.parse_args()
    try:
        encoder = load_encoder(args.weights, device="cpu")
        splits = json.loads((args.data_folder / "splits.json").read_text())
    except (BadInput, OSError, ValueError) as err:
        print(err, file=sys.stderr)
        return 2
    untrained = [build_model_for_eval(encoder.config, "random", seed=seed) for seed in UNTRAINED_SEEDS]
    networks = {"trained": [encoder.backbone], "untrained": untrained}
    args.output.mkdir(parents=True, exist_ok=True)
    regions = retrieval(networks, args.data_folder, splits["brain_t1"]["test"])
    draw_retrieval(regions, args.output / "region_retrieval.png")
    shares, top = dense(networks, args.data_folder, splits)
    draw_dense(shares, top, args.output / "dense_readout.png")
    results = {
        "weights": encoder.fingerprint(),
        "region_retrieval_median_mm": {way: summary(errors) for way, errors in regions.items()},
        "dense_readout_dice": {n: summary(values) for n, values in shares.items()},
        "dense_readout_ceiling": top,
    }
    (args.output / "demo_encoder.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
