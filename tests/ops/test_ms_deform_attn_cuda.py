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


@needs_gcc
@pytest.mark.parametrize("channels", [1, 5, 40])
def test_lanes_on_the_host_touch_only_their_memory_and_agree_with_the_operator(tmp_path: Path, channels: int) -> None:
    sanitize = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run(
        "g++",
        "-std=c++17",
        *sanitize,
        "-Wall",
        "-Werror",
        f"-I{SOURCES}",
        ROOT / "tests/ops/lanes_test.cpp",
        "-o",
        tmp_path / "t",
    )
    args = make_arguments(channels=channels)
    with torch.no_grad():
        args[2][0, 0, 0, 0, 0, 0] = float("nan")
        args[2][0, 1, 0, 0, 0, 1] = 1e300
        args[2][0, 2] = 1.0 - 0.5 / 12  # exact centres, also the last
    value, shapes, locations, _ = args
    out = ms_deform_attn_3d(*args)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    sizes = [value.shape[0], *value.shape[1:], locations.shape[1], len(shapes), locations.shape[4]]
    numbers = [n for shape in shapes for n in shape] + [x for t in (*tensors(args), grad) for x in t.flatten().tolist()]
    lines = run(tmp_path / "t", text=" ".join(map(repr, sizes + numbers))).splitlines()
    for line, expected in zip(lines, (out, *gradients(out, args)), strict=True):
        got = torch.tensor([float(x) for x in line.split()], dtype=torch.float64)
        torch.testing.assert_close(got, expected.detach().flatten())


def on_gpu(arguments: Arguments) -> Arguments:
    return tuple(x.detach().cuda().requires_grad_() if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.gpu
def test_a_gpu_runs_the_cuda_kernels() -> None:
    assert cuda_kernels()[0], cuda_kernels()[1]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 20, 32, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cuda_agrees_with_the_cpu_and_with_the_reference(dtype: torch.dtype, channels: int) -> None:
    """Sums of float32 in another order: 1e-4; a half-precision value or result may round to its other neighbour: eps."""
    eps = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, torch.finfo(dtype).eps)
    args = make_arguments(queries=300, channels=channels, dtype=dtype)
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
