"""Features of scans from a frozen network: `load_encoder("weights")("scan.nii.gz")`.

Shapes: B scans, C channels, H W D voxels, h w d patches, p patch size, E embedding, n layers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dinov2.checkpointer.domain import DOMAIN, Domain, in_words
from dinov2.checkpointer.teacher import RANDOM, Teacher, open_teacher
from dinov2.data.datalist import Entry
from dinov2.data.preprocess import PREPROCESSING, normalise, percentiles_of, windowed
from dinov2.distributed.precision import DTYPES, fastest_dtype
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput, BadVolume
from dinov2.features.scans import AS_OURS, Scan, bare_volumes, load_scan
from dinov2.features.setup import build_model_for_eval, build_named, config_for
from dinov2.features.spacing import NATIVE, resample, resampled, spacing_of
from dinov2.features.views import View, grid_affine, look
from dinov2.models.backbone import Backbone, BackboneModule
from dinov2.models.vision_transformer import FACTORIES
from dinov2.models.weights import plain_names

logger = logging.getLogger(__name__)

DTYPE_NAMES = ("fp32", "bf16", "fp16")  # of an encoder; a float64 one would be read with float32 files
RANGE_TOLERANCE = 1e-3  # beyond [-1, 1], before bare values are taken for unprepared ones
_NO_LICENCE = "not said (the published 3DINO-ViT weights are CC BY-NC-ND 4.0); ask their owner before you use them"


class Features(NamedTuple):
    """What the network sees in scans, float32 on its device.

    Attributes:
        cls: [B, E] normed class token; of several windows or channels their mean.
        pooled: [B, E] mean of the last layer's normed patch tokens.
        patch: [B, h, w, d, n * E] normed patch tokens of the last n layers, the last layer's last.
        affine: Grid index (a patch's centre) -> mm, float64 on the CPU: [4, 4], of a list of scans [B, 4, 4]. Values that
            come without a place have their first patch at 0 and steps in voxels: the patch size on the diagonal.
    """

    cls: Tensor
    pooled: Tensor
    patch: Tensor
    affine: Tensor


class Encoder:
    """A frozen backbone with the preprocessing that its weights were trained with.

    Args:
        backbone: In evaluation mode, on its device.
        preprocessing: As weights keep it (`preprocess.PREPROCESSING`).
        dtype: Of matrix products.
        licence: Of the weights, as far as they say.
        config: What the backbone was built from.
        weights: A source that finds the weights later; None: not known.
        untrained: Seed of an untrained network; None: it is trained.
        domain: The scans that it was trained on; one unlike these is said, once for each way. None: not known.
        named: `module:function` that made the backbone; None: a network of this package.

    Raises:
        BadInput: A preprocessing that this version does not do.
    """

    def __init__(
        self,
        backbone: Backbone,
        preprocessing: Mapping[str, Any] = PREPROCESSING,
        dtype: torch.dtype = torch.float32,
        licence: str | None = None,
        config: DictConfig | None = None,
        weights: str | None = None,
        untrained: int | None = None,
        domain: Domain | None = None,
        named: str | None = None,
    ) -> None:
        self.backbone = backbone
        self.percentiles = percentiles_of(preprocessing)
        self.dtype = dtype
        self.licence = licence
        self.config = config
        self.weights = weights
        self.untrained = untrained
        self.domain = domain
        self.preparation = getattr(backbone, "preparation", AS_OURS)
        self.loader = partial(load_scan, percentiles=self.percentiles, preparation=self.preparation)  # as a process takes it
        self.named = named
        self._told: set[str] = set()  # in which ways a scan was said to be unlike those

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.backbone.embed_dim

    @property
    def patch_size(self) -> int:
        """Edge of a patch (voxels)."""
        return self.backbone.patch_size

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def fingerprint(self) -> str:
        """SHA-256 of all that features depend on: tensors by name, preprocessing, dtype; the same on any device."""
        digest = hashlib.sha256(repr((self.percentiles, str(self.dtype))).encode())
        if self.preparation != AS_OURS:
            digest.update(repr(tuple(self.preparation)).encode())
        for name, value in sorted(plain_names(self.backbone.state_dict()).items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __call__(
        self,
        inputs: Any,
        mode: str = "full_image",
        size: int | None = None,
        layers: int = 1,
        overlap: float = 0.5,
        batch_size: int = 8,
        raw: bool = False,
        spacing: Any = NATIVE,
    ) -> Features:
        """Features of one scan, a batch, or a list of scans.

        Files are prepared as for pretraining: intensities by percentiles, slice axis last, cropped to the foreground. Bare
        values are taken as they are, slice axis last and within [-1, 1], or with `raw` mapped there first. Each channel goes
        through the network alone, and the features of all channels are averaged.

        Args:
            inputs: A path; a datalist's `Entry`; a tensor or array [B, C, H, W, D], [C, H, W, D] or [H, W, D]; MONAI's
                item (`{"image": ...}`) or MetaTensor, whose affine is used; a list of these, in which a list of paths is one
                scan, a file for each channel.
            mode: How a scan is shown to the network: `full_image`, `resize` or `sliding_window`.
            size: Edge (voxels) of the resized scan or of a window; default: that of the pretraining crops.
            overlap: Share of a window that its neighbour covers too.
            layers: How many of the last layers give patch tokens, side by side.
            batch_size: Windows a pass.
            raw: Map the intensities of bare values, each scan's channels alone.
            spacing: `native`, or mm that scans are brought to before they are shown: one number, or three (the two axes of a
                slice, then across slices). Bare values need an affine for it (MetaTensor).

        Raises:
            BadInput: Nothing of the kind, a file that cannot be used (`BadVolume`), a list whose grids differ, or features that
                are not finite.
        """
        view = View(mode, size, overlap, layers, batch_size, spacing_of(spacing))
        if not isinstance(inputs, (list, tuple)):
            return self._one(inputs, view, raw)
        if not inputs:
            raise BadInput("no scan in the list: give at least one")
        parts = [self._one(item, view, raw) for item in inputs]
        grids = sorted({tuple(part.patch.shape[1:4]) for part in parts})
        if len(grids) > 1:
            raise BadInput(f"scans of different grids {grids[:3]} do not make one batch: use mode='resize', or one at a time")
        affine = torch.cat([p.affine.expand(len(p.cls), 4, 4) for p in parts])
        cls, pooled, patch = (torch.cat([part[i] for part in parts]) for i in range(3))
        return Features(cls, pooled, patch, affine)

    def encode_scan(self, scan: Scan, view: View) -> Features:
        """Features of a prepared scan, B = 1."""
        scan = resampled(scan, view.spacing_mm)
        affine = torch.from_numpy(scan.affine)
        self._say_what_is_outside(affine, view, scan.name, scan.modality, scan.organ)
        return self._features(scan.data[None], affine, view, scan.name)

    def _say_what_is_outside(
        self, affine: Tensor, view: View, name: str, modality: str | None = None, organ: str | None = None
    ) -> None:
        """Warn of a scan that is unlike those of the training in a way that was not said yet; `affine` [4, 4]."""
        if self.domain is None:
            return
        spacing = affine[:3, :3].double().norm(dim=0).tolist()
        steps = (sum(spacing[:2]) / 2, spacing[2])
        new = set(self.domain.outside(None if view.mode == "resize" else steps, modality, organ)) - self._told
        if not new:
            return
        self._told |= new
        middle = self.domain.middle_mm
        hint = f"; spacing={middle:.2g} (dinov2 embed --spacing {middle:.2g}) resamples" if "spacing" in new and middle else ""
        shown = in_words((steps[0],) * 2, (steps[1],) * 2, modality, organ)
        what = "%s: %s through an encoder of %s: another %s than it was trained on, so its features may mean less%s (said once)"
        logger.warning(what, name, shown, self.domain.words(), " and ".join(sorted(new)), hint)

    def load(self, files: Sequence[str | Path | Entry]) -> Scan:
        """A scan prepared as this network wants it; see `load_scan`."""
        return self.loader(files)

    def _one(self, item: Any, view: View, raw: bool) -> Features:
        if isinstance(item, Mapping):
            if "image" not in item:
                raise BadInput(f'an item with keys {", ".join(map(str, item))}: expected its scan as "image"')
            item = item["image"]
        if isinstance(item, (str, Path, Entry)):
            return self.encode_scan(self.load([item]), view)
        if isinstance(item, (list, tuple)) and item and all(isinstance(file, (str, Path, Entry)) for file in item):
            return self.encode_scan(self.load(item), view)
        if not isinstance(item, (Tensor, np.ndarray)):
            raise BadInput(
                f"a {type(item).__name__} is no scan: give a path, a tensor or array [B, C, H, W, D], or MONAI's item"
            )
        values, affine = bare_volumes(item)
        if raw:
            values = self._normalised(values)
        elif values.min() < -1 - RANGE_TOLERANCE or values.max() > 1 + RANGE_TOLERANCE:
            logger.warning(
                "values from %.4g to %.4g, where the network was trained on -1 to 1: raw=True maps them",
                values.min(), values.max(),
            )  # fmt: skip
        name = f"tensor {tuple(values.shape)}"
        if affine is not None and affine.ndim == 2:
            values, affine = _bare_resampled(values, affine.double(), view, name)
            self._say_what_is_outside(affine, view, name)
        elif view.spacing_mm is not None:
            raise BadInput(f"{name}: bare values have no spacing to start from: give a file, a MetaTensor, or spacing='native'")
        return self._features(values, affine, view, name)

    def _normalised(self, values: Tensor) -> Tensor:
        channels = values.flatten(0, 1).numpy().copy()
        window = self.preparation.window
        mapped = [
            normalise(c, f"channel {i}", self.percentiles) if window is None else windowed(c, f"channel {i}", window)
            for i, c in enumerate(channels)
        ]
        return torch.from_numpy(np.stack(mapped)).view(values.shape)

    def _features(self, volumes: Tensor, affine: Tensor | None, view: View, name: str) -> Features:
        """Of [B, C, H, W, D] in [-1, 1]; `affine` voxel -> mm, [4, 4] or [B, 4, 4]."""
        num, channels = volumes.shape[:2]
        tokens = look(self.backbone, volumes.flatten(0, 1)[:, None], view, self.dtype)
        cls, patch = (t.unflatten(0, (num, channels)).mean(1) for t in (tokens.cls, tokens.patch))
        if not (torch.isfinite(cls).all() and torch.isfinite(patch).all()):
            raise BadVolume(
                f"{name}: the network's features are not finite: use fp32 as dtype, or other weights if it was that already",
                "non_finite_features",
            )
        if affine is None:
            grid = torch.diag(torch.tensor([*tokens.step_vox, 1.0], dtype=torch.float64))
        else:
            grid = grid_affine(affine, tokens.step_vox)
        return Features(cls, patch[..., -self.embed_dim :].mean((1, 2, 3)), patch, grid)


def load_encoder(
    source: str | Path,
    device: str | torch.device = "auto",
    config: str | Path | DictConfig | None = None,
    dtype: str = "auto",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    encoder: str | None = None,
) -> Encoder:
    """A frozen encoder from weights; logs their licence.

    Args:
        source: A weights file (`.pth`, `.safetensors`); the folder of a training checkpoint or of a training run;
            `owner/name[@revision][:file]` on the Hugging Face hub; `demo`, the small encoder that comes with the package; or
            untrained, the name of a network (`vit_small_3d`, ...), or `random` with a configuration.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, ...
        config: Configuration (path, name or merged) of the network, for weights that do not tell.
        dtype: Of matrix products: `fp32`, `bf16`, `fp16`; `auto` is bf16 on CUDA (fp16 where it has none) and fp32 elsewhere.
        seed: Of an untrained network.
        cache_dir: Of downloads; None: huggingface-hub's own.
        encoder: `module:function` of another network that the weights are of (docs/encoders.md); its code is run.

    Raises:
        BadInput: No such weights, damaged ones, of another network (tensors named), or a device that is not there.
    """
    place = _device(device)
    if dtype != "auto" and dtype not in DTYPE_NAMES:
        raise BadInput(f"dtype {dtype!r}: choose auto, {', '.join(DTYPE_NAMES)}")
    chosen = fastest_dtype(place) if dtype == "auto" else DTYPES[dtype]
    teacher = open_teacher(source, cache_dir)
    if encoder is not None:
        with torch.random.fork_rng(devices=[]):
            other = build_named(encoder, teacher, Runtime(place), seed)
        return _of_others(other, encoder, teacher, chosen, seed)
    if config is None and teacher.source == RANDOM:
        raise BadInput(f"weights random: of which network? give a configuration, or one of {', '.join(FACTORIES)} as weights")
    cfg = config if isinstance(config, DictConfig) else config_for(teacher, config)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        backbone = build_model_for_eval(cfg, teacher, Runtime(place), seed)
    if teacher.is_untrained:
        logger.warning("%s: an untrained network of seed %d; its features mean little", source, seed)
    else:
        logger.warning("%s: licence of the weights: %s", source, teacher.licence or _NO_LICENCE)
    preprocessing = teacher.meta.get("preprocessing", PREPROCESSING)
    untrained = seed if teacher.is_untrained else None
    domain = Domain.of_meta(teacher.meta.get(DOMAIN), teacher.source)
    return Encoder(backbone, preprocessing, chosen, teacher.licence, cfg, teacher.reference, untrained, domain)


def _of_others(backbone: BackboneModule, named: str, teacher: Teacher, dtype: torch.dtype, seed: int) -> Encoder:
    """An encoder around somebody's network; its licence is said."""
    licence = None if teacher.is_untrained else teacher.licence or getattr(backbone, "licence", None)
    if teacher.is_untrained:
        logger.warning("%s: an untrained network of seed %d; its features mean little", named, seed)
    else:
        what = licence or "not said; ask their owner before you use them"
        logger.warning("%s: licence of the weights: %s", teacher.source, what)
    modality = getattr(backbone, "preparation", AS_OURS).modality
    domain = Domain(1, None, None, {modality: 1}, {}) if modality else None
    untrained = seed if teacher.is_untrained else None
    return Encoder(backbone, PREPROCESSING, dtype, licence, None, teacher.reference, untrained, domain, named)


def _bare_resampled(values: Tensor, affine: Tensor, view: View, name: str) -> tuple[Tensor, Tensor]:
    """[B, C, H, W, D] of one grid at the spacing of a view, and the affine there."""
    if view.spacing_mm is None:
        return values, affine
    mixed, place = resample(values.flatten(0, 1).numpy(), view.spacing_mm, affine.numpy(), name)
    return torch.from_numpy(np.ascontiguousarray(mixed)).unflatten(0, values.shape[:2]), torch.from_numpy(place)


def _device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as err:  # torch asserts that it was built with CUDA
        raise BadInput(f"device {device}: cannot be used here ({str(err).splitlines()[0][:80]}): use auto or cpu") from err
    return chosen
