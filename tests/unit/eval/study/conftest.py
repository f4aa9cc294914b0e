"""A study of two small labelled sets whose cells are run by `standin.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dinov2.eval.study.schema import Study, load_study

STANDIN = (sys.executable, str(Path(__file__).with_name("standin.py")))
STUDY = """base_data_dir: {data}
output_dir: {out}
seeds: [0, 1]
datasets:
  balls: {{recipe: {data}/balls.yaml, percents: [25, 100]}}
  ages: {{recipe: {data}/ages.yaml, percents: [100]}}
budget: {{batch_size: 2, epochs: 3, epoch_length: 4, disk_gib: 0.001}}
methods:
  3DINO: {{weights: random, head: Linear}}
  Random:
"""


def write_list(path: Path, counts: tuple[int, int, int], label: Callable[[int], object]) -> None:
    """A list of empty files, which no stand-in opens."""
    parts, number = {}, 0
    for part, count in zip(("training", "validation", "test"), counts, strict=True):
        parts[part] = []
        for _ in range(count):
            image = path.parent / f"{path.name.split('_')[0]}{number}.nii.gz"
            image.touch()
            parts[part].append({"image": image.name, "label": label(number), "case": f"case{number}" + "x" * (number % 4)})
            number += 1
    path.write_text(json.dumps({"shuffle_seed": 0, **parts}))


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    return make_study(tmp_path)


def make_study(folder: Path) -> Path:
    """Twelve cells: two methods, two seeds, one set with two percents and one with one; the data beside the file."""
    data = folder / "data"
    data.mkdir()
    (data / "balls.yaml").write_text("task: segmentation\nclasses: {0: background, 1: ball}\n")
    (data / "ages.yaml").write_text("task: classification\nclasses: {0: low, 1: high}\n")
    (data / "label.nii.gz").touch()
    write_list(data / "balls_100_datalist.json", (8, 2, 3), lambda _: "label.nii.gz")
    write_list(data / "ages_cls_datalist.json", (6, 4, 5), lambda i: i % 2)
    path = folder / "small.yaml"
    path.write_text(STUDY.format(data=data, out=folder / "out"))
    return path


@pytest.fixture
def study(study_file: Path) -> Study:
    return load_study(study_file)
