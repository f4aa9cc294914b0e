"""The same place in other scans: found whatever their axes and spacing are, in mm of their own world, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dinov2.cli import main
from dinov2.features.retrieval.places import TokenGrid, best_place, window_around
from tests.unit.features.retrieval.tables import hits, write_scan, write_table

SHAPE = (9, 8, 7)
UPRIGHT = np.array([[8.0, 0, 0, -30], [0, 8, 0, -25], [0, 0, 8, -20], [0, 0, 0, 1]])
TURNED = np.array([[0, 0, -6.5, 25], [-7.0, 0, 0, 30], [0, 6.0, 0, -22], [0, 0, 0, 1]])  # axes P, S, L; other steps
MOVED_MM = np.array([4.0, -3.0, 2.0])


def body(points_mm: np.ndarray, width: int = 16) -> np.ndarray:
    """What a network might see at places of one body, [..., E]: waves of 40 to 80 mm, no two places alike."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, width))
    waves = 2 * np.pi * directions / np.linalg.norm(directions, axis=0) / rng.uniform(40, 80, width)
    return np.sin(points_mm @ waves + rng.uniform(0, 6, width)) + 3  # all patches of a scan have something in common


def grid_of(affine: np.ndarray, moved_mm: np.ndarray | float = 0.0, shape: tuple[int, int, int] = SHAPE) -> TokenGrid:
    return TokenGrid.of(body(centres(affine, shape) - moved_mm), affine, "a scan")


def centres(affine: np.ndarray, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """[h, w, d, 3] in mm."""
    return np.stack(np.indices(shape), -1) @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("affine", [UPRIGHT, TURNED], ids=["the same axes", "other axes and steps"])
@pytest.mark.parametrize("place", [(1.0, 2.0, 3.0), (8.0, -6.0, -4.0)])
def test_a_place_is_found_where_the_body_has_moved_to(affine: np.ndarray, place: tuple[float, float, float]) -> None:
    """To the nearest patch centre, the place asked for being none."""
    window = window_around(grid_of(UPRIGHT), np.array(place))
    found, distance = best_place(window, grid_of(affine, MOVED_MM))
    wanted = np.array(place) + MOVED_MM
    nearest = np.linalg.norm(centres(affine) - wanted, axis=-1).min()
    assert np.linalg.norm(found - wanted) < nearest + 2.5 and 0 < distance < 0.35


def test_a_window_that_leaves_the_scan_counts_nothing_there() -> None:
    """Neither an edge repeated nor a place beyond the edge is found."""
    window = window_around(grid_of(UPRIGHT), np.array([-30.0, -25.0, -20.0]))  # the first patch
    assert (np.linalg.norm(window.tokens, axis=1) == 0).sum() > len(window.tokens) / 2
    found, distance = best_place(window, grid_of(UPRIGHT))
    np.testing.assert_allclose(found, [-30, -25, -20], atol=1e-9)
    assert distance > 0.5


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Four scans: one asks, one lies turned and moved, one is another body, the last one's tokens are gone."""
    grids = [(UPRIGHT, 0.0), (TURNED, MOVED_MM), (UPRIGHT, 500.0), (UPRIGHT, 0.0)]
    (tmp_path / "f.patches").mkdir()
    for i, (affine, moved) in enumerate(grids):
        if i < 3:
            np.savez(tmp_path / "f.patches" / f"{i}.npz", patch=body(centres(affine) - moved).astype(np.float32), affine=affine)
        fine = affine @ np.diag([0.5, 0.5, 0.5, 1])
        write_scan(tmp_path / f"{i}.nii", (16, 16, 14), fine, seed=i)
    patches = [f"f.patches/{i}.npz" for i in range(4)]
    return write_table(tmp_path / "f.parquet", np.eye(4), patches=patches, patient=["a", "b", "c", "a"])


def test_places_are_written_in_mm_of_their_own_world(
    table: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = table.with_name("h.html")
    assert main(["retrieve", str(table), "--query", "0", "--at", "8", "-6", "-4", "-k", "3", "--output", str(output)]) == 0
    first, second = hits(output.with_suffix(".csv"))
    assert (first["row"], second["row"]) == ("1", "2") and float(first["distance"]) < 0.35 < float(second["distance"])
    found = np.array([float(first[axis]) for axis in "xyz"])
    assert np.linalg.norm(found - MOVED_MM - [8, -6, -4]) < 6
    out, err = capsys.readouterr()
    assert f"at {found[0]:.1f} {found[1]:.1f} {found[2]:.1f} mm" in out and "only 2 hits for -k 3" in out
    assert "left out" in err and "3.npz" in err
    page = output.read_text()
    assert page.count("data:image/png") == 3 and "The same place in other scans" in page and "at 8.0 -6.0 -4.0 mm" in page


@pytest.mark.parametrize(
    "words, said",
    [
        (["--at", "-35", "0", "0"], r"--at -35.0 0.0 0.0: lies outside of scan 0, whose patches are at x -34 to 38"),
        (["--at", "nan", "0", "0"], "lies outside of scan 0"),
        (["--at", "0", "0", "0", "--where", "patient=a"], "none of its files of patch tokens can be read"),
        (["--at", "0", "0", "0", "--query", "3"], "3.npz: no such patch tokens, or damaged ones"),
        (["--at", "0", "0", "0", "--query", "2"], "2.npz: its patch tokens are not finite"),
        (["plain.parquet", "--at", "0", "0", "0"], "plain.parquet: has no patch tokens, which --at needs"),
    ],
)
def test_a_place_that_cannot_be_looked_for_is_one_line_and_exit_code_2(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(table.parent)
    write_table(table.with_name("plain.parquet"), np.eye(4))
    if said.startswith("2.npz"):
        np.savez("f.patches/2.npz", patch=np.full((3, 3, 3, 4), np.nan), affine=np.eye(4))
    tables = words[:1] if words[0].endswith(".parquet") else ["f.parquet"]
    flags = words[1:] if tables == words[:1] else words
    assert main(["retrieve", *tables, "--query", "0", "-k", "1", "--output", "h.html", *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(said, line), line
    assert not Path("h.html").exists() and not Path("h.csv").exists()
