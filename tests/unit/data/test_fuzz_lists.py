"""Any list is read or refused in a line."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2.data import Datalist, read_datalist
from dinov2.data.downstream.lists import SPLITS, datalist_path, read_downstream_datalist, with_tertiles
from dinov2.data.downstream.recipes import Recipe
from dinov2.errors import BadInput
from tests.conftest import BUNDLED
from tests.fuzzing import SETTINGS, documents, for_a_minute, works_or_is_refused

SCAN = {"image": "a.nii.gz", "shape": [4, 5, 6], "spacing": [1, 1.5, 2], "axes": "xyzc", "channel": 0, "patient": "p"}
RECIPES = [
    Recipe(classes={0: "no", 1: "yes"}, name="any"),
    Recipe(task="classification", classes={0: "no", 1: "yes"}, name="any"),
    Recipe(task="classification", bins="tertiles", name="any"),
    Recipe(task="regression", name="any"),
]
DELICATE = st.sampled_from(
    ["", ".", "..", "/", "a\nb", "\x00", "\ud800", "\x1b[2J", "a" * 300, "a/" * 3000, "a.nii.gz", "//", True, False, [], {}]
)
TEXTS = st.sampled_from(
    [
        "",
        "[",
        "[" * 100_000,
        '{"a":' * 100_000,
        "NaN",
        "[NaN]",
        "1" * 5000,
        '"\\ud800"',
        "\ufeff[]",
        "[1,]",
        "null",
        "[[]]",
        "[{}]",
    ]
)


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> str:
    """JSON in which some places hold something else, or are gone, or are doubled."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, 3))):
        node, path = content, draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))
        for step in path:
            if not isinstance(node, (dict, list)) or not node:
                break
            place = (list(node) if isinstance(node, dict) else range(len(node)))[step % len(node)]
            if step == path[-1] or not isinstance(node[place], (dict, list)):
                action = draw(st.integers(0, 5))
                if action == 0:
                    del node[place]
                elif action == 1 and isinstance(node, list):
                    node.append(copy.deepcopy(node[place]))
                else:
                    node[place] = draw(DELICATE | documents)
                break
            node = node[place]
    text = json.dumps(content)
    if draw(st.integers(0, 5)) == 0:
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.text(max_size=3)) + text[place + draw(st.integers(0, 3)) :]
    return text


def texts(valid: Any) -> st.SearchStrategy[str]:
    return mutated(valid) | mutated(valid) | documents.map(json.dumps) | TEXTS | st.text(max_size=20)


def labelled(task: str) -> dict[str, Any]:
    """A valid list of a task, two cases a part."""
    labels = {"segmentation": lambda i: f"{i}.nii.gz", "classification": lambda i: i % 2, "regression": lambda i: i + 0.5}
    rows = [{"image": f"scan{i}.nii.gz", "label": labels[task](i), "case": f"c{i}", "patient": f"p{i}"} for i in range(9)]
    return {"shuffle_seed": 0, **{split: rows[3 * k : 3 * k + 3] for k, split in enumerate(SPLITS)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the valid lists name."""
    folder = tmp_path_factory.mktemp("lists")
    for i in range(9):
        for name in (f"scan{i}.nii.gz", f"{i}.nii.gz"):
            shutil.copy(BUNDLED / "sub-01_T1w_2mm.nii.gz", folder / name)
    return folder


@pytest.mark.slow
def test_any_list_of_scans_is_read_or_refused_in_a_line(folder: Path) -> None:
    @SETTINGS
    @given(text=texts([SCAN, {**SCAN, "image": "b.nii.gz", "shape": [4, 5, 6, 7], "axes": "xyzt"}]))
    def claim(text: str) -> None:
        (folder / "list.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        found = works_or_is_refused(lambda: read_datalist(folder / "list.json"))
        if isinstance(found, Datalist):
            works_or_is_refused(lambda: found.larger_than(3))

    for_a_minute(claim, parts=2)


@pytest.mark.slow
def test_any_labelled_list_is_read_or_refused_in_a_line(folder: Path) -> None:
    @SETTINGS
    @given(case=st.sampled_from(RECIPES).flatmap(lambda recipe: st.tuples(st.just(recipe), texts(labelled(recipe.task)))))
    def claim(case: tuple[Recipe, str]) -> None:
        recipe, text = case
        datalist_path(folder, recipe).write_bytes(text.encode("utf-8", "surrogatepass"))
        found = works_or_is_refused(lambda: read_downstream_datalist(folder, with_tertiles(recipe, folder)))
        assert isinstance(found, BadInput) or all(found[split] for split in SPLITS)

    for_a_minute(claim, parts=2)
