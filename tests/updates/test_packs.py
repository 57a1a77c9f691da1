"""A pack makes the new bundle out of the old one, and whatever is wrong with it changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.artefacts.layout import MANIFEST
from cdl_edge.artefacts.manifest import canonical, sealed
from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.updates import packs
from cdl_edge.updates.packfile import open_pack, write_pack
from cdl_edge.updates.packs import create, install, listed, rollback
from cdl_edge.updates.store import STATE


@pytest.fixture
def device(make_version, tmp_path):
    """v: bundles 0-3 of one backbone, packs[i]: v[i] -> v[i + 1], bundle: a copy of v[0]."""
    v = [make_version(i) for i in range(4)]
    made = []
    for i in range(3):
        create(v[i], v[i + 1], tmp_path / f"{i}.pack")
        made.append(tmp_path / f"{i}.pack")
    return SimpleNamespace(v=v, packs=made, bundle=Path(shutil.copytree(v[0], tmp_path / "device")))


def version(bundle: Path) -> str:
    return open_bundle(bundle, verify=False).manifest.document["manifest_sha256"][:16]


def refused(contents, pack: Path, bundle: Path, *words: str, **options) -> None:
    """Nothing that is there changes: no file, no link, no folder."""
    before, folders = contents(bundle), sorted(bundle.rglob("*"))
    with pytest.raises(InputError) as caught:
        install(pack, bundle, threads=1, **options)
    for word in (*words, "do:"):
        assert word in str(caught.value), str(caught.value)
    assert contents(bundle) == before and sorted(bundle.rglob("*")) == folders


def answers(bundle: Path) -> np.ndarray:
    with load(bundle, threads=1) as runner:
        return runner.infer(np.full((1, 8, 8, 3), 40, np.uint8))


@pytest.mark.slow
def test_from_version_to_version(device, contents):
    first = install(device.packs[0], device.bundle, threads=1)
    assert (first["previous"], first["version"]) == (version(device.v[0]), version(device.v[1]))
    assert first["signature"] == "none" and first["self_test"]["fp32"]["images"] == 2
    second = install(device.packs[1], device.bundle, threads=1)
    opened = open_bundle(device.bundle)
    assert opened.manifest == open_bundle(device.v[2]).manifest, "the very bundle, and the workshop's own hash of it"
    assert contents(opened.path) == contents(device.v[2])
    assert np.array_equal(answers(device.bundle), answers(device.v[2]))
    assert second["version"] == opened.path.name
    kept = [version(v) for v in device.v[:3]]
    assert [e["version"] for e in listed(device.bundle)] == kept
    assert [e["current"] for e in listed(device.bundle)] == [False, False, True]
    assert [e["classes"] for e in listed(device.bundle)] == [4, 5, 6]
    assert sorted(p.name for p in device.bundle.iterdir()) == ["current", STATE, "versions"]
    frozen = [(device.bundle / "versions" / name / "backbone.bin").stat().st_ino for name in kept]
    assert len(set(frozen)) == 1, "what did not change is one file under three names"
    install(device.packs[2], device.bundle, threads=1)
    assert [e["version"] for e in listed(device.bundle)] == [version(v) for v in device.v[1:]], "two old ones are kept"
    assert len(list((device.bundle / "versions").iterdir())) == 3


@pytest.mark.slow
def test_rollback_and_what_may_come_after(device, contents, make_version, tmp_path):
    with pytest.raises(InputError, match="nothing to go back to") as caught:
        rollback(device.bundle)
    assert "do:       install a pack first" in str(caught.value), "no version is named where none is kept"
    for pack in device.packs[:2]:
        install(pack, device.bundle, threads=1)
    assert rollback(device.bundle, threads=1)["version"] == version(device.v[1])
    assert rollback(device.bundle, threads=1)["version"] == version(device.v[0])
    with pytest.raises(InputError, match="nothing to go back to") as caught:
        rollback(device.bundle)
    assert f"one of {version(device.v[1])}, {version(device.v[2])}" in str(caught.value)
    assert f"do:       cdl-edge pack rollback {device.bundle} --to VERSION" in str(caught.value)
    assert np.array_equal(answers(device.bundle), answers(device.v[0]))
    refused(contents, device.packs[0], device.bundle, "rolled back from")
    with pytest.raises(InputError, match="no other version 'abc'"):
        rollback(device.bundle, "abc")
    again = version(device.v[2])
    assert rollback(device.bundle, again[:8], threads=1) | {"self_test": None} == {
        "bundle": str(device.bundle),
        "version": again,
        "previous": version(device.v[0]),
        "self_test": None,
    }
    rollback(device.bundle, threads=1)
    # A pack with a higher number comes in; what was rolled back from is forgotten.
    create(device.v[1], device.v[2], tmp_path / "again.pack", sequence=2_000_000_000)
    install(tmp_path / "again.pack", device.bundle, threads=1)
    assert [e["version"] for e in listed(device.bundle)] == [version(v) for v in device.v[:3]]
    rollback(device.bundle, threads=1)
    create(device.v[1], device.v[3], tmp_path / "other.pack", sequence=2_000_000_001)
    install(tmp_path / "other.pack", device.bundle, threads=1)
    assert [e["version"] for e in listed(device.bundle)] == [version(device.v[i]) for i in (0, 1, 3)]


def test_a_damaged_old_version_is_not_run(device, contents):
    install(device.packs[0], device.bundle, threads=1)
    old = device.bundle / "versions" / version(device.v[0]) / "prompts.bin"
    old.write_bytes(bytes(old.stat().st_size))
    with pytest.raises(InputError, match="changed since it was written"):
        rollback(device.bundle)
    assert version(device.bundle) == version(device.v[1])


def test_a_damaged_old_version_is_listed(device, cli):
    """The list of versions is what somebody asks for to find out."""
    install(device.packs[0], device.bundle, threads=1)
    names = [version(device.v[i]) for i in (0, 1)]
    (device.bundle / "versions" / names[0] / "prompts.bin").unlink()
    old, new = listed(device.bundle)
    assert (old["version"], old["classes"], new["version"], new["damaged"]) == (names[0], None, names[1], None)
    assert "prompts.bin: missing" in old["damaged"]
    assert f"{names[0]}  damaged: " in cli("pack", "list", device.bundle).out


def test_packs_for_something_else(device, contents, make_version, tmp_path):
    refused(contents, device.packs[1], device.bundle, "made for another version", version(device.v[0]))
    create(make_version(0, salt=1), make_version(1, salt=1), tmp_path / "other.pack")
    refused(contents, tmp_path / "other.pack", device.bundle, "for another backbone")
    install(device.packs[0], device.bundle, threads=1)
    refused(contents, device.packs[0], device.bundle, "already installed")
    install(device.packs[1], device.bundle, threads=1)
    refused(contents, device.packs[0], device.bundle, "a replay?")
    refused(contents, device.bundle / STATE, device.bundle, "truncated, changed, or no pack")


@pytest.mark.slow
def test_every_part_of_a_pack_and_of_a_store_is_under_a_hash(device, contents, tmp_path):
    install(device.packs[0], device.bundle, threads=1)
    packs.rollback(device.bundle, threads=1)
    packs.rollback(device.bundle, version(device.v[1]), threads=1)  # removes what is left of the plain bundle
    content = device.packs[1].read_bytes()
    damaged = tmp_path / "damaged.pack"
    for i in np.random.default_rng(0).integers(0, len(content), 40):
        damaged.write_bytes(content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :])
        refused(contents, damaged, device.bundle, "truncated, changed")
    own = device.bundle / "versions" / version(device.v[1])
    for file in (*own.iterdir(), device.bundle / STATE):
        whole = file.read_bytes()
        for i in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            refused(contents, device.packs[1], device.bundle, file.name)
        file.write_bytes(whole)
    for target in ("versions/../..", "/tmp", "versions/" + "0" * 16, version(device.v[1])):
        (device.bundle / "current").unlink()
        (device.bundle / "current").symlink_to(target)
        refused(contents, device.packs[1], device.bundle, "names no version of this store")
    (device.bundle / "current").unlink()
    (device.bundle / "current").symlink_to(f"versions/{own.name}")
    install(device.packs[1], device.bundle, threads=1)


def forged(pack: Path, out: Path, files=None, drop=(), **changes) -> Path:
    """A pack with other contents, all its hashes right."""
    with open_pack(pack) as opened:
        header = {k: opened.document[k] for k in ("name", "from", "to", "sequence", "backbone")}
        members = {n: (e["encoding"], opened.read(n)) for n, e in opened.document["files"].items() if n not in drop}
    write_pack(out, {**header, **changes}, members | (files or {}))
    return out


@pytest.mark.slow
def test_packs_that_contradict_themselves(device, contents, tmp_path):
    pack, out = device.packs[0], tmp_path / "forged.pack"
    manifest = open_bundle(device.v[1]).manifest.document

    def resealed(**changes) -> dict[str, tuple[str, bytes]]:
        return {MANIFEST: ("whole", canonical(sealed({**manifest, **changes})).encode())}

    def to(files: dict[str, tuple[str, bytes]]) -> str:
        return json.loads(files[MANIFEST][1])["manifest_sha256"]

    refused(contents, forged(pack, out, drop=("prompts.bin",)), device.bundle, "is neither in it nor in")
    refused(contents, forged(pack, out, {"more": ("whole", b"1")}), device.bundle, "does not list")
    refused(contents, forged(pack, out, {"student.onnx": ("delta", b"1")}), device.bundle, "a graph is stored as")
    refused(contents, forged(pack, out, {"selftest.npz": ("delta", b"1")}), device.bundle, "a difference to nothing")
    for name in ("prompts.bin", "student.onnx"):
        refused(contents, forged(pack, out, {name: ("whole", b"1")}), device.bundle, f"{name!r} is not the one")
    refused(contents, forged(pack, out, {"prompts.bin": ("delta", b"1")}), device.bundle, "does not fit")
    refused(contents, forged(pack, out, to="0" * 64), device.bundle, "is not that of 0000")
    for text in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000):
        refused(contents, forged(pack, out, {MANIFEST: ("whole", text)}), device.bundle, "contradicts itself")
    for changes in (
        {"files": []},
        {"graphs": {"student": "../evil"}},
        {"graphs": {"student": 3}},
        {"files": {**manifest["files"], "../evil": manifest["files"]["backbone.bin"]}},
        {"classes": ["one"]},
    ):
        files = resealed(**changes)
        refused(contents, forged(pack, out, files, to=to(files)), device.bundle)
    assert not (tmp_path / "evil").exists() and not (device.bundle.parent / "evil").exists()


def test_a_new_version_that_answers_otherwise_is_not_installed(device, contents, make_version, tmp_path, monkeypatch):
    wrong = open_bundle(make_version(5))
    files = {n: wrong.path / n for n in wrong.manifest.document["files"]}
    weights = np.fromfile(wrong.path / "prompts.bin", np.float32)
    wrong = write_bundle(tmp_path / "wrong", wrong.manifest.document, {**files, "prompts.bin": (weights * 2).tobytes()})
    with pytest.raises(InputError, match="the self-test fails"):
        create(device.v[0], wrong.path, tmp_path / "wrong.pack")
    monkeypatch.setattr(packs, "self_test", lambda *_: {})
    create(device.v[0], wrong.path, tmp_path / "wrong.pack")
    monkeypatch.undo()
    refused(contents, tmp_path / "wrong.pack", device.bundle, "the self-test fails")
    install(device.packs[0], device.bundle, threads=1)


def test_what_no_pack_can_be_made_of(device, make_version, tmp_path):
    out = tmp_path / "none.pack"
    for old, new, words in (
        (device.v[0], device.v[0], "nothing has changed"),
        (device.v[1], device.v[0], "not newer"),
        (device.v[0], make_version(1, salt=1), "another backbone"),
        (device.v[0], tmp_path / "nothing", "no such bundle"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            create(old, new, out)
        assert "do:" in str(caught.value) and "expected:" in str(caught.value)
    with pytest.raises(InputError, match="is a folder"):
        create(device.v[0], device.v[1], tmp_path)
    assert not out.exists()


def test_only_what_changed_travels_and_ranges_stay_in_the_workshop(make_version, tmp_path):
    old, new = make_version(0, classes=400), open_bundle(make_version(40, classes=400))
    files = {n: new.path / n for n in new.manifest.document["files"]}
    new = write_bundle(
        tmp_path / "new", {**new.manifest.document, "ranges": "ranges.npz"}, {**files, "ranges.npz": b"r" * 9}
    )
    made = create(old, new.path, tmp_path / "a.pack")
    assert {n: e["encoding"] for n, e in made["files"].items()} == {
        "manifest.json": "whole",
        "student.onnx": "whole",
        "prompts.bin": "delta",
        "selftest.npz": "whole",
    }
    assert made["files"]["prompts.bin"]["bytes"] < 0.5 * made["files"]["prompts.bin"]["of"]
    assert made["bundle_bytes"] == new.size_bytes - 9
    assert made["share"] == (tmp_path / "a.pack").stat().st_size / made["bundle_bytes"]
    create(old, new.path, tmp_path / "b.pack")
    assert (tmp_path / "a.pack").read_bytes() == (tmp_path / "b.pack").read_bytes()
    install(tmp_path / "a.pack", old, threads=1)
    assert open_bundle(old).manifest == new.manifest
    assert not (open_bundle(old).path / "ranges.npz").exists()
    # And on from there, by a pack that the workshop makes from the bundle with its ranges.
    create(new.path, make_version(41, classes=400), tmp_path / "c.pack")
    install(tmp_path / "c.pack", old, threads=1)


@pytest.mark.slow
def test_signatures(device, contents, make_key, tmp_path):
    (ours, public), (theirs, foreign) = ((key.private, key.public) for key in (make_key("ours"), make_key("theirs")))
    signed, by_others = [tmp_path / f"s{i}.pack" for i in range(2)], tmp_path / "theirs.pack"
    for i in range(2):
        create(device.v[i], device.v[i + 1], signed[i], key=ours)
    create(device.v[0], device.v[1], by_others, key=theirs)
    refused(contents, device.packs[0], device.bundle, "not signed", public_key=public)
    refused(contents, by_others, device.bundle, "signed by an unknown key", public_key=public)
    with open_pack(signed[0]) as pack:
        signature = pack.document["signature"]
    # A signature glued to another pack, and to the same one with another order.
    for changes in ({}, {"sequence": 2_000_000_000}):
        stolen = forged(device.packs[0], tmp_path / "stolen.pack", **(changes or {"name": "other"}))
        glue(stolen, signature)
        refused(contents, stolen, device.bundle, "wrong signature", public_key=public)
    assert install(signed[0], device.bundle, public_key=public, threads=1)["signature"] == "verified"
    # From now on without the option too.
    refused_without = {"not signed": device.packs[1]}
    for words, pack_file in refused_without.items():
        rollback(device.bundle, threads=1)
        rollback(device.bundle, version(device.v[1]), threads=1)
        refused(contents, pack_file, device.bundle, words)
    refused(contents, signed[1], device.bundle, "trusts another key", public_key=foreign)
    assert install(signed[1], device.bundle, threads=1)["signature"] == "verified"


def glue(pack: Path, signature: dict[str, str]) -> None:
    """Give a pack a signature, and a container that fits."""
    with zipfile.ZipFile(pack) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(contents["pack.json"]) | {"signature": signature}
    contents["pack.json"] = canonical(document).encode()
    with zipfile.ZipFile(pack, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        archive.comment = b"0" * 64
    content = pack.read_bytes()[:-64]
    pack.write_bytes(content + hashlib.sha256(content).hexdigest().encode())


def test_a_full_disk_is_said_beforehand(device, contents, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    refused(contents, device.packs[0], device.bundle, "the disk is full")


def test_without_hard_links(device, contents, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    install(device.packs[0], device.bundle, threads=1)
    assert contents(open_bundle(device.bundle).path) == contents(device.v[1])


def test_without_symbolic_links(device, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(InputError, match="no symbolic links here") as caught:
        install(device.packs[0], device.bundle, threads=1)
    assert "filesystem that has them" in str(caught.value)
    assert version(device.bundle) == version(device.v[0])


def test_two_exports_within_a_second(device, tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "sequence_of", lambda manifest: 5)
    assert create(device.v[0], device.v[1], tmp_path / "a.pack")["sequence"] == 6
    with pytest.raises(InputError, match="not newer"):
        create(device.v[0], device.v[1], tmp_path / "b.pack", sequence=5)
