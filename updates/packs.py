"""Updates: a pack holds what learning changed between two bundles; installing it is all or nothing.

What is refused, before anything is written where a reader looks (nothing changes then):
- a file that is cut, changed or unsafe to unpack (packfile.py);
- a pack that is not signed by a key that is trusted (keys.py). The first pack that is installed with keys pins them:
  from then on this store takes packs of those, and of the keys that such packs add;
- a pack that would leave no key, or bring a revoked one back;
- a pack for another backbone, or for another version than the one that runs: its difference would not fit;
- a replayed pack: sequence numbers only rise. A version that was rolled back from comes back by `rollback` to it, as
  long as nothing else was installed, or by a pack with a higher number; there is no switch to override this;
- a new version whose hashes, or whose self-test on this machine, do not hold.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artefacts.bundle import Bundle, open_bundle
from ..artefacts.external import Record, external_records
from ..artefacts.layout import BACKBONE, MANIFEST
from ..artefacts.manifest import MAX_MANIFEST, Manifest, canonical, check_names, self_hash
from ..errors import InputError, command_line
from ..files import UNWRITABLE, check_out, writable
from ..folders import one_or_more
from ..runtime.selftest import self_test
from .delta import apply, by_location, difference
from .enrolment_version import base_of, carry
from .keys import MOST, KeyChange, Keys, named
from .packfile import Pack, open_pack, write_pack
from .signature import read_public_key
from .store import Store, link, locked, read_store, sequence_of, write_file

REFUSED = UNWRITABLE | {errno.EACCES, errno.EPERM}
LARGEST_OWN, LARGEST_SHARE = 64 << 20, 2
"""bytes, and multiples of the bundle, that a pack may unpack to. It holds no backbone in fp32; the 8-bit one that a
calibration adds is a quarter of it."""


def create(
    old: Path | str,
    new: Path | str,
    out: Path | str,
    key: Path | str | None = None,
    sequence: int | None = None,
    add_keys: Sequence[Path | str] = (),
    revoke_keys: Sequence[Path | str] = (),
) -> dict[str, Any]:
    """Write what turns bundle `old` into bundle `new`.

    Args:
        key: Ed25519 private key (PEM) to sign with. sequence: above that of every pack before; None: when `new` was
            exported, in seconds; of a pack that changes keys alone: now.
        add_keys, revoke_keys: public keys (PEM) that devices shall trust, and trust no more; `key` has to sign then,
            and `old` and `new` may be the same bundle.

    Returns: {"pack", "bytes", "bundle_bytes" (of `new` on the device), "share", "from", "to", "sequence", "signed",
        "keys": {"add", "revoke"} (hex), "files": {name: {"encoding", "bytes" in the pack, "of": bytes in the
        bundle}}, "self_test"}.

    Raises: InputError for bundles that cannot be opened, have another backbone or are the same, a `new` that is not
        newer or fails its own self-test, a key that cannot be read.
    """
    change = _key_change(key, add_keys, revoke_keys)
    before, after, out = open_bundle(old), open_bundle(new), Path(out)
    if out.is_dir():
        raise InputError(f"{out}: is a folder", expected="a file to write, as update.pack", fix="choose another path")
    check_out(out, "a pack", _foreign, replace=True)
    source, target = (b.manifest.manifest_sha256 for b in (before, after))
    if source == target and not change:
        raise InputError(
            f"{new}: nothing has changed",
            got=f"both bundles are {target[:16]}",
            expected="OLD, which devices run, and NEW, which they shall run",
            fix="check both paths; after learning run: cdl-edge export RUN --out NEW",
        )
    if kept := sum(len(entry.pictures) for entry in after.manifest.enrolments):
        raise InputError(
            f"{new}: {kept} pictures are kept in it: a pack of it would give them to every device",
            expected="a bundle without them",
            fix=f"{command_line('enrol', 'export', new)} OUT, which makes a pack without pictures",
        )
    if (ground := after.manifest.enrolled_on) not in (None, before.manifest.version, before.manifest.enrolled_on):
        raise InputError(
            f"{new}: its classes were enrolled on a version that devices with {old} do not have: they could not take a "
            "class out again, nor the next version that is exported",
            got=f"version {ground}",
            expected=f"NEW as `export` made it, or with classes that were enrolled on {before.manifest.version}",
            fix="make two packs: one to that version, and one of what was enrolled: cdl-edge enrol export",
        )
    backbones = [_backbone(b) for b in (before, after)]
    if backbones[0] != backbones[1] or backbones[0] is None:
        raise InputError(
            f"{new}: another backbone than that of {old}: no pack can hold it",
            got=f"{BACKBONE} {backbones[1]!s:.16}",
            expected=f"{backbones[0]!s:.16}",
            fix="copy the whole bundle to the device",
        )
    number = sequence if sequence is not None else int(time.time()) if source == target else sequence_of(after.manifest)
    floor = sequence_of(before.manifest)
    if sequence is None and number == floor:
        number += 1  # both were exported within a second
    if number <= floor:
        raise InputError(
            f"{new}: not newer than {old}: devices would refuse the pack as a replay",
            got=f"sequence {number}",
            expected=f"above {floor}",
            fix=f"give --sequence {floor + 1} or higher",
        )
    tested = self_test(after)
    members = {MANIFEST: ("whole", (after.path / MANIFEST).read_bytes()), **_changed(before, after)}
    header = {"name": after.name, "from": source, "to": target, "sequence": number, "backbone": backbones[0]}
    header |= {"keys": change.document} if change else {}
    packed = write_pack(out, header, members, Path(key) if key is not None else None)
    entries = after.manifest.files
    on_device = sum(entry.bytes for entry in after.manifest.shipped.values())
    return {
        "pack": str(out),
        "bytes": out.stat().st_size,
        "bundle_bytes": on_device,
        "share": out.stat().st_size / on_device,
        "from": source,
        "to": target,
        "sequence": number,
        "signed": key is not None,
        "keys": change.document,
        "files": {
            n: {"encoding": encoding, "bytes": packed[n], "of": entries[n].bytes if n in entries else len(content)}
            for n, (encoding, content) in members.items()
        },
        "self_test": tested,
    }


def install(
    pack: Path | str,
    bundle: Path | str,
    public_key: Path | str | Sequence[Path | str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Install a pack; a plain bundle folder becomes a store (see store.py). Readers see the old or the new version.

    Args:
        public_key: Ed25519 public keys (PEM), of which one has to have signed the pack. They are pinned where no key
            was; later the keys of the bundle decide, and these have to be among them, or among the revoked ones.
        backend, threads: for the self-test.

    Returns: {"bundle", "from", "to", "version", "previous", "sequence", "signature": "verified", "not checked" or
        "none", "keys": {"trusted", "revoked"} (hex), "self_test", "carried": what was enrolled on the version before
        and is in this one too, see enrolment_version.carry, or None}; "to" is "from" for a pack that changes keys
        alone.

    Raises: InputError for whatever is refused (see above); nothing has changed then.
    """
    given = [read_public_key(Path(file)) for file in (() if public_key is None else one_or_more(public_key))]
    with open_pack(Path(pack)) as opened, writable(Path(bundle), REFUSED), locked(Path(bundle)) as store:
        keys = store.state.keys.pinned(given, bundle)
        checked = bool(keys.trusted)
        if checked:
            opened.check_signature(keys)
            keys = keys.after(opened.keys, opened.path)
        base = _check_base(opened, store)
        _check_size(opened, store)
        store.clean()
        sequence, previous, carried = opened.document["sequence"], store.state.current, None
        if opened.document["to"] == opened.document["from"]:
            tested: dict[str, Any] = {}
            state = store.trust(sequence, keys)
        else:
            with store.stage() as folder, store.stage() as above:
                _build(opened, base, folder)
                proven = open_bundle(folder)
                tested = self_test(proven, backend, threads)
                if base is not store.bundle:
                    carried = carry(store.bundle, base, proven, above, backend, threads)
                if carried is None:
                    state = store.install(proven, sequence, keys)
                else:
                    whole = open_bundle(above)
                    tested = self_test(whole, backend, threads)
                    if whole.manifest.version == previous:  # this device has taught the others, and kept the pictures
                        state = store.trust(sequence, keys)
                    else:
                        ground = proven if proven.manifest.enrolled_on is None else None
                        state = store.install(whole, sequence, keys, beneath=ground)
    signed = opened.document["signature"] is not None
    return {
        "bundle": str(bundle),
        "from": opened.document["from"],
        "to": opened.document["to"],
        "version": state.current,
        "previous": previous,
        "sequence": sequence,
        "signature": "verified" if checked else "not checked" if signed else "none",
        "keys": keys.document,
        "self_test": tested,
        "carried": carried,
    }


def rollback(
    bundle: Path | str, to: str | None = None, backend: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    """Run a kept version again: the one before the current one, or `to` (its first digits, also of a newer one).

    Returns: {"bundle", "version", "previous", "self_test"}. Raises: InputError when there is none, or it is damaged.
    """
    with writable(Path(bundle), REFUSED), locked(Path(bundle)) as store:
        kept, previous = [v.version for v in store.state.versions], store.state.current
        found = [store.state.before()] if to is None else [v for v in kept if to and v.startswith(to)]
        if len(found) > 1:
            raise InputError(
                f"{bundle}: more than one version begins with {to!r}",
                got=", ".join(map(str, found)),
                expected="as many digits as tell them apart",
            )
        wanted = found[0] if found else None
        if wanted is None or wanted == previous:
            others = [v for v in kept if v != previous]
            raise InputError(
                f"{bundle}: nothing to go back to" if to is None else f"{bundle}: no other version {to!r}",
                got=f"{previous} runs",
                expected="an older version that is kept" if not others else f"one of {', '.join(others)}",
                fix=f"{command_line('pack', 'rollback', bundle)} --to VERSION"
                if others
                else "install a pack first: the version before it is kept; or copy the older bundle to the device",
            )
        store.clean()
        proven = open_bundle(store.folder(wanted))
        tested = self_test(proven, backend, threads)
        store.rollback(proven)
    return {"bundle": str(bundle), "version": wanted, "previous": previous, "self_test": tested}


def listed(bundle: Path | str) -> list[dict[str, Any]]:
    """The versions that are kept, oldest first; of a plain bundle folder itself. Their hashes are not checked.

    Returns: [{"version", "manifest_sha256", "current", "sequence", "installed", "created", "classes", "tasks",
        "damaged": None, or why nothing more can be said of it: the four from its manifest are None then}].
    """
    current, state = read_store(Path(bundle))
    found = []
    for entry in state.versions:
        runs, damaged, opened = entry.version == state.current, None, None
        try:
            opened = current if runs else open_bundle(current.path.parent / entry.version, verify=False)
        except InputError as error:
            damaged = str(error).splitlines()[0]
        found.append(
            {
                "version": entry.version,
                "manifest_sha256": opened.manifest.manifest_sha256 if opened else None,
                "current": runs,
                "sequence": entry.sequence,
                "installed": entry.at,
                "created": opened.manifest.created if opened else None,
                "classes": len(opened.classes) if opened else None,
                "tasks": len(opened.tasks) if opened else None,
                "damaged": damaged,
            }
        )
    return found


def trusted(bundle: Path | str) -> Keys:
    """The keys that a bundle trusts, and those that it has revoked. Raises: InputError for no bundle."""
    return read_store(Path(bundle))[1].keys


def _key_change(key: Path | str | None, add: Sequence[Path | str], revoke: Sequence[Path | str]) -> KeyChange:
    """Of public keys in PEM files. Raises: InputError for keys that cannot be read, or that contradict each other."""
    added, revoked = ([read_public_key(Path(file)) for file in one_or_more(files)] for files in (add, revoke))
    change = KeyChange(tuple(dict.fromkeys(added)), tuple(dict.fromkeys(revoked)))
    if change and key is None:
        raise InputError(
            "a pack that changes keys has to be signed",
            expected="--key with the private half of a key that devices trust",
        )
    if both := set(change.add) & set(change.revoke):
        raise InputError("a key cannot be added and revoked by the same pack", got=named(sorted(both)))
    if max(len(change.add), len(change.revoke)) > MOST:
        raise InputError("too many keys", got=max(len(change.add), len(change.revoke)), expected=f"{MOST} or fewer")
    return change


def _backbone(bundle: Bundle) -> str | None:
    """Hash of the constants that no learning changes; None for a bundle without them."""
    found = bundle.manifest.files.get(BACKBONE)
    return found.sha256 if found else None


def _foreign(out: Path) -> str | None:
    """What an existing file is instead of a pack, see files.check_out; a pack is made again from its two bundles."""
    try:
        with open_pack(out):
            return None
    except InputError as error:
        return str(error).splitlines()[0]


def _changed(before: Bundle, after: Bundle) -> dict[str, tuple[str, bytes]]:
    """The files that differ, each the shorter way. Ranges stay in the workshop."""
    old_records, new_records = records(before.path, before.manifest), records(after.path, after.manifest)
    known, members = before.manifest.files, {}
    for name, entry in after.manifest.shipped.items():
        if name in known and known[name].sha256 == entry.sha256:
            continue
        content = (after.path / name).read_bytes()
        members[name] = ("whole", content)
        if name in known and name in old_records and name in new_records:
            parts = (old_records[name], new_records[name])
            old = (before.path / name).read_bytes()
            delta = difference(old, content, *parts)
            smaller = len(zlib.compress(delta, 9)) < len(zlib.compress(content, 9))
            if smaller and apply(old, delta, *parts) == content:
                members[name] = ("delta", delta)
    return members


def records(folder: Path, manifest: Manifest) -> Mapping[str, list[Record]]:
    """File -> the constants that the bundle's graphs keep in it. Raises: InputError for a file that is no graph."""
    graphs = sorted(set(manifest.graphs.values()))
    return by_location([record for name in graphs if "/" not in name for record in external_records(folder / name)])


def _check_base(pack: Pack, store: Store) -> Bundle:
    """What the pack is made for: the version that runs, or the one that classes were enrolled on there.

    Raises: InputError unless it is one of them, and the pack is newer than all that were installed.
    """
    at, document, running = f"{pack.path}", pack.document, store.bundle
    own, installed = _backbone(running), running.manifest.manifest_sha256
    if document["backbone"] != own:
        raise InputError(
            f"{at}: for another backbone",
            got=f"{BACKBONE} {document['backbone']:.16}",
            expected=f"{own!s:.16}, that of {store.path}",
            fix="use a pack made for this bundle, or copy the whole bundle",
        )
    direct = running.manifest.enrolled_on is None or document["from"] == installed
    base = running if direct else base_of(store)
    known = {installed, base.manifest.manifest_sha256}
    if document["to"] in known and document["from"] != document["to"]:  # else it changes keys
        raise InputError(f"{at}: already installed", got=document["to"][:16], fix="nothing")
    if document["sequence"] <= store.state.sequence:
        raise InputError(
            f"{at}: older than what was installed, or rolled back from (a replay?)",
            got=f"sequence {document['sequence']}",
            expected=f"above {store.state.sequence}",
            fix="`cdl-edge pack rollback BUNDLE --to VERSION` goes to a kept version; or make the pack anew with "
            f"--sequence {store.state.sequence + 1}",
        )
    if document["from"] not in known:
        enrolled = "" if base is running else f", with classes that were enrolled on {base.manifest.version}"
        raise InputError(
            f"{at}: made for another version than the one that runs",
            got=f"{installed[:16]} runs in {store.path}{enrolled}",
            expected=f"{document['from']:.16}, which the pack needs",
            fix="install the packs in between first, or make one: pack create OLD NEW, OLD being what runs",
        )
    return base


def _check_size(pack: Pack, store: Store) -> None:
    """Nothing is unpacked that is out of proportion to the bundle, or for which there is no room."""
    needed, most = pack.unpacked_bytes(), LARGEST_OWN + LARGEST_SHARE * store.bundle.size_bytes
    if needed > most:
        raise InputError(
            f"{pack.path}: too large for this bundle",
            got=f"{needed} bytes unpacked",
            expected=f"{most} or less: {store.path} has {store.bundle.size_bytes}",
            fix="do not use this pack; or copy the whole bundle to the device",
        )
    free = shutil.disk_usage(store.path).free
    if free < 2 * needed:
        raise InputError(
            f"{store.path}: the disk is full", got=f"{free} bytes free", expected=f"{2 * needed}", fix="make room"
        )


def _build(pack: Pack, base: Bundle, folder: Path) -> None:
    """The new version's files: from the pack, or the base's own under a second name. Raises: InputError."""
    manifest = _manifest(pack)
    packed = {name: entry["encoding"] for name, entry in pack.document["files"].items()}
    deltas = [name for name, encoding in packed.items() if encoding == "delta"]
    write_file(folder / MANIFEST, pack.blocks(MANIFEST))
    for name, entry in manifest.files.items():
        if name in deltas:
            continue
        if name in packed:
            if entry.sha256 != pack.document["files"][name]["sha256"]:
                raise _unfit(pack, f"{name!r} is not the one of its manifest")
            write_file(folder / name, pack.blocks(name))
        elif base.manifest.files.get(name) == entry and (base.path / name).is_file():
            link(base.path / name, folder / name)
        elif name != manifest.ranges:
            raise _unfit(pack, f"{name!r} is neither in it nor in {base.path}")
    if set(packed) - {MANIFEST} - set(manifest.files):
        raise _unfit(pack, "it holds files that its manifest does not list")
    if not deltas:
        return
    if set(deltas) & {MANIFEST, *manifest.graphs.values()}:
        raise _unfit(pack, "a graph is stored as a difference")
    old_records, new_records = records(base.path, base.manifest), records(folder, manifest)
    for name in deltas:
        if name not in old_records or name not in new_records or name not in base.manifest.files:
            raise _unfit(pack, f"{name!r} is a difference to nothing")
        old = (base.path / name).read_bytes()
        write_file(folder / name, [apply(old, pack.read(name), old_records[name], new_records[name])])


def _manifest(pack: Pack) -> Manifest:
    """The manifest of the bundle that the pack makes; `open_bundle` checks the rest once the files are there."""
    if pack.document["files"][MANIFEST]["bytes"] > MAX_MANIFEST:
        raise _unfit(pack, f"{MANIFEST} is longer than {MAX_MANIFEST} bytes")
    try:
        text = pack.read(MANIFEST)
        manifest = json.loads(text.decode("utf-8"))
        named = isinstance(manifest["files"], dict) and {*manifest["graphs"].values()} <= {*manifest["files"]}
        named = named and all(isinstance(name, str) for name in manifest["graphs"].values())
        known = canonical(manifest).encode("utf-8") == text and self_hash(manifest) == pack.document["to"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unfit(pack, f"{MANIFEST}: {error}") from error
    if not named or not known:
        raise _unfit(pack, f"{MANIFEST} is not that of {pack.document['to']:.16}")
    check_names(pack.path, manifest["files"])
    return Manifest.of(manifest, pack.path)


def _unfit(pack: Pack, what: str) -> InputError:
    return InputError(
        f"{pack.path}: the pack contradicts itself",
        got=what,
        expected="a file made by pack create",
        fix="do not use it",
    )
