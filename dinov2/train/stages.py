"""Several trainings one after the other, each from a teacher of the one before: `train3d.py --stages FILE`.

    stages:
      - {name: standard, config: pretrain/vit_large}
      - {name: high_resolution, config: train/vit3d_highres, weights_from: standard, iteration: 112499}

Each stage has a folder of its name below the output folder and resumes by itself, so the chain is started again with the same
command wherever it was stopped. `overrides` (a list of key=value) of a stage come after those of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.configs import find_config, load_and_merge_config_3d, read_yaml
from dinov2.configs.errors import nearest
from dinov2.errors import BadInput

_KEYS = ("name", "config", "weights_from", "iteration", "overrides")


@dataclass(frozen=True)
class Stage:
    """What `train3d.py` is started with for one stage."""

    name: str
    config: str
    output_dir: Path
    overrides: list[str]


def read_stages(name_or_path: str, output_dir: str | Path, overrides: list[str]) -> list[Stage]:
    """The stages of a file, checked before the first one starts.

    Args:
        name_or_path: YAML file, or a name as of a configuration.
        output_dir: Gets a folder per stage.
        overrides: Of every stage.

    Raises:
        BadInput: An ill-formed file, or a stage that would start from a teacher which the earlier one does not write.
    """
    path = find_config(name_or_path)
    content = read_yaml(path)
    items = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(items, list) or not items or not all(isinstance(i, dict) for i in items):
        raise BadInput(f"{path}: expected `stages:`, a list of {{name, config, weights_from, iteration, overrides}}")
    stages: list[Stage] = []
    for number, item in enumerate(items, 1):
        where = f"{path}, stage {number}"
        unknown = [k for k in item if k not in _KEYS]
        if unknown:
            raise BadInput(f"{where}: unknown key {unknown[0]!r}{nearest(str(unknown[0]), _KEYS)}")
        if not isinstance(item.get("name"), str) or not isinstance(item.get("config"), str):
            raise BadInput(f"{where}: name and config must be given")
        if item["name"] in {s.name for s in stages}:
            raise BadInput(f"{where}: a stage {item['name']!r} was there before")
        words = [*overrides, *map(str, item.get("overrides") or [])]
        if "weights_from" in item:
            words.append(f"student.full_pretrained_weights={_teacher(item, stages, where)}")
        stages.append(Stage(item["name"], item["config"], Path(output_dir) / item["name"], words))
    return stages


def _teacher(item: dict[str, Any], stages: list[Stage], where: str) -> Path:
    """The file that an earlier stage will have written."""
    before = {s.name: s for s in stages}.get(item["weights_from"])
    if before is None:
        names = [s.name for s in stages]
        raise BadInput(
            f"{where}: weights_from={item['weights_from']!r} is no earlier stage ({', '.join(names) or 'there is none'})"
        )
    cfg = load_and_merge_config_3d(before.config, before.overrides)
    total, period = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH, cfg.evaluation.eval_period_iterations
    iteration = item.get("iteration", total - 1)
    is_written = iteration == total - 1 or (0 <= iteration < total and period > 0 and (iteration + 1) % period == 0)
    if not is_written:
        raise BadInput(
            f"{where}: stage {before.name} of {total} iterations writes no teacher at iteration {iteration} (only every "
            f"evaluation.eval_period_iterations={period} and at the end, {total - 1})"
        )
    return before.output_dir / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
