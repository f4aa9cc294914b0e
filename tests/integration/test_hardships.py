"""`scripts/soak --hardships` in its short form: trainings of a second or two, a hardship each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.processes import environment
from tests.soak.flat import BLOCKS, BOUND_KIB, fit_slope
from tests.soak.hardships import Hardship, hardships
from tests.soak.jobs import make_data
from tests.soak.rounds import Soak
from tests.started import Started

STEPS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hardships") / "data"
    make_data(folder)
    return folder


def started(soak: Hardship, out: Path) -> Started:
    """As `Soak._start`, without the time that a start takes."""
    mark = environment(soak._mark, TMPDIR=str(soak._temporary))
    return Started(soak.job.words(out)[1:], environment=mark, log=soak._log)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["disk", "cache files"])  # `scripts/soak` has all six
def test_a_training_that_has_a_hard_time_ends_as_one_that_has_not(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Soak, "_start", started)
    [one] = hardships(data, tmp_path, 1, 0, name, "few.json", STEPS)
    one.run_job(lambda: True)
    assert one.count.is_clean, one.count
    assert one.count.kills == one.count.ended == 1, one.count


def test_memory_that_grows_is_told_from_memory_that_wanders() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(10, 10_000, 25)
    wandering = 300e6 + rng.integers(0, 50, len(steps)) * 4096
    warming = np.where(steps < 1500, -80e6, 0)  # before the warm-up ends
    flat = fit_slope(steps, wandering + warming, 10_000)
    assert flat.is_flat and flat.low < 0 < flat.high
    growing = fit_slope(steps, wandering + warming + 512 * steps, 10_000)
    assert not growing.is_flat and growing.low < 500 < growing.high and growing.low > BOUND_KIB
    assert len(steps) > 4 * BLOCKS
