"""`training_metrics.json` (one JSON object a line) and TensorBoard, continued on resume as if nothing had happened.

`evaluation_metrics.json` beside it is the same for what is measured less often, while training goes on.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from dinov2.errors import BadInput
from dinov2.files import from_json, is_number, to_json, write_text

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "training_metrics.json"
EVALUATION_FILE = "evaluation_metrics.json"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The objects of a metrics file; a last line cut short by a kill is left out.

    Raises:
        BadInput: A whole line is none.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        try:
            row = from_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and is_number(row.get("iteration")):
            rows.append(row)
        elif line.endswith(b"\n"):
            what = "is damaged, no object with an iteration: remove the line, or move the file away"
            raise BadInput(f"{path}, line {number}: {what}")
    return rows


class MetricWriter:
    """Appends metrics from an iteration on; what an earlier, killed run wrote beyond it is cut first.

    Args:
        output_dir: Folder of the run.
        start_iteration: First iteration that will be written; 0 begins anew.
        is_writing: False on ranks that leave it to the main one.
    """

    def __init__(self, output_dir: Path, start_iteration: int, is_writing: bool = True) -> None:
        self._out: tuple[TextIO, SummaryWriter] | None = None
        self._evaluations: TextIO | None = None
        self._evaluation_path = output_dir / EVALUATION_FILE
        if not is_writing:
            return
        path = output_dir / METRICS_FILE
        for file_path in (path, *([self._evaluation_path] if self._evaluation_path.exists() else [])):
            kept = [row for row in read_metrics(file_path) if row["iteration"] < start_iteration] if start_iteration else []
            write_text(file_path, "".join(to_json(row) + "\n" for row in kept))
        from torch.utils.tensorboard import SummaryWriter  # here: it takes two seconds, and a command needs none

        file = path.open("a", buffering=1)  # a line at a time
        # one for both files: a second one would purge what the first has written
        self._out = file, SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_iteration)

    def write(self, metrics: dict[str, float]) -> None:
        """One line; `iteration` is the step on TensorBoard's axis."""
        if self._out is not None:
            self._append(self._out[0], "train", metrics)

    def write_evaluation(self, metrics: dict[str, float]) -> None:
        """One line of `evaluation_metrics.json`, which is there from the first one on."""
        if self._out is None:
            return
        if self._evaluations is None:
            self._evaluations = self._evaluation_path.open("a", buffering=1)
        self._append(self._evaluations, "eval", metrics)

    def _append(self, file: TextIO, group: str, metrics: dict[str, float]) -> None:
        assert self._out is not None
        file.write(to_json(metrics) + "\n")
        for name, value in metrics.items():
            if name != "iteration":
                self._out[1].add_scalar(f"{group}/{name}", value, int(metrics["iteration"]))

    def write_pictures(self, pictures: dict[str, np.ndarray], iteration: int) -> None:
        """Show arrays [H, W, 3] in [0, 1] on TensorBoard, by name."""
        if self._out is not None:
            for name, picture in pictures.items():
                self._out[1].add_image(f"pictures/{name}", picture, iteration, dataformats="HWC")

    def write_image(self, name: str, path: Path, iteration: int) -> None:
        """Show a PNG file on TensorBoard."""
        if self._out is not None:
            from matplotlib.image import imread

            self._out[1].add_image(name, imread(path)[..., :3], iteration, dataformats="HWC")

    def __enter__(self) -> MetricWriter:
        self._thread_hook = threading.excepthook
        threading.excepthook = self._thread_ended
        return self

    def _thread_ended(self, args: threading.ExceptHookArgs) -> None:
        """Keep TensorBoard's thread, which a full disk ends, from printing a trace: its error is raised at the next value."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self._thread_hook(args)

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._close()
        finally:
            threading.excepthook = self._thread_hook

    def _close(self) -> None:
        if self._out is not None:
            file, board = self._out
            file.close()
            board.close()
        if self._evaluations is not None:
            self._evaluations.close()
