"""Downstream cases: image and label on the recipe's grid, from the files or the cache; a prediction back on the file's grid.

C channels, H W D as prepared, X Y Z as stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.data.cache.folder import VolumeCache, key_of
from dinov2.data.datalist import Entry
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import IGNORED, Recipe, scheme_hint
from dinov2.data.preprocess import INT16_SCALE, Volume, foreground_box, settle
from dinov2.data.volumes.formats import NIFTI, PAIR, format_by_name
from dinov2.data.volumes.grids import GridMap
from dinov2.data.volumes.nifti import result_header
from dinov2.data.volumes.opening import RawVolume, as_whole, check_same_grid, open_volume
from dinov2.errors import BadInput
from dinov2.geometry import Spacing, triple

PREPARATION = 3  # raised with every change of what is made from the same files and recipe; part of the cache's keys


@dataclass(frozen=True)
class Case:
    """A prepared case.

    Attributes:
        item: What it was made from.
        image: [C, H, W, D] float32 in [-1, 1]; values that 16 bits hold, with and without a cache.
        label: [1, H, W, D] int16 of the recipe's values; None without one.
        grid: The way to the file's grid and back; without a meaning where a classification's image was resized.
    """

    item: Item
    image: Tensor
    label: Tensor | None
    grid: GridMap

    @property
    def name(self) -> str:
        return self.item.case

    @property
    def truth(self) -> Tensor:
        """`label` where one is needed.

        Raises:
            BadInput: There is none.
        """
        if self.label is None:
            raise BadInput(f"{self.name}: has no label map: list one for it, or leave the case out")
        return self.label

    @property
    def spacing_mm(self) -> Spacing:
        """Along H, W, D."""
        return self.grid.spacing_mm

    @property
    def affine(self) -> np.ndarray:
        """[4, 4] prepared voxel -> mm (RAS+)."""
        return self.grid.affine


def prepare_case(item: Item, recipe: Recipe, resize_scale: float = 1.0) -> Case:
    """Load, turn, resample and normalise a case as its recipe says.

    Images are resampled linearly, labels to the nearest voxel; intensities are mapped after that.

    Args:
        item: The case; without a label of its own the result has none.
        recipe: The dataset's.
        resize_scale: Divides the spacing; 2 gives twice the voxels along each axis.

    Raises:
        BadInput: A file is damaged or does not fit the others, a label value is not the recipe's, an image is constant.
    """
    opened = _open(item, recipe)
    grid = _grid(opened[0], recipe, resize_scale)
    channels = opened[: recipe.channels]
    image = torch.from_numpy(_whole_image(np.stack([_prepare_channel(raw, grid, recipe) for raw in channels]), recipe))
    label = None
    if len(opened) > recipe.channels:
        label = torch.from_numpy(grid.prepare(_read_label(opened[-1], recipe), linear=False))[None]
    return Case(item, _from_16_bits(_to_16_bits(image)), label, grid)


def check_headers(items: Sequence[Item], recipe: Recipe) -> None:
    """Hold every case's files against each other, by their headers alone: shape, place and spacing.

    Raises:
        BadInput: The first case that does not fit.
    """
    for item in items:
        _open(item, recipe)


def prepared_grids(items: Sequence[Item], recipe: Recipe, resize_scale: float = 1.0) -> list[GridMap]:
    """Shape and spacing that cases will have, by their headers alone.

    Raises:
        BadInput: As `check_headers`.
    """
    return [_grid(_open(item, recipe)[0], recipe, resize_scale) for item in items]


def _open(item: Item, recipe: Recipe) -> list[RawVolume]:
    """An opened file for each channel, then the label map where there is one, all on one grid."""
    if len(item.images) not in (1, recipe.channels):
        raise BadInput(f"{item.case}: {len(item.images)} images, {recipe.name} has {recipe.channels} channels")
    in_one = len(item.images) < recipe.channels
    names = [path for path in item.images for _ in range(recipe.channels if in_one else 1)]
    channels = [_open_one(path, c if in_one else 0) for c, path in enumerate(names)]
    for raw in channels:
        found, wanted = _num_channels(raw), recipe.channels if in_one else 1
        if found != wanted:
            raise BadInput(
                f"{item.case}: {raw.path} holds {found} channels where {recipe.name} has {wanted}: list image1, image2, ..."
            )
    labels = [_open_one(item.label, 0)] if isinstance(item.label, str) else []
    for raw in (*channels[1:], *labels):
        check_same_grid(channels[0], raw, f"{item.case}: {raw.path} and {channels[0].path}")
    return [*channels, *labels]


def _open_one(path: str, channel: int) -> RawVolume:
    raw = open_volume(Entry(path, (), axes="xyzc", channel=channel))
    _affine(raw)
    return raw


def _affine(raw: RawVolume) -> np.ndarray:
    """[4, 4] voxel -> mm of an opened file.

    Raises:
        BadInput: It has none that can be used.
    """
    if raw.image.affine is None:
        raise BadInput(f"{raw.path}: its format does not say where its voxels lie (no affine): save it in another")
    return raw.affine


def _num_channels(raw: RawVolume) -> int:
    return int(np.prod(raw.image.shape[3:], dtype=int))


def _grid(raw: RawVolume, recipe: Recipe, resize_scale: float) -> GridMap:
    own = GridMap(triple(raw.image.shape[:3]), _affine(raw), recipe.space.orientation, None)
    wanted = recipe.space.spacing_mm or (own.spacing_mm if resize_scale != 1 else None)
    return dataclasses.replace(own, wanted_spacing_mm=None if wanted is None else triple(s / resize_scale for s in wanted))


def _prepare_channel(raw: RawVolume, grid: GridMap, recipe: Recipe) -> np.ndarray:
    """[H, W, D] float32 in [-1, 1]."""
    voxels = raw.read()
    voxels, padding = settle(voxels, raw.path, raw.padding(voxels))  # before values are mixed with their neighbours
    voxels = grid.prepare(voxels, linear=True)
    measured = voxels if padding is None else voxels[~grid.prepare(padding, linear=False)]
    low, high = recipe.intensity.limits(measured)
    if not high > low:
        raise BadInput(f"{raw.path}: constant between the recipe's percentiles (value {low:g}): leave the case out of the list")
    return np.clip((voxels - np.float32(low)) * np.float32(2 / (high - low)) - 1, -1, 1)


def _whole_image(image: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Of a classification [C, H, W, D]: its foreground, resized as the recipe says; of a segmentation as it is."""
    if recipe.task == "segmentation":
        return image
    if recipe.train.foreground_crop:
        image = image[:, *foreground_box(image.max(0))]
    if recipe.resize:
        image = interpolate(torch.from_numpy(image)[None], tuple(recipe.resize), mode="trilinear")[0].numpy()
    return np.ascontiguousarray(image)


def _read_label(raw: RawVolume, recipe: Recipe) -> np.ndarray:
    """[X, Y, Z] int16, values mapped.

    Raises:
        BadInput: Values that the recipe does not know, by name.
    """
    stored = raw.read()
    values = np.unique(stored)
    whole = as_whole(values, raw.image.step)  # what storing alone has moved off whole numbers
    known = {v: v for v in recipe.values} | (recipe.label_map or {}) | dict.fromkeys(recipe.ignore, IGNORED)
    unknown = [float(v) for v in whole if v not in known]
    if unknown:
        shown = ", ".join(f"{v:.9g}" for v in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        what = f"label values {shown} are not among {recipe.name}'s {', '.join(map(str, known))}"
        remedy = scheme_hint(recipe, whole.tolist()) or "correct the recipe (classes, regions, label_map) or the file"
        raise BadInput(f"{raw.path}: {what}: {remedy}")
    meaning = np.array([known[v] for v in whole.tolist()], dtype=np.int16)
    return meaning[np.searchsorted(values, stored)]


def _to_16_bits(image: Tensor) -> Tensor:
    return torch.round(image / INT16_SCALE).to(torch.int16)


def _from_16_bits(image: Tensor) -> Tensor:
    return image.float() * INT16_SCALE


def restore_prediction(prediction: Tensor, case: Case) -> nib.Nifti1Image:
    """A label map in the grid, orientation and header of the case's (first) image.

    Args:
        prediction: [1, H, W, D] or [H, W, D], whole numbers from 0 to 32,767, on the case's grid.
        case: The case.

    Returns:
        [X, Y, Z] uint8, or int16 where the values need it. A NIfTI file's own header (both affines and their codes, units) is
        kept, and set right where it contradicts itself or is not in mm; of other formats the affine.

    Raises:
        ValueError: Another shape than the case's.
    """
    label = prediction.reshape(prediction.shape[-3:]).cpu().numpy()
    if label.shape != case.grid.shape:
        raise ValueError(f"{case.name}: prediction {label.shape}, expected the case's {case.grid.shape}")
    stored = case.grid.restore(label).astype(np.uint8 if label.max(initial=0) < 256 else np.int16)
    path = Path(case.item.images[0])
    is_nifti = format_by_name(path) in (NIFTI, PAIR) and not path.is_dir()
    header = result_header(str(path), case.grid.stored_affine) if is_nifti else None
    if header is None:
        return nib.Nifti1Image(stored, case.grid.stored_affine)
    header.set_data_dtype(stored.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the image's window means nothing here
    return nib.Nifti1Image(stored, case.grid.stored_affine, header)  # the same affine: both forms of the header stay


class Cases:
    """Prepared cases of a list, kept in a cache folder (`docs/architecture.md`, "Cache folder").

    Args:
        items: The cases.
        recipe: The dataset's.
        resize_scale: Divides the spacing.
        cache_dir: The folder, which may be pretraining's; None prepares a case every time it is asked for.
        cache_max_gb: The folder stops growing at this size (GiB).

    Raises:
        BadInput: The folder cannot be used.
    """

    def __init__(
        self,
        items: Sequence[Item],
        recipe: Recipe,
        resize_scale: float = 1.0,
        cache_dir: str | Path | None = None,
        cache_max_gb: float | None = None,
    ) -> None:
        self.items = list(items)
        self.recipe = recipe
        self.resize_scale = resize_scale
        self.cache = VolumeCache(cache_dir, cache_max_gb) if cache_dir else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Case:
        """The case, from the cache or its files.

        Raises:
            BadInput: As `prepare_case`.
        """
        item = self.items[index]
        if self.cache is None:
            return prepare_case(item, self.recipe, self.resize_scale)
        key = self._key(item, self.cache)
        cached = self.cache.open(key, item.case)
        if cached is not None:
            return _decode(item, cached.volume().voxels[0], cached.header["source"])
        case = prepare_case(item, self.recipe, self.resize_scale)
        self.cache.write(key, *_encode(case))
        return case

    def _key(self, item: Item, cache: VolumeCache) -> str | None:
        """Names what is cached by all that it is made from; None where a file cannot be read."""
        files = [*item.images, *([item.label] if isinstance(item.label, str) else [])]
        sources = [cache.fingerprint(path) for path in files]
        if None in sources:
            return None
        recipe = dataclasses.asdict(self.recipe)
        decisive = {
            k: recipe[k] for k in ("task", "channels", "classes", "regions", "label_map", "space", "intensity", "resize")
        }
        if self.recipe.ignore:  # without it the names are those of before there was the key
            decisive["ignore"] = recipe["ignore"]
        if self.recipe.task != "segmentation":
            decisive["foreground_crop"] = self.recipe.train.foreground_crop
        return key_of([PREPARATION, item.case, sources, decisive, self.resize_scale])


def _encode(case: Case) -> tuple[Volume, dict[str, Any]]:
    """Channels and label one after the other along the first axis of one cached volume, and what describes them."""
    planes = [_to_16_bits(case.image), *([] if case.label is None else [case.label])]
    voxels = torch.cat(planes).flatten(0, 1)[None]  # [1, (C + 1) * H, W, D]
    source = {
        "image": case.item.images[0],
        "channels": len(case.image),
        "labelled": case.label is not None,
        "stored_shape": list(map(int, case.grid.stored_shape)),
        "stored_affine": case.grid.stored_affine.tolist(),
        "orientation": case.grid.orientation,
        "wanted_spacing_mm": case.grid.wanted_spacing_mm,
    }
    return Volume(voxels.numpy(), case.spacing_mm, 2, triple(slice(0, n) for n in voxels.shape[1:])), source


def _decode(item: Item, voxels: Tensor, source: dict[str, Any]) -> Case:
    """The reverse of `_encode`; voxels [(C + 1) * H, W, D]."""
    wanted = source["wanted_spacing_mm"]
    affine = np.array(source["stored_affine"])
    grid = GridMap(triple(source["stored_shape"]), affine, source["orientation"], wanted and triple(wanted))
    planes = voxels.unflatten(0, (source["channels"] + source["labelled"], -1))  # [C + 1, H, W, D]
    label = planes[source["channels"] :].clone() if source["labelled"] else None
    return Case(item, _from_16_bits(planes[: source["channels"]]), label, grid)
