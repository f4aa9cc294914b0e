"""Weights for people without this package: a folder for transformers, an ONNX file, a MONAI bundle (docs/sharing.md)."""
