"""Which rows of metrics are called what: recorded runs, that were made to collapse and that were not, and arranged rows."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2.checkpointer.checkpointer import Checkpointer
from dinov2.configs import load_and_merge_config_3d
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_COLLAPSED, EXIT_OK
from dinov2.logging.warned import read_warnings
from dinov2.train import watching
from dinov2.train.alerts import Alerts
from dinov2.train.cores import Cores
from dinov2.train.watching import RULES, Facts, Rule, Watcher
from tests.conftest import ROOT, Trainer

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("recorded_rows.json").read_text())
COLLAPSED = [name for name in RECORDED if name.startswith("collapse")]
HEALTHY = [name for name in RECORDED if name not in COLLAPSED]
COLLAPSES = {rule.name for rule in RULES if rule.is_collapse}


def facts_of(name: str) -> Facts:
    run = RECORDED[name]
    return Facts(math.log(run["prototypes"]), run["most_rank"], run["warmup"])


def rows_of(name: str) -> list[dict[str, float]]:
    return [dict(zip(RECORDED[name]["columns"], row, strict=True)) for row in RECORDED[name]["rows"]]


def said(rows: list[dict[str, float]], facts: Facts) -> list[tuple[int, str]]:
    watcher = Watcher(facts)
    return [(s.iteration, s.name) for row in rows for s in watcher.see(row)]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", COLLAPSED)
def test_a_run_made_to_collapse_is_called_collapsed_within_200_steps(name: str, every: int) -> None:
    found = said(rows_of(name)[::every], facts_of(name))
    assert "student_entropy" in {warning for iteration, warning in found if iteration < 200}, found
    assert len(found) == len({warning for _, warning in found}), "each is said once"


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_never_warned_of(name: str) -> None:
    rows = rows_of(name)
    assert rows[-1]["iteration"] >= RECORDED[name]["until"]
    assert said(rows, facts_of(name)) == []


FACTS = Facts(log_k=math.log(128), most_rank=31, warmup=300)
GOOD = {
    "student_entropy": 4.5, "teacher_entropy": 4.2, "feature_rank": 20.0, "mean_cosine": 0.1, "prototypes_used": 12.0,
    "total_loss": 6.0, "data_wait": 0.01, "cpu_wait": 0.02, "cpu_used": 0.5,
}  # fmt: skip


def rows_with(changes: dict[int, dict[str, float]], count: int = 40, base: dict[str, float] = GOOD) -> list[dict[str, float]]:
    """Good rows, a tenth of the iterations logged, changed from row to row as `changes` says."""
    rows, now = [], base
    for i in range(count):
        now = now | changes.get(i, {})
        rows.append({"iteration": 10 * i, **now})
    return rows


BAD = {
    "student_entropy": {"student_entropy": FACTS.log_k - 0.01},
    "teacher_entropy": {"teacher_entropy": FACTS.log_k - 0.01},
    "mean_cosine": {"mean_cosine": 0.99},
    "feature_line": {"feature_rank": 1.5},
    "feature_rank": {"feature_rank": 9.0},
    "prototypes_used": {"prototypes_used": 1.0},
    "loss_spike": {"total_loss": 9.0},
    "data_wait": {"data_wait": 0.4},
    "busy_machine": {"cpu_wait": 0.5},
}


def test_every_rule_has_a_bad_row_here_and_a_line_in_the_documentation() -> None:
    text = (ROOT / "docs" / "watching.md").read_text()
    assert [rule.name for rule in RULES] == list(BAD)
    assert all(f"| `{rule.name}` |" in text for rule in RULES)


@pytest.mark.parametrize("name", BAD)
def test_what_lasts_is_said_once_and_again_when_it_comes_back(name: str) -> None:
    changes = {15: BAD[name], 20: GOOD, 33: BAD[name]}
    found = [iteration for iteration, warning in said(rows_with(changes), FACTS) if warning == name]
    last = 0 if name == "loss_spike" else watching.STAYS_STEPS
    assert found == [150 + last, 330 + last]
    flickers = {15: BAD[name], 20: GOOD, 21: BAD[name], 22: GOOD, 23: BAD[name]}
    assert len([w for _, w in said(rows_with(flickers), FACTS) if w == name]) == (3 if name == "loss_spike" else 1)
    brief = {15: BAD[name], 16: GOOD}
    assert bool(said(rows_with(brief), FACTS)) == (name == "loss_spike"), "one row is a spike and nothing else"


@pytest.mark.parametrize("missing", [None, math.nan, "no key"])
def test_a_row_without_the_number_says_nothing(missing: Any) -> None:
    row = {"iteration": 400, **{key: missing for key in GOOD if missing != "no key"}}
    assert [s for _ in range(20) for s in Watcher(FACTS).see(row)] == []


def test_a_run_that_uses_its_cores_itself_is_in_nobodys_way_but_its_own() -> None:
    assert said(rows_with({5: {"cpu_wait": 0.5, "cpu_used": 0.95}}), FACTS) == []


def test_a_start_whose_tokens_are_all_alike_is_no_collapse_while_the_rate_rises() -> None:
    """As a network with LayerScale at 1e-5 starts: uniform targets, one prototype, any rank."""
    start = {
        **GOOD,
        "student_entropy": FACTS.log_k,
        "teacher_entropy": FACTS.log_k,
        "mean_cosine": 0.999,
        "prototypes_used": 1.0,
    }
    goes_on = rows_with({10: {"feature_rank": 3.0}, 25: GOOD | {"feature_rank": 3.0}, 30: GOOD}, base=start)
    assert said(goes_on, FACTS) == []
    assert {name for _, name in said(rows_with({}, base=start), FACTS)} >= COLLAPSES - {"feature_line"}
    assert min(i for i, _ in said(rows_with({}, base=start), FACTS)) >= FACTS.warmup


def test_bounds_are_shares_of_what_the_configuration_says() -> None:
    tiny, baseline = (load_and_merge_config_3d(f"pretrain/{name}") for name in ("tiny_cpu", "monai_vit_tiny_cpu"))
    assert Facts.of(tiny, 1) == Facts(math.log(128), 31, 100)
    assert Facts.of(tiny, 8).most_rank == 96  # E
    passes = load_and_merge_config_3d("pretrain/monai_vit_tiny_cpu", ["train.accumulation_steps=2"])
    assert Facts.of(passes, 1).most_rank == Facts.of(baseline, 1).most_rank  # its monitors are of the last pass


# ---------------------------------------------------------------------- in a run


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any entropy is a collapse, from the third iteration on."""

    def rule(row: dict[str, float], *_: Any) -> str:
        return "arranged" if row["iteration"] >= 3 else ""

    monkeypatch.setattr(watching, "RULES", (Rule("student_entropy", ("student_entropy",), rule, True, rows=1, steps=0),))


@pytest.mark.usefixtures("at_once")
def test_a_collapse_stops_a_run_that_asks_for_it_saved_with_its_own_code(trainer: Trainer, tmp_path: Path) -> None:
    out, told = tmp_path / "run", tmp_path / "told"
    notify = f"""train.notify=['sh', '-c', 'echo {{event}} $DINOV2_OUTPUT_DIR >> {told}']"""
    stopped = trainer.call(out, "train.stop_on_collapse=true", notify)
    assert stopped.returncode == EXIT_COLLAPSED == 3, stopped.stderr
    assert "collapsed by iteration 3 (train.stop_on_collapse)" in stopped.stderr and "volumes/s" in stopped.stderr
    assert Checkpointer(out / "checkpoints", 1).iterations()[-1] == 3
    assert sorted(told.read_text().splitlines()) == [f"stop {out}", f"warning {out}"]
    again = trainer.call(out, "train.stop_on_collapse=true")
    assert again.returncode == EXIT_COLLAPSED and Checkpointer(out / "checkpoints", 1).iterations()[-1] == 4
    ended = trainer.call(out, "train.notify=['false']")
    assert ended.returncode == EXIT_OK and "CPU process-hours" in ended.stderr
    assert "ended with 1; the run goes on" in ended.stderr
    assert [w["iteration"] for w in read_warnings(out)] == [3], "said once, over three starts"
    weights = torch.load(out / "eval" / "training_11" / "teacher_checkpoint.pth", weights_only=True)
    assert weights["meta"]["config"]["train"]["notify"] == "", "a command may hold somebody's address or token"


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_kill_loses_no_warning_and_doubles_none(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = load_and_merge_config_3d("pretrain/tiny_cpu")
    here, rows = Runtime(None), rows_of(name)  # type: ignore[arg-type]  # a device is not asked for
    metrics, warned = tmp_path / "training_metrics.json", tmp_path / "warnings.json"

    def run(first: int) -> None:
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["iteration"] < first))
        with Alerts(cfg, tmp_path, first, here) as alerts:
            for row in rows:
                if row["iteration"] >= first:
                    alerts.see(row)

    run(0)
    whole = warned.read_bytes()
    beyond = b'{"iteration": 100, "name": "data_wait", "value": 0.5, "message": "of a run that was killed"}\n'
    for first, kept in ((200, whole), (200, b""), (200, whole[:-20]), (60, whole + beyond), (10, b'{"iteration": 9')):
        warned.write_bytes(kept)
        known = [w for w in read_warnings(tmp_path) if w["iteration"] < first]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(first)
        assert warned.read_bytes() == whole
        assert len(caplog.records) == len(whole.splitlines()) - len(known), "what was said before is not said again"


def test_time_in_the_queue_for_a_core_is_counted() -> None:
    cores = Cores()
    sum(i * i for i in range(300_000))
    found = cores.report()
    if not Path("/proc/self/schedstat").exists():
        assert found == {}
        return
    assert 0 <= found["cpu_wait"] < 1 and 0 < found["cpu_used"] <= 1.1
