"""A frozen encoder as a step of a scikit-learn pipeline; the one module that imports scikit-learn's base classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from dinov2.errors import BadInput
from dinov2.features.encoder import load_encoder

_OUTPUTS = ("cls", "pooled", "cls+pooled")


class VolumeEncoder(TransformerMixin, BaseEstimator):
    """Scans to rows of features: `make_pipeline(VolumeEncoder("demo"), StandardScaler(), LogisticRegression())`.

    Nothing is learned from the data: `fit` loads the weights.

    Args:
        weights: As `load_encoder`'s source.
        output: `cls`, `pooled` or `cls+pooled` (side by side).
        mode: How a scan is shown to the network, as the encoder's: `full_image`, `resize` or `sliding_window`.
        size: Edge (voxels) of the resized scan or of a window.
        overlap: Share of a window that its neighbour covers too.
        raw: Map the intensities of bare values to [-1, 1] first; files always are.
        spacing: `native`, or mm that scans are brought to first, one number or three.
        device: As of `load_encoder`.
        dtype: As of `load_encoder`.
    """

    def __init__(
        self,
        weights: str = "demo",
        output: str = "cls",
        mode: str = "full_image",
        size: int | None = None,
        overlap: float = 0.5,
        raw: bool = False,
        spacing: Any = "native",
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        self.weights = weights
        self.output = output
        self.mode = mode
        self.size = size
        self.overlap = overlap
        self.raw = raw
        self.spacing = spacing
        self.device = device
        self.dtype = dtype

    def fit(self, X: Any, y: Any = None) -> VolumeEncoder:
        """Load the weights.

        Raises:
            BadInput: As `load_encoder`, or an unknown output.
        """
        if self.output not in _OUTPUTS:
            raise BadInput(f"output {self.output!r}: choose one of {', '.join(_OUTPUTS)}")
        self.encoder_ = load_encoder(self.weights, self.device, dtype=self.dtype)
        return self

    def transform(self, X: Sequence[Any]) -> np.ndarray:
        """Features of scans (paths, arrays, MONAI's items; grids may differ), one at a time.

        Returns:
            [scans, E] or [scans, 2 * E] float32.

        Raises:
            BadInput: One of them cannot be used.
        """
        check_is_fitted(self)
        rows = [self._row(item) for item in X]
        return np.stack(rows) if rows else np.empty((0, len(self.get_feature_names_out())), np.float32)

    def _row(self, item: Any) -> np.ndarray:
        found = self.encoder_([item], self.mode, self.size, overlap=self.overlap, raw=self.raw, spacing=self.spacing)
        return np.concatenate([getattr(found, name)[0].cpu().numpy() for name in self.output.split("+")])

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """`cls0`, `cls1`, ... in the order of the columns."""
        check_is_fitted(self)
        return np.array([f"{name}{i}" for name in self.output.split("+") for i in range(self.encoder_.embed_dim)], dtype=object)
