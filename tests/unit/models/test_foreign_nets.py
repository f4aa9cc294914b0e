"""DINOv3 by slices, SPECTRE and nnssl's ResEnc from generated weights in published layouts: the numbers of plain arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2 import load_encoder
from dinov2.errors import BadInput
from tests.unit.models.test_foreign import dinov2_layout, drawn, save_ct

V3, SPECTRE, RES_ENC = (f"dinov2.models.foreign:{name}" for name in ("dinov3_slices", "spectre", "res_enc"))
State = dict[str, Tensor]


def dinov3_state(is_gated: bool, head_dim: int) -> State:
    """In Meta's layout: the bias of keys is masked, and not zero."""
    e, hidden = 64, 40
    shapes: dict[str, tuple[int, ...]] = {
        k.replace("register", "storage"): s
        for k, s in dinov2_layout(registers=4).items()
        if k not in ("pos_embed", "patch_embed.proj.weight") and ".mlp." not in k
    }
    shapes["patch_embed.proj.weight"] = (e, 3, 16, 16)
    for b in ("blocks.0", "blocks.1"):
        up, down = (("w1", "w2"), "w3") if is_gated else (("fc1",), "fc2")
        shapes |= {f"{b}.mlp.{name}.weight": (hidden, e) for name in up} | {f"{b}.mlp.{name}.bias": (hidden,) for name in up}
        shapes |= {f"{b}.mlp.{down}.weight": (e, hidden), f"{b}.mlp.{down}.bias": (e,)}
    state = drawn(shapes)
    state["rope_embed.periods"] = 100.0 ** (torch.arange(head_dim // 4) * 4 / head_dim)
    mask = torch.cat([torch.ones(e), torch.zeros(e), torch.ones(e)])
    return {**state, **{f"blocks.{i}.attn.qkv.bias_mask": mask for i in range(2)}}


def as_transformers(state: State) -> State:
    """The same tensors as transformers names them, in which keys have no bias and periods are not saved."""
    found = {}
    for name, tensor in state.items():
        if name.endswith(("bias_mask", "periods")):
            continue
        block, _, rest = name.partition(".attn.qkv.")
        if rest:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            block = block.replace("blocks", "layer")
            found |= {f"{block}.attention.{p}_proj.{rest}": t for p, t in parts if (p, rest) != ("k", "bias")}
            continue
        for old, new in (
            ("patch_embed.proj", "embeddings.patch_embeddings"), ("storage", "embeddings.register"),
            ("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"), ("blocks", "layer"),
            ("attn.proj", "attention.o_proj"), ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
            ("mlp.fc1", "mlp.up_proj"), ("mlp.fc2", "mlp.down_proj"), ("mlp.w1", "mlp.gate_proj"), ("mlp.w2", "mlp.up_proj"),
            ("mlp.w3", "mlp.down_proj"),
        ):  # fmt: skip
            name = name.replace(old, new)
        found[name] = tensor
    return found


def turned(x: Tensor, grid: tuple[int, ...], periods: Tensor, prefix: int) -> Tensor:
    """[B, heads, N, d]: channels i and d/2 + i of a patch as a complex number, turned by its place."""
    centres = [[2 * (i + 0.5) / n - 1 for i in range(n)] for n in grid]
    places = torch.cartesian_prod(*(torch.tensor(c) for c in centres))  # [N, axes]
    angles = torch.cat([2 * math.pi * places[:, a, None] / periods for a in range(len(grid))], 1)
    pairs = torch.complex(*x[:, :, prefix:].chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([x[:, :, :prefix], torch.cat([pairs.real, pairs.imag], -1)], 2)


def plain_blocks(state: State, x: Tensor, grid: tuple[int, ...], periods: Tensor, prefix: int) -> Tensor:
    """[B, N, 64 or so] through the two blocks and the norm, written out."""
    line = lambda x, name: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)  # noqa: E731
    head_dim = 2 * len(grid) * len(periods)
    for b in ("blocks.0", "blocks.1"):
        y = norm(x, f"{b}.norm1")
        if f"{b}.attn.kv.weight" in state:
            q, k, v = line(y, f"{b}.attn.q"), *line(y, f"{b}.attn.kv").chunk(2, -1)
        else:
            bias = state[f"{b}.attn.qkv.bias"] * state[f"{b}.attn.qkv.bias_mask"]
            q, k, v = F.linear(y, state[f"{b}.attn.qkv.weight"], bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
        q, k = (turned(t, grid, periods, prefix) for t in (q, k))
        y = (q @ k.mT / head_dim**0.5).softmax(-1) @ v
        x = x + state[f"{b}.ls1.gamma"] * line(y.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        y = norm(x, f"{b}.norm2")
        if f"{b}.mlp.w1.weight" in state:
            y = line(F.silu(line(y, f"{b}.mlp.w1")) * line(y, f"{b}.mlp.w2"), f"{b}.mlp.w3")
        else:
            y = line(F.gelu(line(y, f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        x = x + state[f"{b}.ls2.gamma"] * y
    return norm(x, "norm")


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("layout, head_dim", [("meta", 32), ("transformers", 64)])
def test_dinov3_sees_slices_with_rotary_positions_in_both_layouts(
    tmp_path: Path, is_gated: bool, layout: str, head_dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    state = dinov3_state(is_gated, head_dim)
    torch.save(state if layout == "meta" else as_transformers(state), tmp_path / "w.pth")
    encoder = load_encoder(tmp_path / "w.pth", "cpu", encoder=V3)
    assert "DINOv3 License" in caplog.text
    x = torch.rand(1, 1, 24, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    slices = F.interpolate((x[:, 0].movedim(-1, 1).flatten(0, 1)[:, None] + 1) / 2, (48, 32), mode="bilinear")
    colours = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    images = (slices - colours[0]) / colours[1]
    tokens = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16).flatten(2).mT
    first = torch.cat([state["cls_token"], state["storage_tokens"]], 1).expand(len(tokens), -1, -1)
    out = (
        plain_blocks(state, torch.cat([first, tokens], 1), (3, 2), state["rope_embed.periods"], 5).unflatten(0, (2, 8)).mean(1)
    )
    found = encoder(x)
    torch.testing.assert_close(found.cls, out[:, 0].mean(0, keepdim=True), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.patch[0], out[:, 5:].unflatten(1, (3, 2)).movedim(0, 2), atol=1e-4, rtol=1e-4)


def spectre_state() -> State:
    layout = {k: s for k, s in dinov2_layout(embed_dim=24).items() if k not in ("pos_embed", "mask_token") and ".qkv." not in k}
    layout["patch_embed.proj.weight"] = (24, 1, 16, 16, 8)
    for b in ("blocks.0", "blocks.1"):
        layout |= {f"{b}.attn.q.weight": (24, 24), f"{b}.attn.q.bias": (24,)}
        layout |= {f"{b}.attn.kv.weight": (48, 24), f"{b}.attn.kv.bias": (48,)}
    return {**drawn(layout), "rope.periods": 1000.0 ** (torch.arange(2) / 2)}


def test_spectre_gives_the_means_of_two_neighbouring_patches(tmp_path: Path) -> None:
    state = spectre_state()
    torch.save({f"backbone.{k}": v for k, v in state.items()}, tmp_path / "w.pt")
    encoder = load_encoder(tmp_path / "w.pt", "cpu", encoder=SPECTRE)
    x = torch.rand(2, 1, 32, 16, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = F.conv3d((x + 1) / 2, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=(16, 16, 8))
    tokens = torch.cat([state["cls_token"].expand(2, -1, -1), tokens.flatten(2).mT], 1)
    out = plain_blocks(state, tokens, (2, 1, 6), state["rope.periods"], 1)
    found = encoder(x)
    torch.testing.assert_close(found.cls, out[:, 0], atol=1e-4, rtol=1e-4)
    wanted = out[:, 1:].unflatten(1, (2, 1, 3, 2)).mean(4)
    torch.testing.assert_close(found.patch, wanted, atol=1e-4, rtol=1e-4)
    assert encoder.preparation.window == (-1000, 1000) and encoder.patch_size == 16


def res_enc_state() -> State:
    """Three stages of 2, 4 and 4 channels; every convolution and norm is there twice, as the library saves them."""
    state: State = {}

    def conv(name: str, rows: int, columns: int, kernel: int) -> None:
        shapes: dict[str, tuple[int, ...]] = {"conv.weight": (rows, columns, *[kernel] * 3)}
        shapes |= {"norm.weight": (rows,), "norm.bias": (rows,)} | ({"conv.bias": (rows,)} if kernel == 3 else {})
        own = drawn(shapes, len(state))
        state.update({f"{name}.{k}": v for k, v in own.items()})
        state.update({f"{name}.all_modules.{int(k.startswith('norm'))}.{k.split('.')[1]}": v for k, v in own.items()})

    conv("stem.convs.0", 2, 1, 3)
    for stage, (before, width, blocks) in enumerate(((2, 2, 1), (2, 4, 2), (4, 4, 1))):
        for b in range(blocks):
            conv(f"stages.{stage}.blocks.{b}.conv1", width, width if b else before, 3)
            conv(f"stages.{stage}.blocks.{b}.conv2", width, width, 3)
    conv("stages.1.blocks.0.skip.1", 4, 2, 1)
    return state


def plain_res_enc(state: State, x: Tensor) -> Tensor:
    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        y = F.conv3d(x, weight, state.get(f"{name}.conv.bias"), stride, weight.shape[-1] // 2)
        return F.instance_norm(y, weight=state[f"{name}.norm.weight"], bias=state[f"{name}.norm.bias"])

    x = F.leaky_relu(conv(x, "stem.convs.0"))
    for name, stride in (("0.blocks.0", 1), ("1.blocks.0", 2), ("1.blocks.1", 1), ("2.blocks.0", 2)):
        skip = F.avg_pool3d(x, stride) if stride > 1 else x
        skip = conv(skip, f"stages.{name}.skip.1") if name == "1.blocks.0" else skip
        y = conv(F.leaky_relu(conv(x, f"stages.{name}.conv1", stride)), f"stages.{name}.conv2")
        x = F.leaky_relu(y + skip)
    return x


def test_res_enc_sees_a_file_in_spl_with_mean_0_and_deviation_1(tmp_path: Path) -> None:
    state = res_enc_state()
    saved = {f"encoder.{k}": v for k, v in state.items()} | {"decoder.stages.0.convs.0.conv.weight": torch.zeros(1)}
    torch.save({"network_weights": saved, "nnssl_adaptation_plan": {"key_to_encoder": "encoder"}}, tmp_path / "checkpoint.pth")
    encoder = load_encoder(tmp_path / "checkpoint.pth", "cpu", encoder=RES_ENC)
    assert encoder.patch_size == 4 and encoder.embed_dim == 4
    x = torch.rand(1, 1, 16, 12, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    seen = x.permute(0, 1, 4, 3, 2)
    wanted = plain_res_enc(state, (seen - seen.mean()) / seen.std())
    torch.testing.assert_close(encoder(x).patch, wanted.permute(0, 4, 3, 2, 1), atol=1e-4, rtol=1e-4)
    save_ct(tmp_path / "scan.nii.gz", (16, 12, 8), "RAS")
    assert encoder(str(tmp_path / "scan.nii.gz")).patch.shape == (1, 4, 3, 2, 4)


def test_parts_of_these_and_other_families_are_refused_by_name(tmp_path: Path) -> None:
    v3, spectre, res_enc = dinov3_state(False, 64), spectre_state(), res_enc_state()
    cut = lambda state, ending: {k: v for k, v in state.items() if not k.endswith(ending)}  # noqa: E731
    for encoder, state, words in (
        (V3, spectre, "they are of SPECTRE's local ViT, not of DINOv3"),
        (SPECTRE, v3, "they are of DINOv3, not of SPECTRE's local ViT"),
        (RES_ENC, v3, "they are of DINOv3, not of an nnU-Net network"),
        (V3, cut(v3, "patch_embed.proj.weight"), "of DINOv3, and without patch_embed.proj.weight"),
        (V3, cut(v3, "blocks.1.ls1.gamma"), r"1 missing \(blocks.1.ls1.gamma\)"),
        (SPECTRE, cut(spectre, "periods"), "of SPECTRE, and without"),
        (RES_ENC, {k: v for k, v in res_enc.items() if "stages.1.blocks.0.conv1" not in k}, "without residual stages"),
        (RES_ENC, cut(res_enc, "skip.1.norm.bias"), r"1 missing \(stages.1.blocks.0.skip.1.norm.bias\)"),
    ):
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(BadInput, match=f"does not take weights .*w.pth: .*{words}"):
            load_encoder(tmp_path / "w.pth", "cpu", encoder=encoder)
