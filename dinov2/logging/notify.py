"""`train.notify`: a command of the user's that is told when a run ends, stops, fails or warns. The run never waits for it."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from pathlib import Path
from threading import Thread

logger = logging.getLogger(__name__)

TIME_S = 60.0  # that a command may take
AT_THE_END_S = 10.0  # that a run which has ended waits for the last ones


class Notifier:
    """Starts the command, a thread for each call, and says once where it fails.

    Args:
        words: Of the command; `{event}`, `{output_dir}` and `{message}` in them are filled in. Empty: nobody is told.
        output_dir: The run's folder.
        time_s: After which a command that has not ended is killed.
    """

    def __init__(self, words: list[str], output_dir: Path, time_s: float = TIME_S) -> None:
        self._words, self._output_dir, self._time_s = words, str(output_dir.absolute()), time_s
        self._threads: list[Thread] = []
        self._has_failed = False

    def tell(self, event: str, message: str) -> None:
        """Start the command and come back at once; it finds event, folder and message in its environment too."""
        if not self._words:
            return
        values = {"event": event, "output_dir": self._output_dir, "message": message}
        words = [_filled(word, values) for word in self._words]
        environment = os.environ | {f"DINOV2_{name.upper()}": value for name, value in values.items()}
        thread = Thread(target=self._run, args=(words, environment), daemon=True, name="notify")
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def close(self, patience_s: float = AT_THE_END_S) -> None:
        """Let the last commands end, for a while; one that has not is left to itself."""
        until = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            self._say(f"has not ended {patience_s:.0f} s after the run and is left to itself")

    def _run(self, words: list[str], environment: dict[str, str]) -> None:
        try:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            done = subprocess.run(words, env=environment, timeout=self._time_s, start_new_session=True, check=False, **quiet)  # type: ignore[call-overload]  # keywords by name
        except subprocess.TimeoutExpired:
            self._say(f"took more than {self._time_s:.0f} s and was killed")
        except (OSError, ValueError) as err:  # not there, not executable; a zero in a word
            self._say(f"cannot be started: {getattr(err, 'strerror', None) or err}")
        else:
            if done.returncode:
                last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
                self._say(f"ended with {done.returncode}" + (f": {last[0][:200]}" if last else ""))

    def _say(self, what: str) -> None:
        if not self._has_failed:  # once: a run of days would fill its log
            self._has_failed = True
            logger.warning("train.notify (%s) %s; the run goes on, and this is said once", self._words[0], what)


def _filled(word: str, values: dict[str, str]) -> str:
    """Names in braces replaced; other braces, as of JSON, are left."""
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word
