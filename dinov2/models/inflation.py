"""A 2D ViT's tensors (DINOv2's published layout) as the start of a 3D network: what is not about depth is taken as it is.

A volume that does not change along depth gives at first the patch tokens, before positions, that the 2D network gives of its
slice, shown to it as it wants images: grey in three channels, [-1, 1] brought to [0, 1], normed by ImageNet's colours.

- Patch embedding: the channels' sum (colours folded in); another patch size by the pseudo-inverse of the resize (FlexiViT,
  Beyer et al. 2023); along depth the kernel spread over all slices (mean: I3D, Carreira and Zisserman 2017) or in the central
  one (ViViT, Arnab et al. 2021).
- Positions: bicubic in-plane, anti-aliased; along depth repeated, as a 2D network knows nothing of it; none where rotary.

# E embedding, p edge of a patch, h w d grid
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.errors import BadInput
from dinov2.geometry import Size3
from dinov2.models.foreign import VIT_2D, tensor_of_family
from dinov2.models.slices import COLOUR_MEAN, COLOUR_STD
from dinov2.models.vision_transformer import DinoVisionTransformer3d
from dinov2.models.weights import StateDict, plain_names, unwrapped

logger = logging.getLogger(__name__)

_HEAD_DIM = 64  # channels a head of every DINOv2
_WEIGHT, _BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


def inflated(state: StateDict, backbone: DinoVisionTransformer3d, how: str, source: str | Path) -> StateDict:
    """Tensors by the names and shapes of a 3D backbone, for `load_backbone`, which holds them to it strictly.

    Args:
        state: Of a 2D ViT, as saved, with whatever prefix and heads; a mask token need not be there.
        backbone: What they are to start; nothing in it is changed.
        how: `central` or `mean`, along depth.
        source: Named in messages.

    Raises:
        BadInput: Weights of another family or of 3D, or of a network of other sizes.
    """
    try:
        tensor_of_family(state, VIT_2D)
    except BadInput as err:
        raise BadInput(f"weights {source}: {err}: student.pretrained_weights_inflation={how} is for 2D weights alone") from err
    plain = _bare(state, source)
    own = plain_names(backbone.state_dict())
    _refuse_other_sizes(plain, own, source)
    if backbone.embed_dim // backbone.num_heads != _HEAD_DIM:
        logger.warning("%s: DINOv2's heads have %d channels, this network's %d: its attention will be another",
                       source, _HEAD_DIM, backbone.embed_dim // backbone.num_heads)  # fmt: skip
    plain.setdefault("mask_token", own["mask_token"])
    plain[_WEIGHT], plain[_BIAS] = patch_embedding(plain[_WEIGHT], plain[_BIAS], backbone.patch_size, how)
    positions = plain.pop("pos_embed")
    if backbone.pos_embed is None:
        plain["cls_token"] = plain["cls_token"] + positions[:, :1]  # the class token's own is no matter of place
    else:
        plain["pos_embed"] = position_grid(positions, backbone.grid_hwd)
    logger.info("%s: a 2D network, inflated along depth (%s)", source, how)
    return plain


def patch_embedding(weight: Tensor, bias: Tensor, patch_size: int, how: str) -> tuple[Tensor, Tensor]:
    """[E, 3, q, q] and [E] on ImageNet's colours -> [E, 1, p, p, p] and [E] on grey values in [-1, 1]."""
    resize = _inverse_resize(weight.shape[-1], patch_size)
    kernel = resize @ weight.double() @ resize.T  # [E, 3, p, p]
    mean, std = (torch.tensor(c, dtype=torch.float64).view(3, 1, 1) for c in (COLOUR_MEAN, COLOUR_STD))
    grey = (kernel / (2 * std)).sum(1, keepdim=True)  # of x, where an image has ((x + 1) / 2 - mean) / std
    offset = (kernel * (0.5 - mean) / std).sum((1, 2, 3))
    if how == "mean":
        cubes = (grey / patch_size)[..., None].repeat(1, 1, 1, 1, patch_size)
    else:
        cubes = torch.zeros(*grey.shape, patch_size, dtype=grey.dtype)
        cubes[..., patch_size // 2] = grey
    return cubes.to(torch.float32), (bias.double() + offset).to(torch.float32)


def position_grid(positions: Tensor, grid_hwd: Size3) -> Tensor:
    """[1, 1 + n * n, E] -> [1, 1 + h * w * d, E]; every depth has the same ones."""
    edge = round((positions.shape[1] - 1) ** 0.5)
    h, w, d = grid_hwd
    plane = positions[:, 1:].float().unflatten(1, (edge, edge)).permute(0, 3, 1, 2)  # [1, E, n, n]
    if (h, w) != (edge, edge):
        plane = F.interpolate(plane, (h, w), mode="bicubic", antialias=True)
    grid = plane.permute(0, 2, 3, 1)[:, :, :, None].expand(-1, -1, -1, d, -1)  # [1, h, w, d, E]
    return torch.cat([positions[:, :1].float(), grid.flatten(1, 3)], 1)


def _inverse_resize(old: int, new: int) -> Tensor:
    """[new, old] that kernels are multiplied by along an axis: on enlarged patches they then answer as before.

    With B the resize of patches, (B^T)^+ k has the least squared difference to k over patches, and none where B enlarges.
    """
    if old == new:
        return torch.eye(new, dtype=torch.float64)
    image = torch.eye(old, dtype=torch.float64)[None, None]  # its columns are resized
    resize = F.interpolate(image, (new, old), mode="bilinear", antialias=True)[0, 0]  # [new, old]
    return torch.linalg.pinv(resize.T)


def student_keys(state: StateDict, source: str | Path) -> dict[str, int | str]:
    """What keys of `student` a 2D ViT's tensors ask for; heads are not told by tensors."""
    return _sizes(_bare(state, source))


def _bare(state: StateDict, source: str | Path) -> StateDict:
    """The backbone's tensors by plain names."""
    plain = {k.removeprefix("backbone."): v for k, v in unwrapped(plain_names(state), source).items()}
    return {k: v for k, v in plain.items() if not k.split(".")[0].endswith("head")}


def _sizes(plain: StateDict) -> dict[str, int | str]:
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", k) for k in plain) if m]
    return {
        "embed_dim": plain["cls_token"].shape[-1],
        "depth": 1 + max(blocks, default=-1),
        "num_register_tokens": plain["register_tokens"].shape[1] if "register_tokens" in plain else 0,
        "ffn_layer": "swiglu" if "blocks.0.mlp.w12.weight" in plain else "mlp",
        "layerscale": "1e-5" if "blocks.0.ls1.gamma" in plain else "null",
    }


def _refuse_other_sizes(plain: StateDict, own: StateDict, source: str | Path) -> None:
    """Raise `BadInput` where tensors are missing that are reshaped here, or sizes are not the network's; each by its key."""
    absent = [k for k in ("cls_token", "pos_embed", _WEIGHT, _BIAS) if k not in plain]
    if absent:
        raise BadInput(f"weights {source}: a 2D network without {', '.join(absent)}: give one of DINOv2's layout, whole")
    found, wanted = _sizes(plain), _sizes(own)
    other = [f"student.{k} {found[k]} for {wanted[k]}" for k in found if found[k] != wanted[k]]
    if other:
        raise BadInput(f"weights {source}: a 2D network other than this one: {', '.join(other)}: set these keys as it has them")
    channels, *patch = plain[_WEIGHT].shape[1:]
    positions, edge = plain["pos_embed"], round((plain["pos_embed"].shape[1] - 1) ** 0.5)
    if channels != 3 or patch[0] != patch[1] or 1 + edge**2 != positions.shape[1]:
        raise BadInput(
            f"weights {source}: patches of {tuple(patch)} pixels of {channels} channels and {positions.shape[1]} positions: "
            "square ones of 3 channels are wanted, and positions of a class token and a square grid"
        )
