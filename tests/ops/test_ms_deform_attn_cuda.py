"""The CUDA kernels: compiled by nvcc, their arithmetic run on the host under sanitizers, and, on a GPU, against the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from dinov2.ops import cuda_kernels, ms_deform_attn_3d, ms_deform_attn_3d_reference
from tests.conftest import ROOT
from tests.ops.arguments import Arguments, gradients, make_arguments, tensors

SOURCES = ROOT / "csrc" / "ms_deform_attn_3d"
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc (CUDA toolkit)")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def run(*command: str | Path, text: str | None = None) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, input=text)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_nvcc
def test_the_kernels_compile_for_every_architecture_without_a_warning(tmp_path: Path) -> None:
    targets = [w for sm in (80, 90, 100) for w in ("-gencode", f"arch=compute_{sm},code=sm_{sm}")]
    options = ["-std=c++17", "-O3", *COMMON_NVCC_FLAGS, "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    run(NVCC, *options, *targets, "-fatbin", SOURCES / "cuda" / "kernels.cu", "-o", tmp_path / "kernels.fatbin")


@needs_nvcc
@needs_gcc
def test_the_cuda_binding_is_well_typed(tmp_path: Path) -> None:
    """Against this torch's headers; a CPU build lacks one of them, which says how torch itself was built."""
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    torch_headers = Path(torch.__file__).parent / "include"
    folders = [torch_headers, torch_headers / "torch/csrc/api/include", tmp_path, sysconfig.get_paths()["include"]]
    includes = [word for folder in folders for word in ("-isystem", folder)]
    checks = ["-std=c++20", "-Xcompiler", "-Wall,-Werror,-fsyntax-only"]  # nvcc hands it to g++ with the toolkit's headers
    run(NVCC, *checks, *includes, "-c", SOURCES / "cuda" / "binding.cpp", "-o", tmp_path / "binding.o")


@pytest.fixture(scope="module")
def host_programs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """`lanes_test.cpp` under sanitizers, by the channels that a lane takes at once."""
    folder = tmp_path_factory.mktemp("lanes")
    sanitize = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    programs = {width: folder / f"width_{width}" for width in (1, 4)}
    for width, program in programs.items():
        options = ["-std=c++17", *sanitize, "-Wall", "-Werror", f"-DWIDTH={width}", f"-I{SOURCES}"]
        run("g++", *options, ROOT / "tests/ops/lanes_test.cpp", "-o", program)
    return programs


def along_lines(arguments: Arguments) -> Arguments:
    """The second half of each head's queries follow each other along D, a third of a voxel of the first level apart."""
    locations = arguments[2]
    with torch.no_grad():
        half = locations.shape[1] // 2
        steps = (torch.arange(locations.shape[1] - half) % 36).to(locations.dtype) / (3 * arguments[1][0][2]) - 0.3
        locations[:, half:, ..., :2] = locations[:, half : half + 1, ..., :2]
        locations[:, half:, ..., 2] = steps[:, None, None, None] + 0.02 * locations[:, half : half + 1, ..., 2]
    return arguments


def as_text(arguments: Arguments, grad: Tensor) -> str:
    value, shapes, locations, _ = arguments
    sizes = [value.shape[0], *value.shape[1:], locations.shape[1], len(shapes), locations.shape[4]]
    numbers = [n for shape in shapes for n in shape] + [x for t in (*tensors(arguments), grad) for x in t.flatten().tolist()]
    return " ".join(map(repr, sizes + numbers))


@needs_gcc
@pytest.mark.parametrize(
    "channels, width, run_of", [(1, 1, 0), (5, 1, 0), (40, 1, 0), (5, 1, 1), (4, 4, 5), (40, 4, 1), (40, 4, 16), (132, 4, 7)]
)
def test_lanes_on_the_host_touch_only_their_memory_and_agree_with_the_operator(
    host_programs: dict[int, Path], channels: int, width: int, run_of: int
) -> None:
    args = along_lines(make_arguments(channels=channels, queries=24))
    with torch.no_grad():
        args[2][0, 0, 0, 0, 0, 0] = float("nan")
        args[2][0, 1, 0, 0, 0, 1] = 1e300
        args[2][0, 2] = 1.0 - 0.5 / 12  # exact centres, also the last
    out = ms_deform_attn_3d(*args)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    lines = run(host_programs[width], str(run_of), text=as_text(args, grad)).splitlines()
    for line, expected in zip(lines, (out, *gradients(out, args)), strict=True):
        got = torch.tensor([float(x) for x in line.split()], dtype=torch.float64)
        torch.testing.assert_close(got, expected.detach().flatten())


@needs_gcc
def test_a_run_of_queries_adds_to_memory_once_for_each_voxel_that_it_passes(host_programs: dict[int, Path]) -> None:
    """Twelve queries a quarter of a voxel apart along D pass through 3 cells, so 4 faces of 4 voxels; each alone has 8."""
    shape, channels = (4, 4, 8), 4
    args = make_arguments(1, [shape], queries=12, heads=1, channels=channels, points=1)
    with torch.no_grad():
        places = torch.arange(12, dtype=torch.float64) / 4 + 1.1  # 1.1 to 3.85: cells 1 to 3
        args[2][0, :, 0, 0, 0] = torch.stack([torch.full((12,), 0.4), torch.full((12,), 0.4), (places + 0.5) / shape[2]], -1)
    grad = torch.ones(1, 12, channels, dtype=torch.float64)
    for run_of, additions in ((1, 12 * 8), (12, 4 * 4)):
        command = [str(host_programs[4]), str(run_of)]
        result = subprocess.run(command, input=as_text(args, grad), capture_output=True, text=True, check=True)
        assert int(result.stderr) == additions


def on_gpu(arguments: Arguments) -> Arguments:
    return tuple(x.detach().cuda().requires_grad_() if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.gpu
def test_a_gpu_runs_the_cuda_kernels() -> None:
    assert cuda_kernels()[0], cuda_kernels()[1]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 4, 20, 32, 70, 264])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cuda_agrees_with_the_cpu_and_with_the_reference(dtype: torch.dtype, channels: int) -> None:
    """Sums of float32 in another order: 1e-4; a half-precision value or result may round to its other neighbour: eps."""
    eps = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, torch.finfo(dtype).eps)
    args = along_lines(make_arguments(queries=300, channels=channels, dtype=dtype))
    with torch.no_grad():
        args[2][0, 0, 0, 0, 0, 0] = float("nan")
    out = ms_deform_attn_3d(*args)
    expected = (out, *gradients(out, args))
    for operator in (ms_deform_attn_3d, ms_deform_attn_3d_reference):
        moved = on_gpu(args)
        on_device = operator(*moved)
        for got, wanted in zip((on_device, *gradients(on_device, moved)), expected, strict=True):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got.cpu(), wanted, rtol=eps, atol=eps)


@pytest.mark.gpu
def test_cuda_takes_memory_that_vectors_cannot_be_read_from() -> None:
    args = on_gpu(make_arguments(channels=32, dtype=torch.float32))
    shifted = torch.empty(args[0].numel() + 1, device="cuda")[1:].view(args[0].shape).copy_(args[0].detach()).requires_grad_()
    assert shifted.is_contiguous() and shifted.data_ptr() % 16
    out, expected = ms_deform_attn_3d(shifted, *args[1:]), ms_deform_attn_3d(*args)
    torch.testing.assert_close(out, expected)
    for got, wanted in zip(gradients(out, (shifted, *args[1:])), gradients(expected, args), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.gpu
def test_cuda_sums_many_queries_of_many_blocks() -> None:
    """Enough of them that blocks take several turns, and groups runs of several queries."""
    args = make_arguments(2, [(9, 8, 7)], queries=30_000, heads=8, channels=32, points=2, dtype=torch.float32)
    args = on_gpu(along_lines(args))
    out, expected = ms_deform_attn_3d(*args), ms_deform_attn_3d_reference(*args)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(gradients(out, args), gradients(expected, args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cuda_takes_permuted_memory_and_empty_batches() -> None:
    args = on_gpu(make_arguments(dtype=torch.float32))
    permuted = [x if isinstance(x, list) else x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in args]
    torch.testing.assert_close(ms_deform_attn_3d(*permuted), ms_deform_attn_3d(*args))
    empty = on_gpu(make_arguments(batch=0))
    assert ms_deform_attn_3d(*empty).shape == (0, 6, 10)
    with pytest.raises(ValueError, match="must be on cuda:0 as value is, got cpu"):
        ms_deform_attn_3d(args[0], args[1], args[2].cpu(), args[3])


@pytest.mark.gpu
def test_cuda_counts_beyond_two_to_the_31() -> None:
    shape, heads, channels = (512, 256, 260), 2, 32
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    value = torch.zeros(1, shape[0] * shape[1] * shape[2], heads, channels, dtype=torch.float16, device="cuda")
    assert value.numel() > 2**31
    value[0, -1, -1] = 3.0
    value.requires_grad_()
    last = [(n - 0.5) / n for n in shape]
    locations = torch.tensor(last, device="cuda").expand(1, 1, heads, 1, 1, 3)
    out = ms_deform_attn_3d(value, [shape], locations, torch.ones(1, 1, heads, 1, 1, device="cuda"))
    torch.testing.assert_close(
        out[0, 0, channels:], torch.full((channels,), 3.0, dtype=torch.float16, device="cuda"), rtol=1e-3, atol=0
    )
    out.sum().backward()
    assert (value.grad[0, -1] > 0.99).all() and value.grad[0, 0].abs().max() == 0


def with_a_level_of_zeros(arguments: Arguments, num_voxels: int) -> Arguments:
    """The same results from one level more, the first, whose points are nowhere."""
    value, shapes, locations, weights = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
    large = value.new_zeros(value.shape[0], num_voxels + value.shape[1], *value.shape[2:])
    large[:, num_voxels:] = value
    nowhere = torch.full_like(locations[:, :, :, :1], float("nan"))
    locations = torch.cat([nowhere, locations], 3)
    weights = torch.cat([torch.ones_like(weights[:, :, :, :1]), weights], 3)
    levels = [(num_voxels, 1, 1), *shapes]
    return large.requires_grad_(), levels, locations.requires_grad_(), weights.requires_grad_()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 20, 32, 264])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cuda_kernels_for_any_size_agree_with_those_for_less_than_two_to_the_31(dtype: torch.dtype, channels: int) -> None:
    """A level of zeros that no point lies in makes the same volume one that the vectorised kernels do not take."""
    args = on_gpu(along_lines(make_arguments(1, queries=300, channels=channels, dtype=dtype)))
    zeros = 2**31 // (args[0].shape[2] * channels) + 1
    needed = 2**31 * (2 * dtype.itemsize + (0 if dtype.itemsize > 2 else 4)) + 4 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    large = with_a_level_of_zeros(args, zeros)
    out, expected = ms_deform_attn_3d(*large), ms_deform_attn_3d(*args)
    eps = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(out, expected, rtol=eps, atol=eps)
    value, locations, weights = gradients(out, large)
    assert not value[:, :zeros].any() and not locations[:, :, :, 0].any() and not weights[:, :, :, 0].any()
    parts = (value[:, zeros:], locations[:, :, :, 1:], weights[:, :, :, 1:])
    for got, wanted in zip(parts, gradients(expected, args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=eps, atol=eps)
