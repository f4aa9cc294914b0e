"""Deformable attention: the compiled operator on the CPU, its reference, and what holds for both."""

from __future__ import annotations

import itertools
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dinov2.ops import compiled_operators, ms_deform_attn_3d, ms_deform_attn_3d_reference
from dinov2.ops import ms_deform_attn as module
from tests.conftest import ROOT
from tests.ops.arguments import SHAPES, Arguments, CalledOperators, gradients, make_arguments, tensors

needs_compiled = pytest.mark.skipif(not compiled_operators()[0], reason=compiled_operators()[1])
Operator = Callable[..., Tensor]


@pytest.fixture(params=[pytest.param("compiled", marks=needs_compiled), "reference"])
def operator(request: pytest.FixtureRequest) -> Operator:
    return ms_deform_attn_3d if request.param == "compiled" else ms_deform_attn_3d_reference


def nested_loops(value: Tensor, shapes: list, locations: Tensor, weights: Tensor) -> Tensor:
    """The definition, voxel by voxel: each weighs max(0, 1 - distance) along every axis."""
    b, _, m, c = value.shape
    out = value.new_zeros(b, locations.shape[1], m, c)
    starts = [0, *itertools.accumulate(math.prod(s) for s in shapes)]
    for (i, q, j, level, p), weight in zip(itertools.product(*map(range, weights.shape)), weights.flatten(), strict=True):
        size = shapes[level]
        x = [float(locations[i, q, j, level, p, axis]) * size[axis] - 0.5 for axis in range(3)]
        for row, voxel in enumerate(itertools.product(*map(range, size))):
            share = math.prod(max(0.0, 1.0 - abs(x[axis] - voxel[axis])) for axis in range(3))
            if share > 0:
                out[i, q, j] += weight * share * value[i, starts[level] + row, j]
    return out.flatten(2)


def test_it_is_the_weighted_sum_of_trilinear_samples_in_and_outside_volumes_of_unequal_axes(operator: Operator) -> None:
    args = make_arguments()
    with torch.no_grad():
        torch.testing.assert_close(operator(*args), nested_loops(*args))


def test_gradients_are_those_of_finite_differences(operator: Operator) -> None:
    value, shapes, locations, weights = make_arguments(1, [(3, 2, 4), (2, 1, 3)], queries=4, channels=1, points=2)
    assert torch.autograd.gradcheck(lambda v, x, w: operator(v, shapes, x, w), (value, locations, weights), eps=1e-5)


def test_at_a_voxels_centre_the_derivative_is_the_one_towards_larger_coordinates(operator: Operator) -> None:
    shape = (8, 4, 2)  # powers of two: the centres are exact numbers
    value = torch.randn(1, math.prod(shape), 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centres = torch.tensor(list(itertools.product(*(range(-1, n) for n in shape))), dtype=torch.float64)
    locations = ((centres + 0.5) / torch.tensor(shape)).view(1, -1, 1, 1, 1, 3).requires_grad_()
    weights = torch.ones(locations.shape[:-1], dtype=torch.float64)
    out = operator(value, [shape], locations, weights)
    (grad,) = torch.autograd.grad(out.sum(), locations)
    padded = torch.nn.functional.pad(value.view(shape), (1, 1) * 3)
    here = padded[:-1, :-1, :-1]
    torch.testing.assert_close(out.view(here.shape), here)
    steps = [padded[1:, :-1, :-1] - here, padded[:-1, 1:, :-1] - here, padded[:-1, :-1, 1:] - here]
    expected = torch.stack([step * n for step, n in zip(steps, shape, strict=True)], dim=-1)
    torch.testing.assert_close(grad.view(expected.shape), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_point_that_is_nowhere_samples_nothing_and_leaves_the_others_alone(operator: Operator, bad: float) -> None:
    args = make_arguments(dtype=torch.float32)
    with torch.no_grad():
        args[2][0, 2, 1, 0, 1] = torch.tensor([0.4, 0.6, bad])
    out = operator(*args)
    grads = gradients(out, args)
    assert grads[1][0, 2, 1, 0, 1].abs().max() == 0 and grads[2][0, 2, 1, 0, 1] == 0
    with torch.no_grad():
        args[3][0, 2, 1, 0, 1] = 0.0
        args[2][0, 2, 1, 0, 1] = 0.5
    without = operator(*args)
    torch.testing.assert_close(out, without)
    torch.testing.assert_close(grads[0], gradients(without, args)[0])


@needs_compiled
@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 70), st.integers(1, 18)),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_the_reference(shapes: list, sizes: tuple, seed: int) -> None:
    args = make_arguments(sizes[0], shapes, *sizes[1:], seed=seed)
    ours, reference = ms_deform_attn_3d(*args), ms_deform_attn_3d_reference(*args)
    torch.testing.assert_close(ours, reference)
    for a, b in zip(gradients(ours, args), gradients(reference, args), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}])
def test_nothing_in_nothing_out(operator: Operator, empty: dict[str, int]) -> None:
    args = make_arguments(**empty)
    out = operator(*args)
    assert out.shape == (args[0].shape[0], args[2].shape[1], 10)
    value_grad, *others = gradients(out, args)
    assert value_grad.shape == args[0].shape and not value_grad.any() and all(g.numel() == 0 for g in others)


def replace(arguments: Arguments, **changes: object) -> list:
    named = dict(zip(("value", "shapes", "locations", "weights"), arguments, strict=True))
    return list((named | changes).values())


BAD = {
    r"value must be \[B, S, M, C\] .*got \[2, 84, 10\]": lambda a: replace(a, value=a[0].flatten(2)),
    r"value must be float64, float32, .*got torch.int64": lambda a: replace(a, value=a[0].long()),
    r"value has S = 84 voxels, spatial_shapes .* hold 60": lambda a: replace(a, shapes=a[1][:1]),
    r"value has S = 83 voxels, .*hold": lambda a: replace(a, value=a[0][:, 1:]),
    r"spatial_shapes must be positive": lambda a: replace(a, shapes=[(5, 4, 3), (2, 0, 4)]),
    r"spatial_shapes must hold \(H, W, D\)": lambda a: replace(a, shapes=[(5, 4), (3, 2)]),
    r"sampling_locations must be \[B, Q, M, L, P, 3\] .*M = 2, L = 2, got": lambda a: replace(a, locations=a[2][:, :, :1]),
    r"sampling_locations must be .*got \[2, 6, 2, 2, 3, 2\]": lambda a: replace(a, locations=a[2][..., :2]),
    r"attention_weights must be \[B, Q, M, L, P\] = \[2, 6, 2, 2, 3\]": lambda a: replace(a, weights=a[3][:, :5]),
    r"attention_weights must be on cpu as value is, got meta": lambda a: replace(a, weights=a[3].detach().to("meta")),
    r"1 to 16 levels, got 0 numbers": lambda a: replace(a, shapes=[]),
    r"1 to 16 levels, got 51 numbers": lambda a: replace(a, shapes=[(1, 1, 1)] * 17),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused_by_name(operator: Operator, message: str) -> None:
    called = CalledOperators()
    with pytest.raises(ValueError, match=message), called:
        operator(*BAD[message](make_arguments()))
    assert not called.names  # the compiled one is not reached either


@needs_compiled
def test_the_operators_check_for_themselves_before_any_kernel() -> None:
    value, shapes, locations, weights = make_arguments(dtype=torch.float16)
    flat = [n for shape in shapes for n in shape]
    forward, backward = torch.ops.dinov2.ms_deform_attn_3d, torch.ops.dinov2.ms_deform_attn_3d_backward
    with pytest.raises(ValueError, match="attention_weights must be Float for a value of Half, got Half"):
        forward(value, flat, locations, weights.half())
    with pytest.raises(ValueError, match="1 to 16 levels, got 5 numbers"):
        forward(value, flat[:5], locations, weights)
    with pytest.raises(ValueError, match="fewer than spatial_shapes .* hold"):
        forward(value, [2**40, 2**40, 2**40], locations, weights)
    with pytest.raises(ValueError, match=r"grad_output must be \[B, Q, M\*C\] = \[2, 6, 10\], got \[2, 6, 9\]"):
        backward(value.new_zeros(2, 6, 9), value, flat, locations, weights)
    with pytest.raises(ValueError, match="sampling_locations must be on cpu as value is, got meta"):
        forward.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), value.detach(), flat, locations.detach().to("meta"), weights
        )


def test_memory_order_does_not_matter(operator: Operator) -> None:
    args = make_arguments()
    out = operator(*args)
    permuted = [x if isinstance(x, list) else x.detach().transpose(0, -1).contiguous().transpose(0, -1) for x in args]
    assert not any(x.is_contiguous() for x in permuted if isinstance(x, Tensor))
    permuted = [x if isinstance(x, list) else x.requires_grad_() for x in permuted]
    again = operator(*permuted)
    assert torch.equal(again, out)
    for a, b in zip(gradients(again, permuted), gradients(out, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(operator: Operator, dtype: torch.dtype) -> None:
    """Value and result are rounded to `dtype` once each: half of eps, relative; the sums between are float32."""
    args = make_arguments(channels=8, dtype=dtype)
    exact = replace(args, value=args[0].detach().double().requires_grad_())
    out, expected = operator(*args), ms_deform_attn_3d_reference(*exact)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps / 2 * 1.01, atol=1e-5)
    grads, wanted = gradients(out, args), gradients(expected.to(dtype), exact)
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    torch.testing.assert_close(grads[0].double(), wanted[0], rtol=eps / 2 * 1.01, atol=1e-5)
    for g, e in zip(grads[1:], wanted[1:], strict=True):  # their sums are float32 throughout
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_under_autocast_locations_and_sums_stay_single() -> None:
    _, shapes, locations, weights = make_arguments(channels=8, dtype=torch.float32)
    features = torch.randn(2, 84, 16, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        value = torch.nn.functional.linear(features, torch.eye(16)).view(2, 84, 2, 8)
        out = ms_deform_attn_3d(value, shapes, locations, weights)
    assert value.dtype == out.dtype == torch.bfloat16
    expected = ms_deform_attn_3d_reference(value.double(), shapes, locations, weights)
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(torch.bfloat16).eps / 2 * 1.01, atol=1e-5)


@needs_compiled
def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):  # seven: more than heads, so that channels are shared out too
            torch.set_num_threads(threads)
            args = make_arguments(batch=1, queries=3000, channels=21, dtype=torch.float32)
            out = ms_deform_attn_3d(*args)
            results.append((out, *gradients(out, args)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@needs_compiled
def test_values_larger_than_a_cache_have_the_references_gradients_on_any_number_of_threads() -> None:
    """Of a head after the other, from copies of its rows."""
    before = torch.get_num_threads()
    args = make_arguments(2, [(24, 20, 18), (9, 8, 7)], 600, 2, 21, 4)
    expected = gradients(ms_deform_attn_3d_reference(*args), args)
    results = []
    try:
        for threads in (1, 2, 9):
            torch.set_num_threads(threads)
            results.append(gradients(ms_deform_attn_3d(*args), args))
    finally:
        torch.set_num_threads(before)
    for found in results:
        for a, b, c in zip(found, expected, results[0], strict=True):
            torch.testing.assert_close(a, b)
            assert torch.equal(a, c)


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype: torch.dtype) -> None:
    value, shapes, locations, weights = make_arguments(dtype=dtype)
    flat = [n for shape in shapes for n in shape]
    torch.library.opcheck(torch.ops.dinov2.ms_deform_attn_3d.default, (value, flat, locations, weights), rtol=1e-2, atol=1e-2)
    grad = torch.randn(2, 6, 10).to(dtype)
    plain = [x.detach() for x in (value, locations, weights)]
    torch.library.opcheck(torch.ops.dinov2.ms_deform_attn_3d_backward.default, (grad, plain[0], flat, *plain[1:]))


@pytest.mark.slow
def test_it_can_be_compiled_and_exported(operator: Operator) -> None:
    args = make_arguments(dtype=torch.float32)

    def layer(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return operator(value * 2, SHAPES, locations, weights.softmax(-1)).sin()

    expected = layer(*tensors(args))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    out = compiled(*tensors(args))
    torch.testing.assert_close(out, expected)
    for a, b in zip(gradients(out, args), gradients(expected, args), strict=True):
        torch.testing.assert_close(a, b)

    class Layer(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return layer(value, locations, weights)

    queries = torch.export.Dim("queries", min=2)
    example = tuple(t.detach() for t in tensors(args))
    program = torch.export.export(Layer(), example, dynamic_shapes=(None, {1: queries}, {1: queries}))
    longer = tuple(t.detach() for t in tensors(make_arguments(queries=11, dtype=torch.float32)))
    torch.testing.assert_close(program.module()(*longer), layer(*longer))


def test_without_the_compiled_part_the_reference_runs_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "COMPILED_FOR", frozenset())
    monkeypatch.setattr(module, "implementation", lambda device: (False, "not compiled: scripts/install compiles them"))
    module._say_reference.cache_clear()
    args = make_arguments()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = ms_deform_attn_3d(*args)
    assert torch.equal(out, ms_deform_attn_3d_reference(*args))
    assert caplog.messages == [
        "3D deformable attention on cpu runs in plain PyTorch, slower: not compiled: scripts/install compiles them"
    ]
    module._say_reference.cache_clear()


@needs_compiled
@pytest.mark.slow
def test_the_kernels_for_any_processor_agree() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    words = "weighted_sum or finite_differences or centre or any_shape or threads"
    environment = {**os.environ, "DINOV2_GENERIC_KERNELS": "1"}
    result = subprocess.run([*command, "-k", words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
