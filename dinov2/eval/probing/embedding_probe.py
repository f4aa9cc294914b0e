"""A saved probe on features of `dinov2 embed`: what `dinov2 probe` writes, and the same scan's answer from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.checkpointer.saving import save_atomically
from dinov2.configs.loader import saved_config
from dinov2.errors import BadInput
from dinov2.features.encoder import load_encoder
from dinov2.features.setup import ours_alone
from dinov2.features.spacing import spacing_of
from dinov2.features.views import View
from dinov2.files import user_path
from dinov2.models.weights import refuse_non_finite

EMBEDDING = "embedding"  # the key of a probe's description that tells it from `linear3d.py`'s
_LIKELY_DTYPE = "auto"  # of a table that does not say


def save_embedding_probe(path: Path, weight: np.ndarray, bias: np.ndarray, meta: dict[str, Any]) -> None:
    """Write a linear map of features.

    Args:
        path: Of `probe.pth`.
        weight: [K, F] of logits, or [1, F] of a value.
        bias: [K] or [1].
        meta: Plain types: `target`, `classes` (none of a value), `parts` of the features, `view`, `network` (its fingerprint),
            `weights` (where they are from the probe's folder), `dtype`, `config`.
    """
    save_atomically({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias), "meta": {EMBEDDING: meta}}, path)


class EmbeddingProbe:
    """A probe ready for scans.

    Args:
        path: `probe.pth` of `dinov2 probe`.
        content: Of that file.
        weights: Of the encoder, as of `load_encoder`; None: where the table of features said that they are.

    Raises:
        BadInput: The weights are missing or others.
    """

    num_channels = 1

    def __init__(self, path: str | Path, content: dict[str, Any], weights: str | None = None) -> None:
        meta = content["meta"][EMBEDDING]
        refuse_non_finite({name: content[name] for name in ("weight", "bias")}, str(path))
        if not weights and not meta["weights"]:
            raise BadInput(f"{path}: does not say where the weights are that it was made with: give --pretrained-weights")
        source = weights or weights_beside(path, meta["weights"])
        config = None if meta["config"] is None else saved_config(meta["config"], str(path))
        seed, named = meta.get("untrained") or 0, ours_alone(meta.get("encoder"), path)
        self.encoder = load_encoder(source, config=config, dtype=meta["dtype"] or _LIKELY_DTYPE, seed=seed, encoder=named)
        if self.encoder.fingerprint() != meta["network"]:
            raise BadInput(
                f"{source}: not the weights that {path} was made with, or in another dtype: give them as --pretrained-weights"
            )
        self.names: list[str] = meta["classes"]
        self.target: str = meta["target"]
        self.parts: list[str] = meta["parts"]
        view = meta["view"]
        self.view = View(view["mode"], view["size"], view["overlap"], spacing_mm=spacing_of(view.get("spacing")))
        self.weight, self.bias = content["weight"], content["bias"]

    def __call__(self, images: Sequence[str | Path]) -> torch.Tensor:
        """Class probabilities [K], or the value [1], float64, of one scan.

        Raises:
            BadInput: The file cannot be used.
        """
        found = self.encoder.encode_scan(self.encoder.load([user_path(image) for image in images]), self.view)
        features = torch.cat([getattr(found, part)[0] for part in self.parts]).double().cpu()
        answer = self.weight @ features + self.bias
        return answer.softmax(-1) if self.names else answer


def weights_beside(probe: str | Path, weights: str) -> str:
    """How a probe names its network's weights: a path from its folder, where it leads to something; other names as they are."""
    beside = os.path.normpath(os.path.join(os.path.dirname(os.path.realpath(user_path(probe))), weights))
    return beside if os.path.exists(beside) else weights
