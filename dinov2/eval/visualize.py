"""`dinov2 visualize`: what a frozen network makes of a scan, as pictures and as NIfTI on the scan's own grid.

    files -> scan and its stored voxels -> tokens or attention (features/) -> maps on the stored grid -> PNG, NIfTI, JSON, page

X Y Z voxels as stored, h w d patches, E embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch

from dinov2.checkpointer.teacher import open_teacher
from dinov2.data.datalist import Entry
from dinov2.data.volumes.formats import FORMAT_NAMES, is_scan_path, stem
from dinov2.data.volumes.opening import open_volume
from dinov2.errors import EXIT_OK, BadInput
from dinov2.features.attention import cell_at, scan_attention
from dinov2.features.dense import dense_features
from dinov2.features.encoder import Encoder, load_encoder
from dinov2.features.pca import PatchBasis, cosine_map, fit_basis
from dinov2.features.placing import at_most, brightness, on_stored_grid
from dinov2.features.scans import Scan
from dinov2.features.setup import config_for
from dinov2.features.views import View
from dinov2.files import replacing, user_path, write_json, write_text, writing
from dinov2.geometry import Size3, Spacing, triple
from dinov2.logging import Say
from dinov2.visual.features import Panel, draw_panels, grey_levels
from dinov2.visual.viewer import MOST_COLOURS, MOST_VOXELS, PageScan, most_cells, viewer_page

logger = logging.getLogger(__name__)

AUTO = "auto"
MOST_WHOLE = 4096  # patches that `auto` shows in one pass
_ONE_CELL = np.ones((1, 1, 1), np.float32)  # over the whole of a prepared scan
FOURTH_AXIS = {"time": "xyzt", "channels": "xyzc", "refuse": None}  # of `Request.axes`, by the flag's words


@dataclass(frozen=True)
class Request:
    """What to show and how.

    Attributes:
        scans: The files of each scan, one for each of its channels; the first is the one asked about.
        kind: `pca`, `attention` or `similarity`.
        output: Folder; of several scans each has one of its own in it.
        mode: How a scan is shown to the network: a mode of `View`, or `auto`: windows where the whole is many patches.
        size, overlap: As of `View`.
        step: Distance of tokens in voxels, for PCA and similarity; None: that of the patches.
        block: Whose attention or tokens, negative ones from the last; tokens are of the last blocks alone.
        at_mm: The place that asks; of attention None is the class token.
        smooth: Linear between patches, or each voxel its patch's value.
        axes: What a fourth axis is where no header says: `xyzt`, `xyzc` or None.
        viewer: Write `viewer.html` too.
    """

    scans: tuple[tuple[Path, ...], ...]
    kind: str
    output: Path
    mode: str = AUTO
    size: int | None = None
    overlap: float = 0.5
    step: int | None = None
    block: int = -1
    at_mm: Spacing | None = None
    smooth: bool = True
    axes: str | None = None
    viewer: bool = False


@dataclass(frozen=True)
class Shown:
    """A scan with its stored voxels.

    Attributes:
        name: For people, different for each.
        scan: As the network sees it.
        image: [X, Y, Z] float32 as stored, of its first channel.
        affine: [4, 4] of the file.
        view: How it is shown.
        folder: Where its files go.
    """

    name: str
    scan: Scan
    image: np.ndarray
    affine: np.ndarray
    view: View
    folder: Path

    def placed(self, values: np.ndarray, grid_affine: np.ndarray, smooth: bool) -> np.ndarray:
        """Values of patches [h, w, d(, K)] on the stored grid."""
        return on_stored_grid(values, grid_affine, self.scan, triple(self.image.shape), self.affine, smooth)

    @property
    def middle_mm(self) -> Spacing:
        """Of what the network sees."""
        centre = [(n - 1) / 2 for n in self.scan.voxels.shape[1:]]
        return triple((self.scan.affine @ [*centre, 1.0])[:3].tolist())


def open_encoder(
    weights: str,
    config_file: str | None,
    overrides: Sequence[str],
    device: str = "auto",
    dtype: str = "auto",
    encoder: str | None = None,
) -> Encoder:
    """The network of the command line; `overrides` are `key=value` of its configuration."""
    if not overrides:
        return load_encoder(weights, device, config_file, dtype, encoder=encoder)
    return load_encoder(weights, device, config_for(open_teacher(weights), config_file, overrides), dtype)


def visualize(request: Request, encoder: Encoder, say: Say) -> int:
    """Write the pictures and files of a request.

    Args:
        request: What to show.
        encoder: The network.
        say: Where results are announced.

    Raises:
        BadInput: Something cannot be used: one line.
    """
    check(request, encoder)
    shown = [open_shown(i, request, encoder) for i in range(len(request.scans))]
    with writing(request.output):
        for item in shown:
            item.folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"type": request.kind, "scans": [item.scan.name for item in shown]}
    needs_tokens = request.viewer or request.kind != "attention"
    tokens = [tokens_of(item, encoder, request.step) for item in shown] if needs_tokens else []
    draw = {"pca": show_pca, "attention": show_attention, "similarity": show_similarity}[request.kind]
    with writing(request.output):
        facts |= draw(request, encoder, shown, tokens, say)
        for item in shown:
            save_nifti(item.image, item, "orig")
        write_json(request.output / "visualize.json", facts)
        say(f"{request.output}: {request.kind}.png and NIfTI files on the scan's own grid")
        if request.viewer:
            write_page(request, encoder, shown, tokens, say)
    return EXIT_OK


def check(request: Request, encoder: Encoder) -> None:
    """Refuse, before anything is read, what cannot be.

    Raises:
        BadInput: A missing place, or an output that is no folder.
    """
    if request.kind == "similarity" and request.at_mm is None:
        raise BadInput("similarity to which place? give --at X Y Z, in mm of the scan's world (a viewer shows them)")
    if request.kind == "attention" and request.step is not None:
        raise BadInput("--step is for pca and similarity: attention is between whole patches")
    if request.output.exists() and not request.output.is_dir():
        raise BadInput(f"--output {request.output}: is a file: give a folder")
    for path in (p for files in request.scans for p in files):
        user_path(path)
        if not is_scan_path(path):
            what = "a folder without DICOM files" if path.is_dir() else f"no such {FORMAT_NAMES} file or DICOM folder"
            raise BadInput(f"{path}: {what}: give a scan")
    View("full_image", request.size, request.overlap).fitted(encoder.backbone)


def open_shown(place: int, request: Request, encoder: Encoder) -> Shown:
    """Read and prepare one scan of a request.

    Raises:
        BadInput: It cannot be used, or is smaller than a patch or one patch alone.
    """
    files = request.scans[place]
    entries = [Entry(user_path(path), (), axes=request.axes) for path in files]
    scan = encoder.load(entries)
    raw = open_volume(entries[0])
    image = raw.read()
    view = chosen_view(request, scan, encoder)
    p, shape = encoder.patch_size, scan.voxels.shape[1:]
    if view.mode != "resize":
        size = "x".join(map(str, shape))
        if min(shape) < p:
            raise BadInput(
                f"{scan.name}: {size} voxels (its foreground) are less than a patch of {p}: use --input-type resize, or a "
                "network of smaller patches"
            )
        if max(shape) <= p:
            raise BadInput(f"{scan.name}: {size} voxels are a single patch of {p}: use --input-type resize")
    elif view.fitted(encoder.backbone) == p:
        raise BadInput(f"--size {p}: a single patch: choose several times the patch size {p}")
    names = [stem(files[0]) for files in request.scans]
    name = names[place] if names.count(names[place]) == 1 else f"{names[place]}_{place + 1}"
    folder = request.output if len(names) == 1 else request.output / name
    return Shown(name, scan, np.asarray(image), raw.affine, view, folder)


def chosen_view(request: Request, scan: Scan, encoder: Encoder) -> View:
    """The view that is asked for; `auto` shows what is many patches by windows."""
    mode = request.mode
    if mode == AUTO:
        patches = int(np.prod([-(-n // encoder.patch_size) for n in scan.voxels.shape[1:]]))
        mode = "full_image" if patches <= MOST_WHOLE else "sliding_window"
        logger.info("%s: %d patches, shown to the network by %s", scan.name, patches, mode)
    return View(mode, request.size, request.overlap)


class Tokens(NamedTuple):
    """Last-layer patch tokens [h, w, d, E] of a scan, and their grid's affine (index -> mm)."""

    patch: np.ndarray
    affine: np.ndarray

    @property
    def grid(self) -> Size3:
        return triple(self.patch.shape[:3])


def tokens_of(item: Shown, encoder: Encoder, step: int | None) -> Tokens:
    """Tokens every `step` voxels, or of the patches alone."""
    found = dense_features(encoder, item.scan, item.view, encoder.patch_size if step is None else step)
    return Tokens(found.patch[0].cpu().numpy(), found.affine.numpy())


def joint_basis(shown: Sequence[Shown], tokens: Sequence[Tokens]) -> PatchBasis:
    """One for all scans."""
    bright = [brightness(item.scan, of.grid) for item, of in zip(shown, tokens, strict=True)]
    return fit_basis([of.patch for of in tokens], bright)


def show_pca(request: Request, encoder: Encoder, shown: Sequence[Shown], tokens: Sequence[Tokens], say: Say) -> dict[str, Any]:
    """Components 1 to 4 and their colours; one basis for all scans."""
    basis = joint_basis(shown, tokens)
    explained = ", ".join(f"{share:.0%}" for share in basis.explained)
    say(f"foreground: first component above {basis.threshold:.4g} (Otsu); variance of components 1 to 4: {explained}")
    for item, (patch, grid_affine) in zip(shown, tokens, strict=True):
        scores = item.placed(basis.scores(patch), grid_affine, request.smooth)  # [X, Y, Z, 4]
        rgb, foreground = colours_inside(basis, scores, item.placed(_ONE_CELL, item.scan.affine, smooth=False))
        if not foreground.any():
            raise BadInput(
                f"{item.scan.name}: nothing lies above the common threshold, its foreground is empty: show it without --joint"
            )
        for i in range(scores.shape[-1]):
            save_nifti(scores[..., i], item, f"nifti_{i}")
        save_nifti(foreground.astype(np.uint8), item, "nifti_mask")
        save_rgb(rgb, item, "nifti_rgb")
        at = request.at_mm or _centre_mm(foreground, item.affine)
        panels = [Panel("PCA of patch tokens", rgb)]
        draw_panels(grey_levels(item.image), panels, item.affine, at, item.folder / "pca.png")
    return {"threshold": basis.threshold, "explained": basis.explained.tolist(), "grids": [list(of.grid) for of in tokens]}


def colours_inside(basis: PatchBasis, scores: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours and foreground of scores [X, Y, Z, 4]; what the network did not see (0 of [X, Y, Z]) is white."""
    rgb, foreground = basis.colours(scores)
    return np.where(seen[..., None] > 0, rgb, np.float32(1)), foreground & (seen > 0)


def show_attention(
    request: Request, encoder: Encoder, shown: Sequence[Shown], tokens: Sequence[Tokens], say: Say
) -> dict[str, Any]:
    """Every head's attention and their mean."""
    facts = []
    depth = encoder.backbone.num_layers
    for item in shown:
        at = request.at_mm if item is shown[0] else None  # a place of the first scan means nothing in the others
        found = scan_attention(encoder, item.scan, item.view, request.block, at)
        maps = {str(i): head for i, head in enumerate(found.maps.numpy())} | {"mean": found.maps.mean(0).numpy()}
        asking = "class token" if at is None else "patch at (" + ", ".join(f"{v:g}" for v in at) + ") mm"
        panels = []
        for name, values in maps.items():
            placed = item.placed(values, found.affine.numpy(), request.smooth)
            save_nifti(placed, item, f"nifti_{name}")
            title = "mean of heads" if name == "mean" else f"head {name}"
            panels.append(Panel(title, placed, _limits(values)))
        panels[0] = replace(panels[0], title=f"{panels[0].title}, layer {request.block % depth}, {asking}")
        where = at or item.middle_mm
        draw_panels(grey_levels(item.image), panels, item.affine, where, item.folder / "attention.png", at is not None)
        to_patches = found.maps.sum((1, 2, 3))
        say(
            f"{item.name}: {asking} of layer {request.block % depth}, {len(to_patches)} heads; to patches "
            f"{to_patches.mean():.1%}, to class token and registers the rest"
        )
        facts.append({"scan": item.name, "to_patches": to_patches.tolist(), "to_prefix": found.prefix.tolist()})
    return {"layer": request.block % depth, "at_mm": request.at_mm, "attention": facts}


def _limits(values: np.ndarray, lowest: float = 0.5) -> tuple[float, float]:
    """What a heat map spans: from a quantile to the 99.8th percentile."""
    low, high = np.quantile(values, (lowest, 0.998))
    return float(low), float(high if high > low else low + max(abs(low), 1e-12))


def show_similarity(
    request: Request, encoder: Encoder, shown: Sequence[Shown], tokens: Sequence[Tokens], say: Say
) -> dict[str, Any]:
    """Cosine similarity of the patch at a place of the first scan to all patches of all scans."""
    if request.at_mm is None:
        raise BadInput("similarity to which place? give --at X Y Z")
    first = tokens[0]
    cell = cell_at(torch.from_numpy(first.affine), first.grid, request.at_mm, shown[0].scan)
    facts = []
    for item, (patch, affine) in zip(shown, tokens, strict=True):
        values = cosine_map(patch, first.patch[cell])
        placed = item.placed(values, affine, request.smooth)
        save_nifti(placed, item, "nifti_similarity")
        best = np.unravel_index(int(values.argmax()), values.shape)
        best_mm = triple((affine @ [*best, 1.0])[:3].tolist())
        where = request.at_mm if item is shown[0] else best_mm
        of = "" if item is shown[0] else f" in {shown[0].name}"
        title = "similarity to (" + ", ".join(f"{v:g}" for v in request.at_mm) + f") mm{of}"
        panels = [Panel(title, placed, _limits(values, 0.7))]
        draw_panels(grey_levels(item.image), panels, item.affine, where, item.folder / "similarity.png", marked=True)
        if item is not shown[0]:
            place = ", ".join(f"{v:.1f}" for v in best_mm)
            say(f"{item.name}: most similar at ({place}) mm, cosine {values.max():.3f}")
        facts.append({"scan": item.name, "best_mm": best_mm, "cosine": float(values.max())})
    return {"at_mm": request.at_mm, "cell": [int(c) for c in cell], "similarity": facts}


def write_page(request: Request, encoder: Encoder, shown: Sequence[Shown], tokens: Sequence[Tokens], say: Say) -> None:
    """`viewer.html` of the first two scans, with the class token's attention and similarity to what is clicked."""
    shown, tokens = shown[:2], tokens[:2]
    basis = joint_basis(shown, tokens)
    scans = [page_scan(request, encoder, basis, item, of) for item, of in zip(shown, tokens, strict=True)]
    licence = f"Licence of the weights: {encoder.licence or 'not said'}. "
    drawn = "Drawn by niivue (BSD-2-Clause); this page needs no network."
    path = request.output / "viewer.html"
    write_text(path, viewer_page("What the network sees: " + ", ".join(item.name for item in shown), scans, licence + drawn))
    say(f"{path}: open it in a browser ({path.stat().st_size / 2**20:.1f} MB)")


def page_scan(request: Request, encoder: Encoder, basis: PatchBasis, item: Shown, tokens: Tokens) -> PageScan:
    """One scan of the page, its parts made small enough for it."""
    step = 1 if request.step is None else encoder.patch_size // request.step
    patch = tokens.patch[::step, ::step, ::step]  # the patches side by side, of tokens that lie closer
    affine = tokens.affine @ np.diag([step, step, step, 1])
    found = scan_attention(encoder, item.scan, item.view, request.block)
    heads = found.maps.movedim(0, -1).numpy()  # [h, w, d, heads], on the same grid
    width = patch.shape[-1]
    most = most_cells(width)
    together, grid_affine = at_most(np.concatenate([patch, heads, heads.mean(-1, keepdims=True)], -1), affine, most)
    names = [*(f"head {i}" for i in range(heads.shape[-1])), "mean of heads"]
    grey = grey_levels(item.image)[..., None]
    image, image_affine = at_most(grey, item.affine, MOST_VOXELS)
    coarse, coarse_affine = at_most(grey, item.affine, MOST_COLOURS)
    place = partial(on_stored_grid, scan=item.scan, shape=triple(coarse.shape[:3]), affine=coarse_affine)
    scores = place(basis.scores(tokens.patch), tokens.affine)
    colours, foreground = colours_inside(basis, scores, place(_ONE_CELL, item.scan.affine, smooth=False))
    was, now = (" x ".join(map(str, grid.shape[:3])) for grid in (patch, together))
    note = f"{now} patches" + (f", averaged from {was} (at most {most:,} fit the page)." if was != now else ".")
    return PageScan(
        item.name, note, image[..., 0], image_affine, together[..., :width],
        {name: together[..., width + i] for i, name in enumerate(names)}, grid_affine, colours, foreground, coarse_affine,
        item.middle_mm,
    )  # fmt: skip


def _centre_mm(mask: np.ndarray, affine: np.ndarray) -> Spacing:
    """Centre of mass of a mask, in the world."""
    along = [mask.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    centre = [float((np.arange(len(n)) * n).sum() / n.sum()) for n in along]
    return triple((affine @ [*centre, 1.0])[:3].tolist())


def save_nifti(values: np.ndarray, item: Shown, name: str) -> None:
    """One map [X, Y, Z] with the scan's affine; floating ones in 16 bits with a scale."""
    image = nib.Nifti1Image(values, item.affine)
    if values.dtype != np.uint8:
        image.set_data_dtype(np.int16)
    _save(image, item.folder / f"{name}.nii.gz")


def save_rgb(rgb: np.ndarray, item: Shown, name: str) -> None:
    """Colours [X, Y, Z, 3] in [0, 1] as RGB24, which ITK-SNAP and 3D Slicer show as colours."""
    colours = np.rint(rgb * 255).astype(np.uint8)
    packed = np.ascontiguousarray(colours).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    _save(nib.Nifti1Image(packed, item.affine), item.folder / f"{name}.nii.gz")


def _save(image: nib.Nifti1Image, path: Path) -> None:
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        nib.save(image, temporary)
