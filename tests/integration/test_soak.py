"""`scripts/soak` in its short form."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import ROOT
from tests.soak.rounds import TELLTALE


@pytest.mark.slow
def test_killed_programs_make_what_undisturbed_ones_do_and_leave_nothing() -> None:
    """The two that are quick to start; `scripts/soak` has all six."""
    words = ["--kills", "12", "--minutes", "2", "--only", "cache,index"]
    said = subprocess.run([ROOT / "scripts" / "soak", *words], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    name, kills, compared, *bad = (cell.strip() for cell in said.stdout.splitlines()[4].strip("|").split("|"))
    assert (name, bad) == ("all", ["0", "0", "0"]) and int(kills) > 0 and int(compared) > 0, said.stdout


@pytest.mark.parametrize("name", [".tmp.list.json", ".tmp.12.f.parquet", ".incomplete-3", "ab/.0f3a.tmp"])
def test_half_written_names_are_known_for_leftovers(name: str) -> None:
    assert TELLTALE.search(name)
