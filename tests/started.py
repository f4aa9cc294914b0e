"""Ranks of a training as processes that have imported everything already: what they do is the same, their start takes no time.

Python's own fork server imports the program once; each rank is forked from it, with the environment that torchrun gives. A
start by a user's own command, and torchrun itself, are what other tests are about.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["dinov2.train.train3d"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(words: Sequence[str], ranks: int = 1, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """`train3d.py` on some ranks; the exit code is the largest, the text what all have written."""
    port = free_port()
    with TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(ranks)]
        processes = [_context.Process(target=_rank, args=(words, i, ranks, port, log)) for i, log in enumerate(logs)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.exitcode is None:
                process.kill()
        text = "".join(log.read_text() for log in logs if log.exists())
    if None in codes:
        raise subprocess.TimeoutExpired(list(words), timeout, stderr=text)
    return subprocess.CompletedProcess(list(words), max(codes, key=abs), "", text)


def _rank(words: Sequence[str], rank: int, ranks: int, port: int, log: Path) -> None:
    if ranks > 1:
        of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in of_torchrun.items()}, MASTER_ADDR="127.0.0.1")
    os.chdir(ROOT)
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    from dinov2.train.train3d import main  # of the fork server, imported there

    sys.exit(main(words))
