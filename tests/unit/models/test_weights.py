"""Weights become an encoder from whatever form they come in, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from omegaconf import DictConfig

from dinov2 import load_encoder
from dinov2.checkpointer import teacher as teacher_module
from dinov2.checkpointer.checkpointer import Checkpointer
from dinov2.checkpointer.export import export
from dinov2.configs import default_yaml, load_and_merge_config_3d
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.features.setup import build_model_for_eval
from dinov2.models.hub import fetch, is_repository
from dinov2.models.vision_transformer import vit_tiny_3d
from dinov2.streams import Kind, torch_seed
from dinov2.train.build import build
from dinov2.train.state import TrainState, save_teacher
from tests.conftest import ROOT

CPU = Runtime(torch.device("cpu"))
VIT_L = json.loads((ROOT / "tests" / "parity" / "state_dict_vit_large_3d.json").read_text())
SmallConfig = Callable[..., DictConfig]


@pytest.fixture
def teacher(tmp_path: Path, small_config: SmallConfig) -> tuple[Path, Path, torch.nn.Module]:
    """A teacher's file, the checkpoint folder of its run, and its backbone."""
    cfg = small_config("student.depth=4", "student.block_chunks=2", "student.pos_encoding=rope")
    state = TrainState(*build(cfg, CPU))
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", 1)
    checkpointer.save(state.state_dict(), 7)
    (tmp_path / "run" / "config.yaml").write_text(default_yaml(cfg))
    file = save_teacher(state.model, cfg, tmp_path / "run" / "eval", 7, {})
    return file, checkpointer.path(7), state.model.teacher["backbone"]


def tiny_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return vit_tiny_3d(patch_size=8, img_size=24, block_chunks=4, init_values=1e-5).state_dict()


def test_every_form_of_a_teacher_is_the_same_encoder(teacher: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, folder, backbone = teacher
    export(file, tmp_path / "flat.safetensors", 0, False)
    cfg = load_and_merge_config_3d(tmp_path / "run" / "config.yaml")
    bare = {f"module.{k}": v for k, v in backbone.state_dict().items()}
    torch.save({"model": bare}, tmp_path / "bare.pth")
    x = torch.rand(1, 1, 8, 12, 16)
    wanted = backbone.eval()(x)
    for source in (file, folder, tmp_path / "flat.safetensors"):
        torch.testing.assert_close(load_encoder(source, "cpu")(x).cls, wanted.detach(), msg=str(source))
    torch.testing.assert_close(load_encoder(tmp_path / "bare.pth", "cpu", config=cfg)(x).cls, wanted.detach())
    with pytest.raises(BadInput, match="24 and 4 blocks are of no network known by name.*how many heads.*config="):
        load_encoder(tmp_path / "bare.pth", "cpu")
    assert "licence of the weights: the weights' owner decides" in caplog.text
    assert "not said (the published 3DINO-ViT weights are CC BY-NC-ND 4.0)" in caplog.text


@pytest.mark.parametrize(
    "build_as",
    [
        {"init_values": 1e-5, "block_chunks": 4},
        {"init_values": None, "qkv_bias": False, "proj_bias": False, "num_register_tokens": 2},
        {"init_values": 1e-5, "ffn_layer": "swiglufused", "ffn_bias": False},
    ],
)
def test_weights_without_a_word_about_themselves_are_known_by_their_tensors(tmp_path: Path, build_as: dict) -> None:
    torch.manual_seed(0)
    net = vit_tiny_3d(patch_size=8, img_size=24, **build_as)
    heads = {"dino_head.last_layer.weight": torch.zeros(3, 3), "ibot_head.mlp.0.weight": torch.full((2, 2), torch.nan)}
    torch.save({"teacher": {**{f"backbone.{k}": v for k, v in net.state_dict().items()}, **heads}}, tmp_path / "t.pth")
    encoder = load_encoder(tmp_path / "t.pth", "cpu")
    x = torch.rand(1, 1, 24, 24, 24)
    torch.testing.assert_close(encoder(x).cls, net.eval()(x).detach())
    assert (encoder.patch_size, encoder.config.student.arch, encoder.config.crops.global_crops_size) == (8, "vit_tiny_3d", 24)


def test_positions_of_another_grid_are_interpolated_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    torch.save(tiny_state(), tmp_path / "t.pth")
    words = ["student.arch=vit_tiny_3d", "student.patch_size=8", "crops.global_crops_size=32", "crops.local_crops_size=16"]
    encoder = load_encoder(tmp_path / "t.pth", "cpu", config=load_and_merge_config_3d(None, words))
    assert encoder.backbone.pos_embed.shape == (1, 65, 192) and "interpolated to (4, 4, 4)" in caplog.text


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.update({"blocks.2.9.attn.qkvv.weight": s.pop("blocks.2.8.attn.qkv.weight")}),
         r"1 missing \(blocks.8.attn.qkv.weight\); 1 unexpected \(blocks.9.attn.qkvv.weight\)"),
        (lambda s: s.pop("pos_embed"), r"1 missing \(pos_embed\)"),
        (lambda s: s.pop("cls_token"), r"1 missing \(cls_token\)"),
        (lambda s: s.update({"norm.weight": s["norm.weight"][:5]}), r"1 of another shape \(norm.weight \(5,\) for \(192,\)\)"),
        (lambda s: s.update({"decoder.weight": torch.zeros(1)}), r"1 unexpected \(decoder.weight\)"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks")], "no vision transformer's tensors"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, change: Callable, words: str) -> None:
    state = dict(tiny_state())
    change(state)
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(BadInput, match=words):
        load_encoder(tmp_path / "t.pth", "cpu")


def test_weights_of_another_network_than_the_configuration_are_refused(tmp_path: Path) -> None:
    torch.save(tiny_state(), tmp_path / "t.pth")
    with pytest.raises(BadInput, match="does not fit this network"):
        load_encoder(tmp_path / "t.pth", "cpu", config="pretrain/tiny_cpu")


class Code:
    """Unpickling it would write a file."""

    def __reduce__(self) -> tuple:
        return (Path.write_text, (Path("ran"), "code"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("text.pth", b"these are no weights", "not a checkpoint of tensors that is safe to open"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer.*git lfs pull"),
        ("code.pth", pickle.dumps({"teacher": Code()}, protocol=2), "not a checkpoint of tensors that is safe to open"),
        ("list.pth", None, "holds no state dict"),
        ("none.pth", b"", "none.pth: no such file"),
        ("folder/none.pth", b"", "none.pth: no such file"),
    ],
)
def test_a_file_that_is_no_weights_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is None:
        torch.save([torch.zeros(2)], name)
    elif content:
        Path(name).write_bytes(content)
    with pytest.raises(BadInput, match=words) as caught:
        load_encoder(name, "cpu")
    assert "\n" not in str(caught.value) and not Path("ran").exists()


def test_what_is_nowhere_says_what_can_be_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(teacher_module, "DEMO", tmp_path / "demo.safetensors")
    with pytest.raises(BadInput, match="demo: this installation has no demo weights .*demo.safetensors.: install"):
        load_encoder("demo")
    with pytest.raises(BadInput, match="vit_smal_3d: no such file, folder or network: .*vit_small_3d"):
        load_encoder("vit_smal_3d")
    with pytest.raises(BadInput, match="dtype 'half': choose auto, fp32, bf16, fp16"):
        load_encoder("vit_tiny_3d", dtype="half")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="device cuda: cannot be used here"):
            load_encoder("vit_tiny_3d", "cuda")


class FakeHub:
    """Repositories in a folder laid out as huggingface-hub's cache; unreachable on request."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.snapshot, self.is_reachable = folder / "snapshots" / "main", True
        (folder / "blobs").mkdir(parents=True)
        self.snapshot.mkdir(parents=True)
        self.names = list(files)
        for name, content in files.items():
            blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (self.snapshot / name).symlink_to(blob)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda filename, **_: str(self.snapshot / filename))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo_id: str, revision: str | None, timeout: float) -> SimpleNamespace:
        assert repo_id == "group/vit" and revision in (None, "v1") and 0 < timeout < 60
        if not self.is_reachable:
            raise OfflineModeIsEnabled("cannot reach the hub\nwith details")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, local_files_only: bool, **_: object) -> str:
        assert local_files_only
        if not self.names:
            raise FileNotFoundError("no snapshot")
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    torch.save(tiny_state(), tmp_path / "t.pth")
    card = b"---\nlicense: cc-by-nc-nd-4.0\n---\nA card.\n"
    hub = FakeHub(tmp_path / "cache", {"weights.pth": (tmp_path / "t.pth").read_bytes(), "README.md": card})
    hub.install(monkeypatch)
    return hub


def test_a_repository_gives_weights_and_licence_with_and_without_the_hub(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = load_encoder(tmp_path / "t.pth", "cpu").fingerprint()
    for source in ("group/vit", "group/vit@v1:weights.pth"):
        encoder = load_encoder(source, "cpu")
        assert encoder.fingerprint() == wanted and encoder.licence == "cc-by-nc-nd-4.0"
    assert "group/vit: licence of the weights: cc-by-nc-nd-4.0" in caplog.text
    hub.is_reachable = False
    assert load_encoder("group/vit", "cpu").licence == "cc-by-nc-nd-4.0"
    assert "from the cache, the Hugging Face hub gave nothing (cannot reach the hub with details)" in caplog.text


def test_an_unreachable_hub_a_damaged_file_and_a_choice_are_one_line(hub: FakeHub) -> None:
    hub.names.append("other.safetensors")
    with pytest.raises(BadInput, match="has other.safetensors, weights.pth: choose one, as group/vit:other.safetensors"):
        load_encoder("group/vit", "cpu")
    with pytest.raises(BadInput, match="is damaged .another SHA-256"):
        blob = (hub.snapshot / "weights.pth").resolve()
        blob.write_bytes(blob.read_bytes()[:-3])
        load_encoder("group/vit:weights.pth", "cpu")
    hub.is_reachable = False
    hub.names.clear()
    with pytest.raises(BadInput, match="neither a file here nor to be had from the Hugging Face hub .cannot reach") as caught:
        load_encoder("group/vit", "cpu")
    assert "\n" not in str(caught.value)


def test_the_library_asks_a_hub_that_cannot_be_reached_once_and_finds_its_cached_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never(_: float) -> None:
        raise AssertionError("waits to ask again")

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(time, "sleep", never)
    with pytest.raises(BadInput, match="group/vit: neither a file here nor to be had from the Hugging Face hub") as caught:
        fetch("group/vit", tmp_path)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "models--group--vit"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "weights.pth").write_bytes(b"")
    assert fetch("group/vit", tmp_path).path.name == "weights.pth"
    assert "group/vit: from the cache, the Hugging Face hub gave nothing" in caplog.text


@pytest.mark.parametrize("source", ["vit", "group/vit/file", "group/vit@", ""])
def test_what_does_not_read_as_a_repository_is_refused_in_words(source: str) -> None:
    assert not is_repository(source)
    with pytest.raises(BadInput, match=r"not a repository of the Hugging Face hub: write owner/name\[@revision\]\[:file\]"):
        fetch(source)


def test_no_number_is_drawn_for_a_network_that_is_loaded(teacher: tuple) -> None:
    """A ViT-L's would take longer than reading its file."""
    file, _, backbone = teacher
    cfg = load_and_merge_config_3d(file.parents[1] / "config.yaml")
    torch.manual_seed(torch_seed(cfg.train.seed, Kind.INIT, 0))
    before = torch.get_rng_state()
    loaded = build_model_for_eval(cfg, file, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), backbone.state_dict().values(), strict=True))


@pytest.mark.slow
def test_the_published_layout_loads_and_runs_on_a_cpu(tmp_path: Path) -> None:
    """ViT-L on 112 cubed: by the encoder, and by the calls of the published programs."""
    torch.manual_seed(0)
    state = {k: (torch.rand(1) * 0.02).expand(shape) for k, shape in VIT_L.items()}  # a number a tensor, on disk
    file = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": state}, file)
    x = torch.rand(1, 1, 112, 112, 112)
    encoder = load_encoder(file, "cpu")
    found = encoder(x)
    assert found.cls.shape == (1, 1024) and found.patch.shape == (1, 7, 7, 7, 1024)
    cls = build_model_for_eval(load_and_merge_config_3d("train/vit3d_highres"), file, CPU)(x)
    torch.testing.assert_close(cls, found.cls)
    state["backbone.blocks.1.7.attn.key.weight"] = state.pop("backbone.blocks.1.7.attn.qkv.weight")
    torch.save({"teacher": state}, file)
    with pytest.raises(BadInput, match=r"1 missing \(blocks.7.attn.qkv.weight\); 1 unexpected \(blocks.7.attn.key.weight\)"):
        load_encoder(file, "cpu")
