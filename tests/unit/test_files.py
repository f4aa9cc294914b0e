"""Files that are whole or not there, JSON without NaN, paths in lists."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from pathlib import Path

import pytest

from dinov2.errors import BadInput
from dinov2.files import (
    lock,
    path_for_list,
    path_in_list,
    read_json,
    read_text,
    replacing,
    to_json,
    user_path,
    words,
    write_json,
    write_text,
)


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


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a device"])
def test_what_is_no_file_is_never_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link to a device": lambda: path.symlink_to("/dev/null")}[kind]()
    before = path.lstat().st_mode
    with pytest.raises(BadInput, match=r"a\.json: is (a folder|no regular file)"):
        write_text(path, "{}")
    assert path.lstat().st_mode == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    target = tmp_path / "b.json"
    target.symlink_to(tmp_path / "new.json")  # a link to nothing yet is a name like any other
    write_text(target, "{}")
    assert target.read_text() == "{}"


def test_words_of_a_command_line_have_their_tildes_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    given = ["~/a", "--flag=~/b", "train.x=~/c", "~", "a~/b", "--pattern=*~", "/a=b/~/c", "x=y=~/z", "--n=3"]
    expanded = ["/home/u/a", "--flag=/home/u/b", "train.x=/home/u/c", "/home/u", *given[4:]]
    assert words(given) == expanded and words(expanded) == expanded
    assert path_in_list("~/scans/a.nii", "/lists") == "/home/u/scans/a.nii"
    for bad in ("a\udce9.nii", "a\0.nii"):
        for door in (user_path, lambda path: path_in_list(path, "/lists"), lambda path: words([f"--output={path}"])):
            with pytest.raises(BadInput, match="not in UTF-8: rename it"):
                door(bad)


UNREADABLE = {
    "latin-1": ('{"name": "Sch\xe4del"}'.encode("latin-1"), "is not in UTF-8 .*line 1.*Latin-1: save it as UTF-8"),
    "utf-16": ('{"name": "a"}'.encode("utf-16"), "is in UTF-16: save it as UTF-8"),
    "utf-16 without a mark": ('{"name": "a"}'.encode("utf-16-le"), "is no text, or in UTF-16"),
    "deep": (b"[" * 200_000, "is not valid JSON.*nested too deeply"),
    "deep object": (b'{"a":' * 200_000, "is not valid JSON.*nested too deeply"),
    "huge number": (b'{"spacing": [1' + b"0" * 400 + b", 1, 1]}", "is not valid JSON.*a number of 401 digits"),
    "longer number": (b"[" + b"9" * 10_000 + b"]", "is not valid JSON.*a number of 10000 digits"),
    "half": (b'{"name": ', "is not valid JSON, perhaps half-written"),
    "empty": (b"", "is not valid JSON"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    content, words_of = UNREADABLE[name]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInput, match=f"a.json:? {words_of}") as refusal:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(refusal.value)


def test_a_mark_of_byte_order_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"name": "Sch\xc3\xa4del"}\r\n')
    assert read_json(tmp_path / "a.json") == {"name": "Schädel"}
    assert read_text(tmp_path / "a.json").endswith("}\r\n")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**20 + 1)
    for name, words_of in (
        ("pipe", "no regular file"), ("zeros", "no regular file"), ("large", "longer than the 1 MiB"), ("", "Is a directory"),
        ("gone", "No such file or directory: make it"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=words_of):
            read_text(tmp_path / name, advice="make it", most_bytes=2**20)


def test_a_lock_is_waited_for_while_what_a_killed_run_has_started_ends(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a") as first:
        assert lock(first)
        child = subprocess.Popen(["sleep", "1"], pass_fds=[first.fileno()])
    with (tmp_path / ".lock").open("a") as second:
        assert not lock(second, patience=0.2)
        began = time.monotonic()
        assert lock(second)
        assert 0.5 < time.monotonic() - began < 5
    child.wait()
