"""Features of scans: the import path of `dinov2.features.encoder` that users have."""

from dinov2.features.encoder import Encoder, Features, load_encoder

__all__ = ["Encoder", "Features", "load_encoder"]
