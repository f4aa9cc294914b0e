"""Whether weights may be passed on in another form."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from dinov2.errors import BadInput

logger = logging.getLogger(__name__)

# names by which licences allow that changed copies are passed on, for all uses or for some (NC)
_ALLOWING = re.compile(
    r"apache[- ]?2(\.0)?|mit|bsd([- ][234][- ]clause)?|isc|unlicense|cc0([- ]1\.0)?|cc[- ]by([- ]nc)?([- ]sa)?([- ][234]\.\d)?"
    r"|[al]?gpl([- ]?v?[23](\.\d)?)?(-only|-or-later|\+)?|mpl[- ]?2(\.0)?|(bigscience-)?(open|bigscience-)rail(-m|\+\+)?"
)


def licence_to_share(said: str | None, given: str | None, source: str | Path) -> str:
    """The licence under which weights are written for others.

    Args:
        said: By the weights, or by the hub that they come from.
        given: `--licence`, as their owner decides.
        source: Of the weights; named in messages.

    Raises:
        BadInput: None is given, and what the weights say does not allow it or is nothing that this program knows.
    """
    if given:
        if said and said.strip().lower() != given.strip().lower():
            logger.warning("weights %s: say of their licence %r, and are written under %r as you ask", source, said, given)
        return given
    if said and _ALLOWING.fullmatch(said.strip().lower()):
        return said
    what = (
        f"their licence is {said!r}, which is not known to allow passing them on changed"
        if said
        else "do not say their licence"
    )
    raise BadInput(f"weights {source}: {what}: where you may pass them on, name the licence with --licence NAME")
