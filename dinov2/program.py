"""How a program ends: its own exit code, or one line about what went wrong."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence

from dinov2.distributed.runtime import stop_runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_LOST_RANK, BadInput, LostRank
from dinov2.files import words
from dinov2.logging import setup_logging

logger = logging.getLogger(__name__)


def run_program(
    run: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> int:
    """Parse and run, and turn a user's mistake into one line and exit code 2."""
    setup_logging()
    try:
        code = run(parser.parse_intermixed_args(words(argv)))
        stop_runtime()  # only where nothing went wrong: it waits for the others
        return code
    except LostRank as err:
        logger.error("%s", err)
        return EXIT_LOST_RANK
    except BadInput as err:
        logger.error("%s", err)
    except OSError as err:  # a full disk, a folder that went away, a read-only file system
        where, why = err.filename or "a file of the run", err.strerror or err
        logger.error("%s: %s: make room or choose another --output-dir; the last complete checkpoint is intact", where, why)
    return EXIT_BAD_INPUT
