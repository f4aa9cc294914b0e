"""The paper's 52 linear heads as one batched head, against 52 heads with `torch.optim.SGD`, on the same features in one run.

    python benchmarks/linear_grid.py [--embed-dim E] [--iterations N] [--threads T]

Features are drawn at random with the width of a backbone (1024: ViT-L). Two references: separate heads, each with a loss,
a backward pass and an optimiser of its own (the target is 8 times as fast as these); and the same heads with one optimiser of
52 groups and one backward pass over the sum of their losses, as DINOv2 trains them. All begin with the same weights and see the
same batches; the largest difference from the separate heads' weights at the end is printed beside the times.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.eval.probing.linear_heads import LEARNING_RATES, MOMENTUM, Head, LinearHeads, cosine_factor, head_grid

LAYERS = 4
MIN_SPEEDUP = 8.0


class TorchHeads:
    """A reference: modules, trained separately or by one optimiser and one backward pass."""

    def __init__(self, heads: list[Head], batched: LinearHeads, embed_dim: int, together: bool) -> None:
        self.columns = [h.columns(LAYERS, embed_dim) for h in heads]
        self.modules = []
        for i, columns in enumerate(self.columns):
            module = nn.Linear(columns.stop - columns.start, batched.num_classes)
            weight, bias = batched.head_weights(i)
            module.load_state_dict({"weight": weight, "bias": bias})
            self.modules.append(module)
        self.rates = [h.learning_rate for h in heads]
        groups = [{"params": list(m.parameters()), "lr": r} for m, r in zip(self.modules, self.rates, strict=True)]
        parts = [groups] if together else [[group] for group in groups]
        self.optimizers = [torch.optim.SGD(part, momentum=MOMENTUM, weight_decay=0) for part in parts]
        self.together = together

    def step(self, features: Tensor, labels: Tensor, factor: float) -> None:
        all_groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, rate in zip(all_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        losses = (F.cross_entropy(m(features[:, c]), labels) for m, c in zip(self.modules, self.columns, strict=True))
        for loss, optimizer in zip([sum(losses)] if self.together else losses, self.optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def measure(embed_dim: int, iterations: int, rounds: int, batch: int = 32, classes: int = 4) -> tuple[dict[str, float], float]:
    """Best times of an iteration in ms, and the largest difference of the weights."""
    generator = torch.Generator().manual_seed(0)
    heads = head_grid(LEARNING_RATES, LAYERS)
    ours = LinearHeads(heads, LAYERS, embed_dim, classes, generator)
    separate, together = (TorchHeads(heads, ours, embed_dim, way) for way in (False, True))
    data = [torch.randn(batch, (LAYERS + 1) * embed_dim, generator=generator) for _ in range(16)]
    labels = [torch.randint(classes, (batch,), generator=generator) for _ in data]
    steps = {"ours": ours.step, "separate": separate.step, "together": together.step}
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for i in range(turn * iterations, (turn + 1) * iterations):
                step(data[i % 16], labels[i % 16], cosine_factor(i, rounds * iterations))
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start) / iterations)
    pairs = [(ours.head_weights(i)[0], m.weight.detach()) for i, m in enumerate(separate.modules)]
    return best, max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, nargs="+", default=[384, 1024])
    parser.add_argument("--iterations", type=int, default=40, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    slow = False
    for width in args.embed_dim:
        ms, apart = measure(width, args.iterations, args.rounds)
        slow |= ms["separate"] / ms["ours"] < MIN_SPEEDUP
        print(f"52 heads on {width} x 5 features, an iteration: batched {ms['ours']:.2f} ms")
        for name in ("separate", "together"):
            print(f"  52 modules, {name:8} {ms[name]:6.2f} ms: {ms[name] / ms['ours']:.1f} x")
        print(f"  weights differ by {apart:.1e} of their largest")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
