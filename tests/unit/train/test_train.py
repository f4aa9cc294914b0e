"""One step: accumulation, the teacher, schedules, non-finite steps, monitors, weights from files."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_step import MatrixProducts, Setup
from dinov2.checkpointer.teacher import read_weights
from dinov2.data import TrainLoader, read_datalist
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.models.weights import load_backbone, load_heads
from dinov2.train import monitors
from dinov2.train.build import build, load_start_weights
from dinov2.train.flops import step_flops
from dinov2.train.schedules import CosineSchedule, StepParams, build_schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.state import TrainState, save_teacher
from dinov2.train.train3d import MAX_SKIPPED_IN_ROW, note_arrived, train_step
from tests.conftest import SMALL

SmallConfig = Callable[..., DictConfig]
CPU = Runtime(torch.device("cpu"))
FP64 = [
    f"compute_precision.{side}.{module}.mixed_precision.param_dtype=fp64"
    for side in ("student", "teacher")
    for module in ("backbone", "dino_head", "ibot_head")
]
HP = StepParams(lr=1e-3, wd=0.1, mom=0.9, teacher_temp=0.05, last_layer_lr=1e-3)


def first_step(cfg: DictConfig, path: Path) -> list[dict]:
    return next(iter(TrainLoader(cfg, read_datalist(path))))


def in_double(batches: list[dict]) -> list[dict]:
    return [{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in b.items()} for b in batches]


def gradients(model: SSLMetaArch) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.student.named_parameters()}


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
@pytest.mark.parametrize("separate", [True, False])
def test_accumulated_micro_batches_equal_one_batch(
    real_list: Path, small_config: SmallConfig, centering: str, separate: bool
) -> None:
    common = [*FP64, "dino.koleo_loss_weight=0", "student.drop_path_rate=0", f"train.centering={centering}"]
    common += [f"ibot.separate_head={separate}", "ibot.head_n_prototypes=16"]
    losses, grads = [], []
    for sizes in (["train.batch_size_per_gpu=4"], ["train.batch_size_per_gpu=2", "train.accumulation_steps=2"]):
        cfg = small_config(*common, *sizes)
        model, _ = build(cfg, CPU)
        losses.append(model.forward_backward(in_double(first_step(cfg, real_list)), 0.05))
        grads.append(gradients(model))
    for name in ("dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "total_loss"):
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=1e-12, atol=0)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-13, msg=name)


def test_modules_of_different_precisions_work_together(real_list: Path, small_config: SmallConfig) -> None:
    """A backbone in bf16 before heads in fp16, which a CPU computes in float32."""
    cfg = small_config(
        *(f"compute_precision.{side}.backbone.mixed_precision.param_dtype=bf16" for side in ("student", "teacher"))
    )
    model, _ = build(cfg, CPU)
    assert model.forward_backward(first_step(cfg, real_list), 0.05)["total_loss"].isfinite()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())


def test_cross_entropies_are_comparable_with_log_k(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config("student.drop_path_rate=0")
    model, _ = build(cfg, CPU)
    batches = first_step(cfg, real_list)
    losses = model.forward_backward(batches, 0.05, monitor=True)
    targets, _ = model.teacher_targets(batches, 0.05)
    student = model.student_outputs(batches[0])
    pairs = [
        (s, t) for i, s in enumerate([*student.global_cls, *student.local_cls]) for j, t in enumerate(targets[0].cls) if i != j
    ]
    by_hand = torch.stack([-(t * torch.log_softmax(s / 0.1, -1)).sum(-1).mean() for s, t in pairs]).mean()
    torch.testing.assert_close(losses["dino_cross_entropy"], by_hand)
    assert losses["dino_cross_entropy"] < 3 * math.log(16) and losses["ibot_cross_entropy"] < 3 * math.log(24)
    assert 0 <= losses["teacher_entropy"] <= math.log(16) and 0 <= losses["student_entropy"] <= math.log(16)
    assert 1 <= losses["prototypes_used"] <= 6 and 1 <= losses["feature_rank"] <= 5 and losses["mean_cosine"] <= 1


def test_no_local_crops_and_no_masks_train_too(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config("crops.local_crops_number=0", "ibot.mask_sample_probability=0")
    model, optimizer = build(cfg, CPU)
    values = train_step(TrainState(model, optimizer), HP, first_step(cfg, real_list), 3.0, monitor=True)
    assert float(values["dino_local_crops_loss"]) == 0 and float(values["ibot_loss"]) == 0
    assert all(v.isfinite() for v in values.values())


def test_the_teacher_is_the_moving_average_and_gets_no_gradient(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config()
    model, optimizer = build(cfg, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.student.parameters(), model.teacher.parameters(), strict=True))
    before = [p.clone() for p in model.teacher.parameters()]
    train_step(TrainState(model, optimizer), HP, first_step(cfg, real_list), 3.0, monitor=False)
    for old, new, student in zip(before, model.teacher.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)
        assert new.grad is None
    assert not model.teacher.training and model.student.training


def test_half_precision_trains_and_stays_near_fp32(real_list: Path, small_config: SmallConfig) -> None:
    half = [f"{o.split('=')[0]}=bf16" for o in FP64]
    totals = []
    for precision in ([], half):
        cfg = small_config("student.drop_path_rate=0", *precision)
        model, _ = build(cfg, CPU)
        totals.append(float(model.forward_backward(first_step(cfg, real_list), 0.05)["total_loss"]))
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())
    assert totals[1] == pytest.approx(totals[0], rel=0.05) and totals[1] != totals[0]


def test_activation_checkpointing_changes_no_gradient_and_keeps_less(real_list: Path, small_config: SmallConfig) -> None:
    """Stochastic depth is that of the first pass."""
    grads, kept = {}, {}
    for mode in ("none", "full"):
        cfg = small_config("student.drop_path_rate=0.3", f"train.activation_checkpointing={mode}")
        model, _ = build(cfg, CPU)
        batch = first_step(cfg, real_list)
        torch.manual_seed(5)
        model.forward_backward(batch, 0.05)
        grads[mode] = gradients(model)
        kept[mode] = _bytes_kept(model, batch[0])
    assert all(torch.equal(g, grads["full"][name]) for name, g in grads["none"].items())
    assert kept["none"] > 2.5 * kept["full"]


def test_a_budget_without_compiling_is_said_to_have_no_effect(
    small_config: SmallConfig, caplog: pytest.LogCaptureFixture
) -> None:
    build(small_config("train.activation_checkpointing=budget:0.8", "train.compile=false"), CPU)
    assert "train.activation_checkpointing=budget has no effect without train.compile: use full" in caplog.text


def _bytes_kept(model: SSLMetaArch, batch: dict) -> int:
    """Memory that a forward pass of the student's backbone leaves allocated for its backward pass."""
    backbone = model.student["backbone"]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = backbone(batch["collated_global_crops"], is_training=True)
    assert kept["x_norm_clstoken"].requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def test_the_products_of_a_step_are_counted_from_shapes(real_list: Path, small_config: SmallConfig) -> None:
    """As a recorder inside the step sees them, with attention's backward pass as four products."""
    for words in (["student.drop_path_rate=0.3"], ["student.ffn_layer=swiglu", "ibot.separate_head=false"]):
        cfg = small_config(*words, "student.num_register_tokens=2")
        model, optimizer = build(cfg, CPU)
        batches = first_step(cfg, real_list)
        with MatrixProducts() as products:
            train_step(TrainState(model, optimizer), HP, batches, 3.0, monitor=False)
        koleo = sum(2 * len(x) ** 2 * 24 for x in batches[0]["collated_global_crops"].chunk(2))  # similarities, forward
        assert step_flops(model, batches) == sum(flops_of(call) for call in products.calls) - koleo


def flops_of(call: tuple[Callable, tuple]) -> int:
    (a, _), (b, _) = call[1]
    return 2 * math.prod(a) * b[-1]


def test_crops_in_half_precision_change_nothing(real_list: Path, small_config: SmallConfig) -> None:
    """What the loader hands over in bf16 the patch embedding would have rounded to bf16 itself."""
    cfg = small_config("student.drop_path_rate=0", *(f"{o.split('=')[0]}=bf16" for o in FP64))
    (batch,) = first_step(cfg, real_list)
    assert batch["collated_global_crops"].dtype == batch["collated_local_crops"].dtype == torch.bfloat16
    as_float = {k: v.float() if torch.is_tensor(v) and v.dtype == torch.bfloat16 else v for k, v in batch.items()}
    results = []
    for b in (batch, as_float):
        model, _ = build(cfg, CPU)
        results.append((model.forward_backward([b], 0.05)["total_loss"], gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(g, results[1][1][name]) for name, g in results[0][1].items())


def test_a_warm_up_longer_than_the_run_is_cut_with_a_warning(
    small_config: SmallConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        schedules = build_schedules(small_config("optim.warmup_epochs=50", "teacher.warmup_teacher_temp_epochs=50"))
    assert "optim.warmup_epochs: the warm-up of 300 iterations is cut to the run's 12" in caplog.text
    assert schedules.lr(11) == pytest.approx(schedules.lr.base)
    assert schedules.teacher_temp(11) == pytest.approx(0.07)


def test_a_schedule_warms_up_holds_zero_and_ends_on_its_final_value() -> None:
    schedule = CosineSchedule(base=2.0, final=1.0, total_iters=10, warmup_iters=4, zero_iters=2)
    assert [schedule(i) for i in range(4)] == pytest.approx([0, 0, 4 / 3, 2.0])
    assert schedule(4) == 2.0 and schedule(7) == pytest.approx(1.5) and schedule(10) == schedule(99) == 1.0


def test_the_frozen_last_layer_does_not_move(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config()
    model, optimizer = build(cfg, CPU)
    heads = {n: p.clone() for n, p in model.student.named_parameters()}
    hp = StepParams(lr=1e-3, wd=0.1, mom=0.9, teacher_temp=0.05, last_layer_lr=0.0)
    train_step(TrainState(model, optimizer), hp, first_step(cfg, real_list), 3.0, monitor=False)
    moved = {n for n, p in model.student.named_parameters() if not torch.equal(p, heads[n])}
    assert not any("last_layer" in n for n in moved) and any("dino_head.mlp" in n for n in moved)


def test_gradients_are_clipped_per_module(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config()
    model, optimizer = build(cfg, CPU)
    values = train_step(TrainState(model, optimizer), HP, first_step(cfg, real_list), 0.01, monitor=False)
    for name, net in model.student.items():
        norm = torch.sqrt(sum(p.grad.square().sum() for p in net.parameters()))
        assert float(norm) == pytest.approx(0.01, rel=1e-3) and values[f"grad_norm_{name}"] > 0.01


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_a_non_finite_step_changes_nothing_is_named_and_five_in_a_row_stop(
    real_list: Path, small_config: SmallConfig, caplog: pytest.LogCaptureFixture, centering: str
) -> None:
    cfg = small_config(f"train.centering={centering}")
    model, optimizer = build(cfg, CPU)
    state = TrainState(model, optimizer)
    good = first_step(cfg, real_list)
    train_step(state, HP, good, 3.0, monitor=False)
    poisoned = [{**good[0], "collated_global_crops": good[0]["collated_global_crops"] * torch.nan}]
    before = {k: v.clone() for k, v in model.state_dict().items() if "pending" not in k}
    moments = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    for i in range(1, MAX_SKIPPED_IN_ROW):
        train_step(state, HP, poisoned, 3.0, monitor=True)
        assert (state.skipped_steps, state.skipped_in_row) == (i, i)
    assert "sub-01_T1w" in caplog.text
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if "center.center" not in k)
    assert all(torch.equal(m, optimizer.state[p]["exp_avg"]) for p, m in moments.items())
    with pytest.raises(BadInput, match="5 non-finite steps in a row"):
        train_step(state, HP, poisoned, 3.0, monitor=False)
    state.skipped_in_row = 1
    train_step(state, HP, good, 3.0, monitor=False)
    assert state.skipped_in_row == 0
    assert all(v.isfinite().all() for v in model.state_dict().values() if v.is_floating_point())


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_a_host_that_runs_a_step_ahead_counts_the_same_and_changes_nothing_more(
    real_list: Path, small_config: SmallConfig, caplog: pytest.LogCaptureFixture, centering: str
) -> None:
    """As on a GPU: a non-finite step is left out before the host knows of it, and is named one step later."""
    cfg = small_config(f"train.centering={centering}")
    good = first_step(cfg, real_list)
    poisoned = [{**good[0], "collated_global_crops": good[0]["collated_global_crops"] * torch.nan, "sample_ids": ["bad one"]}]
    states = []
    for lag in (0, 1):
        state = TrainState(*build(cfg, CPU))
        state.flags.lag = lag
        for batch in (good, poisoned, good, poisoned, poisoned, good):
            torch.manual_seed(3)
            train_step(state, HP, batch, 3.0, monitor=False)
            state.iteration += 1
        states.append(state)
    assert (states[1].skipped_steps, states[1].skipped_in_row) == (3, 2)  # the last good one is on its way
    note_arrived(states[1], drain=True)
    assert (states[1].skipped_steps, states[1].skipped_in_row) == (states[0].skipped_steps, states[0].skipped_in_row) == (3, 0)
    before, after = (s.state_dict() for s in states)
    for part in ("model", "optimizer", "counters"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    assert all(float(s["step"]) == 3 for s in states[1].optimizer.state.values())
    assert [r.args for r in caplog.records if "is not finite" in r.msg] == 2 * [(i, "bad one") for i in (1, 3, 4)]
    with pytest.raises(BadInput, match="5 non-finite steps in a row up to iteration 10"):
        for _ in range(6):
            train_step(states[1], HP, poisoned, 3.0, monitor=False)
            states[1].iteration += 1


def test_a_stop_request_travels_with_the_flags(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config()
    state, batch = TrainState(*build(cfg, CPU)), first_step(cfg, real_list)
    state.flags.lag = 1
    seen = []
    for stop in (False, True, False):
        train_step(state, HP, batch, 3.0, monitor=False, stop=stop)
        seen.append(state.stop_seen)
    assert seen == [False, False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_never_waits_for_the_device(small_config: SmallConfig, precision: str) -> None:
    half = [f"{o.split('=')[0]}={precision}" for o in FP64]
    setup = Setup([*SMALL, *half, "student.drop_path_rate=0.3", "train.compile=false"], batch=4, device="cuda")
    setup.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            setup.state.flags._in_flight.clear()  # what waits for a step that is long done
            setup.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_monitors_tell_a_collapse() -> None:
    torch.manual_seed(0)
    spread, collapsed = torch.randn(32, 16), torch.ones(32, 16) + 1e-4 * torch.randn(32, 16)
    uniform, peaked = torch.full((32, 8), 1 / 8), torch.eye(8).repeat(4, 1)
    healthy = monitors.collapse_monitors(spread, peaked, peaked)
    flat = monitors.collapse_monitors(collapsed, torch.zeros(32, 8), uniform)
    assert float(flat["teacher_entropy"]) == pytest.approx(math.log(8)) and float(healthy["teacher_entropy"]) == 0
    assert (int(healthy["prototypes_used"]), int(flat["prototypes_used"])) == (8, 1)
    assert float(flat["mean_cosine"]) > 0.99 and abs(float(healthy["mean_cosine"])) < 0.1
    line = torch.arange(10.0)[:, None] * torch.randn(1, 16)
    assert float(monitors.effective_rank(line)) == pytest.approx(1, abs=0.01)
    assert float(healthy["feature_rank"]) > 10
    assert float(monitors.mean_entropy(torch.zeros(3, 8))) == pytest.approx(math.log(8))


# ---------------------------------------------------------------------- weights from files


@pytest.fixture
def teacher_file(tmp_path: Path, small_config: SmallConfig) -> Path:
    cfg = small_config()
    model = SSLMetaArch(cfg)
    return save_teacher(model, cfg, tmp_path / "eval" / "training_5", 5, {"datalist_sha256": "0" * 64})


def test_a_teacher_checkpoint_describes_itself_and_opens_safely(teacher_file: Path) -> None:
    content = torch.load(teacher_file, weights_only=True)
    assert {k.split(".")[0] for k in content["teacher"]} == {"backbone", "dino_head", "ibot_head"}
    meta = content["meta"]
    assert meta["iteration"] == 5 and meta["config"]["student"]["embed_dim"] == 24
    assert meta["preprocessing"]["percentiles"] == [0.05, 99.95] and meta["versions"]["torch"] and meta["licence"]


def test_a_run_starts_from_another_ones_weights(teacher_file: Path, small_config: SmallConfig) -> None:
    theirs = torch.load(teacher_file, weights_only=True)["teacher"]
    full, _ = build(small_config(f"student.full_pretrained_weights={teacher_file}", "train.seed=9"), CPU)
    load_start_weights(full, full.cfg)
    for side in (full.student, full.teacher):
        assert all(torch.equal(v, theirs[k]) for k, v in side.state_dict().items())
    backbone_only, _ = build(small_config(f"student.pretrained_weights={teacher_file}", "train.seed=9"), CPU)
    load_start_weights(backbone_only, backbone_only.cfg)
    state = backbone_only.teacher.state_dict()
    assert all(
        torch.equal(v, theirs[k]) == k.startswith("backbone") for k, v in state.items() if "mlp.0.weight" in k or "qkv.w" in k
    )


def test_weights_without_heads_are_no_full_start(small_config: SmallConfig, teacher_file: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in read_weights(teacher_file).items() if k.startswith("backbone.")}
    torch.save({"teacher": state}, tmp_path / "backbone.pth")
    model, _ = build(small_config(f"student.full_pretrained_weights={tmp_path / 'backbone.pth'}"), CPU)
    with pytest.raises(BadInput, match="backbone.pth: hold no heads .dino_head, ibot_head.: use student.pretrained_weights"):
        load_start_weights(model, model.cfg)


def test_a_larger_grid_and_chunked_names_load(teacher_file: Path, small_config: SmallConfig, tmp_path: Path) -> None:
    cfg = small_config("crops.global_crops_size=20", "student.block_chunks=2")
    model, _ = build(cfg, CPU)
    weights = read_weights(teacher_file)
    load_backbone(model.student["backbone"], weights, teacher_file)
    load_heads({k: model.student[k] for k in ("dino_head", "ibot_head")}, weights, teacher_file)
    assert model.student["backbone"].pos_embed.shape == (1, 126, 24)
    torch.testing.assert_close(model.student["backbone"].block_list[1].mlp.fc1.bias, weights["backbone.blocks.1.mlp.fc1.bias"])
    chunked = {f"module.{k}": v for k, v in model.student["backbone"].state_dict().items()}
    torch.save(chunked, tmp_path / "bare.pth")
    flat = SSLMetaArch(small_config("crops.global_crops_size=20")).student["backbone"]
    load_backbone(flat, read_weights(tmp_path / "bare.pth"), "bare")
    x = torch.randn(1, 1, 20, 20, 20)
    torch.testing.assert_close(flat.eval()(x), model.student["backbone"].eval()(x))


class _Evil:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_text("weights"), "not a checkpoint"),
        (lambda p: p.write_bytes(b""), "not a checkpoint"),
        (lambda p: torch.save({"teacher": _Evil()}, p), "holds builtins.print, and opening objects can run code"),
        (lambda p: torch.save({"epoch": 3}, p), "holds no state dict"),
        (lambda p: torch.save({"cls_token": torch.zeros(1, 1, 7)}, p), "missing .* of another shape"),
    ],
)
def test_a_file_that_holds_no_such_weights_is_refused_by_name(
    tmp_path: Path, small_config: SmallConfig, write: Callable[[Path], object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.pth"
    write(path)
    model = SSLMetaArch(small_config())
    with pytest.raises(BadInput, match=words) as err:
        load_backbone(model.student["backbone"], read_weights(path), path)
    assert str(path) in str(err.value) and "\n" not in str(err.value) and "code ran" not in capsys.readouterr().out


def test_initial_weights_follow_the_seed(small_config: SmallConfig) -> None:
    nets = [build(small_config(f"train.seed={s}"), CPU)[0].student.state_dict() for s in (1, 1, 2)]
    assert all(torch.equal(v, nets[1][k]) for k, v in nets[0].items())
    assert not torch.equal(nets[0]["backbone.blocks.0.attn.qkv.weight"], nets[2]["backbone.blocks.0.attn.qkv.weight"])
    xavier = build(small_config("student.init=xavier"), CPU)[0].student["backbone"]
    bound = math.sqrt(6 / (24 + 96))
    assert bound * 0.95 < float(xavier.block_list[0].mlp.fc1.weight.detach().abs().max()) <= bound
    assert float(np.std(xavier.cls_token.detach().numpy())) > 0.01


def test_the_loss_scaler_owns_overflowing_gradients(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config()
    model, optimizer = build(cfg, CPU)
    state = TrainState(model, optimizer)
    model.grad_scaler = SimpleNamespace(
        scale=lambda x: x * torch.inf, unscale_=lambda o: None, step=lambda o: None, update=lambda: None,
        is_enabled=lambda: True, state_dict=dict,
    )  # fmt: skip
    train_step(state, HP, first_step(cfg, real_list), 3.0, monitor=False)
    assert state.skipped_steps == 0  # the scaler lowers its scale; not a fault of the data
