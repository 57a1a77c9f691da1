"""Ed25519 signatures (RFC 8032), by the `cryptography` package, which is imported only when a key is used.

Keys are PEM files as OpenSSL writes them:

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import InputError
from ..extras import command

ALGORITHM = "ed25519"
_MAKE = "openssl genpkey -algorithm ed25519 -out private.pem; openssl pkey -in private.pem -pubout -out public.pem"


def sign(message: bytes, private_key: Path) -> dict[str, str]:
    """{"algorithm", "public_key", "value"}, both in hex.

    Raises: InputError when the key cannot be read or `cryptography` is not installed.
    """
    key = _load(private_key, "private")
    return {"algorithm": ALGORITHM, "public_key": _raw(key.public_key()), "value": key.sign(message).hex()}


def read_public_key(path: Path) -> str:
    """The 32 bytes of a public key in hex. Raises: InputError as `sign` does."""
    return _raw(_load(path, "public"))


def is_signed(message: bytes, signature: object, public_key: str) -> bool:
    """Whether `signature`, as `sign` made it, is that of `message` by the owner of `public_key` (hex).

    Raises: InputError when `cryptography` is not installed.
    """
    if not isinstance(signature, dict) or signature.get("algorithm") != ALGORITHM:
        return False
    crypto = _cryptography()
    try:
        value = bytes.fromhex(str(signature.get("value")))
        crypto.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(value, message)
    except (ValueError, crypto.InvalidSignature):
        return False
    return True


def _raw(public_key: Any) -> str:
    return str(public_key.public_bytes_raw().hex())


def _load(path: Path, kind: str) -> Any:
    crypto = _cryptography()
    expected = f"an Ed25519 {kind} key in PEM, without a password"
    try:
        pem = Path(path).read_bytes()
        if kind == "public":
            key, wanted = crypto.load_pem_public_key(pem), crypto.Ed25519PublicKey
        else:
            key, wanted = crypto.load_pem_private_key(pem, password=None), crypto.Ed25519PrivateKey
    except OSError as error:
        raise InputError(f"{path}: cannot be read", got=error.strerror, expected=expected, fix=_MAKE) from error
    except (ValueError, TypeError, crypto.UnsupportedAlgorithm) as error:  # TypeError: it has a password
        got = str(error).splitlines()[0][:200]
        raise InputError(f"{path}: not a {kind} key", got=got, expected=expected, fix=_MAKE) from error
    if not isinstance(key, wanted):
        raise InputError(f"{path}: a key of another kind", got=type(key).__name__, expected=expected, fix=_MAKE)
    return key


def _cryptography() -> SimpleNamespace:
    """The names that are used here. Raises: InputError when the package is not installed."""
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise InputError("signatures need the package `cryptography`", got=str(error), fix=command("sign")) from error
    return SimpleNamespace(
        InvalidSignature=InvalidSignature,
        UnsupportedAlgorithm=UnsupportedAlgorithm,
        Ed25519PrivateKey=Ed25519PrivateKey,
        Ed25519PublicKey=Ed25519PublicKey,
        load_pem_private_key=load_pem_private_key,
        load_pem_public_key=load_pem_public_key,
    )
