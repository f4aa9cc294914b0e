"""torch.compile through the real loop: that it is on, gives the same numbers, and is left where it fails."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch._dynamo.utils import counters

from dinov2.configs import load_and_merge_config_3d
from dinov2.data import TrainLoader, read_datalist
from dinov2.distributed.runtime import Runtime
from dinov2.train import compiling
from dinov2.train.build import build
from dinov2.train.compiling import resolve_compile
from dinov2.train.train3d import main
from tests.conftest import SMALL, TIMING, Trainer, read_json_lines
from tests.started import in_ranks

SmallConfig = Callable[..., DictConfig]
EXACT = [  # of so small a network KoLeo makes a tenth of what was rounding in float32
    "dino.koleo_loss_weight=0",
    *(
        f"compute_precision.{side}.{module}.mixed_precision.param_dtype=fp64"
        for side in ("student", "teacher")
        for module in ("backbone", "dino_head", "ibot_head")
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before counts; `aot_eager` traces forward and backward as Inductor does, without a C++ compiler."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


def train(trainer: Trainer, out: Path, *words: str) -> list[dict[str, float]]:
    assert main(trainer.command(out, *words)[2:]) == 0
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_json_lines(out / "training_metrics.json")]


def assert_near(a: list[dict[str, float]], b: list[dict[str, float]], rel: float) -> None:
    for row, other in zip(a, b, strict=True):
        assert other == {k: pytest.approx(v, rel=rel, abs=rel) for k, v in row.items()}


@pytest.mark.parametrize(
    "words",
    [
        ["student.drop_path_rate=0.3"],
        pytest.param(
            ["train.accumulation_steps=2", "train.batch_size_per_gpu=2", "train.activation_checkpointing=full"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["student.drop_path_uniform=false", "student.pos_encoding=rope"], marks=pytest.mark.slow),
        pytest.param(["student.drop_path_rate=0.05", "student.ffn_layer=swiglu"], marks=pytest.mark.slow),
    ],
)
def test_blocks_are_compiled_in_the_loop_once_and_compute_the_same(trainer: Trainer, tmp_path: Path, words: list[str]) -> None:
    """A dispatch mode around a step, such as a counter of its products, would keep every later step from being compiled."""
    plain = train(trainer, tmp_path / "plain", *EXACT, *words, "train.compile=false")
    assert not counters["stats"]
    compiled = train(trainer, tmp_path / "compiled", *EXACT, *words, "train.compile=true")
    graphs = (
        counters["stats"]["unique_graphs"] - 1
    )  # at the end: the trial's and the first step's, so nothing was compiled again
    assert graphs >= 2 and not counters["graph_break"]
    assert f"compiled: {graphs} graphs" in (tmp_path / "compiled" / "log.txt").read_text()
    assert_near(plain, compiled, rel=1e-6)


@pytest.mark.slow
def test_inductors_numbers_stay_near(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    plain = train(trainer, tmp_path / "plain", *EXACT, "train.compile=false")
    compiled = train(trainer, tmp_path / "compiled", *EXACT, "train.compile=true")
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
    assert_near(plain, compiled, rel=1e-6)


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    words = ["train.compile=true", "train.checkpoint_keep=9"]
    whole = train(trainer, tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("0000007", "0000009", "0000011"):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / name)
    assert train(trainer, tmp_path / "again", *words) == whole


@pytest.mark.parametrize("after_the_trial", [False, True])
def test_where_compiling_fails_training_goes_on_as_if_it_was_not_asked_for(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_the_trial: bool
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        raise OSError("no room for\nkernels")

    words = ["train.centering=centering", "student.drop_path_rate=0.3"]
    plain = train(trainer, tmp_path / "plain", *words, "train.compile=false")
    monkeypatch.setattr(compiling, "BACKEND", broken)
    if after_the_trial:
        monkeypatch.setattr(compiling, "trial", lambda device, dtype: "")
    assert train(trainer, tmp_path / "broken", *words, "train.compile=true") == plain
    (said,) = [line for line in (tmp_path / "broken" / "log.txt").read_text().splitlines() if "train.compile" in line]
    assert "train.compile has no effect: compiling failed" in said and "no room for kernels" in said


@pytest.mark.slow
def test_where_the_backward_pass_fails_to_compile_too(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def broken(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        raise FileNotFoundError("gcc")

    plain = train(trainer, tmp_path / "plain", "train.compile=false")
    forward_only = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)
    monkeypatch.setattr(compiling, "BACKEND", forward_only)
    monkeypatch.setattr(compiling, "trial", lambda device, dtype: "")
    assert train(trainer, tmp_path / "broken", "train.compile=true") == plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_trial_sees_wrong_gradients_and_no_others(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_backward(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        return lambda *args: [2 * grad if grad is not None else None for grad in graph.forward(*args)]

    from torch._dynamo.backends.common import aot_autograd

    state = torch.get_rng_state()
    assert compiling.trial(torch.device("cpu"), dtype) == "" and torch.equal(torch.get_rng_state(), state)
    wrong = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=wrong_backward)
    monkeypatch.setattr(compiling, "BACKEND", wrong)
    assert re.match("its gradients are off by (9|1[01])[0-9].[0-9]%", compiling.trial(torch.device("cpu"), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inductors_kernels_for_a_gpu_compute_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    assert compiling.trial(torch.device("cuda"), dtype) == ""


def test_auto_is_on_for_gpus_with_triton_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for has_triton in (True, False):
        monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name, found=has_triton: found or None)
        assert resolve_compile("auto", "cuda") == resolve_compile(True, "cuda") == has_triton
    assert "train.compile has no effect: triton was not found" in caplog.text
    assert not resolve_compile("auto", "cpu") and not resolve_compile(False, "cuda") and resolve_compile(True, "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not resolve_compile(True, "cpu") and "a C++ compiler was not found" in caplog.text


def test_old_files_with_true_and_false_load() -> None:
    assert [load_and_merge_config_3d(None, [f"train.compile={v}"]).train.compile for v in ("true", "false")] == [True, False]
    with pytest.raises(ValueError, match="train.compile='always' is not one of true, false, auto"):
        load_and_merge_config_3d(None, ["train.compile=always"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_compile_too(real_list: Path, tmp_path: Path, strategy: str) -> None:
    in_ranks(_gradients_of_a_rank, str(tmp_path), str(real_list), strategy)
    plain, compiled = torch.load(tmp_path / "plain.pt"), torch.load(tmp_path / "compiled.pt")
    for name, grad in plain.items():
        torch.testing.assert_close(compiled[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def _gradients_of_a_rank(rank: int, folder: str, datalist: str, strategy: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    compiling.BACKEND = "aot_eager"
    torch.set_num_threads(1)
    for switch in ("plain", "compiled"):
        words = ["student.drop_path_rate=0.3", "train.batch_size_per_gpu=2", f"train.strategy={strategy}"]
        cfg = load_and_merge_config_3d(None, [*SMALL, *words, f"train.compile={switch == 'compiled'}"])
        model, _ = build(cfg, Runtime(torch.device("cpu"), rank, 2))
        batches = next(iter(TrainLoader(cfg, read_datalist(datalist), 0, rank, 2)))
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(3)
            model.forward_backward(batches, 0.05)
        grads = {n: g.full_tensor() if hasattr(g := p.grad, "full_tensor") else g for n, p in model.student.named_parameters()}
        assert bool(counters["stats"]["unique_graphs"]) == (switch == "compiled")
        if rank == 0:
            torch.save(grads, f"{folder}/{switch}.pt")
    dist.destroy_process_group()
