"""Weights and checkpoints on disk."""
