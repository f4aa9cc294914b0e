"""Beside other programs: how OpenMP's threads wait, decided before torch is loaded; the load, said at the start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dinov2.data.loaders import load_line
from tests.conftest import ROOT

PROGRAMS = ["train/train3d", "eval/linear3d", "eval/segmentation3d", "eval/knn", "eval/log_regression", "eval/regression"]

# runs a program up to where torch would be imported, and says what OpenMP would find
STOP_AT_TORCH = """
import os, runpy, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def found_by_openmp(program: str, **settings: str) -> str:
    without = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", STOP_AT_TORCH, program, "doctor"]
    return subprocess.run(command, cwd=ROOT, env={**without, **settings}, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("program", [*(f"dinov2/{name}.py" for name in PROGRAMS), "dinov2/__main__.py"])
def test_a_programs_threads_sleep_while_they_wait(program: str) -> None:
    assert found_by_openmp(program) == "passive None\n"


def test_a_users_own_setting_wins() -> None:
    assert found_by_openmp("dinov2/train/train3d.py", OMP_WAIT_POLICY="active") == "active None\n"
    assert found_by_openmp("dinov2/train/train3d.py", GOMP_SPINCOUNT="100") == "None 100\n"


def test_a_busy_machine_is_said_to_be_one() -> None:
    assert load_line(0.3, 4, 2) == "load of this machine 0.3 on 4 cores, 2 loader processes to start"
    assert "other programs use them" in load_line(2.0, 4, 2)
