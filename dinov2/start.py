"""What a program does before it imports torch: it starts and ends in half of the time.

Importing torch makes a million objects that stay. Python's collector of reference cycles would go through them again and again
while they come in, and once more, at length, when the program ends: with the usual thresholds that is four of nine seconds.
"""

from __future__ import annotations

import atexit
import gc

THRESHOLDS = (100_000, 10, 10)  # new objects before a collection, of which every tenth, and hundredth, looks at older ones too


def start_program() -> None:
    """To be called by a program alone, never by what others import: it is a setting of the whole process."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)  # what is left at the end goes with the process
