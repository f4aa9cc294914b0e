"""`training_metrics.json` (one JSON object a line) and TensorBoard, continued on resume as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from dinov2.errors import BadInput
from dinov2.files import from_json, is_number, to_json, write_text

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "training_metrics.json"


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
        start_iteration: First iteration that will be written.
        is_writing: False on ranks that leave it to the main one.
    """

    def __init__(self, output_dir: Path, start_iteration: int, is_writing: bool = True) -> None:
        self._out: tuple[TextIO, SummaryWriter] | None = None
        if not is_writing:
            return
        path = output_dir / METRICS_FILE
        kept = [row for row in read_metrics(path) if row["iteration"] < start_iteration]
        write_text(path, "".join(to_json(row) + "\n" for row in kept))
        from torch.utils.tensorboard import SummaryWriter  # here: it takes two seconds, and a command needs none

        file = path.open("a", buffering=1)  # a line at a time
        self._out = file, SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_iteration)

    def write(self, metrics: dict[str, float]) -> None:
        """One line; `iteration` is the step on TensorBoard's axis."""
        if self._out is None:
            return
        file, board = self._out
        file.write(to_json(metrics) + "\n")
        for name, value in metrics.items():
            if name != "iteration":
                board.add_scalar(f"train/{name}", value, int(metrics["iteration"]))

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
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self._out is not None:
            file, board = self._out
            file.close()
            board.close()
