"""Launchers for clusters: parse, submit, no logic of their own."""
