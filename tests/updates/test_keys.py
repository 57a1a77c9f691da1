"""Keys rotate: signed packs add and revoke them, and nothing brings a revoked one back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cdl_edge.artefacts.bundle import open_bundle
from cdl_edge.artefacts.manifest import canonical
from cdl_edge.errors import InputError
from cdl_edge.updates.keys import MOST, KeyChange, Keys
from cdl_edge.updates.packfile import open_pack, write_pack
from cdl_edge.updates.packs import create, install, rollback, trusted
from cdl_edge.updates.store import STATE, _hash, read_store

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def device(make_version, make_key, tmp_path):
    """v: bundles 0-3, keys: three pairs, bundle: a copy of v[0]; pack(old, new, key, ...) -> a pack."""
    v, keys = [make_version(i) for i in range(4)], [make_key(f"key{i}") for i in range(3)]
    count = iter(range(100))

    def pack(old: int, new: int, key: int, add=(), revoke=(), **options) -> Path:
        out = tmp_path / f"{next(count)}.pack"
        changes = {"add_keys": [keys[i].public for i in add], "revoke_keys": [keys[i].public for i in revoke]}
        create(v[old], v[new], out, key=keys[key].private, **changes, **options)
        return out

    return SimpleNamespace(v=v, keys=keys, pack=pack, bundle=Path(shutil.copytree(v[0], tmp_path / "device")))


def refused(contents, device, pack: Path, *words: str, **options) -> None:
    before = contents(device.bundle)
    with pytest.raises(InputError) as caught:
        install(pack, device.bundle, threads=1, **options)
    for word in (*words, "do:"):
        assert word in str(caught.value), str(caught.value)
    assert contents(device.bundle) == before


def test_one_key_after_the_other(device, contents):
    first, second, third = device.keys
    done = install(device.pack(0, 1, 0, add=[1]), device.bundle, first.public, threads=1)
    assert done["keys"] == {"trusted": [first.hex, second.hex], "revoked": []}
    install(device.pack(1, 2, 1, revoke=[0]), device.bundle, threads=1)
    assert trusted(device.bundle) == Keys((second.hex,), (first.hex,))
    refused(contents, device, device.pack(2, 3, 0), "signed by a revoked key", first.hex[:16], second.hex[:16])
    refused(contents, device, device.pack(2, 3, 2), "signed by an unknown key", third.hex[:16])
    # Who still starts the service with the old key is not left without updates; who brings a strange one is.
    refused(contents, device, device.pack(2, 3, 0), "signed by a revoked key", public_key=first.public)
    refused(contents, device, device.pack(2, 3, 1), "trusts another key", public_key=third.public)
    assert install(device.pack(2, 3, 1), device.bundle, first.public, threads=1)["signature"] == "verified"


def test_several_keys_are_pinned_at_once(device):
    keys = device.keys
    install(device.pack(0, 1, 1), device.bundle, [keys[0].public, keys[1].public, keys[0].public], threads=1)
    assert trusted(device.bundle) == Keys((keys[0].hex, keys[1].hex))
    install(device.pack(1, 2, 0), device.bundle, threads=1)


def test_a_revoked_key_never_comes_back(device, contents):
    install(device.pack(0, 1, 0, add=[1]), device.bundle, device.keys[0].public, threads=1)
    install(device.pack(1, 2, 1, revoke=[0]), device.bundle, threads=1)
    refused(contents, device, device.pack(2, 3, 1, add=[0]), "goes back to an older list of keys")
    after = trusted(device.bundle)
    rollback(device.bundle, threads=1)
    assert trusted(device.bundle) == after, "a rollback is of what answers, not of who is trusted"
    again = device.pack(1, 2, 0, sequence=2_000_000_000)
    refused(contents, device, again, "signed by a revoked key")


def test_the_last_key_cannot_be_revoked(device, contents):
    install(device.pack(0, 1, 0), device.bundle, device.keys[0].public, threads=1)
    refused(contents, device, device.pack(1, 2, 0, revoke=[0]), "would revoke the last key", device.keys[0].hex[:16])
    install(device.pack(1, 2, 0, revoke=[0], add=[1]), device.bundle, threads=1)
    assert trusted(device.bundle) == Keys((device.keys[1].hex,), (device.keys[0].hex,))


@pytest.mark.parametrize("plain", [True, False])
def test_keys_alone(device, contents, plain):
    if not plain:
        install(device.pack(0, 1, 0), device.bundle, device.keys[0].public, threads=1)
    at = 0 if plain else 1
    before = open_bundle(device.bundle).manifest
    pack = device.pack(at, at, 0, add=[1], revoke=[2])
    assert pack.stat().st_size < 10_000, "no graph and no constants"
    done = install(pack, device.bundle, device.keys[0].public, threads=1)
    assert done["version"] == done["previous"] == before.version and done["self_test"] == {}
    assert open_bundle(device.bundle).manifest == before
    assert trusted(device.bundle) == Keys((device.keys[0].hex, device.keys[1].hex), (device.keys[2].hex,))
    refused(contents, device, pack, "a replay?")
    number = read_store(device.bundle)[1].sequence
    install(device.pack(at, 2, 1, sequence=number + 1), device.bundle, threads=1)
    assert open_bundle(device.bundle).manifest == open_bundle(device.v[2]).manifest
    rollback(device.bundle, threads=1)
    assert open_bundle(device.bundle).manifest == before


def test_where_no_key_is_known_none_is_learnt(device):
    done = install(device.pack(0, 1, 0, add=[1]), device.bundle, threads=1)
    assert done["signature"] == "not checked" and done["keys"] == {"trusted": [], "revoked": []}


def test_a_change_that_nobody_signed(device, contents, tmp_path):
    with pytest.raises(InputError, match="has to be signed"):
        create(device.v[0], device.v[1], tmp_path / "x.pack", add_keys=[device.keys[0].public])
    with open_pack(device.pack(0, 1, 0, add=[1])) as opened:
        header = {k: opened.document[k] for k in ("name", "from", "to", "sequence", "backbone", "keys")}
        members = {n: (e["encoding"], opened.read(n)) for n, e in opened.document["files"].items()}
    write_pack(tmp_path / "forged.pack", header, members)
    refused(contents, device, tmp_path / "forged.pack", "changes keys and is not signed")
    for keys in ({}, [], {"add": [], "revoke": ["x"]}, {"add": [A], "revoke": [A]}, {"add": [A.upper()], "revoke": []}):
        write_pack(tmp_path / "forged.pack", {**header, "keys": keys}, members, device.keys[0].private)
        refused(contents, device, tmp_path / "forged.pack", "pack.json is no pack's", "'keys'")


def test_what_no_pack_can_be_made_of(device, tmp_path):
    with pytest.raises(InputError, match="added and revoked by the same pack"):
        device.pack(0, 1, 0, add=[1], revoke=[1])
    with pytest.raises(InputError, match="nothing has changed"):
        device.pack(0, 0, 0)


def test_older_programs_refuse_what_they_would_not_understand(device):
    for keys, schema in ((((), ())), 1), ((([1], ())), 2):
        with open_pack(device.pack(0, 1, 0, *keys)) as opened:
            assert opened.document["schema"] == schema


def test_a_store_of_an_older_program_keeps_its_key(device, contents):
    install(device.pack(0, 1, 0), device.bundle, device.keys[0].public, threads=1)
    file = device.bundle / STATE
    document = json.loads(file.read_text())
    del document["now"]["keys"]
    document["now"]["public_key"], document["schema"], document["sha256"] = device.keys[0].hex, 1, ""
    document["sha256"] = _hash(document)
    file.write_text(canonical(document))
    assert trusted(device.bundle) == Keys((device.keys[0].hex,))
    refused(contents, device, device.pack(1, 2, 1), "signed by an unknown key")
    install(device.pack(1, 2, 0, add=[1]), device.bundle, threads=1)
    assert json.loads(file.read_text())["schema"] == 2


def test_from_the_command_line(device, cli, tmp_path):
    keys, out = device.keys, tmp_path / "cli.pack"
    options = ["--key", str(keys[0].private), "--add-key", str(keys[1].public), "--revoke-key", str(keys[2].public)]
    done = cli("pack", "create", str(device.v[0]), str(device.v[0]), "--out", str(out), *options)
    assert done.code == 0 and f"key {keys[1].hex[:16]}... is trusted from then on" in done.out
    assert f"key {keys[2].hex[:16]}... is trusted no more" in done.out
    done = cli("pack", "install", str(out), str(device.bundle), "--public-key", str(keys[0].public), "--threads", "1")
    assert done.code == 0 and "as before, signature verified, keys" in done.out
    done = cli("pack", "list", str(device.bundle))
    assert done.code == 0
    assert f"keys: {keys[0].hex[:16]}, {keys[1].hex[:16]}, revoked {keys[2].hex[:16]}" in done.out
    answer = cli("pack", "list", str(device.bundle), "--json").json["keys"]
    assert answer == {"trusted": [keys[0].hex, keys[1].hex], "revoked": [keys[2].hex]}


# -- the rules themselves ----------------------------------------------------------------------------------------------


def test_a_change_is_idempotent_and_order_does_not_matter():
    keys, change = Keys((A,)), KeyChange((B,), (C,))
    once = keys.after(change, "x")
    assert once == Keys((A, B), (C,)) == once.after(change, "x")
    assert keys.after(KeyChange(), "x") == keys


@pytest.mark.parametrize(
    ("keys", "change", "words"),
    [
        (Keys((A,)), KeyChange((), (A,)), "would revoke the last key"),
        (Keys((A, B)), KeyChange((), (A, B)), "would revoke the last key"),
        (Keys((A,), (B,)), KeyChange((B,)), "goes back to an older list"),
        (Keys((A,), (B,)), KeyChange((B, C), (A,)), "goes back to an older list"),
    ],
)
def test_changes_that_are_refused(keys, change, words):
    with pytest.raises(InputError, match=words):
        keys.after(change, "x")


def test_lists_are_bounded():
    with pytest.raises(ValueError, match=f"at most {MOST}"):
        KeyChange.of({"add": [A] * (MOST + 1), "revoke": []})
    assert KeyChange.of(replace(KeyChange(), add=(A,)).document) == KeyChange((A,))
