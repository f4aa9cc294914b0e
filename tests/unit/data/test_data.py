"""From datalist to batch: preprocessing, plans, masks, order, collation, and volumes that cannot be used."""

from __future__ import annotations

import gzip
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from dinov2.data import DataAugmentationDINO3d, TrainLoader, read_datalist, write_datalist
from dinov2.data.augmentation import plan as ap
from dinov2.data.cache.store import VolumeStore
from dinov2.data.datalist import Datalist, Entry
from dinov2.data.loaders import store_share
from dinov2.data.masking import plan_masks
from dinov2.data.preprocess import preprocess, slice_axis
from dinov2.data.samplers import EndlessOrder, PositionSampler
from dinov2.data.volumes.opening import describe, open_volume
from dinov2.data.workers import compute_in_order
from dinov2.errors import BadInput, BadVolume
from dinov2.streams import Kind, stream

SmallConfig = Callable[..., DictConfig]


def save(path: Path, voxels: np.ndarray, spacing: tuple[float, ...] = (1, 1, 1)) -> Path:
    image = nib.Nifti1Image(voxels, np.diag([*spacing[:3], 1]) if all(spacing) else None)  # the header's spacing alone
    image.header.set_zooms((*spacing, *[0.0] * (voxels.ndim - len(spacing)))[: voxels.ndim])
    nib.save(image, path)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(10, 3, shape).astype(np.float32)


def entry(path: Path, **keys: object) -> Entry:
    return Entry(str(path), (12, 12, 12), **keys)


# ---------------------------------------------------------------------- datalist


def test_a_written_datalist_reads_back_with_paths_below_it(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", noise(12, 10, 8), (1, 1, 2))
    assert write_datalist(tmp_path / "list.json", [{**describe(tmp_path / "a.nii.gz"), "modality": "MR"}]) == 1
    assert json.loads((tmp_path / "list.json").read_text())[0]["image"] == "a.nii.gz"
    (only,) = read_datalist(tmp_path / "list.json").entries
    assert only.image == str(tmp_path / "a.nii.gz") and only.shape == (12, 10, 8)
    assert only.spacing_mm == (1, 1, 2) and only.extra == {"modality": "MR"}


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "No such file"),
        ("[{", "not valid JSON"),
        ("{}", "expected a list"),
        ("[]", "is empty"),
        ('[{"img": "a"}]', "entry 0: expected an object"),
        ('[{"image": "a", "shape": [1, 2]}]', "entry 0 .a.: shape must be"),
        ('[{"image": "a", "shape": [1, 2, 0]}]', "shape must be"),
        ('[{"image": "a", "shape": [9, 9, 9], "spacing": [1]}]', "spacing must be"),
        ('[{"image": "a", "shape": [9, 9, 9], "axes": "txyz"}]', "axes must be"),
    ],
)
def test_an_ill_formed_datalist_is_refused_in_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "list.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=words) as err:
        read_datalist(path)
    assert str(path) in str(err.value) and "\n" not in str(err.value)


def test_the_smallest_axis_must_be_greater_than_the_limit(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.nii", "shape": [40, n, 50]} for n in (24, 25)]
    write_datalist(tmp_path / "l.json", rows)
    datalist = read_datalist(tmp_path / "l.json")
    assert [e.shape[1] for e in datalist.larger_than(24).entries] == [25]
    with pytest.raises(BadInput, match="data_min_axis_size=25"):
        datalist.larger_than(25)


# ---------------------------------------------------------------------- volumes and preprocessing


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_text("hello"), "cannot be opened"),
        (lambda p: p.write_bytes(b""), "cannot be opened"),
        (lambda p: save(p, noise(12, 12)[:, :]), "2 axes"),
        (lambda p: save(p, noise(6, 6, 6, 2, 3)), "5 axes"),
        (lambda p: save(p, noise(12, 12, 12, 3)), "neither time nor channels"),
        (lambda p: save(p, np.full((12, 12, 12), 7, np.float32)), "constant"),
        (lambda p: save(p, np.full((12, 12, 12), np.nan, np.float32)), "no finite voxel"),
        (lambda p: save(p, noise(12, 12, 12), (1, 0, 1)), "spacing .* is not positive"),
        (lambda p: p.write_bytes(gzip.compress(b"x" * 99)), "cannot be opened"),
        (lambda p: save(p, noise(9, 9, 9).astype(np.complex64)), "complex64 are not real numbers"),
        (lambda p: save(p, np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "not real numbers"),
    ],
)
def test_a_volume_that_cannot_be_used_is_named(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    path = tmp_path / "v.nii.gz"
    make(path)
    with pytest.raises(BadVolume, match=words) as err:
        VolumeStore([entry(path)], 0).get(0, np.random.default_rng(0))
    assert str(path) in str(err.value) and "\n" not in str(err.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", noise(20, 20, 20))
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(BadVolume, match="v.nii.gz: cannot be read"):
        open_volume(entry(path)).read()


def test_a_fourth_axis_is_time_or_a_named_channel(tmp_path: Path) -> None:
    voxels = noise(12, 12, 12, 3)
    path = save(tmp_path / "v.nii.gz", voxels)
    assert open_volume(entry(path, axes="xyzt")).num_times == 3
    channel = open_volume(entry(path, axes="xyzc", channel=2))
    np.testing.assert_allclose(channel.read(), voxels[..., 2])
    with pytest.raises(BadVolume, match="channel 3 of 3"):
        open_volume(entry(path, axes="xyzc", channel=3))
    timed = save(tmp_path / "t.nii.gz", voxels, (1, 1, 1, 2.5))
    np.testing.assert_allclose(open_volume(entry(timed)).read(1), voxels[..., 1])
    single = save(tmp_path / "s.nii.gz", voxels[..., None, :1])
    assert open_volume(entry(single)).read().shape == (12, 12, 12)


def test_the_time_point_is_drawn_anew_for_every_draw(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", noise(12, 12, 12, 4), (1, 1, 1, 1))
    store = VolumeStore([entry(path)], 2**30)
    seen = {float(store.get(0, stream(0, Kind.SAMPLE, i)).data.sum()) for i in range(40)}
    assert len(seen) == 4
    again = VolumeStore([entry(path)], 0)
    assert float(again.get(0, stream(0, Kind.SAMPLE, 3)).data.sum()) == float(
        store.get(0, stream(0, Kind.SAMPLE, 3)).data.sum()
    )


@pytest.mark.parametrize(
    "spacing, axis",
    [
        ((1, 1, 1), 2),
        ((1, 1, 5), 2),
        ((5, 1, 1), 0),
        ((1, 5, 1.005), 1),
        ((1.0, 1.002, 1.011), 2),  # two pairs within the tolerance: the closer one is in-plane
        ((1.011, 1.002, 1.0), 0),
        ((3, 2, 1), 0),
    ],
)
def test_the_slice_axis_lies_beside_the_equally_spaced_ones(spacing: tuple[float, float, float], axis: int) -> None:
    assert slice_axis(spacing) == axis


def test_preprocessing_maps_percentiles_moves_slices_and_crops() -> None:
    voxels = np.zeros((6, 20, 24), np.float32)
    voxels[1:5, 3:17, 4:22] = noise(4, 14, 18) + 100
    voxels[2, 5, 6] = np.nan
    low, high = np.percentile(np.where(np.isfinite(voxels), voxels, np.nanmean(voxels)), [0.05, 99.95])
    volume = preprocess(voxels.copy(), (5.0, 1.0, 1.0), "v")
    assert volume.data.shape == (1, 14, 18, 4) and volume.spacing_mm == (1.0, 1.0, 5.0)
    assert volume.data.dtype == torch.float32 and volume.data.min() >= -1 and volume.data.max() <= 1
    expected = np.clip(2 * (voxels[3, 10, 10] - low) / (high - low) - 1, -1, 1)
    assert float(volume.data[0, 7, 6, 2]) == pytest.approx(expected, abs=2e-5)
    assert float(volume.data[0, 2, 2, 1]) == pytest.approx(2 * (np.nanmean(voxels) - low) / (high - low) - 1, abs=2e-5)


# ---------------------------------------------------------------------- plans and crops


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 2**32),
    edge=st.one_of(st.none(), st.floats(1, 100)),
    unit=st.sampled_from(["region_mm", "region_vox"]),
)
def test_every_planned_box_lies_in_its_region_and_has_the_planned_extent(
    shape: tuple[int, int, int], seed: int, edge: float | None, unit: str
) -> None:
    augmentation = DataAugmentationDINO3d(local_crops_number=2, **{unit: edge})
    rng = np.random.default_rng(seed)
    edges_vox = edge and ((edge, edge / 2, edge / 3) if unit == "region_mm" else (edge,) * 3)
    region = ap.plan_region(shape, edges_vox, np.random.default_rng(seed))
    assert all(size == n or abs(size - e) <= 1 for size, n, e in zip(region.size, shape, edges_vox or shape, strict=True))
    plan = augmentation.plan(shape, rng, (1.0, 2.0, 3.0))
    for crop in (*plan.global_crops, *plan.local_crops):
        for a, b, lo, hi in zip(crop.box.start, crop.box.stop, region.start, region.stop, strict=True):
            assert 0 <= lo <= a < b <= hi
        assert all(hi <= n for hi, n in zip(region.stop, shape, strict=True))
    for crop in plan.global_crops:
        assert crop.box.size[2] >= 0.5 * region.size[2] - 0.5


@pytest.mark.parametrize("turn_p", [0.0, 1.0])
def test_turns_happen_with_the_configured_probability(turn_p: float) -> None:
    augmentation = DataAugmentationDINO3d(local_crops_number=2, turn_p=turn_p)
    plan = augmentation.plan((40, 40, 40), np.random.default_rng(0))
    for crop in (*plan.global_crops, *plan.local_crops):
        assert len(crop.flips) == len(crop.rotations) == 3 * turn_p


def test_what_is_not_asked_for_draws_nothing() -> None:
    """A key added later must not change the crops of a recipe that leaves it alone."""
    shape, rng = (40, 40, 40), np.random.default_rng
    plain, other = (
        DataAugmentationDINO3d(local_crops_number=2),
        DataAugmentationDINO3d(local_crops_number=2, sharpen_alpha=(0.5, 1.0)),
    )
    for seed in range(20):
        one, two = plain.plan(shape, rng(seed)), other.plan(shape, rng(seed))
        assert [c.box for c in one.local_crops] == [c.box for c in two.local_crops]
        assert all(c.angles == (0.0, 0.0, 0.0) for c in (*one.global_crops, *one.local_crops))
        sharp = [s.alpha for c in two.global_crops for s in c.intensity if isinstance(s, ap.Sharpen)]
        assert all(0.5 <= alpha <= 1.0 for alpha in sharp)
    stream = rng(0)
    before = stream.bit_generator.state
    assert ap.plan_angles(stream) == (0.0, 0.0, 0.0) and stream.bit_generator.state == before


def test_in_plane_boxes_have_the_planned_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    boxes = [ap.plan_crop((400, 300, 90), (0.16, 0.48), (0.2, 0.5), rng) for _ in range(300)]
    sizes = np.array([b.size for b in boxes], float)
    area, aspect = sizes[:, 0] * sizes[:, 1] / (400 * 300), sizes[:, 1] / sizes[:, 0]
    assert 0.158 < area.min() < 0.18 and 0.46 < area.max() < 0.482
    assert 0.89 < aspect.min() < 0.91 and 1.10 < aspect.max() < 1.12
    assert sizes[:, 2].min() >= 18 and sizes[:, 2].max() <= 45
    assert abs(np.corrcoef(sizes[:, 2], area)[0, 1]) < 0.2  # independent across slices


def test_a_shape_that_no_try_fits_gets_a_box_at_any_place() -> None:
    rng = np.random.default_rng(0)
    for shape, size, axis in (((100, 10, 4), (11, 10, 4), 0), ((10, 100, 4), (10, 11, 4), 1)):
        boxes = [ap.plan_crop(shape, (1.0, 1.0), (1.0, 1.0), rng) for _ in range(2000)]
        assert {b.size for b in boxes} == {size}
        counts = np.bincount([b.start[axis] for b in boxes], minlength=90)
        assert len(counts) == 90 and counts.min() > 0 and counts.max() < 60  # both ends, and no place before others


def test_every_planned_step_occurs_with_its_probability() -> None:
    rng = np.random.default_rng(0)
    draws = [[ap.plan_intensity(i, 2, rng) for i in range(3)] for _ in range(3000)]

    def share(crop: int, *kinds: type) -> float:
        return float(np.mean([any(isinstance(s, kinds) for s in d[crop]) for d in draws]))

    for crop in range(3):
        assert share(crop, ap.Gamma) == pytest.approx(0.8 / 3, abs=0.03)
        assert share(crop, ap.Gamma, ap.Noise, ap.HistogramShift) == pytest.approx(0.8, abs=0.03)
    assert share(0, ap.Smooth, ap.Sharpen) == 1.0 and share(0, ap.Sharpen) == pytest.approx(0.5, abs=0.03)
    assert share(1, ap.Smooth, ap.Sharpen) == pytest.approx(0.1, abs=0.02)
    assert share(1, ap.Gibbs) == pytest.approx(0.2, abs=0.03) and share(0, ap.Gibbs) == 0
    assert share(2, ap.Smooth) == pytest.approx(0.5, abs=0.03) and share(2, ap.Sharpen, ap.Gibbs) == 0
    turns = [ap.plan_turns(rng) for _ in range(3000)]
    assert np.mean([1 in flips for flips, _ in turns]) == pytest.approx(0.3, abs=0.03)
    assert np.mean([len(r) for _, r in turns]) == pytest.approx(0.9, abs=0.05)
    assert {k for _, r in turns for _, k in r} == {1, 2, 3}


def test_crops_are_a_function_of_the_seed() -> None:
    volume = torch.from_numpy(noise(1, 30, 28, 20))
    augmentation = DataAugmentationDINO3d(global_crops_size=12, local_crops_size=8, local_crops_number=3)
    one, same, other = (augmentation(volume, seed=s) for s in (4, 4, 5))
    assert [c.shape for c in one["global_crops"]] == [(1, 12, 12, 12)] * 2 and len(one["local_crops"]) == 3
    for key in one:
        assert all(torch.equal(a, b) for a, b in zip(one[key], same[key], strict=True))
    assert not torch.equal(one["global_crops"][0], other["global_crops"][0])


# ---------------------------------------------------------------------- masks, order, batches


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 20), patches=st.integers(1, 60), p=st.floats(0, 1), step=st.integers(0, 10**6))
def test_masks_step_through_the_ratios_in_equal_bins(rows: int, patches: int, p: float, step: int) -> None:
    low, high = 0.2, 0.75
    plan = plan_masks(1, step, rows, patches, p, (low, high))
    counts = np.sort(plan.masks.sum(1)[plan.upper_bounds > 0])
    num_masked = int(rows * p)
    assert (plan.masks.sum(1) <= plan.upper_bounds).all() and (plan.upper_bounds > 0).sum() <= num_masked
    edges = np.linspace(low, high, num_masked + 1)
    ratios = np.sort(plan.masks.sum(1))[::-1][:num_masked][::-1]
    for count, a, b in zip(ratios, edges[:-1], edges[1:], strict=True):
        assert int(patches * a) <= count <= int(patches * b)
    assert len(counts) <= num_masked


def test_masked_places_are_uniform_over_patches() -> None:
    masks = np.concatenate([plan_masks(0, s, 8, 27, 1.0, (0.5, 0.5)).masks for s in range(400)])
    share = masks.mean(0)
    assert share.min() > 0.44 and share.max() < 0.52  # 13 of 27, standard error 0.009


def test_every_epoch_is_a_new_permutation() -> None:
    order = EndlessOrder(7, seed=3)
    epochs = [[order(e * 7 + i) for i in range(7)] for e in range(4)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len({tuple(e) for e in epochs}) > 1
    assert [EndlessOrder(7, seed=3)(i) for i in (20, 3)] == [epochs[2][6], epochs[0][3]]


def test_ranks_and_accumulation_share_out_one_sequence() -> None:
    def step_positions(batch: int, accumulation: int, rank: int, world: int, step: int) -> list[int]:
        batches = iter(PositionSampler(batch, accumulation, rank, world, step))
        return [p for _ in range(accumulation) for p in next(batches)]

    whole = step_positions(12, 1, 0, 1, 5)
    assert whole == list(range(60, 72))
    assert step_positions(6, 1, 0, 2, 5) + step_positions(6, 1, 1, 2, 5) == whole
    assert step_positions(3, 2, 0, 2, 5) + step_positions(3, 2, 1, 2, 5) == whole


def first_steps(cfg: DictConfig, path: Path, count: int, start: int = 0, rank: int = 0, world: int = 1) -> list:
    batches = iter(TrainLoader(cfg, read_datalist(path), start, rank, world))
    return [next(batches) for _ in range(count)]


def test_the_batch_is_crop_major_with_the_masks_of_its_rows(real_list: Path, small_config: SmallConfig) -> None:
    ((batch,),) = first_steps(small_config(), real_list, 1, start=4)
    assert batch["collated_global_crops"].shape == (6, 1, 16, 16, 16)
    assert batch["collated_local_crops"].shape == (6, 1, 8, 8, 8)
    assert batch["positions"].tolist() == [12, 13, 14] and len(batch["sample_ids"]) == 3
    masks, indices = batch["collated_masks"], batch["mask_indices_list"]
    assert masks.shape == (6, 64) and (masks.any(1).sum()) == 3
    assert torch.equal(masks.flatten().nonzero()[:, 0], indices) and batch["n_masked_patches"].tolist() == [len(indices)]
    assert len(indices) <= batch["upperbound"]
    assert float(batch["masks_weight"].sum()) == pytest.approx(3)
    ((again,),) = first_steps(small_config("train.batch_size_per_gpu=1"), real_list, 1, start=13)
    assert torch.equal(again["collated_global_crops"], batch["collated_global_crops"][1::3])  # volume 13: rows 1 and 4
    assert torch.equal(again["collated_local_crops"], batch["collated_local_crops"][1::3])


def test_ranks_and_micro_batches_hold_the_rows_of_one_batch(real_list: Path, small_config: SmallConfig) -> None:
    ((whole,),) = first_steps(small_config("train.batch_size_per_gpu=4"), real_list, 1, start=2)
    halves = small_config("train.batch_size_per_gpu=1", "train.accumulation_steps=2")
    parts = [first_steps(halves, real_list, 1, start=2, rank=r, world=2)[0] for r in range(2)]
    micro = [b for rank in parts for b in rank]
    for v, part in enumerate(micro):
        for key in ("collated_global_crops", "collated_masks", "collated_local_crops"):
            assert torch.equal(part[key], whole[key][v::4]), key


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(real_list: Path, small_config: SmallConfig, workers: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # of a loader in the main process, whose Fourier transforms of 16 voxels would round otherwise
    try:
        alone = first_steps(small_config(), real_list, 4)
    finally:
        torch.set_num_threads(threads)
    shared = first_steps(small_config(f"train.num_workers={workers}"), real_list, 4)
    for (a,), (b,) in zip(alone, shared, strict=True):
        for key, value in a.items():
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config(
        "train.num_workers=2",
        *(f"compute_precision.{s}.backbone.mixed_precision.param_dtype=fp32" for s in ("student", "teacher")),
    )
    batches = iter(TrainLoader(cfg, read_datalist(real_list), device="cuda"))
    for (a,) in first_steps(cfg, real_list, 4):
        (b,) = next(batches)
        for key, value in a.items():
            assert torch.equal(value, b[key].cpu()) if isinstance(value, torch.Tensor) else value == b[key], key
            assert not isinstance(value, torch.Tensor) or b[key].is_cuda


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unusable_volume_is_named_counted_and_replaced_by_the_next(
    tmp_path: Path, small_config: SmallConfig, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.nii.gz", noise(12, 12, 12, seed=i) if i != 1 else np.ones((12, 12, 12), np.float32))
    write_datalist(tmp_path / "l.json", [{"image": str(tmp_path / f"{i}.nii.gz"), "shape": [12] * 3} for i in range(3)])
    loader = TrainLoader(small_config(f"train.num_workers={workers}"), read_datalist(tmp_path / "l.json"))
    batches = iter(loader)
    ids = [name for _ in range(2) for name in next(batches)[0]["sample_ids"]]
    assert list(loader.bad_volumes) == [str(tmp_path / "1.nii.gz")]
    assert caplog.text.count("1.nii.gz: constant") == 1
    order = EndlessOrder(3, 0)
    expected = [{0: 0, 1: 2, 2: 2}[order(p)] for p in range(6)]
    assert ids == [str(tmp_path / f"{i}.nii.gz") for i in expected]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_list_without_a_usable_volume_ends_the_run(tmp_path: Path, small_config: SmallConfig, workers: int) -> None:
    write_datalist(tmp_path / "l.json", [{"image": str(tmp_path / "none.nii.gz"), "shape": [12] * 3}])
    with pytest.raises(BadInput, match="none of its 1 volumes can be used; the first: .*no such file"):
        next(iter(TrainLoader(small_config(f"train.num_workers={workers}"), read_datalist(tmp_path / "l.json"))))


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_a_killed_loader_process_ends_the_run_with_its_reason(
    real_list: Path, small_config: SmallConfig, delay_s: float
) -> None:
    """At whatever it was: computing, sending a batch, or handing over its shared memory."""
    loader = TrainLoader(small_config("train.num_workers=2"), read_datalist(real_list))
    batches = iter(loader)
    next(batches)
    workers = multiprocessing.active_children()
    time.sleep(delay_s)
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(BadInput, match=r"loader process \d+ was ended by SIGKILL: .*train.num_workers"):
        for _ in range(50):
            next(batches)
    assert not multiprocessing.active_children(), "the other one goes with it"


def test_a_mapped_file_that_is_cut_short_is_the_reason_given(real_list: Path, small_config: SmallConfig) -> None:
    batches = iter(TrainLoader(small_config("train.num_workers=1"), read_datalist(real_list)))
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGBUS)
    with pytest.raises(BadInput, match="was ended by SIGBUS: a file of the cache folder was cut short"):
        for _ in range(50):
            next(batches)


class _TooLarge:
    def __reduce__(self) -> str:
        raise MemoryError


def test_a_loader_process_without_memory_for_an_answer_ends_without_a_trace(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="loader process .* ended with code 0: most likely memory ran out"):
        next(compute_in_order(lambda _: _TooLarge(), itertools.repeat(0), 1))
    assert capfd.readouterr().err == ""


def _third_fails(error: Exception, request: int) -> int:
    if request == 3:
        raise error
    return request * request


def test_what_a_user_can_mend_is_raised_here_with_its_place() -> None:
    answers = compute_in_order(partial(_third_fails, BadInput("the third")), itertools.count(), num_workers=2)
    assert [next(answers) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(BadInput, match="the third") as caught:
        next(answers)
    assert "in _third_fails" in caught.value.__notes__[0]


def test_an_error_that_nobody_foresaw_ends_the_loader_and_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    answers = compute_in_order(partial(_third_fails, KeyError("the third")), itertools.count(), num_workers=2)
    assert [next(answers) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(RuntimeError, match=r"process \d+ ended with an error that nobody foresaw; it stands above: `dinov2"):
        next(answers)
    said = capfd.readouterr().err
    assert "in _third_fails" in said and "KeyError: 'the third'" in said


def test_a_loader_process_that_ignores_signals_ends_with_the_program() -> None:
    """An iterator that is still referred to must not keep the program from ending."""
    code = (
        "import itertools, os, signal, time\n"
        "from dinov2.data.workers import compute_in_order\n"
        "answers = compute_in_order(lambda i: (os.getpid(), os.kill(os.getpid(), signal.SIGTERM))[0], itertools.count(), 2)\n"
        "print(next(answers), next(answers))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert not [pid for pid in run.stdout.split() if Path(f"/proc/{pid}").exists()]


def test_what_is_kept_in_memory_is_shared_by_the_processes_of_a_rank(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    entries = [Entry(f"{i}.nii", (64, 64, 32)) for i in range(40)] + [Entry("film.nii", (64, 64, 32, 10))]
    listed = Datalist(entries, "", "list.json")  # 50 volumes of 0.25 MiB
    assert store_share(10 * 2**20, 0, listed) == 10 * 2**20
    assert store_share(10 * 2**20, 5, listed) == 2 * 2**20
    assert not caplog.messages
    assert store_share(10 * 2**20, 10, listed) == 0  # a process would find one volume in 12
    assert "1 MiB for each of 10 loader processes is 8.0 % of the list" in caplog.text
    caplog.clear()
    assert store_share(0, 10, listed) == 0 and not caplog.messages


def test_the_store_keeps_to_its_size(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.nii.gz", noise(12, 12, 12, seed=i)) for i in range(4)]
    one = VolumeStore([entry(paths[0])], 2**30).get(0, np.random.default_rng(0)).voxels.nbytes
    store = VolumeStore([entry(p) for p in paths], int(2.5 * one))
    first = [store.get(i, np.random.default_rng(0)).voxels for i in (0, 1, 2, 2, 1, 0)]
    assert store._bytes <= 2.5 * one and len(store._kept) == 2
    assert torch.equal(first[0], first[5]) and first[2] is first[3]
    assert first[1] is first[4]
