"""Crops: what is drawn (plan), and two ways to apply it."""
