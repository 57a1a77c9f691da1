"""The command `pack`: what is made in the workshop, sent, and installed on devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_options import backend_option, emit, json_option, say, threads_option
from .errors import command_line

public_key_option = click.option(
    "--public-key",
    "public_keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Ed25519 key (PEM) that must have signed; the first ones that are given are pinned",
)
plain_http_option = click.option(
    "--plain-http", is_flag=True, help="without TLS, as registries on this machine are always spoken to"
)


@click.group()
def pack() -> None:
    """Updates of a bundle on a device: only what learning changed, all or nothing."""


@pack.command("create")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="file to write")
@click.option("--key", type=click.Path(path_type=Path), help="Ed25519 private key (PEM) to sign with")
@click.option("--sequence", type=click.IntRange(1), help="order among packs [default: when NEW was exported]")
@click.option(
    "--add-key",
    "add_keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="public key (PEM) that devices shall trust too; OLD and NEW may be the same then",
)
@click.option(
    "--revoke-key",
    "revoke_keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="public key (PEM) that devices shall never trust again",
)
@json_option
def pack_create(
    old: Path,
    new: Path,
    out: Path,
    key: Path | None,
    sequence: int | None,
    add_keys: tuple[Path, ...],
    revoke_keys: tuple[Path, ...],
    as_json: bool,
) -> None:
    """What turns bundle OLD into bundle NEW, on the same backbone."""
    from . import api

    result = api.create_pack(old, new, out, key, sequence, add_keys, revoke_keys)
    lines = [f"    {n}: {e['bytes']} of {e['of']} bytes, {e['encoding']}" for n, e in result["files"].items()]
    size = f"{result['bytes']} bytes, {100 * result['share']:.2f} % of the bundle"
    end = "signed" if result["signed"] else "not signed"
    lines += [f"    key {k:.16}... is trusted from then on" for k in result["keys"]["add"]]
    lines += [f"    key {k:.16}... is trusted no more" for k in result["keys"]["revoke"]]
    text = [f"{out}: {size}, {end}", *lines, f"next: {command_line('pack', 'install', out)} BUNDLE"]
    emit(result, as_json, "\n".join(text))


@pack.command("install")
@click.argument("pack_file", metavar="PACK", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@public_key_option
@backend_option
@threads_option
@json_option
def pack_install(
    pack_file: Path, bundle: Path, public_keys: tuple[Path, ...], backend: str, threads: int | None, as_json: bool
) -> None:
    """Verify, self-test, then swap BUNDLE's version atomically; the old one is kept."""
    from . import api

    result = api.install_pack(pack_file, bundle, public_keys, backend, threads)
    text = _installed(bundle, result)
    if carried := result["carried"]:
        again = ", their features computed again" if carried["recomputed"] else ""
        text += f"\nwhat was enrolled is in it: {', '.join(carried['names'])}, {carried['images']} picture(s){again}"
    if result["from"] != result["to"]:
        text += "\nback: " + command_line("pack", "rollback", bundle)
    emit(result, as_json, text)


def _installed(bundle: Path, result: dict[str, Any]) -> str:
    """One line about what `install` returns."""
    if result["from"] == result["to"]:
        return f"{bundle}: {result['version']} as before, signature {result['signature']}, {_trusted(result['keys'])}"
    return f"{bundle}: {result['previous']} -> {result['version']}, signature {result['signature']}, self-test passed"


def _trusted(keys: dict[str, Any]) -> str:
    """In one line, by their first digits."""
    revoked = f", revoked {', '.join(k[:16] for k in keys['revoked'])}" if keys["revoked"] else ""
    return f"keys: {', '.join(k[:16] for k in keys['trusted']) or 'none: signatures are not checked'}{revoked}"


@pack.command("push")
@click.argument("pack_file", metavar="PACK", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REGISTRY/REPOSITORY")
@click.option("--force", is_flag=True, help="replace another pack that is there for the same step")
@plain_http_option
@json_option
def pack_push(pack_file: Path, repository: str, force: bool, plain_http: bool, as_json: bool) -> None:
    """Send a pack to an OCI registry, from which any number of devices pull it."""
    from . import api

    result = api.push_pack(pack_file, repository, plain_http, force)
    sent = f"{result['bytes']} bytes sent" if result["sent"] else "its bytes were there already"
    if not result["reached"]:
        say(f"no pack there makes {result['from'][:16]}: devices with older versions do not come to this one")
    if not result["signed"]:
        say("not signed: sign packs that travel (pack create --key)")
    text = f"{result['repository']}:{result['tag']}: {sent}\nnext: cdl-edge pack pull {result['repository']} BUNDLE"
    emit(result, as_json, text)


@pack.command("pull")
@click.argument("repository", metavar="REGISTRY/REPOSITORY")
@click.argument("bundle", type=click.Path(path_type=Path))
@public_key_option
@backend_option
@threads_option
@plain_http_option
@json_option
def pack_pull(
    repository: str,
    bundle: Path,
    public_keys: tuple[Path, ...],
    backend: str,
    threads: int | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """Install pack after pack from an OCI registry, until BUNDLE's newest version runs."""
    from . import api

    result = api.pull_packs(repository, bundle, public_keys, backend, threads, plain_http, say)
    lines = [_installed(bundle, step) for step in result["steps"]]
    lines.append(f"{bundle}: {result['version']}, {result['repository']} has nothing newer")
    emit(result, as_json, "\n".join(lines))


@pack.command("rollback")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--to", help="version, its first digits [default: the one before]")
@backend_option
@threads_option
@json_option
def pack_rollback(bundle: Path, to: str | None, backend: str, threads: int | None, as_json: bool) -> None:
    """Run a kept version again."""
    from . import api

    result = api.rollback(bundle, to, backend, threads)
    emit(result, as_json, f"{bundle}: {result['previous']} -> {result['version']}, self-test passed")


@pack.command("list")
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def pack_list(bundle: Path, as_json: bool) -> None:
    """The versions that are kept, oldest first, and the keys that are trusted."""
    from . import api

    versions, keys = api.versions(bundle), api.trusted_keys(bundle)
    lines = [
        f"{'*' if v['current'] else ' '} {v['version']}  "
        + (f"{v['classes']} classes, {v['tasks']} tasks, " if v["damaged"] is None else f"damaged: {v['damaged']}, ")
        + f"sequence {v['sequence']}, since {v['installed']}"
        for v in versions
    ]
    lines.append(_trusted(keys))
    emit({"bundle": str(bundle), "versions": versions, "keys": keys}, as_json, "\n".join(lines))
