"""Labelled data sets: recipes, lists, splits, prepared cases and their crops."""
