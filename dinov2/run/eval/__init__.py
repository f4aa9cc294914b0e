"""Launchers of trainings."""
