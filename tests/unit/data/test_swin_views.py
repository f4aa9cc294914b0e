"""The views of MONAI-ViT's pretraining: what is asked of the network can be told from what it sees, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dinov2.data import TrainLoader, read_datalist, write_datalist
from dinov2.data.cache.folder import VolumeCache
from dinov2.data.cache.store import load_volume
from dinov2.data.datalist import Entry
from dinov2.data.swin_views import SwinViews, corrupted, cut_cube, plan_boxes, plan_corruption, plan_cube, turned
from dinov2.data.volumes.opening import describe
from tests.conftest import BUNDLED

SIZE, BATCH = 16, 4
SWIN = ["train.objective=swin", "train.orientation=RAS", "crops.local_crops_size=16"]
SmallConfig = Callable[..., DictConfig]


@pytest.fixture
def views(tmp_path: Path) -> SwinViews:
    """Of four scans, each of a range of values of its own; the last is shorter than a cube along one axis."""
    paths = []
    for i, shape in enumerate([(24, 20, 18)] * 3 + [(24, 20, 9)]):
        voxels = np.random.default_rng(i).integers(100, 30_000, shape).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / f"{i}.nii.gz")
        paths.append(tmp_path / f"{i}.nii.gz")
    write_datalist(tmp_path / "list.json", [describe(p) for p in paths])
    datalist = read_datalist(tmp_path / "list.json")
    entries = [Entry(e.image, e.shape, orientation="RAS") for e in datalist.entries]
    return SwinViews(type(datalist)(entries, datalist.sha256, datalist.path), SIZE, 0.3, BATCH, 7, 2**24)


def drawn(views: SwinViews, position: int) -> tuple[dict, torch.Tensor]:
    out = torch.empty(4, 1, SIZE, SIZE, SIZE)
    return views.draw(position, list(out)), out


def test_a_view_is_a_cube_of_the_volume_turned_as_it_is_labelled(views: SwinViews) -> None:
    seen = set()
    for position in range(24):
        sample, (one, other, *_) = drawn(views, position)
        turns = sample["rotations"]
        assert torch.equal(turned(one, -turns[0]), turned(other, -turns[1])), "both of one cube"
        found = views.find(position, {})
        plan = plan_cube(tuple(found.volume.voxels.shape[1:]), SIZE, BATCH, found.rng)
        cube = cut_cube(found.volume.voxels, plan.start, SIZE)
        assert torch.equal(torch.from_numpy(np.rot90(cube[0].numpy(), turns[0]).copy()), one[0])
        seen |= set(turns)
        n = min(SIZE, found.volume.voxels.shape[3])
        inside = (cube > -1).any(0).any(0).any(0)
        assert int(inside.sum()) == n and bool(inside[(SIZE - n) // 2]), "a shorter volume lies in the middle"
    assert seen == {0, 1, 2, 3}


def test_what_is_seen_differs_in_boxes_alone_of_noise_or_of_the_other_volume(views: SwinViews) -> None:
    num_swapped = 0
    for position in range(40):
        sample, out = drawn(views, position)
        found = views.find(position, {})
        plan = plan_cube(tuple(found.volume.voxels.shape[1:]), SIZE, BATCH, found.rng)
        of_other = position - position % BATCH + plan.other
        _, others = drawn(views, of_other)
        for i in range(2):
            view = plan_corruption(SIZE, 0.3, found.rng)
            changed = torch.zeros(1, SIZE, SIZE, SIZE, dtype=torch.bool)
            for box in view.dropped:
                changed[:, *(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] = True
            swapped = torch.zeros_like(changed)
            if of_other != position:
                for box in view.swapped:
                    swapped[:, *(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] = True
                num_swapped += int(swapped.sum())
            seen, whole = out[2 + i], out[i]
            assert torch.equal(seen[~(changed | swapped)], whole[~(changed | swapped)])
            assert torch.equal(seen[swapped], others[i][swapped])
            noise = seen[changed & ~swapped]
            assert noise.numel() == 0 or (
                noise.min() >= -1 and noise.max() <= 1 and not torch.equal(noise, whole[changed & ~swapped])
            )
        assert sample["sample_id"] == found.name
    assert num_swapped


def test_boxes_add_up_to_a_share_drawn_up_to_the_largest() -> None:
    shares = []
    for seed in range(200):
        boxes = plan_boxes(96, 0.3, np.random.default_rng(seed))
        shares.append(sum(float(np.prod(box.size)) for box in boxes) / 96**3)
        for box in boxes:
            assert all(0 <= a < b <= 96 and b - a < 24 for a, b in zip(box.start, box.stop, strict=True))
    assert max(shares) < 0.3 + 0.25**3 and 0.12 < np.mean(shares) < 0.18 and min(shares) < 0.02


def test_noise_covers_the_range_of_intensities() -> None:
    plan = plan_corruption(32, 0.3, np.random.default_rng(1))
    seen = corrupted(torch.zeros(1, 32, 32, 32), plan, None)
    box = plan.dropped[-1]
    filled = seen[0, *(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
    assert float(filled.min()) == -1 and float(filled.max()) == pytest.approx(1, abs=1e-6)


def test_views_do_not_depend_on_how_the_axes_are_stored(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(1, 3000, (24, 20, 18)).astype(np.int16)
    ras = nib.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0]))
    nib.save(ras, tmp_path / "ras.nii.gz")
    nib.save(ras.as_reoriented(nib.orientations.axcodes2ornt("PSL")), tmp_path / "psl.nii.gz")
    assert nib.aff2axcodes(nib.load(tmp_path / "psl.nii.gz").affine) != ("R", "A", "S")
    loaded = [load_volume(Entry(str(tmp_path / n), (), orientation="RAS"), 0) for n in ("ras.nii.gz", "psl.nii.gz")]
    assert np.array_equal(loaded[0].stored, loaded[1].stored) and loaded[0].spacing_mm == loaded[1].spacing_mm == (
        1.0,
        2.0,
        3.0,
    )
    as_stored = load_volume(Entry(str(tmp_path / "psl.nii.gz"), ()), 0)
    assert not np.array_equal(as_stored.stored, loaded[0].stored)


def test_a_cache_keeps_turned_volumes_and_stored_ones_apart(tmp_path: Path) -> None:
    scan = str(sorted(BUNDLED.glob("*.nii.gz"))[0])
    for orientation in ("LPI", None, "LPI", None):
        entry, cache = Entry(scan, (), orientation=orientation), VolumeCache(tmp_path / "cache")
        assert np.array_equal(load_volume(entry, 0, cache).stored, load_volume(entry, 0).stored)
        assert np.array_equal(cache.load(entry, 0).stored, load_volume(entry, 0).stored)
    assert len(list(VolumeCache(tmp_path / "cache").items())) == 2


def test_batches_are_the_same_for_any_number_of_ranks_and_processes(real_list: Path, small_config: SmallConfig) -> None:
    def step(rank: int, ranks: int, batch: int, workers: int) -> dict:
        cfg = small_config(*SWIN, f"train.batch_size_per_gpu={batch}", f"train.num_workers={workers}")
        loader = iter(TrainLoader(cfg, read_datalist(real_list), 3, rank, ranks))
        [found] = next(loader)
        loader.close()
        return found

    whole = step(0, 1, 4, 0)
    assert whole["rotations"].shape == (8,) and whole["collated_local_crops"].shape == (8, 1, 16, 16, 16)
    for halves in ([step(0, 2, 2, 0), step(1, 2, 2, 1)], [step(0, 1, 4, 2)]):
        for name in ("collated_global_crops", "collated_local_crops", "rotations"):
            parts = [half[name].unflatten(0, (2, -1)) for half in halves]  # view-major
            assert torch.equal(torch.cat(parts, 1).flatten(0, 1), whole[name]), name


def test_bad_volumes_are_replaced_and_named_also_where_they_are_the_other_one(tmp_path: Path, views: SwinViews) -> None:
    Path(views.datalist.entries[1].image).write_bytes(b"no volume")
    named: dict[str, str] = {}
    for position in range(12):
        sample, out = drawn(views, position)
        assert "sample_id" in sample and bool(out.isfinite().all())
        named |= sample["bad"]
    assert list(named) == [views.datalist.entries[1].image]
