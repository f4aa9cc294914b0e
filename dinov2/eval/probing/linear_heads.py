"""Many linear classifiers on frozen features, trained at once: one matrix product for each block of the features.

Each classifier (head) has its own learning rate, its own part of the features and its own loss; none sees another. They share a
batch, so that all heads that read a block of the features are one matrix product there (of 52 heads three products), and SGD on
them is two passes over one tensor. The gradient of softmax and cross-entropy is known in closed form: no graph is built.

B rows, F features, n heads, K classes, E embedding.

Source: 3DINO paper, Methods, "3DINO classification"; DINOv2's linear evaluation (grid, start, names of the heads).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)  # the paper's
LAYER_CHOICES = (1, 4)
MOMENTUM = 0.9
START_STD = 0.01  # of the weights


@dataclass(frozen=True)
class Head:
    """What tells a head from the others.

    Attributes:
        layers: It reads the class tokens of the last so many layers,
        pooled: and the mean of the last layer's patch tokens.
        learning_rate: At the start of the cosine.
    """

    layers: int
    pooled: bool
    learning_rate: float

    @property
    def name(self) -> str:
        """DINOv2's."""
        rate = f"{self.learning_rate:.5f}".replace(".", "_")
        return f"classifier_{self.layers}_blocks_avgpool_{self.pooled}_lr_{rate}"

    def columns(self, num_layers: int, embed_dim: int) -> slice:
        """Its part of features [(num_layers + 1) * E]: class tokens of the last layers in their order, then pooled patches."""
        stop = num_layers + self.pooled
        return slice((num_layers - self.layers) * embed_dim, stop * embed_dim)


def head_grid(learning_rates: Sequence[float], num_layers: int, pooled: bool = True) -> list[Head]:
    """Every rate with the last {1, 4} layers (as many as there are), with and without pooled patches.

    In an order in which the readers of each part of the features are neighbours.

    Args:
        learning_rates: Each with every part of the features.
        num_layers: That there are.
        pooled: False: without pooled patches alone.
    """
    few, many = min(LAYER_CHOICES), min(max(LAYER_CHOICES), num_layers)
    parts = [(few, False), (few, True), (many, True), (many, False)]
    chosen = [part for part in (parts if many > few else parts[:2]) if pooled or not part[1]]
    return [Head(n, with_patches, rate) for n, with_patches in chosen for rate in learning_rates]


class LinearHeads:
    """Heads with their momenta.

    Args:
        heads: The readers of each block of the features one after the other (`head_grid`).
        num_layers: Layers whose class tokens the features hold.
        embed_dim: E.
        num_classes: K.
        generator: Of the first weights.
        device: Of everything.
        dtype: Of everything.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        num_layers: int,
        embed_dim: int,
        num_classes: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.heads = list(heads)
        self.num_classes = num_classes
        self._reads = [h.columns(num_layers, embed_dim) for h in heads]
        edges = sorted({edge for c in self._reads for edge in (c.start, c.stop)})
        self._blocks = [(slice(a, b), self._readers(a, b)) for a, b in pairwise(edges)]
        start = [
            torch.empty(r.stop - r.start, c.stop - c.start).normal_(std=START_STD, generator=generator) for c, r in self._blocks
        ]
        self.weights = [w.to(device, dtype) for w in start]  # of each block [its readers * K, its columns]
        self.bias = torch.zeros(len(heads) * num_classes, device=device, dtype=dtype)
        self._momenta = [torch.zeros_like(w) for w in self.weights]
        self._bias_momentum = torch.zeros_like(self.bias)
        rates = torch.tensor([h.learning_rate for h in heads], device=device, dtype=dtype)
        self._rates = rates.repeat_interleave(num_classes)  # [n * K]

    def _readers(self, start: int, stop: int) -> slice:
        """Rows (head by head, K each) of the heads that read these columns."""
        heads = [i for i, c in enumerate(self._reads) if c.start <= start and stop <= c.stop]
        assert heads == list(range(heads[0], heads[-1] + 1)), "the readers of a block must be neighbours"
        return slice(heads[0] * self.num_classes, (heads[-1] + 1) * self.num_classes)

    def logits(self, features: Tensor) -> Tensor:
        """[B, n, K] of features [B, F]."""
        logits = self.bias.expand(len(features), -1).clone()
        for (columns, rows), weight in zip(self._blocks, self.weights, strict=True):
            logits[:, rows].addmm_(features[:, columns], weight.T)
        return logits.unflatten(1, (-1, self.num_classes))

    def step(
        self, features: Tensor, labels: Tensor, factor: float, want_gradient: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One step of SGD with momentum of every head on its own mean cross-entropy.

        Args:
            features: [B, F] float32; no graph is followed.
            labels: [B] int64.
            factor: Of every learning rate (the schedule's).
            want_gradient: Also return the gradient of the heads' mean loss with respect to the features, before the step.

        Returns:
            Each head's loss [n] before the step, and the gradient [B, F] or None. One not finite harms no other head.
        """
        features = features.detach()
        by_class = self.logits(features).transpose(1, 2).contiguous()  # [B, K, n]: softmax is fast along a middle axis
        log_p = by_class.log_softmax(1)
        target = labels[:, None, None].expand(-1, 1, len(self.heads))
        losses = -log_p.gather(1, target).squeeze(1).mean(0)
        error = log_p.exp_().scatter_add_(1, target, log_p.new_full((1, 1, 1), -1.0).expand_as(target)).div_(len(labels))
        error = error.transpose(1, 2).flatten(1)  # [B, n * K], the gradient of the losses' sum with respect to the logits
        gradient = self._feature_gradient(error, features) if want_gradient else None
        error = error * self._rates  # the momenta are kept times the rates: one factor for all rows of an update
        for (columns, rows), weight, momentum in zip(self._blocks, self.weights, self._momenta, strict=True):
            momentum.addmm_(error[:, rows].T, features[:, columns], beta=MOMENTUM)
            weight.sub_(momentum, alpha=factor)
        self._bias_momentum.mul_(MOMENTUM).add_(error.sum(0))
        self.bias.sub_(self._bias_momentum, alpha=factor)
        return losses, gradient

    def _feature_gradient(self, error: Tensor, features: Tensor) -> Tensor:
        gradient = torch.zeros_like(features)
        for (columns, rows), weight in zip(self._blocks, self.weights, strict=True):
            gradient[:, columns] += error[:, rows] @ weight
        return gradient / len(self.heads)

    def head_weights(self, index: int) -> tuple[Tensor, Tensor]:
        """Weight [K, width] and bias [K] of one head, copied."""
        first, stop = index * self.num_classes, (index + 1) * self.num_classes
        parts = [
            w[first - r.start : stop - r.start]
            for (_, r), w in zip(self._blocks, self.weights, strict=True)
            if r.start <= first < r.stop
        ]
        return torch.cat(parts, 1), self.bias[first:stop].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resume needs."""
        named = {
            f"{kind}.{i}": t for kind, ts in (("weight", self.weights), ("momentum", self._momenta)) for i, t in enumerate(ts)
        }
        return {**named, "bias": self.bias, "bias_momentum": self._bias_momentum}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: Of other heads, features or classes.
        """
        own = self.state_dict()
        differing = sorted(
            k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape
        )
        if differing:
            raise ValueError(f"heads of another grid, width or number of classes ({', '.join(differing[:3])} differ)")
        for name, value in own.items():
            value.copy_(state[name])


class LinearClassifier(nn.Module):
    """DINOv2's: one head on what `ModelWithIntermediateLayers` gives; a probe here trains all its heads in `LinearHeads`.

    Args:
        out_dim: Features, (use_n_blocks + use_avgpool) * E.
        use_n_blocks: It reads the class tokens of the last so many blocks,
        use_avgpool: and the mean of the last one's patch tokens.
        num_classes: K.
    """

    def __init__(self, out_dim: int, use_n_blocks: int, use_avgpool: bool, num_classes: int = 1000) -> None:
        super().__init__()
        self.out_dim, self.num_classes = out_dim, num_classes
        self.use_n_blocks, self.use_avgpool = use_n_blocks, use_avgpool
        self.linear = nn.Linear(out_dim, num_classes)
        nn.init.normal_(self.linear.weight, std=START_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Pairs of patch tokens [B, N, E] and class tokens [B, E] -> logits [B, K]."""
        used = x_tokens_list[-self.use_n_blocks :]
        parts = [cls for _, cls in used] + ([used[-1][0].mean(1)] if self.use_avgpool else [])
        return self.linear(torch.cat(parts, -1).float())


def cosine_factor(iteration: int, total_iters: int) -> float:
    """Share of the learning rate at an iteration: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * iteration / total_iters))
