"""MONAI-ViT's objective: its losses, one update whatever the passes, exact resume, and what is counted."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.losses import ContrastiveLoss
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.train_step import MatrixProducts
from dinov2.checkpointer.teacher import open_teacher
from dinov2.configs.errors import ConfigError
from dinov2.data import TrainLoader, read_datalist, write_datalist
from dinov2.data.volumes.opening import describe
from dinov2.distributed.runtime import Runtime
from dinov2.errors import EXIT_OK
from dinov2.eval.methods.registry import find_method
from dinov2.features.encoder import load_encoder
from dinov2.loss.contrastive_loss import contrastive_loss
from dinov2.train.build import build
from dinov2.train.flops import step_flops
from dinov2.train.swin_meta_arch import SwinMetaArch
from scripts.results import held_out
from tests.conftest import Trainer, read_json_lines
from tests.unit.data.test_swin_views import SWIN
from tests.unit.train.test_train import flops_of

SmallConfig = Callable[..., DictConfig]
CPU = Runtime(torch.device("cpu"))
WORDS = [
    *SWIN,
    "student.drop_path_rate=0",
    "teacher.momentum_teacher=0",
    "teacher.final_momentum_teacher=0",
    "swin.contrastive_dim=8",
]


def first_batch(cfg: DictConfig, path: Path) -> dict:
    [batch] = next(iter(TrainLoader(cfg, read_datalist(path))))
    return batch


def test_contrast_is_the_cross_entropy_of_the_other_view_among_all_others() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 5, 7, dtype=torch.float64)
    rows = [F.normalize(x, dim=0) for x in (*one, *other)]
    expected = []
    for i, row in enumerate(rows):
        scores = {j: float(row @ rows[j]) / 0.3 for j in range(10) if j != i}
        total = torch.tensor(list(scores.values()), dtype=torch.float64).logsumexp(0)
        expected.append(float(total) - scores[(i + 5) % 10])
    assert float(contrastive_loss(one, other, 0.3)) == pytest.approx(sum(expected) / 10, rel=1e-12)
    assert float(contrastive_loss(one, other, 0.5)) == pytest.approx(float(ContrastiveLoss(0.5)(one, other)), rel=1e-6)


def test_losses_are_of_what_was_asked(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config(*WORDS, "swin.rotation_loss_weight=2", "swin.reconstruction_loss_weight=0.5")
    model, batch = build(cfg, CPU)[0].eval(), first_batch(cfg, real_list)
    assert isinstance(model, SwinMetaArch)
    with torch.no_grad():
        losses, _ = model.losses(batch)
        out = model.student.backbone(batch["collated_local_crops"], is_training=True)
        turns, features, volumes = model.student["swin_head"](out["x_norm_clstoken"], out["x_norm_patchtokens"])
    assert volumes.shape == batch["collated_global_crops"].shape == (6, 1, 16, 16, 16) and features.shape == (6, 8)
    rotation = -turns.log_softmax(1)[torch.arange(6), batch["rotations"]].mean()
    reconstruction = (volumes - batch["collated_global_crops"]).abs().mean()
    assert float(losses["rotation_loss"]) == pytest.approx(float(rotation), rel=1e-5)
    assert float(losses["reconstruction_loss"]) == pytest.approx(float(reconstruction), rel=1e-5)
    assert float(losses["contrastive_loss"]) == pytest.approx(float(contrastive_loss(features[:3], features[3:])), rel=1e-5)
    total = 2 * losses["rotation_loss"] + losses["contrastive_loss"] + 0.5 * losses["reconstruction_loss"]
    assert float(losses["total_loss"]) == pytest.approx(float(total), rel=1e-6)


def test_a_reconstructed_voxel_comes_from_its_own_patch(small_config: SmallConfig) -> None:
    head = build(small_config(*WORDS), CPU)[0].student["swin_head"]
    patches = torch.randn(1, 64, 24, requires_grad=True)  # [B, N, E]
    head(torch.zeros(1, 24), patches)[2][0, 0, 9, 2, 14].backward()
    assert patches.grad.abs().sum(2).nonzero().tolist() == [[0, 2 * 16 + 0 * 4 + 3]]


def test_every_network_of_the_student_learns_and_the_teacher_is_it(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config(*WORDS)
    model, optimizer = build(cfg, CPU)
    values = model.forward_backward(first_batch(cfg, real_list), 0.07, monitor=True)
    unused = {n for n, p in model.student.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert unused <= {"backbone.mask_token"}
    assert {"rotation_accuracy", "feature_rank", "mean_cosine"} < values.keys()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    model.update_teacher(0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.student.parameters(), model.teacher.parameters(), strict=True))


def test_products_are_counted_as_recorders_inside_the_step_count_them(real_list: Path, small_config: SmallConfig) -> None:
    cfg = small_config(*WORDS)
    model, batch = build(cfg, CPU)[0], first_batch(cfg, real_list)
    with FlopCounterMode(display=False) as counter, MatrixProducts() as products:
        model.forward_backward(batch, 0.07)
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    of_contrast = 3 * 2 * 6 * 6 * 8  # forward and backward, 6 rows of 8 features
    expected = sum(flops_of(call) for call in products.calls) - of_contrast + convolutions
    assert convolutions and step_flops(model, [batch]) == expected


@pytest.mark.parametrize(
    "word, words",
    [
        ("train.objective=simclr", "train.objective='simclr' is not one of 3dino, swin"),
        ("train.orientation=RAX", "train.orientation='RAX' is not three of L or R, P or A, I or S"),
        ("train.orientation=RLS", "train.orientation='RLS' is not three of"),
        ("student.patch_size=6 crops.global_crops_size=18 crops.local_crops_size=18", "student.patch_size=6 is no power of 2"),
        ("swin.max_corrupted=0", "swin.max_corrupted=0.0 must lie in"),
        ("swin.contrastive_temperature=-1", "swin.contrastive_temperature=-1.0 must lie in"),
        ("swin.rotation_loss_weight=-1", r"swin.\*_loss_weight=.* must not be negative"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(small_config: SmallConfig, word: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config("train.objective=swin", *word.split())


def test_a_killed_run_goes_on_as_if_it_had_not_been(trainer: Trainer, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    words = [*WORDS, "train.accumulation_steps=2", "optim.epochs=1"]
    assert trainer.call(whole, *words).returncode == EXIT_OK
    assert trainer.call(half, *words, "train.dataset_path=/nowhere.json").returncode == 2
    stop = trainer.call(half, *words, "train.checkpoint_period=3")
    assert stop.returncode == EXIT_OK
    for folder in (half / "checkpoints").iterdir():
        if folder.name != "0000002":
            shutil.rmtree(folder)
    assert [folder.name for folder in (half / "checkpoints").iterdir()] == ["0000002"]
    shutil.rmtree(half / "eval")
    assert trainer.call(half, *words).returncode == EXIT_OK
    teacher = "eval/training_5/teacher_checkpoint.pth"
    one, other = (torch.load(out / teacher, weights_only=True)["teacher"] for out in (whole, half))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert any(k.startswith("swin_head.") for k in one)


def test_its_losses_fall_on_volumes_that_it_did_not_see(local_data: Path, trainer: Trainer, tmp_path: Path) -> None:
    """A hundred steps of a small network on eight scans; the other eight are what is measured."""
    scans = sorted((local_data / "brain_t1" / "images").glob("*.nii.gz"))
    for name, part in (("train", scans[:8]), ("held", scans[8:16])):
        write_datalist(tmp_path / f"{name}.json", [describe(p) for p in part])
    words = [*WORDS, f"train.dataset_path={tmp_path}/train.json", "student.pos_encoding=rope", "student.init=xavier"]
    words += ["student.layerscale=null", "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=100", "optim.base_lr=0.003"]
    words += ["optim.scaling_rule=none", "optim.layerwise_decay=1", "train.batch_size_per_gpu=8", "optim.warmup_epochs=0"]
    words += ["train.memory_store_mb=500", "train.log_period=50", "student.embed_dim=48"]
    words += ["optim.patch_embed_lr_mult=1", "student.num_heads=4"]
    assert trainer.call(tmp_path / "run", *words).returncode == EXIT_OK
    table = tmp_path / "held.csv"
    words = ["--datalist", f"{tmp_path}/held.json", "--output", str(table), "--batches", "8"]
    assert held_out.main([str(tmp_path / "run"), *words]) == EXIT_OK
    with open(table) as file:
        before, after = ({k: float(v) for k, v in row.items()} for row in csv.DictReader(file))
    assert after["iteration"] == 99
    print(before, after)
    for name in ("rotation_loss", "contrastive_loss", "reconstruction_loss"):
        assert after[name] < 0.97 * before[name], (name, before, after)


def test_its_weights_open_as_the_method_and_say_what_they_are(trainer: Trainer, tmp_path: Path) -> None:
    assert trainer.call(tmp_path / "run", *WORDS, "optim.epochs=1").returncode == EXIT_OK
    rows = read_json_lines(tmp_path / "run" / "training_metrics.json")
    assert {"rotation_loss", "contrastive_loss", "reconstruction_loss"} < rows[-1].keys()
    teacher = open_teacher(str(tmp_path / "run" / "eval" / "training_5" / "teacher_checkpoint.pth"))
    assert teacher.meta["config"]["train"]["objective"] == "swin"
    assert load_encoder(str(tmp_path / "run"), "cpu").embed_dim == 24
    assert find_method("MONAI-ViT").weights == "trained"
