"""Features of scans from a frozen network: the same numbers whatever form a scan comes in, and each in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dinov2 import Encoder, load_encoder
from dinov2.data import Entry
from dinov2.data.cache.store import load_volume
from dinov2.data.preprocess import PREPROCESSING
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput, BadVolume
from dinov2.features.setup import build_model_for_eval
from tests.conftest import BUNDLED, ROOT

SCAN = BUNDLED / "sub-01_T1w_2mm.nii.gz"
OTHER = BUNDLED / "sub-03_T1w_2mm.nii.gz"


@pytest.fixture
def encoder(small_config: Callable[..., DictConfig]) -> Encoder:
    """A small untrained network with rotary positions, patches of 4, crops of 16."""
    cfg = small_config("student.pos_encoding=rope", "student.init=xavier")
    return Encoder(build_model_for_eval(cfg, "random", Runtime(torch.device("cpu"))))


def test_a_file_is_prepared_as_in_pretraining_and_padded_at_the_far_ends(encoder: Encoder) -> None:
    volume = load_volume(Entry(str(SCAN), ()), 0).data  # [1, H, W, D]
    padded = torch.full((1, 1, *[-(-n // 4) * 4 for n in volume.shape[1:]]), -1.0)
    padded[0, :, : volume.shape[1], : volume.shape[2], : volume.shape[3]] = volume
    wanted = encoder.backbone(padded, is_training=True)
    found = encoder(str(SCAN), layers=2)
    grid = [n // 4 for n in padded.shape[2:]]
    assert found.cls.shape == found.pooled.shape == (1, 24) and found.patch.shape == (1, *grid, 48)
    torch.testing.assert_close(found.cls, wanted["x_norm_clstoken"])
    torch.testing.assert_close(found.patch[..., 24:].flatten(1, 3), wanted["x_norm_patchtokens"])
    torch.testing.assert_close(found.pooled, wanted["x_norm_patchtokens"].mean(1))
    torch.testing.assert_close(encoder(volume[None]).patch, found.patch[..., 24:])
    torch.testing.assert_close(encoder(volume.numpy()).cls, found.cls)


@pytest.mark.parametrize("mode", ["full_image", "resize", "sliding_window"])
def test_the_affine_puts_every_patch_at_its_place_in_the_world(encoder: Encoder, tmp_path: Path, mode: str) -> None:
    """A bright block of one patch, in a volume whose slice axis is stored first, obliquely and with a margin."""
    voxels = np.zeros((20, 36, 28), np.float32)
    voxels[2:18, 5:33, 3:27] = 50.0
    voxels[6:10, 13:17, 15:19] = 1000.0  # stored axes; a whole patch after the margin is cut off (2, 5, 3)
    turn = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([3.0, 1.0, 1.0])
    affine[:3, 3] = [7.0, -20.0, 11.0]
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "a.nii")
    found = encoder(tmp_path / "a.nii", mode=mode, size=16, overlap=0.0)
    scan = encoder.load([tmp_path / "a.nii"])
    assert scan.voxels.shape == (1, 28, 24, 16)  # the axis of 3 mm last
    centre = affine @ [7.5, 14.5, 16.5, 1.0]
    index = torch.linalg.solve(found.affine, torch.tensor(centre, dtype=torch.float64))[:3]
    step = (4, 4, 4) if mode != "resize" else (28 / 4, 24 / 4, 16 / 4)
    expected = [(start + 2) / s - 0.5 for start, s in zip((8, 12, 4), step, strict=True)]
    np.testing.assert_allclose(index, expected, atol=1e-6)
    if mode == "full_image":  # and that patch is the one that changes when the block is gone
        x = scan.data[None].clone()
        x[0, 0, 8:12, 12:16, 4:8] = x[0, 0, 0, 0, 0]
        change = (encoder.backbone.patch_embed(x) - encoder.backbone.patch_embed(scan.data[None])).abs().sum(-1)
        assert change.reshape(found.patch.shape[:4]).nonzero().tolist() == [[0, 2, 3, 1]]


def test_bare_values_have_the_patch_size_on_the_affines_diagonal(encoder: Encoder) -> None:
    x = torch.rand(2, 1, 8, 12, 5)
    found = encoder(x)
    assert found.affine.equal(torch.diag(torch.tensor([4.0, 4.0, 4.0, 1.0], dtype=torch.float64)))
    assert found.patch.shape == (2, 2, 3, 2, 24)
    resized = encoder(x, mode="resize", size=8)
    assert resized.patch.shape == (2, 2, 2, 2, 24)
    assert resized.affine.diagonal().tolist() == [4.0, 6.0, 2.5, 1.0]


def test_overlapping_windows_are_averaged_and_reach_the_end(encoder: Encoder) -> None:
    """Along H: 22 voxels are padded to 24, windows of 16 start at 0 and 8; W and D are shorter than a window."""
    x = torch.rand(1, 1, 22, 12, 9) * 2 - 1
    padded = torch.nn.functional.pad(x, [0, 3, 0, 0, 0, 2], value=-1.0)
    parts = [encoder(padded[:, :, a : a + 16]) for a in (0, 8)]
    found = encoder(x, mode="sliding_window", batch_size=1)
    torch.testing.assert_close(found.cls, (parts[0].cls + parts[1].cls) / 2)
    torch.testing.assert_close(found.patch[:, :2], parts[0].patch[:, :2])
    torch.testing.assert_close(found.patch[:, 2:4], (parts[0].patch[:, 2:] + parts[1].patch[:, :2]) / 2)
    torch.testing.assert_close(found.patch[:, 4:], parts[1].patch[:, 2:])
    torch.testing.assert_close(found.pooled, found.patch.mean((1, 2, 3)))
    torch.testing.assert_close(encoder(x, mode="sliding_window", batch_size=8).patch, found.patch)


def test_channels_are_averaged_and_share_one_crop(encoder: Encoder, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one, two = np.zeros((2, 14, 12, 10), np.float32)
    one[2:8, 3:9, 1:9] = rng.uniform(1, 2, (6, 6, 8))
    two[4:12, 1:7, 2:8] = rng.uniform(1, 2, (8, 6, 6))
    for name, voxels in (("1.nii", one), ("2.nii", two), ("4d.nii", np.stack([one, two], -1))):
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 1.0, 1.0])), tmp_path / name)
    found = encoder([[tmp_path / "1.nii", tmp_path / "2.nii"]])
    scan = encoder.load([tmp_path / "1.nii", tmp_path / "2.nii"])
    assert scan.voxels.shape == (2, 10, 8, 8)
    alone = [encoder(c[None, None]) for c in scan.data]
    torch.testing.assert_close(found.cls, (alone[0].cls + alone[1].cls) / 2)
    torch.testing.assert_close(encoder(scan.data[None]).patch, found.patch)
    in_one_file = encoder(Entry(str(tmp_path / "4d.nii"), (), axes="xyzc"))
    torch.testing.assert_close(in_one_file.patch, found.patch)
    one_channel = encoder(Entry(str(tmp_path / "4d.nii"), (), axes="xyzc", channel=1))
    torch.testing.assert_close(one_channel.cls, encoder(tmp_path / "2.nii").cls)
    nib.save(nib.Nifti1Image(two, np.diag([1.0, 1.0, 1.2, 1.0])), tmp_path / "apart.nii")
    with pytest.raises(BadVolume, match=r"apart.nii: with .*1.nii as another channel: voxels lie up to 1.8 mm apart"):
        encoder([[tmp_path / "1.nii", tmp_path / "apart.nii"]])


def test_a_list_is_the_batch_of_its_scans(encoder: Encoder) -> None:
    found = encoder([SCAN, str(OTHER)], mode="resize", size=16)
    assert found.affine.shape == (2, 4, 4) and found.cls.shape == (2, 24)
    torch.testing.assert_close(found.cls[1:], encoder(OTHER, mode="resize", size=16).cls)
    with pytest.raises(BadInput, match="different grids .* use mode='resize'"):
        encoder([torch.rand(8, 8, 8), torch.rand(12, 8, 8)])


def test_items_of_monai_bring_their_affine(encoder: Encoder) -> None:
    from monai.data import MetaTensor

    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.rand(1, 8, 12, 5), affine=affine)
    found = encoder({"image": image, "label": 3})
    torch.testing.assert_close(found.cls, encoder(image.as_tensor()[None]).cls)
    assert found.affine.diagonal().tolist() == [8.0, 12.0, 16.0, 1.0] and found.affine[:3, 3].tolist() == [3.0, 4.5, 6.0]


def test_unprepared_values_are_warned_of_and_mapped_on_request(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.rand(2, 1, 8, 8, 8) * 1000
    encoder(x)
    assert "raw=True maps them" in caplog.text
    caplog.clear()
    found = encoder(x, raw=True)
    torch.testing.assert_close(encoder(x * 7 + 3, raw=True).cls, found.cls)  # whatever scale they had
    torch.testing.assert_close(encoder(x[1:], raw=True).cls, found.cls[1:])  # each scan alone
    assert not caplog.records and x.max() > 900


@pytest.mark.parametrize(
    "inputs, arguments, words",
    [
        (torch.rand(8, 8), {}, r"shape \(8, 8\): expected \[B, C, H, W, D\]"),
        (torch.full((8, 8, 8), torch.nan), {}, "not finite"),
        (3, {}, "a int is no scan"),
        ([], {}, "no scan in the list"),
        ({"img": 1}, {}, 'keys img: expected its scan as "image"'),
        ("none.nii.gz", {}, "none.nii.gz: no such file"),
        (torch.zeros(8, 8, 8), {"mode": "whole"}, "choose one of full_image, resize, sliding_window"),
        (torch.zeros(8, 8, 8), {"mode": "resize", "size": 10}, "multiple of the network's patch size 4"),
        (torch.zeros(8, 8, 8), {"layers": 3}, "the network has 2"),
        (torch.zeros(8, 8, 8), {"overlap": 1.0}, "below 1"),
    ],
)
def test_what_is_no_scan_or_view_is_one_line(encoder: Encoder, inputs: object, arguments: dict, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        encoder(inputs, **arguments)
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite_are_refused_by_name(encoder: Encoder) -> None:
    with torch.no_grad():
        encoder.backbone.norm.bias[3] = torch.inf
    with pytest.raises(BadInput, match="sub-01.*features are not finite"):
        encoder(SCAN, mode="resize")


def test_the_weights_own_preprocessing_is_done_or_refused(encoder: Encoder) -> None:
    own = Encoder(encoder.backbone, {**PREPROCESSING, "percentiles": [5, 90]})
    assert (own.load([SCAN]).voxels == 32767).mean() > 10 * (encoder.load([SCAN]).voxels == 32767).mean()
    assert own.fingerprint() != encoder.fingerprint() == Encoder(encoder.backbone).fingerprint()
    for wrong, words in (
        ({"range": [0, 1]}, r"range=\[0, 1\], this version does \[-1.0, 1.0\]"),
        ({"percentiles": 3}, "percentiles 3"),
    ):
        with pytest.raises(BadInput, match=words):
            Encoder(encoder.backbone, {**PREPROCESSING, **wrong})


def test_half_precision_is_close_and_gradients_can_start_from_features(encoder: Encoder) -> None:
    x = torch.rand(1, 1, 16, 16, 16)
    half = Encoder(encoder.backbone, dtype=torch.bfloat16)(x)
    exact = encoder(x)
    assert half.cls.dtype == torch.float32 and not torch.equal(half.cls, exact.cls)
    torch.testing.assert_close(half.cls, exact.cls, atol=0.1, rtol=0.05)
    probe = torch.nn.Linear(24, 2)
    probe(exact.cls).sum().backward()
    assert probe.weight.grad.any()


def test_scikit_learn_sees_a_transformer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from dinov2.sklearn import VolumeEncoder

    step = clone(VolumeEncoder("vit_tiny_3d", output="cls+pooled", mode="resize", size=16, device="cpu"))
    pipeline = make_pipeline(step, LogisticRegression())
    assert set(pipeline.fit([SCAN, OTHER], [0, 1]).predict([SCAN, OTHER])) == {0, 1}
    rows = pipeline[0].transform([str(OTHER)])
    encoder = load_encoder("vit_tiny_3d", "cpu")
    wanted = encoder(OTHER, mode="resize", size=16)
    np.testing.assert_allclose(rows[0], torch.cat([wanted.cls, wanted.pooled], 1)[0], rtol=1e-5, atol=1e-6)
    assert list(step.fit([]).get_feature_names_out()[[0, 192]]) == ["cls0", "pooled0"]
    with pytest.raises(BadInput, match="output 'patch'"):
        VolumeEncoder("vit_tiny_3d", output="patch").fit([])


def test_torch_hub_finds_the_entry_points() -> None:
    encoder = torch.hub.load(str(ROOT), "encoder", "vit_tiny_3d", device="cpu", source="local")
    assert encoder.embed_dim == 192
    assert torch.hub.load(str(ROOT), "vit_tiny_3d", source="local", patch_size=8, img_size=16).patch_size == 8


def test_an_untrained_network_is_the_same_every_time_and_leaves_random_numbers_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    before = torch.get_rng_state()
    one, two, three = (load_encoder("vit_tiny_3d", "cpu", seed=s).fingerprint() for s in (0, 0, 1))
    assert one == two != three and torch.equal(torch.get_rng_state(), before)
    assert "an untrained network" in caplog.text
