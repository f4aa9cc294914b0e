"""One HTML file of scans and what a network makes of them: planes and 3D, colours, attention, similarity to what is clicked.

It opens from the disk without a network: niivue (`assets/`, BSD-2-Clause) draws, features lie in it as 8-bit integers.
h w d patches, E embedding.
"""

from __future__ import annotations

import base64
import gzip
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dinov2.files import to_json
from dinov2.geometry import Spacing

ASSETS = Path(__file__).parent / "assets"
MOST_CELLS = 4096  # patches of a scan
MOST_BYTES = 4 * 2**20  # of its features: all those patches up to ViT-L's width
MOST_VOXELS = 2_500_000  # of an image, 8 bits each
MOST_COLOURS = 400_000  # voxels of a colour map, 32 bits each
QUANTISED = 127


@dataclass(frozen=True)
class PageScan:
    """A scan of the page.

    Attributes:
        name: Plain text.
        note: Plain text below it: what was averaged to fit.
        image: [X, Y, Z] in [0, 1], and its affine (voxel -> mm).
        image_affine: [4, 4].
        tokens: [h, w, d, E], at most `most_cells(E)`.
        attention: [h, w, d] by the name of the head.
        grid_affine: [4, 4] of the patches.
        colours: [x, y, z, 3] in [0, 1], white where background.
        foreground: [x, y, z] bool: where colours are shown.
        colours_affine: [4, 4].
        middle_mm: Where the planes meet at first.
    """

    name: str
    note: str
    image: np.ndarray
    image_affine: np.ndarray
    tokens: np.ndarray
    attention: Mapping[str, np.ndarray]
    grid_affine: np.ndarray
    colours: np.ndarray
    foreground: np.ndarray
    colours_affine: np.ndarray
    middle_mm: Spacing


def most_cells(width: int) -> int:
    """How many patches of E = `width` a scan may have in the page, which stays below 25 MB with two of them."""
    return min(MOST_CELLS, MOST_BYTES // width)


def viewer_page(title: str, scans: Sequence[PageScan], notes: str) -> str:
    """The page.

    Args:
        title: Plain text.
        scans: One or two; their tokens are of one network.
        notes: Plain text at its foot.
    """
    data = {
        "width": scans[0].tokens.shape[-1],
        "heads": list(scans[0].attention),
        "scans": [_packed(scan) for scan in scans],
    }
    parts = {
        "__TITLE__": html.escape(title),
        "__NOTES__": html.escape(notes),
        "__DATA__": to_json(data).replace("<", "\\u003c"),  # a name cannot end the script
        "__LICENCE__": _asset("NIIVUE_LICENSE"),
        "__PROGRAM__": _asset("viewer.js"),
        "__NIIVUE__": _asset("niivue.umd.js"),
    }
    page = _asset("viewer.html")
    for place, content in parts.items():
        page = page.replace(place, content)
    return page


def quantised(tokens: np.ndarray) -> np.ndarray:
    """Tokens [..., E] as int8: each so scaled that its largest entry is 127, which cosines do not see."""
    largest = np.abs(tokens).max(-1, keepdims=True)
    return np.rint(tokens * (QUANTISED / np.maximum(largest, 1e-12))).astype(np.int8)


def _packed(scan: PageScan) -> dict[str, Any]:
    """What the page's program reads of a scan; cells with h running fastest, as in NIfTI."""
    rgba = np.concatenate([scan.colours, scan.foreground[..., None]], -1)
    packed = np.ascontiguousarray(np.rint(rgba * 255).astype(np.uint8)).view([(c, "u1") for c in "RGBA"])[..., 0]
    return {
        "name": scan.name,
        "note": scan.note,
        "grid": list(scan.tokens.shape[:3]),
        "affine": scan.grid_affine.tolist(),
        "to_grid": np.linalg.inv(scan.grid_affine).tolist(),
        "middle": list(scan.middle_mm),
        "tokens": _base64(quantised(scan.tokens).transpose(2, 1, 0, 3).tobytes()),
        "attention": [_scaled(head) for head in scan.attention.values()],
        "image": _nifti(np.rint(scan.image * 255).astype(np.uint8), scan.image_affine),
        "map": _nifti(np.zeros(scan.tokens.shape[:3], np.float32), scan.grid_affine),
        "colours": _nifti(packed, scan.colours_affine),
    }


def _scaled(values: np.ndarray) -> dict[str, Any]:
    """A map of values from 0 as bytes and what they are times."""
    scale = max(float(values.max()), 1e-12) / 255
    return {"scale": scale, "values": _base64(np.rint(values / scale).astype(np.uint8).transpose(2, 1, 0).tobytes())}


def _nifti(values: np.ndarray, affine: np.ndarray) -> str:
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    return _base64(gzip.compress(image.to_bytes(), 6, mtime=0))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
