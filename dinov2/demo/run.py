"""The quick start from end to end: features -> the same place -> a labelled read-out -> a training of one's own."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from dinov2.configs import load_and_merge_config_3d
from dinov2.data import Datalist, write_datalist
from dinov2.data.cache.store import VolumeStore
from dinov2.data.corpus.index.command import IndexRequest, index
from dinov2.data.datalist import Entry, read_datalist
from dinov2.data.pool import default_workers
from dinov2.demo import readout
from dinov2.demo.generate import QUARTERS, generate, write_list
from dinov2.demo.killed import same_weights, train_and_kill
from dinov2.demo.same_place import FAR_MM, SCANS, Asked, Finder, ask, by_tokens, by_voxels, errors_mm
from dinov2.errors import EXIT_NOT_SHOWN, EXIT_OK, EXIT_RESUMABLE, BadInput, BadVolume
from dinov2.eval.visualize import Request, visualize
from dinov2.features.encoder import Encoder, load_encoder
from dinov2.files import read_json, write_json
from dinov2.logging import Say, read_metrics, setup_logging
from dinov2.logging.folder import locked_folder, refuse_another_programs_run
from dinov2.report.command import report
from dinov2.streams import Kind, stream
from dinov2.train import train3d
from dinov2.visual.figures.training import draw_bars, draw_found
from dinov2.visual.planes import plane

logger = logging.getLogger(__name__)

CONFIG = "pretrain/demo"
ENCODER = "demo"
MADE_MM = 2.0  # spacing of made volumes
NUM_MADE = max(readout.LABELLED) + readout.NUM_VALIDATION + readout.NUM_TEST
UNTRAINED_SEED = 100
HELD_OUT_SHARE = 0.1
NUM_PLACES = 60  # of each head, that are looked for in the other
DRAWN = (0.25, 0.5, 0.9)  # of the places of one head: those at these shares of the first way's errors
_CORONAL = 1
Found = dict[str, list[np.ndarray]]  # places [N, 3] in mm by name, of each direction


def run_demo(output: Path, data: Path | None, seed: int, overrides: list[str], say: Say) -> int:
    """Run the quick start; a second call in the same folder continues the first.

    Args:
        output: Gets everything.
        data: The user's own folder of volumes in any format that is read: features of one of them and a training on the rest;
            None: two heads that come with the package, and made ones.
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
        return (
            run_on_folder(output, data, encoder, seed, overrides, say)
            if data
            else run_on_own(output, encoder, seed, overrides, say)
        )


def run_on_own(output: Path, encoder: Encoder, seed: int, overrides: list[str], say: Say) -> int:
    """All of it, on two real heads and on made ones."""
    say("1/5  features of two heads that the encoder was not trained on")
    show(encoder, SCANS, output / "features", say)
    say("2/5  the same place in both: points of each looked for in the other")
    untrained = load_encoder("random", device="cpu", config=encoder.config, seed=UNTRAINED_SEED)
    heads = [encoder.load([path]) for path in SCANS]
    pairs = [ask(one, other, stream(seed, Kind.SAMPLE, i), NUM_PLACES) for i, (one, other) in enumerate((heads, heads[::-1]))]
    finders: dict[str, Finder] = {"demo encoder": by_tokens(encoder, heads), "untrained": by_tokens(untrained, heads)}
    found = {name: [find(asked) for asked in pairs] for name, find in (finders | {"voxels": by_voxels}).items()}
    draw_places(pairs, found, output / "places.png", say)
    say(f"3/5  {', '.join(QUARTERS.values())}: where in the brain a patch lies, read by a linear map, on {NUM_MADE} made heads")
    made = list(islice(generate(output / "data", NUM_MADE, 1, seed, MADE_MM), NUM_MADE))
    networks = {"demo encoder": encoder.backbone, "untrained": untrained.backbone}
    scores = readout.measure(networks, made, encoder.patch_size, seed)
    draw_bars(scores, "Dice of the quarters", output / "readout.png")
    say("\n".join(readout.summary(scores)) + f"\n     picture: {output / 'readout.png'}")
    seen = made[: -readout.NUM_TEST]
    write_list(output / "list.json", seen)
    teacher, cfg, code = train_small(output, seed, overrides, say, "4/5")
    if code != EXIT_OK:
        return code
    is_same = kill_and_compare(output, seed, overrides, cfg, say)
    trained = by_tokens(load_encoder(teacher, device="cpu"), heads)
    start = by_tokens(load_encoder("random", device="cpu", config=cfg, seed=cfg.train.seed), heads)
    found |= {"before the training": [start(asked) for asked in pairs], "after it": [trained(asked) for asked in pairs]}
    say_places(pairs, {name: found[name] for name in ("before the training", "after it")}, say)
    say("     It shows that all works and that something is learned. Good features take hours, not minutes.")
    results: dict[str, Any] = {
        "same_place_mm": {name: np.concatenate(distances(pairs, places)).tolist() for name, places in found.items()},
        "quarters_dice": {str(n): of for n, of in scores.items()},
        "killed_run_is_the_same": is_same,
    }
    finish(output, results, say, "5/5")
    if not is_same:
        say("exit code 1: that a killed training goes on to the same weights was not seen (above): please report this")
    return EXIT_OK if is_same else EXIT_NOT_SHOWN


def run_on_folder(output: Path, data: Path, encoder: Encoder, seed: int, overrides: list[str], say: Say) -> int:
    """Features of a volume that is held out, and a training on the others."""
    held_out = list_folder(data, output, say)
    if held_out is None:
        return EXIT_RESUMABLE
    say("1/3  features of a volume that is held out")
    show(encoder, [Path(held_out.image)], output / "features", say, held_out.axes)
    *_, code = train_small(output, seed, overrides, say, "2/3")
    if code == EXIT_OK:
        finish(output, {}, say, "3/3")
    return code


def show(encoder: Encoder, scans: Sequence[Path], folder: Path, say: Say, axes: str | None = None) -> None:
    """PCA of patch tokens in the scans' own proportions, NIfTI beside it, and the page to click in."""
    request = Request(tuple((path,) for path in scans), "pca", folder, mode="sliding_window", axes=axes, viewer=True)
    visualize(request, encoder, partial(_indented, say))
    say(
        f"     open {folder / 'viewer.html'} in a browser: click a place, see what looks like it"
        + " in both" * (len(scans) > 1)
    )


def _indented(say: Say, line: str) -> None:
    say(f"     {line}")


def distances(pairs: list[Asked], places: list[np.ndarray]) -> list[np.ndarray]:
    return [errors_mm(asked, found) for asked, found in zip(pairs, places, strict=True)]


def say_places(pairs: list[Asked], found: Found, say: Say) -> None:
    """How far off each way to find a place is: the median, and how often it was another part of the head."""
    count = sum(len(asked.rows) for asked in pairs)
    say(f"     {count} places, error in mm{'':>6}median{'':>6}beyond {FAR_MM:.0f} mm")
    for name, places in found.items():
        errors = np.concatenate(distances(pairs, places))
        say(f"     {name:>22}{np.median(errors):>15.1f}{(errors > FAR_MM).mean():>15.0%}")


def draw_places(pairs: list[Asked], found: Found, path: Path, say: Say) -> None:
    """Places that are found well, middling and badly, side by side."""
    say_places(pairs, found, say)
    asked, rows = pairs[0], []
    grey = {scan.name: (scan.data[0].numpy() + 1) / 2 for scan in (asked.one, asked.other)}
    errors = {name: errors_mm(asked, places[0]) for name, places in found.items()}
    order = np.argsort(next(iter(errors.values())))
    for k in (order[round(share * (len(order) - 1))] for share in DRAWN):
        row = [("asked", plane(grey[asked.one.name], asked.one.affine, _CORONAL, asked.places_mm[k], True))]
        for name, places in found.items():
            title = f"{name}: {errors[name][k]:.0f} mm off"
            row.append((title, plane(grey[asked.other.name], asked.other.affine, _CORONAL, places[0][k], True)))
        rows.append(row)
    draw_found(rows, path)
    say(f"     picture: {path}")


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


def train_arguments(output: Path, run: Path, seed: int, overrides: list[str]) -> tuple[list[str], DictConfig]:
    """The words of `dinov2 train`, and the configuration that they make."""
    words = [f"train.dataset_path={output / 'list.json'}", f"train.seed={seed}", *overrides]
    arguments = ["--config-file", CONFIG, "--output-dir", str(run), "--cache-dir", str(output / "cache"), *words]
    return arguments, load_and_merge_config_3d(CONFIG, words)


def teacher_of(run: Path, iteration: int) -> Path:
    return run / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"


def train_small(output: Path, seed: int, overrides: list[str], say: Say, step: str) -> tuple[Path, DictConfig, int]:
    """Train with the command that a user would type; returns the teacher's file, the configuration and the exit code."""
    arguments, cfg = train_arguments(output, output / "run", seed, overrides)
    steps = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    say(f"{step}  training for {steps} steps:\n       dinov2 train {shlex.join(arguments)}")
    code = train3d.main(arguments)
    setup_logging()
    return teacher_of(output / "run", steps - 1), cfg, code


def kill_and_compare(output: Path, seed: int, overrides: list[str], cfg: DictConfig, say: Say) -> bool | None:
    """The first part of the training again, killed on the way and started again: are the weights the same?

    None where that could not be shown, with the reason said: what comes after it is not lost.
    """
    again, at = output / "run_killed", cfg.evaluation.eval_period_iterations - 1
    arguments, _ = train_arguments(output, again, seed, overrides)
    say(f"     the same once more, killed (kill -9) after iteration {cfg.train.checkpoint_period} and started again: {again}")
    try:
        was_killed = train_and_kill(arguments, again, cfg.train.checkpoint_period, teacher_of(again, at))
    except BadInput as err:
        say(f"     this could not be shown: {err}")
        return None
    is_same = same_weights(teacher_of(output / "run", at), teacher_of(again, at))
    how = "after the kill" if was_killed else "(it had ended before it could be killed)"
    say(f"     weights of iteration {at} {how}: {'the same, bit for bit' if is_same else 'NOT the same'}")
    return is_same


def finish(output: Path, results: dict[str, Any], say: Say, step: str) -> None:
    """Numbers, the training's page, and what to type next."""
    rows = read_metrics(output / "run" / "training_metrics.json")
    write_json(output / "results.json", {**results, "last_metrics": rows[-1]})
    say(f"{step}  the training's page: losses, crops, features over its course; all numbers: {output / 'results.json'}")
    report(output / "run", None, None, True, partial(_indented, say))
    say(
        "next, with scans of your own:\n"
        "       source .venv/bin/activate\n"
        "       dinov2 visualize SCAN --weights demo --viewer --output PICTURES\n"
        "       dinov2 index FOLDER --output list.json --report report.html\n"
        "       dinov2 train --config-file pretrain/tiny_cpu --output-dir out train.dataset_path=list.json"
    )
