"""Tuples of a known length."""

from __future__ import annotations

import pytest

from dinov2.geometry import pair, triple


def test_a_triple_and_a_pair_keep_their_values_and_refuse_another_number_of_them() -> None:
    assert triple(n * n for n in (1, 2, 3)) == (1, 4, 9) and pair([0.5, 1.0]) == (0.5, 1.0)
    for make, values in ((triple, [1, 2]), (triple, [1, 2, 3, 4]), (pair, [1]), (pair, [1, 2, 3])):
        with pytest.raises(ValueError, match="values to unpack"):
            make(values)
