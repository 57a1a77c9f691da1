"""Ed25519: what is signed is recognised, and nothing else."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import pytest

from cdl_edge.errors import InputError
from cdl_edge.updates.signature import is_signed, read_public_key, sign

# RFC 8032, section 7.1, test 2, as PKCS 8 and SubjectPublicKeyInfo.
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
VALUE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def pem(kind: str, body: bytes) -> bytes:
    import base64

    return f"-----BEGIN {kind} KEY-----\n{base64.b64encode(body).decode()}\n-----END {kind} KEY-----\n".encode()


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip("cryptography")
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(pem("PRIVATE", bytes.fromhex("302e020100300506032b657004220420") + SEED))
    public.write_bytes(pem("PUBLIC", bytes.fromhex("302a300506032b6570032100") + bytes.fromhex(PUBLIC)))
    return private, public


def test_the_example_of_the_rfc(keys):
    private, public = keys
    signature = sign(b"\x72", private)
    assert signature == {"algorithm": "ed25519", "public_key": PUBLIC, "value": VALUE}
    assert read_public_key(public) == PUBLIC
    assert is_signed(b"\x72", signature, PUBLIC)


@pytest.mark.parametrize(
    "change",
    [
        {"value": VALUE[:-1] + "1"},
        {"value": ""},
        {"value": "no hex"},
        {"value": None},
        {"algorithm": "none"},
        {"algorithm": "rsa"},
    ],
)
def test_any_other_signature_is_none(keys, change):
    good = sign(b"\x72", keys[0])
    assert not is_signed(b"\x72", {**good, **change}, PUBLIC)
    assert not is_signed(b"\x73", good, PUBLIC)
    assert not is_signed(b"\x72", None, PUBLIC)
    other = PUBLIC[:-2] + "0d"
    assert not is_signed(b"\x72", {**good, "public_key": other}, other)


def test_keys_that_cannot_be_used(keys, tmp_path):
    private, public = keys
    (tmp_path / "text.pem").write_text("hello")
    for path, words in ((tmp_path / "none.pem", "cannot be read"), (tmp_path / "text.pem", "not a public key")):
        with pytest.raises(InputError, match=words):
            read_public_key(path)
    with pytest.raises(InputError, match="not a public key"):
        read_public_key(private)
    with pytest.raises(InputError, match="not a private key"):
        sign(b"", public)
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    public.write_bytes(curve.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(InputError, match="a key of another kind"):
        read_public_key(public)


def test_without_the_package(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("cryptography"):
            raise ImportError("No module named 'cryptography'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'cdl-edge\[sign\]"):
        read_public_key(tmp_path / "public.pem")
