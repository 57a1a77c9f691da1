"""The commands of packs as functions; api.py has all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .log import told


def create_pack(
    old: Path | str,
    new: Path | str,
    out: Path | str,
    key: Path | None = None,
    sequence: int | None = None,
    add_keys: Sequence[Path | str] = (),
    revoke_keys: Sequence[Path | str] = (),
) -> dict[str, Any]:
    """BUNDLE, BUNDLE -> PACK, see updates.packs.create; add_keys, revoke_keys: what devices shall trust."""
    from .updates.packs import create as run

    return run(old, new, out, key, sequence, add_keys, revoke_keys)


def install_pack(
    pack: Path | str,
    bundle: Path | str,
    public_key: Path | str | Sequence[Path | str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """PACK into BUNDLE, see updates.packs.install; backend, threads: of the self-test."""
    from .updates.packs import install as run

    return run(pack, bundle, public_key, backend, threads)


def push_pack(pack: Path | str, repository: str, plain_http: bool = False, replace: bool = False) -> dict[str, Any]:
    """PACK to REGISTRY/REPOSITORY, see updates.fleet.push."""
    from .updates.fleet import push as run

    return run(pack, repository, plain_http, replace)


def pull_packs(
    repository: str,
    bundle: Path | str,
    public_key: Path | str | Sequence[Path | str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    plain_http: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All newer PACKs of REGISTRY/REPOSITORY into BUNDLE, see updates.fleet.pull."""
    from .updates.fleet import pull as run

    with told(say):
        return run(repository, bundle, public_key, backend, threads, plain_http)


def rollback(
    bundle: Path | str, to: str | None = None, backend: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    """A kept version of BUNDLE again, see updates.packs.rollback; backend, threads: of the self-test."""
    from .updates.packs import rollback as run

    return run(bundle, to, backend, threads)


def versions(bundle: Path | str) -> list[dict[str, Any]]:
    """The versions of BUNDLE that are kept, oldest first, see updates.packs.listed."""
    from .updates.packs import listed as run

    return run(bundle)


def trusted_keys(bundle: Path | str) -> dict[str, Any]:
    """The public keys of BUNDLE, in hex: {"trusted", "revoked"}; where none is trusted signatures are not checked."""
    from .updates.packs import trusted as run

    return run(bundle).document
