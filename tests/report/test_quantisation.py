"""What 8 bits cost, as the page says it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.artefacts.quantisation_record import Quantisation
from cdl_edge.artefacts.typed import parse
from cdl_edge.errors import InputError
from cdl_edge.report.model_page import write_report
from cdl_edge.report.quantisation import _latency, change_text


def graph(*constants: tuple[str, int, int]) -> bytes:
    """An ONNX file with constants (file, offset, length) in float32."""
    tensors = []
    for number, (location, offset, length) in enumerate(constants):
        tensor = TensorProto(name=f"c{number}", data_type=TensorProto.FLOAT, dims=[length // 4])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    made = helper.make_graph([], "g", [], [], tensors)
    return onnx.ModelProto(ir_version=9, graph=made).SerializeToString()


@pytest.fixture
def page_of(
    tmp_path: Path, metrics: dict[str, Any], save_bundle: Callable[..., Path], read_page: Callable[[Path], Any]
) -> Callable[[Any], Any]:
    """page_of(quantisation) -> the page of a bundle with it and a graph in 8 bits."""

    def make(found: Any) -> Any:
        opened = open_bundle(save_bundle(tmp_path / "bundle", metrics))
        files: dict[str, Path | bytes] = {
            "student.onnx": graph(("backbone.bin", 0, 1_600_000)),
            "student.int8-x86.onnx": graph(("backbone.bin", 0, 100_000), ("backbone.int8.bin", 0, 400_000)),
            "backbone.bin": opened.path / "backbone.bin",
            "backbone.int8.bin": b"x" * 400_000,
        }
        graphs = {"student": "student.onnx", "student.int8-x86": "student.int8-x86.onnx"}
        write_bundle(tmp_path / "int8", {**opened.manifest.document, "quantisation": found, "graphs": graphs}, files)
        return read_page(write_report(tmp_path / "r.html", bundle=tmp_path / "int8"))

    return make


def cells(page: Any) -> list[list[str]]:
    """Rows of all tables, as texts; each cell is one text where it has no mark-up of its own."""
    rows = [row.split("</tr>")[0] for row in page.html.split("<tr")[1:]]
    strip = lambda cell: cell.split(">", 1)[1].split("<")[0]  # noqa: E731
    return [[strip(c) for c in row.replace("<td", "<th").split("<th")[1:]] for row in rows]


def test_every_number_is_shown(page_of: Callable[[Any], Any], quantisation: dict[str, Any]) -> None:
    page = page_of(quantisation)
    assert page.sections == {"accuracy", "int8", "export", "card"}
    rows = cells(page)
    for expected in (
        ["fp32", "81.2", "79.9", "90.4", "83.8"],
        ["int8-x86", "80.0", "80.2", "90.4", "83.5"],
        ["change", "−1.14", "+0.30", "0.00", "−0.28"],
        ["change", "0.00", "0.00", "0.00", "0.00"],
        ["Average accuracy, %", "83.82", "83.54", "83.82"],
        ["Average change, points", "", "−0.28", "0.00"],
        ["Worst task, points", "", "−1.14", "0.00"],
        ["Worst task", "", "1", "none loses"],
        ["Quantisation forgetting, points", "", "+0.77", "–"],
        ["Confidence, %", "75.1", "74.3", "74.3"],
        ["Calibration error, points", "3.21", "4.56", "4.56"],
        ["Same answer as fp32, %", "", "98.25", "98.25"],
        ["Layers in 8 bits", "", "44", "44"],
        ["Layers left in float", "", "1", "0"],
        ["blocks.3.fc2", "4.56", "in float"],
        ["blocks.0.qkv", "0.0123", "8 bits"],
    ):
        assert any(row[: len(expected)] == expected for row in rows), (expected, rows)
    # What a graph reads of its files, not what lies in them.
    sizes = {row[0]: row[2:4] for row in rows if len(row) == 4 and row[3].endswith("B")}
    assert sizes == {"fp32": ["1.6 MB", "1.6 MB"], "int8-x86": ["500 kB", "500 kB"]}
    for expected in (
        "what was kept while 3 tasks were learnt and 64 images of 1 of 3 tasks",
        "method mse, channels after a LayerNorm evened out with strength 0.5",
        "may lose more than 1.5 points",
        "within the gate",
        "Left in float: blocks.3.fc2.",
        "what reads U8",
        "ONNX Runtime fp32 8.25 1.00 ×",
        "OpenVINO int8 recommended 3.30 2.50 ×",
        "above 0, 8 bits hurt old tasks more",
        "single classes may lose more",
    ):
        assert expected in page.text, expected
    assert page.html.count(">blocks.9.") == 8  # ten layers are enough
    assert page.html.index(">blocks.3.fc2</th>") < page.html.index(">blocks.0.qkv</th>")
    assert page.html.count('class="num lost"') == 2


def test_without_labelled_images(page_of: Callable[[Any], Any], quantisation: dict[str, Any]) -> None:
    quantisation |= {"ranges": {"kept_tasks": 3, "images": 0, "tasks_with_images": []}, "smooth": None}
    quantisation |= {"max_drop": None, "latency": []}
    for flavour in quantisation["flavours"].values():
        flavour |= {"before": None, "after": None, "layers_float": [], "sensitivity": None}
        del flavour["drop"], flavour["quantisation_forgetting"]
    page = page_of(quantisation)
    for expected in ("No image of any task was needed", "was not measured", "98.25"):
        assert expected in page.text, expected
    for absent in (
        "Average change",
        "within the gate",
        "evened out",
        "Accuracy before and after",
        "Speed",
        "Layers of",
    ):
        assert absent not in page.text, absent


def test_tasks_without_images(page_of: Callable[[Any], Any], quantisation: dict[str, Any]) -> None:
    for flavour in quantisation["flavours"].values():
        for side in ("before", "after", "drop"):
            flavour[side]["per_task"][:2] = [None, None]
        flavour["quantisation_forgetting"] = None
    page = page_of(quantisation)
    assert ["int8-x86", "–", "–", "90.4", "83.5"] in cells(page)
    assert "no image of this task was at hand" in page.text
    assert "Quantisation forgetting, points" not in page.text


@pytest.mark.parametrize("found", [None, {}, {"flavours": {}}])
def test_no_section_without_graphs_in_8_bits(page_of: Callable[[Any], Any], found: Any) -> None:
    assert "int8" not in page_of(found).sections


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("flavours", [1]),
        ("flavours.int8-x86", "good"),
        ("flavours.int8-x86.agreement", None),
        ("flavours.int8-x86.before.per_task", [80.0]),
        ("flavours.int8-x86.after.per_task", [None, None, None]),
        ("flavours.int8-x86.after.confidence", "high"),
        ("flavours.int8-x86.drop", None),
        ("flavours.int8-x86.layers_float", "blocks.1"),
        ("flavours.int8-x86.sensitivity", {"blocks.1.fc1": "much"}),
        ("flavours.int8-x86.quantisation_forgetting", "none"),
        ("latency", {"fp32": 1}),
        ("latency", [{"backend": "onnxruntime", "precision": "fp32", "compute_ms": 8.0, "ratio": 0.0}]),
        ("latency", [{"backend": None, "precision": "fp32", "compute_ms": 8.0, "ratio": 1.0}]),
        ("ranges", [1]),
        ("ranges.images", "many"),
        ("max_drop", "little"),
        ("recommended", "int8"),
    ],
)
def test_malformed(
    page_of: Callable[[Any], Any], quantisation: dict[str, Any], tmp_path: Path, path: str, value: object
) -> None:
    changed = copy.deepcopy(quantisation)
    *parents, key = path.split(".")
    target = changed
    for parent in parents:
        target = target[parent]
    target[key] = value
    with pytest.raises(InputError, match=r"manifest\.json"):
        page_of(changed)
    assert not (tmp_path / "r.html").exists()


def test_hostile_names(page_of: Callable[[Any], Any], quantisation: dict[str, Any], hostile: str) -> None:
    quantisation["flavours"][hostile] = quantisation["flavours"].pop("int8-arm")
    quantisation["flavours"]["int8-x86"]["layers_float"] = [hostile]
    assert "<script" not in page_of(quantisation).html


def test_signs() -> None:
    assert [change_text(v) for v in (0.0, -0.001, 0.004, 1.5, -2.0)] == ["0.00", "0.00", "0.00", "+1.50", "−2.00"]


def test_the_longest_bar_is_the_fastest(quantisation):
    rows = _latency(parse(Quantisation, quantisation, "manifest.json"))
    assert [r["share"] for r in rows] == [40, 100]
    assert [r["best"] for r in rows] == [False, True]


@pytest.mark.parametrize(
    ("verdict", "badge"),
    [("passed", "within the gate"), ("not decided", "the gate cannot tell"), (None, "cannot tell")],
)
def test_only_what_passed_is_within_the_gate(page_of, quantisation, verdict, badge):
    for flavour in quantisation["flavours"].values():  # None: calibrated before the gate knew its error
        flavour["gate"] = verdict and {"verdict": verdict, "unsure": [] if verdict == "passed" else ["task 1: few"]}
    text = page_of(quantisation).text
    assert badge in text and ("within the gate" in text) == (verdict == "passed")
    assert ("task 1: few" in text) == (verdict == "not decided")


def test_what_was_faster_and_not_recommended_is_named(page_of, quantisation):
    quantisation["refused"] = [{"backend": "openvino", "precision": "int8", "reason": "the same answer on 50.0 %"}]
    assert "OpenVINO in int8 is not recommended: the same answer on 50.0 %." in page_of(quantisation).text
