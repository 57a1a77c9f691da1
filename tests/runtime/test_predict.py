"""Predictions against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from cdl_edge import api
from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.predict import CHUNK, predict, probabilities


@pytest.fixture
def runner(bundle):
    with load(bundle, threads=1) as loaded:
        yield loaded


def test_labels_probabilities_and_prompts(runner, tiny, tmp_path):
    (tmp_path / "red.png").write_bytes(tiny.png((255, 0, 0)))
    report = predict(runner, [tmp_path / "red.png", tiny.png((0, 0, 255), side=50), str(tmp_path / "red.png")])
    red, blue, again = report["predictions"]
    # pure red: logits 4, 0, 0, 1.51; query row 0: block 0 = 1, -2, .5; block 1 = 3, 0, -1; k = 2
    total = math.exp(4) + 2 + math.exp(1.51)
    assert (red["image"], red["label"], red["index"]) == (str(tmp_path / "red.png"), "red", 0)
    assert red["probability"] == pytest.approx(math.exp(4) / total, rel=1e-5)
    assert red["prompts"]["selected"] == [0, 2, 0, 1]
    assert red["prompts"]["weights"] == pytest.approx([1, 0.5, 3, 0], abs=1e-5)
    assert "top" not in red
    assert (blue["image"], blue["label"], blue["index"]) == ("image 1", "blue", 2)
    assert again == red
    json.dumps(report)


def test_a_task_restricts_the_classes(runner, tiny):
    red = tiny.png((255, 0, 0))
    (free,) = predict(runner, [red], top=9)["predictions"]
    (told,) = predict(runner, [red], task=1, top=9)["predictions"]
    assert free["label"] == "red"
    assert [t["label"] for t in free["top"]] == ["red", "grey", "green", "blue"]
    assert [(t["label"], t["index"]) for t in told["top"]] == [("grey", 3), ("blue", 2)]
    assert told["probability"] == pytest.approx(math.exp(1.51) / (1 + math.exp(1.51)), rel=1e-5)
    assert {k: told[k] for k in ("label", "index", "probability")} == told["top"][0]
    assert sum(t["probability"] for t in told["top"]) == pytest.approx(1)


def test_more_images_than_a_chunk(runner, tiny):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sources = [tiny.png(colours[i % 3]) for i in range(2 * CHUNK + 5)]
    predictions = predict(runner, sources)["predictions"]
    assert [p["label"] for p in predictions] == [["red", "green", "blue"][i % 3] for i in range(len(sources))]
    assert [p["image"] for p in predictions] == [f"image {i}" for i in range(len(sources))]


@pytest.mark.parametrize("task", [-1, 2])
def test_a_task_that_is_not_there(runner, tiny, task):
    with pytest.raises(InputError, match="0 to 1"):
        predict(runner, [tiny.png((0, 0, 0))], task=task)


def test_an_unreadable_image_stops_before_the_first_inference(runner, tiny, tmp_path, monkeypatch):
    (tmp_path / "good.png").write_bytes(tiny.png((255, 0, 0)))
    (tmp_path / "broken.png").write_bytes(tiny.png((255, 0, 0))[:40])
    calls = []
    monkeypatch.setattr(runner, "run", lambda images: calls.append(images))
    for bad in ("broken.png", "absent.png"):
        with pytest.raises(InputError, match=bad):
            predict(runner, [tmp_path / "good.png", tmp_path / bad])
    assert calls == []


def test_an_unreadable_image_among_many_is_named_and_left_out(runner, tiny, tmp_path):
    good = [tiny.png((255, 0, 0))] * (CHUNK - 1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    report = predict(runner, [*good, broken, *good], skip_unreadable=True)
    assert len(report["predictions"]) == 2 * (CHUNK - 1)
    assert [p["image"] for p in report["predictions"]][CHUNK - 2 : CHUNK] == [f"image {CHUNK - 2}", f"image {CHUNK}"]
    assert [u["image"] for u in report["unreadable"]] == [str(broken)] and "broken.png" in report["unreadable"][0][
        "reason"
    ]
    with pytest.raises(InputError, match=r"broken\.png"):  # nothing is left to classify
        predict(runner, [broken, broken], skip_unreadable=True)


def test_an_answer_that_is_no_number(make_bundle, tiny):
    bundle = make_bundle(graph={"bias": np.full(4, np.nan, np.float32)})
    with load(bundle, threads=1) as runner, pytest.raises(InputError, match="is no number"):
        predict(runner, [tiny.png((0, 0, 0))])


def test_wrong_arguments(runner, tiny):
    with pytest.raises(InputError, match="no image"):
        predict(runner, [])
    with pytest.raises(InputError, match="top"):
        predict(runner, [tiny.png((0, 0, 0))], top=0)


def test_one_picture_alone(bundle, runner, tiny, tmp_path, monkeypatch):
    """A path is text, and text a sequence: of its letters the first, "/", names the whole disk."""
    path = tmp_path / "red.png"
    path.write_bytes(tiny.png((255, 0, 0)))
    monkeypatch.setattr("cdl_edge.folders.pictures_below", lambda *_, **__: pytest.fail("looks for pictures elsewhere"))
    frame = np.asarray(Image.open(path).convert("RGB"))
    for alone in (str(path), path, path.read_bytes(), frame):
        (one,) = predict(runner, alone)["predictions"]
        (same,) = api.predict(bundle.path, alone, threads=1)["predictions"]
        assert one["label"] == same["label"] == "red"
    assert api.profile(bundle.path, images=str(path), runs=1, threads=1)["end_to_end_ms"]["n"] == 1


def test_no_prompts(make_bundle, tiny):
    bundle = make_bundle(
        graph={"prompt_weights": False}, outputs={"logits": [1, 4]}, selection={"kind": "none", "k": 0, "blocks": []}
    )
    with load(bundle, threads=1) as runner:
        for prediction in predict(runner, [tiny.png((0, 0, 0))] * 2)["predictions"]:
            assert prediction["prompts"] == {"selected": [], "weights": []}


def test_probabilities_do_not_overflow():
    share = probabilities(np.array([[1000.0, 0.0], [-1000.0, -1000.0]], np.float32))
    np.testing.assert_allclose(share, [[1, 0], [0.5, 0.5]])
