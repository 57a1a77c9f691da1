"""The sidecar: written after the plan, compared before the plan is touched. No TensorRT in here."""

from __future__ import annotations

import hashlib
import json

import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime.engines import sidecar

HERE = {
    "product": "tensorrt",
    "version": "10.3.0",
    "gpu": "Orin",
    "capability": "8.7",
    "driver": "12.6",
    "board": "NVIDIA Jetson Orin Nano",
    "l4t": "36.4.3",
}
FILES = {"backbone.bin": "b" * 64, "prompts.bin": "p" * 64}
OPTIONS = {"workspace_mib": 1024}
KNOWN = {
    "identity": HERE,
    "options": OPTIONS,
    "graph": "g" * 64,
    "files": FILES,
    "refittable": ["head.weight"],
    "achieved": {},
    "gate": {},
    "build_seconds": 1.0,
    "refits": 0,
}


def compare(document, options=None, **here):
    return list(sidecar.differences(document, {**HERE, **here}, "g" * 64, FILES, options))


@pytest.fixture
def engine(tmp_path):
    """A plan with its sidecar."""
    path = tmp_path / "engines" / "student.fp16.orin-sm87.engine"
    sidecar.write(path, b"a plan", KNOWN)
    return path


def test_the_engine_stays_a_plain_plan(engine):
    assert engine.read_bytes() == b"a plan"
    document = json.loads((engine.parent / "student.fp16.orin-sm87.engine.json").read_text())
    assert document["sha256"] == hashlib.sha256(b"a plan").hexdigest() and document["bytes"] == 6
    assert sidecar.read(engine) == document and compare(document) == []
    assert sidecar.verify_plan(engine, document) == b"a plan"


@pytest.mark.parametrize(
    ("key", "value", "title"),
    [
        ("version", "10.7.0", "TensorRT version"),
        ("gpu", "NVIDIA L4", "GPU"),
        ("capability", "8.9", "compute capability"),
        ("l4t", "36.4.4", "Jetson Linux"),
        ("board", None, "board"),
        ("product", "tensorrt_rtx", "product"),
    ],
)
def test_another_device_is_told(engine, key, value, title):
    found = compare(sidecar.read(engine), **{key: value})
    assert [what.startswith(title) for what, _, _ in found] == [True]
    message = str(sidecar.unfit(engine, found))
    assert f"{HERE[key]}" in message and f"{value}" in message
    assert "rebuild with: cdl-edge build BUNDLE" in message and str(engine) in message


def test_a_newer_driver_alone_is_fine(engine):
    assert compare(sidecar.read(engine), driver="13.0") == []


def test_options_count_when_they_are_given(engine):
    document = sidecar.read(engine)
    assert compare(document, OPTIONS) == []
    assert [what for what, _, _ in compare(document, {"workspace_mib": 7})] == ["build options"]


def test_files_are_told_by_name(engine):
    document = sidecar.read(engine)
    changed = {"backbone.bin": "b" * 64, "prompts.bin": "q" * 64}
    assert [w for w, _, _ in sidecar.differences(document, HERE, "g" * 64, changed, None)] == ["prompts.bin"]
    assert [w for w, _, _ in sidecar.differences(document, HERE, "h" * 64, {}, None)] == [
        "graph",
        "backbone.bin",
        "prompts.bin",
    ]


@pytest.mark.parametrize("content", [b"a plam", b"a pla", b"a plan and more", b""])
def test_a_changed_plan_is_not_handed_out(engine, content):
    engine.write_bytes(content)
    with pytest.raises(InputError, match="changed since it was written") as caught:
        sidecar.verify_plan(engine, sidecar.read(engine))
    assert "executable code" in str(caught.value)


def test_half_of_the_pair_is_no_engine(engine):
    assert sidecar.read(engine.with_name("other.engine")) is None
    sidecar.sidecar_path(engine).unlink()
    assert sidecar.read(engine) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"kind": "bundle", "schema": 1}', '{"kind": "engine"}'])
def test_a_broken_sidecar_is_told(engine, text):
    sidecar.sidecar_path(engine).write_text(text)
    with pytest.raises(InputError, match="sidecar"):
        sidecar.read(engine)


def test_a_newer_sidecar_is_refused(engine):
    document = {**sidecar.read(engine), "schema": 2}
    sidecar.sidecar_path(engine).write_text(json.dumps(document))
    with pytest.raises(InputError, match="another kind or version"):
        sidecar.read(engine)


def test_a_crash_between_plan_and_sidecar_leaves_no_engine(engine, monkeypatch):
    def crash(*arguments):
        raise OSError("power lost")

    monkeypatch.setattr(sidecar, "write_json", crash)
    with pytest.raises(OSError, match="power lost"):
        sidecar.write(engine, b"a new plan", KNOWN)
    assert sidecar.read(engine) is None
