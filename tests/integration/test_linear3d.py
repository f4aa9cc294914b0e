"""`linear3d.py` and `dinov2 classify` as a user runs them, on small generated volumes and on real ones."""

from __future__ import annotations

import csv
import json
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dinov2.cli import main as dinov2
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput
from dinov2.eval.linear3d import main
from tests.conftest import SMALL
from tests.started import Started
from tests.unit.data.corpus import test_index

NETWORK = [w for w in SMALL if w.startswith(("student.", "crops.", "train.num_threads"))]
RECIPE = """task: classification
classes: {0: smooth, 1: grainy, 2: bright}
train: {foreground_crop: true, one_of: [affine, gamma, sharpen, smooth, noise], flip_p: 0.5, scale: 0.1, shift: 0.1}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of three textures, labels by number and by name."""
    folder = tmp_path_factory.mktemp("textures")
    rows = []
    for i in range(30):
        rng, kind = np.random.default_rng(i), i % 3
        axes = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (22, 20, 18)], indexing="ij"), -1)
        inside = np.linalg.norm(axes, axis=-1) < 0.9
        image = inside * (100 + rng.normal(0, 40 if kind == 1 else 2, inside.shape)) + rng.normal(0, 1, inside.shape) * inside
        image += 200 * (kind == 2) * (np.linalg.norm(axes, axis=-1) < 0.4)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / f"scan{i}.nii.gz")
        rows.append({"image": f"scan{i}.nii.gz", "label": kind if i % 2 else ["smooth", "grainy", "bright"][kind]})
    write_list(folder, {"training": rows[:15], "validation": rows[15:21], "test": rows[21:]})
    (folder / "textures.yaml").write_text(RECIPE)
    return folder


def write_list(folder: Path, parts: dict[str, list[dict]]) -> None:
    (folder / "textures_cls_datalist.json").write_text(json.dumps({"shuffle_seed": 0, **parts}))


def words(data: Path, out: Path, *extra: str, **flags: object) -> list[str]:
    given = {
        "pretrained-weights": "random", "output-dir": out, "dataset-name": data / "textures.yaml", "base-data-dir": data,
        "epochs": 2, "epoch-length": 10, "save-checkpoint-frequency": 1, "eval-period-iterations": 10, "image-size": 16,
        "batch-size": 6, "num-workers": 1, "cache-dir": data / "cache",
    } | {k.replace("_", "-"): v for k, v in flags.items()}  # fmt: skip
    return [*(w for k, v in given.items() for w in (f"--{k}", str(v))), *extra, "--opts", *NETWORK]


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    text = capfd.readouterr().err
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if " E " in line][-1]


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_a_probe_is_trained_chosen_tested_and_applied_to_a_scan(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2.logging.progress.PERIOD_S", 0.0)  # a line for every step
    out = tmp_path / "run"
    assert main(words(data, out, epochs=6)) == EXIT_OK
    log = (out / "log.txt").read_text()
    for words_of in ("iterations: 59 of 60", "batches of test features: 1 of 2"):
        assert re.search(rf"dinov2.logging.progress: {words_of}", log), words_of
    found = results(out)
    assert found["test_auc"] > 0.8, found
    assert found["test_auc_ci95"][0] <= found["test_auc"] <= found["test_auc_ci95"][1]
    assert np.sum(found["confusion_matrix"]) == found["n_test"] == 9 and found["n_train"] == 15
    assert len(found["test_auc_per_class"]) == 3 and found["best_head"].startswith("classifier_")
    last = found["validation"][-1]
    assert last["iteration"] == 59 and last["auc"] == max(a for a in last["auc_of_heads"] if a is not None)
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert list(rows[0]) == ["case", "label", "p_smooth", "p_grainy", "p_bright"] and len(rows) == 9
    table = tmp_path / "table.csv"
    scans = [str(data / f"{row['case']}.nii.gz") for row in rows]
    missing = str(tmp_path / "none.nii.gz")
    assert dinov2(["classify", "--probe", str(out / "probe.pth"), "--output", str(table), "--input", missing, *scans]) == 2
    said = capsys.readouterr().out
    assert "none.nii.gz: not classified" in said and said.count("smooth 0.") + said.count("smooth 1.") == 9
    for row, again in zip(rows, csv.DictReader(table.open()), strict=True):
        assert [float(again[k]) for k in list(row)[2:]] == pytest.approx([float(v) for v in list(row.values())[2:]], abs=2e-5)
    series = test_index.save_dicom(tmp_path / "series", test_index.scan())
    assert dinov2(["classify", "--probe", str(out / "probe.pth"), "--input", str(series)]) == EXIT_OK
    assert re.match(rf"{series}: (smooth|grainy|bright) \(smooth [01]\.", capsys.readouterr().out)


@pytest.mark.slow
def test_killed_it_ends_as_an_undisturbed_run(data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert main(words(data, whole, epochs=24)) == EXIT_OK
    process = Started(words(data, out, epochs=24), "dinov2.eval.linear3d")
    while process.poll() is None and not (out / "checkpoint.pth").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = torch.load(out / "checkpoint.pth", weights_only=True)["iteration"]
    assert before < 239 and not (out / "results.json").exists()
    assert main(words(data, out, epochs=24)) == EXIT_OK
    one, other = (torch.load(p / "checkpoint.pth", weights_only=True)["heads"] for p in (whole, out))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert results(whole) == results(out)
    assert (whole / "predictions.csv").read_text() == (out / "predictions.csv").read_text()


def test_seeds_have_their_own_subsets_and_a_summary(data: Path, tmp_path: Path) -> None:
    """With cached views, whose extraction does not change the heads' first iteration count or the test part."""
    flags = {"num_seeds": 2, "dataset_percent": 60, "cached_views": 2}
    assert main(words(data, tmp_path, **flags)) == EXIT_OK
    seeds = [results(tmp_path / f"seed_{s}") for s in (0, 1)]
    assert [r["seed"] for r in seeds] == [0, 1] and {r["n_train"] for r in seeds} == {9}
    together = results(tmp_path)
    assert together["by_seed"]["test_auc"] == [r["test_auc"] for r in seeds]
    assert together["test_auc"] == pytest.approx(np.mean(together["by_seed"]["test_auc"]))
    heads = [torch.load(tmp_path / f"seed_{s}" / "checkpoint.pth", weights_only=True)["heads"]["weight.0"] for s in (0, 1)]
    assert not torch.equal(*heads)


def test_fine_tuning_changes_the_backbone_and_the_probe_carries_it(data: Path, tmp_path: Path) -> None:
    rate = {"epochs": 1, "backbone_learning_rate": 1e-3}
    assert main(words(data, tmp_path, "--fine-tune", **rate)) == EXIT_OK
    probe = torch.load(tmp_path / "probe.pth", weights_only=True)
    from dinov2.configs import load_and_merge_config_3d
    from dinov2.features.setup import build_model_for_eval

    start = build_model_for_eval(load_and_merge_config_3d(None, NETWORK), "random").state_dict()
    assert not torch.equal(start["patch_embed.proj.weight"], probe["backbone"]["patch_embed.proj.weight"])
    assert not torch.equal(start["blocks.1.attn.qkv.weight"], probe["backbone"]["blocks.1.attn.qkv.weight"])


def test_a_probe_finds_its_backbone_and_carries_no_path_of_the_machine(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinov2.configs import load_and_merge_config_3d
    from dinov2.eval.probing.saved_probe import open_probe
    from dinov2.features.setup import build_model_for_eval

    weights, out = tmp_path / "Maria" / "w.pth", tmp_path / "Maria" / "runs" / "one"
    weights.parent.mkdir()
    torch.save(build_model_for_eval(load_and_merge_config_3d(None, NETWORK), "random").state_dict(), weights)
    assert main(words(data, out, epochs=1, pretrained_weights=weights)) == EXIT_OK
    for folder in ("Maria", str(tmp_path), str(data)):
        assert folder.encode() not in (out / "probe.pth").read_bytes(), folder
    image = next(data.glob("*.nii*"))
    monkeypatch.chdir(data)
    before = open_probe(out / "probe.pth")([image])
    (tmp_path / "Maria").rename(tmp_path / "Ann")  # both move together
    assert torch.equal(open_probe(tmp_path / "Ann" / "runs" / "one" / "probe.pth")([image]), before)
    (tmp_path / "Ann" / "w.pth").rename(tmp_path / "Ann" / "v.pth")
    with pytest.raises(BadInput, match="no such file"):
        open_probe(tmp_path / "Ann" / "runs" / "one" / "probe.pth")


def _pickle_with_code(path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (Path.touch, (path.with_name("harmed"),))

    path.write_bytes(pickle.dumps({"teacher": Harm()}))


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "no such file|No such file"),
    "text": (lambda p: p.write_text("weights: none\n"), "not a checkpoint"),
    "lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), "weights"),
    "code": (_pickle_with_code, "not a checkpoint of tensors that is safe"),
    "another network": (lambda p: torch.save({"teacher": {"backbone.cls_token": torch.zeros(1, 1, 8)}}, p), "backbone"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_cannot_be_used_are_one_line(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    make, expected = BAD_WEIGHTS[name]
    path = tmp_path / "w.pth"
    make(path)
    assert main(words(data, tmp_path / "out", pretrained_weights=path)) == EXIT_BAD_INPUT
    line = one_line(capfd)
    assert any(e in line for e in expected.split("|")) and str(path) in line, line
    assert not (tmp_path / "harmed").exists()


def _relabel(label: object, part: str = "validation", index: int = 0) -> Callable[[dict], None]:
    return lambda parts: parts[part][index].update(label=label)


def _without(part: str, kind: int) -> Callable[[dict], None]:
    names = (kind, ["smooth", "grainy", "bright"][kind])
    return lambda parts: parts.update({part: [row for row in parts[part] if row["label"] not in names]})


def _shared_patient(parts: dict) -> None:
    parts["training"][0]["patient"] = parts["test"][0]["patient"] = "p7"


ONE_CLASS = "task: classification\nbins: {all: [0, 3]}\n"
BAD_LISTS: dict[str, tuple[Callable[[dict], None], str]] = {
    "unknown class in validation": (_relabel("stripy"), '"stripy" is in none of'),
    "no label": (_relabel(None, "training", 3), "training 3 (scan3.nii.gz): has no label"),
    "class absent from test": (_without("test", 1), "test: none of its 6 cases is grainy"),
    "class absent from training": (_without("training", 0), "training: none of its 10 cases is smooth"),
    "one class only": (
        lambda parts: parts.update(recipe="task: classification\nbins: {all: [0, 3]}\n"),
        "one class only (all)",
    ),
    "patient in two parts": (_shared_patient, "patient p7 is in training and test"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_lists_that_cannot_be_used_are_one_line(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    change, expected = BAD_LISTS[name]
    parts = json.loads((data / "textures_cls_datalist.json").read_text())
    if name == "one class only":
        for row in (row for part in ("training", "validation", "test") for row in parts[part]):
            row["label"] = 1
    change(parts)
    (tmp_path / "textures.yaml").write_text(parts.pop("recipe", RECIPE))
    for scan in data.glob("scan*.nii.gz"):
        (tmp_path / scan.name).symlink_to(scan)
    (tmp_path / "textures_cls_datalist.json").write_text(json.dumps(parts))
    flags = {"base_data_dir": tmp_path, "dataset_name": tmp_path / "textures.yaml"}
    assert main(words(data, tmp_path / "out", **flags)) == EXIT_BAD_INPUT
    assert expected in one_line(capfd)


@pytest.mark.parametrize(
    "extra, flags, expected",
    [
        ([], {"image_size": 18}, "--image-size 18 is no multiple of the patch size 4: use [16, 20]"),
        ([], {"dataset_percent": 7}, "none of its 1 cases is"),
        ([], {"learning_rates": "-1"}, "must be positive"),
        (["--fine-tune"], {"cached_views": 2}, "leave it out with --fine-tune"),
        ([], {"model_name": "UNet"}, "UNet: has no feature for a classification"),
        ([], {"dataset_name": "BTCV"}, "segmentation3d.py"),
        ([], {"classifier_fpath": "{data}/textures.yaml"}, "not a checkpoint"),
    ],
)
def test_arguments_that_cannot_be_used_are_one_line(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], extra: list[str], flags: dict, expected: str
) -> None:
    flags = {k: str(v).format(data=data) for k, v in flags.items()}
    assert main(words(data, tmp_path / "out", *extra, **flags)) == EXIT_BAD_INPUT
    assert expected in one_line(capfd)


def test_features_that_are_not_finite_are_named(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from dinov2.configs import load_and_merge_config_3d
    from dinov2.features.setup import build_model_for_eval

    state = build_model_for_eval(load_and_merge_config_3d(None, NETWORK), "random").state_dict()
    state["norm.weight"] = torch.full_like(state["norm.weight"], 3e38)  # finite, and overflows as soon as it is used
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    assert main(words(data, tmp_path / "out", pretrained_weights=tmp_path / "w.pth")) == EXIT_BAD_INPUT
    assert "features are not finite" in one_line(capfd)


def test_another_command_in_the_same_folder_is_refused_and_no_resume_starts_anew(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words(data, tmp_path, epochs=1)) == EXIT_OK
    assert main(words(data, tmp_path, epochs=2)) == EXIT_BAD_INPUT
    assert "another epochs" in one_line(capfd)
    assert main(words(data, tmp_path, "--no-resume", epochs=2)) == EXIT_OK
    assert [v["iteration"] for v in results(tmp_path)["validation"]] == [9, 19]


def test_sex_is_probed_on_real_brains_from_their_table(local_data: Path, tmp_path: Path) -> None:
    """The whole way: table, fixed split, list, features, heads, results; no claim about the score of an untrained network."""
    table, parts = str(local_data / "brain_t1" / "participants.csv"), str(local_data / "splits.json")
    words_of_split = ["split", "--table", table, "--label-column", "sex", "--parts", parts, "--parts-key", "brain_t1"]
    assert dinov2([*words_of_split, "--output", str(tmp_path / "sex_cls_datalist.json")]) == EXIT_OK
    recipe = tmp_path / "sex.yaml"
    recipe.write_text("task: classification\nclasses: {0: f, 1: m}\ntrain: {foreground_crop: true, flip_p: 0.5}\n")
    flags = {"dataset_name": recipe, "base_data_dir": tmp_path, "cache_dir": tmp_path / "cache", "cached_views": 1}
    assert main(words(tmp_path, tmp_path / "out", image_size=32, **flags)) == EXIT_OK
    found = results(tmp_path / "out")
    assert (found["n_train"], found["n_test"]) == (31, 11) and 0 <= found["test_auc"] <= 1
    assert len(list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))) == 11
