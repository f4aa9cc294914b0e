"""Where log lines go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

Say = Callable[[str], None]  # takes a line of a command's output, as opposed to its log
FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


class _LogFile(logging.FileHandler):
    """A log file that never ends a run or prints a trace: on a full disk the terminal still has every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def setup_logging(output_dir: Path | None = None, rank: int = 0, level: int = logging.INFO) -> None:
    """Log to the terminal and, with an output folder, to `log.txt` in it; replaces what was set up before.

    Ranks other than 0 speak on the terminal alone, and only of what is wrong.
    """
    level = level if rank == 0 else max(level, logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if output_dir is not None and rank == 0:
        handlers.append(_LogFile(output_dir / "log.txt", encoding="utf-8", errors="backslashreplace"))
    logging.basicConfig(level=level, format=FORMAT, datefmt="%H:%M:%S", handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.getLogger("nibabel.global").setLevel(logging.ERROR)  # it corrects headers aloud; what matters is checked here
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # of pandas and blosc2: it says its number of threads
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # of matplotlib's PDFs: every table of every font
