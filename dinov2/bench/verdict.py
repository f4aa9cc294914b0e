"""What holds a run up, by name, and what to change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinov2.bench.measure import Measured

BUSY = 0.25  # share of the time without a core, from which the machine itself is what holds a run up

DISK, DECODE, AUGMENTATION = "disk", "decode", "augmentation"
TRANSFER, COMPUTE, BUSY_MACHINE = "transfer", "compute", "a busy machine"


@dataclass(frozen=True)
class Verdict:
    """The bottleneck, and what it is on an otherwise idle machine.

    Attributes:
        name: One of the six above.
        own: One of the first five: of this run on this machine, without other programs.
        advice: What to change, a line each.
    """

    name: str
    own: str
    advice: tuple[str, ...]


def judge(m: Measured, has_cache: bool, is_compiled_augmentation: bool, on_cpu: bool) -> Verdict:
    """Name what is slowest.

    A loader process reads, decodes and makes crops, one after the other; several do so beside the training. What is slower
    decides: the largest part of a volume's way through the loader, or the update. Without loader processes all is one way.

    Args:
        m: The times.
        has_cache: Whether preprocessed volumes are kept on disk.
        is_compiled_augmentation: Whether crops are made by compiled kernels.
        on_cpu: Whether the network is on a CPU.
    """
    loading = {DISK: m.disk_s, DECODE: m.decode_s, AUGMENTATION: m.augment_s}
    training = {TRANSFER: m.transfer_s, COMPUTE: m.compute_s}
    a_volume_s = sum(loading.values()) / max(1, m.num_workers)
    is_loading = m.num_workers > 0 and a_volume_s > max(training.values())
    among = loading if is_loading else training if m.num_workers else loading | training
    own = max(among, key=lambda name: among[name])
    advice = list(_advice(own, m, has_cache, is_compiled_augmentation, on_cpu))
    if m.queued < BUSY:
        return Verdict(own, own, tuple(advice))
    busy = (
        f"other programs: no core was free {m.queued:.0%} of the time; end them, or run elsewhere",
        "with fewer threads (train.num_threads=1) a busy machine disturbs least",
        f"on this machine alone it would be {own}:",
    )
    return Verdict(BUSY_MACHINE, own, (*busy, *advice))


def _advice(own: str, m: Measured, has_cache: bool, is_compiled: bool, on_cpu: bool) -> list[str]:
    enough = math.ceil((m.disk_s + m.decode_s + m.augment_s) / max(m.compute_s, m.transfer_s, 1e-9))
    workers = f"train.num_workers={enough} loader processes would keep up with the update (now {m.num_workers})"
    more = [workers] if enough > m.num_workers else []
    cache = (
        [] if has_cache else ["--cache-dir FOLDER (dinov2 cache build, on a fast local disk): smaller files, read as they are"]
    )
    if own == DISK:
        memory = "train.memory_store_mb as large as the list, where it fits: files are then read once"
        return [*cache, memory, *more] if cache else ["move the cache folder to a faster, local disk", memory, *more]
    if own == DECODE:
        return [*cache, *more]
    if own == AUGMENTATION:
        kernels = (
            []
            if is_compiled
            else ["compiled kernels make crops ten times as fast: see `dinov2 doctor`; train.augmentation=fast"]
        )
        return [*kernels, *more, "or fewer or smaller local crops (crops.local_crops_number)"]
    if own == TRANSFER:
        return ["param_dtype bf16 or fp16 of the student's backbone halves what is copied; look for a faster bus (PCIe lanes)"]
    if on_cpu:
        return ["a GPU, or a smaller network; train.num_threads as many as there are idle cores"]
    return ["nothing is in the network's way; faster: bf16 or fp16, train.compile=true, a larger pass, more GPUs"]
