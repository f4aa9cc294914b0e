"""Several ranks on gloo, some under torchrun: the result of one process, exact resume, and an end when a rank dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinov2.errors import EXIT_OK
from tests import started
from tests.conftest import ROOT, TIMING, Trainer, read_json_lines
from tests.started import Started, free_port

MODULES = [f"{side}.{module}" for side in ("student", "teacher") for module in ("backbone", "dino_head", "ibot_head")]
FP64 = [f"compute_precision.{m}.mixed_precision.param_dtype=fp64" for m in MODULES]
STEPS = ["train.OFFICIAL_EPOCH_LENGTH=10", "optim.epochs=2", "student.drop_path_rate=0", "train.checkpoint_period=1000"]
KEY_BIAS = "attn.qkv.bias"  # its key part has no gradient, and AdamW amplifies the rounding of nothing


def torchrun(trainer: Trainer, ranks: int, output_dir: Path, *extra: str, port: int | None = None) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, "--master-port", str(port or free_port()), *trainer.command(output_dir, *extra)[1:]]


def run_ranks(ranks: int, trainer: Trainer, output_dir: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    """The same without torchrun, from a process that has imported everything already."""
    return started.run_ranks(trainer.command(output_dir, *extra)[2:], ranks)


def start_ranks(ranks: int, trainer: Trainer, output_dir: Path, *extra: str) -> list[Started]:
    return started.start_ranks(trainer.command(output_dir, *extra)[2:], ranks)


def run(command: list[str], timeout: int = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of torchrun's ranks, which have sessions of their own."""
    return [int(p) for p in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]


def are_running(ranks: list[Started]) -> bool:
    return all(rank.poll() is None for rank in ranks)


def kill_all(ranks: list[Started]) -> None:
    """As a machine that loses power: all at once."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def teacher(output_dir: Path, iteration: int = 19) -> dict[str, torch.Tensor]:
    path = output_dir / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    return torch.load(path, weights_only=True)["teacher"]


def metrics(output_dir: Path) -> list[dict[str, float]]:
    rows = read_json_lines(output_dir / "training_metrics.json")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def lines(output_dir: Path) -> int:
    path = output_dir / "training_metrics.json"
    return len(path.read_text().splitlines()) if path.exists() else 0


def assert_close(
    one: Path, many: Path, rtol: float, atol: float, losses_only: bool = False, koleo_atol: float | None = None
) -> None:
    """Weights and every logged value (or the losses; gradient norms of a fresh network amplify rounding)."""
    a, b = teacher(one), teacher(many)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if not name.endswith(KEY_BIAS) or value.dtype == torch.float64:
            torch.testing.assert_close(b[name], value, rtol=rtol, atol=atol, msg=name)
    rows, others = metrics(one), metrics(many)
    assert [r["iteration"] for r in rows] == [r["iteration"] for r in others] == list(range(20))
    for row, other in zip(rows, others, strict=True):
        for key, value in row.items():
            if (losses_only and not key.endswith("loss")) or key == "current_batch_size":  # a rank's own
                continue
            least = koleo_atol if koleo_atol and key == "koleo_loss" else max(atol, 1e-7)
            assert other[key] == pytest.approx(value, rel=max(rtol, 1e-6), abs=least), (key, row["iteration"])


def half_written(output_dir: Path) -> bool:
    return any((output_dir / "checkpoints").glob(".incomplete-*/*.distcp"))


LAYOUTS = {  # ranks, volumes a rank and pass, passes, strategy
    "ddp on 2": (2, 2, 1, "ddp"),
    "fsdp on 2": (2, 2, 1, "fsdp"),
    "fsdp on 4": (4, 1, 1, "fsdp"),
    "replicated fsdp on 2": (2, 2, 1, "NO_SHARD"),
    "regathered fsdp on 2": (2, 2, 1, "FULL_SHARD"),
}


def layout_words(name: str) -> tuple[int, list[str]]:
    ranks, batch, passes, strategy = LAYOUTS[name]
    words = [f"train.batch_size_per_gpu={batch}", f"train.accumulation_steps={passes}"]
    if strategy in ("NO_SHARD", "FULL_SHARD"):
        words += [f"compute_precision.{m}.sharding_strategy={strategy}" for m in MODULES]
        strategy = "fsdp"
    return ranks, [*words, f"train.strategy={strategy}"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of four volumes in one process, in float64, with KoLeo over all of them."""
    from dinov2.data import write_datalist
    from dinov2.data.volumes.opening import describe
    from tests.conftest import BUNDLED

    folder = tmp_path_factory.mktemp("one")
    write_datalist(folder / "list.json", [describe(p) for p in sorted(BUNDLED.glob("*.nii.gz"))])
    trainer = Trainer(folder / "list.json")
    words = [*STEPS, *FP64, "dino.koleo_distributed=true", "train.batch_size_per_gpu=4"]
    assert run_ranks(1, trainer, folder / "run", *words).returncode == EXIT_OK
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_one_processs_result_in_float64(
    trainer: Trainer, one_process: Path, tmp_path: Path, layout: str
) -> None:
    ranks, words = layout_words(layout)
    result = run_ranks(ranks, trainer, tmp_path / "run", *STEPS, *FP64, "dino.koleo_distributed=true", *words)
    assert result.returncode == EXIT_OK, result.stderr
    assert_close(one_process, tmp_path / "run", rtol=0, atol=1e-10)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["effective_batch"] == 4 and record["layout"]["ranks"] == ranks


@pytest.mark.slow
def test_the_baselines_objective_gives_one_processs_result_in_float64(trainer: Trainer, tmp_path: Path) -> None:
    """Swapped boxes and contrast reach over all volumes of an update, whichever ranks have them."""
    words = [*STEPS, *FP64, "train.objective=swin", "train.orientation=RAS", "swin.contrastive_dim=8", "optim.epochs=1"]
    assert run_ranks(1, trainer, tmp_path / "one", *words, "train.batch_size_per_gpu=4").returncode == EXIT_OK
    one = teacher(tmp_path / "one", 9)
    for strategy in ("ddp", "fsdp"):
        many = tmp_path / strategy
        result = run_ranks(2, trainer, many, *words, "train.batch_size_per_gpu=2", f"train.strategy={strategy}")
        assert result.returncode == EXIT_OK, result.stderr
        other = teacher(many, 9)
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10, msg=name)
        for row, found in zip(metrics(tmp_path / "one"), metrics(many), strict=True):
            for key in ("rotation_loss", "contrastive_loss", "reconstruction_loss", "rotation_accuracy", "feature_rank"):
                assert found[key] == pytest.approx(row[key], rel=1e-6), (strategy, key)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_accumulation_over_ranks_is_one_batch_too(trainer: Trainer, tmp_path: Path, strategy: str) -> None:
    """Without KoLeo, which sees a micro-batch only."""
    words = [*STEPS, *FP64, "dino.koleo_loss_weight=0", f"train.strategy={strategy}"]
    assert run_ranks(2, trainer, tmp_path / "a", *words, "train.batch_size_per_gpu=2").returncode == EXIT_OK
    split = [*words, "train.batch_size_per_gpu=1", "train.accumulation_steps=2"]
    result = run_ranks(2, trainer, tmp_path / "b", *split)
    assert result.returncode == EXIT_OK, result.stderr
    a, b = teacher(tmp_path / "a"), teacher(tmp_path / "b")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.slow
def test_two_ranks_in_float32_stay_near_one(trainer: Trainer, tmp_path: Path) -> None:
    words = [*STEPS, "dino.koleo_distributed=true", "optim.base_lr=0.004"]
    assert run_ranks(1, trainer, tmp_path / "one", *words, "train.batch_size_per_gpu=4").returncode == EXIT_OK
    result = run_ranks(2, trainer, tmp_path / "two", *words, "train.batch_size_per_gpu=2", "train.strategy=fsdp")
    assert result.returncode == EXIT_OK, result.stderr
    # KoLeo is the logarithm of distances to nearest neighbours, which on some processors change places from rounding alone
    assert_close(tmp_path / "one", tmp_path / "two", rtol=5e-2, atol=2e-3, losses_only=True, koleo_atol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_killed_anywhere_the_result_is_the_same_bit_for_bit(trainer: Trainer, tmp_path: Path, strategy: str) -> None:
    words = ["train.OFFICIAL_EPOCH_LENGTH=12", "optim.epochs=2", "train.checkpoint_period=3", "train.batch_size_per_gpu=2"]
    words += [f"train.strategy={strategy}", "train.num_workers=1"]
    words += ["dino.head_n_prototypes=4096", "dino.head_bottleneck_dim=256"]  # 16 MB: a checkpoint takes its time
    assert run_ranks(2, trainer, tmp_path / "whole", *words).returncode == EXIT_OK
    killed = tmp_path / "killed"
    ranks = start_ranks(2, trainer, killed, *words)
    while are_running(ranks) and lines(killed) < 5:
        time.sleep(0.02)
    kill_all(ranks)
    ranks = start_ranks(2, trainer, killed, *words)
    while are_running(ranks) and lines(killed) < 12:
        time.sleep(0.02)
    while are_running(ranks) and not half_written(killed):
        time.sleep(0.001)
    kill_all(ranks)
    assert 12 <= lines(killed) < 24 and half_written(killed), "killed inside a checkpoint"
    result = run_ranks(2, trainer, killed, *words)
    assert result.returncode == EXIT_OK, result.stderr
    a, b = teacher(tmp_path / "whole", 23), teacher(killed, 23)
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert metrics(killed) == metrics(tmp_path / "whole")


def test_an_overflow_in_one_ranks_share_is_seen_by_all(tmp_path: Path) -> None:
    """Sharded gradients under a loss scale: otherwise one rank would skip the update that the other makes."""
    started.in_ranks(_overflow, str(tmp_path / "store"))


def _overflow(rank: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(net(torch.ones(1, 4)).sum()).backward()
    if rank == 1:
        net.weight.grad.to_local().fill_(float("inf"))
    before = net.weight.to_local().clone()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net.weight.to_local(), before) and scaler.get_scale() == 2.0
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_another_strategy(trainer: Trainer, one_process: Path, tmp_path: Path) -> None:
    """Ten steps on two ranks sharded, five on four replicated, the rest in one process: what one process gives throughout."""
    out = tmp_path / "run"
    common = ["student.drop_path_rate=0", *FP64, "dino.koleo_distributed=true", *STEPS[:2], "train.checkpoint_period=5"]
    for ranks, strategy, until in ((2, "fsdp", 9), (4, "ddp", 14)):
        words = [*common, f"train.batch_size_per_gpu={4 // ranks}", f"train.strategy={strategy}"]
        started = start_ranks(ranks, trainer, out, *words, "train.checkpoint_keep=9")
        while are_running(started) and not (out / "checkpoints" / f"{until:07d}").exists():
            time.sleep(0.005)
        kill_all(started)
    assert run_ranks(1, trainer, out, *common, "train.batch_size_per_gpu=4").returncode == EXIT_OK
    assert_close(one_process, out, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_with_its_reason(trainer: Trainer, tmp_path: Path) -> None:
    words = [
        "train.OFFICIAL_EPOCH_LENGTH=500",
        "train.batch_size_per_gpu=2",
        "train.checkpoint_period=3",
        "train.num_workers=1",
    ]
    process = start(torchrun(trainer, 2, tmp_path / "run", *words))
    while process.poll() is None and lines(tmp_path / "run") < 5:
        time.sleep(0.02)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    killed_at = time.monotonic()
    text, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed_at < 45
    assert "another rank has ended" in text and "Signal 9" in text, text[-3000:]
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.slow
def test_checkpoints_at_every_step_are_written_in_turn(trainer: Trainer, tmp_path: Path) -> None:
    """One rank may see the end of a writing before the other does; both still take part in the same collectives."""
    words = ["train.OFFICIAL_EPOCH_LENGTH=30", "train.batch_size_per_gpu=2", "train.checkpoint_period=1", "train.strategy=fsdp"]
    result = run_ranks(2, trainer, tmp_path / "run", *words, "train.timeout_s=60")
    assert result.returncode == EXIT_OK, result.stderr[-3000:]
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["0000057", "0000058", "0000059"]


@pytest.mark.slow
def test_sigterm_to_the_job_saves_the_same_step_on_all_ranks(trainer: Trainer, tmp_path: Path) -> None:
    words = ["train.OFFICIAL_EPOCH_LENGTH=15", "train.batch_size_per_gpu=2", "train.checkpoint_period=1000"]
    out = tmp_path / "run"
    process = start(torchrun(trainer, 2, out, *words))
    while process.poll() is None and lines(out) < 3:
        time.sleep(0.02)
    os.kill(ranks_of(process)[0], signal.SIGTERM)  # one rank is asked; all stop
    text, _ = process.communicate(timeout=60)
    assert "start the same command again" in text, text[-3000:]
    (only,) = [p.name for p in (out / "checkpoints").iterdir()]
    result = run_ranks(2, trainer, out, *words)
    assert result.returncode == EXIT_OK and f"iterations {int(only) + 1} to 29" in result.stderr
    assert [r["iteration"] for r in metrics(out)] == list(range(30))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_shard_is_named(trainer: Trainer, tmp_path: Path, damage: str) -> None:
    words = ["train.batch_size_per_gpu=2", "train.strategy=fsdp"]
    assert run_ranks(2, trainer, tmp_path / "run", *words).returncode == EXIT_OK
    shard = sorted((tmp_path / "run" / "checkpoints" / "0000011").glob("*.distcp"))[-1]
    if damage == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    result = run_ranks(2, trainer, tmp_path / "run", *words, "optim.epochs=3")
    assert result.returncode != EXIT_OK
    assert (
        f"damaged checkpoint ({shard.name}" in result.stderr
        and 'Traceback (most recent call last):\n  File "/work' not in result.stderr
    )


@pytest.mark.slow
def test_four_ranks_run_the_papers_recipe_with_a_small_network(real_list: Path, tmp_path: Path) -> None:
    """Its crops, precision settings and strategy keys as they are; network, batch and length by override."""
    words = "student.arch=vit_tiny_3d student.embed_dim=48 student.depth=2 student.num_heads=3 student.block_chunks=0 "
    words += "dino.head_n_prototypes=512 ibot.head_n_prototypes=512 dino.head_hidden_dim=64 ibot.head_hidden_dim=64 "
    words += "train.batch_size_per_gpu=2 train.num_workers=0 train.num_threads=1 train.OFFICIAL_EPOCH_LENGTH=3 optim.epochs=1 "
    words += f"train.log_period=1 train.strategy=fsdp train.dataset_path={real_list}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--master-port", str(free_port())]
    program = [
        "dinov2/train/train3d.py",
        "--config-file",
        "configs/pretrain/vit_large.yaml",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    result = run([*launcher, *program, *words.split()])
    assert result.returncode == EXIT_OK, result.stderr
    assert [(r["current_batch_size"], r["effective_batch"]) for r in metrics(tmp_path / "run")] == [(2, 8)] * 3
    assert "fsdp over 4 ranks" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, words, message",
    [
        (3, [], "3 ranks do not divide 4"),
        (2, ["train.batch_size_per_gpu=4"], "batch_size_per_gpu x accumulation_steps = 2"),
        (2, ["train.backend=nccl", "train.batch_size_per_gpu=2"], "train.backend=nccl: 2 ranks on this machine, 0 GPUs"),
    ],
)
def test_a_layout_that_cannot_continue_the_run_is_refused(
    trainer: Trainer, one_process: Path, ranks: int, words: list[str], message: str
) -> None:
    if "nccl" in message and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    result = run_ranks(ranks, trainer, one_process, *STEPS, *FP64, *words)
    assert result.returncode != EXIT_OK and message in result.stderr, result.stderr[-2000:]


def test_a_port_in_use_is_named(trainer: Trainer, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        environment = {**place, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        command = trainer.command(tmp_path / "run", "train.timeout_s=5")
        result = Started(command[2:], environment=environment).completed(120)
    assert result.returncode == 2 and place["MASTER_PORT"] in result.stderr and "choose another --master-port" in result.stderr
    assert "Traceback" not in result.stderr
