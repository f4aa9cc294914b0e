"""Lists of the paper's classification sets from generated layouts, and of anyone's table; skulls that should be gone."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dinov2.cli import main
from dinov2.data.downstream import split as splitting
from dinov2.data.downstream.lists import SPLITS, Item, read_downstream_datalist, with_tertiles
from dinov2.data.downstream.recipes import load_recipe
from dinov2.data.downstream.skull import looks_stripped, warn_of_skulls
from dinov2.errors import BadInput
from tests.conftest import BUNDLED, ROOT
from tests.unit.data.corpus.test_index import save_dicom


def script() -> Any:
    spec = importlib.util.spec_from_file_location("classification", ROOT / "scripts" / "datasets" / "classification.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lay_out_icbm(folder: Path) -> Path:
    """639 people with 1,339 scans, ages 18 to 80, in folders and a table as LONI's archive gives them."""
    rng, lines = random.Random(0), []
    scans = [1 + (i < 350) + (i < 250) + (i < 100) for i in range(639)]
    for person, count in enumerate(scans):
        age = rng.uniform(18, 80)
        for visit in range(count):
            number = f"I{10_000 + 10 * person + visit}"
            path = folder / "ICBM" / f"MNI_{person:04}" / "MPRAGE" / "2001-01-01" / number / f"ICBM_{number}.nii"
            path.parent.mkdir(parents=True)
            path.touch()
            lines.append({"Image Data ID": number, "Subject": f"MNI_{person:04}", "Sex": "F", "Age": f"{age + visit:.1f}"})
    with (folder / "ICBM.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return folder / "ICBM.csv"


def test_icbm_is_split_by_people_nearest_to_the_papers_shares(tmp_path: Path) -> None:
    table = lay_out_icbm(tmp_path)
    path, counts = script().make("ICBM", tmp_path, tmp_path, 0, table)
    content = json.loads(path.read_text())
    wanted = np.array([756, 151, 233]) * sum(counts) / 1140
    assert np.abs(np.array(counts) - wanted).max() < 1
    people = [{row["patient"] for row in content[split]} for split in SPLITS]
    assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
    assert all(20 <= row["label"] <= 60 for split in SPLITS for row in content[split])
    items = read_downstream_datalist(tmp_path, load_recipe("ICBM"))
    by_bin = Counter(item.label for part in items.values() for item in part)
    assert sorted(by_bin) == [0, 1, 2, 3]
    first = path.read_text()
    script().make("ICBM", tmp_path, tmp_path, 1, table)
    assert path.read_text() != first
    (tmp_path / content["test"][0]["image"]).unlink()
    with pytest.raises(BadInput, match="0 NIfTI files in a folder I1"):
        script().make("ICBM", tmp_path, tmp_path, 0, table)


def test_sixty_belongs_to_the_last_bin(tmp_path: Path) -> None:
    rows = [{"image": f"{age}.nii", "label": age} for age in (20, 29.9, 30, 45, 50, 60)]
    for row in rows:
        (tmp_path / row["image"]).touch()
    parts = {"shuffle_seed": 0, "training": rows[:2], "validation": rows[2:4], "test": rows[4:]}
    (tmp_path / "ICBM_cls_datalist.json").write_text(json.dumps(parts))
    items = read_downstream_datalist(tmp_path, load_recipe("ICBM"))
    assert [item.label for part in SPLITS for item in items[part]] == [0, 0, 1, 2, 3, 3]


def test_covid_ct_mds_slices_become_volumes_and_every_class_has_the_papers_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    small = {"Normal": (2, 1, 1), "COVID-19": (3, 1, 1), "Cap": (1, 1, 1)}
    monkeypatch.setattr(module, "COVID_COUNTS", small)
    voxels = np.arange(6 * 5 * 4).reshape(6, 5, 4) * 2
    for name, counts in small.items():
        for i in range(sum(counts)):
            save_dicom(tmp_path / f"{name} Cases" / f"{name[:3]}{i:03}", voxels + 10 * i, series=f"1.2.{i + 1}")
    path, counts = module.make("COVID-CT-MD", tmp_path, tmp_path / "out", 0, None)
    assert counts == [6, 3, 3]
    recipe = load_recipe("COVID-CT-MD")
    items = read_downstream_datalist(path.parent, recipe)
    of_class = {k: tuple(sum(i.label == k for i in items[s]) for s in SPLITS) for k in recipe.classes}
    assert of_class == dict(enumerate(small.values()))
    image = nib.load(tmp_path / "out" / "volumes" / "Cap002.nii.gz")
    assert image.get_data_dtype() == np.int16 and sorted(image.shape) == [4, 5, 6]
    found = np.asarray(image.dataobj)
    assert sorted(found.ravel()) == sorted((voxels + 20).ravel())
    for file in (tmp_path / "Cap Cases" / "Cap001").iterdir():
        file.unlink()
    (tmp_path / "out" / "volumes" / "Cap001.nii.gz").unlink()
    with pytest.raises(BadInput, match="Cap001: no DICOM files"):
        module.make("COVID-CT-MD", tmp_path, tmp_path / "out", 0, None)


def test_the_papers_counts_add_up() -> None:
    module = script()
    assert [sum(c[i] for c in module.COVID_COUNTS.values()) for i in range(3)] == [214, 30, 61]
    assert sum(module.ICBM_COUNTS) == 1140


def test_a_table_becomes_a_list_and_its_thirds_classes(tmp_path: Path) -> None:
    rows = [f"scans/sub-{i:02}_T1w.nii.gz,{20 + i},{'f' if i % 2 else 'm'}" for i in range(20)]
    (tmp_path / "people.csv").write_text("image,age,sex\n" + "\n".join(rows) + "\n")
    (tmp_path / "scans").mkdir()
    for row in rows:
        (tmp_path / row.split(",")[0]).touch()
    (tmp_path / "age.yaml").write_text("task: classification\nbins: tertiles\n")
    command = ["split", "--table", str(tmp_path / "people.csv"), "--label-column", "age"]
    assert main([*command, "--output", str(tmp_path / "age_cls_datalist.json")]) == 0
    recipe = with_tertiles(load_recipe(tmp_path / "age.yaml"), tmp_path)
    items = read_downstream_datalist(tmp_path, recipe)
    assert [len(items[s]) for s in SPLITS] == [14, 2, 4]
    assert sorted(Counter(i.label for i in items["training"]).values()) == [4, 5, 5]
    assert {item.patient for part in items.values() for item in part} == {f"sub-{i:02}" for i in range(20)}


@pytest.mark.parametrize("ages", [[20], [20, 30], [20, 30, 30, 30]])
def test_too_few_labels_have_no_thirds(tmp_path: Path, ages: list[int]) -> None:
    (tmp_path / "age.yaml").write_text("task: classification\nbins: tertiles\n")
    items = [{"image": f"{i}.nii", "label": age} for i, age in enumerate(ages)]
    others = [{"image": "other.nii", "label": 20}]
    content = {"shuffle_seed": 0, "training": items, "validation": others, "test": others}
    (tmp_path / "age_cls_datalist.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=f"its {len(ages)} training labels have no thirds"):
        with_tertiles(load_recipe(tmp_path / "age.yaml"), tmp_path)


def test_names_of_classes_stay_names(tmp_path: Path) -> None:
    rows = [f"{i}.nii,{'fm'[i % 2]}" for i in range(10)]
    for i in range(10):
        (tmp_path / f"{i}.nii").touch()
    (tmp_path / "t.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    assert main(["split", "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "l.json")]) == 0
    content = json.loads((tmp_path / "l.json").read_text())
    assert {row["label"] for split in SPLITS for row in content[split]} == {"f", "m"}


@pytest.mark.parametrize(
    "text, flags, expected",
    [
        ("image,age\na.nii,3\n", ["--label-column", "sex"], "has no column sex: it has image, age"),
        ("image,label\na.nii,\n", [], "line 2: label is empty"),
        ("", [], "has no rows"),
        (None, [], "give --images and --labels, or --nnunet (segmentation), or --table"),
    ],
)
def test_tables_that_cannot_be_used_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str | None, flags: list[str], expected: str
) -> None:
    (tmp_path / "t.csv").write_text(text or "")
    table = [] if text is None else ["--table", str(tmp_path / "t.csv")]
    assert main(["split", *table, "--output", str(tmp_path / "l.json"), *flags]) == 2
    assert expected in capfd.readouterr().err


def test_scans_of_one_person_stay_together_and_any_order_gives_the_same_split() -> None:
    rows = [{"case": f"{p}-{v}", "patient": p} for p in range(30) for v in range(1 + p % 3)]
    one = splitting.split_scans(rows, (6, 2, 2), 0)
    assert one == splitting.split_scans(rows[::-1], (6, 2, 2), 0) != splitting.split_scans(rows, (6, 2, 2), 1)
    assert [len(one[s]) for s in SPLITS] == [36, 12, 12]
    assert all(len({s for s in SPLITS for r in one[s] if r["patient"] == p}) == 1 for p in range(30))


def test_a_head_with_its_skull_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stripped = sorted(BUNDLED.glob("*.nii.gz"))[0]
    brain = nib.load(stripped)
    voxels = np.asarray(brain.dataobj, dtype=np.float32)
    assert looks_stripped(voxels)
    noisy = voxels + np.random.default_rng(0).rayleigh(3, voxels.shape)
    nib.save(nib.Nifti1Image(noisy.astype(np.float32), brain.affine), tmp_path / "head.nii.gz")
    with caplog.at_level(logging.WARNING):
        warn_of_skulls([Item((str(stripped),), 0, "a")], load_recipe("ICBM"))
        assert not caplog.records
        warn_of_skulls([Item((str(tmp_path / "head.nii.gz"),), 0, "a")], load_recipe("COVID-CT-MD"))
        assert not caplog.records
        warn_of_skulls([Item((str(stripped),), 0, "a"), Item((str(tmp_path / "head.nii.gz"),), 0, "b")], load_recipe("ICBM"))
    assert "head.nii.gz: does not look skull-stripped" in caplog.text


def test_tables_as_other_programs_write_them(tmp_path: Path) -> None:
    """A byte order mark, paths with backslashes, `~`."""
    (tmp_path / "scans").mkdir()
    names = [f"{i}.nii" for i in range(6)]
    for name in names:
        (tmp_path / "scans" / name).touch()
    lines = [rf"scans\{name},{i}" for i, name in enumerate(names)]
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["image,label", *lines]).encode() + b"\r\n")
    assert main(["split", "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "l.json")]) == 0
    content = json.loads((tmp_path / "l.json").read_text())
    assert sorted(row["image"] for split in SPLITS for row in content[split]) == [f"scans/{name}" for name in names]


@pytest.mark.parametrize(
    "row, expected",
    [
        ("a.nii,nan", "line 7: label is nan, no value: complete it or remove the line"),
        ("a.nii,NaN", "label is NaN, no value"),
        ("a.nii,inf", "label is inf, no value"), ("a.nii,N/A", "label is N/A, no value"),
        ("a.nii,  ", "line 7: label is empty"), ("a.nii", "line 7: label is empty"),
        ("gone.nii,1", "line 7: no such file or DICOM folder"), (r"x\gone.nii,1", "/x/gone.nii: correct it"),
    ],
)  # fmt: skip
def test_rows_without_a_value_or_a_file_are_named_while_splitting(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], row: str, expected: str
) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.nii").touch()
    (tmp_path / "t.csv").write_text("image,label\n" + "".join(f"{n}.nii,1\n" for n in "bcdef") + row + "\n")
    assert main(["split", "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "l.json")]) == 2
    said = capfd.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "l.json").exists(), said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_or_list_in_another_encoding_is_named(encoding: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_bytes("image,label\nSchädel.nii,1\n".encode(encoding))
    (tmp_path / "p.json").write_bytes('["Schädel.nii"]'.encode(encoding))
    output = ["--output", str(tmp_path / "l.json")]
    folders = ["--images", str(BUNDLED), "--labels", str(BUNDLED)]
    for command in (["--table", str(tmp_path / "t.csv")], [*folders, "--parts", str(tmp_path / "p.json")]):
        assert main(["split", *command, *output]) == 2
        assert f"{Path(command[-1]).name}: is " in (said := capfd.readouterr().err) and "save it as UTF-8" in said, said
