"""Scans at another spacing, and scans unlike those that an encoder was trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from monai.data import MetaTensor
from omegaconf import DictConfig

from dinov2 import Encoder, load_encoder
from dinov2.checkpointer.domain import DOMAIN, Domain
from dinov2.checkpointer.export import describe
from dinov2.checkpointer.saving import save_atomically
from dinov2.checkpointer.teacher import read_meta
from dinov2.cli import main
from dinov2.data import Entry, read_datalist, write_datalist
from dinov2.data.corpus.domain import domain_of
from dinov2.data.datalist import Datalist
from dinov2.data.preprocess import INT16_SCALE
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval.crossval.tables import read_embeddings
from dinov2.eval.probing.embedding_probe import EmbeddingProbe, save_embedding_probe
from dinov2.features.retrieval.command import RetrieveRequest, embedded
from dinov2.features.retrieval.table import FeatureTable
from dinov2.features.scans import Scan
from dinov2.features.setup import build_model_for_eval
from dinov2.features.spacing import resampled, spacing_of
from dinov2.train.build import data_record

TURN = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])


@pytest.fixture
def encoder(small_config: Callable[..., DictConfig]) -> Encoder:
    cfg = small_config("student.pos_encoding=rope", "student.init=xavier")
    brains = Domain(90, (1.0, 1.0, 2.0), (1.0, 1.0, 2.0), {"MR": 90}, {"brain": 90})
    return Encoder(build_model_for_eval(cfg, "random", Runtime(torch.device("cpu"))), domain=brains)


def scan_of(values: np.ndarray, spacing: tuple[float, float, float]) -> Scan:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TURN @ np.diag(spacing), (7.0, -20.0, 11.0)
    return Scan("a.nii", np.rint(values / INT16_SCALE).astype(np.int16)[None], affine)


@pytest.mark.parametrize("wanted", [(2.0, 2.0, 2.0), (0.8, 0.8, 3.0), (3.1, 1.0, 7.0)])
def test_a_resampled_voxel_has_the_value_of_its_place_in_the_world(wanted: tuple[float, float, float]) -> None:
    """Of a ramp in mm, which every symmetric filter keeps: an affine that is off by part of a voxel would show."""
    slope, old = np.array([0.006, -0.009, 0.004]), (1.0, 1.2, 3.0)
    index = np.stack(np.meshgrid(*map(np.arange, (41, 30, 23)), indexing="ij"), -1)
    blank = scan_of(np.zeros(index.shape[:3]), old)
    ramp = lambda scan, at: (at @ scan.affine[:3, :3].T + scan.affine[:3, 3] - blank.affine[:3, 3]) @ slope  # noqa: E731
    found = resampled(scan_of(ramp(blank, index), old), wanted)
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), wanted)
    new = np.stack(np.meshgrid(*map(np.arange, found.voxels.shape[1:]), indexing="ij"), -1)
    margin = tuple(slice(1 + int(o / w), -1 - int(o / w)) for o, w in zip(old, wanted, strict=True))
    inner = found.data[0].numpy()[margin]
    assert inner.size > 50
    np.testing.assert_allclose(inner, ramp(found, new)[margin], atol=1e-4)
    middle = lambda scan: scan.affine[:3] @ [*((n - 1) / 2 for n in scan.voxels.shape[1:]), 1]  # noqa: E731
    np.testing.assert_allclose(middle(found), middle(blank))
    assert resampled(found, wanted) is found and resampled(found, None) is found


def test_structure_finer_than_the_new_voxels_is_averaged_and_not_folded_over() -> None:
    stripes = np.where(np.arange(64) % 2, 0.8, -0.8)[:, None, None] * np.ones((1, 8, 8))
    found = resampled(scan_of(stripes, (1, 1, 1)), (2.9, 1, 1)).data[0]
    assert found.shape == (22, 8, 8) and found[1:-1].abs().max() < 0.05  # picked or linear: up to 0.8
    even = resampled(scan_of(np.full((9, 8, 7), 0.25), (1, 1, 1)), (2.9, 0.7, 30)).data
    assert even.shape == (1, 3, 11, 1)
    torch.testing.assert_close(even, torch.full_like(even, 0.25), atol=1e-4, rtol=0)


def test_a_scan_is_shown_at_the_spacing_asked_for_from_a_file_or_a_tensor_and_native_is_as_before(
    encoder: Encoder, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    nib.save(
        nib.Nifti1Image(rng.normal(size=(12, 10, 14)).astype(np.float32) + 9, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "a.nii"
    )
    path = str(tmp_path / "a.nii")
    native, fine = encoder(path), encoder(path, spacing=1)
    assert torch.equal(encoder(path, spacing="native").patch, native.patch)
    scan = encoder.load([path])
    assert list(fine.patch.shape[1:4]) == [-(-2 * n // 4) for n in scan.voxels.shape[1:]]
    np.testing.assert_allclose(fine.affine[:3, :3].norm(dim=0), [4, 4, 4])
    bare = encoder(MetaTensor(scan.data, affine=torch.from_numpy(scan.affine)), spacing=(1, 1, 1))
    torch.testing.assert_close(bare.patch, fine.patch, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bare.affine, fine.affine)
    with pytest.raises(BadInput, match="no spacing to start from"):
        encoder(scan.data, spacing=1)
    for wrong in ("1,2", "a", 0, -1, float("nan"), [1, 2], True):
        with pytest.raises(BadInput, match="give native"):
            encoder(path, spacing=wrong)
    with pytest.raises(BadInput, match="larger spacing"):
        encoder(path, spacing=0.001)


def test_a_scan_unlike_those_of_the_training_is_said_once_for_each_way(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def show(spacing: float, mode: str = "full_image", **extra: str) -> list[str]:
        rng = np.random.default_rng(1)
        image = nib.Nifti1Image(rng.normal(size=(9, 9, 9)).astype(np.float32), np.diag([spacing] * 3 + [1.0]))
        nib.save(image, tmp_path / "ct.nii")
        caplog.clear()
        encoder(Entry(str(tmp_path / "ct.nii"), (9, 9, 9), extra=extra), mode=mode)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    assert show(1.5, modality="T1w", organ="Brain") == show(2.05) == show(2.5, mode="resize") == []
    [said] = show(2.5, modality="CT", organ="brain")
    assert "2.5 mm CT of the brain through an encoder of 1-2 mm MR of the brain: another modality and spacing than" in said
    assert "--spacing 1)" in said and show(3.0, modality="PET") == []
    [said] = show(3.0, modality="CT", organ="chest")
    assert "another organ than" in said


def test_weights_carry_what_their_list_says_of_its_scans_and_no_more(
    tmp_path: Path, small_config: Callable[..., DictConfig]
) -> None:
    items = [
        {"image": f"/secret/{i}.nii", "shape": [9, 9, 9], "spacing": [4, 1, 1 + i / 10], "patient": "Ann"} for i in range(3)
    ]
    items = [{**item, "modality": "t2w" if i else "CT", **({"organ": "Liver"} if i else {})} for i, item in enumerate(items)]
    items.append({"image": "d.npy", "shape": [9, 9, 9]})
    write_datalist(tmp_path / "list.json", items)
    entries = read_datalist(tmp_path / "list.json").entries
    found = domain_of(entries)
    assert found.in_slice_mm == pytest.approx((1.001, 1.05, 1.099)) and found.across_mm == (4, 4, 4)
    assert (found.num_scans, found.modalities, found.organs) == (4, {"MR": 2, "CT": 1}, {"liver": 2})
    assert found.outside((1.0, 4.0), "PET", "brain") == []  # one scan in four does not say its modality, two their organ
    start = tmp_path / "start.pth"
    save_atomically({"teacher": {"a": torch.zeros(1)}, "meta": data_record(Datalist(entries, "0", ""), small_config())}, start)
    text = json.dumps(read_meta(start)[DOMAIN])
    assert "secret" not in text and "Ann" not in text and len(text) < 400
    assert Domain.of_meta(read_meta(start)[DOMAIN], "w") == found
    assert describe(start)[-3:] == [
        "  trained on 4 scans: 1-1.1 x 4 mm MR, CT of the liver",
        "    modalities: MR 2, CT 1",
        "    organs: liver 2",
    ]
    more = Datalist([Entry("e.nii", (9, 9, 9), (0.5, 0.5, 0.5), extra={"modality": "PET"})], "1", "")
    both = Domain.of_meta(data_record(more, small_config(f"student.pretrained_weights={start}"))[DOMAIN], "w")
    assert both is not None and both.num_scans == 5 and both.modalities == {"MR": 2, "CT": 1, "PET": 1}
    assert both.in_slice_mm == (0.5, found.in_slice_mm[1], found.in_slice_mm[2]) and both.across_mm == (0.5, 4, 4)
    for wrong in (
        {},
        {**found.as_meta(), "spacing_mm": {"in_slice": [1, 2], "across": None}},
        [1],
        {**found.as_meta(), "organs": 3},
    ):
        with pytest.raises(BadInput, match="cannot be read"):
            Domain.of_meta(wrong, "w")


def test_the_demo_says_what_it_was_trained_on() -> None:
    domain = load_encoder("demo", "cpu").domain
    assert domain is not None and domain.words() == "1-2 mm MR of the brain" and domain.num_scans == 90


def test_a_table_keeps_its_spacing_and_retrieval_and_probes_show_new_scans_at_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    items = []
    for i in range(2):
        path = tmp_path / f"{i}.nii"
        nib.save(nib.Nifti1Image(rng.integers(0, 900, (9, 10, 11)).astype(np.int16), np.diag([2.0, 2.0, 2.0, 1.0])), path)
        items.append({"image": str(path), "shape": [9, 10, 11], "spacing": [2, 2, 2]})
    write_datalist(tmp_path / "list.json", items)
    out = tmp_path / "f.parquet"
    command = [
        "embed",
        str(tmp_path / "list.json"),
        "--weights",
        "demo",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--output",
        str(out),
    ]
    assert main([*command, "--spacing", "1.5,1.5,3"]) == 0
    encoder, path = load_encoder("demo", "cpu"), items[0]["image"]
    wanted = encoder(path, spacing=(1.5, 1.5, 3)).cls[0]
    np.testing.assert_array_equal(pq.read_table(out)["cls"][0].as_py(), wanted)
    assert not torch.equal(wanted, encoder(path).cls[0])
    assert main(command) == 2  # another spacing is another table
    query = embedded(FeatureTable(out), RetrieveRequest(out, path, tmp_path / "hits.html", device="cpu"))[1]
    assert torch.equal(query.cls[0], wanted)
    table = read_embeddings(out)
    assert spacing_of(table.view["spacing"]) == (1.5, 1.5, 3)
    meta = {"target": "x", "classes": [], "parts": ["cls"], "view": table.view, "network": table.network, "weights": "demo"}
    save_embedding_probe(tmp_path / "p.pth", np.eye(1, 96), np.zeros(1), {**meta, "dtype": "fp32", "config": None})
    probe = EmbeddingProbe(tmp_path / "p.pth", torch.load(tmp_path / "p.pth", weights_only=True))
    assert probe([path])[0] == pytest.approx(float(wanted[0]), abs=1e-6)
    out.unlink()
    assert main(command) == 0 and "spacing" not in read_embeddings(out).view
