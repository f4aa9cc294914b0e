"""`dinov2 visualize` and `vis_pca.py`: maps lie on the scan, pictures are in millimetres, what cannot be shown is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from dinov2 import Encoder
from dinov2.cli import build_parser, main
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval import vis_pca, visualize
from dinov2.eval.visualize import Request
from dinov2.features.placing import at_most
from dinov2.features.setup import build_model_for_eval
from dinov2.visual.features import Panel, draw_panels
from tests.unit.data.corpus.test_index import save_dicom

TURN = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])
NOISE = np.random.default_rng(1).uniform(1, 2, (8, 4, 4))
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = TURN @ np.diag([3.0, 1.0, 1.5])
OBLIQUE[:3, 3] = [7.0, -20.0, 11.0]


@pytest.fixture
def encoder(small_config: Callable[..., DictConfig]) -> Encoder:
    cfg = small_config("student.pos_encoding=rope", "student.init=xavier")
    return Encoder(build_model_for_eval(cfg, "random", Runtime(torch.device("cpu"))))


def body(shape: tuple[int, ...] = (12, 36, 28), seed: int = 0) -> np.ndarray:
    """A noisy ellipsoid in empty space, with a bright and textured end."""
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    noise = np.random.default_rng(seed).uniform(0.6, 1.4, shape)
    return np.where(sum(g**2 for g in grid) < 0.8, noise * (2 + grid[1]) * 100, 0).astype(np.float32)


def saved(path: Path, voxels: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def run(encoder: Encoder, output: Path, scan: Path, kind: str = "pca", *joint: Path, **changes: Any) -> list[str]:
    said: list[str] = []
    scans = ((scan,), *((path,) for path in joint))
    assert visualize.visualize(Request(scans, kind, output, **changes), encoder, said.append) == 0
    return said


def test_a_landmark_lies_under_the_maps_peak(encoder: Encoder, tmp_path: Path) -> None:
    """A bright blob at a known place, in an oblique scan of uneven voxels whose slice axis is not the last."""
    voxels = body()
    blob = (slice(5, 8), slice(20, 23), slice(8, 11))
    voxels[blob] = 1000
    place = tuple((OBLIQUE @ [6, 21, 9, 1])[:3])
    run(encoder, tmp_path / "out", saved(tmp_path / "a.nii", voxels), "similarity", at_mm=place, step=2)
    made, given = nib.load(tmp_path / "out" / "nifti_similarity.nii.gz"), nib.load(tmp_path / "a.nii")
    assert made.shape == given.shape
    np.testing.assert_allclose(made.affine, given.affine, atol=1e-5)
    peak = np.unravel_index(made.get_fdata().argmax(), made.shape)
    patch_mm = 4 * np.array([3.0, 1.0, 1.5])
    off = np.abs(TURN.T @ ((made.affine @ [*peak, 1])[:3] - place))
    assert (off <= patch_mm / 4 + np.array([3.0, 1.0, 1.5])).all(), off  # half a step of half a patch, and a voxel
    facts = json.loads((tmp_path / "out" / "visualize.json").read_text())["similarity"][0]
    assert (
        facts["cosine"] == pytest.approx(1)
        and (np.abs(TURN.T @ (np.array(facts["best_mm"]) - place)) <= patch_mm / 4 + 1e-6).all()
    )
    np.testing.assert_allclose(nib.load(tmp_path / "out" / "orig.nii.gz").get_fdata(), voxels, atol=0.02)


def test_pca_writes_components_mask_and_colours_on_white(encoder: Encoder, tmp_path: Path) -> None:
    voxels = body()
    said = run(encoder, tmp_path / "out", saved(tmp_path / "a.nii.gz", voxels))
    assert said[0].startswith("foreground: first component above ") and "(Otsu)" in said[0]
    facts = json.loads((tmp_path / "out" / "visualize.json").read_text())
    files = {p.name for p in (tmp_path / "out").iterdir()}
    maps = {f"nifti_{i}.nii.gz" for i in (*range(4), "mask", "rgb")}
    assert files == {"orig.nii.gz", "pca.png", "visualize.json", *maps}
    first = nib.load(tmp_path / "out" / "nifti_0.nii.gz").get_fdata()
    mask = np.asarray(nib.load(tmp_path / "out" / "nifti_mask.nii.gz").dataobj) > 0
    rgb = np.asarray(nib.load(tmp_path / "out" / "nifti_rgb.nii.gz").dataobj)
    step = np.ptp(first) / 2**15
    assert (first[mask] > facts["threshold"] - step).all() and mask.any() and not mask.all()
    assert all((rgb[c][~mask] == 255).all() for c in "RGB") and len(np.unique(rgb["R"][mask])) > 10
    assert np.corrcoef(first.ravel(), voxels.ravel())[0, 1] > 0.3  # the body is what is above


def test_a_group_shares_its_basis_and_each_scan_its_folder(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visualize, "draw_panels", lambda *args: None)  # most of the time
    one, two = (saved(tmp_path / f"{i}.nii", body(seed=i), OBLIQUE) for i in range(2))
    run(encoder, tmp_path / "out", one, "pca", two)
    run(encoder, tmp_path / "same", one, "pca", one)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"0", "1", "visualize.json"}
    assert {p.name for p in (tmp_path / "same").iterdir()} == {"0_1", "0_2", "visualize.json"}
    twice = [(tmp_path / "same" / n / "nifti_rgb.nii.gz").read_bytes()[10:] for n in ("0_1", "0_2")]  # less gzip's time
    assert twice[0] == twice[1]


@pytest.mark.parametrize("at", [None, (9.0, 8.0, -8.0)])
def test_attention_has_a_file_and_a_panel_for_each_head(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[float, float, float] | None
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(visualize, "draw_panels", lambda *args: drawn.append(args))
    scan = saved(tmp_path / "a.nii", body())
    run(encoder, tmp_path / "out", scan, "attention", at_mm=at, block=0)
    asking = "class token" if at is None else "patch at (9, 8, -8) mm"
    titles = [panel.title for panel in drawn[0][1]]
    assert titles == [f"head 0, layer 0, {asking}", "head 1", "mean of heads"]
    heads = [nib.load(tmp_path / "out" / f"nifti_{n}.nii.gz").get_fdata() for n in ("0", "1", "mean")]
    np.testing.assert_allclose(heads[2], (heads[0] + heads[1]) / 2, atol=np.max(heads) / 2**13)
    (facts,) = json.loads((tmp_path / "out" / "visualize.json").read_text())["attention"]
    sums = np.array(facts["to_patches"]) + np.array(facts["to_prefix"]).sum(1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)


@pytest.mark.parametrize("form", ["time", "channels", "dicom", "two files"])
def test_scans_of_every_form(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(visualize, "draw_panels", lambda *args: None)
    voxels = body((16, 20, 12))
    if form == "dicom":
        scan = save_dicom(tmp_path / "series", voxels.astype(np.int16))
        run(encoder, tmp_path / "out", scan)
        shape = visualize.open_volume(visualize.Entry(str(scan), ())).image.shape
    elif form == "two files":
        files = tuple(saved(tmp_path / f"{i}.nii", body((16, 20, 12), i)) for i in range(2))
        assert visualize.visualize(Request((files,), "pca", tmp_path / "out"), encoder, lambda _: None) == 0
        shape = voxels.shape
    else:
        scan = saved(tmp_path / "a.nii", np.stack([voxels, voxels[::-1]], -1))
        run(encoder, tmp_path / "out", scan, axes=visualize.FOURTH_AXIS[form], mode="resize", size=16)
        shape = voxels.shape
    assert nib.load(tmp_path / "out" / "nifti_rgb.nii.gz").shape == tuple(shape)


@pytest.mark.parametrize(
    "voxels, changes, message",
    [
        (np.full((12, 12, 12), 7.0), {}, "constant (value 7)"),
        (body((12, 20, 3)), {}, "voxels (its foreground) are less than a patch of 4: use --input-type resize"),
        (NOISE[:4], {}, "are a single patch of 4"),
        (body(), {"mode": "resize", "size": 4}, "--size 4: a single patch"),
        (body(), {"kind": "similarity"}, "give --at X Y Z"),
        (body(), {"at_mm": (900.0, 0.0, 0.0), "kind": "similarity"}, "(900, 0, 0) mm lies outside of its foreground"),
        (body(), {"step": 3}, "divisor of the network's patch size 4"),
        (body(), {"step": 2, "kind": "attention"}, "--step is for pca and similarity"),
        (body(), {"block": 5, "kind": "attention"}, "layer 5: the network has 2"),
        (NOISE, {}, "PCA of 2 patches: needs at least 8"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_one_line_and_leaves_no_picture(
    encoder: Encoder, tmp_path: Path, voxels: np.ndarray, changes: dict[str, Any], message: str
) -> None:
    scan = saved(tmp_path / "a.nii", voxels.astype(np.float32), np.eye(4))
    with pytest.raises(BadInput) as caught:
        run(encoder, tmp_path / "out", scan, **{"kind": "pca", **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.png"))


def test_the_page_has_the_first_two_scans_and_their_tokens(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tokens closer than patches, and more patches than fit."""
    pages: list[Any] = []
    monkeypatch.setattr(visualize, "draw_panels", lambda *args: None)
    monkeypatch.setattr(visualize, "most_cells", lambda width: 30)
    monkeypatch.setattr(visualize, "viewer_page", lambda title, scans, notes: pages.append(scans) or "page")
    paths = [saved(tmp_path / f"{i}.nii", body((12, 20, 16), i), np.diag([3.0, 1.0, 1.0, 1.0])) for i in range(2)]
    run(encoder, tmp_path / "out", paths[0], "pca", paths[1], step=2, viewer=True)
    assert (tmp_path / "out" / "viewer.html").read_text() == "page"
    (scans,) = pages
    for page, path in zip(scans, paths, strict=True):
        scan = encoder.load([path])
        found = encoder.encode_scan(scan, visualize.View())
        assert np.prod(page.tokens.shape[:3]) <= 30 < np.prod(found.patch.shape[1:4]) and "averaged from" in page.note
        np.testing.assert_allclose(page.tokens, at_most(found.patch[0].numpy(), page.grid_affine, 30)[0], atol=1e-5)
        assert list(page.attention) == ["head 0", "head 1", "mean of heads"]
        centre = [(n - 1) / 2 for n in page.tokens.shape[:3]]
        middle = (found.affine.numpy() @ [*((n - 1) / 2 for n in found.patch.shape[1:4]), 1])[:3]
        np.testing.assert_allclose((page.grid_affine @ [*centre, 1])[:3], middle, atol=1e-6)
        at = (np.linalg.inv(page.colours_affine) @ [*page.middle_mm, 1])[:3].round().astype(int)
        assert page.foreground.any() and not page.foreground.all() and page.colours.shape[:3] == page.foreground.shape
        assert page.image.shape == (12, 20, 16) and (np.array(page.colours.shape[:3]) > at).all()


def test_an_empty_foreground_is_named(encoder: Encoder, tmp_path: Path) -> None:
    for weight in encoder.backbone.parameters():
        weight.zero_()  # every patch is the same
    with pytest.raises(BadInput, match="all patches look the same to this network"):
        run(encoder, tmp_path / "out", saved(tmp_path / "a.nii", body()))


def test_the_command_and_3dinos_program_hand_over_their_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    for module in (visualize, vis_pca):
        monkeypatch.setattr(module, "visualize", lambda request, encoder, say: given.append((request, encoder)) or 0)
        monkeypatch.setattr(module, "open_encoder", lambda *args: args)
    words = ["visualize", "a.nii", "b.nii", "--weights", "demo", "--type", "attention", "--output", "o", "--joint", "c.nii"]
    more = ["--at", "1", "-2", "3.5", "--layer", "1", "--input-type", "resize", "--size", "16", "--interpolation", "nearest"]
    assert main([*words, *more, "--fourth-axis", "channels"]) == 0
    wanted = Request(
        ((Path("a.nii"), Path("b.nii")), (Path("c.nii"),)), "attention", Path("o"), "resize", 16,
        block=1, at_mm=(1.0, -2.0, 3.5), smooth=False, axes="xyzc",
    )  # fmt: skip
    assert given.pop() == (wanted, ("demo", None, (), "auto", "auto", None))
    flags = ["--config-file", "c.yaml", "--pretrained-weights", "w.pth", "--output-dir", "o", "--image-path", "a.nii"]
    assert vis_pca.main([*flags, "--cache-dir", "d", "--vis-type", "mhsa", "--input-type", "resize", "--opts", "k=v"]) == 0
    assert given.pop() == (Request(((Path("a.nii"),),), "attention", Path("o"), "resize"), ("w.pth", "c.yaml", ["k=v"]))
    alone = build_parser().parse_args(["visualize", "a.nii", "--weights", "demo", "--output", "o"])
    assert (alone.type, alone.input_type, alone.step, alone.layer, alone.viewer) == ("pca", "auto", None, -1, False)


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"teacher": {"backbone.cls_token": torch.zeros(1, 1, 24)}}, tmp_path / "w.pth")
    scan = saved(tmp_path / "a.nii", body())
    assert main(["visualize", str(scan), "--weights", str(tmp_path / "w.pth"), "--output", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "w.pth" in said and not (tmp_path / "out").exists(), said


def test_pictures_are_in_millimetres(tmp_path: Path) -> None:
    """A ball of 12 mm radius in voxels of 1 x 2 x 4 mm is a disc in each plane."""
    spacing = np.array([1.0, 2.0, 4.0])
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (40, 20, 10)], indexing="ij"), -1)
    ball = (np.linalg.norm((grid - [19.5, 9.5, 4.5]) * spacing, axis=-1) < 12).astype(np.float32)
    rgb = np.ones((*ball.shape, 3), np.float32)
    rgb[ball > 0] = (0, 0, 1)
    affine = np.diag([*spacing, 1.0])
    draw_panels(ball * 0, [Panel("ball", rgb)], affine, tuple((affine @ [19.5, 9.5, 4.5, 1])[:3]), tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    blue = (pixels[..., 2] > 150) & (pixels[..., :2] < 100).all(-1)
    columns = np.flatnonzero(blue.any(0))
    discs = np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)
    assert len(discs) == 3
    per_mm = 1.9 * 160 / 40
    for disc in discs:
        rows = np.flatnonzero(blue[:, disc].any(1))
        for extent in (np.ptp(disc), np.ptp(rows)):
            assert extent == pytest.approx(24 * per_mm, abs=4.5 * per_mm)  # to a voxel of the coarsest axis
