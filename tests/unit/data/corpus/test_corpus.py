"""Curation, the overlap guard and the report."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from dinov2.checkpointer.export import export
from dinov2.checkpointer.saving import save_atomically
from dinov2.cli import main
from dinov2.data import read_datalist, write_datalist
from dinov2.data.corpus.curation import curate
from dinov2.data.corpus.overlap import seen_in, warn_of_overlap
from dinov2.train.build import data_record
from tests.unit.data.corpus.test_index import save_nifti, scan

Item = dict[str, Any]


def entries(dataset: str, count: int, slices: int, modality: str = "MR", patients: int = 0) -> list[Item]:
    """Volumes of a set with a depth each; patient i % patients."""
    made = []
    for i in range(count):
        name = f"{dataset}/{i:06d}.nii.gz"
        sha = hashlib.md5(name.encode()).hexdigest()
        item = {"image": name, "shape": [64, 64, slices], "dataset": dataset, "modality": modality, "sha": sha}
        made.append(item | ({"patient": f"{dataset}-{i % patients}"} if patients else {}))
    return made


def run_curate(tmp_path: Path, items: list[Item], rules: str | Path, explain: bool = False) -> tuple[list[Item], str]:
    lines: list[str] = []
    (tmp_path / "all.json").write_text(json.dumps(items))
    curate(tmp_path / "all.json", rules, tmp_path / "kept.json", explain, lines.append)
    return json.loads((tmp_path / "kept.json").read_text()), "\n".join(lines)


# ---------------------------------------------------------------------- curation


@pytest.mark.slow
def test_the_papers_rules_on_100000_entries_give_the_counts_of_a_hand(tmp_path: Path) -> None:
    items = [
        *entries("fastMRI knee", 20_000, 30, patients=5_000),  # half: 10,000
        *entries("fastMRI-knee-thin", 1_000, 24),  # 24 is not above 24: none
        *entries("RSNA_ICH", 18_001, 32, "CT"),  # half, rounded to even: 9,000
        *entries("NLST", 30_000, 150, "CT", patients=6_000),  # 500 patients of 5: 2,500
        *entries("4D-Lung", 2_000, 50, "CT", patients=20),  # 20 patients of 100: 30 to 40 each
        *entries("4D-Lung ", 100, 50, "CT", patients=4),  # another spelling of the same set; 4 ids of 20, 25 each
        *entries("ADNI", 28_000, 166),  # all
        *entries("brain PET", 566, 60, "PET"),  # all
        *[{**e, "label_map": True} for e in entries("masks", 333, 100)],  # none
    ]
    assert len(items) == 100_000
    random.Random(1).shuffle(items)
    start = time.process_time()
    kept, said = run_curate(tmp_path, items, "pretrain/curation/paper", explain=True)
    assert time.process_time() - start < 20  # about 3 s on one core
    counts = Counter(e["dataset"].strip() for e in kept)
    lung = counts.pop("4D-Lung")
    assert counts == {"fastMRI knee": 10_000, "RSNA_ICH": 9_000, "NLST": 2_500, "ADNI": 28_000, "brain PET": 566}
    per_patient = Counter(e["patient"] for e in kept if e["dataset"] == "4D-Lung")
    assert len(per_patient) == 20 and all(30 <= n <= 40 for n in per_patient.values()) and len(set(per_patient.values())) > 3
    assert lung == sum(Counter(e["patient"] for e in kept if "4D-Lung" in e["dataset"]).values())
    assert len({e["patient"] for e in kept if e["dataset"] == "NLST"}) == 500
    assert "half of RSNA-ICH" in said and "6 of 35 data sets are here" in said
    again, _ = run_curate(tmp_path, items[::-1], "pretrain/curation/paper")
    assert {e["image"] for e in again} == {e["image"] for e in kept}  # whatever the order of the list
    assert [e["image"] for e in again] == [e["image"] for e in kept][::-1]


def test_a_seed_draws_other_volumes_and_expected_numbers_are_compared(tmp_path: Path) -> None:
    kept = []
    for seed in (0, 1):
        rules = {
            "seed": seed,
            "rules": [{"name": "half", "keep_share": 0.5}],
            "expected": {"total": 50, "modality": {"MR": 51}},
        }
        (tmp_path / "rules.yaml").write_text(json.dumps(rules))
        items, said = run_curate(tmp_path, entries("A", 60, 30) + entries("B", 40, 30), tmp_path / "rules.yaml", True)
        assert Counter(e["dataset"] for e in items) == {"A": 30, "B": 20}  # half of each set
        kept.append({e["image"] for e in items})
        assert re.search(r"volumes +50 found, 50 expected\n", said) and re.search(r"MR +50 found, 51 expected: differs", said)
    assert 30 < len(kept[0] | kept[1]) != 50


@pytest.mark.parametrize(
    "rules, words",
    [
        ("rules: [{name: a, keep_shares: 0.5}]", "unknown key 'keep_shares' (did you mean 'keep_share'?)"),
        ("rules: [{name: a, keep_share: 1.5}]", "keep_share must be a share within (0, 1]"),
        ("rules: [{name: a, keep_share: 0.5, slices_above: 3}]", "needs a name and one of"),
        ("rules: [{name: a, volumes_per_patient: [40, 30]}]", "must be [fewest, most]"),
        ("rules: [{name: a, keep_patients: 3}]", "60 of its 60 volumes have no patient"),
        ("rules: [{name: a, slices_above: 64}]", "leave none of its 60 volumes"),
        ("rules: 3", "expected `rules:`"),
        ("rules: [{", "not a readable YAML file"),
    ],
)
def test_a_rule_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rules: str, words: str
) -> None:
    (tmp_path / "rules.yaml").write_text(rules)
    (tmp_path / "all.json").write_text(json.dumps(entries("A", 60, 30)))
    arguments = [str(tmp_path / "all.json"), "--rules", str(tmp_path / "rules.yaml"), "--output", str(tmp_path / "o.json")]
    assert main(["curate", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not (tmp_path / "o.json").exists()


# ---------------------------------------------------------------------- overlap


def indexed(folder: Path, output: Path, *flags: str) -> Path:
    assert main(["index", str(folder), "--output", str(output), "--workers", "0", *flags]) == 0
    return output


def test_lists_that_share_scans_or_patients_are_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_nifti(tmp_path / "a" / "sub-1_T1w.nii.gz", scan(1))
    save_nifti(tmp_path / "a" / "sub-2_T1w.nii.gz", scan(2))
    save_nifti(tmp_path / "b" / "renamed.nii", scan(1)[::-1])  # the same scan, otherwise stored
    save_nifti(tmp_path / "b" / "sub-2_T2w.nii.gz", scan(3))  # another scan of the same patient
    save_nifti(tmp_path / "b" / "sub-3_T1w.nii.gz", scan(4))
    for folder in "ab":
        (tmp_path / folder / "dataset_description.json").write_text('{"Name": "Study"}')
    a, b = (indexed(tmp_path / f, tmp_path / f"{f}.json") for f in "ab")
    assert main(["overlap", str(b), str(a)]) == 2
    said = capsys.readouterr().out
    assert "same scan: " + str(tmp_path / "b" / "renamed.nii") in said
    assert "same patient: " + str(tmp_path / "b" / "sub-2_T2w.nii.gz") in said and "sub-3" not in said
    plain = [{"image": e.image, "shape": list(e.shape)} for e in read_datalist(a).entries]
    write_datalist(tmp_path / "plain.json", plain)  # no hashes: the files are read
    assert main(["overlap", str(tmp_path / "plain.json"), str(b)]) == 2
    assert "1 of 2 volumes" in capsys.readouterr().out
    (tmp_path / "c.json").write_text(json.dumps(entries("other", 5, 30)))
    assert main(["overlap", str(a), str(tmp_path / "c.json")]) == 0


def test_weights_carry_what_they_saw_and_evaluations_are_warned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_config: Any
) -> None:
    for seed in range(4):
        save_nifti(tmp_path / "train" / f"sub-{seed}.nii.gz", scan(seed))
    save_nifti(tmp_path / "test" / "seen.nii.gz", scan(2))
    save_nifti(tmp_path / "test" / "new.nii.gz", scan(9))
    train = read_datalist(indexed(tmp_path / "train", tmp_path / "train.json"))
    test = read_datalist(indexed(tmp_path / "test", tmp_path / "test.json"))
    weights, earlier = tmp_path / "teacher_checkpoint.pth", tmp_path / "earlier.pth"
    teacher = {"backbone.x": torch.zeros(3)}
    save_atomically({"teacher": teacher, "meta": data_record(train, small_config())}, weights)
    shared = warn_of_overlap(test.entries, weights)
    assert [Path(e.image).name for e in shared.scans] == [
        "seen.nii.gz"
    ] and "1 of 2 test scans were pretrained on" in capsys.readouterr().err
    export(weights, tmp_path / "w.safetensors", None, True)  # it goes along into the other form
    assert len(warn_of_overlap(test.entries, tmp_path / "w.safetensors").scans) == 1
    weights.rename(earlier)  # a run that starts from these weights has seen their scans too
    other = read_datalist(indexed(tmp_path / "test", tmp_path / "new.json", "--pattern", "{patient}"))
    record = data_record(other, small_config(f"student.pretrained_weights={earlier}"))
    assert set(record["trained_on"]["scans"]) == seen_in(train.entries).scans | seen_in(other.entries).scans
    save_atomically({"teacher": teacher, "meta": {}}, weights)
    assert warn_of_overlap(test.entries, weights) is None and "does not say what it was trained on" in capsys.readouterr().err
    assert main(["overlap", str(tmp_path / "test.json"), str(earlier)]) == 2


# ---------------------------------------------------------------------- report


class Page(HTMLParser):
    """What a page refers to, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "xmlns")
        ]

    def handle_data(self, data: str) -> None:
        self.words += data + "|"


def test_the_report_stands_alone_and_names_no_patient(tmp_path: Path) -> None:
    folder = tmp_path / "Ward 7" / "<b>Study"
    for seed in range(3):
        save_nifti(folder / f"sub-Smith{seed}_T1w.nii.gz", scan(seed))
    save_nifti(folder / "sub-Jones_ct.nii.gz", scan(5))
    save_nifti(folder / "sub-Jones_mask.nii.gz", (scan(5) > 400).astype("u1"))
    (folder / "sub-Brown_T1w.nii.gz").write_bytes(bytes(900))
    save_nifti(folder / "sub-White_T1w.nii.gz", scan(6)[:, :, :4])
    page_file = tmp_path / "report.html"
    indexed(folder, tmp_path / "list.json", "--report", str(page_file), "--keep-ids")
    text = page_file.read_text()
    page = Page(text)
    assert len(page.references) == 5 and all(r.startswith("data:image/png;base64,") for r in page.references)
    assert not page.tags & {"script", "link", "iframe", "b>study"} and not re.search(r"https?:|url\(|@import", text)
    for name in ("Smith", "Jones", "Brown", "White", "Ward 7", "sub-", str(tmp_path)):
        assert name not in text, name
    for words in ("|5|volumes|", "|MR |3|", "|CT |1|", "|label maps |1|", "|unreadable|", "|small_axis|", "|<b>Study|5|"):
        assert words in page.words, words
    picture = imread(io.BytesIO(base64.b64decode(page.references[0].split(",")[1])))
    assert picture.shape[:2] == (round(150 * 12 * 1.25 / 15), round(150 * 14 * 0.75 / 15))  # in its true proportions
    assert np.ptp(picture[..., 0]) > 0.4


def test_a_report_of_nothing_listed_is_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.nii").write_bytes(b"")
    words = ["--output", str(tmp_path / "list.json"), "--workers", "0", "--report", str(tmp_path / "r.html")]
    assert main(["index", str(tmp_path / "data"), *words]) == 2
    assert "|0|volumes|" in Page((tmp_path / "r.html").read_text()).words
