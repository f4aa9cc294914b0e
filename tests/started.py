"""Programs as processes that have imported everything already: what they do is the same, their start takes no time.

Python's own fork server imports the programs once; each process is forked from it, with an environment, a session and an output
of its own. A start by a user's own command, and torchrun, are what other tests are about.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.util import Finalize
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.multiprocessing import start_processes

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "dinov2.train.train3d"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.imported"])


class Started:
    """A program's `main` in a process of its own; used as subprocess's Popen is, and both outputs are one text.

    Args:
        words: Its command line.
        module: The program.
        environment: What its environment has beside this process's.
        log: Where its output goes, after what is there; default: a file of its own.
    """

    def __init__(
        self,
        words: Sequence[str],
        module: str = TRAIN,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.args = [module, *words]
        self._folder = TemporaryDirectory()
        self._log = log or Path(self._folder.name, "log")
        self._process = _context.Process(target=_run, args=(self.args, {**os.environ, **(environment or {})}, self._log))
        self._process.start()
        self.pid = self._process.pid or 0
        Finalize(self, _end, (self._process,), exitpriority=1)  # multiprocessing would wait for what a failed test has left

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, stderr=self._log.read_text())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it has written by its end."""
        self.wait(timeout)
        return self._log.read_text() if self._log.exists() else "", None

    def completed(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        text, _ = self.communicate(timeout)
        return subprocess.CompletedProcess(self.args, self.wait(), "", text)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    if process.exitcode is None:
        process.kill()


def _run(args: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    program: Callable[[list[str]], int] = import_module(args[0]).main
    sys.argv = list(args)
    sys.exit(program(args[1:]))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(words: Sequence[str], ranks: int, module: str = TRAIN) -> list[Started]:
    """A program on some ranks, with the environment that torchrun gives."""
    everyone = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    own = [{**everyone, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)] if ranks > 1 else [{}]
    return [Started(words, module, {name: str(value) for name, value in of_rank.items()}) for of_rank in own]


def in_ranks(work: Callable[..., None], *args: object) -> None:
    """`work(rank, *args)` in two processes; what one raises is raised here."""
    start_processes(work, args, nprocs=2, start_method="forkserver")


def run_ranks(words: Sequence[str], ranks: int = 1, module: str = TRAIN) -> subprocess.CompletedProcess[str]:
    """The same until all have ended; the exit code is the largest, the text what all have written."""
    started = start_ranks(words, ranks, module)
    try:
        ended = [process.completed() for process in started]
    finally:
        for process in started:
            process.kill()
    text = "".join(process.stderr for process in ended)
    return subprocess.CompletedProcess(list(words), max((process.returncode for process in ended), key=abs), "", text)
