"""Recipes as YAML files; installed as `dinov2.recipes`."""
