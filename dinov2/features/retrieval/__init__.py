"""Retrieval from a table of `dinov2 embed`: the most similar scans, or the same place in other scans."""
