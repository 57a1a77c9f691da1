"""The file of a pack: a zip whose every byte is under a hash, read as if it came from an enemy.

    pack.json       what it is: base, target, order, hash of every member, keys, signature (canonical text)
    manifest.json   of the bundle that it makes
    ...             the files that differ, whole or as a difference (see delta.py)
    <64 hex digits> SHA-256 of all bytes before them; to zip programs this is the archive's comment

The same bundles give the same bytes with the same zlib: no times, fixed order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..artefacts.layout import MANIFEST
from ..artefacts.manifest import canonical, check_names
from ..errors import InputError
from ..files import atomic_file
from .keys import KeyChange, Keys, named
from .signature import is_signed, sign

SCHEMA = 2
"2: packs that change keys. A program that does not know them must not install those; all others are of schema 1."
HEADER = "pack.json"
ENCODINGS = ("whole", "delta")
MAX_BYTES = 1 << 30
"of the file, and of all members unpacked: a pack holds no backbone, a ViT-L's prompts and graphs are some 50 MB"
MAX_MEMBERS, MAX_TEXT, MAX_DIRECTORY = 256, 1 << 20, 1 << 20
"members; bytes of pack.json; bytes of the zip's table of contents"
_DIGITS = 64
_BLOCK = 1 << 20
"bytes that are unpacked at a time"
_END = 22
"bytes of a zip's last record, which stands before the digits"
_AGAIN = "copy the pack again; if it stays so, do not use it: ask for a new one"
_FIELDS = {"name": str, "from": str, "to": str, "sequence": int, "backbone": str, "files": dict}
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OverflowError)


@dataclass(frozen=True)
class Pack:
    """An opened pack whose container, names and text have been checked, and of which nothing was unpacked."""

    path: Path
    document: dict[str, Any]
    "the parsed pack.json"
    archive: zipfile.ZipFile

    def read(self, name: str) -> bytes:
        """Content of a member as it is stored. Raises: InputError when it is not what pack.json says."""
        return b"".join(self.blocks(name))

    def blocks(self, name: str) -> Iterator[bytes]:
        """The same piece by piece, in bounded memory; what is wrong is known after the last piece.

        Raises: InputError, as `read`.
        """
        entry, digest, left = self.document["files"][name], hashlib.sha256(), self.document["files"][name]["bytes"]
        try:
            with self.archive.open(name) as stream:
                while block := stream.read(_BLOCK):
                    left -= len(block)
                    if left < 0:
                        break
                    digest.update(block)
                    yield block
        except _BROKEN as error:
            raise InputError(f"{self.path}: {name!r} cannot be unpacked", got=str(error), fix=_AGAIN) from error
        if left or digest.hexdigest() != entry["sha256"]:
            raise InputError(f"{self.path}: {name!r} is not what the pack lists", got="another hash", fix=_AGAIN)

    def unpacked_bytes(self) -> int:
        """Bytes of all members once unpacked, as pack.json declares them."""
        return sum(int(entry["bytes"]) for entry in self.document["files"].values())

    @property
    def keys(self) -> KeyChange:
        """What it does to the keys of the bundle; to be believed after `check_signature` alone."""
        return KeyChange.of(self.document.get("keys"))

    def check_signature(self, keys: Keys) -> None:
        """Raises: InputError unless the owner of a trusted key signed it."""
        signature = self.document.get("signature")
        wanted = f"one of the keys {named(keys.trusted)}" if len(keys.trusted) > 1 else f"the key {named(keys.trusted)}"
        if signature is None:
            raise InputError(
                f"{self.path}: not signed",
                expected=f"a signature by {wanted}",
                fix="make it with: cdl-edge pack create OLD NEW --out PACK --key PRIVATE.pem",
            )
        by = signature.get("public_key") if isinstance(signature, dict) else signature
        reason = "wrong signature"
        if by in keys.revoked:
            reason = "signed by a revoked key"
        elif by not in keys.trusted:
            reason = "signed by an unknown key"
        if reason != "wrong signature" or not is_signed(_signed(self.document), signature, str(by)):
            raise InputError(
                f"{self.path}: {reason}",
                got=f"said to be by the key {by!s:.16}...",
                expected=f"by {wanted}",
                fix="do not use this pack; ask its maker for one signed with a key that this bundle trusts",
            )


def write_pack(
    out: Path, document: Mapping[str, Any], members: Mapping[str, tuple[str, bytes]], key: Path | None = None
) -> dict[str, int]:
    """Write a pack, whole or not at all.

    Args:
        document: the fields "name", "from", "to", "sequence", "backbone" of pack.json, and "keys" where it changes any.
        members: name -> encoding and content. key: private key to sign with.

    Returns: name -> bytes that it takes in the file.
    """
    entries = {
        name: {"encoding": encoding, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, (encoding, content) in members.items()
    }
    schema = SCHEMA if "keys" in document else 1
    header: dict[str, Any] = {"schema": schema, "kind": "pack", **document, "files": entries}
    header |= {"pack_sha256": "", "signature": None}
    header["pack_sha256"] = hashlib.sha256(_signed(header)).hexdigest()
    if key is not None:
        header["signature"] = sign(_signed(header), key)
    contents = {HEADER: canonical(header).encode("utf-8"), **{name: content for name, (_, content) in members.items()}}
    with atomic_file(out) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, content in contents.items():
                info = zipfile.ZipInfo(name)  # of 1980: no clock
                info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
                small = len(zlib.compress(content, 9)) < len(content)
                info.compress_type = zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED
                archive.writestr(info, content, compresslevel=9)
            archive.comment = b"0" * _DIGITS
        with open(temporary, "rb+") as stream:
            digest = _digest(stream)
            stream.seek(-_DIGITS, os.SEEK_END)
            stream.write(digest.encode())
        with zipfile.ZipFile(temporary) as archive:
            return {info.filename: info.compress_size for info in archive.infolist()}


@contextmanager
def open_pack(path: Path) -> Iterator[Pack]:
    """Open a pack and check its container, its names and pack.json: bounded work, whatever the file is.

    Members are unpacked, and compared with their hashes, when they are read: after the signature has been looked at,
    which covers those hashes.

    Raises: InputError for a file that is empty, cut, changed, no pack, unsafe to unpack, or written by a newer version.
    """
    path = Path(path)
    with _opened(path) as stream:
        _check_container(path, stream)
        try:
            archive = zipfile.ZipFile(stream)
        except _BROKEN as error:
            raise InputError(f"{path}: not a pack", got=str(error), fix=_AGAIN) from error
        with archive:
            _check_members(path, archive)
            yield Pack(path, _header(path, archive), archive)


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        swapped = isinstance(error, IsADirectoryError)
        expected = "a file made by `cdl-edge pack create`"
        fix = "name the pack before the bundle" if swapped else "check the path and its permissions"
        raise InputError(f"{path}: cannot be read", got=error.strerror, expected=expected, fix=fix) from error


def _digest(stream: IO[bytes]) -> str:
    """SHA-256 of all but the last digits."""
    left = stream.seek(0, os.SEEK_END) - _DIGITS
    stream.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := stream.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _check_container(path: Path, stream: IO[bytes]) -> None:
    size = stream.seek(0, os.SEEK_END)
    if size == 0:
        raise InputError(f"{path}: empty", got="0 bytes", expected="a file made by pack create", fix=_AGAIN)
    if size > MAX_BYTES:
        raise InputError(f"{path}: too large", got=f"{size} bytes", expected=f"{MAX_BYTES} or less", fix=_AGAIN)
    digest = _digest(stream)
    written = stream.read(_DIGITS)
    if size <= _DIGITS or written != digest.encode():
        stated = re.fullmatch(rb"[0-9a-f]{%d}" % _DIGITS, written)  # else it is any bytes, which nobody can read
        raise InputError(
            f"{path}: truncated, changed, or no pack",
            got=f"sha256 {digest}" if stated else f"{size} bytes that do not end in a SHA-256",
            expected=f"sha256 {written.decode()}, the file's last {_DIGITS} characters"
            if stated
            else "a file made by `cdl-edge pack create`: its last characters are the SHA-256 of all before them",
            fix=_AGAIN,
        )
    _check_directory(path, stream, size)


def _check_directory(path: Path, stream: IO[bytes], size: int) -> None:
    """The zip's last record is where pack create puts it, and what it points to is short enough to be read."""
    start = max(0, size - _DIGITS - _END - 20)
    stream.seek(start)
    tail = stream.read(size - _DIGITS - start)
    end = tail[-_END:]
    if len(end) < _END or end[:4] != b"PK\5\6" or tail[:4] == b"PK\6\7":
        raise InputError(f"{path}: not a pack", got="a file that does not end as a plain zip does", fix=_AGAIN)
    members, length = struct.unpack_from("<HL", end, 10)
    if members > MAX_MEMBERS:
        raise _unsafe(path, "too many members", members, f"{MAX_MEMBERS} or fewer")
    if length > MAX_DIRECTORY:
        raise _unsafe(path, "a table of contents that is too long", length, f"{MAX_DIRECTORY} bytes or fewer")


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """What a zip can do to who unpacks it: paths, links, sizes, the same name twice."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise _unsafe(path, "too many members", len(members), f"{MAX_MEMBERS} or fewer")
    total = sum(member.file_size for member in members)
    if total > MAX_BYTES:
        raise _unsafe(path, "a decompression bomb", f"{total} bytes unpacked", f"{MAX_BYTES} or less")
    names = [member.orig_filename for member in members]
    if len(set(names)) != len(names):
        raise _unsafe(path, "a member twice", ", ".join(sorted(names)), "different names")
    check_names(path, [name for name in names if name != MANIFEST])
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG) or member.is_dir():
            raise _unsafe(path, f"{member.filename!r} is no plain file", stat.filemode(kind), "a plain file")
        if member.flag_bits & 0x1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _unsafe(path, f"{member.filename!r} is packed otherwise", member.compress_type, "stored or deflated")
    if HEADER not in names:
        raise InputError(f"{path}: no pack", got=", ".join(names[:8]), expected=HEADER, fix=_AGAIN)
    if archive.getinfo(HEADER).file_size > MAX_TEXT:
        raise _unsafe(path, f"{HEADER} is too long", archive.getinfo(HEADER).file_size, f"{MAX_TEXT} bytes or fewer")


def _unsafe(path: Path, what: str, got: object, expected: object) -> InputError:
    return InputError(f"{path}: {what}", got=got, expected=expected, fix="do not use this pack")


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        with archive.open(name) as stream:
            # A member that says less than it unpacks to is cut there, and its checksum fails.
            return stream.read(archive.getinfo(name).file_size + 1)
    except _BROKEN as error:
        raise InputError(f"{path}: {name!r} cannot be unpacked", got=str(error), fix=_AGAIN) from error


def _header(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    text = _read(path, archive, HEADER)
    try:
        document = json.loads(text.decode("utf-8"))
        same = isinstance(document, dict) and canonical(document).encode("utf-8") == text
        digest = hashlib.sha256(_signed({**document, "pack_sha256": ""})).hexdigest() if same else ""
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {HEADER} is not readable as JSON", got=str(error), fix=_AGAIN) from error
    if not same or document.get("kind") != "pack" or not isinstance(document.get("schema"), int):
        raise InputError(
            f"{path}: {HEADER} is no pack's",
            got=repr(text[:80].decode("utf-8", "replace")),
            expected="kind 'pack'",
            fix=_AGAIN,
        )
    if document["schema"] > SCHEMA:
        raise InputError(
            f"{path}: written by a newer cdl-edge",
            got=f"schema {document['schema']}",
            expected=f"schema {SCHEMA} or older",
            fix="upgrade cdl-edge: install a newer wheel, or `pip install .` in newer sources",
        )
    wrong = [k for k, kind in _FIELDS.items() if not isinstance(document.get(k), kind) or document[k] is True]
    if digest != document.get("pack_sha256") or wrong:
        got = f"without {', '.join(wrong)}" if wrong else f"sha256 {digest}"
        raise InputError(f"{path}: {HEADER} has been changed", got=got, fix=_AGAIN)
    try:
        change = KeyChange.of(document.get("keys"))
    except ValueError as error:
        raise InputError(f"{path}: {HEADER} is no pack's", got=str(error), fix=_AGAIN) from error
    if change and document["signature"] is None:
        raise InputError(
            f"{path}: changes keys and is not signed",
            expected="a signature by a trusted key",
            fix="make it with: cdl-edge pack create OLD NEW --out PACK --key PRIVATE.pem",
        )
    files = document["files"]
    if set(files) | {HEADER} != set(archive.namelist()) or MANIFEST not in files or HEADER in files:
        raise InputError(
            f"{path}: other members than listed",
            got=", ".join(sorted(archive.namelist())),
            expected=", ".join(sorted({HEADER, MANIFEST, *files})),
            fix=_AGAIN,
        )
    for name, entry in files.items():
        known = isinstance(entry, dict) and entry.get("encoding") in ENCODINGS
        if not known or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise InputError(f"{path}: files[{name!r}] is incomplete", got=f"{entry!r:.200}", fix=_AGAIN)
        if entry["bytes"] != (size := archive.getinfo(name).file_size):
            got, expected = f"{size} bytes", f"{entry['bytes']} bytes"
            raise InputError(f"{path}: {name!r} is not what the pack lists", got=got, expected=expected, fix=_AGAIN)
    return document


def _signed(document: Mapping[str, Any]) -> bytes:
    """What hash and signature are of."""
    return canonical({**document, "signature": None}).encode("utf-8")
