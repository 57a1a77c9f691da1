"""The live model: any thread, a bounded queue, versions exchanged under load, calls that hang."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.backends.onnxruntime import OrtEngine
from cdl_edge.server.live_model import WARMUP, Busy, LiveModel, Pool, version_name


@pytest.fixture
def images():
    """uint8 (4, 8, 8, 3), noise."""
    return np.random.default_rng(3).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def make_live(bundle, **options):
    return LiveModel(bundle, threads=1, **options)


def broken(make_version, tmp_path, number, **files):
    """A version whose files are replaced."""
    bundle = open_bundle(make_version(number))
    content = {name: bundle.path / name for name in bundle.manifest.document["files"]} | files
    return write_bundle(tmp_path / f"broken-{number}", bundle.manifest.document, content).path


def wrong_answers(make_version, tmp_path, number):
    """A version that does not compute what its self-test says."""
    images, logits = open_bundle(make_version(number)).selftest()
    stream = io.BytesIO()
    np.savez(stream, images=images, logits=logits + 0.1)
    return broken(make_version, tmp_path, number, **{"selftest.npz": stream.getvalue()})


class Gate:
    """Makes every call of the engine wait; `entered` counts those that wait."""

    def __init__(self, monkeypatch):
        self.open, self.entered = threading.Event(), threading.Semaphore(0)
        real = OrtEngine.call

        def call(runner, feeds):
            self.entered.release()
            assert self.open.wait(20)
            return real(runner, feeds)

        monkeypatch.setattr(OrtEngine, "call", call)


# -- pool --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("count", [1, 3])
def test_any_thread_may_call_a_pool(bundle, images, backend, count):
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    with Pool(lambda: load(bundle, backend, threads=1), count) as pool, ThreadPoolExecutor(6) as threads:
        expected = [pool.infer(image[None]) for image in images]
        answers = list(threads.map(lambda i: pool.infer(images[i % 4][None]), range(200)))
        for i, answer in enumerate(answers):
            np.testing.assert_array_equal(answer, expected[i % 4])
        assert pool.describe()["runners"] == count


def test_a_runner_of_a_pool_serves_one_call_at_a_time(bundle, images, monkeypatch):
    inside, most, lock = {}, [0], threading.Lock()
    real = OrtEngine.call

    def call(runner, feeds):
        with lock:
            assert not inside.get(id(runner)), "two calls at once"
            inside[id(runner)] = True
            most[0] = max(most[0], sum(inside.values()))
        time.sleep(0.002)
        result = real(runner, feeds)
        with lock:
            inside[id(runner)] = False
        return result

    monkeypatch.setattr(OrtEngine, "call", call)
    with Pool(lambda: load(bundle, threads=1), 2) as pool, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: pool.infer(images[:1]), range(40)))
    assert most == [2]


def test_a_pool_frees_what_it_has_when_one_runner_cannot_be_loaded(bundle):
    made = []

    def make():
        if len(made) == 2:
            raise InputError("no memory")
        made.append(load(bundle, threads=1))
        return made[-1]

    with pytest.raises(InputError, match="no memory"):
        Pool(make, 3)
    for runner in made:
        with pytest.raises(RuntimeError, match="closed"):
            runner.infer(np.zeros((1, 8, 8, 3), np.uint8))


# -- queue -------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_runner(make_version, images):
    path = make_version(1)
    with make_live(path) as live, load(path, threads=1) as runner:
        np.testing.assert_array_equal(live.submit(lambda r: r.infer(images)).result(), runner.infer(images))
        assert live.runner.bundle.path == path
        assert live.health() | {"in_flight": 0} == {
            "status": "ok",
            "reason": None,
            "version": version_name(runner.bundle),
            "in_flight": 0,
            "capacity": live.capacity,
            "longest_call_s": 0.0,
            "retiring": 0,
        }


def test_what_work_raises_comes_with_the_future(bundle):
    with make_live(bundle) as live:
        with pytest.raises(InputError, match="wrong shape"):
            live.submit(lambda r: r.infer(np.zeros((1, 2, 2, 3), np.uint8))).result()
        assert live.submit(lambda _: 7).result() == 7


def test_a_full_queue_refuses(bundle):
    with make_live(bundle, queue=2) as live:
        go = threading.Event()
        accepted = [live.submit(lambda _: go.wait(20)) for _ in range(live.capacity)]
        with pytest.raises(Busy, match="too many calls") as caught:
            live.submit(lambda _: None)
        assert caught.value.retry_after_s >= 1
        assert live.health()["in_flight"] == live.capacity
        go.set()
        assert all(future.result() for future in accepted)
        assert live.submit(lambda _: "again").result() == "again"


def test_every_runner_is_warm_before_it_answers(make_version, monkeypatch):
    calls, real = {}, OrtEngine.call

    def call(runner, feeds):
        calls[id(runner)] = calls.get(id(runner), 0) + 1
        return real(runner, feeds)

    monkeypatch.setattr(OrtEngine, "call", call)
    with make_live(make_version(1), runners=2):
        assert len(calls) == 2 and all(count >= WARMUP for count in calls.values())


# -- swap --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_swaps_under_load_lose_no_call_and_mix_no_versions(make_version, images):
    versions = [open_bundle(make_version(number)) for number in range(3)]
    expected = {}
    for version in versions:
        with load(version, threads=1) as runner:
            expected[version_name(version)] = runner.infer(images[:1])
    answered, problems, stop = [], [], threading.Event()

    with make_live(versions[0], runners=2) as live:

        def client():
            while not stop.is_set():
                try:
                    name, logits = live.submit(
                        lambda runner: (version_name(runner.bundle), runner.infer(images[:1]))
                    ).result()
                    np.testing.assert_array_equal(logits, expected[name])
                    answered.append(name)
                except Exception as error:
                    problems.append(error)
                    raise

        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        for i in range(30):
            done = live.swap(versions[(i + 1) % 3])
            assert (done["previous"], done["version"]) == tuple(version_name(versions[(i + j) % 3]) for j in (0, 1))
        stop.set()
        for thread in clients:
            thread.join()
        assert live.swaps == 30
    assert problems == []
    assert {*answered} == {*expected}


def test_calls_in_flight_end_on_the_version_that_accepted_them(make_version, images, monkeypatch):
    old, new = make_version(0), make_version(1)
    with make_live(old) as live:
        started, go = threading.Event(), threading.Event()
        before = live.runner

        def work(runner):
            started.set()
            assert go.wait(20)
            return runner.infer(images).shape[1]

        waiting = live.submit(work)
        assert started.wait(20)
        live.swap(new)
        assert live.submit(lambda runner: runner.infer(images).shape[1]).result() == 5
        assert live.health()["retiring"] == 1
        go.set()
        assert waiting.result() == 4
    assert live.health()["retiring"] == 0
    with pytest.raises(RuntimeError, match="closed"):
        before.infer(images)


def test_a_version_that_fails_does_not_come_in(make_version, bundle, tmp_path, images):
    damaged = make_version(2)
    (damaged / "prompts.bin").write_bytes(bytes((damaged / "prompts.bin").stat().st_size))
    bad = {
        "are not the student's": wrong_answers(make_version, tmp_path, 1),
        "changed since it was written": damaged,
        "no such bundle": tmp_path / "nothing",
        "no self-test": bundle,
        "not an ONNX graph": broken(make_version, tmp_path, 3, **{"student.onnx": b"nothing"}),
    }
    with make_live(make_version(0)) as live:
        name = live.health()["version"]
        for message, path in bad.items():
            with pytest.raises(InputError, match=message):
                live.swap(path)
            assert live.health()["version"] == name
            assert live.submit(lambda runner: runner.infer(images).shape[1]).result() == 4
        assert live.swaps == 0
        assert live.swap(make_version(4))["selftest"]["images"] == 2


def test_a_bundle_that_fails_its_self_test_does_not_start(make_version, tmp_path):
    with pytest.raises(InputError, match="are not the student's"):
        make_live(wrong_answers(make_version, tmp_path, 1))


def test_one_swap_at_a_time(make_version, monkeypatch):
    with make_live(make_version(0)) as live:
        gate = Gate(monkeypatch)
        first = threading.Thread(target=live.swap, args=(make_version(1),))
        first.start()
        assert gate.entered.acquire(timeout=20)
        with pytest.raises(Busy, match="another swap"):
            live.swap(make_version(2))
        gate.open.set()
        first.join()
        assert live.swaps == 1


def test_a_version_that_never_comes_to_an_answer_is_given_up(make_version, images, monkeypatch):
    go = threading.Event()
    with make_live(make_version(0), load_s=0.05) as live:
        with monkeypatch.context() as patch:
            patch.setattr("cdl_edge.server.live_model.prove", lambda *_: go.wait(60))
            with pytest.raises(InputError, match="does not come to an answer"):
                live.swap(make_version(1))
        live.load_s = 60
        assert live.submit(lambda runner: runner.infer(images).shape[1]).result() == 4
        live.swap(make_version(2))  # it stands in nobody's way
        assert live.submit(lambda runner: runner.infer(images).shape[1]).result() == 6
        assert live.close(5) is False  # its thread still runs
        go.set()


@pytest.mark.parametrize(
    ("backend", "seconds"), [("auto", 120), ("tensorrt", 1800), ("trt", 1800), ("ort-tensorrt", 1800)]
)
def test_a_backend_that_builds_an_engine_has_the_time_for_it(make_version, monkeypatch, backend, seconds):
    """A version that `pack install` put in is built for by the server that watches."""
    real = load
    monkeypatch.setattr("cdl_edge.server.live_model.load", lambda b, _, *options: real(b, "auto", *options))
    with LiveModel(make_version(0), backend, threads=1) as live:
        assert live.load_s == seconds and LiveModel(live.runner.bundle, backend, 1, load_s=7).load_s == 7


def test_what_gets_no_answer_does_not_come_in(make_version, images):
    """The graph passes its self-test; the function that answers requests fails on what the manifest says."""
    broken = {"temperature": "hot", "unknown": {"below": 0.0}, "task": {"scale": 0.0}}
    with make_live(make_version(0)) as live:
        with pytest.raises(InputError, match="confidence"):
            live.swap(make_version(1, confidence=broken))
        assert live.submit(lambda runner: runner.infer(images).shape[1]).result() == 4
    with pytest.raises(InputError, match="confidence"):
        make_live(make_version(2, confidence=broken))


# -- watchdog and end --------------------------------------------------------------------------------------------------


def test_a_call_that_hangs_is_told_and_a_swap_mends_it(make_version, images, monkeypatch):
    with make_live(make_version(0), limit_s=0.05) as live:
        with monkeypatch.context() as patch:
            gate = Gate(patch)
            hangs = live.submit(lambda runner: runner.infer(images[:1]).shape[1])
            assert gate.entered.acquire(timeout=20)
            assert live.health()["longest_call_s"] < 20
            time.sleep(0.06)
            assert live.health()["status"] == "stuck"
        live.swap(make_version(1))  # its calls are not gated any more
        assert live.health()["status"] == "ok"
        assert live.submit(lambda runner: runner.infer(images[:1]).shape[1]).result() == 5
        assert not hangs.done()
        assert live.close(0) is False
        gate.open.set()
        assert hangs.result() == 4


def test_the_end_waits_for_what_was_accepted(bundle, images):
    live = make_live(bundle)
    futures = [live.submit(lambda runner: runner.infer(images)) for _ in range(5)]
    assert live.close(20) is True
    assert all(future.done() for future in futures)
    assert live.close(0) is True
    assert live.health()["status"] == "closed"
    with pytest.raises(RuntimeError, match="closed"):
        live.submit(lambda _: None)
    with pytest.raises(RuntimeError, match="closed"):
        live.runner.infer(images)
