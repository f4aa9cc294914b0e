"""Installed from a wheel, and beside a package of the same name."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


def python(code: str, *paths: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_wheel_holds_the_package_its_yaml_files_and_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("dinov2_3d-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"dinov2/recipes/pretrain/{p.name}" for p in (ROOT / "configs" / "pretrain").glob("*.yaml")}
    assert recipes | {"dinov2/configs/ssl3d_default_config.yaml", "dinov2/configs/train/vit3d_highres.yaml"} <= names
    assert "dinov2_3d.py" in names and not any(n.startswith("tests") for n in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import sys, dinov2_3d; sys.argv = ['dinov2', 'config', 'check', 'pretrain/tiny_cpu']; sys.exit(dinov2_3d.main())"
    result = python(code, tmp_path / "site", cwd=tmp_path)
    assert result.returncode == 0 and "2000 iterations" in result.stdout, result.stderr


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
