"""Encoders of others from generated weights in their published layout: the numbers of their own class or plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import swin_unetr
from monai.networks.nets.segresnet_ds import SegResEncoder
from safetensors.torch import save_file
from torch import Tensor

from dinov2 import load_encoder
from dinov2.cli import main
from dinov2.data import Entry, write_datalist
from dinov2.errors import BadInput, BadVolume
from dinov2.features.retrieval.command import RetrieveRequest, embedded
from dinov2.features.retrieval.table import FeatureTable
from dinov2.features.setup import ours_alone
from dinov2.models.vision_transformer import vit_tiny_3d

CT_FM, VOCO, SLICES = (f"dinov2.models.foreign:{name}" for name in ("ct_fm", "voco", "dinov2_slices"))


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a layout; statistics and scales near 1."""
    torch.manual_seed(seed)
    near_one = ("running_var", "norm1.weight", "norm2.weight", "norm.weight", "gamma")
    found = {k: torch.randn(s) * 0.1 + k.endswith(near_one) for k, s in shapes.items() if s}
    return {**found, **{k: torch.tensor(3) for k, s in shapes.items() if not s}}


def ct_fm_layout(filters: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of CT-FM's feature extractor: 1, 2, 2, 4, 4 blocks of two convolutions on levels of doubling width."""
    shapes: dict[str, tuple[int, ...]] = {"conv_init.weight": (filters, 1, 3, 3, 3)}
    for level, blocks in enumerate((1, 2, 2, 4, 4)):
        c = filters * 2**level
        for name in (f"layers.{level}.blocks.{b}" for b in range(blocks)):
            for i in (1, 2):
                shapes |= {f"{name}.norm{i}.{k}": (c,) for k in ("weight", "bias", "running_mean", "running_var")}
                shapes |= {f"{name}.norm{i}.num_batches_tracked": (), f"{name}.conv{i}.weight": (c, c, 3, 3, 3)}
        if level < 4:
            shapes[f"layers.{level}.downsample.weight"] = (2 * c, c, 3, 3, 3)
    return shapes


def dinov2_layout(embed_dim: int = 64, depth: int = 2, edge: int = 5, registers: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Meta's `dinov2_vits14_pretrain.pth` and its kin."""
    e = embed_dim
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, e), "pos_embed": (1, 1 + edge**2, e), "mask_token": (1, e), "norm.weight": (e,), "norm.bias": (e,),
        "patch_embed.proj.weight": (e, 3, 14, 14), "patch_embed.proj.bias": (e,),
    }  # fmt: skip
    shapes |= {"register_tokens": (1, registers, e)} if registers else {}
    for b in (f"blocks.{i}" for i in range(depth)):
        for name, (rows, columns) in {
            "attn.qkv": (3 * e, e),
            "attn.proj": (e, e),
            "mlp.fc1": (4 * e, e),
            "mlp.fc2": (e, 4 * e),
        }.items():
            shapes |= {f"{b}.{name}.weight": (rows, columns), f"{b}.{name}.bias": (rows,)}
        shapes |= {
            f"{b}.{name}": (e,)
            for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
        }
    return shapes


def save_ct(path: Path, shape: tuple[int, int, int], axes: str = "RAS") -> np.ndarray:
    """A file of HU whose axes point as said; returned as [L, P, S]."""
    rng = np.random.default_rng(0)
    values = rng.integers(-900, 1500, shape).astype(np.int16)  # [L, P, S]
    image = nib.Nifti1Image(values, np.diag([-1.0, -1.0, 2.0, 1.0]))
    there = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(there), path)
    return values.astype(np.float32)


def test_ct_fm_sees_a_file_as_monais_encoder_sees_it_in_spl_and_hounsfield_units(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = drawn(ct_fm_layout())
    save_file({**{f"encoder.{k}": v for k, v in state.items()}, "up_layers.0.w": torch.zeros(1)}, tmp_path / "w.safetensors")
    values = save_ct(tmp_path / "ct.nii.gz", (32, 16, 48), "ASL")  # sagittal slices
    theirs = SegResEncoder(init_filters=2, blocks_down=(1, 2, 2, 4, 4)).eval()
    theirs.load_state_dict(state)
    spl = torch.from_numpy(((values + 1024) / 3072).transpose(2, 1, 0).copy())[None, None]
    wanted = theirs(spl)[-1].detach()  # [1, E, S, P, L]
    encoder = load_encoder(tmp_path / "w.safetensors", "cpu", encoder=CT_FM)
    found = encoder(Entry(str(tmp_path / "ct.nii.gz"), (), extra={"modality": "MR"}))
    torch.testing.assert_close(found.patch, wanted.permute(0, 4, 3, 2, 1), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.cls, wanted.mean((2, 3, 4)), atol=2e-3, rtol=2e-3)
    assert found.affine[:3, 3].tolist() == [-7.5, -7.5, 15.0] and nib.aff2axcodes(found.affine.numpy()) == ("L", "P", "S")
    assert "MR through an encoder of CT: another modality" in caplog.text and "CT-FM's weights: see" in caplog.text
    nib.save(nib.Nifti1Image(np.full((16, 16, 16), -2000, np.int16), np.eye(4)), tmp_path / "air.nii")
    with pytest.raises(BadVolume, match="no voxel above -1024"):
        encoder(str(tmp_path / "air.nii"))


def test_voco_gives_the_last_map_of_monais_swin_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def permuted(x: Tensor, pattern: str) -> Tensor:
        old, new = (side.split() for side in pattern.split("->"))
        return x.permute([old.index(axis) for axis in new])

    monkeypatch.setattr(swin_unetr, "rearrange", permuted)  # what einops would do
    torch.manual_seed(0)
    shape: dict = {"window_size": (7,) * 3, "patch_size": (2,) * 3, "depths": (2,) * 4, "num_heads": (3, 6, 12, 24)}
    theirs = swin_unetr.SwinTransformer(1, 12, **shape, spatial_dims=3, use_v2=True).eval()  # as SwinUNETR has it
    state = {"encoder1.layer.conv1.conv.weight": torch.zeros(1), **{f"swinViT.{k}": v for k, v in theirs.state_dict().items()}}
    torch.save({"state_dict": state}, tmp_path / "VoComni_S.pt")
    encoder = load_encoder(tmp_path / "VoComni_S.pt", "cpu", encoder=VOCO)
    x = torch.rand(1, 1, 64, 64, 32) * 2 - 1
    with torch.no_grad():
        wanted = theirs((x + 1) / 2)[-1]
    torch.testing.assert_close(encoder(x).patch, wanted.movedim(1, -1), atol=1e-4, rtol=1e-4)
    assert encoder.preparation.window == (-175, 250) and encoder.embed_dim == 192
    part = {k: v for k, v in state.items() if ".layers3c." not in k}
    torch.save(part, tmp_path / "part.pt")
    with pytest.raises(BadInput, match=r"fit this Swin transformer only in part.*VoComni_B"):
        load_encoder(tmp_path / "part.pt", "cpu", encoder=VOCO)


def plain_vit(state: dict[str, Tensor], images: Tensor, registers: int) -> Tensor:
    """[S, 3, 70, 70] -> normed tokens [S, 1 + R + 25, 64], written out."""
    line = lambda x, name: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (64,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)  # noqa: E731
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    if registers:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for b in ("blocks.0", "blocks.1"):
        q, k, v = line(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, -1)
        x = x + state[f"{b}.ls1.gamma"] * line((q @ k.mT / 8).softmax(-1) @ v, f"{b}.attn.proj")
        x = x + state[f"{b}.ls2.gamma"] * line(F.gelu(line(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    return norm(x, "norm")


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_sees_every_axial_slice_and_eight_of_them_make_a_cell(tmp_path: Path, registers: int) -> None:
    state = drawn(dinov2_layout(registers=registers))
    torch.save(state, tmp_path / "w.pth")
    encoder = load_encoder(tmp_path / "w.pth", "cpu", encoder=SLICES)
    x = torch.rand(2, 1, 40, 40, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1  # two passes of slices
    slices = F.interpolate((x[:, 0].movedim(-1, 1).flatten(0, 1)[:, None] + 1) / 2, (70, 70), mode="bilinear")
    colours = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    tokens = plain_vit(state, (slices - colours[0]) / colours[1], registers).unflatten(0, (2, 5, 8)).mean(2)  # [2, d, N, E]
    found = encoder(x)
    torch.testing.assert_close(found.cls, tokens[:, :, 0].mean(1), atol=1e-4, rtol=1e-4)
    wanted = tokens[:, :, 1 + registers :].unflatten(2, (5, 5)).movedim(1, 3)
    torch.testing.assert_close(found.patch, wanted, atol=1e-4, rtol=1e-4)
    assert encoder(x[:1, :, :16, :24], layers=2).patch.shape == (1, 2, 3, 5, 128)  # positions brought to another grid


def test_weights_of_another_family_are_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = {
        "a SegResNet": drawn(ct_fm_layout()),
        "a 2D ViT in Meta's layout": drawn(dinov2_layout()),
        "a 3D ViT": vit_tiny_3d(patch_size=8, img_size=16).state_dict(),
        "DINOv3": {"rope_embed.periods": torch.ones(4), "patch_embed.proj.weight": torch.ones(64, 3, 16, 16)},
        "an nnU-Net network": {"encoder.stem.convs.0.conv.weight": torch.ones(2, 1, 3, 3, 3)},
    }
    own = {CT_FM: "a SegResNet", SLICES: "a 2D ViT in Meta's layout", VOCO: ""}
    for family, state in states.items():
        torch.save(state, tmp_path / "w.pth")
        for encoder in own:
            if own[encoder] != family:
                with pytest.raises(BadInput, match=f"does not take weights .*w.pth: they are of {family}"):
                    load_encoder(tmp_path / "w.pth", "cpu", encoder=encoder)
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="none of their 1 tensors is one of DINOv2|none of their 1 tensors is one of a 2D ViT"):
        load_encoder(tmp_path / "w.pth", "cpu", encoder=SLICES)
    state = drawn(dinov2_layout())
    state["extra"] = state.pop("blocks.1.ls1.gamma")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=r"1 missing \(blocks.1.ls1.gamma\); 1 unexpected \(extra\)"):
        load_encoder(tmp_path / "w.pth", "cpu", encoder=SLICES)
    with pytest.raises(BadInput, match="a network of this package, not"):
        load_encoder("vit_small_3d", "cpu", encoder=CT_FM)


def test_a_table_of_another_encoder_is_made_and_asked_as_one_of_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(drawn(dinov2_layout()), tmp_path / "w.pth")
    save_ct(tmp_path / "a.nii.gz", (16, 9, 17))
    write_datalist(tmp_path / "list.json", [{"image": str(tmp_path / "a.nii.gz"), "shape": [16, 9, 17], "spacing": [1, 1, 2]}])
    out = tmp_path / "f.parquet"
    words = ["--weights", str(tmp_path / "w.pth"), "--encoder", SLICES, "--device", "cpu"]
    assert main(["embed", str(tmp_path / "list.json"), *words, "--workers", "0", "--output", str(out)]) == 0
    query = embedded(FeatureTable(out), RetrieveRequest(out, str(tmp_path / "a.nii.gz"), tmp_path / "h.html", device="cpu"))[1]
    np.testing.assert_array_equal(pq.read_table(out)["cls"][0].as_py(), query.cls[0])
    assert main(["visualize", str(tmp_path / "a.nii.gz"), *words, "--output", str(tmp_path / "pictures")]) == 0
    for name in ("os:system", "dinov2.models.foreignx:f", f"{SLICES}:x"):
        with pytest.raises(BadInput, match="not run because a file names it"):
            ours_alone(name, "table")
    assert ours_alone(SLICES, "table") == SLICES and ours_alone(None, "table") is None
