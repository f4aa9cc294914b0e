"""Patch tokens to three colours, as in the paper's Fig. 1c: the first component is the foreground, the next three the colour.

Shapes: N patches, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dinov2.errors import BadInput

NUM_COMPONENTS = 4
FEWEST_PATCHES = 8  # of all scans; with fewer the components are noise
STRETCH = (0.02, 0.98)  # quantiles of the foreground that become 0 and 1 of a colour
_BINS = 256


@dataclass(frozen=True)
class PatchBasis:
    """Principal components of the patches of one scan or of a group.

    Attributes:
        mean: [E].
        axes: [E, 4] unit vectors, by falling variance.
        explained: [4] share of the variance.
        threshold: Of the first component; what is above is foreground.
        low, high: [3] of components 2 to 4, that become 0 and 1.
    """

    mean: np.ndarray
    axes: np.ndarray
    explained: np.ndarray
    threshold: float
    low: np.ndarray
    high: np.ndarray

    def scores(self, tokens: np.ndarray) -> np.ndarray:
        """[..., E] -> [..., 4] float32."""
        return ((tokens - self.mean) @ self.axes).astype(np.float32)

    def colours(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores [..., 4] to RGB [..., 3] in [0, 1], white where background, and the foreground [...]."""
        foreground = scores[..., 0] > self.threshold
        rgb = ((scores[..., 1:] - self.low) / (self.high - self.low)).clip(0, 1)
        return np.where(foreground[..., None], rgb, 1.0).astype(np.float32), foreground


def fit_basis(tokens: Sequence[np.ndarray], brightness: Sequence[np.ndarray]) -> PatchBasis:
    """The components of all scans' patches together.

    The sign of the first one is that with which it grows with brightness, so that what is above the threshold is the body; that
    of the others makes their largest entry positive. Neither depends on the linear algebra library.

    Args:
        tokens: [N, E] of each scan.
        brightness: [N] of each, the mean of the patch's voxels.

    Raises:
        BadInput: Too few patches, or all of them the same to the network.
    """
    joint = np.concatenate([t.reshape(-1, t.shape[-1]) for t in tokens]).astype(np.float64)
    bright = np.concatenate([b.ravel() for b in brightness]).astype(np.float64)
    if len(joint) < FEWEST_PATCHES or joint.shape[1] < NUM_COMPONENTS:
        raise BadInput(
            f"PCA of {len(joint)} patch{'es' * (len(joint) != 1)}: needs at least {FEWEST_PATCHES}: use --input-type resize "
            "with a larger --size, --step, or a network of smaller patches"
        )
    mean = joint.mean(0)
    centred = joint - mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values, axes = values[::-1][:NUM_COMPONENTS].clip(0), vectors[:, ::-1][:, :NUM_COMPONENTS]
    total = float((centred**2).sum())
    if total <= 1e-10 * float((joint**2).sum()) or values[-1] <= 0:
        raise BadInput("all patches look the same to this network: there is nothing to show; check the weights and the scan")
    first = centred @ axes[:, 0]
    signs = np.sign(axes[np.abs(axes).argmax(0), range(NUM_COMPONENTS)])
    with_brightness = float((first * (bright - bright.mean())).sum())
    if with_brightness:
        signs[0] = np.sign(with_brightness)
    axes = axes * signs
    scores = centred @ axes
    threshold = otsu(scores[:, 0])
    foreground = scores[scores[:, 0] > threshold, 1:]
    if not len(foreground):
        raise BadInput("no patch lies above the threshold of the first component: the foreground is empty; check the scan")
    low, high = np.quantile(foreground, STRETCH, axis=0)
    flat = high - low < 1e-9 * np.abs(scores).max()
    return PatchBasis(mean, axes, values / total, threshold, low, np.where(flat, low + 1, high))


def turned_to(basis: PatchBasis, tokens: np.ndarray, other: PatchBasis, other_tokens: np.ndarray) -> PatchBasis:
    """The same components with 2 to 4 turned among themselves, so that the same patches have the colours of another network's.

    A rotation or reflection of three axes within their span (orthogonal Procrustes, over patches that are foreground to both):
    what the colours tell apart stays as it was.

    Args:
        basis: Of `tokens` [..., E].
        tokens: Of the patches of a scan.
        other: Of `other_tokens` [..., F].
        other_tokens: Of the same patches, in the same order.
    """
    own, aim = (b.scores(t).reshape(-1, NUM_COMPONENTS) for b, t in ((basis, tokens), (other, other_tokens)))
    both = (own[:, 0] > basis.threshold) & (aim[:, 0] > other.threshold)
    left, _, right = np.linalg.svd(own[both, 1:].astype(np.float64).T @ aim[both, 1:])
    turn = left @ right  # [3, 3]
    turned = own[own[:, 0] > basis.threshold, 1:] @ turn
    low, high = np.quantile(turned, STRETCH, axis=0)
    flat = high - low < 1e-9 * np.abs(own).max()
    axes = np.concatenate([basis.axes[:, :1], basis.axes[:, 1:] @ turn], axis=1)
    explained = np.concatenate([basis.explained[:1], basis.explained[1:] @ turn**2])
    return replace(basis, axes=axes, explained=explained, low=low, high=np.where(flat, low + 1, high))


def otsu(values: np.ndarray) -> float:
    """The threshold that separates values into the two groups of least variance inside (Otsu 1979)."""
    counts, edges = np.histogram(values, _BINS)
    centres = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()[:-1]  # at or below the i-th bin
    above = counts.sum() - below
    sums = (counts * centres).cumsum()
    mean_below, mean_above = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    between = below * above * (mean_below - mean_above) ** 2
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))  # empty bins between the groups: the middle of them
    return float(edges[1 + best[len(best) // 2]])


def cosine_map(tokens: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosine similarity of a token [E] to each of [..., E]: [...] float32."""
    lengths = np.linalg.norm(tokens, axis=-1) * np.linalg.norm(query)
    return (tokens @ query / np.maximum(lengths, 1e-12)).astype(np.float32)
