"""Trainings that have a hard time while they work: no memory, a full disk, files that become corrupt or vanish.

Each goes on, or ends in one line and is started again; what it has made in the end is held against an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dinov2.data import read_datalist, write_datalist
from dinov2.data.cache.file import open_item
from dinov2.data.volumes.opening import describe
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK
from tests.conftest import SMALL, TIMING
from tests.soak.jobs import Content, Job, lines_of, trained
from tests.soak.rounds import Process, Soak

METRICS = "training_metrics.json"
HEADROOM = 2**21  # bytes that a process may still take, at most
ROOM = 400_000  # bytes left on a disk that fills up, at most: about a checkpoint
DISK_MIB = 48
ERROR = re.compile(r"^\d\d:\d\d:\d\d E ", re.M)
UNUSABLE = re.compile(r"unusable volume \d+, replaced: (\S+?\.nii\.gz)")
MADE_ANEW = "made anew from its source"


class Hardship(Soak):
    """Rounds of one training: something happens to it at a random moment; it goes on or ends, and is started again.

    Attributes:
        codes: With which it may end.
        notes: What was done and what came of it, counted.
    """

    codes: tuple[int, ...] = (EXIT_OK, EXIT_BAD_INPUT)

    def __init__(self, job: Job, folder: Path, kills: int, seed: int) -> None:
        super().__init__(job, folder, kills, seed)
        self.notes: Counter[str] = Counter()

    def close(self) -> None:
        """Undo what was set up."""

    @contextmanager
    def hardship(self, process: Process, out: Path) -> Iterator[None]:
        """What happens to a running program; undone where the block ends, which it does with the program."""
        raise NotImplementedError
        yield

    def _disturb(self, out: Path, units_of_all: int) -> bool:
        """Whether it has ended before its time, and is to be started again."""
        begin = self._log.stat().st_size
        process = self._start_until(out, units_of_all)
        if process is None or process.poll() is not None:
            return False
        with self.hardship(process, out):
            code = self._wait(process)
        self.count.kills += 1
        said = self._log.read_bytes()[begin:].decode(errors="replace")
        self.notes["went on" if code == EXIT_OK else "ended in a line"] += 1
        self.count.differences += [f"{out.name}, hardship {self.count.kills}: {what}" for what in self._wrong_end(code, said)]
        return code != EXIT_OK

    def _wrong_end(self, code: int | str, said: str) -> list[str]:
        """What of an end is not as documented."""
        last = (said.splitlines() or [""])[-1]
        wrong = [] if code in self.codes else [f"exit code {code}: {last}"]
        wrong += [f"a trace: {last}"] if "Traceback" in said else []
        errors = len(ERROR.findall(said))
        return wrong + ([f"{errors} lines say why it ended"] if code == EXIT_BAD_INPUT and errors != 1 else [])


class ShortOfMemory(Hardship):
    """The training or a loader process gets no more memory, or the system ends a loader process for want of it."""

    @contextmanager
    def hardship(self, process: Process, out: Path) -> Iterator[None]:
        with suppress(ProcessLookupError):  # it has just ended
            loaders = children_of(process.pid)
            if loaders and self._random.random() < 0.25:
                self.notes["loader process killed"] += 1
                os.kill(self._random.choice(loaders), signal.SIGKILL)
            else:
                victim = self._random.choice([process.pid, *loaders])
                self.notes["limit of " + ("the training" if victim == process.pid else "a loader process")] += 1
                limit(victim, resource.RLIMIT_AS, address_space(victim) + self._random.randrange(HEADROOM))
        yield


class FullDisk(Hardship):
    """The disk of the output folder fills up, and is emptied when the training has ended.

    The disk is a file system of its own where the system allows it; elsewhere no file may grow beyond some size.
    """

    def __init__(self, job: Job, folder: Path, kills: int, seed: int) -> None:
        super().__init__(job, folder, kills, seed)
        self.disk = folder / "disk"
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(self.disk)]
        self.is_disk = "SOAK_ALONE" in os.environ and subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
        self._outputs = self.disk

    def close(self) -> None:
        if self.is_disk:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)

    @contextmanager
    def hardship(self, process: Process, out: Path) -> Iterator[None]:
        room = self._random.randrange(ROOM)
        if not self.is_disk:
            with suppress(ProcessLookupError):
                limit(process.pid, resource.RLIMIT_FSIZE, room)
            yield
            return
        filler = self.disk / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(self.disk).f_bavail * os.statvfs(self.disk).f_frsize
            with suppress(OSError):  # the training has taken some meanwhile
                os.posix_fallocate(file.fileno(), 0, max(1, free - room))
        yield
        filler.unlink()


class FullCacheDisk(FullDisk):
    """The same with the cache folder alone on it: the training goes on without writing there."""

    def __init__(self, job: Job, folder: Path, kills: int, seed: int) -> None:
        super().__init__(job, folder, kills, seed)
        self._outputs = folder
        if self.is_disk:
            self.codes = (EXIT_OK,)

    def _compare(self, out: Path, whole: Content) -> None:
        super()._compare(out, whole)
        files = list((self.disk / out.name).glob("??/*.vol"))
        self.notes["cache files"] += len(files)
        for path in files:
            open_item(path)  # raises where one is half-written


class DamagedCache(Hardship):
    """Files of the cache become corrupt or vanish all the time."""

    codes = (EXIT_OK,)

    @contextmanager
    def hardship(self, process: Process, out: Path) -> Iterator[None]:
        before = self._log.read_text(errors="replace").count(MADE_ANEW)
        while process.poll() is None:
            if files := sorted(cache_of(out).glob("??/*.vol")):
                self.notes[f"files {damage(self._random.choice(files), self._random)}"] += 1
            time.sleep(self._random.uniform(0, 0.2))
        yield
        self.notes["files named and made anew"] += self._log.read_text(errors="replace").count(MADE_ANEW) - before


class LostVolumes(Hardship):
    """Volumes of the list become corrupt or vanish for good: they are named and left out, and the training ends as usual."""

    codes = (EXIT_OK,)

    @contextmanager
    def hardship(self, process: Process, out: Path) -> Iterator[None]:
        self._rows_before = read_rows(out)
        scans = sorted((data_of(out) / "scans").iterdir())
        volumes = self._random.sample(scans, self._random.randint(1, 6))
        for path in volumes:
            self.notes[f"volumes {damage(path, self._random)}"] += 1
        self._lost, self._num_scans = {str(path) for path in volumes}, len(scans)
        self._begin = self._log.stat().st_size
        yield

    def _compare(self, out: Path, whole: Content) -> None:
        rows, undisturbed = read_rows(out), read_rows(self._outputs / "whole")
        said = self._log.read_bytes()[self._begin :].decode(errors="replace")
        wrong = {
            "rows before the loss": rows[: len(self._rows_before)] != undisturbed[: len(self._rows_before)],
            "iterations": [row["iteration"] for row in rows] != [row["iteration"] for row in undisturbed],
            "a value that is not finite": any(value is None for row in rows for value in row.values()),
            "volumes that are named": set(UNUSABLE.findall(said)) != self._lost,
            "their count": f"{len(self._lost)} of {self._num_scans} volumes could not be used" not in said,
        }
        self.count.differences += [f"{out.name}: {what}" for what, is_wrong in wrong.items() if is_wrong]


class VolumesAway(Hardship):
    """The folder of all volumes is away for a while: the training ends, and goes on when it is back."""

    @contextmanager
    def hardship(self, process: Process, out: Path) -> Iterator[None]:
        scans = data_of(out) / "scans"
        scans.rename(scans.with_name("away"))
        yield
        scans.with_name("away").rename(scans)


def hardships(
    data: Path, folder: Path, kills: int, seed: int, only: str = "", list_name: str = "list.json", steps: int = 120
) -> list[Hardship]:
    """All of them, or those that are named, of the data that `make_data` wrote and trainings of so many steps."""

    def train(out: Path, *more: str, list_file: Path = data / list_name) -> list[str]:
        length = ["train.num_workers=2", "optim.epochs=10", f"train.OFFICIAL_EPOCH_LENGTH={steps // 10}"]
        periods = [f"train.checkpoint_period={steps // 15}", f"evaluation.eval_period_iterations={steps // 3}"]
        own = [*length, *periods, "train.memory_store_mb=0", f"train.dataset_path={list_file}"]
        return ["train", "--output-dir", str(out), *SMALL, *own, *more]

    def with_cache(out: Path) -> list[str]:
        return train(out, f"train.cache_dir={cache_of(out)}")

    def with_cache_on_disk(out: Path) -> list[str]:
        return train(out, f"train.cache_dir={out.parent / 'disk' / out.name}")

    def with_own_volumes(out: Path) -> list[str]:
        return train(out, list_file=copied(data / list_name, data_of(out)))

    kinds: list[tuple[str, type[Hardship], Callable[[Path], list[str]], int, int]] = [
        ("memory", ShortOfMemory, train, steps // 3, 4),
        ("disk", FullDisk, train, steps // 3, 4),
        ("cache disk", FullCacheDisk, with_cache_on_disk, 12, 1),
        ("cache files", DamagedCache, with_cache, steps // 5, 1),
        ("lost volumes", LostVolumes, with_own_volumes, steps // 4, 1),
        ("volumes away", VolumesAway, with_own_volumes, steps // 3, 2),
    ]
    chosen = [kind for kind in kinds if not only or kind[0] in only.split(",")]
    made = []
    for name, kind, words, stride, of_a_job in chosen:
        job = Job(name, words, lines_of(METRICS), trained, stride, 0.3, of_a_job, 1 / len(chosen))
        own = folder / name.replace(" ", "_")
        own.mkdir(parents=True)
        made.append(kind(job, own, max(1, round(kills / len(chosen))), seed))
    return made


def damage(path: Path, draws: random.Random) -> str:
    """Make a file go, or be another one: at once, as a copy that is renamed does; returns what it is then."""
    what = draws.choice(["vanished", "cut short", "changed", "emptied", "replaced"])
    with suppress(FileNotFoundError):  # it is just made anew
        content = bytearray(path.read_bytes())
        if what == "vanished":
            path.unlink()
            return what
        if what == "cut short":
            content = content[: len(content) // 2]
        elif what == "changed" and content:
            content[len(content) // 2] ^= 255
        else:
            content = bytearray(b"" if what == "emptied" else b"another file" * 100)
        aside = path.with_name(f"damaged{path.name}")
        aside.write_bytes(content)
        aside.replace(path)
    return what


def copied(list_file: Path, folder: Path) -> Path:
    """A list of copies of a list's scans, made once."""
    path = folder / "list.json"
    if not path.exists():
        (folder / "scans").mkdir(parents=True)
        copies = [Path(shutil.copy2(entry.image, folder / "scans")) for entry in read_datalist(list_file).entries]
        write_datalist(path, [describe(scan) for scan in copies])
    return path


def data_of(out: Path) -> Path:
    """Folder of a job's own volumes."""
    return out.with_name(f"{out.name}_data")


def cache_of(out: Path) -> Path:
    return out.with_name(f"{out.name}_cache")


def read_rows(out: Path) -> list[dict[str, float]]:
    """Metrics without what the clock decides; a line that is being written is left out."""
    text = (out / METRICS).read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def address_space(pid: int) -> int:
    """Bytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    except FileNotFoundError as err:
        raise ProcessLookupError from err


def limit(pid: int, kind: int, value: int) -> None:
    """Of a process that runs."""
    resource.prlimit(pid, kind, (value, resource.getrlimit(kind)[1]))
