"""The error for a configuration that cannot be used, and the hint it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from dinov2.errors import BadInput


class ConfigError(BadInput):
    """A configuration that cannot be used; the message is one line naming key, value, file and remedy."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest allowed word, or nothing where none is close."""
    allowed = list(allowed)
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    if not close:  # a right leaf under a wrong section
        leaf = word.rsplit(".", 1)[-1]
        close = [a for a in allowed if a.rsplit(".", 1)[-1] == leaf][:1]
    return f" (did you mean {close[0]!r}?)" if close else ""
