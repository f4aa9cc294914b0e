"""The quick start: labelled volumes made from a real template, a small pretraining, and what its features can do."""
