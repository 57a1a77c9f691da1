"""A folder that is being filled: every picture once, when it is whole."""

import os

from cdl_edge.streams.folder import Folder


class Steps:
    """A pause that does something in the folder each time, and ends when nothing is left to do."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def __call__(self, seconds):
        if not self.steps:
            return True
        self.steps.pop(0)()
        return False


def read_all(folder, steps):
    opened = folder.open()
    found = []
    while (shot := opened.read(steps)) is not None:
        found.append(shot.picture.relative_to(folder.path).as_posix())
    return found


def write(path, content=b"picture", at=None):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if at is not None:
        os.utime(path, (at, at))


def nothing():
    """Time passes."""


def test_what_is_there_comes_oldest_first_then_what_comes(tmp_path):
    for name, at in (("b.jpg", 1), ("c.jpg", 3), ("a.jpg", 2)):
        write(tmp_path / name, at=at)
    write(tmp_path / "notes.txt")
    write(tmp_path / ".d.jpg")
    steps = Steps(nothing, lambda: write(tmp_path / "today" / "e.jpg"), nothing, nothing)
    assert read_all(Folder(tmp_path), steps) == ["b.jpg", "a.jpg", "c.jpg", "today/e.jpg"]


def test_a_file_that_grows_waits_until_it_is_whole(tmp_path):
    grown = []

    def grow():
        grown.append(0)
        write(tmp_path / "a.jpg", b"x" * len(grown))

    folder = Folder(tmp_path)
    opened = folder.open()
    steps = Steps(grow, grow, grow, nothing)
    assert opened.read(steps).picture.name == "a.jpg"
    assert steps.steps == [] and len(grown) == 3


def test_a_file_that_is_written_anew_comes_again(tmp_path):
    steps = Steps(
        lambda: write(tmp_path / "now.jpg", at=1), nothing, lambda: write(tmp_path / "now.jpg", at=2), nothing, nothing
    )
    assert read_all(Folder(tmp_path), steps) == ["now.jpg", "now.jpg"]


def test_nothing_is_remembered_of_what_is_gone(tmp_path):
    folder = Folder(tmp_path)
    write(tmp_path / "a.jpg", at=1)
    write(tmp_path / "b.jpg", at=2)
    steps = Steps(nothing, lambda: (tmp_path / "a.jpg").unlink(), nothing)
    assert read_all(folder, steps) == ["a.jpg", "b.jpg"]
    assert [path.name for path in folder._seen] == ["b.jpg"]


def test_a_disk_that_was_taken_away_and_came_back_gives_nothing_twice(tmp_path):
    """What is left of it meanwhile is the empty folder on which it was mounted."""
    place = tmp_path / "mounted"
    write(place / "a.jpg", at=1)

    def away():
        place.rename(tmp_path / "disk")
        place.mkdir()

    def back():
        place.rmdir()
        (tmp_path / "disk").rename(place)
        write(place / "b.jpg", at=2)

    assert read_all(Folder(place), Steps(nothing, away, nothing, back, nothing, nothing)) == ["a.jpg", "b.jpg"]


def test_a_folder_that_is_gone_is_lost_and_gives_nothing_twice(tmp_path):
    folder = Folder(tmp_path / "mounted")
    write(tmp_path / "mounted" / "a.jpg", at=1)
    opened = folder.open()
    assert opened.read(Steps(nothing)).picture.name == "a.jpg"
    (tmp_path / "mounted").rename(tmp_path / "away")
    assert opened.read(Steps(nothing)) is None and not folder.ends(opened)
    (tmp_path / "away").rename(tmp_path / "mounted")
    write(tmp_path / "mounted" / "b.jpg", at=2)
    assert read_all(folder, Steps(nothing, nothing)) == ["b.jpg"]
