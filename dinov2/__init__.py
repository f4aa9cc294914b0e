"""Self-supervised pretraining of 3D vision transformers on medical volumes: DINOv2's shape, our own text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dinov2.version import __version__

if TYPE_CHECKING:
    from dinov2.features.encoder import Encoder, Features, load_encoder

__distribution__ = "dinov2-3d"  # tells this package from Meta's `dinov2`, which has the same import name
__all__ = ["Encoder", "Features", "__distribution__", "__version__", "load_encoder"]

# OpenMP's threads sleep while they wait for each other instead of holding a core that another program could use. It is read
# once, when torch is loaded, so programs import this package before it (docs/decisions/006-busy-machine.md). A user's own wins.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_OF_ENCODER = ("Encoder", "Features", "load_encoder")


def __getattr__(name: str) -> Any:
    """The encoder's names, imported when they are first asked for: they bring torch along."""
    if name in _OF_ENCODER:
        from dinov2.features import encoder

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
