"""What the fuzzers share: a minute each, the same examples everywhere as far as it comes, and what a refusal looks like."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

from dinov2.errors import BadInput

SECONDS = float(os.environ.get("DINOV2_FUZZ_SECONDS", "60"))  # of each fuzzer
FIRST_SEED = int(os.environ.get("DINOV2_FUZZ_SEED", "0"))  # of its first round: another one looks at other examples
SETTINGS = settings(
    max_examples=50, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)  # of a round; the blob that a failure prints repeats it

numbers = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, 1e-320, 1e308])
plain = st.none() | st.booleans() | numbers | st.text(max_size=12)
documents = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)


def for_a_minute(claim: Callable[[], None], parts: int = 1) -> None:
    """A test of `@given` round after round, each with its own seed, until the time (or that of a part) is up."""
    end = time.monotonic() + SECONDS / parts
    for number in count(FIRST_SEED):
        if time.monotonic() > end:
            return
        seed(number)(claim)()


def works_or_is_refused(work: Callable[[], Any], kind: type[BadInput] = BadInput) -> Any:
    """What `work` returns, or the refusal where it is one: a line that can be printed; anything else is raised."""
    try:
        return work()
    except kind as err:
        assert str(err) and len(str(err).splitlines()) == 1, repr(str(err))
        str(err).encode()
        return err
