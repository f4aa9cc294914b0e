"""Launchers of evaluations."""
