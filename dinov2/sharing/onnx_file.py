"""An encoder as an ONNX file: any number of volumes of one size, without Python."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import BadInput
from dinov2.files import refuse_output, replacing, writing
from dinov2.geometry import Size3
from dinov2.models.vision_transformer import DinoVisionTransformer3d
from dinov2.optional import needed_for
from dinov2.sharing.transformers_folder import open_to_share

MOST_BYTES = 2**31 - 2**24  # of a file in one piece; protobuf's limit, less the graph


class _Tokens(nn.Module):
    """Class token and patch tokens of one channel."""

    def __init__(self, backbone: DinoVisionTransformer3d) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1, H, W, D] -> [B, E], [B, N, E], both normed."""
        ((patches, cls),) = self.backbone.get_intermediate_layers(pixel_values, return_class_token=True)
        return cls, patches


def write_onnx(source: str | Path, path: Path, size_hwd: Size3 | None = None, licence: str | None = None) -> Size3:
    """Write a network with its weights; returns the size of its input.

    Args:
        source: Of the weights, as of `open_teacher`.
        path: The file; replaced as a whole.
        size_hwd: Of the volumes (voxels); None: a cube of pretraining's crops.
        licence: Of the weights, as their owner decides.

    Raises:
        BadInput: No such weights, a licence that does not allow it, a size that is no whole number of patches, more
            weights than such a file holds, or a package is missing.
    """
    refuse_output(path, "--onnx")
    onnx = _onnx()
    opened = open_to_share(source, licence)
    network = opened.backbone
    size = size_hwd or (network.input_size,) * 3
    if any(n < 1 or n % network.patch_size for n in size):
        raise BadInput(
            f"--size {' '.join(map(str, size))}: each must be a multiple of the network's patch size {network.patch_size}"
        )
    if sum(p.numel() * p.element_size() for p in network.parameters()) > MOST_BYTES:
        raise BadInput(f"weights {source}: more than the 2 GiB that an ONNX file holds: use --hf, or a smaller network")
    _settle_positions(network, size)
    model = _traced(network, size)
    facts = {
        "licence": opened.licence,
        "preprocessing": json.dumps(opened.meta["preprocessing"]),
        "patch_size": str(network.patch_size),
        "patch_grid": json.dumps(network.patch_embed.grid(size)),
    }
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(model.SerializeToString())
    return size


@contextmanager
def _silence() -> Iterator[None]:
    """Without what torch says of its progress, and of operators of packages that are not there."""
    translator = logging.getLogger("torch.onnx")
    level = translator.level
    translator.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        translator.setLevel(level)


def _onnx() -> Any:
    """The library, imported where it is used.

    Raises:
        BadInput: It, or torch's translator, is not installed.
    """
    with needed_for("--onnx"):
        import onnx
        import onnxscript  # noqa: F401 - what torch translates with
    return onnx


def _settle_positions(network: DinoVisionTransformer3d, size: Size3) -> None:
    """Bring learned positions to the file's one grid: ONNX's own interpolation differs in the third digit."""
    if network.pos_embed is None:
        return
    grid = network.patch_embed.grid(size)
    positions = network.interpolate_pos_encoding(grid)
    network.pos_embed, network.grid_hwd = nn.Parameter(positions, requires_grad=False), grid


def _traced(network: DinoVisionTransformer3d, size: Size3) -> Any:
    """The graph as onnx's ModelProto; its first axis may have any length."""
    example = torch.zeros(2, 1, *size)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with _silence():
        program = torch.onnx.export(
            _Tokens(network).eval(),
            (example,),
            input_names=["pixel_values"],
            output_names=["pooler_output", "patch_tokens"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # of dynamo=True it is a program
    return program.model_proto
