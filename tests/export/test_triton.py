"""The model repository for Triton: its config agrees with the graph, its files compute what the bundle computes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from cdl_edge.artefacts.bundle import write_bundle
from cdl_edge.errors import InputError
from cdl_edge.export import triton
from cdl_edge.export.assembly import assemble
from cdl_edge.export.student_graph import StudentGraph
from cdl_edge.export.triton import config, write_repository
from cdl_edge.runtime import load, open_bundle

CLASSES = ["Bäume", 'a "quoted" one', "back\\slash", "tree", "street", "sky", "it's"]


@pytest.fixture(scope="module")
def make(lab, tmp_path_factory):
    """make(batch) -> a CODA + KDP bundle with its passes apart."""
    student = lab.student("coda")

    def write(batch: int | None = 1, name: str = "birds", **changes):
        parts = ("student", "query", "prompted")
        graphs = {p: StudentGraph(student, lab.preprocessing, lab.classes, batch).build(p) for p in parts}
        artefact = assemble(graphs, {})
        rows = batch or 1
        outputs = {n: [rows, *s] for n, s in graphs["student"].outputs.items()}
        manifest = {
            "name": name,
            "classes": CLASSES,
            "tasks": [list(range(len(CLASSES)))],
            "input": {
                "name": "images",
                "shape": [rows, lab.side, lab.side, 3],
                "dtype": "uint8",
                "dynamic_batch": batch is None,
                "preprocessing": lab.preprocessing.to_json(),
            },
            "outputs": outputs,
            "selection": {"kind": "none"},
            "opset": 23,
            "graphs": {p: f"{p}.onnx" for p in parts},
            "signatures": {
                p: {
                    "inputs": {n: [rows, *s] for n, (_, s) in graphs[p].inputs.items()},
                    "outputs": {n: [rows, *s] for n, s in graphs[p].outputs.items()},
                }
                for p in parts
            },
        }
        files = {f"{p}.onnx": model for p, model in artefact.models.items()} | artefact.constants
        return write_bundle(tmp_path_factory.mktemp("bundles") / name, {**manifest, **changes}, files)

    return write


@pytest.fixture(scope="module")
def bundle(make):
    """Batch 1."""
    return make()


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def parse(text: str):
    """By the definition that Triton itself is built from."""
    reason = "tritonclient is not installed: pip install tritonclient grpcio protobuf packaging"
    proto = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason=reason)
    from google.protobuf import text_format

    return text_format.Parse(text, proto.ModelConfig()), proto


def test_layout(bundle, tmp_path):
    assert write_repository(bundle, tmp_path / "models") == tmp_path / "models"
    assert tree(tmp_path / "models") == [
        *("birds/1/backbone.bin", "birds/1/model.onnx", "birds/1/prompts.bin"),
        *("birds/config.pbtxt", "birds/labels.txt"),
    ]
    assert (tmp_path / "models/birds/labels.txt").read_text(encoding="utf-8").splitlines() == CLASSES


@pytest.mark.parametrize("batch", [1, 2, None])
def test_config_and_graph_agree(make, tmp_path, batch):
    """Read with a regular expression, so that it is tested where tritonclient is not installed."""
    write_repository(make(batch), tmp_path)
    text = (tmp_path / "birds" / "config.pbtxt").read_text(encoding="ascii")
    assert f"max_batch_size: {0 if batch else 8}\n" in text
    assert ("dynamic_batching" in text) == (batch is None)
    graph = onnx.load(str(tmp_path / "birds/1/model.onnx"), load_external_data=False).graph
    kinds = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    for what, values in (("input", graph.input), ("output", graph.output)):
        pattern = rf'^{what} {{ name: "(\w+)" data_type: (\w+) dims: \[(.*?)\]'
        found = {n: (kind, [int(d) for d in dims.split(",")]) for n, kind, dims in re.findall(pattern, text, re.M)}
        expected = {}
        for value in values:
            tensor = value.type.tensor_type
            sizes = [d.dim_value for d in tensor.shape.dim]
            expected[value.name] = (kinds[tensor.elem_type], sizes if batch else sizes[1:])
        assert found == expected


@pytest.mark.parametrize("batch", [1, 2, None])
@pytest.mark.parametrize("key", ["student", "query", "prompted"])
def test_the_real_parser_takes_it(make, batch, key):
    bundle = make(batch)
    parsed, proto = parse(config(bundle, key, "a-model"))
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("a-model", "onnxruntime", 0 if batch else 8)
    assert parsed.HasField("dynamic_batching") == (batch is None)
    signature = bundle.signature(key)
    for values, shapes in ((parsed.input, signature.inputs), (parsed.output, signature.outputs)):
        assert {v.name: tuple(v.dims) for v in values} == {n: s if batch else s[1:] for n, s in shapes.items()}
    types = {v.name: v.data_type for v in parsed.input}
    assert types.pop("images") == proto.TYPE_UINT8
    assert set(types.values()) <= {proto.TYPE_FP32}
    assert [o.name for o in parsed.output if o.label_filename == "labels.txt"] == ["logits"] * (key != "query")
    assert [(g.kind, g.count) for g in parsed.instance_group] == [(proto.ModelInstanceGroup.KIND_AUTO, 1)]
    (warmup,) = parsed.model_warmup
    assert warmup.batch_size == 1
    assert {n: (tuple(i.dims), i.data_type) for n, i in warmup.inputs.items()} == {
        v.name: (tuple(v.dims), v.data_type) for v in parsed.input
    }
    values = {k: v.string_value for k, v in parsed.parameters.items()}
    assert values["cdl_edge.manifest_sha256"] == bundle.manifest.document["manifest_sha256"]
    assert json.loads(values["cdl_edge.preprocessing"]) == bundle.preprocessing.to_json()


@pytest.mark.parametrize("text", ['a "b" \\ c', "Bäume\n\t", "\x00\x7f", ""])
def test_quoting(text):
    parsed, _ = parse(f"name: {triton._quoted(text)}")
    assert parsed.name == text


def test_the_files_compute_what_the_bundle_computes(bundle, lab, tmp_path):
    write_repository(bundle, tmp_path, graphs=("student", "query", "prompted"))
    assert {p.name for p in tmp_path.iterdir()} == {"birds", "birds-query", "birds-prompted"}
    assert not (tmp_path / "birds-query" / "labels.txt").exists()

    def session(model):
        path = tmp_path / model / "1" / "model.onnx"
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    pixels = lab.pixels(3)
    with load(bundle, threads=1) as runner:
        expected = runner.run(pixels)
    student, query, prompted = (session(m) for m in ("birds", "birds-query", "birds-prompted"))
    for i in range(3):
        images = pixels[i : i + 1]
        logits, weights = student.run(["logits", "prompt_weights"], {"images": images})
        np.testing.assert_allclose(logits[0], expected.logits[i], atol=1e-5)
        np.testing.assert_allclose(weights[0], expected.prompt_weights[i], atol=1e-5)
        feed = dict(zip([o.name for o in query.get_outputs()], query.run(None, {"images": images}), strict=True))
        (logits,) = prompted.run(["logits"], {"images": images, **feed})
        np.testing.assert_allclose(logits[0], expected.logits[i], atol=1e-4)


def test_again_and_beside(bundle, make, tmp_path):
    write_repository(bundle, tmp_path)
    write_repository(make(name="trees"), tmp_path)
    with pytest.raises(InputError, match="--force"):
        write_repository(bundle, tmp_path)
    write_repository(bundle, tmp_path, replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {"birds", "trees"}
    for name in ("1/notes.bin", "labels.txt"):
        (tmp_path / "birds" / name).write_bytes(b"x")
        with pytest.raises(InputError, match=name):
            write_repository(bundle, tmp_path, replace=True)
        assert (tmp_path / "birds" / name).read_bytes() == b"x"
        (tmp_path / "birds" / name).unlink()


@pytest.mark.parametrize("found", ["notes.txt", "other/config.pbtxt", "birds/1/model.onnx"])
def test_a_folder_of_somebody_else(bundle, tmp_path, found):
    path = tmp_path / found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('name: "other"')
    with pytest.raises(InputError, match="no model repository of cdl-edge"):
        write_repository(bundle, tmp_path)
    assert tree(tmp_path) == [found]
    with pytest.raises(InputError, match="no model repository of cdl-edge"):
        write_repository(bundle, path)


def test_whole_or_not_at_all(bundle, tmp_path, monkeypatch):
    write_repository(bundle, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    written = []

    def config_of_the_first(bundle, key, model, *more):
        written.append(key)
        if len(written) == 2:
            raise OSError("no space left on device")
        return config(bundle, key, model, *more)

    monkeypatch.setattr(triton, "config", config_of_the_first)
    with pytest.raises(OSError, match="no space"):
        write_repository(bundle, tmp_path, graphs=("student", "query"), replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {"birds"}
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_a_file_that_changes_meanwhile(make, tmp_path):
    bundle = make(name="changing")
    opened = open_bundle(bundle.path)
    path = bundle.path / "prompts.bin"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(InputError, match=r"prompts\.bin: changed"):
        write_repository(opened, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_what_triton_cannot_take(bundle, make, tmp_path):
    for name in ("a/b", "..", "ü", "-x"):
        with pytest.raises(InputError, match="not a name"):
            write_repository(bundle, tmp_path, name=name)
    with pytest.raises(InputError, match="several lines"):
        write_repository(make(classes=["a\nb", *CLASSES[1:]]), tmp_path)
    with pytest.raises(InputError, match="no graph"):
        write_repository(bundle, tmp_path / "new", graphs=("student.fp16",))
    assert tree(tmp_path) == []
