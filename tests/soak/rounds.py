"""Rounds of work and kill: a job is started, killed after a unit of its work, started again, and compared when it has ended."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.conftest import ROOT
from tests.processes import environment, left_after
from tests.soak.jobs import Content, Job

SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 2.0  # for the processes of a killed program to end
STUCK_S = 600.0  # without an end
POLL_S = 0.01
TELLTALE = re.compile(r"\.tmp\.|\.incomplete|\.tmp$")  # of names that only a write in progress has
VARIES = re.compile(r"events\.out\.tfevents\..*")  # one a start, with the time in its name


@dataclass
class Count:
    """What became of one program's rounds; of what should not be, the words."""

    kills: int = 0  # or other hardships
    ended: int = 0  # jobs that were compared
    differences: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Nothing that should not be."""
        return not (self.differences or self.orphans or self.leftovers)


class Process(Protocol):
    """A program that runs, as `subprocess` has it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class Soak:
    """The rounds of one program, a job after the other: killed, and started again.

    Args:
        job: What is run.
        folder: For its outputs.
        kills: Wanted.
        seed: Of the moments.
    """

    def __init__(self, job: Job, folder: Path, kills: int, seed: int) -> None:
        self.job, self.folder, self.wanted = job, folder, kills
        self.count = Count()
        self._random = random.Random(f"{seed} {job.name}")
        self._mark = uuid.uuid4().hex
        self._outputs = folder
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True)
        self._log = folder / "log.txt"
        self._whole: tuple[Content, set[str], int] | None = None  # result, names and units of the undisturbed run
        self._known: set[str] = set()  # what libraries leave among temporary files without a kill too
        self._num_jobs = 0
        self.seconds = 0.0  # that its jobs have taken

    def run_job(self, has_time: Callable[[], bool]) -> None:
        """One job with its kills, to its end; before the first an undisturbed one."""
        begun = time.monotonic()
        self._run_job(has_time)
        self.seconds += time.monotonic() - begun

    def _run_job(self, has_time: Callable[[], bool]) -> None:
        if self._whole is None:
            out = self._outputs / "whole"
            if not self._finish(out):
                return
            self._whole = self.job.result(out), _names(out), self.job.units(out)
            self._known = _names(self._temporary)
        self._num_jobs += 1
        out = self._outputs / f"job{self._num_jobs}"
        for _ in range(min(self.job.kills, self.wanted - self.count.kills)):
            if not has_time() or not self._disturb(out, self._whole[2]):
                break
        if self._finish(out):
            self.count.ended += 1
            self._compare(out, self._whole[0])
            self._look_for_leftovers(out, self._whole[1])

    def _disturb(self, out: Path, units_of_all: int) -> bool:
        """Whether it could be killed before its end."""
        shared = _shared_memory()
        process = self._start_until(out, units_of_all)
        if process is None:
            return False
        process.kill()  # the main process alone; the others are to end by themselves
        if process.wait() != -9:
            return False  # it had ended before
        self.count.kills += 1
        left = left_after(self._mark, GRACE_S)
        self.count.orphans += [f"kill {self.count.kills}: {len(left)} processes after {GRACE_S:g} s"] if left else []
        self.count.leftovers += [f"kill {self.count.kills}: {path}" for path in _abandoned(_shared_memory() - shared)]
        return True

    def _start_until(self, out: Path, units_of_all: int) -> Process | None:
        """Start it and wait until it has done some more of its work; None where there is none left."""
        before = self.job.units(out)
        if before >= units_of_all:
            return None
        wanted = min(before + self._random.randint(1, self.job.stride), units_of_all)
        process = self._start(out)
        while process.poll() is None and self.job.units(out) < wanted:
            time.sleep(POLL_S)
        time.sleep(self._random.uniform(0, self.job.spread_s))
        return process

    def _start(self, out: Path) -> Process:
        words = [sys.executable, "-m", "dinov2", *self.job.words(out)]
        env = environment(self._mark, TMPDIR=str(self._temporary))
        with self._log.open("ab") as log:
            return subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)

    def _finish(self, out: Path) -> bool:
        """Run it to its end; whether that was a good one."""
        code = self._wait(self._start(out))
        if code != 0:
            lines = self._log.read_text(errors="replace").splitlines()[-1:]
            self.count.differences.append(f"{out.name}: exit code {code}: {' '.join(lines)}")
        left = left_after(self._mark, GRACE_S)
        self.count.orphans += [f"{out.name}: {len(left)} processes after its end"] if left else []
        return code == 0

    def _wait(self, process: Process) -> int | str:
        """Its exit code."""
        try:
            return process.wait(STUCK_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"none within {STUCK_S:g} s"

    def _compare(self, out: Path, whole: Content) -> None:
        result = self.job.result(out)
        other = sorted(key for key in whole.keys() | result.keys() if whole.get(key) != result.get(key))
        self.count.differences += [f"{out.name}: {key}" for key in other]

    def _look_for_leftovers(self, out: Path, names: set[str]) -> None:
        found = _names(out)
        stray = (found - names) | {name for name in found if TELLTALE.search(name)}
        self.count.leftovers += [f"{out.name}: {name}" for name in sorted(stray)]
        self.count.leftovers += [f"{out.name}: temporary {name}" for name in sorted(_names(self._temporary) - self._known)]


def soak(soaks: list[Soak], minutes: float, at_once: int) -> None:
    """Run jobs until every program has its kills or the time is up; the one that has had the least time is next."""
    end = time.monotonic() + 60 * minutes
    running: dict[Future[None], Soak] = {}
    with ThreadPoolExecutor(at_once) as threads:
        while True:
            idle = [s for s in soaks if s not in running.values() and s.count.kills < s.wanted and s.count.is_clean]
            idle.sort(key=lambda s: s.seconds)
            for one in idle[: at_once - len(running)] if time.monotonic() < end else []:
                running[threads.submit(one.run_job, lambda: time.monotonic() < end)] = one
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future)
                future.result()


def _names(out: Path) -> set[str]:
    return {VARIES.sub("events", str(path.relative_to(out))) for path in out.rglob("*")}


def _shared_memory() -> set[Path]:
    return set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()


def _abandoned(paths: set[Path]) -> list[Path]:
    """Those that stay for a while and that no living process has open or mapped; another program's come and go."""
    deadline = time.monotonic() + GRACE_S
    while (left := [path for path in paths if path.exists() and not _is_open(path)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _is_open(path: Path) -> bool:
    """Whether a living process has it open or mapped; by its inode, because a semaphore is mapped by a name that is gone."""
    try:
        inode = str(path.stat().st_ino)
    except FileNotFoundError:
        return True
    for process in (p for p in Path("/proc").iterdir() if p.name.isdecimal()):
        try:
            lines = (process / "maps").read_text().splitlines()
            mapped = {line.split()[4] for line in lines if f"{SHARED_MEMORY}/" in line}
            if inode in mapped or str(path) in {os.readlink(descriptor) for descriptor in (process / "fd").iterdir()}:
                return True
        except OSError:  # ended meanwhile, or another user's
            continue
    return False
