"""Public encoders of others as `Backbone`s, by `module:function`; their weights are the user's to give, none is here.

Networks are MONAI's classes, or this package's layers put together by published facts; tensors go in by name. docs/encoders.md
says what is known of each, its licence, and which encoders cannot be had so.

# B batch, H W D voxels, h w d cells, E embedding
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import BadInput
from dinov2.models.backbone import Preparation
from dinov2.models.residual_encoder import ResidualEncoder
from dinov2.models.slices import SliceViT, dinov3_tensors
from dinov2.models.spectre import SpectreViT
from dinov2.models.swin import SwinEncoder3d, load_swin, swin_width
from dinov2.models.weights import StateDict, plain_names

logger = logging.getLogger(__name__)

MODULE = __name__
SEGRES, SWIN, DINO_V3 = "a SegResNet (CT-FM)", "a 3D Swin transformer (VoCo, MONAI's model_swinvit.pt)", "DINOv3"
SPECTRE, VIT_2D = "SPECTRE's local ViT", "a 2D ViT in Meta's layout (DINOv2)"
RES_ENC = "an nnU-Net network (ResEnc of nnssl)"
_EMBEDDING = "patch_embed.proj.weight"
_DINO_V2_LICENCE = "DINOv2's weights: Apache-2.0 (Meta)"
_DINO_V3_LICENCE = "DINOv3's weights: DINOv3 License (Meta): read its terms, also for what you make with them"
_FAMILIES = (  # what a tensor's name and number of axes tell; the first that fits
    (r"(^|\.)conv_init\.weight$", 5, SEGRES),
    (r"(^|\.)layers1\.0\.blocks\.0\.attn\.qkv\.weight$", 2, SWIN),
    (r"(^|\.)(rope_embed\.periods|storage_tokens|embeddings\.patch_embeddings\.weight)$", 0, DINO_V3),
    (r"(^|\.)blocks\.0\.attn\.kv\.weight$", 2, SPECTRE),
    (r"(^|\.)patch_embed\.proj\.weight$", 4, VIT_2D),
    (r"(^|\.)patch_embed\.proj\.weight$", 5, "a 3D ViT (this package, 3DINO)"),
    (r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$", 0, "a ViT in the layout of transformers"),
    (r"(^|\.)stem\.convs\.0\.conv\.weight$", 5, RES_ENC),
    (r"(^|\.)eva\.blocks\.", 0, "a Primus (nnssl)"),
)


def ct_fm(state: StateDict) -> SegResFeatures:
    """CT-FM's feature extractor (or the encoder of its SegResNet): MONAI's SegResEncoder.

    Raises:
        BadInput: Weights of another family.
    """
    first = tensor_of_family(state, SEGRES)
    encoder = SegResFeatures(32 if first is None else len(state[first]))
    if first is not None:
        prefix = first.removesuffix("conv_init.weight")
        taken = {
            k.removeprefix(prefix): v for k, v in state.items() if k.startswith((prefix + "conv_init.", prefix + "layers."))
        }
        _fill(encoder.net, taken, len(state))
    return encoder


def voco(state: StateDict) -> SwinEncoder3d:
    """The encoder of VoCo's SwinUNETR (B, L and H, with the convolutions of its second version where they are there).

    Raises:
        BadInput: Weights of another family, or a part of them.
    """
    first = tensor_of_family(state, SWIN)
    is_v2 = first is None or any(".layers1c." in f".{k}" for k in state)
    width = 48 if first is None else swin_width(state, "of VoCo")
    encoder = SwinEncoder3d(width, unit_range=True, v2=is_v2)
    if first is not None:
        load_swin(encoder, state, "of VoCo", "give the whole file, such as VoComni_B.pt")
        logger.info("%s", encoder.used)
    encoder.preparation = Preparation((-175.0, 250.0), "RAS", "CT")
    encoder.licence = "VoCo's weights: ask their authors (github.com/Luffy03/Large-Scale-Medical)"
    return encoder


def dinov2_slices(state: StateDict) -> SliceViT:
    """DINOv2's 2D ViTs (S, B, L, g; with registers or not), slice by slice.

    Raises:
        BadInput: Weights of another family.
    """
    first = tensor_of_family(state, VIT_2D)
    if first is None:
        return _licensed(SliceViT(384, 12, 16, 0, is_gated=False), _DINO_V2_LICENCE)
    plain = plain_names(_without(state, first.removesuffix(_EMBEDDING)))
    plain = {k: v for k, v in plain.items() if not k.split(".")[0].endswith("head") and k != "mask_token"}
    registers = plain["register_tokens"].shape[1] if "register_tokens" in plain else 0
    if "pos_embed" not in plain or plain[_EMBEDDING].shape[1:] != (3, 14, 14):
        raise BadInput(f"a 2D ViT on patches of {tuple(plain[_EMBEDDING].shape[1:])}: give one of DINOv2's, with patches of 14")
    edge = round((plain["pos_embed"].shape[1] - 1) ** 0.5)
    is_gated = "blocks.0.mlp.w12.weight" in plain
    encoder = SliceViT(len(plain[_EMBEDDING]), _num_blocks(plain), edge, registers, is_gated)
    _fill(encoder, plain, len(state))
    return _licensed(encoder, _DINO_V2_LICENCE)


def dinov3_slices(state: StateDict) -> SliceViT:
    """DINOv3's 2D ViTs (all sizes; Meta's layout or that of transformers), slice by slice.

    Raises:
        BadInput: Weights of another family, or a part of them.
    """
    first = tensor_of_family(state, DINO_V3)
    if first is None:
        return _licensed(SliceViT(384, 12, 0, 4, is_gated=False, patch=16, eps=1e-5), _DINO_V3_LICENCE)
    prefix = re.sub(r"(rope_embed\.periods|storage_tokens|embeddings\.patch_embeddings\.weight)$", "", first)
    plain = dinov3_tensors(plain_names(_without(state, prefix)))
    is_gated = "blocks.0.mlp.w12.weight" in plain
    out = plain.get("blocks.0.mlp.w3.weight" if is_gated else "blocks.0.mlp.fc2.weight")
    if _EMBEDDING not in plain or out is None:
        raise BadInput(f"of DINOv3, and without {_EMBEDDING} or the blocks' MLP: give the published file whole")
    width, hidden = len(plain[_EMBEDDING]), out.shape[1]
    ratio = (hidden + 0.5) / width * (1.5 if is_gated else 1.0)
    registers = plain["register_tokens"].shape[1] if "register_tokens" in plain else 0
    sizes: dict[str, Any] = {"patch": plain[_EMBEDDING].shape[-1], "head_dim": 4 * len(plain["periods"])}
    encoder = SliceViT(width, _num_blocks(plain), 0, registers, is_gated, mlp_ratio=ratio, eps=1e-5, **sizes)
    _fill(encoder, plain, len(state))
    return _licensed(encoder, _DINO_V3_LICENCE)


def spectre(state: StateDict) -> SpectreViT:
    """SPECTRE's local ViT (with or without its vision-language training).

    Raises:
        BadInput: Weights of another family, or a part of them.
    """
    first = tensor_of_family(state, SPECTRE)
    if first is None:
        return SpectreViT()
    plain = _without(state, first.removesuffix("blocks.0.attn.kv.weight"))
    plain = {k.replace("rope.periods", "periods"): v for k, v in plain.items() if not k.startswith("head.")}
    for name in [k for k in plain if ".attn.kv." in k]:
        query = plain.pop(name.replace(".kv.", ".q."), None)
        if query is not None:
            plain[name.replace(".kv.", ".qkv.")] = torch.cat([query, plain.pop(name)])
    if _EMBEDDING not in plain or "periods" not in plain:
        raise BadInput(f"of SPECTRE, and without {_EMBEDDING} or rope.periods: give the local ViT's file whole")
    encoder = SpectreViT(len(plain[_EMBEDDING]), _num_blocks(plain), 6 * len(plain["periods"]))
    _fill(encoder, plain, len(state))
    return encoder


def res_enc(state: StateDict) -> ResEncFeatures:
    """The encoder of nnssl's ResEnc-L (or of an nnU-Net's of this kind whose stages halve every axis).

    Raises:
        BadInput: Weights of another family, or of another encoder.
    """
    first = tensor_of_family(state, RES_ENC)
    if first is None:
        return ResEncFeatures(ResidualEncoder())
    plain = _without(state, first.removesuffix("stem.convs.0.conv.weight"))
    plain = {k: v for k, v in plain.items() if k.startswith(("stem.", "stages.")) and ".all_modules." not in k}
    found = {(int(m[1]), int(m[2])) for m in (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", k) for k in plain) if m}
    blocks = [sum(stage == s for stage, _ in found) for s in range(1 + max((stage for stage, _ in found), default=-1))]
    names = [f"stages.{s}.blocks.0.conv1.conv.weight" for s in range(len(blocks))]
    if not names or any(name not in plain for name in names):
        raise BadInput("an nnU-Net network without residual stages: give one of nnssl's ResEnc")
    encoder = ResEncFeatures(ResidualEncoder([len(plain[name]) for name in names], blocks))
    _fill(encoder.net, plain, len(state))
    return encoder


def _without(state: StateDict, prefix: str) -> StateDict:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _num_blocks(plain: StateDict) -> int:
    return len({m[1] for m in (re.match(r"blocks\.(\d+)\.", k) for k in plain) if m})


def _licensed(encoder: SliceViT, licence: str) -> SliceViT:
    encoder.licence = licence
    return encoder


class _LastMap(nn.Module):
    """A `Backbone` of one layer: the cells of a network's last map, and their mean as class token."""

    num_layers, num_prefix_tokens = 1, 0

    def last_map(self, x: Tensor) -> Tensor:
        """[B, 1, H, W, D] in [-1, 1] -> [B, E, h, w, d]."""
        raise NotImplementedError

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As of `Backbone`.

        Raises:
            ValueError: `n` names layers that are not there.
        """
        if (n if isinstance(n, int) else list(n)) not in (1, [0], [-1]):
            raise ValueError(f"n={n}: this network gives its last map alone")
        cells = self.last_map(x)
        patches = cells if reshape else cells.flatten(2).transpose(1, 2)
        return ((patches, cells.mean((2, 3, 4))),) if return_class_token else (patches,)


class SegResFeatures(_LastMap):
    """MONAI's SegResEncoder as CT-FM has it: five levels, the last one at a sixteenth of the size.

    Args:
        filters: Of the first level (32 published).
    """

    patch_size, input_size = 16, 96
    preparation = Preparation((-1024.0, 2048.0), "LPS", "CT")
    licence = "CT-FM's weights: see huggingface.co/project-lighter/ct_fm_feature_extractor"

    def __init__(self, filters: int = 32) -> None:
        super().__init__()
        from monai.networks.nets.segresnet_ds import SegResEncoder

        self.net = SegResEncoder(init_filters=filters, blocks_down=(1, 2, 2, 4, 4))
        self.embed_dim = 16 * filters

    def last_map(self, x: Tensor) -> Tensor:
        """Of volumes [L, P, S], shown as CT-FM saw them: [S, P, L] in [0, 1]."""
        return self.net((x.transpose(2, 4) + 1) / 2)[-1].transpose(2, 4)


class ResEncFeatures(_LastMap):
    """The last map of a residual encoder, at a thirty-second of the size.

    Args:
        net: The encoder.
    """

    input_size = 160
    preparation = Preparation(None, "LPS", "MR")
    licence = "nnssl's weights: CC BY 4.0 (trained on OpenMind)"

    def __init__(self, net: ResidualEncoder) -> None:
        super().__init__()
        self.net, self.patch_size = net, 2 ** (len(net.stages) - 1)
        self.embed_dim = net.widths[-1]

    def last_map(self, x: Tensor) -> Tensor:
        """Of volumes [L, P, S], shown as nnU-Net reads files: [S, P, L], of mean 0 and deviation 1."""
        x = x.transpose(2, 4)
        x = (x - x.mean((2, 3, 4), keepdim=True)) / x.std((2, 3, 4), keepdim=True).clamp_min(1e-8)
        return self.net(x).transpose(2, 4)


def tensor_of_family(state: StateDict, wanted: str) -> str | None:
    """The name of the tensor that tells a family (`VIT_2D`, ...); None of an untrained network.

    Raises:
        BadInput: The weights are of another family, which is named.
    """
    if not state:
        return None
    for pattern, ndim, family in _FAMILIES:
        found = next((k for k, v in state.items() if re.search(pattern, k) and (not ndim or v.ndim == ndim)), None)
        if found is not None:
            if family != wanted:
                raise BadInput(f"they are of {family}, not of {wanted}")
            return found
    raise BadInput(f"none of their {len(state)} tensors is one of {wanted}")


def _fill(module: nn.Module, state: StateDict, num_saved: int) -> None:
    """Load tensors by name, all of the module's and no others.

    Raises:
        BadInput: They do not fit; the first names of each kind are given.
    """
    own = module.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    other = [f"{k} {tuple(v.shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", other))
    problems = [f"{len(names)} {kind} ({', '.join(names[:2])})" for kind, names in kinds if names]
    if problems:
        raise BadInput(f"their tensors fit only in part: {'; '.join(problems)}: give the published file whole")
    module.load_state_dict(state)
    logger.info("%d of %d tensors used", len(own), num_saved)
