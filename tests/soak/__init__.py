"""Programs killed again and again while they work; `scripts/soak` starts it, docs/reliability.md has its figures."""
