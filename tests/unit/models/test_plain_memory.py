"""Gradients of norms for one crop, by inputs and gradients in every order of memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from dinov2.layers.plain_memory import in_plain_memory


def channels_last(x: Tensor) -> Tensor:
    """With its channels last in memory; the first axis, of length 1, has the stride that a view leaves there."""
    return x.to(memory_format=torch.channels_last_3d).reshape(x.shape)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])  # there torch's own are to be right
@pytest.mark.parametrize("after", [nn.Identity(), nn.LeakyReLU(inplace=True)])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm3d, nn.InstanceNorm3d])
def test_a_norm_of_one_crop_has_the_same_gradient_in_any_order_of_memory(
    kind: type[nn.Module], is_training: bool, after: nn.Module, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    torch.manual_seed(0)
    norm = nn.Sequential(kind(4, affine=True), after).to(device, torch.float64).train(is_training)
    in_plain_memory(norm)
    in_plain_memory(norm)  # a network in a network: once is enough
    assert len(norm[0]._forward_hooks) == 1
    x, slopes = torch.randn(2, 1, 4, 3, 5, 6, dtype=torch.float64, device=device)
    found = []
    for input_order, gradient_order in product([Tensor.clone, channels_last], repeat=2):
        given = input_order(x).detach().requires_grad_()
        norm.zero_grad()
        norm(given).backward(gradient_order(slopes))
        found.append([given.grad, norm[0].weight.grad.clone(), norm[0].bias.grad.clone()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)
