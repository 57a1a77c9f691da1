"""Whoever is killed, and whenever: the store opens as the old or as the new version, and the next command cleans up."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cdl_edge.artefacts.bundle import CURRENT, VERSIONS, open_bundle
from cdl_edge.artefacts.layout import MANIFEST
from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.updates.packs import create, install, listed, rollback
from cdl_edge.updates.store import STATE, locked, sequence_of

WRITES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
IMAGE = np.full((1, 8, 8, 3), 40, np.uint8)


@pytest.fixture
def device(make_version, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and only a power cut would show that it is missing
    v = [make_version(i) for i in range(3)]
    packs = [tmp_path / f"{i}.pack" for i in range(2)]
    for i, pack in enumerate(packs):
        create(v[i], v[i + 1], pack)
    names = [open_bundle(b).manifest.document["manifest_sha256"][:16] for b in v]
    return SimpleNamespace(packs=packs, names=names, answers=[answer(b) for b in v], v=v, root=tmp_path)


def answer(bundle: Path) -> bytes:
    with load(bundle, threads=1) as runner:  # verifies every hash
        return runner.infer(IMAGE).tobytes()


def steps(action: Callable[[], object], kill_at: int | None = None, after: float | None = None) -> tuple[int, int]:
    """Run `action` in a child: (changes of the filesystem, exit status). kill_at: SIGKILL before that change."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in WRITES or writes:
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(watch)
        try:
            action()
            os.write(writing, count.to_bytes(4, "little"))
            os._exit(0)
        finally:
            os._exit(9)
    os.close(writing)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    told = os.read(reading, 4)
    os.close(reading)
    return int.from_bytes(told, "little"), os.waitpid(child, 0)[1]


def check(bundle: Path, device: SimpleNamespace, versions: tuple[int, ...]) -> int:
    """Which of the versions runs: its manifest, all its hashes and its answer belong together."""
    name = open_bundle(bundle).manifest.document["manifest_sha256"][:16]
    which = device.names.index(name)
    assert which in versions
    assert answer(bundle) == device.answers[which]
    assert [e["version"] for e in listed(bundle) if e["current"]] == [name]
    return which


def prepared(device: SimpleNamespace, number: int, name: str) -> Path:
    """A plain bundle (0), or a store with version 1 on version 0."""
    bundle = Path(shutil.copytree(device.v[0], device.root / name))
    if number:
        install(device.packs[0], bundle, threads=1)
    return bundle


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_killed_before_any_single_change(device, number):
    bundle = prepared(device, number, "counted")
    count, status = steps(lambda: install(device.packs[number], bundle, threads=1))
    assert status == 0 and count > 15
    seen = []
    for kill_at in range(count):
        bundle = prepared(device, number, f"killed{kill_at}")
        _, status = steps(lambda b=bundle: install(device.packs[number], b, threads=1), kill_at)
        assert os.WTERMSIG(status) == signal.SIGKILL
        seen.append(check(bundle, device, (number, number + 1)))
        if seen[-1] == number:
            install(device.packs[number], bundle, threads=1)
        else:
            rollback(bundle, threads=1)
            rollback(bundle, device.names[number + 1], threads=1)
        assert check(bundle, device, (number + 1,)) == number + 1
        rollback(bundle, threads=1)
        assert sorted(p.name for p in bundle.iterdir()) == [CURRENT, STATE, VERSIONS]
        kept = {p.name for p in (bundle / VERSIONS).iterdir()}
        assert kept == set(device.names[: number + 2])
        shutil.rmtree(bundle)
    assert seen == sorted(seen) and set(seen) == {number, number + 1}, "one moment decides"


@pytest.mark.slow
def test_killed_at_random_moments(device):
    rng = random.Random(0)
    begin = time.perf_counter()
    bundle = prepared(device, 0, "device")
    steps(lambda: install(device.packs[0], bundle, threads=1))
    longest = time.perf_counter() - begin
    shutil.rmtree(bundle)
    for _ in range(15):
        bundle = prepared(device, 0, "device")
        steps(lambda b=bundle: install(device.packs[0], b, threads=1), after=rng.uniform(0, longest))
        if check(bundle, device, (0, 1)) == 0:
            install(device.packs[0], bundle, threads=1)
        assert check(bundle, device, (1,)) == 1
        shutil.rmtree(bundle)


@pytest.mark.slow
def test_a_killed_rollback(device):
    bundle = prepared(device, 1, "counted")
    count, status = steps(lambda: rollback(bundle, threads=1))
    assert status == 0 and check(bundle, device, (0,)) == 0
    for kill_at in range(count):
        bundle = prepared(device, 1, f"killed{kill_at}")
        steps(lambda b=bundle: rollback(b, threads=1), kill_at)
        check(bundle, device, (0, 1))
        assert len(listed(bundle)) == 2


def test_one_command_at_a_time(device):
    bundle = prepared(device, 0, "device")
    with locked(bundle):
        for command in (lambda: install(device.packs[0], bundle), lambda: rollback(bundle)):
            with pytest.raises(InputError, match="another command is changing it"):
                command()
        assert len(listed(bundle)) == 1, "reading waits for nobody"
    install(device.packs[0], bundle, threads=1)


def test_a_reader_keeps_the_version_that_it_opened(device):
    bundle = prepared(device, 1, "device")
    opened = open_bundle(bundle)
    install(device.packs[1], bundle, threads=1)
    with load(opened, threads=1) as runner:
        assert runner.infer(IMAGE).tobytes() == device.answers[1]
    assert opened.manifest.document["manifest_sha256"][:16] == opened.path.name == device.names[1]
    assert answer(bundle) == device.answers[2]


def test_a_plain_bundle_lists_itself_and_stays_plain(device, contents):
    bundle = prepared(device, 0, "device")
    before = contents(bundle)
    (entry,) = listed(bundle)
    assert (entry["version"], entry["current"], entry["sequence"]) == (device.names[0], True, 1795219200)
    assert entry["sequence"] == sequence_of(open_bundle(bundle).manifest)
    with pytest.raises(InputError, match="nothing to go back to"):
        rollback(bundle)
    assert contents(bundle) == before
    with pytest.raises(InputError, match="no such bundle"), locked(bundle / "nothing"):
        pass


def test_files_that_are_not_ours_stay(device):
    bundle = prepared(device, 0, "device")
    (bundle / "notes.txt").write_text("mine")
    (bundle / VERSIONS).mkdir()
    (bundle / VERSIONS / "notes.txt").write_text("mine too")
    install(device.packs[0], bundle, threads=1)
    install(device.packs[1], bundle, threads=1)
    assert (bundle / "notes.txt").read_text() == "mine"
    assert (bundle / VERSIONS / "notes.txt").read_text() == "mine too"
    assert not (bundle / MANIFEST).exists()


def test_what_somebody_puts_in_place_of_the_plain_files_stays(device):
    """A newer bundle that was copied over a store, say: the next command removed it without a word."""
    bundle = prepared(device, 0, "device")
    install(device.packs[0], bundle, threads=1)
    mine = [MANIFEST, "prompts.bin"]
    for name in mine:
        (bundle / name).unlink()
        (bundle / name).write_bytes(b"mine")
    install(device.packs[1], bundle, threads=1)
    assert [(bundle / name).read_bytes() for name in mine] == [b"mine", b"mine"]
    assert not (bundle / "student.onnx").exists() and check(bundle, device, (2,)) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_after_the_rename_nothing_fails_any_more(device, monkeypatch, number):
    """A full disk then made it say that nothing had changed, and the new version ran."""
    bundle = prepared(device, 1, "device")
    replace, late = os.replace, []

    def full(source, target):
        if late and Path(target).name == STATE:
            raise OSError(number, os.strerror(number))
        replace(source, target)
        if Path(target).name == CURRENT:
            late.append(target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        done = install(device.packs[1], bundle, threads=1)
    assert late and done["version"] == device.names[2] and check(bundle, device, (2,)) == 2
    assert [v["version"] for v in listed(bundle)][-1] == device.names[2]
    assert rollback(bundle, threads=1)["version"] == device.names[1]
    assert check(bundle, device, (1,)) == 1


def test_a_store_that_lost_its_past_runs_but_takes_nothing(device, contents):
    bundle = prepared(device, 1, "device")
    text = (bundle / STATE).read_text()
    for wrong in (None, "", "{}", "[]", text.replace('"sequence": 17', '"sequence": 16'), text[:-1]):
        (bundle / STATE).unlink(missing_ok=True)
        if wrong is not None:
            (bundle / STATE).write_text(wrong)
        before = contents(bundle)
        for command in (lambda: install(device.packs[1], bundle), lambda: rollback(bundle), lambda: listed(bundle)):
            with pytest.raises(InputError, match="does not know its past"):
                command()
        assert contents(bundle) == before
        assert answer(bundle) == device.answers[1]


def test_a_link_set_by_hand_does_not_lower_the_sequence(device):
    bundle = prepared(device, 1, "device")
    (bundle / CURRENT).unlink()
    (bundle / CURRENT).symlink_to(f"{VERSIONS}/{device.names[0]}")
    with pytest.raises(InputError, match="a replay"):
        install(device.packs[0], bundle, threads=1)
    assert check(bundle, device, (0,)) == 0


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_umask_says_who_may_read_a_store(device, umask, file, folder):
    before = os.umask(umask)
    try:
        bundle = prepared(device, 0, f"store of {umask:o}")
        for path in bundle.rglob("*"):
            path.chmod(file)
        install(device.packs[0], bundle, threads=1)
    finally:
        os.umask(before)
    assert (bundle / STATE).is_file()
    for path in bundle.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path
