"""A bundle opens as it was written, and not when a single byte differs."""

from __future__ import annotations

import io
import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdl_edge.artefacts import bundle as room
from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.artefacts.layout import BUNDLE_SCHEMA, MANIFEST
from cdl_edge.artefacts.manifest import canonical, sealed
from cdl_edge.errors import InputError
from cdl_edge.files import sha256
from cdl_edge.runtime import load

CONTENT: dict[str, Path | bytes] = {"student.onnx": b"graph", "prompts.bin": b"\0" * 40, "backbone.bin": b"b" * 300}


def reseal(folder: Path, **changes: Any) -> None:
    """Rewrite the manifest as someone would who knows how it is hashed."""
    manifest = sealed({**json.loads((folder / MANIFEST).read_text()), **changes})
    (folder / MANIFEST).write_text(canonical(manifest))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_bundle(folder, **options)
    message = str(caught.value)
    assert "do:" in message, "a refusal says what to do"
    return message


def test_round_trip(tmp_path, manifest):
    written = write_bundle(tmp_path / "b", manifest(name="größe"), CONTENT)
    opened = open_bundle(tmp_path / "b")
    assert opened == written
    assert opened.name == "größe"
    assert opened.classes == ("red", "green", "blue", "grey")
    assert opened.tasks == ((0, 1), (2, 3))
    assert (opened.batch, opened.preprocessing.size, opened.size_bytes) == (1, 8, 345)
    assert opened.graph() == tmp_path / "b" / "student.onnx"
    assert opened.manifest.document["schema"] == BUNDLE_SCHEMA
    for name, content in CONTENT.items():
        assert (tmp_path / "b" / name).read_bytes() == content
        assert opened.manifest.document["files"][name] == {
            "sha256": sha256(tmp_path / "b" / name),
            "bytes": len(content),
        }
    with pytest.raises(InputError, match="no graph 'query'"):
        opened.graph("query")


def test_files_are_copied_and_a_bundle_is_replaced(tmp_path, manifest):
    (tmp_path / "source.bin").write_bytes(b"12345")
    write_bundle(tmp_path / "b", manifest(), CONTENT)
    second = manifest(name="second"), {"student.onnx": tmp_path / "source.bin"}
    with pytest.raises(InputError, match="--force"):
        write_bundle(tmp_path / "b", *second)
    assert open_bundle(tmp_path / "b").name == "tiny"
    write_bundle(tmp_path / "b", *second, replace=True)
    assert open_bundle(tmp_path / "b").name == "second"
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [MANIFEST, "student.onnx"]
    assert (tmp_path / "source.bin").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path, manifest):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not just a bundle"):
        write_bundle(tmp_path / "home", manifest(), CONTENT, replace=True)
    with pytest.raises(InputError, match="not just a bundle"):
        write_bundle(tmp_path / "home" / "thesis.txt", manifest(), CONTENT, replace=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_a_dynamic_batch(tmp_path, manifest):
    fields = {**manifest()["input"], "dynamic_batch": True}
    assert write_bundle(tmp_path / "b", manifest(input=fields), CONTENT).batch is None


@pytest.mark.parametrize("name", ["student.onnx", "prompts.bin", "backbone.bin"])
def test_one_changed_byte_of_a_file(tmp_path, manifest, name):
    bundle = write_bundle(tmp_path / "b", manifest(), CONTENT)
    good = (bundle.path / name).read_bytes()
    for offset in sorted({0, 1, len(good) // 2, len(good) - 1}):
        (bundle.path / name).write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
        message = refusal(bundle.path)
        assert name in message
        assert "changed since it was written" in message
        assert bundle.manifest.document["files"][name]["sha256"] in message
    (bundle.path / name).write_bytes(good)
    open_bundle(bundle.path)


@pytest.mark.slow
def test_one_changed_byte_anywhere_in_the_manifest(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    good = (path / MANIFEST).read_bytes()
    # Every fourth byte, so that names, numbers, quotes, blanks and both ends are hit; the lowest and the highest bit.
    for offset in [*range(0, len(good), 4), len(good) - 1]:
        flip = 0x80 if offset % 3 == 0 else 0x01
        (path / MANIFEST).write_bytes(good[:offset] + bytes([good[offset] ^ flip]) + good[offset + 1 :])
        assert MANIFEST in refusal(path), f"offset {offset}"
    for text in (good + b" ", good[:-1], good.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + good, b""):
        (path / MANIFEST).write_bytes(text)
        assert MANIFEST in refusal(path)


@pytest.mark.parametrize("name", ["student.onnx", "prompts.bin", "backbone.bin", MANIFEST])
def test_a_truncated_or_missing_file(tmp_path, manifest, name):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    good = (path / name).read_bytes()
    for verify in (True, False):
        (path / name).write_bytes(good[: len(good) // 2])
        assert name in refusal(path, verify=verify)
        (path / name).write_bytes(good + b"x")
        assert name in refusal(path, verify=verify)
        (path / name).unlink()
        message = refusal(path, verify=verify)
        assert name in message
        assert "missing" in message


def test_what_is_no_bundle(tmp_path):
    assert "nothing there" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "a file" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in refusal(tmp_path / "empty")
    for text in (
        "[]",
        "3",
        "null",
        "{}",
        '{"schema": "1"}',
        '{"schema": true}',
        '{"schema": 0}',
        '{"schema": 1}',
        "[" * 99999,
    ):
        (tmp_path / "empty" / MANIFEST).write_text(text)
        assert MANIFEST in refusal(tmp_path / "empty")


def test_a_newer_schema_is_named_before_anything_else(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    (path / MANIFEST).write_text(json.dumps({"schema": BUNDLE_SCHEMA + 1, "something": "new"}))
    message = refusal(path)
    assert "upgrade cdl-edge" in message
    assert f"schema {BUNDLE_SCHEMA + 1}" in message


def test_another_kind_of_artefact(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    reseal(path, kind="pack")
    assert "'pack'" in refusal(path)


def test_class_count_mismatch(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    reseal(path, classes=["red", "green", "blue"])
    message = refusal(path)
    assert "class count mismatch" in message
    assert "3 classes" in message
    with pytest.raises(InputError, match="class count mismatch"):
        write_bundle(tmp_path / "c", manifest(outputs={"logits": [1, 5]}), CONTENT)
    assert not (tmp_path / "c").exists()


PREPROCESSING = {"size": 8, "resize": 8, "interpolation": "bilinear", "mean": [0, 0, 0], "std": [1, 1, 1]}
BAD_MEAN = {**PREPROCESSING, "mean": "xyz"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": ["red", "red", "blue", "grey"]}, "classes"),
        ({"classes": ["red", "", "blue", "grey"]}, "classes"),
        ({"classes": []}, "classes"),
        ({"classes": "red"}, "classes"),
        ({"tasks": [[0, 1], [2]]}, "tasks"),
        ({"tasks": [[0, 1], [1, 2, 3]]}, "tasks"),
        ({"tasks": [[0, 1, 2, 3], []]}, "tasks"),
        ({"tasks": [[0, 1, 2, "3"]]}, "tasks"),
        ({"tasks": [0, 1, 2, 3]}, "tasks"),
        ({"outputs": {}}, "class count"),
        ({"graphs": {}}, "graph 'student'"),
        ({"graphs": {"student": "other.onnx"}}, "graph 'student'"),
        ({"graphs": {"student": "student.onnx", "query": ["a"]}}, "graph 'query'"),
        ({"input": {"shape": [1, 9, 9, 3], "dtype": "uint8", "preprocessing": PREPROCESSING}}, "input"),
        ({"input": {"shape": [1, 8, 8, 3], "dtype": "float32", "preprocessing": PREPROCESSING}}, "input"),
        ({"input": {"shape": [0, 8, 8, 3], "dtype": "uint8", "preprocessing": PREPROCESSING}}, "batch"),
        ({"input": {"shape": [1, 8, 8, 3], "dtype": "uint8", "preprocessing": {"size": 8}}}, "preprocessing"),
        ({"input": {"shape": [1, 8, 8, 3], "dtype": "uint8", "preprocessing": BAD_MEAN}}, "preprocessing"),
        ({"selection": {"kind": "best", "k": 1, "blocks": [0]}}, "selection"),
        ({"selection": {"kind": "top-k", "k": 4, "blocks": [0, 1]}}, "k 4"),
        ({"selection": {"kind": "top-k", "k": 0, "blocks": [0, 1]}}, "k 0"),
        ({"selection": {"kind": "top-k", "k": 2, "blocks": [0]}}, "blocks"),
        ({"outputs": {"logits": [1, 4]}}, "prompt_weights"),
        ({"training": []}, "training"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other(tmp_path, manifest, changes, named):
    with pytest.raises(InputError, match=named):
        write_bundle(tmp_path / "b", manifest(**changes), CONTENT)
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    reseal(path, **changes)
    assert named in refusal(path)


BAD_NAMES = ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "C:x", "", ".", "./x", "a//b", MANIFEST, "x\0y"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_paths_stay_inside(tmp_path, manifest, name):
    with pytest.raises(InputError):
        write_bundle(tmp_path / "b", manifest(), {**CONTENT, name: b"x"})
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    (tmp_path / "x").write_bytes(b"x")
    files = json.loads((path / MANIFEST).read_text())["files"]
    reseal(path, files={**files, name: {"sha256": sha256(tmp_path / "x"), "bytes": 1}})
    assert "not allowed" in refusal(path)


def test_a_link_out_of_the_folder(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    shutil.move(path / "prompts.bin", tmp_path / "outside.bin")
    (path / "prompts.bin").symlink_to(tmp_path / "outside.bin")
    assert "leads out" in refusal(path)


def test_a_subfolder_and_unlisted_files_are_fine(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), {**CONTENT, "engines/a.engine": b"plan"}).path
    (path / "notes.txt").write_text("mine")
    assert "engines/a.engine" in open_bundle(path).manifest.document["files"]


def test_an_incomplete_entry(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    for entry in (None, {}, {"bytes": 5}, {"sha256": "x", "bytes": "5"}):
        reseal(path, files={"student.onnx": entry})
        assert "incomplete" in refusal(path)
    reseal(path, files=[])
    assert "'files'" in refusal(path)


def test_a_file_that_the_system_does_not_hand_out(tmp_path, manifest, monkeypatch):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path

    def denied(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(room, "sha256", denied)
    message = refusal(path)
    assert f"{path / 'student.onnx'}: cannot be read" in message
    assert "Permission denied" in message


def test_verify_false_trusts_contents_only(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    (path / "prompts.bin").write_bytes(b"\1" * 40)
    open_bundle(path, verify=False)
    assert "changed" in refusal(path)


def test_what_json_cannot_hold(tmp_path, manifest):
    with pytest.raises(InputError, match="not plain JSON"):
        write_bundle(tmp_path / "b", manifest(alpha=float("nan")), CONTENT)
    with pytest.raises(InputError, match="not plain JSON"):
        write_bundle(tmp_path / "b", manifest(alpha=Path("x")), CONTENT)
    with pytest.raises(InputError, match=MANIFEST):
        write_bundle(tmp_path / "b", manifest(), {**CONTENT, MANIFEST: b"{}"})
    assert not (tmp_path / "b").exists()


def test_a_changed_file_is_refused_before_it_is_opened(bundle, monkeypatch):
    import onnxruntime

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the graph was opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    data = bytearray((bundle.path / "backbone.bin").read_bytes())
    data[0] ^= 1
    (bundle.path / "backbone.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"backbone\.bin"):
        load(bundle.path)


def test_the_same_content_is_the_same_version(tmp_path, manifest):
    """Another day, another folder, other measured times: packs made for one fit the other."""
    timed = {"backend": "onnxruntime", "precision": "fp32", "ratio": 1.0}
    quantisation = {"recommended": None, "latency": [{**timed, "compute_ms": 1.0}]}
    one = write_bundle(tmp_path / "a", manifest(quantisation=quantisation), CONTENT)
    later = {"latency": [{**timed, "compute_ms": 2.0}], "recommended": None}
    other = manifest(name="b", created="2027-01-01T00:00:00Z", quantisation={**quantisation, **later})
    two = write_bundle(tmp_path / "b", other, CONTENT)
    assert one.manifest.document["manifest_sha256"] == two.manifest.document["manifest_sha256"]
    assert one.manifest.document["text_sha256"] != two.manifest.document["text_sha256"]
    three = write_bundle(tmp_path / "c", manifest(alpha=0.25), CONTENT)
    assert three.manifest.document["manifest_sha256"] != one.manifest.document["manifest_sha256"]


def test_a_bundle_of_schema_1_opens(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    document = {k: v for k, v in json.loads((path / MANIFEST).read_text()).items() if k != "text_sha256"}
    reseal_whole = sealed({**document, "schema": 1})
    assert "text_sha256" not in reseal_whole
    (path / MANIFEST).write_text(canonical(reseal_whole))
    assert open_bundle(path).name == "tiny"
    (path / MANIFEST).write_text(canonical({**reseal_whole, "name": "other"}))
    assert "changed since" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"signatures": []},
        {"signatures": {"student": None}},
        {"signatures": {"student": {"inputs": {"images": 3}, "outputs": {"logits": [1, 4]}}}},
        {"signatures": {"student": {"inputs": {"images": [1, 8, 8, 3]}, "outputs": {"logits": [1, 5]}}}},
        {"quantisation": "int8"},
        {"quantisation": {"recommended": "int8"}},
        {"quantisation": {"recommended": {"precision": ["int8"]}}},
        {"selftest": "../selftest.npz"},
        {"selftest": ["selftest.npz"]},
        {"selections": "elsewhere.npz"},
        {"statistics": "elsewhere.npz"},
        {"tasks": [3, [0, 1, 2]]},
        {"backbone": {"width": "wide"}},
    ],
)
def test_fields_that_runners_and_reports_go_by(tmp_path, manifest, changes):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    reseal(path, **changes)
    refusal(path)


@pytest.mark.parametrize(("key", "value"), [("size", 8.0), ("resize", 10**9), ("resize", True), ("size", 10**9)])
def test_sizes_of_pictures_that_no_device_has(tmp_path, manifest, key, value):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    fields = manifest()["input"]
    preprocessing = {**fields["preprocessing"], key: value}
    side = preprocessing["size"]
    reseal(path, input={**fields, "shape": [1, side, side, 3], "preprocessing": preprocessing})
    assert "'preprocessing'" in refusal(path)


@pytest.mark.parametrize("names", [("q", "q/r"), ("n" * 300,), ("a/b/c/d/e",), ("x\x1b[31m",)])
def test_names_that_no_folder_can_have(tmp_path, manifest, names):
    files = CONTENT | dict.fromkeys(names, b"x")
    with pytest.raises(InputError, match="not allowed"):
        write_bundle(tmp_path / "b", manifest(), files)
    assert list(tmp_path.iterdir()) == []


def test_only_a_whole_bundle_and_nothing_else_is_replaced(tmp_path, manifest):
    path = write_bundle(tmp_path / "b", manifest(), CONTENT).path
    for name in ("notes.txt", "sub/notes.txt", "engines/x.engine", "student.onnx"):
        copy = Path(shutil.copytree(path, tmp_path / f"copy of {name.replace('/', ' ')}"))
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("years of work")
        with pytest.raises(InputError, match=name.split("/")[-1]):
            write_bundle(copy, manifest(name="new"), CONTENT, replace=True)
        assert (copy / name).read_text() == "years of work"
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / MANIFEST).write_text('{"name": "a web page"}')  # a browser's manifest.json, not ours
    with pytest.raises(InputError, match="not just a bundle"):
        write_bundle(tmp_path / "plain", manifest(), CONTENT, replace=True)
    store = tmp_path / "store"
    (store / "versions").mkdir(parents=True)
    path.rename(store / "versions" / ("0" * 16))
    (store / "current").symlink_to("versions/" + "0" * 16)
    with pytest.raises(InputError, match="a store of versions: make a pack"):  # no key is pinned there
        write_bundle(store, manifest(), CONTENT, replace=True)


@pytest.mark.parametrize("shape", [(10**9, 8, 8, 3), (65, 8, 8, 3), (2, 4096, 4096, 3)])
def test_a_self_test_that_would_fill_the_memory(tmp_path, manifest, shape):
    """Small in the file, because zeros compress; or a header that promises what is not there."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        archive.writestr("images.npy", header.getvalue() + bytes(1 << 20))
        archive.writestr("logits.npy", b"")
    files = CONTENT | {"selftest.npz": stream.getvalue()}
    bundle = write_bundle(tmp_path / "b", manifest(selftest="selftest.npz"), files)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="expected uint8"):
            bundle.selftest()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
