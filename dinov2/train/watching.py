"""Which rows of `training_metrics.json` show that something goes wrong: named rules over the logged numbers, and nothing else.

What is said follows from the rows alone, so that a run which is resumed hears the same from its earlier rows. Bounds are
shares: of log K, of what a rank can be at most, of the run's own past, of time; none belongs to one recipe.

Shapes: X class tokens of a logged step, E embedding, K prototypes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dinov2.configs.loader import network_shape
from dinov2.configs.schema import NUM_GLOBAL_CROPS
from dinov2.files import is_number

Row = Mapping[str, Any]

AT_LOG_K = 0.995  # share of log K: healthy students were seen at 0.97 and below, collapsed ones above 0.999
ALIKE = 0.95  # mean cosine between the tokens of different crops
LINE = 2.0  # effective rank of points on a line, whatever E is
RANK_LOST = 0.5  # share of the best rank that the run has had
WAITING = 0.25  # share of the time
IDLE_CORES = 0.8  # share of the cores' time: a run that uses more stands in its own way
SPIKE, SPIKE_DEVIATIONS = 1.2, 6.0  # times the median, and robust standard deviations above it
RECENT, ENOUGH = 20, 8  # logged losses that a spike is compared with, and how many it takes
STAYS_ROWS, STAYS_STEPS = 3, 40  # what lasts as long is said


class Said(NamedTuple):
    """A warning, as a line of `warnings.json`."""

    iteration: int
    name: str
    value: float
    message: str


@dataclass(frozen=True)
class Facts:
    """What the bounds are shares of.

    Attributes:
        log_k: Entropy of the uniform distribution over K (nats); of no meaning where rows have no entropies.
        most_rank: What the effective rank of X centred rows of E channels can be at most.
        warmup: Iterations until the learning rate is at its peak.
    """

    log_k: float
    most_rank: float
    warmup: int

    @classmethod
    def of(cls, cfg: DictConfig, world_size: int) -> Facts:
        passes = 1 if cfg.train.objective == "swin" else cfg.train.accumulation_steps  # its monitors see the last pass
        rows = NUM_GLOBAL_CROPS * cfg.train.batch_size_per_gpu * world_size * passes
        most_rank = min(rows - 1, network_shape(cfg)[0])
        return cls(math.log(cfg.dino.head_n_prototypes), most_rank, cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)


@dataclass
class Past:
    """What the rows before this one leave behind."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    ranks: deque[float] = field(default_factory=lambda: deque(maxlen=STAYS_ROWS))
    best_rank: float = 0.0  # the best median of a few rows
    had_spread: bool = False  # class tokens differed at some time

    def add(self, row: Row, facts: Facts) -> None:
        if is_number(row.get("total_loss")):
            self.losses.append(row["total_loss"])
        self.had_spread |= is_number(row.get("mean_cosine")) and row["mean_cosine"] < ALIKE
        if is_number(row.get("feature_rank")) and _has_begun(row, facts, self):
            self.ranks.append(row["feature_rank"])
            if len(self.ranks) == STAYS_ROWS:
                self.best_rank = max(self.best_rank, median(self.ranks))


def _has_begun(row: Row, facts: Facts, past: Past) -> bool:
    """Whether a run could have features to lose.

    With LayerScale at 1e-5 class tokens of an untrained network are alike, its targets uniform, and a run may stay so for
    thousands of steps while its learning rate rises: that is a start, and no collapse unless it outlasts the warm-up.
    """
    return past.had_spread or row["iteration"] >= facts.warmup


def _entropy(key: str, of: str) -> Callable[[Row, Facts, Past], str]:
    def rule(row: Row, facts: Facts, past: Past) -> str:
        if row[key] < AT_LOG_K * facts.log_k or not _has_begun(row, facts, past):
            return ""
        return (
            f"the {of} entropy is {row[key]:.3f}, log K = {facts.log_k:.3f}: it tells no prototype from another, a collapse; "
            "lower optim.base_lr or teacher.teacher_temp, keep optim.clip_grad, raise teacher.momentum_teacher"
        )

    return rule


def _cosine(row: Row, facts: Facts, past: Past) -> str:
    if row["mean_cosine"] < ALIKE or not _has_begun(row, facts, past):
        return ""
    return (
        f"class tokens of different volumes have a mean cosine of {row['mean_cosine']:.3f}: all look alike, a collapse; lower "
        "optim.base_lr, or raise dino.koleo_loss_weight"
    )


def _line(row: Row, facts: Facts, past: Past) -> str:
    if row["feature_rank"] >= LINE or facts.most_rank <= 2 * LINE or not _has_begun(row, facts, past):
        return ""
    return (
        f"class tokens have rank {row['feature_rank']:.1f} of {facts.most_rank:.0f} at most: they lie on a line, a collapse; "
        "lower optim.base_lr, or raise dino.koleo_loss_weight"
    )


def _rank(row: Row, facts: Facts, past: Past) -> str:
    if row["feature_rank"] >= RANK_LOST * past.best_rank:
        return ""
    return (
        f"the rank of class tokens is {row['feature_rank']:.1f}, less than half of the {past.best_rank:.1f} that it was: "
        "features are being lost; look at the entropies, and lower optim.base_lr where it goes on"
    )


def _prototypes(row: Row, facts: Facts, past: Past) -> str:
    if row["prototypes_used"] > 1 or facts.most_rank < 8 or not _has_begun(row, facts, past):
        return ""
    return "one prototype is the best of all class tokens: see train.centering and teacher.teacher_temp"


def _spike(row: Row, facts: Facts, past: Past) -> str:
    if len(past.losses) < ENOUGH:
        return ""
    usual = median(past.losses)
    deviation = 1.4826 * median(abs(loss - usual) for loss in past.losses)
    if row["total_loss"] <= max(usual + (SPIKE - 1) * abs(usual), usual + SPIKE_DEVIATIONS * deviation):
        return ""
    return (
        f"the loss is {row['total_loss']:.3f}, the {len(past.losses)} logged before it were about {usual:.3f}: where it does "
        "not come back, go on from the last checkpoint with a lower optim.base_lr"
    )


def _data_wait(row: Row, facts: Facts, past: Past) -> str:
    if row["data_wait"] <= WAITING:
        return ""
    return (
        f"{row['data_wait']:.0%} of the time the step waits for data: use --cache-dir, raise train.num_workers, or see what "
        "`dinov2 bench` says"
    )


def _busy(row: Row, facts: Facts, past: Past) -> str:
    if row["cpu_wait"] <= WAITING or row["cpu_used"] >= IDLE_CORES:
        return ""
    return (
        f"{row['cpu_wait']:.0%} of the time the training process had no core, while the run itself used {row['cpu_used']:.0%} "
        "of them: other programs keep this machine busy; end them, or take fewer threads (train.num_threads=1)"
    )


@dataclass(frozen=True)
class Rule:
    """One warning.

    Attributes:
        name: As in `warnings.json`.
        keys: Of the row, all numbers, or the row says nothing; the first one is the warning's value.
        holds: The message while something is wrong, else nothing.
        is_collapse: Whether it is what `train.stop_on_collapse` stops on.
        rows, steps: How many logged rows, and iterations, it has to last.
    """

    name: str
    keys: tuple[str, ...]
    holds: Callable[[Row, Facts, Past], str]
    is_collapse: bool = False
    rows: int = STAYS_ROWS
    steps: int = STAYS_STEPS


RULES = (
    Rule("student_entropy", ("student_entropy",), _entropy("student_entropy", "student's"), is_collapse=True),
    Rule("teacher_entropy", ("teacher_entropy",), _entropy("teacher_entropy", "teacher's"), is_collapse=True),
    Rule("mean_cosine", ("mean_cosine",), _cosine, is_collapse=True),
    Rule("feature_line", ("feature_rank",), _line, is_collapse=True),
    Rule("feature_rank", ("feature_rank",), _rank),
    Rule("prototypes_used", ("prototypes_used",), _prototypes),
    Rule("loss_spike", ("total_loss",), _spike, rows=1, steps=0),
    Rule("data_wait", ("data_wait",), _data_wait),
    Rule("busy_machine", ("cpu_wait", "cpu_used"), _busy),
)


@dataclass
class _Lasting:
    """Since when a rule holds, and whether it was said; it is over after as many rows as it takes to be said."""

    since: int = 0
    held: int = 0
    over: int = 0
    is_on: bool = False


class Watcher:
    """Reads rows in their order and says what begins.

    Args:
        facts: Of the run.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts, self._past = facts, Past()
        self._lasting = {rule.name: _Lasting() for rule in RULES}

    def see(self, row: Row) -> list[Said]:
        """What begins with this row: each warning once, until it has been over for some rows."""
        said = [s for rule in RULES if all(is_number(row.get(key)) for key in rule.keys) for s in self._judge(rule, row)]
        self._past.add(row, self._facts)
        return said

    @property
    def collapsed(self) -> bool:
        """Whether the last rows are those of a collapsed run."""
        return any(rule.is_collapse and self._lasting[rule.name].is_on for rule in RULES)

    def _judge(self, rule: Rule, row: Row) -> list[Said]:
        lasting, iteration = self._lasting[rule.name], int(row["iteration"])
        message = rule.holds(row, self._facts, self._past)
        if not message:
            lasting.held, lasting.over = 0, lasting.over + 1
            lasting.is_on &= lasting.over < rule.rows
            return []
        lasting.since = lasting.since if lasting.held else iteration
        lasting.held, lasting.over = lasting.held + 1, 0
        if lasting.is_on or lasting.held < rule.rows or iteration - lasting.since < rule.steps:
            return []
        lasting.is_on = True
        return [Said(iteration, rule.name, float(row[rule.keys[0]]), message)]
