"""The network: packed passes, stochastic depth on a subset, positions, names."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import Tensor

from dinov2.layers import Block, DINOHead, Segment, packed_attention
from dinov2.layers.attention import resolve_attention
from dinov2.layers.rope import rotary_table, rotate
from dinov2.layers.stochastic_depth import add_rows, draw_subset, kept_rows, mean_keeping_scale, take_rows
from dinov2.models.vision_transformer import DinoVisionTransformer3d, vit_giant2_3d, vit_tiny_3d


def make_net(**kwargs: object) -> DinoVisionTransformer3d:
    torch.manual_seed(3)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "init_values": 0.5}
    return DinoVisionTransformer3d(**{**sizes, **kwargs}).double()


def volumes(batch: int, *size: int) -> Tensor:
    return torch.randn(batch, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("registers", [0, 2])
def test_a_packed_pass_equals_separate_passes(positions: str, registers: int) -> None:
    net = make_net(pos_encoding=positions, num_register_tokens=registers).eval()
    big, small = volumes(2, 16, 12, 8), volumes(3, 8, 4, 8)
    masks = torch.rand(2, 24) > 0.5
    together = net([big, small], [masks, None], is_training=True)
    for got, alone in zip(together, [net(big, masks, is_training=True), net(small, is_training=True)], strict=True):
        for key in ("x_norm_clstoken", "x_norm_patchtokens", "x_norm_regtokens", "x_prenorm"):
            torch.testing.assert_close(got[key], alone[key], rtol=1e-10, atol=1e-12)


def test_packed_attention_equals_one_call_per_sequence() -> None:
    segments = [Segment(2, 5), Segment(3, 4), Segment(1, 7)]
    qkv = torch.randn(29, 3, 2, 6, dtype=torch.float64)
    expected, start = [], 0
    for seg in segments:
        for _ in range(seg.num_sequences):
            q, k, v = qkv[start : start + seg.length].unbind(1)
            weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / 6**0.5, -1)
            expected.append(torch.einsum("hqk,khd->qhd", weights, v))
            start += seg.length
    torch.testing.assert_close(packed_attention(qkv, segments), torch.cat(expected))


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_xformers_equals_sdpa(positions: str) -> None:
    net = make_net(pos_encoding=positions, embed_dim=64).to("cuda", torch.float16).eval()
    crops = [volumes(2, 16, 12, 8).to("cuda", torch.float16), volumes(3, 8, 4, 8).to("cuda", torch.float16)]
    reference = net(crops, is_training=True)
    for block in net.block_list:
        block.attn.kind = "xformers"
    for got, ref in zip(net(crops, is_training=True), reference, strict=True):
        torch.testing.assert_close(got["x_prenorm"], ref["x_prenorm"], rtol=1e-2, atol=1e-2)  # fp16 sums


def test_xformers_is_refused_by_name_where_it_cannot_run() -> None:
    assert resolve_attention("auto", "cpu") == "sdpa"
    with pytest.raises(ValueError, match="student.attention=xformers needs CUDA"):
        resolve_attention("xformers", "cpu")


def test_patch_embedding_is_the_convolution_of_its_weights() -> None:
    net = make_net()
    x = volumes(2, 16, 8, 12)
    conv = net.patch_embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(net.patch_embed(x), conv)
    with pytest.raises(ValueError, match="multiple of the patch size 4"):
        net(volumes(1, 16, 16, 18))


def test_chunked_and_flat_networks_have_interchangeable_blocks() -> None:
    flat, chunked = make_net(depth=4), make_net(depth=4, block_chunks=2)
    assert "blocks.1.3.attn.qkv.weight" in chunked.state_dict()
    renamed = {k.replace("blocks.0.", "blocks.", 1) if ".0.0." in k or ".0.1." in k else k for k in chunked.state_dict()}
    assert len(renamed) == len(flat.state_dict())
    x = volumes(1, 16, 16, 16)
    torch.testing.assert_close(flat.eval()(x), chunked.eval()(x))  # the same seed gives the same weights


def test_learned_positions_are_interpolated_to_any_grid() -> None:
    exact, offset = make_net(interpolate_offset=0.0), make_net()
    for net in (exact, offset):
        assert net.interpolate_pos_encoding((4, 4, 4)) is net.pos_embed
        assert net.interpolate_pos_encoding((2, 3, 5)).shape == (1, 31, 24)
    constant = torch.nn.Parameter(torch.ones_like(exact.pos_embed))
    exact.pos_embed = constant
    torch.testing.assert_close(exact.interpolate_pos_encoding((7, 2, 3)), torch.ones(1, 43, 24, dtype=torch.float64))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    table = rotary_table((4, 3, 2), 14, 1, like)  # 2 frequencies an axis, 2 channels left over
    q, k = torch.randn(2, 14, dtype=torch.float64)
    turned_q, turned_k = rotate(q.expand(25, 14), table), rotate(k.expand(25, 14), table)
    scores = turned_q @ turned_k.T

    def token(h: int, w: int, d: int) -> int:
        return 1 + (h * 3 + w) * 2 + d

    torch.testing.assert_close(scores[token(0, 1, 0), token(1, 2, 1)], scores[token(2, 0, 0), token(3, 1, 1)])
    assert not torch.isclose(scores[token(0, 0, 0), token(1, 0, 0)], scores[token(0, 0, 0), token(0, 1, 0)].abs() + 9)
    torch.testing.assert_close(turned_q[0], q)  # the class token does not turn
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(25))


def test_what_a_network_does_not_have_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="pos_encoding=rope: there are no learned positions"):
        make_net(pos_encoding="rope").interpolate_pos_encoding((2, 2, 2))
    with pytest.raises(TypeError, match="a list of batches is for is_training=True"):
        make_net()([volumes(1, 8, 8, 8)])


def test_rope_has_no_position_parameters_but_sees_positions() -> None:
    net = make_net(pos_encoding="rope", init="xavier").eval()
    assert "pos_embed" not in net.state_dict()
    x = volumes(1, 16, 16, 16)
    moved = torch.roll(x, 4, dims=2)  # by one patch
    assert not torch.allclose(net(x), net(moved), atol=1e-4)


@pytest.mark.parametrize("rate, subset_above", [(0.5, 0.1), (0.5, 1.0), (0.05, 0.1)])
def test_stochastic_depth_keeps_the_mean(rate: float, subset_above: float) -> None:
    torch.manual_seed(0)
    block = Block(8, 2, drop_path=rate, init_values=1.0, subset_above=subset_above).double().train()
    segments = [Segment(4, 3), Segment(6, 2)]
    x = torch.randn(24, 8, dtype=torch.float64)
    # one residual branch, so that the mean is exact
    draws = torch.stack(
        [block._add_residual(x, segments, block.draw(x, segments)[0], lambda t, s: t.sin()) for _ in range(4000)]
    )
    torch.testing.assert_close(draws.mean(0), x + x.sin(), atol=0.1, rtol=0)


def test_the_subset_is_computed_and_scaled_per_segment() -> None:
    torch.manual_seed(0)
    segments = [Segment(5, 2), Segment(4, 3)]
    rows, place, kept = kept_rows(draw_subset(segments, 0.3, torch.device("cpu")), segments)
    scale = mean_keeping_scale(segments, kept, torch.empty(0))
    assert [s.num_sequences for s in kept] == [3, 2] and scale.unique().tolist() == pytest.approx([5 / 3, 2.0])
    assert rows.unique().numel() == 3 * 2 + 2 * 3
    assert ((rows < 10).sum(), (rows >= 10).sum()) == (6, 6)
    assert torch.equal(place[rows], torch.arange(len(rows))) and int((place >= 0).sum()) == len(rows)
    block = Block(8, 2, drop_path=0.3).double().train()
    x = torch.randn(22, 8, dtype=torch.float64)
    out = block._add_residual(x, segments, block.draw(x, segments)[0], lambda t, s: torch.ones_like(t))
    added = (out - x)[:, 0]
    assert added.round(decimals=9).unique().tolist() == pytest.approx([0.0, 5 / 3, 2.0])


@pytest.mark.parametrize("compiling", [False, True])
def test_rows_leave_and_come_back_with_exact_gradients(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As copies (eager) and as gathers with the inverse index (compiled), which no additions are needed for."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    segments = [Segment(5, 2), Segment(4, 3)]
    rows, place, _ = kept_rows(draw_subset(segments, 0.3, torch.device("cpu")), segments)
    x = torch.randn(22, 3, dtype=torch.float64, requires_grad=True)
    part = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(add_rows(x, part, rows, place), x.index_add(0, rows, part))
    assert torch.equal(take_rows(x, rows, place), x[rows])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows, place), x)
    assert torch.autograd.gradcheck(lambda x, part: add_rows(x, part, rows, place), (x, part))


def test_the_draws_of_a_step_do_not_depend_on_who_draws() -> None:
    """Torch's generator is read as it was when each branch drew for itself, so that old runs resume with the same draws."""
    net, x = make_net(drop_path_rate=0.5, drop_path_uniform=True), volumes(6, 16, 16, 16)
    torch.manual_seed(7)
    net(x)
    after_the_pass = torch.rand(1)
    torch.manual_seed(7)
    for _ in range(2 * len(net.block_list)):
        torch.randperm(6)
    assert torch.equal(after_the_pass, torch.rand(1))


@pytest.mark.parametrize("training", [False, True])
def test_the_residual_stream_keeps_the_half_precision_of_the_first_product(training: bool) -> None:
    net = make_net(drop_path_rate=0.5).float().train(training)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(volumes(2, 16, 16, 16).float(), is_training=True)["x_prenorm"].dtype == torch.bfloat16


def test_nothing_is_dropped_in_evaluation() -> None:
    net = make_net(drop_path_rate=0.5)
    x = volumes(2, 16, 16, 16)
    torch.testing.assert_close(net.eval()(x), net(x))
    linear = make_net(drop_path_rate=0.4, drop_path_uniform=False, depth=3)
    assert [b.drop_path for b in linear.block_list] == pytest.approx([0, 0.2, 0.4])


def test_intermediate_layers_name_blocks_that_do_not_exist() -> None:
    net = make_net().eval()
    x = volumes(2, 16, 12, 8)
    last = net.get_intermediate_layers(x, 1)[0]
    torch.testing.assert_close(last, net(x, is_training=True)["x_norm_patchtokens"])
    assert net.get_intermediate_layers(x, [0, 2], reshape=True)[1].shape == (2, 24, 4, 3, 2)
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        net.get_intermediate_layers(x, [3])


def test_the_head_scores_directions_only() -> None:
    torch.manual_seed(0)
    head = DINOHead(6, 10, nlayers=2, hidden_dim=12, bottleneck_dim=5).double()
    assert {k for k in head.state_dict() if "last_layer" in k} == {"last_layer.weight_g", "last_layer.weight_v"}
    x = torch.randn(4, 6, dtype=torch.float64)
    before = head(x)
    assert before.abs().max() <= 1 + 1e-12
    scaled = copy.deepcopy(head)
    scaled.last_layer.weight_v.data *= 3
    torch.testing.assert_close(scaled(x), before)
    assert DINOHead(6, 10, nlayers=1).mlp.weight.shape == (256, 6)


def test_the_largest_network_has_a_gated_mlp() -> None:
    with torch.device("meta"):
        net = vit_giant2_3d(depth=1)
        small = vit_tiny_3d()
    assert net.block_list[0].mlp.w12.weight.shape == (8192, 1536)
    assert small.embed_dim == 192 and len(small.block_list) == 12
