"""A pack's file is refused for any changed byte, and for whatever a zip can do to who unpacks it."""

from __future__ import annotations

import hashlib
import json
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cdl_edge.artefacts.manifest import canonical
from cdl_edge.errors import InputError
from cdl_edge.updates import packfile
from cdl_edge.updates.packfile import HEADER, open_pack, write_pack

HEAD = {"name": "tiny", "from": "1" * 64, "to": "2" * 64, "sequence": 5, "backbone": "3" * 64}
MEMBERS = {"manifest.json": ("whole", b"{}"), "prompts.bin": ("delta", bytes(5000)), "x": ("whole", b"\x93\x01")}


def made(path: Path) -> Path:
    write_pack(path, HEAD, MEMBERS)
    return path


def sealed(path: Path) -> Path:
    """Put the right digits behind a zip, as someone would who knows the format."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"0" * 64
    content = path.read_bytes()[:-64]
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    return path


def forged(path: Path, extra: dict[str, bytes] | None = None, **changes: Any) -> Path:
    """A pack with another pack.json and more members, hashes right."""
    with open_pack(made(path)) as pack:
        document = {**pack.document, **changes, "pack_sha256": "", "signature": None}
        contents = {name: pack.read(name) for name in pack.document["files"]}
    document["pack_sha256"] = hashlib.sha256(canonical(document).encode()).hexdigest()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {HEADER: canonical(document).encode(), **contents, **(extra or {})}.items():
            archive.writestr(name, content)
    return sealed(path)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_all(path)
    return str(caught.value)


def read_all(path: Path) -> None:
    """Open a pack and unpack all of it."""
    with open_pack(path) as pack:
        for name in pack.document["files"]:
            pack.read(name)


def test_round_trip_and_the_same_bytes_again(tmp_path):
    sizes = write_pack(tmp_path / "a", HEAD, MEMBERS)
    assert sizes["prompts.bin"] < 100 and sizes["x"] == 2
    with open_pack(tmp_path / "a") as pack:
        assert {k: pack.document[k] for k in HEAD} == HEAD
        assert {n: (e["encoding"], pack.read(n)) for n, e in pack.document["files"].items()} == MEMBERS
    assert made(tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert zipfile.ZipFile(tmp_path / "a").testzip() is None, "any zip program can look into it"


@pytest.mark.slow
def test_every_changed_byte_is_refused(tmp_path):
    content = made(tmp_path / "a").read_bytes()
    for i in range(len(content)):
        (tmp_path / "a").write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        assert "truncated, changed, or no pack" in refusal(tmp_path / "a"), i


def test_what_a_file_ends_in_is_named_only_where_it_can_be_read(tmp_path):
    path = made(tmp_path / "a")
    content = path.read_bytes()
    path.write_bytes(b"X" + content[1:])
    assert f"expected: sha256 {content[-64:].decode()}, the file's last" in refusal(path)
    for ending in (
        bytes(range(64)),
        b"\xff" * 64,
        b"a letter to my aunt, longer than the digits of any SHA-256 are. " * 2,
    ):
        path.write_bytes(content[:-64] + ending)
        text = refusal(path)
        assert "do not end in a SHA-256" in text and "do:" in text
        assert text.replace("\n", "").isprintable() and "\\x" not in text and "\ufffd" not in text
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(HEADER, canonical({"kind": "letter"}))
    assert "b'" not in refusal(sealed(path))


def test_every_shorter_or_longer_file_is_refused(tmp_path):
    content = made(tmp_path / "a").read_bytes()
    for wrong in (*(content[:i] for i in range(1, len(content), 7)), content + b"\0", content[:-1], content * 2):
        (tmp_path / "a").write_bytes(wrong)
        assert "truncated, changed, or no pack" in refusal(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    assert "empty" in refusal(tmp_path / "a")
    assert "cannot be read" in refusal(tmp_path / "none")
    swapped = refusal(tmp_path)
    assert "cannot be read" in swapped and "the pack before the bundle" in swapped


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:evil", "a//b", "./a", "..", "folder/"]
)
def test_paths_that_lead_out(tmp_path, name):
    text = refusal(forged(tmp_path / "a", {name: b"evil"}))
    assert "not allowed" in text or "no plain file" in text


def test_links_doubles_and_other_methods(tmp_path):
    path = made(tmp_path / "a")
    for kind, words in ((stat.S_IFLNK, "no plain file"), (stat.S_IFIFO, "no plain file")):
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo("link")
            info.create_system, info.external_attr = 3, (kind | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
        assert words in refusal(sealed(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x", "2")
    assert "a member twice" in refusal(sealed(path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x", "1")
    assert "packed otherwise" in refusal(sealed(path))
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(300):
            archive.writestr(f"{i}", "")
    assert "too many members" in refusal(sealed(path))


def test_decompression_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(packfile, "MAX_BYTES", 1 << 20)
    bomb = bytes((1 << 20) + 1)
    path = forged(tmp_path / "a", {"bomb": bomb})
    assert path.stat().st_size < 10_000
    assert "a decompression bomb" in refusal(path)
    # One that lies about its size: 10 bytes, in the directory and in its own header.
    content = path.read_bytes()[:-64].replace(struct.pack("<I", len(bomb)), struct.pack("<I", 10))
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    assert "other members than listed" in refusal(path)
    entry = {"encoding": "whole", "bytes": 10, "sha256": hashlib.sha256(bytes(10)).hexdigest()}
    with open_pack(made(path)) as pack:
        files = {**pack.document["files"], "bomb": entry}
    content = forged(path, {"bomb": bomb}, files=files).read_bytes()[:-64]
    content = content.replace(struct.pack("<I", len(bomb)), struct.pack("<I", 10))
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    assert "'bomb' cannot be unpacked" in refusal(path)
    monkeypatch.setattr(packfile, "MAX_BYTES", 100)
    assert "too large" in refusal(path)
    monkeypatch.setattr(packfile, "MAX_TEXT", 10)
    monkeypatch.setattr(packfile, "MAX_BYTES", 1 << 30)
    assert "too long" in refusal(made(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "bundle"}, "is no pack's"),
        ({"schema": 99}, "newer cdl-edge"),
        ({"schema": None}, "is no pack's"),
        ({"sequence": "5"}, "without sequence"),
        ({"from": None}, "without from"),
        ({"files": []}, "without files"),
        ({"files": {}}, "other members than listed"),
        ({"files": {"manifest.json": None, "prompts.bin": None, "x": None}}, "is incomplete"),
    ],
)
def test_a_header_that_is_none(tmp_path, changes, words):
    assert words in refusal(forged(tmp_path / "a", **changes))


def test_other_texts_and_members(tmp_path):
    path = tmp_path / "a"
    for text in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, json.dumps(HEAD).encode()):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(HEADER, text)
        assert HEADER in refusal(sealed(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "")
    assert "no pack" in refusal(sealed(path))
    assert "other members than listed" in refusal(forged(path, {"more": b""}))
    content = b"no zip at all"
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    assert "not a pack" in refusal(path)


def test_a_member_of_another_content(tmp_path):
    assert "is not what the pack lists" in refusal(forged(tmp_path / "a", {"x": b"other"}))


def test_opening_unpacks_nothing(tmp_path, monkeypatch):
    """Members wait until the signature has been looked at; only pack.json is read."""
    read, real = [], packfile._read

    def watched(path, archive, name):
        read.append(name)
        return real(path, archive, name)

    monkeypatch.setattr(packfile, "_read", watched)
    monkeypatch.setattr(packfile.Pack, "blocks", lambda *_: pytest.fail("unpacked"))
    with open_pack(made(tmp_path / "a")):
        assert read == [HEADER]


def test_a_table_of_contents_that_is_too_long(tmp_path):
    path = made(tmp_path / "a")
    content = bytearray(path.read_bytes()[:-64])
    end = len(content) - 22
    struct.pack_into("<L", content, end + 12, 1 << 29)
    path.write_bytes(bytes(content) + hashlib.sha256(content).hexdigest().encode())
    assert "too long" in refusal(path)
    struct.pack_into("<HH", content, end + 8, 60000, 60000)
    path.write_bytes(bytes(content) + hashlib.sha256(content).hexdigest().encode())
    assert "too many members" in refusal(path)


@pytest.mark.parametrize("names", [("q", "q/r"), ("n" * 300,)])
def test_names_that_no_folder_can_have(tmp_path, names):
    write_pack(tmp_path / "a", HEAD, MEMBERS | dict.fromkeys(names, ("whole", b"1")))
    assert "not allowed" in refusal(tmp_path / "a")
