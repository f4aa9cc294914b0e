"""The card of shared weights: what they are, from what, under which licence, and what is not known of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_HUB_LICENCES = re.compile(
    r"apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.\d|mpl-2\.0|a?gpl-3\.0|lgpl-3\.0"
)
_NUMBERS = (
    "The weights say none. Measure them on your own task, beside the same network untrained, before you rely on them, "
    "and write\nhere what you find."
)
NOT_MEDICAL = "**Not a medical device.** Research software, not for diagnosis or treatment."
_NOTHING_MEASURED = f"""## Numbers

{_NUMBERS}

## Limits

- Expect little of modalities, organs and voxel sizes that are not among the training data.
- The network sees what lies within the percentiles above; absolute intensities (Hounsfield units) are lost.
- {NOT_MEDICAL}"""


def front_matter(licence: str, library: str, tags: list[str], pipeline: str) -> str:
    """What a hub reads of a card."""
    name = licence.strip().lower()
    lines = (
        [f"license: {name}"] if _HUB_LICENCES.fullmatch(name) else ["license: other", f"license_name: {json.dumps(licence)}"]
    )
    lines += [f"library_name: {library}", f"pipeline_tag: {pipeline}", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---", ""])


def encoder_card(
    config: Mapping[str, Any], processing: Mapping[str, Any], meta: Mapping[str, Any], licence: str, sections: str = ""
) -> str:
    """Of a folder for transformers.

    Args:
        config: `config.json`.
        processing: `preprocessor_config.json`.
        meta: What the weights say of themselves.
        licence: Under which they are written.
        sections: Numbers and limits that are known of them; empty: none are.
    """
    tags = ["medical-imaging", "3d", "vision-transformer"]
    return front_matter(licence, "transformers", tags, "image-feature-extraction") + (
        f"""
# A 3D vision transformer of medical volumes

    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
    found = model(**processor("scan.nii.gz"))      # or an array [X, Y, Z], [C, X, Y, Z]; a list is a batch
    found.pooler_output                            # (B, {config["hidden_size"]}) class token, token 0 of last_hidden_state
    found.last_hidden_state                        # class token, {config["num_register_tokens"]} registers, patches

`FOLDER` is this folder, or its name on the hub. The code beside the weights needs torch, transformers and numpy, and nibabel
for files. `pixel_values` are [B, C, H, W, D] in [-1, 1], slice axis last; each channel goes through the network alone, and
tokens are averaged over channels. Patches are in C order of (H, W, D); `model.patch_grid((H, W, D))` says how many along each.

| | |
| --- | --- |
| network | {config["hidden_size"]} channels, {config["num_hidden_layers"]} blocks of {config["num_attention_heads"]} heads, \
patches of {config["patch_size"]} voxels, positions {config["pos_encoding"]} |
| preprocessing | percentiles {processing["percentiles"][0]:g} and {processing["percentiles"][1]:g} of each channel \
become -1 and 1; slice axis last; cropped to the foreground; padded with -1 to whole patches |
| method | {_method(meta)} |
| data | {_data(meta)} |
| hours | not said by the weights |
| software | {_software(meta)} |
| licence | {licence} |

{sections.strip() or _NOTHING_MEASURED}
"""
    )


def known_sections(card: str) -> str:
    """What an earlier card says from its first section on; links into its own place are plain words."""
    _, mark, rest = card.partition("\n## ")
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", f"## {rest}") if mark else ""


def _section(meta: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    config = meta.get("config")
    section = config.get(name) if isinstance(config, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _method(meta: Mapping[str, Any]) -> str:
    iteration, crops = meta.get("iteration"), _section(meta, "crops")
    if not isinstance(iteration, int):
        return "not said"
    edges = [crops.get(k) for k in ("global_crops_size", "local_crops_size")]
    return (
        f"self-supervised (DINOv2's losses on 3D crops of {edges[0]} and {edges[1]} voxels), {iteration + 1} steps; the teacher"
    )


def _data(meta: Mapping[str, Any]) -> str:
    seen = meta.get("trained_on")
    scans = seen.get("scans") if isinstance(seen, Mapping) else None
    if not isinstance(scans, list):
        return "not said"
    listed = meta.get("datalist_sha256", "not said")
    return f"{len(scans)} scans without labels, whose hashes travel with the weights (SHA-256 of their list: {listed})"


def _software(meta: Mapping[str, Any]) -> str:
    versions = meta.get("versions")
    return ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else "not said"


def segmentation_card(name: str, classes: Sequence[str], window: Sequence[int], method: str, licence: str) -> str:
    """Of a MONAI bundle: `docs/README.md`.

    Args:
        name: Of the data set's recipe.
        classes: Of the outputs.
        window: Edges (voxels).
        method: And head.
        licence: Under which the weights are written.
    """
    tags = ["medical-imaging", "3d", "segmentation", "monai"]
    return front_matter(licence, "monai", tags, "image-segmentation") + (
        f"""
# Segmentation of {name}

    from monai.bundle import run                # in this folder, where MONAI and dinov2-3d are installed

    files = dict(meta_file="configs/metadata.json", config_file="configs/inference.json")
    run(**files, inputs="scan.nii.gz", output="labels.nii.gz")      # several channels: a list of files

`python -m monai.bundle run --meta_file ... --inputs ...` is the same, with `fire` installed. `inputs` may be a folder of
cases, named as nnU-Net's; `output` is a folder then. Configurations of bundles run code: use those of people you trust.

The label map lies on the scan's own grid, and is that of `dinov2 predict --weights models/model.pt`.

| | |
| --- | --- |
| outputs | {", ".join(classes)} |
| network | {method} |
| windows | {", ".join(map(str, window))} voxels |
| licence | {licence} |

## Numbers

{_NUMBERS}

## Limits

- Expect little of scanners, people and voxel sizes that are not among the training data.
- {NOT_MEDICAL}
"""
    )
