"""Batches in slots of shared memory: written where they are read, never written again while somebody reads them."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dinov2.configs.errors import ConfigError
from dinov2.data import TrainLoader, read_datalist, slots
from dinov2.data.loaders import count_workers, one_ahead
from dinov2.data.slots import HELD, SlotQueue, Slots, available_memory, check_memory, num_slots, slot_queue
from dinov2.errors import BadInput
from tests.conftest import ROOT

CPU = torch.device("cpu")
NBYTES = 100


def write_number(memory: np.ndarray, positions: Sequence[int], volumes: Sequence[int]) -> list[tuple[int, int]]:
    """Each volume's byte is its position; who writes it is told."""
    for volume in volumes:
        memory[volume] = positions[volume] % 251
    return [(volume, os.getpid()) for volume in volumes]


def numbers(batch_size: int) -> Iterator[list[int]]:
    return ([*range(first, first + batch_size)] for first in itertools.count(0, batch_size))


@pytest.fixture
def queue() -> Iterator[SlotQueue]:
    with slot_queue(write_number, NBYTES, numbers(5), 5, 2, CPU) as queue:
        yield queue


def taken(queue: SlotQueue) -> tuple[torch.Tensor, list[int]]:
    memory, positions, _ = queue.take()
    return torch.from_numpy(memory)[:5], positions


def test_batches_come_in_order_from_all_processes_and_from_few_slots(queue: SlotQueue) -> None:
    places, pids = set(), set()
    for step in range(40):
        memory, positions, answers = queue.take()
        assert positions == list(range(5 * step, 5 * step + 5)) and memory[:5].tolist() == [p % 251 for p in positions]
        written = [volume for answer in answers for volume, _ in answer]
        assert sorted(written) == list(range(5)), "each volume once"
        places.add(memory.ctypes.data)
        pids |= {pid for answer in answers for _, pid in answer}
        del memory
    assert len(places) <= num_slots(5, 2) and len(pids) == 2


def test_a_batch_that_is_referred_to_is_never_written_again(queue: SlotQueue) -> None:
    kept = [taken(queue) for _ in range(12)]
    some_rows = [tensor[1:3].view(1, 2) for tensor, _ in kept[::4]]  # a view of a view keeps it too
    wanted = [torch.tensor([[5 * step + 1, 5 * step + 2]]) for step in range(0, 12, 4)]
    for tensor, positions in kept:
        assert tensor.tolist() == positions
    del kept, tensor
    for _ in range(20):
        taken(queue)
    assert all(torch.equal(a, b) for a, b in zip(some_rows, wanted, strict=True))


def test_copies_are_given_only_to_who_keeps_more_than_two(queue: SlotQueue) -> None:
    shared = queue._slots.whole
    kept = [queue.take()[0] for _ in range(HELD + 2)]
    assert [np.shares_memory(memory, shared) for memory in kept] == [True] * HELD + [False, False]
    del kept
    assert np.shares_memory(queue.take()[0], shared), "what was kept is free again"


def test_as_many_slots_as_keep_every_process_busy_and_no_more() -> None:
    assert num_slots(128, 32) == num_slots(16, 1) == 4
    assert (num_slots(4, 32) - HELD) * 4 >= 2 * 32


def test_a_killed_process_ends_it_although_the_others_could_go_on(queue: SlotQueue) -> None:
    queue.take()
    process = multiprocessing.active_children()[0]
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(BadInput, match=rf"loader process {process.pid} was ended by SIGKILL"):
        for _ in range(20):
            queue.take()


def test_a_batch_that_is_not_there_is_not_waited_for() -> None:
    def write_slowly(*args: Any) -> Any:
        time.sleep(0.3)
        return write_number(*args)

    with slot_queue(write_slowly, NBYTES, numbers(1), 1, 1, CPU) as queue:
        start = time.perf_counter()
        assert queue.take(wait=False) is None and time.perf_counter() - start < 0.25
        assert queue.take()[1] == [0]


def test_loader_processes_are_counted_from_cores_and_ranks(
    small_config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert small_config("train.num_workers=-1").train.num_workers == -1
    assert [count_workers(-1, cores) for cores in (64, 8, 2)] == [15, 1, 1] and count_workers(32, 2) == 32
    with pytest.raises(ConfigError, match="train.num_workers=-2"):
        small_config("train.num_workers=-2")


# ---------------------------------------------------------------------- to a device


class Copy:
    """What is on its way to the fake device."""

    def __init__(self, source: torch.Tensor) -> None:
        self.source = source
        self.result: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        if self.result is None:
            self.result = self.source.clone()
        return self.result


class FakeDevice:
    """Copies as late as a device may: a batch is read when somebody needs that it has been."""

    def __init__(self) -> None:
        self.in_copy: list[Copy] = []

    def start(self, batch: dict[str, Any]) -> tuple[Copy, list[int]]:
        self.in_copy.append(Copy(batch["x"]))
        return self.in_copy[-1], batch["positions"]

    def arrived(self, copy: Copy, positions: list[int]) -> tuple[torch.Tensor, list[int]]:
        return copy.read(), positions

    def release(self) -> None:
        while self.in_copy and (len(self.in_copy) >= HELD or self.in_copy[0].result is not None):
            self.in_copy.pop(0).read()


def test_a_device_reads_each_batch_before_its_slot_is_written_again(queue: SlotQueue) -> None:
    device, shared = FakeDevice(), queue._slots.whole

    def take(wait: bool) -> dict[str, Any] | None:
        found = queue.take(wait)
        assert found is None or np.shares_memory(found[0], shared), "no copy of a batch is made"
        return None if found is None else {"x": torch.from_numpy(found[0])[:5], "positions": found[1]}

    with closing(one_ahead(take, device)) as batches:
        for step, (x, positions) in enumerate(itertools.islice(batches, 30)):
            assert positions == list(range(5 * step, 5 * step + 5)) and x.tolist() == positions
            time.sleep(0.001 * (step % 3))  # the processes are ahead, or not


class FakeCudart:
    def __init__(self, code: int) -> None:
        self.code, self.calls = code, []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", address, nbytes))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0


@pytest.mark.parametrize("code", [0, 2])
def test_slots_are_registered_with_cuda_or_it_is_said_once(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake, some = FakeCudart(code), Slots(3, 5000)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fake.calls.append(("synchronize",)))
    monkeypatch.setattr(slots, "_clear_error", lambda device: fake.calls.append(("clear",)))
    address, nbytes = some.memory(0).ctypes.data, 3 * 8192
    with caplog.at_level(logging.WARNING), slots.registered(some, torch.device("cuda")):
        assert fake.calls[0] == ("register", address, nbytes)
    assert fake.calls[1:] == ([("synchronize",), ("unregister", address)] if code == 0 else [("clear",)])
    assert caplog.text.count("cannot be registered with CUDA (error 2)") == (code != 0)


# ---------------------------------------------------------------------- memory


def test_batches_that_do_not_fit_into_memory_are_refused_in_one_line(
    real_list: Path, small_config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_memory(10, None)
    check_memory(10, 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="need 3.0 GiB, 2.5 GiB are free: use a smaller train.batch_size_per_gpu"):
        check_memory(3 * 2**29, 5 * 2**29)
    monkeypatch.setattr(slots, "available_memory", lambda: 1000)
    with pytest.raises(BadInput, match="batches in shared memory need"):
        next(iter(TrainLoader(small_config("train.num_workers=1"), read_datalist(real_list))))
    assert not multiprocessing.active_children()


def test_memory_is_that_of_the_machine_or_of_the_container(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 3000 kB\nMemAvailable:    2000 kB\n")
    assert available_memory(tmp_path, tmp_path) == 2000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\nactive_file 1\n")
    assert available_memory(tmp_path, tmp_path) == 2000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_memory(tmp_path, tmp_path) == 400001


def test_the_size_of_dev_shm_does_not_matter(real_list: Path) -> None:
    code = f"""
import torch
from dinov2.configs import load_and_merge_config_3d
from dinov2.data import TrainLoader, read_datalist
from tests.conftest import SMALL
cfg = load_and_merge_config_3d(None, [*SMALL, "train.num_workers=2", "crops.global_crops_size=32"])
batches = iter(TrainLoader(cfg, read_datalist({str(real_list)!r})))
print(sum(next(batches)[0]["collated_global_crops"].shape[0] for _ in range(5)))
"""
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("no user namespaces: /dev/shm cannot be made small")
    command = ["unshare", "-Urm", "sh", "-c", f'{small} && exec "$0" -c "$1"', sys.executable, code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout == "30\n", result.stderr
