"""Comparisons of methods: what a study declares, its runs, and what is said of them."""
