"""`dinov2 curate`: which volumes of a list to train on, by rules in a YAML file, the same for the same list, rules and seed.

    seed: 0
    rules:                                          # applied in order, each to what the ones before it kept
      - {name: no label maps, drop: {label_map: true}}
      - {name: enough slices, slices_above: 24}     # voxels along the smallest axis, as train.data_min_axis_size counts them
      - {name: half, where: {dataset: [A, B]}, keep_share: 0.5}             # of each of these sets
      - {name: fewer patients, where: {dataset: NLST}, keep_patients: 500}
      - {name: fewer scans, where: {dataset: 4D-Lung}, volumes_per_patient: [30, 40]}   # a number drawn for each patient
    expected: {total: 98815, modality: {MR: 70434}, datasets: 35, slices_above_48: 53758}   # compared where the data is there

`where` and `drop` compare any key of the list; text without regard to case, blanks and punctuation. What is drawn depends on
the seed, the rule's name and the volume (content hash and file name; its path without a hash), never on the list's order.

Source: 3DINO paper, Methods, "Pretraining unlabeled dataset".
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.configs import find_config, read_yaml
from dinov2.configs.errors import nearest
from dinov2.data.datalist import Entry, read_datalist, write_datalist
from dinov2.errors import EXIT_OK, BadInput
from dinov2.logging import Say

ACTIONS = ("drop", "slices_above", "keep_share", "keep_patients", "volumes_per_patient")
_EXPECTED = ("total", "modality", "datasets", "slices_above_48")
_HIGH_RES_SLICES = 48


@dataclass(frozen=True)
class Rule:
    """One line of a rules file.

    Attributes:
        name: Said by `--explain`; also decides what is drawn.
        where: Keys and values of the entries that the rule is about; empty: all.
        action: One of `ACTIONS`.
        value: Of the action.
    """

    name: str
    where: dict[str, list[Any]]
    action: str
    value: Any


@dataclass(frozen=True)
class Rules:
    """A rules file."""

    path: str
    seed: int
    rules: list[Rule]
    expected: dict[str, Any]


def read_rules(name_or_path: str | Path) -> Rules:
    """Read and check a rules file, given by path or by name (`pretrain/curation/paper`).

    Raises:
        BadInput: Not there, not YAML, an unknown key or a value that a rule cannot have, by the rule's name.
    """
    path = find_config(name_or_path)
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("rules"), list):
        raise BadInput(f"{path}: expected `rules:`, a list of rules")
    _only(content, ("seed", "rules", "expected"), str(path))
    seed, expected = content.get("seed", 0), content.get("expected") or {}
    if not isinstance(seed, int):
        raise BadInput(f"{path}: seed must be a whole number, got {seed!r}")
    _only(expected, _EXPECTED, f"{path}, expected")
    rules = [_rule(item, f"{path}, rule {number}") for number, item in enumerate(content["rules"], 1)]
    return Rules(str(path), seed, rules, expected)


def _only(found: Any, allowed: tuple[str, ...], where: str) -> None:
    if not isinstance(found, dict):
        raise BadInput(f"{where}: expected keys and values, got {found!r}")
    for key in found:
        if key not in allowed:
            raise BadInput(f"{where}: unknown key {key!r}{nearest(str(key), allowed)}")


def _rule(item: Any, where: str) -> Rule:
    _only(item, ("name", "where", *ACTIONS), where)
    name = item.get("name")
    actions = [a for a in ACTIONS if a in item]
    if not isinstance(name, str) or len(actions) != 1:
        raise BadInput(f"{where}: needs a name and one of {', '.join(ACTIONS)}")
    action, value = actions[0], item[actions[0]]
    fits = {
        "drop": lambda v: isinstance(v, dict) and v,
        "slices_above": lambda v: _is_count(v),
        "keep_share": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1,
        "keep_patients": lambda v: _is_count(v),
        "volumes_per_patient": lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_count, v)) and v[0] <= v[1],
    }
    if not fits[action](value):
        wanted = {"drop": "keys and values", "keep_share": "a share within (0, 1]", "volumes_per_patient": "[fewest, most]"}
        raise BadInput(f"{where} ({name}): {action} must be {wanted.get(action, 'a whole number above 0')}, got {value!r}")
    about = item.get("where") or {}
    if not isinstance(about, dict):
        raise BadInput(f"{where} ({name}): where must be keys and values, got {about!r}")
    return Rule(name, _conditions(about), action, _conditions(value) if action == "drop" else value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _conditions(keys: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: [_plain(v) for v in (value if isinstance(value, list) else [value])] for key, value in keys.items()}


def _plain(value: Any) -> Any:
    """Text without case, blanks and punctuation, so that `fastMRI knee` is `fastmri_knee`."""
    return re.sub(r"[\W_]+", "", value.lower()) if isinstance(value, str) else value


def _matches(entry: Entry, conditions: dict[str, list[Any]]) -> bool:
    return all(_plain(entry.extra.get(key)) in values for key, values in conditions.items())


def apply_rule(entries: list[Entry], rule: Rule, seed: int) -> list[Entry]:
    """What a rule keeps, in list order.

    Raises:
        BadInput: It counts patients, and an entry has none.
    """
    about = [e for e in entries if _matches(e, rule.where)]
    if rule.action == "drop":
        kept = [e for e in about if not _matches(e, rule.value)]
    elif rule.action == "slices_above":
        kept = [e for e in about if min(e.shape[:3]) > rule.value]
    elif rule.action == "keep_share":
        kept = [e for group in _groups(about, "dataset").values() for e in _drawn_share(group, rule, seed)]
    else:
        kept = _by_patient(about, rule, seed)
    gone = {id(e) for e in about} - {id(e) for e in kept}
    return [e for e in entries if id(e) not in gone]


def _groups(entries: list[Entry], key: str) -> dict[Any, list[Entry]]:
    groups: dict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[_plain(entry.extra.get(key)) if key == "dataset" else entry.extra.get(key)].append(entry)
    return groups


def _drawn_share(group: list[Entry], rule: Rule, seed: int) -> list[Entry]:
    return _first_drawn(group, round(rule.value * len(group)), rule, seed)


def _first_drawn(group: list[Entry], count: int, rule: Rule, seed: int) -> list[Entry]:
    return sorted(group, key=lambda e: _draw(seed, rule, _identity(e)))[:count]


def _identity(entry: Entry) -> str:
    """What a volume is drawn by; equal content in several entries (channels of one file have hashes of their own) is told apart
    by its path."""
    return f"{entry.extra.get('sha', '')}/{entry.image if 'sha' not in entry.extra else Path(entry.image).name}/{entry.channel}"


def _draw(seed: int, rule: Rule, what: str) -> int:
    """A number for a thing, uniform over 64 bits."""
    text = f"{seed}/{rule.name}/{what}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def _by_patient(about: list[Entry], rule: Rule, seed: int) -> list[Entry]:
    without = sum("patient" not in e.extra for e in about)
    if without:
        hint = "index with --pattern '{dataset}/{patient}/...', or add it to the list"
        raise BadInput(f"rule {rule.name!r}: {without} of its {len(about)} volumes have no patient: {hint}")
    kept: list[Entry] = []
    for group in _groups(about, "dataset").values():
        patients = _groups(group, "patient")
        if rule.action == "keep_patients":
            chosen = sorted(patients, key=lambda p: _draw(seed, rule, str(p)))[: rule.value]
            kept += [e for p in chosen for e in patients[p]]
            continue
        fewest, most = rule.value
        for patient, own in patients.items():
            count = fewest + _draw(seed, rule, f"count of {patient}") % (most - fewest + 1)
            kept += _first_drawn(own, count, rule, seed)
    return kept


def curate(list_path: Path, rules_path: str | Path, output: Path, explain: bool, say: Say) -> int:
    """Apply a rules file to a list and write what it keeps; returns 0.

    Raises:
        BadInput: List or rules cannot be read or used, nothing is left, or the output cannot be written.
    """
    rules, datalist = read_rules(rules_path), read_datalist(list_path)
    entries = datalist.entries
    if explain:
        say(f"{'':40} {len(entries):>9,}   {_counts(entries)}")
    for rule in rules.rules:
        kept = apply_rule(entries, rule, rules.seed)
        if explain:
            say(f"{rule.name[:40]:40} {len(kept):>9,}   {_counts(kept)}   ({len(entries) - len(kept):,} left out)")
        entries = kept
    if explain:
        for line in compare(entries, rules.expected):
            say(line)
    if not entries:
        raise BadInput(f"{list_path}: the rules of {rules.path} leave none of its {len(datalist)} volumes (--explain says why)")
    try:
        write_datalist(output, (e.as_item() for e in entries))
    except OSError as err:
        raise BadInput(f"{output}: {err.strerror}: choose another --output") from err
    say(f"{output}: {len(entries):,} of {len(datalist):,} volumes")
    return EXIT_OK


def _counts(entries: list[Entry]) -> str:
    by_modality = Counter(str(e.extra.get("modality", "unknown")) for e in entries)
    return ", ".join(f"{name} {count:,}" for name, count in by_modality.most_common())


def compare(entries: list[Entry], expected: dict[str, Any]) -> list[str]:
    """What the rules file expects beside what is there, a line each; nothing where too few of the data sets are there."""
    if not expected:
        return []
    num_datasets = len(_groups(entries, "dataset"))
    if num_datasets < expected.get("datasets", 0):
        return [f"{num_datasets} of {expected['datasets']} data sets are here: the expected numbers are not compared"]
    by_modality = Counter(e.extra.get("modality") for e in entries)
    pairs = [("volumes", len(entries), expected.get("total"))]
    pairs += [(name, by_modality[name], count) for name, count in expected.get("modality", {}).items()]
    above = sum(min(e.shape[:3]) > _HIGH_RES_SLICES for e in entries)
    pairs.append((f"above {_HIGH_RES_SLICES} slices", above, expected.get("slices_above_48")))
    return [
        f"{name:18} {found:>9,} found, {count:,} expected{'' if found == count else ': differs'}"
        for name, found, count in pairs
        if count is not None
    ]
