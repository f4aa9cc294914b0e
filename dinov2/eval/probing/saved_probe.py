"""A saved probe: the selected head, and what is needed to put a scan before it; `dinov2 classify`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpointer.saving import save_atomically
from dinov2.checkpointer.teacher import RANDOM, open_teacher, open_weights
from dinov2.configs.loader import saved_config, typed_from, without_path_keys
from dinov2.data.downstream.cases import prepare_case
from dinov2.data.downstream.crops import central_cube
from dinov2.data.downstream.lists import Item
from dinov2.data.downstream.recipes import Recipe
from dinov2.data.volumes.formats import stem
from dinov2.distributed.precision import evaluation_autocast
from dinov2.distributed.runtime import start_runtime
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, BadInput
from dinov2.eval.methods.networks import open_network
from dinov2.eval.methods.registry import OURS, find_method
from dinov2.eval.metrics.classification import write_predictions
from dinov2.eval.probing.embedding_probe import EMBEDDING, EmbeddingProbe, weights_beside
from dinov2.eval.probing.linear_heads import Head
from dinov2.eval.probing.parts import feature_layers
from dinov2.eval.probing.training import Probe
from dinov2.eval.run import Setting
from dinov2.features.features import class_features
from dinov2.files import refuse_output, user_path
from dinov2.logging import Say
from dinov2.models.architecture import refuse_other_sizes
from dinov2.models.weights import plain_names, refuse_non_finite

PROBE = "probe.pth"


def save_probe(setting: Setting, probe: Probe, best: int) -> None:
    """Write `probe.pth`: tensors and plain types; the backbone itself only where it was trained."""
    weight, bias = probe.heads.head_weights(best)
    head = probe.heads.heads[best]
    meta = {
        "config": without_path_keys(setting.cfg),
        "recipe": dataclasses.asdict(setting.recipe),
        "image_size": setting.request.image_size,
        "head": dataclasses.asdict(head),
        "method": setting.request.model_name,
        "weights": _weights_from(setting.weights, setting.output_dir),
        "weights_sha256": setting.decisive["pretrained_weights"],
        "validation_auc": probe.history[-1]["auc"],
    }
    backbone = {"backbone": probe.backbone.state_dict()} if probe.optimizer else {}
    save_atomically({"weight": weight.cpu(), "bias": bias.cpu(), "meta": meta, **backbone}, setting.output_dir / PROBE)


def _weights_from(weights: str, folder: Path) -> str:
    """How a probe in a folder names its backbone: a path from there, none of the machine's own; other names as they are."""
    return os.path.relpath(weights, os.path.realpath(folder)) if os.path.isabs(weights) else weights


class SavedProbe:
    """A probe ready for scans.

    Args:
        path: `probe.pth` of `linear3d.py`.
        content: Of that file.
        weights: Of the backbone, as of `open_teacher`; None: where they were when the probe was made, seen from its file.
        encoder: `module:function` of a probe on somebody's encoder. A file alone names no code that is run.

    Raises:
        BadInput: The backbone's weights are missing or others.
    """

    def __init__(
        self, path: str | Path, content: dict[str, Any], weights: str | None = None, encoder: str | None = None
    ) -> None:
        meta = content["meta"]
        trained = content.get("backbone")
        refuse_non_finite({**{k: content[k] for k in ("weight", "bias")}, **(trained or {})}, str(path))
        self.recipe, self.image_size = typed_from(Recipe, meta["recipe"], str(path)), meta["image_size"]
        self.cfg = saved_config(meta["config"], str(path))
        method = find_method(meta.get("method", OURS))
        if method.kind == "encoder" and method.name != encoder:
            raise BadInput(f"{path}: on the encoder {method.name}: give --encoder {method.name} where you trust its code")
        if trained:
            refuse_other_sizes(self.cfg, plain_names(trained), path)
        self.runtime = start_runtime(self.cfg.train.num_threads)
        teacher = open_teacher(RANDOM if trained else weights or weights_beside(path, meta["weights"]))
        if not trained and teacher.identity() != meta["weights_sha256"]:
            raise BadInput(f"{teacher.source}: not the weights that {path} was made with: give them as --pretrained-weights")
        network = open_network(method, self.cfg, teacher, self.recipe.task, self.image_size, self.runtime)
        if network is None:
            raise BadInput(f"{path}: {method.name} has no feature for a classification: another file's description")
        self.backbone = network
        if trained:
            self.backbone.load_state_dict(trained)
        self.layers = feature_layers(self.backbone)
        self.columns = Head(**meta["head"]).columns(self.layers, self.backbone.embed_dim)
        self.weight, self.bias = (content[k].to(self.runtime.device) for k in ("weight", "bias"))
        self.names, self.num_channels = self.recipe.output_names, self.recipe.channels

    @torch.no_grad()
    def __call__(self, images: Sequence[str | Path]) -> Tensor:
        """Class probabilities [K] float64 of one scan, a file for each channel.

        Raises:
            BadInput: A file cannot be used.
        """
        case = prepare_case(Item(tuple(map(user_path, images)), None, stem(images[0])), self.recipe)
        view = central_cube(case.image, self.image_size)[None].to(self.runtime.device)
        with evaluation_autocast(self.cfg, self.runtime.device.type):
            features = class_features(self.backbone, view, self.layers)[:, self.columns]
        return (features @ self.weight.T + self.bias)[0].double().softmax(-1).cpu()


def open_probe(path: str | Path, weights: str | None = None, encoder: str | None = None) -> SavedProbe | EmbeddingProbe:
    """A probe of `dinov2 linear` or `dinov2 probe`, ready for scans; arguments as of `SavedProbe`.

    Raises:
        BadInput: The file is no probe, or its network's weights are missing or others.
    """
    content = open_weights(path)
    if not isinstance(content, dict) or not {"weight", "bias", "meta"} <= content.keys():
        raise BadInput(f"{path}: no saved probe: give the probe.pth that linear3d.py or `dinov2 probe` wrote")
    if EMBEDDING in content["meta"]:
        return EmbeddingProbe(path, content, weights)
    return SavedProbe(path, content, weights, encoder)


def classify(
    probe: Path, inputs: Sequence[Path], weights: str | None, output: Path | None, say: Say, encoder: str | None = None
) -> int:
    """Say each scan's class and probabilities, or its value; a file that cannot be used is said and the others go on.

    Args:
        probe: `probe.pth`.
        inputs: Scans; with several channels the files of one.
        weights: Of the backbone, where they are no longer where they were.
        output: A table like `predictions.csv`.
        say: Takes each line.
        encoder: As of `SavedProbe`.

    Returns:
        The exit code: 2 where a scan could not be used.

    Raises:
        BadInput: The probe cannot be used.
    """
    if output:
        refuse_output(output, "--output")
    saved = open_probe(probe, weights, encoder)
    scans = [[path] for path in inputs] if saved.num_channels == 1 else [list(inputs)]
    names, done, failed = saved.names, {}, 0
    for scan in scans:
        try:
            p = saved(scan)
        except BadInput as err:
            failed += 1
            say(f"{scan[0]}: not classified: {err}")
            continue
        done[str(scan[0])] = p
        if isinstance(saved, EmbeddingProbe) and not names:
            say(f"{scan[0]}: {saved.target} {float(p):.4g}")
            continue
        shown = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, p.tolist(), strict=True))
        say(f"{scan[0]}: {names[int(p.argmax())]} ({shown})")
    if output and done:
        table = torch.stack(list(done.values())).numpy()
        columns = {f"p_{name}": table[:, k] for k, name in enumerate(names)} or {"predicted": table[:, 0]}
        write_predictions(output, list(done), [""] * len(done), columns)
    return EXIT_BAD_INPUT if failed else EXIT_OK
