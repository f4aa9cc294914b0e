"""What a whole run takes at a measured pace, beside the paper's and what was measured on an H200; what fits a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import DictConfig

from dinov2.logging.progress import in_words
from dinov2.train.forecast import USABLE, forecast_gib

CARDS_GIB = (24, 40, 80)
H200 = "measured on one H200, ViT-L/16 with crops of 96 and 48 cubed in bf16: 338 volumes/s at 128 a pass (docs/gpu.md)"


@dataclass(frozen=True)
class Reference:
    """A run of the paper on four A100-80GB."""

    name: str
    volumes_per_s: float  # of a GPU
    effective_batch: int
    days: str


STANDARD = Reference("standard stage", 20.6, 512, "nine days")
HIGH_RESOLUTION = Reference("high-resolution stage", 4.6, 256, "two days")
MONAI_VIT = Reference("MONAI-ViT", 1.9, 64, "ten days")


def reference_for(cfg: DictConfig) -> Reference:
    """The paper's run that a configuration resembles most."""
    if cfg.train.objective == "swin":
        return MONAI_VIT
    return HIGH_RESOLUTION if cfg.crops.global_crops_size > 96 else STANDARD


def projection(cfg: DictConfig, rate: float, devices: int, kind: str) -> list[str]:
    """Lines about the whole run.

    Args:
        cfg: A merged configuration.
        rate: Volumes a second of one device.
        devices: How many will be used, one rank each; they are taken to be as fast together as apart.
        kind: What they are called.
    """
    t, s, c, paper = cfg.train, cfg.student, cfg.crops, reference_for(cfg)
    batch = t.batch_size_per_gpu * t.accumulation_steps * devices
    iterations = cfg.optim.epochs * t.OFFICIAL_EPOCH_LENGTH
    seconds = iterations * batch / (rate * devices)
    hours = seconds * devices / 3600
    return [
        f"the whole run: {iterations:,} iterations of {batch} volumes on {devices} {kind}: {in_words(seconds)}, "
        f"{hours:,.{0 if hours > 100 else 2}f} {kind}-hours",
        f"here, {s.arch}, patches of {s.patch_size}, crops of {c.global_crops_size}: {rate:.3g} volumes/s on one {kind}",
        f"the paper's {paper.name}, ViT-L/16: {paper.volumes_per_s} volumes/s on each of four A100-80GB, "
        f"{paper.effective_batch} a step, {paper.days}",
        H200,
    ]


def memory_lines(cfg: DictConfig, devices: int, card_gib: float | None) -> list[str]:
    """Whether the configuration's pass fits a card, and which passes keep the paper's batch.

    Args:
        cfg: A merged configuration.
        devices: Ranks.
        card_gib: Of the GPU at hand; None: of usual ones.
    """
    t, paper = cfg.train, reference_for(cfg)
    compiled = t.compile is not False
    need = forecast_gib(cfg, t.batch_size_per_gpu, compiled)
    lines = [f"memory of a GPU with {t.batch_size_per_gpu} volumes a pass: about {need:.0f} GiB by the forecast"]
    for gib in (card_gib,) if card_gib else CARDS_GIB:
        fits = "fits" if need <= gib * USABLE else "does not fit"
        lines.append(f"  a card of {gib:.0f} GiB: {fits}; {_passes(cfg, devices, gib, compiled, paper)}")
    return lines


def _passes(cfg: DictConfig, devices: int, gib: float, compiled: bool, paper: Reference) -> str:
    """The largest pass on a card that keeps the paper's batch, as keys."""
    whole = f"the paper's {paper.effective_batch} a step on {devices}"
    if paper.effective_batch % devices:
        return f"{devices} ranks do not divide {whole}"
    for batch in _divisors(paper.effective_batch // devices):
        if forecast_gib(cfg, batch, compiled) <= gib * USABLE:
            steps = paper.effective_batch // devices // batch
            return f"{whole}: train.batch_size_per_gpu={batch} train.accumulation_steps={steps}"
    return f"no pass of {whole} fits: train.activation_checkpointing=full, or a smaller network"


def _divisors(n: int) -> Iterator[int]:
    return (d for d in range(n, 0, -1) if n % d == 0)
