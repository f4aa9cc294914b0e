"""How a program ends: its own exit code, or one line about what went wrong."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence

from dinov2.distributed.runtime import stop_runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_LOST_RANK, BadInput, LostRank, is_out_of_memory
from dinov2.files import words
from dinov2.logging import setup_logging
from dinov2.optional import missing_line

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
    except ImportError as err:
        line = missing_line(err, parser.prog)
        if line is None:
            raise
        logger.error("%s", line)
    except (OSError, MemoryError, RuntimeError) as err:
        if not (isinstance(err, OSError) or is_out_of_memory(err)):
            raise
        logger.error("%s", _line(err))
    return EXIT_BAD_INPUT


def _line(err: OSError | MemoryError | RuntimeError) -> str:
    """What the system refused: memory, or a full disk, a folder that went away, a read-only file system."""
    if is_out_of_memory(err) or not isinstance(err, OSError):
        what = " ".join(str(err).split())[:120] or type(err).__name__
        return (
            f"no memory is left on this machine, or of what this process may use ({what}): end other programs, use fewer "
            "loader processes or a smaller batch; the last complete checkpoint is intact"
        )
    where, why = err.filename or "a file of the run", err.strerror or err
    return f"{where}: {why}: make room or choose another --output-dir; the last complete checkpoint is intact"
