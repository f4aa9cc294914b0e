"""A trained segmentation as a MONAI bundle: its files, and the parts that its `inference.json` names.

MONAI runs the bundle; preparing a case, the network and writing the label map are this package's own, so that the result is
that of `dinov2 predict`. Shapes: B windows, C channels, R outputs, H W D voxels as prepared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.checkpointer.saving import save_atomically
from dinov2.checkpointer.teacher import open_weights
from dinov2.data.downstream.cases import prepare_case, restore_prediction
from dinov2.data.downstream.crops import BACKGROUND
from dinov2.data.downstream.lists import Item
from dinov2.distributed.precision import autocast, evaluation_dtype
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.eval.segmentation_3d.build import load_segmentation
from dinov2.eval.segmentation_3d.inference import TEST_OVERLAP, masks_of
from dinov2.eval.segmentation_3d.predict import plan_jobs, write_label_map
from dinov2.files import user_path, write_text, writing
from dinov2.geometry import edges
from dinov2.sharing.card import NOT_MEDICAL, segmentation_card
from dinov2.sharing.licence import licence_to_share
from dinov2.sharing.transformers_folder import refuse_foreign
from dinov2.version import __version__

_HERE = __name__
BEST = "best_model.pth"


class BundledNetwork(nn.Module):
    """`network_def`: a segmentation as `save_segmentation` wrote it, on windows [B, C, H, W, D] -> logits [B, R, H, W, D].

    Args:
        weights: `models/model.pt` of the bundle.
        device: Where to put it.

    Raises:
        BadInput: No such file, or not one of `save_segmentation`.
    """

    def __init__(self, weights: str, device: str = "cpu") -> None:
        super().__init__()
        place = torch.device(device)
        self.network, cfg, self.task = load_segmentation(weights, Runtime(place))
        self.dtype, self.device_type = evaluation_dtype(cfg, place.type), place.type
        self.window_batch = int(cfg.segmentation.window_batch)

    def forward(self, windows: Tensor) -> Tensor:
        with autocast(self.device_type, self.dtype):
            return self.network(windows).float()


def cases(network: BundledNetwork, inputs: str | Sequence[str], output: str) -> list[dict[str, Any]]:
    """`dataset`: a dictionary for each case; arguments as `--input` and `--output` of `dinov2 predict`.

    Raises:
        BadInput: Nothing to segment, or a result in place of an input.
    """
    files = [Path(user_path(p)) for p in ([inputs] if isinstance(inputs, str) else inputs)]
    return [{"item": item, "target": target} for item, target in plan_jobs(files, Path(output), network.task.recipe)]


class PrepareCased:
    """`preprocessing`: adds `case` and its `image` [C, H, W, D], on the recipe's grid in [-1, 1]."""

    def __init__(self, network: BundledNetwork) -> None:
        self.task = network.task

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        item: Item = data["item"]
        case = prepare_case(item, self.task.recipe, self.task.resize_scale)
        return {**data, "case": case, "image": case.image}


class SaveLabelMapd:
    """`postprocessing`: of logits `pred` [R, H, W, D] the label map, on the scan's own grid, into `target`."""

    def __init__(self, network: BundledNetwork) -> None:
        self.recipe = network.task.recipe

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        label = self.recipe.compose(masks_of(data["pred"], self.recipe))
        write_label_map(restore_prediction(label, data["case"]), data["target"])
        return {**data, "pred": label}


class CaseByCase:
    """`evaluator`: one case after the other, without pytorch-ignite.

    Args:
        dataset: Of `cases`.
        preprocessing, postprocessing: Of a case's dictionary.
        inferer: Of windows [1, C, H, W, D] and the network.
        network: The network.
    """

    def __init__(
        self,
        dataset: Iterable[dict[str, Any]],
        preprocessing: Callable[[Any], Any],
        inferer: Callable[[Tensor, nn.Module], Tensor],
        network: BundledNetwork,
        postprocessing: Callable[[Any], Any],
    ) -> None:
        self.dataset, self.network, self.inferer = dataset, network.eval(), inferer
        self.preprocessing, self.postprocessing = preprocessing, postprocessing

    @torch.inference_mode()
    def run(self) -> list[str]:
        """Segment all cases; returns the files that were written."""
        written = []
        for data in map(self.preprocessing, self.dataset):
            logits = self.inferer(data["image"][None], self.network)[0]
            written.append(str(self.postprocessing({**data, "pred": logits})["target"]))
        return written


def write_bundle(source: str | Path, folder: Path, licence: str | None = None) -> list[str]:
    """Write `configs/`, `models/`, `docs/` of a bundle; returns the files' names.

    Args:
        source: `best_model.pth` of segmentation3d.py, or the folder with it.
        folder: New, empty, or of an earlier call.
        licence: Of the weights, as their owner decides.

    Raises:
        BadInput: Not a segmentation, a licence that does not allow it, or a folder with other things in it.
    """
    refuse_foreign(folder, "--monai-bundle", "configs/metadata.json")
    path = Path(user_path(source))
    path = path / BEST if path.is_dir() else path
    content = open_weights(path)
    _refuse_foreign_code(content, path)
    network, cfg, task = load_segmentation(path, Runtime(torch.device("cpu")))
    name = licence_to_share(content["meta"].get("licence"), licence, source)
    window, recipe = edges(task.image_size), task.recipe
    method = f"{task.method}, head {task.head}, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"
    inference = _inference(list(window), int(cfg.segmentation.window_batch))
    metadata = _metadata(recipe.name, recipe.channels, recipe.output_names, list(window), name)
    texts = {
        "LICENSE": f"The weights in models/: {name}\n",
        "configs/inference.json": json.dumps(inference, indent=2) + "\n",
        "docs/README.md": segmentation_card(recipe.name, recipe.output_names, window, method, name),
        "configs/metadata.json": json.dumps(metadata, indent=2) + "\n",
    }
    with writing(folder):
        save_atomically({**content, "meta": {**content["meta"], "licence": name}}, folder / "models" / "model.pt")
        for file, text in texts.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / file, text)
    return sorted([*texts, "models/model.pt"])


def _refuse_foreign_code(content: Any, path: Path) -> None:
    meta = content.get("meta") if isinstance(content, dict) else None
    method = str(meta.get("method", "")) if isinstance(meta, dict) else ""
    if ":" in method:
        raise BadInput(
            f"weights {path}: around the encoder {method}, whose code is not this package's: a bundle cannot hold it"
        )


def _inference(window: list[int], window_batch: int) -> dict[str, Any]:
    """`configs/inference.json`."""
    part = lambda name, **arguments: {"_target_": f"{_HERE}.{name}", **arguments}  # noqa: E731
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "weights": "$@bundle_root + '/models/model.pt'",
        "inputs": "$@bundle_root + '/input'",
        "output": "$@bundle_root + '/eval'",
        "overlap": TEST_OVERLAP,
        "device": "$'cuda' if torch.cuda.is_available() else 'cpu'",
        "network_def": part("BundledNetwork", weights="@weights", device="@device"),
        "dataset": part("cases", network="@network_def", inputs="@inputs", output="@output"),
        "preprocessing": {"_target_": "Compose", "transforms": [part("PrepareCased", network="@network_def")]},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": window,
            "sw_batch_size": window_batch,
            "overlap": "@overlap",
            "cval": BACKGROUND,
            "sw_device": "@device",
            "device": "cpu",
        },
        "postprocessing": {"_target_": "Compose", "transforms": [part("SaveLabelMapd", network="@network_def")]},
        "evaluator": part(
            "CaseByCase",
            dataset="@dataset",
            preprocessing="@preprocessing",
            inferer="@inferer",
            network="@network_def",
            postprocessing="@postprocessing",
        ),
        "run": ["$@evaluator.run()"],
    }


def _metadata(name: str, channels: int, outputs: Sequence[str], window: list[int], licence: str) -> dict[str, Any]:
    """`configs/metadata.json`."""
    import monai

    shape = {"num_channels": channels, "spatial_shape": window, "dtype": "float32", "is_patch_data": True}
    names = {str(i): output for i, output in enumerate(outputs)}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": f"written by dinov2-3d {__version__}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"dinov2-3d": __version__},
        "name": name,
        "task": f"segmentation of {name}",
        "description": f"A segmentation into {', '.join(outputs)}",
        "authors": "",
        "copyright": "",
        "license": licence,
        "intended_use": NOT_MEDICAL.replace("*", ""),
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    **shape,
                    "value_range": [-1, 1],
                    "channel_def": {str(c): f"image{c + 1}" for c in range(channels)},
                }
            },
            "outputs": {
                "pred": {"type": "image", "format": "segmentation", **shape, "num_channels": len(outputs), "channel_def": names}
            },
        },
    }
