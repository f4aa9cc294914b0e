"""Weights of a Hugging Face repository: cached, resumed where a download broke off, checked, with their licence."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from dinov2.errors import BadInput
from dinov2.optional import needed_for

logger = logging.getLogger(__name__)

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")
_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")
_TIMEOUT_S = 15  # for the hub's first answer
_PREFERRED = ("model.safetensors", "teacher_checkpoint.pth")


class Fetched(NamedTuple):
    """A file of a repository on this machine, and the licence that the repository's card names."""

    path: Path
    licence: str | None


def is_repository(source: str) -> bool:
    """Whether it reads as `owner/name[@revision][:file]` rather than as a path."""
    named = _REPOSITORY.fullmatch(source)
    return named is not None and not named["repo"].endswith(WEIGHTS_SUFFIXES)


class _Named(NamedTuple):
    """The parts of `owner/name[@revision][:file]`."""

    repo: str
    revision: str | None
    file: str | None


def _parse(source: str) -> _Named:
    """Take a repository's name apart.

    Raises:
        BadInput: It does not read as one.
    """
    named = _REPOSITORY.fullmatch(source)
    if named is None:
        raise BadInput(f"{source}: not a repository of the Hugging Face hub: write owner/name[@revision][:file]")
    return _Named(named["repo"], named["revision"], named["file"])


def fetch(source: str, cache_dir: str | Path | None = None) -> Fetched:
    """The weights of `owner/name[@revision][:file]`; from the cache where the hub cannot be reached.

    A download that broke off is continued. A file's SHA-256 is held against the one that the hub gave for it.

    Args:
        source: The repository, a revision of it (branch, tag, commit), and which file where it has several.
        cache_dir: Of huggingface-hub; None: its default (`HF_HOME`).

    Raises:
        BadInput: No huggingface-hub, no such repository or file, several to choose from, damaged, or neither
            reachable nor cached.
    """
    with needed_for(f"{source}: the hub"):
        import huggingface_hub as hub
        from huggingface_hub.errors import HTTPError
    named = _parse(source)

    def download(name: str) -> Path:
        return Path(hub.hf_hub_download(repo_id=named.repo, revision=named.revision, filename=name, cache_dir=cache_dir))

    try:
        # asked first, because it is asked once: all else of the library repeats itself for minutes where nothing answers
        found = hub.HfApi().model_info(named.repo, revision=named.revision, timeout=_TIMEOUT_S)
        names = [file.rfilename for file in found.siblings or ()]
        path = download(named.file or _choose(names, source))
        card = download("README.md") if "README.md" in names else None
    except (OSError, HTTPError, ValueError) as err:
        if isinstance(err, BadInput):
            raise
        path, card = _cached(hub, named, source, cache_dir, err)
    _check(path, source)
    facts: dict[str, Any] = (hub.metadata_load(card) if card else None) or {}
    return Fetched(path, facts.get("license_name") or facts.get("license"))


def _cached(hub: Any, named: _Named, source: str, cache_dir: str | Path | None, cause: Exception) -> tuple[Path, Path | None]:
    """Weights and card that an earlier call left."""
    reason = " ".join(str(cause).split())[:100] or type(cause).__name__
    try:
        folder = Path(
            hub.snapshot_download(repo_id=named.repo, revision=named.revision, cache_dir=cache_dir, local_files_only=True)
        )
    except (OSError, ValueError) as err:
        raise BadInput(
            f"{source}: neither a file here nor to be had from the Hugging Face hub ({reason}): check the name and the "
            "connection, or download it elsewhere and give its path"
        ) from err
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    path = folder / (named.file or _choose(names, source))
    if not path.is_file():
        raise BadInput(
            f"{source}: {named.file} is not in the cache, and the Hugging Face hub gave nothing ({reason})"
        ) from cause
    logger.warning("%s: from the cache, the Hugging Face hub gave nothing (%s)", source, reason)
    card = folder / "README.md"
    return path, card if card.is_file() else None


def _choose(names: list[str], source: str) -> str:
    """The one file of weights.

    Raises:
        BadInput: None, or several and none of a preferred name.
    """
    weights = sorted(n for n in names if n.endswith(WEIGHTS_SUFFIXES))
    chosen = weights if len(weights) == 1 else [n for n in _PREFERRED if n in weights]
    if not chosen:
        found = (
            f"has {', '.join(weights[:6])}: choose one, as {source}:{weights[0]}" if weights else "has no .safetensors or .pth"
        )
        raise BadInput(f"{source}: the repository {found}")
    return chosen[0]


def _check(path: Path, source: str) -> None:
    """Hold a file of the cache against its hash: the hub names what is stored as a large file by its SHA-256.

    Raises:
        BadInput: It is damaged.
    """
    stored = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", stored.name):
        return
    with stored.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != stored.name:
        raise BadInput(f"{source}: {stored} is damaged (another SHA-256 than the hub's): delete it and start again")
