"""Installed from a wheel, and beside a package of the same name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests.conftest import ROOT


def python(code: str, *paths: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def wheel(tmp_path: Path, **environment: str) -> Path:
    """The wheel of the last commit, unpacked."""
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja lies beside python
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, env={**os.environ, "PATH": path, **environment})
    (file,) = tmp_path.glob("dinov2_3d-*.whl")
    zipfile.ZipFile(file).extractall(tmp_path / "site")
    return tmp_path / "site"


SHOW_OPERATORS = "from dinov2.ops import compiled_operators as c; print(*c())"
CHECK = "import sys, dinov2_3d; sys.argv = ['dinov2', 'config', 'check', 'pretrain/tiny_cpu']; sys.exit(dinov2_3d.main())"


@pytest.mark.slow
def test_a_wheel_holds_the_package_its_yaml_files_the_command_and_the_operators(tmp_path: Path) -> None:
    site = wheel(tmp_path)
    names = {str(p.relative_to(site)) for p in site.rglob("*")}
    recipes = {f"dinov2/recipes/pretrain/{p.name}" for p in (ROOT / "configs" / "pretrain").glob("*.yaml")}
    assert recipes | {"dinov2/configs/ssl3d_default_config.yaml", "dinov2/configs/train/vit3d_highres.yaml"} <= names
    assert "dinov2/sharing/standalone/modeling_dinov2_3d.py" in names  # data, though it is code
    assert {"LICENSE", "NOTICE", "NIIVUE_LICENSE"} <= {p.name for p in (next(site.glob("*.dist-info")) / "licenses").rglob("*")}
    assert "dinov2_3d.py" in names and not any(n.startswith("tests") for n in names)
    result = python(CHECK, site, cwd=tmp_path)
    assert result.returncode == 0 and "2000 iterations" in result.stdout, result.stderr
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    assert python(SHOW_OPERATORS, site, cwd=tmp_path).stdout.startswith("True dinov2._C_torch_")
    (library,) = (site / "dinov2").glob("_C_torch_*.so")
    library.rename(library.with_name(library.name.replace("_C_torch_2", "_C_torch_1")))
    assert "False compiled for torch 1." in python(SHOW_OPERATORS, site, cwd=tmp_path).stdout


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_works_in_plain_torch(tmp_path: Path) -> None:
    site = wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert not list((site / "dinov2").glob("*.so"))
    assert python(SHOW_OPERATORS, site, cwd=tmp_path).stdout.startswith("False not compiled")
    crops = "import torch; from dinov2.data import DataAugmentationDINO3d as A; print(*A()(torch.rand(1, 9, 9, 9), 0))"
    assert python(crops, site, cwd=tmp_path).stdout == "global_crops local_crops\n"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_cuda_kernels_that_are_asked_for_and_cannot_be_built_are_an_error_of_one_line() -> None:
    environment = {**os.environ, "FORCE_CUDA": "1"}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.strip() == ("dinov2-3d: FORCE_CUDA=1, but this torch is a CPU-only build: install one for CUDA")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has NVIDIA's tools")
def test_the_gpu_check_without_a_gpu_says_so_in_one_line() -> None:
    result = subprocess.run(["scripts/gpu_check"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "gpu_check: no NVIDIA GPU here (nvidia-smi finds none): nothing was run\n"


@pytest.mark.slow
def test_what_the_gpu_check_measures_can_be_measured() -> None:
    sections = "machine,eager,attention,segmentation,embed,probe,nccl"
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--sections",
        sections,
        "--minutes",
        "30",
    ]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for row in (
        "| step, bf16, compile=false, 2 volumes | ",
        "bfloat16, backward | ",
        "| sliding window over ",
        " scans/s with ",
        "| linear probe, 52 heads",
        "differs from one process by 0.0e+00",
    ):
        assert row in result.stdout


def test_a_section_that_crashes_or_hangs_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    fates = {"raises": lambda report, args: 1 / 0, "dies": lambda report, args: os.kill(os.getpid(), signal.SIGKILL)}
    fates |= {"hangs": lambda report, args: time.sleep(600), "works": lambda report, args: report.row("a", "b", c=2.5)}
    monkeypatch.setattr(gpu, "SECTIONS", {name: (fate, 3, 0) for name, fate in fates.items()})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--output", str(tmp_path / "rows.json"), "--sections"])
    sys.argv.append("raises,dies,hangs,works")
    assert gpu.main() == 1
    out, err = capfd.readouterr()
    assert "ZeroDivisionError" in err
    ends = [line.split("; ")[-1].rstrip(" |") for line in out.splitlines() if line.startswith("| section ")]
    assert ends[:3] == ["failed (exit code 1)", f"failed (exit code -{int(signal.SIGKILL)})", "stopped after 3 s"]
    assert "| a | b |" in out and gpu.Report(tmp_path / "rows.json").figure("c") == 2.5


def test_metas_package_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "dinov2").mkdir()
    (tmp_path / "dinov2" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    result = python("import sys, dinov2_3d; sys.exit(dinov2_3d.main())", tmp_path, ROOT, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert str(tmp_path / "dinov2") in result.stderr and "Meta's DINOv2" in result.stderr and "PYTHONPATH" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["dinov2/train/train3d.py", "--help"], ["-m", "dinov2", "train", "--help"]])
def test_the_program_starts_without_being_installed(arguments: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "--config-file" in result.stdout
