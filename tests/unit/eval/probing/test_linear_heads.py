"""Batched heads: the weights of heads trained one by one, independent of each other, resumable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.eval.probing.linear_heads import LEARNING_RATES, MOMENTUM, Head, LinearHeads, cosine_factor, head_grid

LAYERS, E, K, ITERATIONS = 4, 6, 3, 30


def made(seed: int = 0, heads: list[Head] | None = None, layers: int = LAYERS) -> LinearHeads:
    heads = head_grid(LEARNING_RATES, layers) if heads is None else heads
    return LinearHeads(heads, layers, E, K, torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches(layers: int = LAYERS) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    make = (lambda: torch.randn(5, (layers + 1) * E, generator=g).double(), lambda: torch.randint(K, (5,), generator=g))
    return [(make[0](), make[1]()) for _ in range(ITERATIONS)]


def train(heads: LinearHeads, first: int = 0, last: int = ITERATIONS, layers: int = LAYERS) -> None:
    for i, (features, labels) in list(enumerate(batches(layers)))[first:last]:
        heads.step(features, labels, cosine_factor(i, ITERATIONS))


@pytest.mark.parametrize("layers", [4, 2, 1])
def test_the_batched_heads_end_with_the_weights_of_heads_trained_one_by_one(layers: int) -> None:
    """Each by torch's SGD and cosine schedule on its own concatenated input, as DINOv2 makes it."""
    batched = made(layers=layers)
    alone = []
    for i, head in enumerate(batched.heads):
        weight, bias = batched.head_weights(i)
        module = nn.Linear(weight.shape[1], K).double()
        module.load_state_dict({"weight": weight, "bias": bias})
        optimizer = torch.optim.SGD(module.parameters(), lr=head.learning_rate, momentum=MOMENTUM, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS, eta_min=0)
        for features, labels in batches(layers):
            *classes, pooled = features.split(E, 1)
            inputs = torch.cat([*classes[-head.layers :], *([pooled] if head.pooled else [])], 1)
            optimizer.zero_grad()
            F.cross_entropy(module(inputs), labels).backward()
            optimizer.step()
            schedule.step()
        alone.append(module)
    train(batched, layers=layers)
    assert len({h.name for h in batched.heads}) == len(batched.heads) == (26 if layers == 1 else 52)
    for i, module in enumerate(alone):
        weight, bias = batched.head_weights(i)
        torch.testing.assert_close((weight, bias), (module.weight.detach(), module.bias.detach()), atol=1e-12, rtol=1e-12)


def test_losses_and_the_gradient_of_the_features_are_those_of_autograd() -> None:
    heads = made()
    features, labels = batches()[0]
    features.requires_grad_(True)
    logits = heads.logits(features)
    losses = torch.stack([F.cross_entropy(logits[:, i], labels) for i in range(len(heads.heads))])
    (wanted,) = torch.autograd.grad(losses.mean(), features)
    found, gradient = heads.step(features, labels, 1.0, want_gradient=True)
    torch.testing.assert_close((found, gradient), (losses.detach(), wanted))


def test_a_head_that_diverges_harms_no_other() -> None:
    grid = head_grid(LEARNING_RATES, LAYERS)
    wild = [Head(grid[0].layers, grid[0].pooled, 1e308), *grid[1:]]
    calm, other = made(heads=grid), made(heads=wild)
    train(calm)
    train(other)
    assert not other.head_weights(0)[0].isfinite().all()
    for i in range(1, len(grid)):
        torch.testing.assert_close(other.head_weights(i), calm.head_weights(i), rtol=0, atol=0)


def test_a_state_saved_half_way_continues_exactly_and_another_grids_is_refused() -> None:
    whole, first, second = made(), made(), made(seed=9)
    train(whole)
    train(first, 0, 11)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    train(second, 11)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    with pytest.raises(ValueError, match="another grid"):
        second.load_state_dict(made(heads=head_grid(LEARNING_RATES[:5], LAYERS)).state_dict())
