"""A command line made whole by its method: what is not given takes the method's value, what does not go with it is refused."""

from __future__ import annotations

import argparse
from typing import Any

from dinov2.checkpointer.teacher import RANDOM, open_teacher
from dinov2.data.downstream.lists import read_downstream_datalist
from dinov2.data.downstream.recipes import Recipe, load_recipe
from dinov2.errors import BadInput
from dinov2.eval.methods.registry import (
    EDGE,
    LEARNING_RATE,
    LINEAR_LEARNING_RATE,
    METHODS,
    OURS,
    Method,
    find_method,
)
from dinov2.eval.methods.unet_plan import plan_unet
from dinov2.models.encoders import build_encoder
from dinov2.models.vision_transformer import FACTORIES


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """`--model-name`, of programs that compare methods."""
    rows = "; ".join(f"{m.name}: {m.what}" for m in METHODS.values())
    own = "or module:function of an encoder of your own (docs/methods.md); a flag that you give wins over the method's value"
    parser.add_argument("--model-name", default=OURS, metavar="METHOD", help=f"{rows}; {own}")


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of segmentation3d.py or linear3d.py, none of them left open.

    Raises:
        BadInput: An unknown method, one that the task does not have, or flags that do not go with it.
    """
    method = find_method(args.model_name)
    weights = _weights(method, args.pretrained_weights)
    task, head = ("segmentation", args.segmentation_head) if hasattr(args, "segmentation_head") else ("classification", None)
    if problem := method.misfit(task, head, args.image_size):
        raise BadInput(problem)
    own = _of_segmentation(method, args) if task == "segmentation" else _of_classification(method, args)
    if args.image_size is None and "image_size" not in own:
        own["image_size"] = _size_of_encoder(method, weights) if method.kind == "encoder" else method.image_size or EDGE
    given = {name: value for name, value in vars(args).items() if value is not None or name not in own}
    return argparse.Namespace(**{**own, **given, "pretrained_weights": weights})


def _weights(method: Method, given: str | None) -> str:
    untrained = given == RANDOM or given in FACTORIES
    if method.weights == "none":
        allowed = given is None or (untrained if method.kind == "vit" else given == RANDOM)
        if not allowed:
            raise BadInput(
                f"--model-name {method.name}: starts from nothing, not from --pretrained-weights {given}: leave them out"
            )
        return given or RANDOM
    if given is None or (untrained and method.weights == "trained"):
        kind = "published self-supervised weights (MONAI's model_swinvit.pt)" if method.kind == "swin" else "weights"
        hint = "" if method.weights == "trained" else ", or random"
        raise BadInput(f"--model-name {method.name}: needs {kind}: give --pretrained-weights FILE{hint}")
    return given


def _of_segmentation(method: Method, args: argparse.Namespace) -> dict[str, Any]:
    """Values of the flags that a segmentation leaves to its method."""
    head = args.segmentation_head or method.heads[0]
    if args.train_feature_model and method.kind == "encoder":
        raise BadInput(f"--train-feature-model: {method.name} is used frozen: leave the flag out")
    recipe = load_recipe(args.dataset_name)
    own = {
        "segmentation_head": head,
        "train_feature_model": method.trains_encoder(head),
        "learning_rate": LINEAR_LEARNING_RATE if head == "Linear" else LEARNING_RATE,
        "batch_size": method.cases_a_step(head, recipe.channels),
    }
    if method.kind == "unet" and recipe.task == "segmentation":  # another task is refused where the run is opened
        own |= _planned(args, recipe)
    return own


def _planned(args: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Patch and plan of a U-Net, in plain types."""
    items = read_downstream_datalist(args.base_data_dir, recipe)["training"]
    planned = plan_unet(items, recipe, args.resize_scale, args.image_size)
    return {"image_size": list(planned.patch), "unet_plan": planned.plan.as_plain()}


def _of_classification(method: Method, args: argparse.Namespace) -> dict[str, Any]:
    if args.fine_tune and method.kind != "vit":
        raise BadInput(f"--fine-tune: {method.name} is probed frozen: leave the flag out")
    return {}


def _size_of_encoder(method: Method, weights: str) -> int:
    """The input that anyone's encoder was trained on (voxels)."""
    return build_encoder(method.name, open_teacher(weights).state, weights).input_size
