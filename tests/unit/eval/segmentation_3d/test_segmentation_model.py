"""Adapter and decoders: places, octants, channels, sizes, what is trained, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2.configs.schema import SegmentationConfig
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval.methods.unet_plan import UNetPlan
from dinov2.eval.segmentation_3d.adapter import AdapterOptions, ViTAdapter3d, resize_trilinear
from dinov2.eval.segmentation_3d.build import choose_trained
from dinov2.eval.segmentation_3d.deformable import MSDeformAttn3d, cell_centres, in_compute_dtype, octant_offsets
from dinov2.eval.segmentation_3d.engine import Plan, build_optimizer
from dinov2.eval.segmentation_3d.heads import UNETR, Linear, ViTAdapterUNETR
from dinov2.eval.segmentation_3d.interaction import ConvFFN, Extractor, make_layout
from dinov2.eval.segmentation_3d.unet import UNet3d
from dinov2.models import BlockBackbone, DinoVisionTransformer3d

CPU = Runtime(torch.device("cpu"))
OPTIONS = AdapterOptions(inplanes=4)
WIDTHS = [12, 8, 6, 4]
PLAN = Plan(10, 1, 5, 1, 0.1, True, 0)


def backbone(patch_size: int = 4, depth: int = 4, **more: object) -> DinoVisionTransformer3d:
    torch.manual_seed(0)
    net = DinoVisionTransformer3d(
        img_size=8 * patch_size, patch_size=patch_size, embed_dim=32, depth=depth, num_heads=2, init="xavier", **more
    )
    return net.eval().requires_grad_(False)


def head(kind: str, net: DinoVisionTransformer3d, channels: int = 1, outputs: int = 3) -> torch.nn.Module:
    if kind == "Linear":
        return Linear(net, channels, outputs, batch_norm=True)
    if kind == "UNETR":
        return UNETR(net, channels, outputs, WIDTHS)
    return ViTAdapterUNETR(net, channels, outputs, WIDTHS, OPTIONS)


def test_first_offsets_point_into_the_octants_in_the_papers_order() -> None:
    signs = ["---", "--+", "-+-", "-++", "+--", "+-+", "++-", "+++"]
    offsets = octant_offsets(4)
    for i, word in enumerate(signs):
        one = torch.tensor([1.0 if c == "+" else -1.0 for c in word])
        torch.testing.assert_close(offsets[i], one * torch.arange(1.0, 5.0)[:, None])


def test_places_are_cell_centres_in_the_order_of_the_voxels() -> None:
    places = cell_centres([(2, 3, 4), (1, 1, 2)])
    assert places.shape == (26, 3)
    torch.testing.assert_close(places[0], torch.tensor([1 / 4, 1 / 6, 1 / 8]))
    torch.testing.assert_close(places[1], torch.tensor([1 / 4, 1 / 6, 3 / 8]))  # the last axis is the fastest
    torch.testing.assert_close(places[4], torch.tensor([1 / 4, 1 / 2, 1 / 8]))
    torch.testing.assert_close(places[25], torch.tensor([1 / 2, 1 / 2, 3 / 4]))


def test_attention_reads_the_voxel_that_its_offsets_point_at() -> None:
    """Values that are their own coordinates: one point of one head, set to an offset of (1, -2, 3) voxels."""
    size = (8, 7, 9)
    attention = MSDeformAttn3d(8, num_levels=1, num_points=1, ratio=1.0)
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in size], indexing="ij"), -1).reshape(1, -1, 3)
    values = torch.nn.functional.pad(grid, (0, 5))  # [1, S, 8]: the coordinates are the first three channels
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(torch.tensor([1.0, -2.0, 3.0]).repeat(8))
        for linear in (attention.value_proj, attention.output_proj):
            linear.weight.copy_(torch.eye(8))
    out = attention(torch.randn(1, len(grid[0]), 8), cell_centres([size]), values, [size])
    inside = (grid[0] + torch.tensor([1.0, -2.0, 3.0]) >= 0).all(-1) & (
        grid[0] + torch.tensor([1.0, -2.0, 3.0]) <= torch.tensor(size) - 1
    ).all(-1)
    torch.testing.assert_close(out[0, inside, :3], (grid[0] + torch.tensor([1.0, -2.0, 3.0]))[inside], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("patch_size", "depth", "size", "more"),
    [
        (4, 4, (32, 32, 32), {"pos_encoding": "rope"}),
        (8, 8, (32, 48, 16), {"num_register_tokens": 2, "block_chunks": 2}),
        (16, 4, (48, 32, 64), {}),
        (7, 4, (21, 28, 35), {}),  # sizes that are no power of two: maps are rounded up
    ],
)
def test_the_pyramid_has_its_sizes_for_any_patch_depth_and_shape(patch_size: int, depth: int, size: tuple, more: dict) -> None:
    adapter = ViTAdapter3d(backbone(patch_size, depth, **more), 2, OPTIONS)
    maps = adapter(torch.randn(2, 2, *size))
    assert [m.shape for m in maps] == [(2, 32, *[-(-n // f) for n in size]) for f in (2, 4, 8, 16)]
    logits = head("ViTAdapterUNETR", backbone(patch_size, depth, **more), channels=2)(torch.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)


def test_an_untrained_adapter_leaves_the_backbones_tokens_as_they_are() -> None:
    net = backbone(pos_encoding="rope")
    adapter = ViTAdapter3d(net, 1, OPTIONS)
    seen = []
    adapter.merges[3].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    x = torch.randn(2, 1, 32, 32, 32)
    adapter(x)
    (expected,) = net.get_intermediate_layers(x, 1, norm=False)
    torch.testing.assert_close(seen[0], expected)
    with torch.no_grad():
        adapter.injectors[0].gamma.fill_(0.5)
    adapter(x)
    assert (seen[1] - expected).abs().max() > 1e-2


def network(kind: str) -> torch.nn.Module:
    if kind == "UNet":
        return UNet3d(UNetPlan([(1, 1, 1), (2, 2, 2), (2, 2, 2)], [(3, 3, 3)] * 3), 4, 1, 3)
    if kind == "ViTAdapterUNETR":
        return ViTAdapterUNETR(backbone(), 1, 3, WIDTHS, OPTIONS._replace(drop_path=0.0))
    return head(kind, backbone())


@pytest.mark.parametrize("kind", ["Linear", "UNETR", "ViTAdapterUNETR", "UNet"])
def test_one_crop_has_the_gradients_of_two_that_are_the_same(kind: str) -> None:
    """torch's batch and instance norm may read the gradient of one crop in the wrong order; the adapter's was off by 400 %."""
    torch.manual_seed(0)
    net = network(kind).double().train().requires_grad_(True)
    x, target = torch.randn(1, 1, 32, 32, 32, dtype=torch.float64), torch.randint(0, 3, (1, 32, 32, 32))
    found = []
    for count in (1, 2):
        net.zero_grad()
        logits = net(x.expand(count, -1, -1, -1, -1).clone())
        torch.nn.functional.cross_entropy(logits, target.expand(count, -1, -1, -1)).backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    one, two = found
    largest = max(float(g.norm()) for g in two.values())
    for name, grad in two.items():
        assert float((one[name] - grad).norm()) <= 1e-8 * float(grad.norm()) + 1e-12 * largest, name


class OnlyItsWidth(torch.nn.Module):
    """What an adapter is built around, without a backbone's parameters."""

    embed_dim, num_layers = 1024, 4


def test_first_weights_spread_as_the_published_adapters_at_the_width_of_vit_l() -> None:
    torch.manual_seed(0)
    adapter = ViTAdapter3d(OnlyItsWidth(), 1, AdapterOptions())
    ffn = adapter.extractors[5].ffn
    expected = [
        (adapter.spm.stem[0][0], 0.034), (adapter.spm.stem[2][0], 0.034), (adapter.spm.conv3[0], 0.017),
        (ffn.fc1, 0.020), (ffn.fc2, 0.020), (adapter.up, 0.031),
        (ffn.dwconv, (2 / 27) ** 0.5), (adapter.spm.fc4, (2 / 1024) ** 0.5), (adapter.merges[3].linear, 0.020),
    ]  # fmt: skip
    for module, std in expected:
        assert float(module.weight.std()) == pytest.approx(std, rel=0.05), module
        assert abs(float(module.weight.mean())) < 0.1 * std
        assert module.bias is None or not module.bias.any(), module


def test_first_weights_of_backbone_and_deformable_attention_are_left_alone() -> None:
    net = backbone()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapter = ViTAdapter3d(net, 1, OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for part in (adapter.injectors[0], adapter.extractors[0]):
        offsets = part.attn.sampling_offsets.bias.view(8, part.attn.num_levels, 4, 3)
        assert torch.equal(offsets, octant_offsets(4)[:, None].expand_as(offsets))
        assert not part.attn.sampling_offsets.weight.any() and not part.attn.attention_weights.weight.any()
        fans = sum(part.attn.value_proj.weight.shape)
        assert float(part.attn.value_proj.weight.abs().max()) == pytest.approx((6 / fans) ** 0.5, rel=0.1)  # Xavier, uniform


def test_channels_are_averaged_for_the_adapter_and_told_apart_at_the_end() -> None:
    """The same injection goes to every channel; exchanging two channels changes what is merged."""
    net = backbone(pos_encoding="rope")
    adapter = ViTAdapter3d(net, 2, OPTIONS)
    with torch.no_grad():
        adapter.injectors[0].gamma.fill_(0.5)
    given = []
    adapter.injectors[0].register_forward_hook(lambda _m, args, out: given.append((args[0], out)))
    x = torch.randn(1, 2, 32, 32, 32)
    adapter.eval()
    one, other = adapter(x)[3], adapter(x.flip(1))[3]
    tokens = net.prepare_tokens_with_masks(x.flatten(0, 1)[:, None])[:, 1:]
    torch.testing.assert_close(given[0][0], tokens.mean(0, keepdim=True))
    assert given[0][1].shape == (1, 512, 32)
    assert (one - other).abs().max() > 1e-3


class OnGpu(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_on_a_gpu_depthwise_convolutions_get_volumes_whose_channels_lie_apart() -> None:
    """Others torch hands to cuDNN, which is slow there; on a CPU nothing is copied."""
    ffn, levels, x = ConvFFN(8, 1.0).double(), [(4, 4, 4), (2, 2, 2)], torch.randn(2, 72, 8).double()
    given: list[Tensor] = []
    ffn.dwconv.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    out, pretended = ffn(x, levels), ffn(x.as_subclass(OnGpu), levels)
    assert [v.stride(1) for v in given] == [1, 1, 4**3, 2**3]
    assert given[0].untyped_storage().data_ptr() == given[1].untyped_storage().data_ptr()
    torch.testing.assert_close(pretended.as_subclass(Tensor), out)


@pytest.mark.gpu
def test_a_gpu_makes_the_gradient_of_a_depthwise_weight_at_once() -> None:
    levels, hidden = [(12, 12, 12), (6, 6, 6)], 64
    ffn, x = ConvFFN(hidden, 1.0), torch.randn(2, 12**3 + 6**3, hidden)
    wanted = torch.autograd.grad(ffn.double()(x.double(), levels).square().mean(), ffn.dwconv.weight)[0]
    ffn.float().cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with torch.autocast("cuda", torch.bfloat16):
            out = ffn(x.cuda(), levels)
        (got,) = torch.autograd.grad(out.float().square().mean(), ffn.dwconv.weight)
        torch.cuda.synchronize()
    kernels = [e.key for e in profile.key_averages()]
    assert any("conv_depthwise3d" in k for k in kernels) and not any("cudnn" in k for k in kernels), kernels
    assert (got.cpu() - wanted).norm() < 0.03 * wanted.norm()


def test_the_extractors_read_around_each_pyramid_voxels_own_place() -> None:
    adapter = ViTAdapter3d(backbone(8, 4), 1, OPTIONS)
    places = []
    adapter.extractors[0].attn.register_forward_pre_hook(lambda _m, args: places.append(args[1]))
    adapter(torch.randn(1, 1, 32, 16, 48))
    torch.testing.assert_close(places[0], cell_centres([(8, 4, 12), (4, 2, 6), (2, 1, 3)]))


def test_unetr_joins_later_blocks_at_coarser_sizes() -> None:
    """Three quarters of the depth at twice the coarsest map's size, half at four times, a quarter at eight times."""
    net = backbone(16, 4)
    model, seen = head("UNETR", net).eval(), []
    for project in model.projections:
        project.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    x = torch.randn(1, 1, 32, 32, 32)
    model(x)
    tokens = net.get_intermediate_layers(x, [0, 1, 2])
    for (given, out), layer, edge in zip(seen, (2, 1, 0), (4, 8, 16), strict=True):
        expected = model.merges[layer](tokens[layer]).transpose(1, 2).unflatten(2, (2, 2, 2))
        torch.testing.assert_close(given, expected)
        assert out.shape[2:] == (edge,) * 3


@pytest.mark.parametrize("kind", ["ViTAdapterUNETR", "UNETR", "Linear"])
def test_a_batch_of_multi_channel_volumes_gives_what_each_gives_alone(kind: str) -> None:
    """Channels lie in the batch inside: none may end up with another volume's."""
    model = head(kind, backbone(8, 4), channels=3).eval()
    if kind == "ViTAdapterUNETR":
        for injector in model.adapter.injectors:
            torch.nn.init.ones_(injector.gamma)
    x = torch.randn(2, 3, 32, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(x[:1]), model(x[1:])]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ViTAdapterUNETR", "UNETR", "Linear"])
@pytest.mark.parametrize("trained", [False, True])
def test_every_trained_parameter_gets_a_gradient_and_a_frozen_backbone_none(kind: str, trained: bool) -> None:
    net = backbone(8, 4)
    model = head(kind, net, channels=2).train()
    choose_trained(model, trained)
    if kind == "ViTAdapterUNETR":
        for injector in model.adapter.injectors:
            torch.nn.init.ones_(injector.gamma)
    logits = model(torch.randn(2, 2, 32, 32, 32))
    assert logits.shape == (2, 3, 32, 32, 32)
    logits.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad is None for p in net.parameters()) is not trained


def test_extractors_leave_out_a_fifth_of_their_feed_forwards_in_training_only() -> None:
    """As the published adapter, by default."""
    assert AdapterOptions().drop_path == SegmentationConfig().drop_path_rate == 0.2
    drops = [extractor.drop_path for extractor in ViTAdapter3d(backbone(), 1, OPTIONS).extractors]
    assert [drop.rate for drop in drops] == [0.2] * 6
    x = torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    out = drops[0](x)
    kept = out[:, 0, 0] > 0
    assert 0.77 < kept.float().mean() < 0.83 and torch.equal(out, x * kept[:, None, None] / 0.8)
    assert torch.equal(drops[0].eval()(x), x)


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for switch in (False, True):
        torch.manual_seed(1)
        adapter = ViTAdapter3d(backbone(8, 4), 1, OPTIONS._replace(checkpointing=switch))
        sum(m.square().mean() for m in adapter(torch.ones(2, 1, 32, 32, 32) * torch.arange(32.0) / 32)).backward()
        grads.append({n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


class Named(torch.nn.Module):
    """Somebody's network: what `BlockBackbone` asks for, and nothing else of ours."""

    def __init__(self, inner: DinoVisionTransformer3d) -> None:
        super().__init__()
        self.inner = inner
        for name in ("embed_dim", "patch_size", "num_layers", "num_prefix_tokens", "input_size"):
            setattr(self, name, getattr(inner, name))
        for name in ("get_intermediate_layers", "prepare_tokens_with_masks", "segment", "run_blocks"):
            setattr(self, name, getattr(inner, name))


@pytest.mark.parametrize("kind", ["Linear", "UNETR", "ViTAdapterUNETR"])
def test_every_head_goes_around_any_network_with_the_protocol(kind: str) -> None:
    inner = backbone(4, 4, num_register_tokens=2)
    assert isinstance(Named(inner), BlockBackbone)
    x, outputs = torch.rand(1, 2, 16, 16, 32), []
    for net in (inner, Named(inner)):
        torch.manual_seed(3)
        model = head(kind, net, channels=2)
        choose_trained(model, False)
        assert not any(p.requires_grad for p in model.backbone.parameters())
        outputs.append(model.eval()(x))
    assert torch.equal(*outputs)


def test_random_trains_everything_at_one_rate() -> None:
    """The paper's baseline: UNETR end to end, default settings."""
    model = head("UNETR", backbone(8, 4))
    choose_trained(model, True)
    groups = build_optimizer(model, PLAN, SegmentationConfig().layerwise_decay).param_groups
    assert {g["lr_scale"] for g in groups} == {1.0}
    trained = {id(p) for p in model.parameters()} - {id(model.backbone.mask_token)}
    assert {id(p) for g in groups for p in g["params"]} == trained


def test_a_trained_backbone_can_learn_slower_towards_its_input() -> None:
    net = backbone(8, 4).requires_grad_(True)
    model = head("UNETR", net)
    optimizer = build_optimizer(model, PLAN, 0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert scale[id(model.out.weight)] == scale[id(net.norm.weight)] == 1
    assert scale[id(net.block_list[3].attn.qkv.weight)] == 0.5
    assert scale[id(net.block_list[0].attn.qkv.weight)] == 0.5**4
    assert scale[id(net.patch_embed.proj.weight)] == 0.5**5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: head("ViTAdapterUNETR", backbone(depth=6)), "divisible by 4, this backbone has 6 blocks"),
        (lambda: ViTAdapter3d(backbone(), 1, OPTIONS._replace(feature_ratio=0.1)), "feature_ratio=0.1.*multiple of 8"),
        (lambda: head("UNETR", backbone(12)), "patch size of 2, 4, 8 or 16, this backbone has 12"),
    ],
)
def test_a_head_that_does_not_fit_says_why(make: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


@pytest.mark.parametrize("size", [(3, 4, 2), (6, 8, 4), (11, 4, 7), (2, 5, 1)])
def test_maps_are_resized_as_interpolate_does_it(size: tuple[int, int, int]) -> None:
    x = torch.randn(2, 5, 3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, expected = resize_trilinear(x, size), torch.nn.functional.interpolate(x, size, mode="trilinear")
    torch.testing.assert_close(ours, expected)
    grad = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, wanted in zip(torch.autograd.grad(ours, x, grad), torch.autograd.grad(expected, x, grad), strict=True):
        torch.testing.assert_close(got, wanted)


def test_under_autocast_the_pyramid_stays_in_half_precision_and_is_kept_once_for_all_that_read_it() -> None:
    """Bytes that an extractor keeps for its backward pass: 9.4 for each voxel and channel; 15.4 with a pyramid in float32 and
    copies cast for each layer."""
    levels, grid, dim = [(6, 6, 6), (3, 3, 3), (2, 2, 2)], (2, 2, 2), 256
    extractor = Extractor(dim, 1, 0.125, 0.125, 0.0)
    layout = make_layout(grid, levels, torch.device("cpu"))
    pyramid = torch.randn(1, len(layout.pyramid_places), dim, dtype=torch.bfloat16, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in extractor.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights and x.numel() % pyramid.shape[1] == 0:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        out = extractor(pyramid, torch.randn(1, 8, dim, requires_grad=True), layout)
    assert out.dtype == torch.bfloat16
    assert sum(x.untyped_storage().nbytes() for x in kept.values()) / pyramid.numel() < 10


def test_under_autocast_the_adapters_pyramid_is_in_half_precision() -> None:
    adapter = ViTAdapter3d(backbone(), 1, OPTIONS).eval()
    seen = []
    for extractor in adapter.extractors:
        extractor.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        adapter(torch.randn(1, 1, 16, 16, 16))
    assert seen == [torch.bfloat16] * 6


def test_a_norms_float32_is_cast_once_under_autocast_and_never_without() -> None:
    """CUDA's autocast gives float32 from a layer norm, the CPU's half precision."""
    x = torch.randn(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert in_compute_dtype(x).dtype == torch.bfloat16 and in_compute_dtype(x.double()).dtype == torch.float64
    assert in_compute_dtype(x) is x
