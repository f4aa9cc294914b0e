"""Three ways to apply one plan, held together: MONAI, the compiled operators, and their plain PyTorch form."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2.data import DataAugmentationDINO3d
from dinov2.data.augmentation import fast as apply_fast
from dinov2.data.augmentation import monai as apply_monai
from dinov2.data.augmentation import plan as ap
from dinov2.data.preprocess import INT16_SCALE
from dinov2.ops import augmentation as ops
from dinov2.ops import compiled_operators
from tests.conftest import ROOT
from tests.ops.arguments import CalledOperators

IMPLEMENTATIONS = ("monai", "compiled", "torch")
needs_compiled = pytest.mark.skipif(not compiled_operators()[0], reason=compiled_operators()[1])
Apply = Callable[..., Tensor]


@pytest.fixture(params=["monai", pytest.param("compiled", marks=needs_compiled), "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(ops, "COMPILED_FOR", frozenset())
    return request.param


@pytest.fixture
def apply_crop(implementation: str) -> Apply:
    return apply_monai.apply_crop if implementation == "monai" else apply_fast.apply_crop


@pytest.fixture
def apply_intensity(implementation: str) -> Apply:
    if implementation == "monai":
        return apply_monai.apply_intensity
    return lambda x, step: apply_fast.apply_intensity_(x.clone(), step)


@pytest.fixture(params=[pytest.param("compiled", marks=needs_compiled), "torch"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Apply:
    """The fast back end in either implementation."""
    if request.param == "torch":
        monkeypatch.setattr(ops, "COMPILED_FOR", frozenset())
    return apply_fast.apply_crop


def voxels(*shape: int, seed: int = 0) -> Tensor:
    """[1, H, W, D] int16: smooth structure and noise, over the whole range."""
    rng = np.random.default_rng(seed)
    wave = sum(np.sin(2 * np.pi * (3 * g / n)) for g, n in zip(np.indices(shape), shape, strict=True)) / 3
    values = np.clip(wave + 0.2 * rng.standard_normal(shape), -1, 1)
    return torch.from_numpy(np.rint(values * 32767).astype(np.int16))[None]


def test_a_crop_is_the_box_resized_flipped_and_turned(apply_crop: Apply) -> None:
    x = torch.arange(6 * 5 * 4, dtype=torch.float32).view(1, 6, 5, 4)
    box = ap.Box((1, 0, 1), (5, 4, 3))
    plan = ap.CropPlan(box, 8, (0, 2), (((0, 1), 1), ((1, 2), 3)), ())
    cut = x[:, 1:5, 0:4, 1:3]
    expected = torch.nn.functional.interpolate(cut[None], size=(8, 8, 8), mode="trilinear", align_corners=False)[0]
    expected = torch.rot90(torch.rot90(expected.flip(1, 3), 1, (1, 2)), 3, (2, 3))
    torch.testing.assert_close(apply_crop(x, plan), expected)


def test_intensity_steps_do_what_their_names_say(apply_intensity: Apply) -> None:
    x = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    unit = (x - x.min()) / (x.max() - x.min())
    gamma = apply_intensity(x, ap.Gamma(2.0))
    torch.testing.assert_close(gamma, unit**2 * (x.max() - x.min()) + x.min(), atol=1e-5, rtol=0)
    noisy = apply_intensity(x, ap.Noise(0.002, 5))
    assert 0.0015 < float((noisy - x).std()) < 0.0025
    torch.testing.assert_close(noisy, apply_intensity(x, ap.Noise(0.002, 5)))
    same = ap.HistogramShift(tuple(np.linspace(0, 1, 10)))
    torch.testing.assert_close(apply_intensity(x, same), x, atol=1e-5, rtol=0)
    bent = apply_intensity(x, ap.HistogramShift((0.0, 0.9, *np.linspace(0.9, 1, 8))))
    assert float(bent.mean()) > float(x.mean()) and float(bent.max()) == pytest.approx(float(x.max()))
    constant = torch.ones(1, 8, 8, 8)
    torch.testing.assert_close(apply_intensity(constant, same), constant)
    assert apply_intensity(x, ap.Smooth((1.0, 1.0, 1.0))).std() < x.std() / 2
    assert apply_intensity(x, ap.Sharpen((0.5,) * 3, (0.5,) * 3, 20.0)).std() > x.std()
    assert apply_intensity(x, ap.Gibbs(0.7)).std() < apply_intensity(x, ap.Gibbs(0.3)).std() < x.std()


# ---------------------------------------------------------------------- the fast back end against MONAI


def assert_like_monai(volume: Tensor, crop: ap.CropPlan, fast: Apply) -> None:
    """A plan's geometry, then every intensity step from the reference's input; noise is compared elsewhere.

    Tolerances: float32 rounding of a position in a volume of 300 voxels is 1e-5 of a voxel, a step of up to 2 in value; a
    sharpening multiplies what differs by up to 60.
    """
    geometry = dataclasses.replace(crop, intensity=())
    expected = apply_monai.apply_crop(volume, geometry)
    torch.testing.assert_close(fast(volume, geometry), expected, atol=5e-5, rtol=0)
    for step in crop.intensity:
        if isinstance(step, ap.Noise):
            continue
        result = apply_fast.apply_intensity_(expected.clone(), step)
        expected = apply_monai.apply_intensity(expected, step)
        torch.testing.assert_close(result, expected, atol=2e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def test_hundreds_of_plans_give_the_references_crops(fast: Apply) -> None:
    shapes = [(70, 61, 40), (33, 90, 25), (24, 20, 130), (7, 5, 3)]
    augmentation = DataAugmentationDINO3d(local_crops_number=2, global_crops_size=32, local_crops_size=20)
    kinds: dict[str, int] = {}
    for seed in range(240):
        volume = voxels(*shapes[seed % len(shapes)], seed=seed)
        plan = augmentation.plan(tuple(volume.shape[1:]), np.random.default_rng(seed))
        for crop in (*plan.global_crops, *plan.local_crops):
            assert_like_monai(volume, crop, fast)
            for step in crop.intensity:
                kinds[type(step).__name__] = kinds.get(type(step).__name__, 0) + 1
    assert min(kinds.values()) >= 20 and len(kinds) == 6, kinds


@pytest.mark.parametrize("n", [1, 2, 7, 8, 24, 33])
def test_gibbs_noise_is_the_references_whatever_is_cut(n: int) -> None:
    """Most frequencies or few, odd and even sizes: only those that stay are transformed."""
    x = torch.randn(1, n, n, n, generator=torch.Generator().manual_seed(n))
    for alpha in (0.0, *np.linspace(0.01, 0.99, 15).tolist(), 1.0):
        expected = apply_monai.apply_intensity(x, ap.Gibbs(alpha))
        torch.testing.assert_close(ops.gibbs_(x.clone(), alpha), expected, atol=5e-6, rtol=0)
    assert ops._gibbs_mask(96, 0.7).shape == (41, 41, 21) and ops._gibbs_mask(96, 0.1).shape == (96, 96, 49)


def test_small_rotations_are_the_references_and_turn_about_the_box(fast: Apply) -> None:
    shapes = [(70, 61, 40), (33, 90, 25), (7, 5, 3)]
    augmentation = DataAugmentationDINO3d(local_crops_number=2, global_crops_size=24, local_crops_size=11, rotate_range=0.4)
    for seed in range(60):
        volume = voxels(*shapes[seed % len(shapes)], seed=seed)
        plan = augmentation.plan(tuple(volume.shape[1:]), np.random.default_rng(seed))
        for crop in (*plan.global_crops, *plan.local_crops):
            assert all(0 < abs(angle) <= 0.4 for angle in crop.angles)
            assert_like_monai(volume, dataclasses.replace(crop, intensity=()), fast)
    volume = voxels(40, 40, 40).float() / 32767
    quarter = ap.CropPlan(ap.Box((4, 6, 8), (24, 26, 28)), 20, (), (), (), (0.0, 0.0, np.pi / 2))
    inside = volume[0, 4:24, 6:26, 8:28]
    torch.testing.assert_close(fast(volume, quarter)[0], torch.rot90(inside, -1, (0, 1)), atol=1e-5, rtol=0)


@needs_compiled
@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=st.tuples(*[st.integers(1, 40)] * 3), size=st.integers(1, 35), is_float=st.booleans())
def test_any_box_size_and_turn_is_the_references(
    data: st.DataObject, shape: tuple[int, int, int], size: int, is_float: bool
) -> None:
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    flips = tuple(data.draw(st.sets(st.integers(0, 2))))
    turns = tuple((plane, data.draw(st.integers(0, 3))) for plane in ap.ROTATION_PLANES)
    volume = voxels(*shape)
    volume = volume.float() / 32767 if is_float else volume
    crop = ap.CropPlan(ap.Box(start, stop), size, flips, turns, ())
    expected = apply_monai.apply_crop(volume, crop)
    torch.testing.assert_close(apply_fast.apply_crop(volume, crop), expected, atol=2e-5, rtol=0)


@needs_compiled
def test_a_crop_does_not_depend_on_the_number_of_threads() -> None:
    volume = voxels(120, 100, 90)
    augmentation = DataAugmentationDINO3d(local_crops_number=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append([augmentation(volume, seed=s) for s in range(6)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))


@needs_compiled
def test_kernels_for_other_processors_hold_too() -> None:
    """The same plans with the instruction sets that AVX2 machines never take."""
    environment = {**os.environ, "DINOV2_GENERIC_KERNELS": "1"}
    tests = [f"{__file__}::{test_hundreds_of_plans_give_the_references_crops.__name__}", "-k", "compiled"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout


def test_noise_is_normal_and_a_function_of_its_seed(implementation: str, apply_intensity: Apply) -> None:
    x = torch.zeros(1, 40, 40, 43)
    noise, again, other = (apply_intensity(x, ap.Noise(0.5, seed)) for seed in (7, 7, 8))
    assert torch.equal(noise, again)
    n = noise.numel()
    for values in (noise, other):
        assert scipy.stats.kstest((values / 0.5).flatten().double().numpy(), "norm").pvalue > 1e-3
        flat = values.flatten() / 0.5
        for lag in (1, 2, 3, 8, 16, 32, 43, 40 * 43):
            assert abs(float((flat[:-lag] * flat[lag:]).mean())) < 5 / n**0.5, lag
    assert abs(float((noise * other).mean() / 0.25)) < 5 / n**0.5
    assert float(noise.abs().max()) > 0.5 * 4  # of 68,800 numbers, 4 are beyond four standard deviations


def test_a_constant_crop_stays_as_it_is(apply_intensity: Apply) -> None:
    constant = torch.full((1, 9, 9, 9), 0.25)
    for step in (ap.Gamma(0.7), ap.HistogramShift(tuple(np.linspace(0, 1, 10) ** 2))):
        torch.testing.assert_close(apply_intensity(constant, step), constant)


BAD_CALLS = [
    (lambda v: ops.crop_resize(v[0], (0, 0, 0), (4, 4, 4), 4, (0, 1, 2), (0, 0, 0)), r"must be \[1, H, W, D\]"),
    (lambda v: ops.crop_resize(v.double(), (0, 0, 0), (4, 4, 4), 4, (0, 1, 2), (0, 0, 0)), "int16 or float32"),
    (lambda v: ops.crop_resize(v, (0, 0, 0), (4, 4, 9), 4, (0, 1, 2), (0, 0, 0)), "leaves the volume"),
    (lambda v: ops.crop_resize(v, (2, 0, 0), (2, 4, 4), 4, (0, 1, 2), (0, 0, 0)), "is empty"),
    (lambda v: ops.crop_resize(v, (0, 0, 0), (4, 4, 4), 4, (0, 0, 2), (0, 0, 0)), "permutation"),
    (lambda v: ops.crop_resize(v, (0, 0), (4, 4, 4), 4, (0, 1, 2), (0, 0, 0)), "three numbers each"),
    (lambda v: ops.crop_resize(v, (0, 0, 0), (4, 4, 4), 0, (0, 1, 2), (0, 0, 0)), "size must be at least 1"),
    (lambda v: ops.crop_resize(v.transpose(1, 3), (0, 0, 0), (4, 4, 4), 4, (0, 1, 2), (0, 0, 0)), "contiguous"),
    (lambda v: ops.adjust_gamma_(v, 0.5), "crop must be float32"),
    (lambda v: ops.adjust_gamma_(v.float(), 0.0), "gamma must be positive"),
    (lambda v: ops.gaussian_smooth_(v.float(), (1.0, 0.0, 1.0)), "sigma must be positive"),
    (lambda v: ops.gaussian_smooth_(v.float(), (1.0, 1.0)), "sigma must have three numbers"),
    (lambda v: ops.gaussian_sharpen_(v.float(), (1.0, 1.0, 1.0), (1.0, -1.0, 1.0), 1.0), "sigma must be positive"),
    (lambda v: ops.add_gaussian_noise_(v.float().transpose(1, 3), 0.1, 0), "crop must be contiguous"),
    (lambda v: ops.add_gaussian_noise_(v.float()[:, :0], 0.1, 0), r"crop must be \[1, H, W, D\]"),
    (lambda v: ops.shift_histogram_(v.float(), [0.0]), "at least 2"),
]


@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=needs_compiled), False])
@pytest.mark.parametrize("call, words", BAD_CALLS)
def test_the_operators_refuse_what_they_cannot_take_before_any_kernel(
    call: Callable[[Tensor], Tensor], words: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel of either implementation is reached: an exception that crosses C++ has ended a process with one compiler."""
    monkeypatch.setattr(ops, "COMPILED_FOR", frozenset(["cpu"] if is_compiled else []))
    volume = voxels(6, 5, 7)
    called = CalledOperators()
    with pytest.raises(ValueError, match=words), called:
        call(volume)
    assert not called.names


@needs_compiled
def test_the_compiled_operators_check_for_themselves() -> None:
    crop = voxels(6, 5, 7).float()
    with pytest.raises(ValueError, match="gamma must be positive"):
        torch.ops.dinov2.adjust_gamma_(crop, 0.0)
    with pytest.raises(ValueError, match="is empty or leaves the volume"):
        torch.ops.dinov2.crop_resize(crop, (0, 0, 0), (4, 4, 9), 4, (0, 1, 2), (0, 0, 0), 1.0)


@needs_compiled
def test_opcheck() -> None:
    """Schemas, fake kernels and functionalisation, as torch.compile needs them."""
    volume = voxels(9, 8, 7)
    geometry = ((1, 0, 2), (8, 8, 7), 6, (2, 0, 1), (0, 1, 0), INT16_SCALE)
    torch.library.opcheck(torch.ops.dinov2.crop_resize.default, (volume, *geometry))
    torch.library.opcheck(torch.ops.dinov2.crop_resize.default, (volume.float(), *geometry))
    for name, arguments in {
        "adjust_gamma_": (0.7,),
        "shift_histogram_": ([0.0, 0.7, 1.0],),
        "add_gaussian_noise_": (0.1, 5),
        "gaussian_smooth_": ((0.5, 0.7, 0.9),),
        "gaussian_sharpen_": ((0.5, 0.7, 0.9), (0.5,) * 3, 3.0),
    }.items():
        crop = torch.rand(1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
        torch.library.opcheck(getattr(torch.ops.dinov2, name).default, (crop, *arguments))


STEPS = (
    ap.Gamma(0.7), ap.Noise(0.1, 3), ap.HistogramShift((0.0, 0.7, 1.0)), ap.Smooth((0.5, 0.7, 0.9)),
    ap.Sharpen((0.5,) * 3, (0.5,) * 3, 3.0), ap.Gibbs(0.5),
)  # fmt: skip


@needs_compiled
@pytest.mark.slow
def test_a_crop_can_be_compiled_whole() -> None:
    crop = ap.CropPlan(ap.Box((1, 0, 2), (8, 8, 7)), 6, (1,), (((0, 1), 1),), STEPS[:-1])  # Gibbs is no operator

    def two(volume: Tensor) -> Tensor:
        return apply_fast.apply_crop(volume, crop).sin()

    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(voxels(9, 8, 7)), two(voxels(9, 8, 7)))


class Called(TorchDispatchMode):
    """The operators of this package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "dinov2":
            self.names.append(func.name().removeprefix("dinov2::"))
        return func(*args, **(kwargs or {}))


@needs_compiled
@pytest.mark.parametrize("device, is_compiled", [("cpu", True), ("meta", False)])
def test_operators_go_by_the_tensors_device_not_by_what_is_built(device: str, is_compiled: bool) -> None:
    """Tensors without values stand in for a device that is not here; they refuse to be mixed with another's."""
    plan = ap.CropPlan(ap.Box((1, 0, 2), (8, 8, 7)), 6, (1,), (((0, 1), 1),), STEPS)
    ops._squared_distances.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), Called() as called:
        crop = apply_fast.apply_crop(torch.empty(1, 9, 8, 7, dtype=torch.int16, device=device), plan)
    ops._squared_distances.cache_clear()  # tensors without values must not stay in it
    assert crop.device.type == device and crop.shape == (1, 6, 6, 6) and crop.dtype == torch.float32
    expected = {
        "crop_resize",
        "adjust_gamma_",
        "add_gaussian_noise_",
        "shift_histogram_",
        "gaussian_smooth_",
        "gaussian_sharpen_",
    }
    assert set(called.names) == (expected if is_compiled else set())


@pytest.mark.gpu
@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (0.1, 0.2, 0.3)])
def test_a_crop_on_a_gpu_is_that_of_plain_pytorch(angles: ap.Size3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COMPILED_FOR", frozenset())
    plan = ap.CropPlan(ap.Box((1, 0, 2), (8, 8, 7)), 6, (1,), (((0, 1), 1),), STEPS, angles)
    found = apply_fast.apply_crop(voxels(9, 8, 7).cuda(), plan)
    torch.testing.assert_close(found.cpu(), apply_fast.apply_crop(voxels(9, 8, 7), plan), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_crops_come_in_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    volume = voxels(30, 28, 20)
    kwargs = {"global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 2}
    half = DataAugmentationDINO3d(**kwargs, dtype=dtype)(volume, seed=3)
    full = DataAugmentationDINO3d(**kwargs)(volume, seed=3)
    for key in full:
        assert all(torch.equal(h, f.to(dtype)) for h, f in zip(half[key], full[key], strict=True))


def test_an_unknown_back_end_is_refused() -> None:
    with pytest.raises(ValueError, match="one of auto, monai, fast"):
        DataAugmentationDINO3d(backend="gpu")
