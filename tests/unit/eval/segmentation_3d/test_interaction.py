"""Injector and extractor: their norms folded into the products behind them, and what they keep for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov2.eval.segmentation_3d.interaction import Extractor, Injector, make_layout

GRID, LEVELS = (3, 3, 2), [(6, 6, 4), (3, 3, 2), (2, 2, 1)]
NUM_VOXELS = sum(h * w * d for h, w, d in LEVELS)
LAYOUT = make_layout(GRID, LEVELS, torch.device("cpu"))


def made(kind: type[nn.Module], dim: int) -> nn.Module:
    """With other norms, weights and biases than the first ones."""
    torch.manual_seed(0)
    module = Extractor(dim, 4, 0.25, 0.25, 0.0) if kind is Extractor else Injector(dim, 3, 4, 0.25)
    for p in module.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return module


def as_written(module: nn.Module, patches: Tensor, pyramid: Tensor) -> Tensor:
    """What the paper's figure says, a norm as a layer of its own."""
    m = module
    if isinstance(m, Injector):
        return m.gamma * m.attn(m.query_norm(patches), LAYOUT.patch_places, m.feat_norm(pyramid), LEVELS)
    pyramid = pyramid + m.attn(m.query_norm(pyramid), LAYOUT.pyramid_places, m.feat_norm(patches), [GRID])
    return pyramid + m.ffn(m.ffn_norm(pyramid), LEVELS)


def ours(module: nn.Module, patches: Tensor, pyramid: Tensor) -> Tensor:
    return module(*((patches, pyramid) if isinstance(module, Injector) else (pyramid, patches)), LAYOUT)


@pytest.mark.parametrize("kind", [Injector, Extractor])
def test_folded_norms_compute_the_same(kind: type[nn.Module]) -> None:
    module = made(kind, 32).double()
    inputs = [torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True) for n in (18, NUM_VOXELS)]
    wanted = torch.randn_like(ours(module, *inputs))
    found, plain = (
        torch.autograd.grad((way(module, *inputs) * wanted).sum(), [*inputs, *module.parameters()])
        for way in (ours, as_written)
    )
    torch.testing.assert_close(ours(module, *inputs), as_written(module, *inputs), rtol=1e-10, atol=1e-12)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "norms"), [(Injector, 1), (Extractor, 2)])
def test_of_a_norm_the_normalised_rows_are_kept_in_half_precision(kind: type[nn.Module], norms: int) -> None:
    """Two bytes a voxel of the pyramid and channel; a norm by itself keeps what it read too, on a GPU in float32."""
    dim, kept = 64, {}
    module = made(kind, dim)
    patches, pyramid = (torch.randn(1, n, dim).bfloat16().requires_grad_() for n in (18, NUM_VOXELS))

    def note(saved: Tensor) -> Tensor:
        if saved.shape[-2:] == (NUM_VOXELS, dim):
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        out = ours(module, patches, pyramid)
    assert out.requires_grad and sum(kept.values()) == 2 * norms * NUM_VOXELS * dim
