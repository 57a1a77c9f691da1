"""Writes that are whole or absent."""

import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from cdl_edge import files
from cdl_edge.errors import InputError
from cdl_edge.files import atomic_file, atomic_folder, check_out, sha256, workspace, write_json, write_text


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


def killed_while(parent, moved_aside=None):
    """A child that is killed in a workspace of `parent`; with `moved_aside` after that folder was moved into it."""
    child = os.fork()
    if child == 0:
        with workspace(parent, moved_aside.name if moved_aside else "") as work:
            (work / "half").write_text("half")
            if moved_aside:
                os.replace(moved_aside, work / "old")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    killed_while(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "a", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_had_moved_aside_comes_back(tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "a").write_text("old")
    killed_while(tmp_path, bundle)
    assert not bundle.exists()
    write_text(tmp_path / "x", "x")
    assert (bundle / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "x"]


def test_only_leftovers_that_are_ours_go(tmp_path):
    for name, owner in ((".cdl-edge-mine", None), (".cdl-edge-other", "somebody"), (".cdl-edge", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
        if owner:
            (tmp_path / name / files.OWNER).write_text(owner)
    (tmp_path / ".cdl-edge-file").write_text("a file")
    with workspace(tmp_path) as alive:
        (alive / "half").write_text("in use")
        write_text(tmp_path / "a", "x")
        assert (alive / "half").read_text() == "in use"
        assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 8
    assert not alive.exists()


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_umask_has_the_last_word(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a", "x")
        with atomic_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == file
    assert (tmp_path / "b").stat().st_mode & 0o777 == folder


def test_a_full_disk_is_one_message(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    for error, kind in (
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (OSError(errno.ENOENT, ""), OSError),
    ):
        with pytest.raises(kind):
            write_and_fail(atomic_file(path), error)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_name_that_no_filesystem_takes(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / ("n" * 300), "x")
    assert list(tmp_path.iterdir()) == []


def test_what_comes_in_while_it_is_replaced_stays(tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "ours").write_text("old")

    def foreign(path):
        return "something else" if {p.name for p in path.iterdir()} != {"ours"} else None

    def replace(content):
        with atomic_folder(bundle, foreign) as temporary:
            (temporary / "ours").write_text("new")
            (bundle / "thesis.txt").write_text(content)

    with pytest.raises(InputError, match="something else"):
        replace("years of work")
    assert {p.name: p.read_text() for p in bundle.iterdir()} == {"ours": "old", "thesis.txt": "years of work"}
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_the_rule_of_every_out(tmp_path):
    check_out(tmp_path / "new", "a bundle")
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", "a bundle")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    for name in ("link", "full"):
        with pytest.raises(InputError, match="not just a bundle"):
            check_out(tmp_path / name, "a bundle", replace=True)
    with pytest.raises(InputError, match="--force"):
        check_out(tmp_path / "full", "a bundle", lambda _: None)
    check_out(tmp_path / "full", "a bundle", lambda _: None, replace=True)


def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    """There is room for a name, and none for a byte."""
    handles = len(os.listdir("/proc/self/fd"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(InputError, match="No space left"), workspace(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == handles
