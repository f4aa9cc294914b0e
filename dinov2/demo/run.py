"""The quick start from end to end: volumes -> list -> training -> read-out -> pictures -> numbers."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dinov2.configs import load_and_merge_config_3d
from dinov2.data import Datalist, write_datalist
from dinov2.data.cache.store import VolumeStore
from dinov2.data.corpus.index.command import IndexRequest, index
from dinov2.data.datalist import Entry, read_datalist
from dinov2.data.pool import default_workers
from dinov2.demo.generate import TISSUES, Case, generate, write_list
from dinov2.demo.readout import labelled_crops, read_out
from dinov2.errors import EXIT_OK, EXIT_RESUMABLE, BadInput, BadVolume
from dinov2.eval.measures.dense_readout import raw_features
from dinov2.features.encoder import load_encoder
from dinov2.features.features import patch_features, volume_features
from dinov2.features.setup import build_model_for_eval
from dinov2.files import read_json, write_json
from dinov2.logging import Say, read_metrics, setup_logging
from dinov2.logging.folder import locked_folder, refuse_another_programs_run
from dinov2.models import Backbone
from dinov2.streams import Kind, stream
from dinov2.train import train3d
from dinov2.visual.cases import draw_patches, pca_colours
from dinov2.visual.figures import draw_bars, draw_curves

logger = logging.getLogger(__name__)

CONFIG = "pretrain/demo"
NUM_TRAIN, NUM_TEST, SCANS = 8, 4, 2  # subjects, and volumes of each
LABELLED = (1, 5)  # volumes that the read-out learns from
UNTRAINED_SEEDS = (100, 101, 102)
HELD_OUT_SHARE = 0.1
SHIFT, WINDOW = 2, 16  # voxels between two colours of a PCA picture, and a window's edge
ENCODER = "demo"


def run_demo(output: Path, data: Path | None, seed: int, overrides: list[str], say: Say) -> int:
    """Run the quick start; a second call in the same folder continues the first.

    Args:
        output: Gets everything.
        data: The user's own folder of volumes in any format that is read; None makes labelled ones.
        seed: Of the volumes and of the training.
        overrides: `key=value` of the training.
        say: Prints a line of output.

    Raises:
        BadInput: The folder holds fewer than two usable volumes, or the output folder cannot be written.
    """
    if not (output / "list.json").exists():  # a folder of the quick start's own has one
        refuse_another_programs_run(output)
    with locked_folder(output):
        encoder = load_encoder(ENCODER, device="cpu")
        if data is None:
            cases = generate(output / "data", NUM_TEST + NUM_TRAIN, SCANS, seed)
            first = next(cases)  # of a person who is held out
            show_encoder(encoder.backbone, Entry(str(first.image), (1, 1, 1)), output, say)
            say(f"2/5  making {(NUM_TEST + NUM_TRAIN) * SCANS} labelled brain volumes in {output / 'data'}")
            made = [first, *cases]
            test, train = made[: NUM_TEST * SCANS], made[NUM_TEST * SCANS :]
            write_list(output / "list.json", train)
            picture = Entry(str(first.image), (1, 1, 1))
        else:
            train, test = [], []
            held_out = list_folder(data, output, say)
            if held_out is None:
                return EXIT_RESUMABLE
            picture = held_out
            show_encoder(encoder.backbone, picture, output, say)
        teacher, cfg, code = train_small(output, seed, overrides, say)
        if code != EXIT_OK:
            return code
        trained = build_model_for_eval(cfg, teacher)
        scores = {} if data is not None else measure(cfg, encoder.backbone, trained, train, test, seed, say)
        draw(output, cfg, trained, picture, scores, say)
    return EXIT_OK


def show_encoder(backbone: Backbone, picture: Entry, output: Path, say: Say) -> None:
    """Draw what the demo encoder, which comes trained, makes of a volume."""
    say(f"1/5  features of an unseen volume by the encoder that comes with the package: {output / 'features.png'}")
    volume = VolumeStore([picture], 0).get(0, stream(0, Kind.SAMPLE, 0)).data
    draw_patches(volume[0].numpy(), {"demo encoder": colours(backbone, volume)}, SHIFT, output / "features.png")


def colours(backbone: Backbone, volume: Tensor) -> np.ndarray:
    """[h, w, d, 3] of a volume [1, H, W, D], a cell every SHIFT voxels."""
    features = volume_features(backbone, volume, WINDOW, SHIFT)
    return pca_colours(features.numpy(), _foreground(volume[0], features.shape[:3]).numpy())


def list_folder(folder: Path, output: Path, say: Say) -> Entry | None:
    """Write the datalist of a folder's volumes but the held-out ones and label maps; returns one held out, for the picture.

    None where it was stopped.
    """
    if not folder.is_dir():
        raise BadInput(f"--data {folder}: no such folder")
    request = IndexRequest(output / "found.json", num_workers=default_workers())
    if index([folder], request, say) != EXIT_OK:
        return None
    for row in read_json(request.quarantine_path):
        logger.warning("left out: %s: %s", row["path"], row["detail"])
    found = read_json(request.output)
    entries = [e for e in read_datalist(request.output).entries if not e.extra.get("label_map")] if found else []
    if len(entries) < 2:
        raise BadInput(f"--data {folder}: {len(entries)} usable volumes below it, at least 2 are needed")
    items = [e.as_item() for e in entries]
    num_held_out = max(1, round(len(items) * HELD_OUT_SHARE))
    held_out, kept = items[-num_held_out:], items[:-num_held_out]
    write_datalist(output / "list.json", kept)
    write_datalist(output / "held_out.json", held_out)
    say(f"{len(kept)} volumes of {folder} to train on, {num_held_out} held out")
    return first_usable(read_datalist(output / "held_out.json"), read_datalist(output / "list.json"))


def first_usable(*lists: Datalist) -> Entry:
    """The first entry that loads, held-out ones first."""
    for entry in (e for datalist in lists for e in datalist.entries):
        try:
            VolumeStore([entry], 0).get(0, stream(0, Kind.SAMPLE, 0))
        except BadVolume as err:
            logger.warning("left out: %s", err)
        else:
            return entry
    raise BadInput(f"{lists[0].path}: none of the volumes can be used")


def train_small(output: Path, seed: int, overrides: list[str], say: Say) -> tuple[Path, DictConfig, int]:
    """Train with the command that a user would type; returns the teacher's file, the configuration and the exit code."""
    words = [f"train.dataset_path={output / 'list.json'}", f"train.seed={seed}", *overrides]
    arguments = ["--config-file", CONFIG, "--output-dir", str(output / "run"), "--cache-dir", str(output / "cache"), *words]
    cfg = load_and_merge_config_3d(CONFIG, words)
    steps = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    say(f"3/5  training for {steps} steps:\n       dinov2 train {shlex.join(arguments)}")
    code = train3d.main(arguments)
    setup_logging()
    return output / "run" / "eval" / f"training_{steps - 1}" / "teacher_checkpoint.pth", cfg, code


def measure(
    cfg: DictConfig,
    demo: Backbone,
    trained: Backbone,
    train: list[Case],
    test: list[Case],
    seed: int,
    say: Say,
) -> dict[int, dict[str, list[float]]]:
    """The frozen tissue read-out: agreement per held-out volume, by number of labelled volumes and by features."""
    say(f"4/5  reading {', '.join(TISSUES.values())} from frozen patch features, {len(test)} volumes of unseen subjects")
    p = cfg.student.patch_size
    one_per_subject = train[::SCANS]
    learn = [labelled_crops(c, p, seed) for c in one_per_subject[: max(LABELLED)]]
    check = [labelled_crops(c, p, seed + 1) for c in test]
    untrained = [build_model_for_eval(cfg, "random", seed=s) for s in UNTRAINED_SEEDS]
    extractors: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "demo encoder": [partial(patch_features, demo)],
        "trained": [partial(patch_features, trained)],
        "untrained": [partial(patch_features, net) for net in untrained],
        "raw patch": [partial(raw_features, patch_size=p)],
    }
    scores: dict[int, dict[str, list[float]]] = {n: {name: [] for name in extractors} for n in LABELLED}
    for name, functions in extractors.items():
        for extract in functions:
            features = [(extract(c.windows), c.shares) for c in learn]
            checks = [(extract(c.windows), c.shares) for c in check]
            for n in LABELLED:
                scores[n][name] += read_out(features[:n], checks)
    return scores


def draw(
    output: Path,
    cfg: DictConfig,
    trained: Backbone,
    picture: Entry,
    scores: dict[int, dict[str, list[float]]],
    say: Say,
) -> None:
    """Write the pictures and the numbers, and say where they are and what they show."""
    say("5/5  drawing")
    rows = read_metrics(output / "run" / "training_metrics.json")
    draw_curves(rows, (cfg.dino.head_n_prototypes, cfg.ibot.head_n_prototypes), output / "curves.png")
    volume = VolumeStore([picture], 0).get(0, stream(0, Kind.SAMPLE, 0)).data
    networks = {"before training": build_model_for_eval(cfg, "random"), "after training": trained}
    maps = {name: colours(net, volume) for name, net in networks.items()}
    draw_patches(volume[0].numpy(), maps, SHIFT, output / "pca.png")
    results = {"tissue_share_correlation": {str(n): s for n, s in scores.items()}, "last_metrics": rows[-1]}
    write_json(output / "results.json", results)
    if scores:
        draw_bars(scores, "correlation with the true tissue shares", output / "readout.png")
        say("\n" + "\n".join(summary(scores)))
    say(f"\npictures: {output / 'curves.png'}, {output / 'pca.png'}" + (f", {output / 'readout.png'}" if scores else ""))
    say(f"weights:  {output / 'run' / 'eval'}; everything else the run recorded is beside them")


def _foreground(volume: Tensor, grid: torch.Size) -> Tensor:
    """[h, w, d] bool: cells whose voxels are mostly brighter than the background."""
    padding = [x for n, g in zip(reversed(volume.shape), reversed(grid), strict=True) for x in (0, g * SHIFT - n)]
    padded = torch.nn.functional.pad((volume > -0.98).float(), padding)
    return torch.nn.functional.avg_pool3d(padded[None, None], SHIFT)[0, 0] > 0.5


def summary(scores: dict[int, dict[str, list[float]]]) -> list[str]:
    """The read-out as a table, and in words whether training helped."""
    names = list(next(iter(scores.values())))
    lines = [
        "correlation of predicted with true shares of CSF, grey and white matter per patch, unseen subjects",
        f"{'labelled volumes':>18}",
    ]
    lines[1] += "".join(f"{name:>14}" for name in names)
    for n, by_name in scores.items():
        lines.append(f"{n:>18}" + "".join(f"{np.mean(by_name[name]):>14.3f}" for name in names))
    for n, by_name in scores.items():
        for name, words in {"demo encoder": "the demo encoder", "trained": "the short training"}.items():
            gains = {other: np.mean(by_name[name]) - np.mean(by_name[other]) for other in ("untrained", "raw patch")}
            said = [f"{'beats' if g > 0 else 'does NOT beat'} {other} by {g:+.3f}" for other, g in gains.items()]
            lines.append(f"with {n} labelled: {words} {', '.join(said)}")
    return lines
