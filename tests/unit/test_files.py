"""Files that are whole or not there, JSON without NaN, paths in lists."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dinov2.files import path_for_list, path_in_list, replacing, to_json, write_json, write_text


def test_a_block_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_text("earlier")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.name.endswith(".nii.gz")  # writers choose the format by it
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == "earlier"


def test_the_name_appears_only_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as temporary:
        temporary.write_text("{}")
        assert not path.exists()
    assert path.read_text() == "{}" and list(tmp_path.iterdir()) == [path]


def test_private_names_of_two_processes_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for pid in (11, 12):
        monkeypatch.setattr("dinov2.files.os.getpid", lambda pid=pid: pid)
        with replacing(tmp_path / "a", private=True) as temporary:
            temporary.write_text(str(pid))
            names.append(temporary)
    assert names[0] != names[1]


def test_what_json_does_not_know_becomes_null_at_any_depth(tmp_path: Path) -> None:
    content = {"dice": [0.5, math.nan, (math.inf, -math.inf)], "by_class": {"liver": math.nan}, "n": 3, "none": None}
    write_json(tmp_path / "results.json", content)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "dice": [0.5, None, [None, None]],
        "by_class": {"liver": None},
        "n": 3,
        "none": None,
    }
    assert to_json(1.5) == "1.5"


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    write_text(tmp_path / "a.txt", "Schädel")
    assert (tmp_path / "a.txt").read_bytes() == "Schädel".encode()


@pytest.mark.parametrize(
    "image, folder, listed",
    [
        ("/set/lists/scans/a.nii", "/set/lists", "scans/a.nii"),
        ("/set/imagesTr/a.nii", "/set/lists/fold0", "../../imagesTr/a.nii"),
        ("/other/a.nii", "/set/lists", "/other/a.nii"),  # nothing in common but the root
        ("/set/..a.nii", "/set", "..a.nii"),  # a name that begins with dots
    ],
)
def test_lists_name_files_relative_to_their_folder_where_they_can(image: str, folder: str, listed: str) -> None:
    assert path_for_list(image, folder) == listed
    assert path_in_list(listed, folder) == image


def test_a_list_and_its_data_move_together(tmp_path: Path) -> None:
    image = tmp_path / "one" / "images" / "a.nii"
    image.parent.mkdir(parents=True)
    image.touch()
    listed = path_for_list(image, tmp_path / "one" / "lists")
    (tmp_path / "one").rename(tmp_path / "two")
    assert Path(path_in_list(listed, tmp_path / "two" / "lists")).exists()


def test_a_list_reached_through_a_link_finds_its_data(tmp_path: Path) -> None:
    """`..` of a linked folder is another folder than that of the link's name."""
    (tmp_path / "disk" / "lists").mkdir(parents=True)
    (tmp_path / "disk" / "a.nii").touch()
    (tmp_path / "home").mkdir()
    link = tmp_path / "home" / "lists"
    link.symlink_to(tmp_path / "disk" / "lists")
    listed = path_for_list(tmp_path / "disk" / "a.nii", tmp_path / "disk" / "lists")
    assert listed == "../a.nii" and Path(path_in_list(listed, link)).exists()
    (tmp_path / "home" / "b.nii").touch()
    for image in (tmp_path / "disk" / "a.nii", tmp_path / "home" / "b.nii"):  # written through the link
        assert path_in_list(path_for_list(image, link), link) == str(image)
