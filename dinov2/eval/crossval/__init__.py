"""Repeated nested cross-validation on a table of features: `dinov2 probe`."""
