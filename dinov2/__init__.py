"""Self-supervised pretraining of 3D vision transformers on medical volumes: DINOv2's shape, our own text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dinov2.version import __version__

if TYPE_CHECKING:
    from dinov2.encoder import Encoder, Features, load_encoder

__distribution__ = "dinov2-3d"  # tells this package from Meta's `dinov2`, which has the same import name
__all__ = ["Encoder", "Features", "__distribution__", "__version__", "load_encoder"]

_OF_ENCODER = ("Encoder", "Features", "load_encoder")


def __getattr__(name: str) -> Any:
    """The encoder's names, imported when they are first asked for: they bring torch along."""
    if name in _OF_ENCODER:
        from dinov2 import encoder

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
