"""Writes that are whole or absent."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from cdl_edge import files
from cdl_edge.errors import InputError
from cdl_edge.files import atomic_file, atomic_folder, sha256, write_json, write_text


class Interrupted(Exception):
    pass


def write_and_fail(context, error, inside=""):
    """Write something in an atomic context (into `inside` of a folder), then raise."""
    with context as temporary:
        (temporary / inside if inside else temporary).write_text("half")
        raise error


def test_atomic_file_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
            assert temporary.stat().st_dev == path.parent.stat().st_dev  # a rename, never a copy
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_atomic_file_keeps_the_old_content_on_error(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_and_fail(atomic_file(path), error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_that_never_was_stays_absent(tmp_path):
    with pytest.raises(Interrupted):
        write_and_fail(atomic_file(tmp_path / "a"), Interrupted)
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_atomic_folder_replaces_the_whole_folder(tmp_path):
    path = tmp_path / "bundle"
    for name in ("one", "two"):
        with atomic_folder(path, lambda _: None) as temporary:
            (temporary / name).write_text(name)
        assert [p.name for p in path.iterdir()] == [name]
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_atomic_folder_keeps_the_old_folder_on_error(tmp_path, error):
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "a").write_text("old")
    with pytest.raises(error):
        write_and_fail(atomic_folder(path, lambda _: None), error, "a")
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_folder_puts_the_old_one_back_when_the_move_fails(tmp_path, monkeypatch):
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "a").write_text("old")
    real = os.replace

    def replace(source, target):
        if Path(source).name == "new":
            raise PermissionError("disk says no")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(InputError, match="disk says no"), atomic_folder(path, lambda _: None) as temporary:
        (temporary / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip_keeps_the_order_of_keys(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None], "a": "é"})
    assert json.loads(path.read_text()) == {"b": [1, None], "a": "é"}
    assert path.read_text().index('"b"') < path.read_text().index('"a"')
    assert path.read_text().endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))  # no other program reads NaN in JSON
    with pytest.raises(TypeError):
        write_json(path, Path("x"))
    assert path.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "a", "Kåre\n")
    assert (tmp_path / "a").read_bytes() == "Kåre\n".encode()


def test_sha256_of_a_file_larger_than_a_block(tmp_path):
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with open(tmp_path / "a", "rb") as stream:
        assert files._slow(stream) == hashlib.sha256(content).hexdigest()  # what Python 3.10 uses


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_place_that_cannot_be_written_to(tmp_path, write):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"), write(tmp_path / "file" / "x"):
        pass
    with pytest.raises(InputError, match="directory"), atomic_file(tmp_path):  # an empty one too
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
