"""`train3d.py`: on real volumes, killed, stopped, started again, misused."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from dinov2.configs import load_and_merge_config_3d
from dinov2.data import TrainLoader, read_datalist
from dinov2.data.cache.commands import verify
from dinov2.demo.run import run_demo
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_RESUMABLE, BadInput
from dinov2.logging.folder import locked_folder
from dinov2.streams import Kind, torch_seed
from dinov2.train.build import build
from dinov2.train.schedules import build_schedules
from dinov2.train.state import TrainState
from dinov2.train.train3d import main, train_step
from tests.conftest import ROOT, SMALL, TIMING, Trainer, read_json_lines
from tests.started import Started
from tests.unit.models.test_foreign import dinov2_layout, drawn


def teacher(output_dir: Path, iteration: int) -> dict[str, torch.Tensor]:
    path = output_dir / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    return torch.load(path, weights_only=True)["teacher"]


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def metrics(output_dir: Path) -> list[dict]:
    rows = read_json_lines(output_dir / "training_metrics.json")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def one_line_error(result, *words: str) -> None:
    assert result.returncode == EXIT_BAD_INPUT, result.stderr
    errors = [line for line in result.stderr.splitlines() if " E " in line]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in errors[0], errors[0]


def test_a_run_on_real_volumes_leaves_everything_that_decided_it(trainer: Trainer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = subprocess.run(trainer.command(out), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = read_json_lines(out / "training_metrics.json")
    assert [r["iteration"] for r in rows] == list(range(12))
    published = {"iteration", "iter_time", "data_time", "lr", "wd", "mom", "last_layer_lr", "current_batch_size", "total_loss"}
    losses = {"dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss"}
    ours = {"dino_cross_entropy", "ibot_cross_entropy", "teacher_entropy", "student_entropy", "prototypes_used"}
    ours |= {"feature_rank", "mean_cosine", "grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head"}
    assert published | losses | ours <= rows[0].keys()
    assert rows[0]["current_batch_size"] == rows[0]["effective_batch"] == 3
    for name in ("config.yaml", "run.json", "log.txt", "tensorboard"):
        assert (out / name).exists(), name
    run = json.loads((out / "run.json").read_text())
    assert run["datalist_sha256"] and run["versions"]["torch"] == torch.__version__ and "git" in run
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["0000007", "0000009", "0000011"]
    assert "ETA" in result.stderr and "volumes/s" in result.stderr and "data wait" in result.stderr
    assert "fp16 is computed as fp32 on a CPU" in result.stderr

    again = trainer.run(out)
    assert again.returncode == 0 and "finished already" in again.stderr
    manual = trainer.run(out, "--eval-only")
    assert manual.returncode == 0, manual.stderr
    saved = torch.load(out / "eval" / "manual_11" / "teacher_checkpoint.pth", weights_only=True)
    assert_same_weights(saved["teacher"], teacher(out, 11))
    assert str(out.parent).encode() not in (out / "eval" / "manual_11" / "teacher_checkpoint.pth").read_bytes()
    assert saved["meta"]["trained_on"] == {"scans": [], "patients": [], "num_unknown": 2}  # a list without hashes


@pytest.mark.parametrize("lr, is_said", [("0.0014", True), ("0.0", False), ("None", False)])
def test_an_old_configuration_trains_at_the_rules_rate(trainer: Trainer, tmp_path: Path, lr: str, is_said: bool) -> None:
    """A 3DINO run's `config.yaml` holds the rate that its own batch gave."""
    (tmp_path / "old.yaml").write_text(f"optim: {{lr: {lr}, scaling_rule: sqrt_wrt_1024}}\n")
    out = tmp_path / "run"
    words = ["--config-file", str(tmp_path / "old.yaml"), "optim.base_lr=0.002", "optim.warmup_epochs=0"]
    result = trainer.call(out, *words)
    assert result.returncode == 0, result.stderr
    rate = 0.002 * (3 / 1024) ** 0.5  # three volumes a step
    assert metrics(out)[0]["lr"] == pytest.approx(rate, rel=1e-12)
    assert OmegaConf.load(out / "config.yaml").optim.lr == pytest.approx(rate, rel=1e-12)
    assert ("optim.lr=0.0014 has no effect" in result.stderr) == is_said


OLD_RUNS = {  # as 3DINO and DINOv2 leave them
    "checkpoints": ["last_checkpoint.rank_0", "model_0124999.rank_0.pth"],
    "metrics": ["training_metrics.json", "config.yaml"],
    "teacher": ["eval/training_124999/teacher_checkpoint.pth", "config.yaml", "logs/log.txt"],
}


@pytest.mark.parametrize("files", OLD_RUNS.values(), ids=OLD_RUNS)
@pytest.mark.parametrize("flags", [[], ["--no-resume"], ["--eval-only"], ["--stages", "pretrain/two_stage"]], ids=str)
def test_another_programs_run_is_left_as_it_is(
    tmp_path: Path, files: list[str], flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    for name in files:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_bytes(name.encode())
    before = {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in [old, *old.rglob("*")]}
    with pytest.raises(BadInput, match="another program's run"):
        run_demo(old, None, 0, [], print)
    assert main(["--output-dir", str(old), *flags, *([] if "--stages" in flags else SMALL)]) == EXIT_BAD_INPUT
    errors = [line for line in capfd.readouterr().err.splitlines() if " E " in line]
    assert len(errors) == 1 and "another --output-dir" in errors[0] and "student.full_pretrained_weights=" in errors[0]
    assert ("teacher_checkpoint.pth" in files[0]) == (str(old / "eval/training_124999/teacher_checkpoint.pth") in errors[0])
    assert before == {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in [old, *old.rglob("*")]}


@pytest.mark.slow
def test_killed_at_random_moments_the_result_is_the_same_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    long = ["optim.epochs=25", "train.checkpoint_period=7", "train.num_workers=1", "train.centering=centering"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert trainer.run(whole, *long).returncode == 0
    rng = random.Random(20)
    cached = [*long, f"train.cache_dir={tmp_path / 'cache'}"]  # the same with a cache, which the kills leave whole
    for _ in range(3):
        process = trainer.start(killed, *cached)
        seen_before = lines(killed)
        while process.poll() is None and lines(killed) <= seen_before + 5:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.communicate()
    assert 0 < lines(killed) < 150
    result = trainer.run(killed, *cached)
    assert result.returncode == 0, result.stderr
    assert verify(read_datalist(trainer.datalist), tmp_path / "cache", False, lambda _: None) == 0
    assert_same_weights(teacher(killed, 149), teacher(whole, 149))
    assert metrics(killed) == metrics(whole)


@pytest.mark.slow
def test_both_augmentations_train_alike(real_list: Path, small_config: Callable[..., DictConfig]) -> None:
    """From one seed they differ over 200 steps by less than two seeds do (what is left is rounding, and the noise drawn)."""

    def losses(backend: str, seed: int) -> torch.Tensor:
        cfg = small_config(f"train.augmentation={backend}", f"train.seed={seed}", "optim.base_lr=0.004", "optim.epochs=34")
        state, schedules = TrainState(*build(cfg, Runtime(torch.device("cpu")))), build_schedules(cfg)
        batches = iter(TrainLoader(cfg, read_datalist(real_list)))
        total = []
        for step in range(200):
            torch.manual_seed(torch_seed(seed, Kind.STEP, step))
            total.append(train_step(state, schedules(step), next(batches), 3.0, False)["total_loss"])
        return torch.stack(total)

    torch.set_num_threads(1)  # two that wait for each other on a busy machine take many times as long
    monai, fast, other = losses("monai", 0), losses("fast", 0), losses("fast", 1)
    backends, seeds = (monai - fast).abs(), (other - fast).abs()
    assert float(backends[:20].mean()) < 0.01 * float(seeds[:20].mean())
    assert float(backends.mean()) < 0.5 * float(seeds.mean())


def test_a_run_fills_the_cache_it_is_given_and_refuses_another_ones(trainer: Trainer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = ["train.num_workers=2", "--cache-dir", str(cache)]
    assert trainer.call(tmp_path / "a", *words).returncode == 0
    assert len(list(cache.glob("??/*.vol"))) == 2
    assert trainer.call(tmp_path / "b").returncode == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    manifest = json.loads((cache / "cache.json").read_text())
    (cache / "cache.json").write_text(json.dumps({**manifest, "version": 7}))
    one_line_error(trainer.call(tmp_path / "c", *words), str(cache), "has version 7")


@pytest.mark.slow
def test_a_chain_of_stages_killed_in_each_ends_as_an_undisturbed_one(trainer: Trainer, tmp_path: Path) -> None:
    """Small crops, then larger ones from the first stage's teacher: positions 4 -> 6 a side, heads come along."""
    second = (
        "{name: high, config: train/vit3d_highres, weights_from: low, overrides: [crops.global_crops_size=24, optim.epochs=6]}"
    )
    (tmp_path / "stages.yaml").write_text(f"stages:\n- {{name: low, config: ssl3d_default_config}}\n- {second}\n")
    words = ["--stages", str(tmp_path / "stages.yaml"), "train.num_workers=1", "train.checkpoint_period=4"]
    small = [o for o in SMALL if not o.startswith("optim.epochs")]

    def start(out: Path) -> Started:
        return Started(["--output-dir", str(out), *words, *small, "optim.epochs=6", f"train.dataset_path={trainer.datalist}"])

    assert start(tmp_path / "whole").wait() == 0
    killed = tmp_path / "killed"
    for stage in ("low", "high"):
        process = start(killed)
        while process.poll() is None and lines(killed / stage) < 10:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert 10 <= lines(killed / stage) < 36
    result = start(killed).completed()
    assert result.returncode == 0 and "finished already" in result.stderr and "started from" not in result.stderr
    for stage in ("low", "high"):
        assert_same_weights(teacher(killed / stage, 35), teacher(tmp_path / "whole" / stage, 35))
        assert metrics(killed / stage) == metrics(tmp_path / "whole" / stage)


def lines(output_dir: Path) -> int:
    path = output_dir / "training_metrics.json"
    return len(path.read_text().splitlines()) if path.exists() else 0


def running(pids: list[str]) -> list[str]:
    """Those that are there and not just waiting to be collected."""
    found = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            found += [] if " Z " in Path(f"/proc/{pid}/stat").read_text() else [pid]
    return found


def test_a_killed_run_leaves_no_loader_process_and_no_lock(trainer: Trainer, tmp_path: Path) -> None:
    process = trainer.start(tmp_path / "run", "optim.epochs=200", "train.num_workers=2")
    while lines(tmp_path / "run") < 3:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()  # not for the end of its output, which loader processes share
    deadline = time.monotonic() + 20  # on a busy machine a process that is to end may wait for its turn
    while running(children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(children)
    with locked_folder(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75(trainer: Trainer, tmp_path: Path) -> None:
    long = ["optim.epochs=25", "train.checkpoint_period=1000", "train.num_workers=2"]
    out = tmp_path / "run"
    process = trainer.start(out, *long)
    while lines(out) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: loader processes get it too
    log, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESUMABLE and "SIGTERM" in log, log
    (only,) = (out / "checkpoints").iterdir()
    result = trainer.run(out, *long)
    assert result.returncode == 0
    assert [r["iteration"] for r in metrics(out)] == list(range(150))
    assert f"iterations {int(only.name) + 1} to 149" in result.stderr


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_metrics(trainer: Trainer, tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        assert trainer.call(tmp_path / str(workers), f"train.num_workers={workers}").returncode == 0
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1") == metrics(tmp_path / "3")


@pytest.mark.slow
def test_a_run_is_continued_only_with_its_own_architecture_and_data(trainer: Trainer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert trainer.call(out, "optim.epochs=1").returncode == 0
    one_line_error(trainer.call(out, "student.embed_dim=32"), "checkpoint of another architecture", "saved (24,), now (32,)")

    changed = Trainer(tmp_path / "changed.json")
    shutil.copy(trainer.datalist, changed.datalist)
    changed.datalist.write_text(changed.datalist.read_text().replace('"spacing": [2.0', '"spacing": [1.9'))
    one_line_error(changed.call(out), "another datalist", "--allow-changed-data")
    assert changed.call(out, "--allow-changed-data").returncode == 0

    fresh = trainer.call(out, "--no-resume", "student.embed_dim=32", "optim.epochs=1")
    assert fresh.returncode == 0, fresh.stderr
    assert (out / "previous_1" / "eval" / "training_11" / "teacher_checkpoint.pth").exists()
    assert teacher(out, 5)["backbone.norm.weight"].shape == (32,)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_still_works(trainer: Trainer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert trainer.call(out, "optim.epochs=1").returncode == 0
    newest = out / "checkpoints" / "0000005"
    for part in newest.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    (out / "checkpoints" / ".incomplete-0000009").mkdir()  # as a kill in the middle of writing leaves it
    one_line_error(trainer.call(out), "0000005", "damaged checkpoint", "delete this folder")
    shutil.rmtree(newest)
    result = trainer.call(out)
    assert result.returncode == 0 and "iterations 4 to 11" in result.stderr
    assert not list((out / "checkpoints").glob(".incomplete*"))


@pytest.mark.slow
@pytest.mark.parametrize("limit, words", [(200_000, ["0000001", "cannot be written"]), (3_000, ["make room"])])
def test_a_full_disk_is_one_line_and_what_was_finished_stays(
    trainer: Trainer, tmp_path: Path, limit: int, words: list[str]
) -> None:
    """A limit on file size fails a write as a full disk does: first a checkpoint's, then a small file's."""
    out = tmp_path / "run"
    command = trainer.command(out)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=small_disk)
    one_line_error(full, *words, "the last complete checkpoint is intact")
    result = trainer.call(out)
    assert result.returncode == 0, result.stderr
    assert not list((out / "checkpoints").glob(".incomplete*"))


@pytest.mark.slow
def test_only_one_run_uses_a_folder_at_a_time(trainer: Trainer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = trainer.start(out, "optim.epochs=200")
    while lines(out) < 1:
        time.sleep(0.05)
    one_line_error(trainer.call(out), str(out), "another run is using it")
    first.kill()
    first.communicate()
    assert trainer.call(out, "optim.epochs=1", "--no-resume").returncode == 0


@pytest.mark.parametrize(
    "extra, words",
    [
        (["train.dataset_path=nowhere.json"], ["nowhere.json", "train.dataset_path"]),
        (["train.sed=1"], ["did you mean 'train.seed'"]),
        (["--config-file", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["train.data_min_axis_size=500"], ["none of its 2 volumes", "train.data_min_axis_size=500"]),
        (["student.full_pretrained_weights=nowhere.pth"], ["nowhere.pth", "no such file"]),
        (["--output-dir", "/proc/nowhere"], ["/proc/nowhere", "choose another --output-dir"]),
        (["--eval-only"], ["no checkpoint to take a teacher from"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    trainer: Trainer, tmp_path: Path, extra: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*trainer.command(tmp_path / "run", *extra)[2:]])
    one_line_error(SimpleNamespace(returncode=code, stderr=capsys.readouterr().err), *words)


@pytest.mark.slow
def test_entries_that_cannot_be_used_are_named_and_counted_and_the_run_goes_on(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "text.nii").write_text("no image")
    items = json.loads(trainer.datalist.read_text())
    bad = ["missing.nii.gz", "empty.nii.gz", "text.nii"]
    trainer.datalist.write_text(json.dumps(items + [{"image": str(tmp_path / b), "shape": [40, 40, 40]} for b in bad]))
    result = trainer.call(tmp_path / "run", "train.num_workers=1")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    for name in bad:
        assert result.stderr.count(f"/{name}: ") == 1, name
    assert "3 of 5 volumes could not be used" in result.stderr

    trainer.datalist.write_text(json.dumps([{"image": b, "shape": [40, 40, 40]} for b in bad]))
    one_line_error(trainer.call(tmp_path / "none"), "none of its 3 volumes can be used")


@pytest.mark.slow
def test_the_high_resolution_stage_starts_from_the_first_stages_teacher(trainer: Trainer, tmp_path: Path) -> None:
    assert trainer.call(tmp_path / "one", "optim.epochs=1").returncode == 0
    weights = tmp_path / "one" / "eval" / "training_5" / "teacher_checkpoint.pth"
    second = ["crops.global_crops_size=20", "crops.local_crops_size=12", f"student.full_pretrained_weights={weights}"]
    result = trainer.call(tmp_path / "two", "optim.epochs=1", *second)
    assert result.returncode == 0, result.stderr
    assert "positions of a grid of 4 cubed interpolated to (5, 5, 5)" in result.stderr
    saved = torch.load(tmp_path / "two" / "eval" / "training_5" / "teacher_checkpoint.pth", weights_only=True)
    assert saved["meta"]["trained_on"]["num_unknown"] == 4  # two volumes without a hash, in each of the two runs


@pytest.mark.slow
def test_a_run_starts_from_2d_weights_says_so_and_goes_on_without_them(trainer: Trainer, tmp_path: Path) -> None:
    weights, out = tmp_path / "dinov2_vits14_pretrain.pth", tmp_path / "run"
    torch.save(drawn(dinov2_layout(embed_dim=24)), weights)
    start = [
        f"student.pretrained_weights={weights}",
        "student.pretrained_weights_inflation=mean",
        "train.OFFICIAL_EPOCH_LENGTH=2",
    ]
    first = trainer.call(out, "optim.epochs=1", *start)
    assert first.returncode == 0 and f"started from {weights}" in first.stderr, first.stderr
    for words in ("a 2D network, inflated along depth (mean)", "heads have 64 channels, this network's 12"):
        assert words in first.stderr
    kept = load_and_merge_config_3d(out / "config.yaml", [])
    assert (kept.student.pretrained_weights, kept.student.pretrained_weights_inflation) == (str(weights), "mean")
    weights.unlink()
    second = trainer.call(out, *start)
    assert second.returncode == 0 and "iterations 2 to 3," in second.stderr and "started from" not in second.stderr, (
        second.stderr
    )


@pytest.mark.slow
def test_the_tiny_recipe_runs_on_local_data(local_data: Path, tmp_path: Path) -> None:
    made = [sys.executable, "scripts/local_datalist.py", str(local_data), str(tmp_path / "list.json")]
    assert "207 volumes" in subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    program = [sys.executable, "dinov2/train/train3d.py", "--config-file", "configs/pretrain/tiny_cpu.yaml"]
    args = ["--output-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), "optim.epochs=1"]
    # one thread: two that wait for each other on cores that others use take many times as long
    overrides = [f"train.dataset_path={tmp_path / 'list.json'}", "optim.warmup_epochs=0", "train.num_threads=1"]
    result = subprocess.run([*program, *args, *overrides], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    assert last["ibot_cross_entropy"] < first["ibot_cross_entropy"] - 0.3
