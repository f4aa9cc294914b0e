"""An encoder as a folder that transformers opens where this package is not installed, and on the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from dinov2 import errors, geometry
from dinov2.checkpointer.export import without_paths
from dinov2.checkpointer.sealed import write_safetensors
from dinov2.checkpointer.teacher import DEMO, FOLDER_WEIGHTS, Teacher, open_trained
from dinov2.configs.loader import without_path_keys
from dinov2.data import preprocess
from dinov2.distributed.runtime import Runtime
from dinov2.errors import BadInput
from dinov2.features.setup import build_model_for_eval, config_for
from dinov2.files import read_text, write_text, writing
from dinov2.models.architecture import saved_network
from dinov2.models.vision_transformer import DinoVisionTransformer3d
from dinov2.models.weights import plain_names
from dinov2.optional import needed_for
from dinov2.sharing.card import encoder_card, known_sections
from dinov2.sharing.licence import licence_to_share

logger = logging.getLogger(__name__)

STANDALONE = Path(__file__).resolve().parent / "standalone"
MODEL, PROCESSOR = "modeling_dinov2_3d", "image_processing_dinov2_3d"
_OWN_IMPORT = re.compile(r"^from dinov2(?:\.\w+)*\.(\w+) import", re.MULTILINE)


class Opened(NamedTuple):
    """An encoder to be written for others."""

    teacher: Teacher
    config: DictConfig
    backbone: DinoVisionTransformer3d
    licence: str

    @property
    def meta(self) -> dict[str, Any]:
        """What goes along: no path of the machine that trained it, and always what network it is."""
        known = {} if saved_network(self.teacher.meta) else {"config": without_path_keys(self.config)}
        meta = {"preprocessing": preprocess.PREPROCESSING, **self.teacher.meta, **known, "licence": self.licence}
        return without_paths(meta)

    @property
    def percentiles(self) -> tuple[float, float]:
        return preprocess.percentiles_of(self.meta["preprocessing"])


def open_to_share(source: str | Path, licence: str | None) -> Opened:
    """An encoder on the CPU in float32, and the licence under which it may be written.

    Raises:
        BadInput: No such weights, or a licence that does not allow it.
    """
    teacher = open_trained(source)
    name = licence_to_share(teacher.licence, licence, source)
    cfg = config_for(teacher, None)
    with torch.random.fork_rng(devices=[]):
        return Opened(teacher, cfg, build_model_for_eval(cfg, teacher, Runtime(torch.device("cpu"))), name)


def write_folder(source: str | Path, folder: Path, licence: str | None = None) -> list[str]:
    """Write `config.json`, weights, card and the code that opens them; returns the files' names.

    Args:
        source: Of the weights, as of `open_teacher`.
        folder: New, empty, or of an earlier call.
        licence: Of the weights, as their owner decides.

    Raises:
        BadInput: No such weights, a licence that does not allow it, or a folder with other things in it.
    """
    refuse_foreign(folder, "--hf", "config.json")
    opened = open_to_share(source, licence)
    config, processing = network_config(opened), processor_config(opened)
    texts = {
        **code_files(),
        "preprocessor_config.json": json.dumps(processing, indent=2) + "\n",
        "README.md": encoder_card(config, processing, opened.meta, opened.licence, _measured(opened.teacher)),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / FOLDER_WEIGHTS, plain_names(opened.backbone.state_dict()), opened.meta)
        for name, text in texts.items():
            write_text(folder / name, text)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")  # last: what tells a whole folder
    return sorted([*texts, "config.json", FOLDER_WEIGHTS])


def _measured(teacher: Teacher) -> str:
    """Numbers and limits of the card that came with weights: of the demo encoder, or of a folder for transformers."""
    path = teacher.path
    if path is None or path.name not in (DEMO.name, FOLDER_WEIGHTS) or not (card := path.parent / "README.md").is_file():
        return ""
    return known_sections(read_text(card))


def refuse_foreign(folder: Path, flag: str, own: str) -> None:
    """Refuse a folder that holds anything but an earlier result, which has the file `own`.

    Raises:
        BadInput: It does, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{flag} {folder}: is a file: give a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / own).is_file():
        raise BadInput(f"{flag} {folder}: holds other files: give a new or an empty folder")


def network_config(opened: Opened) -> dict[str, Any]:
    """`config.json`."""
    student, network = opened.config.student, opened.backbone
    return {
        "architectures": ["Dinov2Vit3dModel"],
        "auto_map": {"AutoConfig": f"{MODEL}.Dinov2Vit3dConfig", "AutoModel": f"{MODEL}.Dinov2Vit3dModel"},
        "model_type": "dinov2_vit_3d",
        "hidden_size": network.embed_dim,
        "num_hidden_layers": network.num_layers,
        "num_attention_heads": network.num_heads,
        "patch_size": network.patch_size,
        "image_size": network.input_size,
        "ffn_layer": "mlp" if student.ffn_layer == "mlp" else "swiglu",
        "qkv_bias": student.qkv_bias,
        "proj_bias": student.proj_bias,
        "ffn_bias": student.ffn_bias,
        "layerscale": student.layerscale is not None,
        "num_register_tokens": student.num_register_tokens,
        "pos_encoding": student.pos_encoding,
        "interpolate_offset": student.interpolate_offset,
        "dtype": "float32",
    }


def processor_config(opened: Opened) -> dict[str, Any]:
    """`preprocessor_config.json`."""
    return {
        "auto_map": {"AutoImageProcessor": f"{PROCESSOR}.Dinov2Vit3dImageProcessor"},
        "image_processor_type": "Dinov2Vit3dImageProcessor",
        "percentiles": list(opened.percentiles),
        "patch_size": opened.backbone.patch_size,
        "do_normalize": True,
        "do_crop": True,
    }


def code_files() -> dict[str, str]:
    """Name and text of the code in the folder: two files of its own, and the modules of this package that one of them needs.

    These are the same text, so that preprocessing cannot drift; their imports point to the files beside them.
    """
    modules = [Path(str(m.__file__)) for m in (preprocess, errors, geometry)]
    files = [STANDALONE / f"{MODEL}.py", STANDALONE / f"{PROCESSOR}.py", *modules]
    return {file.name: _OWN_IMPORT.sub(r"from .\1 import", file.read_text(encoding="utf-8")) for file in files}


def push(folder: Path, repository: str, names: list[str]) -> str:
    """Put a folder's files on the Hugging Face hub; returns the address.

    Args:
        folder: Of `write_folder`.
        repository: `owner/name`; made where it is not there.
        names: The files.

    Raises:
        BadInput: Not such a name, no huggingface-hub, or the hub cannot be reached or refuses.
    """
    require_repository(repository)
    with needed_for(f"--push {repository}"):
        import huggingface_hub as hub
        from huggingface_hub.errors import HTTPError
    try:
        api = hub.HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names)
    except (OSError, HTTPError, ValueError, RuntimeError) as err:
        reason = " ".join(str(err).split())[:120] or type(err).__name__
        raise BadInput(
            f"--push {repository}: the Hugging Face hub took nothing ({reason}): {folder} is complete; check the connection "
            "and `hf auth login`, then start again"
        ) from err
    return str(address)


def require_repository(name: str) -> None:
    """Raise `BadInput` where a name is not `owner/name`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BadInput(f"--push {name}: give owner/name of the Hugging Face hub")
