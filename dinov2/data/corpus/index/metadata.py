"""What is known of a volume besides its voxels: modality, organ, data set, patient; from a pattern, a sidecar, DICOM or names.

What comes first wins: `--pattern`, sidecar, DICOM header, data set's description, then words of the file's and folders' names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import lru_cache
from typing import Any

from dinov2.data.corpus.index.walk import Unit
from dinov2.data.datalist import FOURTH_AXES
from dinov2.errors import BadInput, BadVolume
from dinov2.files import MOST_FACTS_BYTES, is_number, read_json

KEYS = ("dataset", "modality", "organ", "patient")

_MODALITIES = {
    "CT": ("ct", "cta", "cbct", "ncct"),
    "MR": (
        "mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2f", "flair", "dwi", "adc", "bold", "swi", "pd", "pdw",
        "mprage", "magnetic",
    ),
    "PET": ("pet", "fdg"),
    "US": ("ultrasound", "abus"),
}  # fmt: skip
_ORGANS = {
    "brain": ("brain", "hippocampus", "stroke", "brats", "tumour"),
    "head": ("head", "skull", "hnc"),
    "chest": ("chest", "lung", "lungs", "thorax"),
    "abdomen": ("abdomen", "abdominal", "liver", "pancreas", "spleen", "colon", "kidney", "kidneys"),
    "prostate": ("prostate",), "breast": ("breast",), "heart": ("heart", "cardiac", "atrium"), "knee": ("knee",),
    "spine": ("spine", "spinal"), "pelvis": ("pelvis", "pelvic"), "neck": ("neck",), "whole body": ("wholebody",),
}  # fmt: skip
_LABEL_WORDS = {"label", "labels", "seg", "segmentation", "segmentations", "mask", "masks", "brainmask", "multiclass", "aseg"}
_MODALITY_OF_WORD = {word: name for name, words in _MODALITIES.items() for word in words} | {"pt": "PET", "us": "US"}
_ORGAN_OF_WORD = {word: name for name, words in _ORGANS.items() for word in words}
_AMBIGUOUS_IN_NAMES = {"pt", "us", "pd"}  # "patient", a country; fine as a header's value
_SIDECAR_KEYS = {  # lower case, first wins
    "modality": ("modality",),
    "organ": ("organ", "bodypartexamined", "body_part"),
    "dataset": ("dataset",),
    "patient": ("patient", "patientid", "subject"),
}


def describe_place(unit: Unit, path: str, tags: dict[str, str], pattern: re.Pattern[str] | None) -> dict[str, str]:
    """What is known of `KEYS`, values as the list has them; ids not hashed yet.

    Args:
        unit: Where the volume is.
        path: The file that the list names.
        tags: From its DICOM header.
        pattern: From `compile_pattern`.

    Raises:
        BadVolume: Its sidecar is no JSON object.
    """
    relative = os.path.relpath(path, unit.root).replace(os.sep, "/")
    matched = pattern.match(relative) if pattern else None
    by_pattern = matched.groupdict() if matched else {}
    sidecar = {k.lower(): v for k, v in read_sidecar(unit).items()}
    by_sidecar = {key: next((sidecar[n] for n in names if sidecar.get(n)), None) for key, names in _SIDECAR_KEYS.items()}
    bids = re.search(r"(?:^|[/_])sub-([A-Za-z0-9]+)", relative)
    words = {"dataset": unit.dataset.name, "modality": unit.dataset.modality, "patient": f"sub-{bids[1]}" if bids else None}
    found = {}
    for key in KEYS:
        values = (by_pattern.get(key), by_sidecar.get(key), tags.get(key), words.get(key), word_of_names(unit, key))
        value = next((str(v) for v in values if v not in (None, "")), None)
        if value is not None:
            found[key] = value
    if "modality" in found:
        found["modality"] = normal_modality(found["modality"])
    if "organ" in found:
        found["organ"] = _ORGAN_OF_WORD.get(found["organ"].lower(), found["organ"].lower())
    return found


def normal_modality(text: str) -> str:
    """MR, CT, PET, US where a word of it says so; else as it is."""
    named = (_MODALITY_OF_WORD[w] for w in _words(text) if w in _MODALITY_OF_WORD)
    return next(named, text.upper())


def word_of_names(unit: Unit, key: str) -> str | None:
    """A modality or organ that a file's or folder's name has for a word, the nearest to the file first."""
    table = {"modality": _MODALITY_OF_WORD, "organ": _ORGAN_OF_WORD}.get(key)
    if table is None:
        return None
    for word in _name_words(unit):
        if word in table and word not in _AMBIGUOUS_IN_NAMES:
            return table[word]
    return None


def is_named_labels(unit: Unit) -> bool:
    """Whether a word of the names says that it is a label map."""
    return any(word in _LABEL_WORDS for word in _name_words(unit))


def _name_words(unit: Unit) -> list[str]:
    """Words of the names from the file up to the folder that was asked for."""
    relative = os.path.relpath(unit.path, unit.root).split(os.sep)
    return [word for name in (*reversed(relative), os.path.basename(unit.root)) for word in _words(name)]


@lru_cache(maxsize=1024)  # folders' names come again and again
def _words(text: str) -> tuple[str, ...]:
    parted = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    return tuple(re.findall(r"[a-z0-9]+", parted.lower()))


def read_sidecar(unit: Unit) -> dict[str, Any]:
    """The JSON file beside a volume; empty where there is none.

    Raises:
        BadVolume: It is no JSON object.
    """
    if unit.sidecar is None:
        return {}
    try:
        content = read_json(unit.sidecar, most_bytes=MOST_FACTS_BYTES)
    except BadInput as err:
        raise BadVolume(str(err), "sidecar") from err
    if not isinstance(content, dict):
        raise BadVolume(f"{unit.sidecar}: holds a {type(content).__name__}, expected an object", "sidecar")
    spacing, axes = content.get("spacing"), content.get("axes")
    is_spacing = isinstance(spacing, list) and len(spacing) == 3 and all(is_number(s) for s in spacing)
    if spacing is not None and not is_spacing:
        raise BadVolume(f"{unit.sidecar}: spacing must be three numbers (mm), got {json.dumps(spacing)[:80]}", "sidecar")
    if axes not in (None, *FOURTH_AXES):
        raise BadVolume(f"{unit.sidecar}: axes must be one of {', '.join(FOURTH_AXES)}, got {json.dumps(axes)[:80]}", "sidecar")
    return content


def compile_pattern(text: str) -> re.Pattern[str]:
    """`{dataset}/{patient}/*_{modality}.nii.gz` to an expression over the path below the folder that was asked for.

    `{name}` and `*` are any part of one name, `**` of several; what follows the pattern is free.

    Raises:
        BadInput: A name that is none of `KEYS`, or twice the same.
    """
    out = []
    for piece in re.split(r"(\{\w+\}|\*\*/?|\*)", text):
        if piece.startswith("{"):
            if piece[1:-1] not in KEYS:
                raise BadInput(f"--pattern {text}: {piece} is none of {', '.join('{' + k + '}' for k in KEYS)}")
            out.append(f"(?P<{piece[1:-1]}>[^/]+?)")
        else:
            out.append({"*": "[^/]*?", "**": ".*?", "**/": "(?:.*?/)?"}.get(piece, re.escape(piece)))
    try:
        return re.compile("".join(out) + "(?:/.*)?$")
    except re.error as err:
        raise BadInput(f"--pattern {text}: {err}: use each name once") from err


def hashed_id(patient: str, salt: str) -> str:
    """An id that stands for a patient: the same for the same id and salt, and not to be turned back without the salt."""
    return hashlib.blake2b(patient.encode("utf-8", "surrogatepass"), key=salt.encode()[:64], digest_size=8).hexdigest()
