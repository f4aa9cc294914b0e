"""DINOv2's import paths of what lives elsewhere here: doors of a few lines each, no place for helpers."""
