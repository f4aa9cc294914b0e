"""The one door for weights: wherever they are, in whatever form; what they hold and what they say of themselves.

Reading order: `open_teacher` -> `_find` (which file or folder) -> `read_teacher` (its form).
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import struct
import warnings
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from dinov2.checkpointer.saving import CHECKSUMS
from dinov2.checkpointer.sealed import read_safetensors
from dinov2.configs.loader import read_saved_config
from dinov2.errors import BadInput
from dinov2.files import user_path
from dinov2.models.hub import WEIGHTS_SUFFIXES, fetch, is_repository
from dinov2.models.vision_transformer import FACTORIES
from dinov2.models.weights import StateDict, plain_names, refuse_2d, unwrapped

logger = logging.getLogger(__name__)

DEMO = Path(__file__).resolve().parents[1] / "weights" / "demo.safetensors"
DEMO_SHA256 = "de8e15c40c26072ccd0e5f8696c8115adba549b0f3ccdac302b97dd8f973826d"
RANDOM = "random"
TEACHER_FILE = "teacher_checkpoint.pth"
FOLDER_WEIGHTS = "model.safetensors"  # of a folder for transformers
_PREFIX = "model.teacher."
_RANK_FILE = re.compile(r"\.rank_\d+\.pth$")
_ESCAPES = re.compile("\x1b\\[[0-9;]*m")  # torch's bold type
_LFS_POINTER = b"version https://git-lfs"
# what torch raises for files of other kinds: its unpickler runs whatever the first bytes happen to say
_READ_ERRORS = (
    OSError, EOFError, UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError,
    struct.error, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """Weights that were found and opened.

    Attributes:
        source: As they were asked for; named in messages.
        path: The file or folder that was read; None for an untrained network.
        state: Tensors, names as saved; empty for an untrained network.
        meta: What the weights say of themselves, plain types.
        reference: A source that finds the same weights later, from any working folder.
        licence: Of the weights, as the hub or they themselves say.
    """

    source: str
    path: Path | None
    state: StateDict
    meta: dict[str, Any]
    reference: str
    licence: str | None = None

    @property
    def is_untrained(self) -> bool:
        return self.path is None

    @cached_property
    def weights(self) -> StateDict:
        """The tensors by plain names, blocks flat, without wrappers' prefixes.

        Raises:
            BadInput: Several networks, or a 2D one.
        """
        weights = unwrapped(plain_names(self.state), self.source)
        refuse_2d(weights, self.source)
        return weights

    def identity(self) -> str:
        """What tells these weights from others: SHA-256 of the file, or of a checkpoint's list of checksums.

        Of an untrained network it is the source.
        """
        if self.path is None:
            return self.source
        if self.path.is_file():
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256((self.path / CHECKSUMS).read_bytes()).hexdigest()


def open_teacher(source: str | Path, cache_dir: str | Path | None = None) -> Teacher:
    """Weights from anywhere.

    Args:
        source: A file (`teacher_checkpoint.pth`, bare or prefixed state dict, `.safetensors`); the folder of a training
            checkpoint, or of a training run, whose newest teacher or checkpoint is taken; `owner/name[@revision][:file]` on
            the Hugging Face hub; `demo`, the small encoder that comes with the package; `random` or the name of a network
            (`vit_small_3d`, ...), which is then untrained.
        cache_dir: Of downloads; None: huggingface-hub's own.

    Raises:
        BadInput: It is nowhere, or it is no weights.
    """
    name = str(source)
    if name == RANDOM or name in FACTORIES:
        return Teacher(name, None, {}, {}, name)
    path, licence, reference = _find(source, cache_dir)
    state, meta = read_teacher(path)
    return Teacher(name, path, state, meta, reference, licence or meta.get("licence"))


def names_weights(source: str | Path) -> bool:
    """Whether a word stands for weights rather than for a list of volumes."""
    path, name = Path(user_path(source)), str(source)
    if path.is_file() or path.suffix in WEIGHTS_SUFFIXES:
        return path.suffix in WEIGHTS_SUFFIXES
    return path.is_dir() or name == "demo" or is_repository(name)


def _find(source: str | Path, cache_dir: str | Path | None) -> tuple[Path, str | None, str]:
    """The file or folder, the licence that a hub names, and a name that holds from any folder.

    Raises:
        BadInput: It is nowhere.
    """
    name, path = str(source), Path(user_path(source))
    if name == "demo":
        if not DEMO.is_file():
            raise BadInput(
                "demo: this installation has no demo weights (dinov2/weights/demo.safetensors): install a release "
                "or checkout that has them, or give a path, a hub id or the name of a network"
            )
        if hashlib.sha256(DEMO.read_bytes()).hexdigest() != DEMO_SHA256:
            raise BadInput(f"demo: {DEMO} is damaged or another file: install the package again")
        return DEMO, None, name
    if path.is_dir():
        path = _in_folder(path)
    if path.exists():
        return path, None, str(path.absolute())
    if is_repository(name):
        found = fetch(name, cache_dir)
        return found.path, found.licence, name
    what = "no such file" if name.endswith(WEIGHTS_SUFFIXES) else "no such file, folder or network"
    raise BadInput(f"weights {source}: {what}: give a path, owner/name on the hub, demo, or one of {', '.join(FACTORIES)}")


def _in_folder(folder: Path) -> Path:
    """The checkpoint that a folder is, its shared weights, or the newest teacher or checkpoint of a run's output folder.

    Raises:
        BadInput: Neither.
    """
    if (folder / ".metadata").is_file():
        return folder
    for name in (TEACHER_FILE, FOLDER_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    checkpoints = [p.parent for p in folder.glob("checkpoints/*/.metadata") if p.parent.name.isdigit()]
    teachers = list(folder.glob(f"eval/training_*/{TEACHER_FILE}"))
    numbered = [(int(p.name), 0, p) for p in checkpoints]  # of the same iteration the teacher: it says more
    numbered += [(int(n), 1, p) for p in teachers if (n := p.parent.name.removeprefix("training_")).isdigit()]
    if not numbered:
        raise BadInput(
            f"weights {folder}: not a complete training checkpoint (no .metadata), and no run's output folder (no "
            f"eval/training_*/{TEACHER_FILE}, no checkpoints/*): give one of these, or a file"
        )
    newest = max(numbered)[2]
    logger.info("weights %s: %s", folder, newest)
    return newest


def open_trained(source: str | Path) -> Teacher:
    """As `open_teacher`, where an untrained network is of no use.

    Raises:
        BadInput: As `open_teacher`, or an untrained network.
    """
    teacher = open_teacher(source)
    if teacher.is_untrained:
        raise BadInput(f"weights {source}: an untrained network has none: give a file, a folder, demo or owner/name on the hub")
    return teacher


def read_weights(source: str | Path) -> StateDict:
    """The tensors of weights, without wrappers' prefixes, blocks named flat.

    Raises:
        BadInput: As `open_trained` and `Teacher.weights`.
    """
    return open_trained(source).weights


def read_meta(source: str | Path) -> dict[str, Any]:
    """What weights say of themselves; empty where they say nothing.

    Raises:
        BadInput: As `open_teacher`.
    """
    return open_teacher(source).meta


def read_teacher(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """(tensors by their saved names, meta) of a file, or of a training checkpoint's folder.

    Raises:
        BadInput: None of the forms.
    """
    if path.is_dir():
        return _from_folder(path), _config_of_run(path)
    if path.suffix == ".safetensors":
        refuse_pointer(path)
        return read_safetensors(path)
    content = open_weights(path)
    return state_of(content, path), _meta_of(content)


def open_weights(path: str | Path) -> Any:
    """What a file of `torch.save` holds, tensors and plain values only.

    Raises:
        BadInput: Missing, not such a file, one that holds more, or one rank's share of an FSDP1 run.
    """
    path = user_path(path)
    if _RANK_FILE.search(Path(path).name):
        raise BadInput(f"weights {path}: one rank's share of an FSDP1 run: use its {TEACHER_FILE}")
    refuse_pointer(path)
    try:
        refuse_damaged(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as err:
        raise BadInput(f"weights {path}: no such file") from err
    except _READ_ERRORS as err:
        if others := _other_objects(path):
            raise BadInput(
                f"weights {path}: beside tensors it holds {', '.join(others)}, and opening objects can run code: if you trust "
                "it, load it with weights_only=False and save its tensors alone: torch.save({'teacher': state_dict}, NEW)"
            ) from err
        reason = " ".join(_ESCAPES.sub("", str(err)).split())[:120]
        raise BadInput(f"weights {path}: not a checkpoint of tensors that is safe to open ({reason})") from err


def refuse_damaged(path: str | Path) -> None:
    """Hold a file of `torch.save` against the checksums that it carries, which torch does not look at.

    Raises:
        BadInput: One does not match.
    """
    if not zipfile.is_zipfile(path):  # torch's older form has none
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, zlib.error) as err:
        raise BadInput(f"weights {path}: damaged ({str(err)[:120]}): copy or write it again") from err
    if damaged is not None:
        raise BadInput(f"weights {path}: damaged, its part {damaged} does not match its checksum: copy or write it again")


def _other_objects(path: str | Path) -> list[str]:
    """Kinds of objects in a file of `torch.save` that are no tensors or plain values; nothing of it is run."""
    with suppress(*_READ_ERRORS):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return []


def refuse_pointer(path: str | Path) -> None:
    """Tell the few lines that Git LFS leaves in a clone from the weights they stand for.

    Raises:
        BadInput: They are such lines.
    """
    with suppress(OSError), Path(path).open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise BadInput(f"weights {path}: a Git LFS pointer, not the weights: run `git lfs pull` in its repository")


def state_of(content: Any, path: str | Path) -> StateDict:
    """The tensors of what a weights file holds, out of DINOv2's, MONAI's, Lightning's and nnU-Net's wrappers; names as saved.

    Raises:
        BadInput: No tensor in it.
    """
    for wrapper in ("teacher", "model", "state_dict", "network_weights"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise BadInput(f"weights {path}: holds no state dict: give a teacher checkpoint or the state dict of a backbone")
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def _meta_of(content: Any) -> dict[str, Any]:
    meta = content.get("meta", {}) if isinstance(content, dict) else {}
    return meta if isinstance(meta, dict) else {}


def _from_folder(path: Path) -> StateDict:
    import torch.distributed.checkpoint as dcp  # takes a second, and weights in a file do without

    from dinov2.checkpointer.checkpointer import DAMAGED, problems_of
    from dinov2.checkpointer.index import SafeReader, saved_tensors

    if not (path / ".metadata").is_file():
        raise BadInput(f"weights {path}: no .metadata, not a complete training checkpoint")
    try:
        if problems := problems_of(path):
            raise EOFError(problems[0])
        wanted = saved_tensors(SafeReader(path), path, _PREFIX)
        tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in wanted.items()}
        with warnings.catch_warnings():  # torch's remark that there is only one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            if "no_dist" in inspect.signature(dcp.load).parameters:
                dcp.load(tensors, storage_reader=SafeReader(path), no_dist=True)
            else:  # torch 2.6: only its older name reads in one process of several
                dcp.load_state_dict(tensors, SafeReader(path), no_dist=True)
    except DAMAGED as err:
        reason = " ".join(str(err).split())[:120]
        raise BadInput(f"weights {path}: damaged checkpoint ({reason}): use the one before, or a {TEACHER_FILE}") from err
    if not wanted:
        raise BadInput(f"weights {path}: holds no teacher")
    return {k.removeprefix(_PREFIX): v for k, v in tensors.items()}


def _config_of_run(checkpoint: Path) -> dict[str, Any]:
    """What a teacher's file would say of its network, from the output folder that a checkpoint lies in."""
    file = checkpoint.absolute().parent.parent / "config.yaml"
    return {"config": OmegaConf.to_container(read_saved_config(file))} if file.is_file() else {}
