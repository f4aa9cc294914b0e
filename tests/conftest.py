"""What all tests share: real volumes, where they are, and small configurations."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from dinov2.configs import load_and_merge_config_3d
from dinov2.data import write_datalist
from dinov2.data.volumes.opening import describe
from dinov2.train.train3d import main
from tests.started import Started

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "tests" / "data"
# of a metric row: no two runs have the same
TIMING = {"iter_time", "data_time", "volumes_per_s", "data_wait", "mfu", "memory_gib", "cpu_wait", "cpu_used"}
NO_DATA = "no local data"

# a network of a few thousand parameters on 16 cubed crops
SMALL = [
    "student.arch=vit_tiny_3d", "student.embed_dim=24", "student.depth=2", "student.num_heads=2", "student.patch_size=4",
    "student.block_chunks=0", "student.drop_path_rate=0.2", "dino.head_n_prototypes=16", "dino.head_hidden_dim=16",
    "dino.head_bottleneck_dim=8", "ibot.head_n_prototypes=24", "ibot.head_hidden_dim=16", "ibot.head_bottleneck_dim=8",
    "crops.global_crops_size=16", "crops.local_crops_size=8", "crops.local_crops_number=2", "train.batch_size_per_gpu=3",
    "train.data_min_axis_size=8", "train.num_workers=0", "train.num_threads=1", "train.OFFICIAL_EPOCH_LENGTH=6",
    "optim.epochs=2", "optim.warmup_epochs=1", "teacher.warmup_teacher_temp_epochs=1", "optim.base_lr=0.02",
    "train.log_period=1", "train.checkpoint_period=2", "evaluation.eval_period_iterations=0",
]  # fmt: skip


# a shell's background ignores interrupts, and programs that tests start would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-data", action="store_true", help="fail where a test would skip for want of local data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # files with slow tests first: what is left for the end are short ones, and the processes of tests end together
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def pytest_collection_finish() -> None:
    gc.freeze()  # torch's million objects stay: going through them again and again was a tenth of the time


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:  # told by their reasons, because the tests may have run in other processes
        for_data = sum(NO_DATA in str(report.longrepr) for report in skipped)
        terminalreporter.write_line(f"{len(skipped)} skipped, of which {for_data} for want of local data")


@pytest.fixture(scope="session")
def local_data(request: pytest.FixtureRequest) -> Path:
    """The folder of optional real volumes (DINOV2_TEST_DATA, by default ../shared/data)."""
    folder = Path(os.environ.get("DINOV2_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "splits.json").exists():
        if request.config.getoption("--require-data"):
            pytest.fail(f"local data required, none at {folder}")
        pytest.skip(f"{NO_DATA} at {folder} (set DINOV2_TEST_DATA)")
    return folder


@pytest.fixture
def real_list(tmp_path: Path) -> Path:
    """A datalist of the two bundled brain volumes."""
    path = tmp_path / "list.json"
    write_datalist(path, [describe(p) for p in sorted(BUNDLED.glob("*.nii.gz"))])
    return path


@pytest.fixture
def small_config() -> Callable[..., DictConfig]:
    """`small_config("key=value", ...)`: the small network with overrides."""
    return lambda *overrides: load_and_merge_config_3d(None, [*SMALL, *overrides])


class Trainer:
    """Trains on a datalist, in a process of its own or in this one."""

    def __init__(self, datalist: Path) -> None:
        self.datalist = datalist

    def command(self, output_dir: Path, *extra: str) -> list[str]:
        """As a user would type it."""
        program = [sys.executable, "dinov2/train/train3d.py", "--output-dir", str(output_dir)]
        return [*program, *SMALL, f"train.dataset_path={self.datalist}", *extra]

    def run(self, output_dir: Path, *extra: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
        return self.start(output_dir, *extra).completed(timeout)

    def call(self, output_dir: Path, *extra: str) -> subprocess.CompletedProcess[str]:
        """The same in this process, which saves a test that starts it often some seconds each."""
        with redirect_stderr(io.StringIO()) as log:
            code = main(self.command(output_dir, *extra)[2:])
        return subprocess.CompletedProcess([], code, "", log.getvalue())

    def start(self, output_dir: Path, *extra: str) -> Started:
        return Started(self.command(output_dir, *extra)[2:])


@pytest.fixture
def trainer(real_list: Path) -> Trainer:
    return Trainer(real_list)


@pytest.fixture
def quiet_rng() -> Iterator[None]:
    """Tests that seed torch leave its generator as it was."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
