"""Who decides about the prompts: a two-pass student small enough to compute by hand, and real graphs' wiring."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cdl_edge.artefacts.bundle import Bundle, write_bundle
from cdl_edge.artefacts.layout import SELECTIONS
from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.confidence import pack_selections
from cdl_edge.runtime.policy import Selector, needed, open_policy
from cdl_edge.runtime.predict import predict
from cdl_edge.runtime.scene import SceneChange
from cdl_edge.runtime.select import selected

SIDE, BLOCKS, ENTRIES, CLASSES = 8, 2, 3, 4
rng = np.random.default_rng(0)
TABLES = {
    "query": rng.normal(size=(3, BLOCKS * ENTRIES)).astype(np.float32),
    "mapping": rng.normal(size=(3, BLOCKS * ENTRIES)).astype(np.float32),
    "head": rng.normal(size=(3, CLASSES)).astype(np.float32),
    "mix": rng.normal(size=(BLOCKS * ENTRIES, CLASSES)).astype(np.float32),
    "mapped_mix": rng.normal(size=(BLOCKS * ENTRIES, CLASSES)).astype(np.float32),
}
WEIGHTS = ["B", BLOCKS, ENTRIES]
DOCUMENT = {"temperature": 2.0, "unknown": {"below": 0.5}, "task": {"scale": 3.0}}
MEANS = {"prompt_weights": rng.normal(size=(2, BLOCKS, ENTRIES)).astype(np.float32)}


def colour(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float64).mean((1, 2)) / 255


def asks(images: np.ndarray) -> np.ndarray:
    return (colour(images) @ TABLES["query"]).reshape(-1, BLOCKS, ENTRIES)


def answers(images: np.ndarray, weights: np.ndarray, mapped: np.ndarray | None = None) -> np.ndarray:
    logits = colour(images) @ TABLES["head"] + weights.reshape(len(images), -1) @ TABLES["mix"]
    return logits if mapped is None else logits + mapped.reshape(len(images), -1) @ TABLES["mapped_mix"]


def make_graph(part: str, mapped: bool, batch: int | str) -> bytes:
    """Student, query or prompted graph of the functions above."""
    names = ["prompt_weights", *(["mapped_weights"] if mapped else [])]
    tables, mixes = {"prompt_weights": "query", "mapped_weights": "mapping"}, ["mix", "mapped_mix"]
    constants = {**TABLES, "scale": np.float32(1 / 255), "axes": np.array([1, 2]), "flat": np.array([-1, 6])}
    constants["blocks"] = np.array([-1, BLOCKS, ENTRIES])
    nodes = [
        helper.make_node("Cast", ["images"], ["raw"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["raw", "scale"], ["unit"]),
        helper.make_node("ReduceMean", ["unit", "axes"], ["colour"], keepdims=0),
    ]
    shape = [batch, *WEIGHTS[1:]]
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, SIDE, SIDE, 3])]
    outputs = []
    for name in names:
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        if part == "prompted":
            inputs.append(info)
            continue
        nodes.append(helper.make_node("MatMul", ["colour", tables[name]], [f"{name}.flat"]))
        nodes.append(helper.make_node("Reshape", [f"{name}.flat", "blocks"], [name]))
        if part == "query" or name == "prompt_weights":  # as export: the fused graph keeps the mapped ones
            outputs.append(info)
    if part != "query":
        nodes.append(helper.make_node("MatMul", ["colour", "head"], ["sum.0"]))
        for i, (name, mix) in enumerate(zip(names, mixes, strict=False)):
            nodes.append(helper.make_node("Reshape", [name, "flat"], [f"{name}.rows"]))
            nodes.append(helper.make_node("MatMul", [f"{name}.rows", mix], [f"{name}.mixed"]))
            last = "logits" if i == len(names) - 1 else f"sum.{i + 1}"
            nodes.append(helper.make_node("Add", [f"sum.{i}", f"{name}.mixed"], [last]))
        outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES]))
    used = {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used]
    graph = helper.make_graph(nodes, part, inputs, outputs, initializers)
    return onnx.ModelProto(ir_version=9, graph=graph, opset_import=[helper.make_opsetid("", 18)]).SerializeToString()


@pytest.fixture
def make_two_pass(tmp_path, manifest):
    """make(mapped=False, dynamic=False, recorded=True) -> Bundle."""

    def make(mapped: bool = False, dynamic: bool = False, recorded: bool = True, **changes: Any) -> Bundle:
        parts = ("student", "query", "prompted")
        files: dict[str, Any] = {f"{p}.onnx": make_graph(p, mapped, "B" if dynamic else 1) for p in parts}
        names = ["prompt_weights", *(["mapped_weights"] if mapped else [])]
        images, weights = {"images": [1, SIDE, SIDE, 3]}, {n: [1, BLOCKS, ENTRIES] for n in names}
        logits = {"logits": [1, CLASSES]}
        fields = manifest(
            query="two-pass",
            selection={"kind": "weighted", "k": 2, "blocks": [0, 1]},
            graphs={p: f"{p}.onnx" for p in parts},
            signatures={
                "student": {"inputs": images, "outputs": {**logits, "prompt_weights": weights["prompt_weights"]}},
                "query": {"inputs": images, "outputs": weights},
                "prompted": {"inputs": {**images, **weights}, "outputs": logits},
            },
            **changes,
        )
        fields["input"]["dynamic_batch"] = dynamic
        if recorded:
            fields |= {"confidence": DOCUMENT, "selections": SELECTIONS}
            means = {n: MEANS["prompt_weights"] * (1 + i) for i, n in enumerate(names)}
            files[SELECTIONS] = pack_selections(means)
        return write_bundle(tmp_path / f"two-pass-{mapped}-{dynamic}-{recorded}", fields, files, True)

    return make


def film(*levels: int) -> np.ndarray:
    """One plain frame for each level, a little brown so that no two colours are alike: uint8 (n, S, S, 3)."""
    frames = np.zeros((len(levels), SIDE, SIDE, 3), np.uint8)
    for frame, level in zip(frames, levels, strict=True):
        frame[..., 0], frame[..., 1], frame[..., 2] = 255 - level, level, level // 2
    return frames


def close(step: Any, images: np.ndarray, weights: np.ndarray) -> None:
    np.testing.assert_allclose(step.prompt_weights, weights, atol=1e-5)
    np.testing.assert_allclose(step.logits, answers(images, weights), atol=1e-4)


def test_exact_asks_every_frame(make_two_pass):
    images = film(10, 12, 200, 90)
    with open_policy(make_two_pass(), threads=1) as stream:
        step = stream.step(images)
        close(step, images, asks(images))
        assert step.paths == ("query",) * 4
        assert stream.describe()["frames"] == {"query": 4}
        assert stream.describe()["backend"] == "onnxruntime"


def test_pinned_runs_the_prompted_pass_only(make_two_pass):
    bundle, images = make_two_pass(), film(10, 200, 90)
    with open_policy(bundle, "pinned", threads=1, task=1) as stream:
        assert set(stream._runners) == {"prompted"}
        step = stream.step(images)
        close(step, images, np.repeat(MEANS["prompt_weights"][1:], 3, axis=0))
        assert (step.paths, step.task) == (("pinned",) * 3, 1)
        stream.pin(0)
        close(stream.step(images[:1]), images[:1], MEANS["prompt_weights"][:1])
        own = np.full((BLOCKS, ENTRIES), 0.25, np.float32)
        stream.pin(weights=own)
        own[:] = 9  # it was copied
        step = stream.step(images[:1])
        close(step, images[:1], np.full((1, BLOCKS, ENTRIES), 0.25))
        assert step.task is None


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("together", [1, 3, 7])
def test_sticky_asks_at_cuts_and_now_and_then(make_two_pass, dynamic, together):
    images = film(10, 11, 12, 200, 201, 202, 203, 204, 205, 206, 90)
    expected = ["query", "reused", "reused", "query", *["reused"] * 4, "query", "reused", "query"]
    scene = SceneChange(SIDE, every=5)
    with open_policy(make_two_pass(dynamic=dynamic), "sticky", threads=1, scene=scene) as stream:
        assert set(stream._runners) == {"student", "prompted"}
        steps = [stream.step(images[i : i + together]) for i in range(0, len(images), together)]
        assert [p for step in steps for p in step.paths] == expected
        asked = np.maximum.accumulate([i if p == "query" else 0 for i, p in enumerate(expected)])
        weights = asks(images)[asked]
        got = [np.concatenate([getattr(s, n) for s in steps]) for n in ("prompt_weights", "logits")]
        np.testing.assert_allclose(got[0], weights, atol=1e-5)
        np.testing.assert_allclose(got[1], answers(images, weights), atol=1e-4)
        assert np.abs(got[1] - answers(images, asks(images))).max() > 1e-3, "reuse makes a difference here"
        assert stream.describe()["frames"] == {"query": 4, "reused": 7}


def test_sticky_after_a_break_and_after_an_error(make_two_pass, monkeypatch):
    images = film(10, 11, 12, 13)
    with open_policy(make_two_pass(), "sticky", threads=1) as stream:
        assert stream.step(images[:0]).paths == ()
        assert stream.step(images[:2]).paths == ("query", "reused")
        assert stream.step(images[:0]).logits.shape == (0, CLASSES)
        with pytest.raises(InputError, match="images of the wrong shape"):
            stream.step(images[:, 1:])
        assert stream.step(images[2:3]).paths == ("reused",)
        stream.forget()
        assert [stream.step(images[3:]).paths for _ in range(2)] == [("query",), ("reused",)]
        with monkeypatch.context() as patch:
            patch.setattr(stream._runners["student"], "compute", lambda feeds: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stream.step(film(200))
        # The frame that failed has left no selection behind: the next one is asked although it looks the same.
        assert stream.step(film(200)).paths == ("query",)
        with pytest.raises(InputError, match="images of the wrong shape"):
            stream.step(images.astype(np.float32))
        assert stream.step(film(200)).paths == ("query",)


def test_mapped_weights_come_from_the_query_graph(make_two_pass):
    bundle, images = make_two_pass(mapped=True), film(10, 11, 200)
    mapped = (colour(images) @ TABLES["mapping"]).reshape(-1, BLOCKS, ENTRIES)
    source = [0, 0, 2]
    with open_policy(bundle, "sticky", threads=1) as stream:
        assert set(stream._runners) == {"query", "prompted"}
        step = stream.step(images)
        np.testing.assert_allclose(step.logits, answers(images, asks(images)[source], mapped[source]), atol=1e-4)
    with open_policy(bundle, "pinned", threads=1, task=1) as stream:
        means = np.repeat(MEANS["prompt_weights"][1:], 3, axis=0)
        np.testing.assert_allclose(stream.step(images).logits, answers(images, means, 2 * means), atol=1e-4)
        with pytest.raises(InputError, match="mapped_weights"):
            stream.pin(weights=means[0])


def test_what_comes_with_every_step(make_two_pass):
    bundle, images = make_two_pass(), film(10, 200)
    with open_policy(bundle, threads=1) as stream:
        step = stream.step(images)
    assert step.prompts == selected(step.prompt_weights, bundle.selection, 2)
    share = np.exp(step.logits / 2 - np.log(np.exp(step.logits / 2).sum(1, keepdims=True)))
    np.testing.assert_allclose(step.probabilities, share, rtol=1e-5)
    np.testing.assert_allclose(step.confidence, share.max(1), rtol=1e-5)
    assert step.unknown.tolist() == (np.log(np.exp(step.logits).sum(1)) < 0.5).tolist()
    assert step.task_posterior.shape == (2, 2)
    by_classes = np.stack([share[:, :2].sum(1), share[:, 2:].sum(1)], 1)
    assert np.abs(step.task_posterior - by_classes).max() > 1e-3, "the prompts have their say"
    with open_policy(bundle, "pinned", threads=1, task=0) as stream:
        step = stream.step(images)
    by_classes = np.stack([step.probabilities[:, :2].sum(1), step.probabilities[:, 2:].sum(1)], 1)
    np.testing.assert_allclose(step.task_posterior, by_classes)


@pytest.mark.parametrize("policy", ["exact", "sticky", "pinned"])
def test_predictions_say_what_a_step_says(make_two_pass, tiny, policy):
    bundle, task = make_two_pass(), 1 if policy == "pinned" else None
    sources = [tiny.png((200, 10, 10)), tiny.png((10, 10, 200))]
    frames = np.stack([bundle.preprocessing.read(s) for s in sources])
    with open_policy(bundle, policy, threads=1, task=task) as stream:
        step = stream.step(frames)
    with open_policy(bundle, policy, threads=1, task=task) as stream:
        found = predict(stream, sources, task, top=2)["predictions"]
    for i, said in enumerate(found):
        assert said["confidence"] == pytest.approx(step.probabilities[i, said["index"]])
        assert said["unknown"] is bool(step.unknown[i])
        assert said["task_posterior"] == pytest.approx(step.task_posterior[i].tolist())
        assert said["task"] == int(np.argmax(said["task_posterior"]))
        assert (said["prompts"], said["path"]) == (step.prompts[i], step.paths[i])
        assert task is None or said["index"] in bundle.tasks[task]
    if policy == "exact":
        with load(bundle, threads=1) as runner:
            assert predict(runner, sources, top=2)["predictions"] == found


@pytest.mark.parametrize("policy", ["exact", "sticky"])
def test_one_pass_has_nothing_to_decide(bundle, policy, tiny):
    images = np.stack([tiny.plain((200, 10, 10))])
    with open_policy(bundle, policy, threads=1) as stream, load(bundle, threads=1) as runner:
        step = stream.step(images)
        np.testing.assert_array_equal(step.logits, runner.infer(images))
        assert step.paths == ("single",)
        told = stream.describe()
        assert (told["policy"], told["asked"]) == ("exact", policy)
        assert (told["reason"] is None) == (policy == "exact")
        assert step.unknown is None and step.confidence.shape == (1,), "an old bundle"


def test_one_pass_pinned(bundle, tiny):
    images = np.stack([tiny.plain((200, 10, 10))])
    with open_policy(bundle, "pinned", threads=1, task=1) as stream:
        assert (stream.step(images).paths, stream.step(images).task) == (("single",), 1)
        with pytest.raises(InputError, match="no such task"):
            stream.pin(2)
        with pytest.raises(InputError, match="from outside"):
            stream.pin(weights=np.zeros((2, 3), np.float32))


def test_wrong_wishes(make_two_pass, bundle):
    two = make_two_pass()
    good = np.zeros((BLOCKS, ENTRIES), np.float32)
    for match, call in (
        ("did you mean 'sticky'", lambda: open_policy(two, "stiky")),
        ("pinned to what", lambda: open_policy(two, "pinned", threads=1)),
        ("policy 'pinned'", lambda: open_policy(two, "exact", task=1)),
        ("no such task", lambda: open_policy(two, "pinned", threads=1, task=2)),
        ("no such task", lambda: open_policy(two, "pinned", threads=1, task=-1)),
        ("both", lambda: open_policy(two, "pinned", threads=1, task=1, weights=good)),
        ("float32", lambda: open_policy(two, "pinned", threads=1, weights=good.astype(float))),
        ("float32", lambda: open_policy(two, "pinned", threads=1, weights=good[None])),
        ("finite", lambda: open_policy(two, "pinned", threads=1, weights=good + np.nan)),
        ("recorded", lambda: open_policy(make_two_pass(recorded=False), "pinned", threads=1, task=0)),
    ):
        with pytest.raises(InputError, match=match):
            call()
    with open_policy(make_two_pass(recorded=False), "pinned", threads=1, weights=good) as stream:
        close(stream.step(film(9)), film(9), good[None])  # an old bundle, with weights of one's own


def test_an_old_two_pass_bundle_is_exact_only(make_bundle):
    old = make_bundle(query="two-pass")
    assert needed(old, "exact") == ("student",)
    for policy in ("sticky", "pinned"):
        with pytest.raises(InputError, match="--policy exact"):
            open_policy(old, policy, threads=1)


def test_streams_may_share_the_graphs(make_two_pass):
    bundle, images = make_two_pass(), film(10, 11, 200, 201)
    with load(bundle, threads=1) as student, load(bundle, threads=1, graph="prompted") as prompted:
        runners = {"student": student, "prompted": prompted}
        one, other = (Selector(bundle, runners, "sticky") for _ in range(2))
        for i in (0, 1):
            assert (
                one.step(images[i : i + 1]).paths
                == other.step(images[i + 2 : i + 3]).paths
                == (("query", "reused")[i],)
            )


def test_many_threads_on_one_stream(make_two_pass):
    bundle = make_two_pass()
    wrong: list[str] = []
    with open_policy(bundle, "sticky", threads=1, scene=SceneChange(SIDE, every=3)) as stream:

        def camera(level: int) -> None:
            images = film(level)
            for _ in range(40):
                step = stream.step(images)
                if np.abs(step.logits - answers(images, step.prompt_weights.astype(float))).max() > 1e-4:
                    wrong.append("logits of other weights")
                if step.paths == ("query",) and np.abs(step.prompt_weights - asks(images)).max() > 1e-5:
                    wrong.append("weights of another frame")

        threads = [threading.Thread(target=camera, args=(level,)) for level in (10, 90, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert sum(stream.describe()["frames"].values()) == 120
