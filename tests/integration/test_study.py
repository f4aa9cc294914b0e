"""A study of real runs, very small: both programs, their results in one table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from dinov2.cli import main
from dinov2.errors import EXIT_OK
from tests.integration import test_linear3d, test_segmentation3d

balls, textures = test_segmentation3d.data, test_linear3d.data  # fixtures


@pytest.mark.slow
def test_a_study_of_both_programs_ends_in_its_tables_and_is_not_run_again(
    balls: Path, textures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = {"balls": test_segmentation3d.NETWORK, "textures": test_linear3d.NETWORK}
    opts = {name: ", ".join(f'"{word}"' for word in network) for name, network in networks.items()}
    study = tmp_path / "study.yaml"
    study.write_text(
        f"output_dir: {tmp_path / 'out'}\nnum_workers: 0\n"
        f"budget: {{epochs: 1, epoch_length: 4, eval_iters: 4, image_size: 16}}\n"
        f"datasets:\n  balls: {{recipe: {balls}/balls.yaml, base_data_dir: {balls}, percents: [50],"
        f" budget: {{batch_size: 1, warmup_iters: 1, flags: {{opts: [{opts['balls']}]}}}}}}\n"
        f"  textures: {{recipe: {textures}/textures.yaml, base_data_dir: {textures}, percents: [80],"
        f" budget: {{batch_size: 4, flags: {{cached-views: 1, opts: [{opts['textures']}]}}}}}}\n"
        "methods: {3DINO: {weights: random}}\n"
    )
    assert main(["study", "run", str(study), "--jobs", "2"]) == EXIT_OK, logs(tmp_path)
    runs = {(r["dataset"], r["class"], r["metric"]): r for r in read(tmp_path / "out" / "runs.csv")}
    assert runs[("balls", "mean", "dice")]["n_train"] == "3" and runs[("textures", "mean", "auc")]["n_train"] == "12"
    items = read(tmp_path / "out" / "items.csv")
    own = read(tmp_path / "out" / "cells" / "balls" / "3DINO" / "50" / "0" / "per_case.csv")
    dice = {(r["case"], r["class"]): r["value"] for r in items if r["metric"] == "dice" and r["class"] != "mean"}
    assert {k: float(v) if v else None for k, v in dice.items()} == {
        (r["case"], r["class"]): float(r["dice"]) if r["dice"] else None for r in own
    }
    capsys.readouterr()
    begun = logs(tmp_path)
    assert main(["study", "run", str(study)]) == EXIT_OK and logs(tmp_path) == begun
    assert main(["study", "status", str(study)]) == EXIT_OK and "study: 2 finished" in capsys.readouterr().out
    assert main(["study", "report", str(study), "--predictions"]) == EXIT_OK and "balls" in capsys.readouterr().out
    panels = read(tmp_path / "out" / "figures" / "panels_balls.csv")  # of cases that the cell's own network segmented again
    assert {(r["row"].split(" (")[0], r["dice"]) for r in panels} == {
        (r["case"], r["value"]) for r in items if r["metric"] == "dice" and r["class"] == "mean"
    }


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.rglob("cell.log")))
