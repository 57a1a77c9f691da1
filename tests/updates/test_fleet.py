"""Packs through a registry: the way from version to version, and whatever goes wrong on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cdl_edge.artefacts.bundle import open_bundle
from cdl_edge.errors import InputError
from cdl_edge.log import told
from cdl_edge.updates import fleet, packs, registry
from cdl_edge.updates.enrol import enrol
from cdl_edge.updates.fleet import PULLED, Step, pull, push, way
from cdl_edge.updates.packs import create, install, rollback
from cdl_edge.updates.registry import Place


@pytest.fixture
def chain(make_version, tmp_path):
    """v: bundles 0-3 of one backbone, packs[i]: v[i] -> v[i + 1], bundle: a copy of v[0]."""
    v = [make_version(i) for i in range(4)]
    for i in range(3):
        create(v[i], v[i + 1], tmp_path / f"{i}.pack")
    files = [tmp_path / f"{i}.pack" for i in range(3)]
    return SimpleNamespace(v=v, packs=files, bundle=Path(shutil.copytree(v[0], tmp_path / "device")))


@pytest.fixture
def small(make_registry, chain):
    """A small registry with the three packs. to: the repository, digests: of the packs in their order."""
    server = make_registry()
    done = [push(pack, f"{server.at}/fruit/camera") for pack in chain.packs]
    tags = server.manifests["fruit/camera"]
    digests = [json.loads(tags[d["tag"]])["layers"][0]["digest"] for d in done]
    server.seen.clear()
    return SimpleNamespace(
        server=server, to=f"{server.at}/fruit/camera", digests=digests, tags=[d["tag"] for d in done]
    )


def version(bundle: Path) -> str:
    return open_bundle(bundle, verify=False).manifest.version


def refused(small, bundle: Path, *words: str, runs: Path | None = None, **options) -> str:
    """What is said; the version that ran runs on, and nothing that came is left."""
    before = version(bundle) if runs is None else version(runs)
    with pytest.raises(InputError) as caught:
        pull(small.to, bundle, threads=1, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert version(bundle) == before
    assert not (bundle / PULLED).exists()
    return str(caught.value)


def test_three_packs_are_pushed_and_pulled_one_after_the_other(at, chain, contents):
    to = f"{at}/fruit/camera"
    done = [push(pack, to) for pack in chain.packs]
    assert [d["sent"] for d in done] == [True] * 3 and [d["reached"] for d in done] == [True] * 3
    assert [d["sent"] for d in [push(pack, to) for pack in chain.packs]] == [False] * 3, "what is there is not sent"
    lines: list[str] = []
    with told(lines.append):
        pulled = pull(to, chain.bundle, threads=1)
    assert [step["version"] for step in pulled["steps"]] == [version(v) for v in chain.v[1:]]
    assert [step["tag"] for step in pulled["steps"]] == [d["tag"] for d in done]
    assert [step["bytes"] for step in pulled["steps"]] == [pack.stat().st_size for pack in chain.packs]
    assert pulled["previous"] == version(chain.v[0]) and pulled["version"] == version(chain.v[3])
    assert [line[:16] for line in lines] == [f"{n} pack(s) to go:" for n in (3, 2, 1)]
    assert contents(open_bundle(chain.bundle).path) == contents(chain.v[3])
    assert not (chain.bundle / PULLED).exists()
    assert pull(to, chain.bundle, threads=1)["steps"] == []
    rollback(chain.bundle, threads=1)
    again = pull(to, chain.bundle, threads=1)
    assert again["steps"] == [] and again["version"] == version(chain.v[2]), "what was rolled back from stays away"


def test_a_device_in_the_middle_of_the_chain(small, chain):
    install(chain.packs[0], chain.bundle, threads=1)
    assert [step["tag"] for step in pull(small.to, chain.bundle, threads=1)["steps"]] == small.tags[1:]


def test_a_connection_that_ends_early_goes_on_where_it_ended(small, chain):
    small.server.cut[small.digests[1]] = 1000
    with pytest.raises(InputError, match="the connection ended early") as caught:
        pull(small.to, chain.bundle, threads=1)
    assert f"1000 of {chain.packs[1].stat().st_size} bytes, kept" in str(caught.value)
    assert version(chain.bundle) == version(chain.v[1]), "the step before is whole"
    small.server.seen.clear()
    pulled = pull(small.to, chain.bundle, threads=1)
    assert [step["kept"] for step in pulled["steps"]] == [1000, 0]
    assert [r.headers["Range"] for r in small.server.seen if "Range" in r.headers] == ["bytes=1000-"]
    assert version(chain.bundle) == version(chain.v[3])


@pytest.mark.parametrize("answer", ["whole", "416", "other"])
def test_a_registry_that_knows_no_ranges(small, chain, answer, monkeypatch):
    part = chain.bundle / PULLED / f"{small.digests[0].removeprefix('sha256:')}.part"
    part.parent.mkdir()
    part.write_bytes(b"of another time")
    if answer == "whole":  # status 200
        original = small.server.RequestHandlerClass
        monkeypatch.setattr(original, "on_blobs", without_range(original.on_blobs))
    elif answer == "416":
        part.write_bytes(chain.packs[0].read_bytes() + b"and more than there is")
    if answer == "other":  # its bytes are not those of the pack
        with pytest.raises(InputError, match="not what its digest says"):
            pull(small.to, chain.bundle, threads=1)
        assert not part.exists()
    pulled = pull(small.to, chain.bundle, threads=1)
    assert [step["kept"] for step in pulled["steps"]] == [0, 0, 0] and version(chain.bundle) == version(chain.v[3])


def without_range(original):
    def on_blobs(self, *arguments):
        del self.headers["Range"]
        return original(self, *arguments)

    return on_blobs


def test_what_came_of_a_pack_that_was_replaced_is_removed(small, chain):
    old = chain.bundle / PULLED / f"{'0' * 64}.part"
    old.parent.mkdir()
    old.write_bytes(b"old")
    (chain.bundle / PULLED / "mine.txt").write_text("not of cdl-edge")
    pull(small.to, chain.bundle, threads=1)
    assert [p.name for p in (chain.bundle / PULLED).iterdir()] == ["mine.txt"]


def test_another_content_than_the_digest_says(small, chain):
    whole = small.server.blobs[small.digests[0]]
    small.server.content[small.digests[0]] = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]
    refused(small, chain.bundle, "a pack is not what its digest says", small.digests[0], "do:")
    small.server.content[small.digests[0]] = whole + b"more"
    refused(small, chain.bundle, "a pack is not what its digest says")
    small.server.content.clear()
    tag = small.server.manifests["fruit/camera"][small.tags[0]]
    small.server.answer[f"/manifests/{small.tags[0]}"] = (200, {"Docker_Content_Digest": f"sha256:{'0' * 64}"}, tag)
    refused(small, chain.bundle, f"the manifest of {small.tags[0]} is not what its digest says")
    small.server.answer.clear()
    assert len(pull(small.to, chain.bundle, threads=1)["steps"]) == 3


def test_signatures_count_as_they_do_for_files(small, chain, make_key, tmp_path):
    ours, theirs = make_key("ours"), make_key("theirs")
    said = refused(small, chain.bundle, "not signed", public_key=ours.public)
    assert str(chain.bundle / PULLED) not in said and f"{small.to}:{small.tags[0]}" in said, "the user knows the tag"
    create(chain.v[0], chain.v[1], tmp_path / "theirs.pack", key=theirs.private)
    with pytest.raises(InputError, match="another pack is there already"):
        push(tmp_path / "theirs.pack", small.to)
    push(tmp_path / "theirs.pack", small.to, replace=True)
    refused(small, chain.bundle, "signed by an unknown key", theirs.hex[:16], public_key=ours.public)
    for i in range(3):
        create(chain.v[i], chain.v[i + 1], tmp_path / "signed.pack", key=ours.private)
        push(tmp_path / "signed.pack", small.to, replace=True)
    pulled = pull(small.to, chain.bundle, ours.public, threads=1)
    assert [step["signature"] for step in pulled["steps"]] == ["verified"] * 3


@pytest.mark.slow
def test_keys_change_on_the_way(at, chain, make_key, tmp_path):
    first, second, third = (make_key(name) for name in ("first", "second", "third"))
    to, steps = f"{at}/fruit/camera", []
    for i, (key, changes) in enumerate(
        (
            (first, {"add_keys": [second.public]}),
            (second, {"revoke_keys": [first.public], "add_keys": [third.public]}),
            (third, {}),
        )
    ):
        create(chain.v[i], chain.v[i + 1], tmp_path / "step.pack", key=key.private, **changes)
        steps.append(push(tmp_path / "step.pack", to))
    pulled = pull(to, chain.bundle, first.public, threads=1)
    assert [step["signature"] for step in pulled["steps"]] == ["verified"] * 3
    assert pulled["steps"][-1]["keys"] == {"trusted": [second.hex, third.hex], "revoked": [first.hex]}
    # Keys alone, at the version that runs; then a pack by the key that was revoked.
    create(chain.v[3], chain.v[3], tmp_path / "keys.pack", key=third.private, revoke_keys=[second.public])
    push(tmp_path / "keys.pack", to)
    (step,) = pull(to, chain.bundle, threads=1)["steps"]
    assert step["from"] == step["to"] and step["keys"]["revoked"] == [first.hex, second.hex]
    late = {"sequence": step["sequence"] + 1, "revoke_keys": [third.public], "add_keys": [make_key("evil").public]}
    create(chain.v[3], chain.v[3], tmp_path / "late.pack", key=second.private, **late)
    push(tmp_path / "late.pack", to)
    refused(SimpleNamespace(to=to), chain.bundle, "signed by a revoked key", second.hex[:16])


def test_a_pack_that_is_not_what_its_tag_says(small, chain):
    """The tag is a hint. What is installed is decided by the pack; here it is for another version."""
    tags = small.server.manifests["fruit/camera"]
    tags[small.tags[0]] = tags[small.tags[2]]
    refused(small, chain.bundle, "made for another version than the one that runs")
    tags[small.tags[0]] = json.dumps({"layers": []}).encode()
    refused(small, chain.bundle, "holds no pack")
    tags[small.tags[0]] = b"no JSON"
    refused(small, chain.bundle, "not the answer of a registry")
    tags[small.tags[0]] = tags[small.tags[1]].replace(b'"size": ', b'"size": 9999999999')
    refused(small, chain.bundle, "holds no pack", "1073741824 bytes")


def test_nothing_there_for_this_bundle(small, chain, make_version, make_registry):
    refused(SimpleNamespace(to=f"{small.server.at}/fruit/other"), chain.bundle, "no packs there", "no such repository")
    stranger = make_version(9, salt=1)
    said = refused(small, stranger, "no pack there is for the version that runs, or makes it", version(stranger))
    assert version(chain.v[0]) in said
    small.server.manifests["other/things"] = {"latest": b"{}"}
    refused(SimpleNamespace(to=f"{small.server.at}/other/things"), chain.bundle, "no packs there", "1 other tag(s)")


def test_a_registry_that_is_gone(small, chain, tmp_path):
    small.server.shutdown()
    small.server.server_close()
    refused(small, chain.bundle, "the registry cannot be reached", "Connection refused", "do:")
    with pytest.raises(InputError, match="the registry cannot be reached"):
        push(chain.packs[0], small.to)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_registry_that_fails(small, chain, status):
    said = b'{"errors": [{"code": "TOOMANY", "message": "come\\u0007 again"}]}'
    small.server.answer["/tags/list?n=1000"] = (status, {}, said)
    refused(small, chain.bundle, "the registry fails", f"{status}", "TOOMANY: come  again", "later")


@pytest.mark.parametrize(
    "answer", [(200, {}, b"<html>"), (200, {}, b'{"tags": 3}'), (200, {}, b"[]"), (418, {}, b"{}"), (204, {}, b"")]
)
def test_something_that_is_no_registry(small, chain, answer):
    small.server.answer["/tags/list?n=1000"] = answer
    refused(small, chain.bundle, "registry")


def test_answers_without_end(small, chain, monkeypatch):
    monkeypatch.setattr(registry, "MOST_PAGES", 1)
    refused(small, chain.bundle, "a list of tags that ends")
    monkeypatch.setattr(registry, "MOST_TEXT", 20)
    refused(small, chain.bundle, "20 bytes or fewer")


def test_two_at_the_same_time(small, chain):
    with fleet._folder(chain.bundle), pytest.raises(InputError, match="another command is pulling into it"):
        pull(small.to, chain.bundle, threads=1)
    assert version(chain.bundle) == version(chain.v[0])


def test_a_full_disk(small, chain, monkeypatch):
    monkeypatch.setattr(fleet.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    refused(small, chain.bundle, "the disk is full", "10 bytes free")


def test_a_version_that_does_not_answer_as_it_should(small, chain, monkeypatch):
    def fail(*_):
        raise packs.InputError("the self-test fails")

    monkeypatch.setattr(packs, "self_test", fail)
    refused(small, chain.bundle, "the self-test fails")


def test_a_gap_in_the_chain_is_said_when_it_is_made(make_registry, chain):
    server = make_registry()
    assert push(chain.packs[0], f"{server.at}/fruit")["reached"]
    assert not push(chain.packs[2], f"{server.at}/fruit")["reached"]
    assert push(chain.packs[1], f"{server.at}/fruit")["reached"]


def test_from_the_command_line(small, chain, cli):
    done = cli("pack", "push", str(chain.packs[0]), small.to, "--json")
    assert done.code == 0 and done.json["sent"] is False and done.json["tag"] == small.tags[0]
    done = cli("pack", "pull", small.to, str(chain.bundle), "--threads", "1")
    assert done.code == 0 and f"{version(chain.v[3])}, {small.to} has nothing newer" in done.out
    done = cli("pack", "pull", small.to, str(chain.bundle), "--json")
    assert done.code == 0 and done.json["steps"] == []
    small.server.answer["?n=1000"] = (403, {}, b"")
    done = cli("pack", "pull", small.to, str(chain.bundle))
    assert done.code == 2 and "does not let you in" in done.err and "Traceback" not in done.err


@pytest.mark.slow
def test_killed_in_between(at, chain):
    """After each step that is announced the process is killed; the version before runs, and the next call goes on."""
    to = f"{at}/fruit/camera"
    for pack in chain.packs:
        push(pack, to)
    command = [sys.executable, "-m", "cdl_edge.cli", "pack", "pull", to, str(chain.bundle), "--threads", "1"]
    for _ in range(3):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            before = version(chain.bundle)
            for line in process.stderr:
                if "to go" in line:
                    break
            os.kill(process.pid, signal.SIGKILL)
        assert version(chain.bundle) in (before, *[version(v) for v in chain.v])
        open_bundle(chain.bundle)
    pull(to, chain.bundle, threads=1)
    assert version(chain.bundle) == version(chain.v[3]) and not (chain.bundle / PULLED).exists()


# -- the way, and names ------------------------------------------------------------------------------------------------


def steps(*texts: str) -> list[Step]:
    """ "3ab": sequence 3, from version a to version b."""
    return [Step(int(text[:-2]), text[-2], text[-1]) for text in texts]


@pytest.mark.parametrize(
    ("there", "sequence", "wanted"),
    [
        (["1ab", "2bc", "3cd"], 0, ["1ab", "2bc", "3cd"]),
        (["1ab", "2bc", "3cd"], 1, []),  # rolled back from b
        (["1ab", "2bc", "3cd", "4ad"], 0, ["4ad"]),  # a short way
        (["1ab", "3bc", "2bd", "4de"], 0, ["1ab", "2bd", "4de"]),  # not into the dead end, though it is newer there
        (["1ab", "2bb", "3bc"], 0, ["1ab", "2bb", "3bc"]),  # keys on the way
        (["1ab", "9bb"], 0, ["1ab", "9bb"]),
        (["1ab", "9aa"], 0, ["1ab"]),  # keys for those who stay at a would keep them there
        (["1ab", "2ba", "3ac"], 0, ["3ac"]),
        (["1ab", "2ba"], 0, ["1ab", "2ba"]),  # back to the older content, by a newer pack
        (["2ab", "1bc"], 0, ["2ab"]),  # an order that devices would refuse
        (["1bc"], 0, []),
        ([], 0, []),
    ],
)
def test_the_way_to_the_newest_version(there, sequence, wanted):
    assert way(steps(*there), "a", sequence) == steps(*wanted)
    assert way(reversed(steps(*there)), "a", sequence) == steps(*wanted)


def test_a_long_way():
    chained = [Step(i + 1, f"{i:016x}", f"{i + 1:016x}") for i in range(300)]
    assert way(chained, f"{0:016x}", 0) == chained


def test_tags_that_are_not_ours():
    step = Step(1795264906, "0123456789abcdef", "f" * 16)
    others = ["latest", "v1", f"0-{'0' * 16}-{'1' * 16}", f"{step.tag}x", f"{'9' * 20}-{'0' * 16}-{'1' * 16}"]
    assert Step.all_of([*others, step.tag]) == [step]


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("registry.example.com/fruit", "https"),
        ("registry.example.com:5000/fruit/camera-2", "https"),
        ("localhost/fruit", "http"),
        ("127.0.0.1:5000/fruit", "http"),
        ("[::1]:5000/fruit", "http"),
        ("127.0.0.1.example.com/fruit", "https"),
        ("localhost.example.com/fruit", "https"),
        ("workshop:5000/fruit", "https"),
    ],
)
def test_where_a_repository_is(text, scheme):
    place = Place.of(text)
    assert (str(place), place.scheme) == (text, scheme)
    assert place.url("tags", "list") == f"{scheme}://{place.registry}/v2/{place.repository}/tags/list"
    assert Place.of(text, plain_http=True).scheme == "http"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fruit",
        "fruit/camera",
        "https://registry.example.com/fruit",
        "registry.example.com/Fruit",
        "registry.example.com/fruit:latest",
        "registry.example.com/fruit@sha256:0",
        "registry.example.com/../x",
        "registry.example.com/a/../../x",
        "user@registry.example.com/fruit",
        "registry.example.com/fruit?x",
        "registry.example.com/",
        "registry.example.com/" + "x" * 256,
    ],
)
def test_what_is_no_repository(text):
    with pytest.raises(InputError, match="names no repository") as caught:
        Place.of(text)
    assert "REGISTRY/REPOSITORY" in str(caught.value)


def test_from_an_enrolled_version_to_the_next(make_teachable, make_registry, colours, tmp_path):
    """It was called the newest there, although the next pack is for it, and `install` takes that."""
    first, device = make_teachable("first"), tmp_path / "other"
    shutil.copytree(first, device)
    to, made = f"{make_registry().at}/fruit/camera", [first]
    for number, (name, colour) in enumerate({"lemon": (220, 220, 40), "plum": (140, 40, 160)}.items(), 1):
        made.append(Path(shutil.copytree(made[-1], tmp_path / name, symlinks=True)))
        enrol(made[-1], name, colours.pictures(colour, 6), threads=1)
        pack = tmp_path / f"{name}.pack"
        create(made[-2], made[-1], pack, sequence=2_000_000_000 + number)
        push(pack, to)
    done = pull(to, device, threads=1)
    assert len(done["steps"]) == 2 and version(device) == version(made[-1])
    assert pull(to, device, threads=1)["steps"] == []
