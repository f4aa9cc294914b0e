"""Packages that an installation may lack: which extra brings each, and one line where one is missing.

An import that may fail stands within `needed_for`. What the programs' modules import at their beginning (figures) needs no such
block: where a program ends (`dinov2/cli.py`, `dinov2/program.py`), `missing_line` makes the same line of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dinov2.errors import BadInput

DRAWING = ("matplotlib", "jinja2", "statannotations")  # pages of figures
EXTRAS = {  # by the name that Python imports: the extra of pyproject.toml
    "SimpleITK": "dicom",
    "pydicom": "dicom",
    "jinja2": "report",
    "matplotlib": "report",
    "pandas": "report",
    "seaborn": "report",
    "statannotations": "report",
    "nilearn": "demo",
    "submitit": "slurm",
    "onnx": "share",
    "onnxscript": "share",
    "xformers": "cuda",
}
_CORE = {"huggingface_hub": "huggingface-hub", "pyarrow": "pyarrow"}  # left out only by who installs with --no-deps


def install_words(package: str) -> str:
    """The command that brings a package, by the name that Python imports."""
    return f"pip install 'dinov2-3d[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {_CORE[package]}"


def missing_line(err: ImportError, what: str = "this") -> str | None:
    """One line about a package that is not there, or cannot be loaded; None where it is none of those that may be missing."""
    package = (err.name or "").partition(".")[0]
    if package not in {**EXTRAS, **_CORE}:
        return None
    is_absent = isinstance(err, ModuleNotFoundError) and err.name == package
    why = "which is not installed" if is_absent else f"which cannot be imported ({' '.join(str(err).split())[:120]})"
    return f"{what} needs {package}, {why}: {install_words(package)}"


@contextmanager
def needed_for(what: str, error: Callable[[str], BadInput] = BadInput) -> Iterator[None]:
    """Around imports that may fail.

    Args:
        what: The user's words of what they are for.
        error: Makes the exception of the line.

    Raises:
        BadInput: One is missing, or cannot be loaded.
    """
    try:
        yield
    except ImportError as err:
        line = missing_line(err, what)
        if line is None:
            raise
        raise error(line) from err


def require(what: str, *packages: str) -> None:
    """Refuse before the work what would be refused after it.

    Raises:
        BadInput: As `needed_for`.
    """
    with needed_for(what):
        for package in packages:
            importlib.import_module(package)


def left_out(what: str, package: str) -> str | None:
    """A line for the log where a package that a program can do without is missing; None where it is there."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{what} are left out: {package} is not installed ({install_words(package)})"
