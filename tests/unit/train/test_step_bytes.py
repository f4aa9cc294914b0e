"""What a compiled step moves and keeps, counted: a copy too many, or a tensor kept twice, is seen without a GPU."""

from __future__ import annotations

import pytest

from benchmarks.step_bytes import block_bytes, head_bytes


@pytest.mark.slow
def test_a_block_moves_and_keeps_what_it_should() -> None:
    """Goals 130 and 25. Without a budget 97.4 and 30.5; of what moves 6 are weights, 13 sums for biases."""
    found = block_bytes(budget=0.8)
    assert found.kept <= 23  # 22.5
    assert found.moved <= 106  # 104.4


@pytest.mark.slow
def test_targets_and_losses_pass_over_memory_few_times() -> None:
    assert head_bytes() <= 52
