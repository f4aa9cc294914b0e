"""Adapter, decoders and engine of the segmentation evaluation."""
