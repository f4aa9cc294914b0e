"""Votes of the nearest neighbours among frozen features."""

from __future__ import annotations

import numpy as np

TEMPERATURE = 0.07


def knn_probabilities(
    train: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, num_classes: int, temperature: float = TEMPERATURE
) -> np.ndarray:
    """Votes of the k most similar training cases, all of them where there are fewer.

    Args:
        train: [n, F], not yet normalised.
        labels: [n] int.
        queries: [m, F].
        k: Neighbours.
        num_classes: K.

    Returns:
        [m, K], rows that sum to 1.
    """
    train, queries = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, queries))
    similarity = queries @ train.T  # [m, n]
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(similarity, nearest, 1)
    votes = np.exp((near - near[:, :1]) / temperature)  # relative to the nearest: nothing overflows
    totals = (votes[..., None] * np.eye(num_classes)[labels[nearest]]).sum(1)
    return totals / totals.sum(1, keepdims=True)
