"""What frozen features can do: the one extractor, and what is measured with it."""
