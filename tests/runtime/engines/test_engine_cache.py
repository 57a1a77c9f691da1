"""When an engine is taken, refitted or built, and what is said and kept.

Proves control flow, files and buffers, with a stand-in for TensorRT whose "engines" compute in ONNX Runtime. Proves
nothing about TensorRT: see test_build.py (real parser and builder) and test_gpu.py (a real GPU).
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace

import numpy as np
import pytest

from cdl_edge.artefacts.bundle import open_bundle
from cdl_edge.errors import InputError
from cdl_edge.runtime import load
from cdl_edge.runtime.backends import tensorrt as backend
from cdl_edge.runtime.backends.tensorrt import build_engine, open_tensorrt
from cdl_edge.runtime.engines import product
from cdl_edge.runtime.engines.build import Options
from cdl_edge.runtime.engines.product import Gpu
from cdl_edge.runtime.secret import seal

NAME = "student.orin-sm87.engine"


@pytest.fixture
def images():
    """uint8 (5, 8, 8, 3), noise."""
    return np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def truth(bundle, images):
    with load(bundle, "cpu", threads=1) as runner:
        return runner.infer(images)


def sidecar(bundle, name=NAME):
    return json.loads((bundle.path / "engines" / f"{name}.json").read_text())


@pytest.mark.parametrize("batch", [1, 5, None])
def test_built_once_then_taken(fake, make, images, capsys, batch):
    bundle = make(batch=batch)
    want = truth(bundle, images)
    with load(bundle, "tensorrt") as runner:
        np.testing.assert_allclose(runner.infer(images), want, atol=1e-5)
        np.testing.assert_allclose(runner.infer(images[:2]), want[:2], atol=1e-5)
    said = capsys.readouterr().err
    assert f"{NAME}: building a TensorRT engine for Orin" in said and "there is none" in said and "built in" in said
    with load(bundle, "trt") as runner:
        np.testing.assert_allclose(runner.infer(images), want, atol=1e-5)
    assert len(fake.built) == 1 and capsys.readouterr().err.count("building") == 0
    open_bundle(bundle.path)  # engines beside its files do not spoil a bundle
    assert fake.cuda.memory == {}, "all GPU memory is freed"


def test_more_images_than_the_largest_batch(fake, make):
    bundle = make(batch=None)
    images = np.random.default_rng(4).integers(0, 256, (19, 8, 8, 3), dtype=np.uint8)
    with load(bundle, "tensorrt") as runner:
        np.testing.assert_allclose(runner.infer(images), truth(bundle, images), atol=1e-5)
    profile = fake.built[0]["profiles"]
    assert profile == [{"images": ((1, 8, 8, 3), (1, 8, 8, 3), (8, 8, 8, 3))}]


def test_the_builder_is_told(fake, make):
    build_engine(make(), options=Options(workspace_mib=77))
    told = fake.built[0]
    assert told["limits"] == {"WORKSPACE": 77 << 20} and told["flags"] == ["REFIT_INDIVIDUAL"], "TF32 is off"
    assert sorted(told["refittable"]) == ["bias", "head", "query"], "learnt constants, not the backbone's `scale`"


def test_the_sidecar_tells_all(fake, make):
    bundle = make()
    result = build_engine(bundle)
    known = sidecar(bundle)
    assert result["sidecar"] == known and result["engine"].endswith(NAME) and result["seconds"] >= 0
    listed = bundle.manifest.document["files"]
    assert known["files"] == {name: listed[name]["sha256"] for name in ("backbone.bin", "prompts.bin")}
    assert known["onnx"] == {"file": "student.onnx", "sha256": listed["student.onnx"]["sha256"]}
    assert known["identity"]["version"] == "10.3.0" and known["identity"]["capability"] == "8.7"
    assert known["achieved"]["layers"] == {"fp32": 1} and known["gate"]["images"] == 5 and known["refits"] == 0
    assert known["gate"]["outputs"]["logits"]["passed"] is True


def test_new_prompts_are_put_into_the_engine(fake, make, images, tiny, capsys):
    old = make()
    build_engine(old)
    new = make("next", head=tiny.HEAD[:, ::-1].copy(), metadata="classes of another name")
    (old.path / "engines").rename(new.path / "engines")
    want = truth(new, images)
    assert np.abs(want - truth(old, images)).max() > 0.1
    with load(new, "tensorrt") as runner:
        np.testing.assert_allclose(runner.infer(images), want, atol=1e-5)
        assert runner.engine.sidecar["refits"] == 1
    assert len(fake.built) == 1 and "new prompts put into the engine" in capsys.readouterr().err
    with load(new, "tensorrt") as runner:  # and they stay
        np.testing.assert_allclose(runner.infer(images), want, atol=1e-5)
    assert len(fake.built) == 1


def changed_prompts(make, tiny):
    """A bundle with an engine of another one that differs in prompts.bin only."""
    old = make()
    build_engine(old)
    new = make("next", head=tiny.HEAD * 2)
    (old.path / "engines").rename(new.path / "engines")
    return new


@pytest.mark.parametrize("case", ["no refit", "deaf", "refused", "wrong"])
def test_a_refit_that_cannot_be_becomes_a_build(fake, make, images, tiny, capsys, case):
    if case == "deaf":
        fake.deaf = {"bias"}
    if case == "no refit":
        old = make()
        build_engine(old, options=Options(refit=False))
        new = make("next", head=tiny.HEAD * 2)
        (old.path / "engines").rename(new.path / "engines")
    else:
        new = changed_prompts(make, tiny)
    fake.refuses_refit = case == "refused"
    if case == "wrong":
        answers = iter([7.0] * 6 + [0.0] * 1000)  # of the refitted engine: its first call and five images
        fake.error = lambda told: next(answers)
    capsys.readouterr()
    with load(new, "tensorrt") as runner:
        np.testing.assert_allclose(runner.infer(images), truth(new, images), atol=1e-5)
    said = capsys.readouterr().err
    reason = {
        "no refit": "was built without refit",
        "deaf": "cannot exchange bias",
        "refused": "a refit failed",
        "wrong": "a refit failed",
    }[case]
    assert reason in said and "building" in said and len(fake.built) == 2


@pytest.mark.parametrize(
    ("case", "word"),
    [("version", "TensorRT version"), ("l4t", "Jetson Linux"), ("graph", "graph"), ("backbone", "backbone.bin")],
)
def test_what_makes_an_engine_unfit(fake, make, monkeypatch, capsys, tiny, case, word):
    bundle = make()
    build_engine(bundle)
    if case == "version":
        fake.__version__ = "10.7.0"
    elif case == "l4t":
        monkeypatch.setattr(product, "l4t", lambda: "36.5.0")
    else:
        path = bundle.path / "engines" / f"{NAME}.json"
        known = json.loads(path.read_text())
        if case == "graph":
            known["graph"] = "0" * 64
        else:
            known["files"]["backbone.bin"] = "0" * 64
        path.write_text(json.dumps({**known, "seal": seal(known)}))
    capsys.readouterr()
    calls = len(fake.calls)
    with pytest.raises(InputError, match="cannot be used here") as caught:
        open_tensorrt(bundle, may_build=False)
    assert word in str(caught.value) and "cdl-edge build" in str(caught.value)
    assert "Runtime" not in fake.calls[calls:], "compared before it is deserialised"
    load(bundle, "tensorrt").close()
    assert word in capsys.readouterr().err and len(fake.built) == 2


def test_another_gpu_has_an_engine_of_its_own(fake, make, monkeypatch):
    bundle = make()
    build_engine(bundle)
    monkeypatch.setattr(backend, "find_gpu", lambda: Gpu("NVIDIA L4", "8.9", "12.8", 24 << 30))
    build_engine(bundle)
    names = {p.name for p in (bundle.path / "engines").glob("*.engine")}
    assert names == {NAME, "student.nvidia-l4-sm89.engine"}


def test_a_changed_engine_is_never_loaded(fake, make):
    bundle = make()
    build_engine(bundle)
    engine = bundle.path / "engines" / NAME
    engine.write_bytes(engine.read_bytes() + b"x")
    calls = len(fake.calls)
    with pytest.raises(InputError, match="changed since it was written"):
        load(bundle, "tensorrt")
    assert "Runtime" not in fake.calls[calls:] and fake.cuda.memory == {}
    assert len(fake.built) == 1
    build_engine(bundle, rebuild=True)
    load(bundle, "tensorrt").close()
    assert len(fake.built) == 2


@pytest.mark.parametrize("by", ["nobody", "another"])
def test_an_engine_that_somebody_else_built_is_never_loaded(fake, make, monkeypatch, tmp_path, capsys, by):
    """Whoever may write the folder writes a plan, which is executable code, and a sidecar with its right hash."""
    bundle = make()
    with monkeypatch.context() as other:
        other.setenv("CDL_EDGE_ENGINE_KEY", str(tmp_path / "key-of-somebody-else"))
        build_engine(bundle)
    engine = bundle.path / "engines" / NAME
    if by == "nobody":  # as early versions wrote it
        document = sidecar(bundle)
        del document["seal"]
        (engine.parent / f"{NAME}.json").write_text(json.dumps(document))
    calls = len(fake.calls)
    with pytest.raises(InputError, match="not built by this user on this device"):
        open_tensorrt(bundle, may_build=False)
    assert "Runtime" not in fake.calls[calls:] and len(fake.built) == 1
    load(bundle, "tensorrt").close()
    assert len(fake.built) == 2 and "not built by this user on this device" in capsys.readouterr().err
    load(bundle, "tensorrt").close()
    assert len(fake.built) == 2


def test_devices_that_share_a_key_share_engines(fake, make, monkeypatch, tmp_path):
    bundle = make()
    monkeypatch.setenv("CDL_EDGE_ENGINE_KEY", str(tmp_path / "fleet"))
    build_engine(bundle)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another-device"))
    open_tensorrt(bundle, may_build=False).close()
    assert len(fake.built) == 1


def test_may_not_build(fake, make):
    with pytest.raises(InputError, match="cdl-edge build BUNDLE"):
        open_tensorrt(make(), may_build=False)
    assert fake.built == []


def test_options_that_were_given_are_kept_until_others_are(fake, make):
    bundle = make()
    build_engine(bundle, options=Options(workspace_mib=77))
    load(bundle, "tensorrt").close()
    build_engine(bundle, options=Options(workspace_mib=77))
    assert len(fake.built) == 1
    fake.__version__ = "10.7.0"
    load(bundle, "tensorrt").close()
    assert fake.built[1]["limits"] == {"WORKSPACE": 77 << 20}
    build_engine(bundle)
    assert fake.built[2]["limits"] == {"WORKSPACE": 1024 << 20}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precision(fake, make, precision):
    key = {"fp16": "fp16", "int8": "int8-trt"}[precision]
    bundle = make(precisions=(key,))
    with load(bundle, "tensorrt", precision=precision) as runner:
        described = runner.describe()
    assert described["precision"] == precision and described["achieved"]["layers"] == {precision: 1}
    assert sidecar(bundle, f"student.{key}.orin-sm87.engine")["gate"]["precision"] == precision


def test_a_precision_that_was_not_achieved(fake, make):
    bundle = make(precisions=("fp16",))
    fake.layers = [{"Name": "gemm", "Outputs": [{"Format/Datatype": "Float"}]}]
    with pytest.raises(InputError, match="does not compute in fp16"):
        load(bundle, "tensorrt", precision="fp16")
    assert list((bundle.path / "engines").glob("*.engine")) == [] and fake.cuda.memory == {}


def test_wrong_answers_are_not_kept(fake, make, capsys):
    fake.error = lambda told: 0.5
    bundle = make()
    with pytest.raises(InputError, match="not the student's"):
        load(bundle, "tensorrt")
    assert len(fake.built) == 2, "once more without refit"
    assert list((bundle.path / "engines").glob("*.engine*")) == [] and fake.cuda.memory == {}


def test_refit_alone_makes_it_wrong(fake, make, capsys):
    """As TensorRT 11.3's release notes tell: a bias is lost when an engine is refittable."""
    fake.error = lambda told: 0.5 if "REFIT_INDIVIDUAL" in told["flags"] else 0.0
    bundle = make()
    build_engine(bundle)
    assert sidecar(bundle)["refittable"] == [] and "with refit" in capsys.readouterr().err
    build_engine(bundle)
    assert len(fake.built) == 2, "the same request finds the engine"


@pytest.mark.parametrize("kept", [b"", b"good", b"broken", b"other version"])
def test_timing_cache(fake, make, capsys, kept):
    bundle = make()
    path = bundle.path / "engines" / "timing.tensorrt-10.3.0.orin-sm87.cache"
    if kept:
        path.parent.mkdir()
        path.write_bytes(kept)
    build_engine(bundle)
    assert path.read_bytes() == (b"good+" if kept == b"good" else b"+")
    assert ("does not fit" in capsys.readouterr().err) == (kept in (b"broken", b"other version"))


def test_cuda_graph(fake, make, images, kit, monkeypatch):
    library = kit.FakeLibcuda(fake)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    bundle = make()
    want = truth(bundle, images)
    with load(bundle, "tensorrt") as runner:
        assert runner.describe()["cuda_graph"] is True
        before = fake.calls.count("execute")
        for i in range(3):
            np.testing.assert_allclose(runner.infer(images[i : i + 1]), want[i : i + 1], atol=1e-5)
        assert fake.calls.count("execute") == before, "calls are launches"
    assert library.calls.count("cuGraphExecDestroy") == library.calls.count("cuGraphInstantiateWithFlags")


def test_no_cuda_graph(fake, make, kit, monkeypatch, capsys):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: kit.FakeLibcuda(fake, fail="cuStreamBeginCapture_v2"))
    bundle = make()
    with load(bundle, "tensorrt") as runner:
        assert runner.describe()["cuda_graph"] is False
    assert "no CUDA graph (cuStreamBeginCapture_v2: CUDA error 900)" in capsys.readouterr().err
    library = kit.FakeLibcuda(fake)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    open_tensorrt(bundle, cuda_graph=False).close()
    load(make("free", batch=None), "tensorrt").close()
    assert "cuStreamBeginCapture_v2" not in library.calls, "not asked for; not with a free batch"


def test_stages(fake, make, images):
    bundle = make()
    with load(bundle, "tensorrt") as runner:
        outputs, times = runner.engine.timed({"images": images[:1]})
    np.testing.assert_allclose(outputs["logits"], truth(bundle, images[:1]), atol=1e-5)
    assert set(times) == {"h2d_ms", "enqueue_ms", "gpu_ms", "d2h_ms"} and times["gpu_ms"] == 0.25


def test_results_are_the_callers_own(fake, make, images):
    with load(make(), "tensorrt") as runner:
        first = runner.infer(images[:1])
        kept = first.copy()
        runner.infer(images[1:2])
        np.testing.assert_array_equal(first, kept)


def test_described_and_closed(fake, make, images):
    runner = load(make(), "tensorrt")
    assert runner.describe() | {"achieved": None} == {
        "backend": "tensorrt",
        "providers": ["TensorRT"],
        "threads": 1,
        "version": "10.3.0",
        "precision": "fp32",
        "gpu": "Orin",
        "achieved": None,
        "memory": "page-locked, cuda-python",
        "cuda_graph": False,
    }
    runner.close(), runner.close()
    for use in (lambda: runner.infer(images), lambda: runner.engine.timed({"images": images[:1]})):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_a_bundle_without_self_test(fake, bundle):
    with pytest.raises(InputError, match="no self-test"):
        load(bundle, "tensorrt")
    assert fake.built == [] and fake.cuda.memory == {}


def test_a_folder_that_cannot_be_written(fake, make):
    bundle = make()
    (bundle.path / "engines").write_text("a file in the way")
    with pytest.raises(InputError, match="cannot be written there"):
        load(bundle, "tensorrt")
    assert fake.built == []


def test_an_engine_with_other_outputs(fake, make, monkeypatch):
    bundle = make()
    outputs = {**bundle.manifest.outputs, "logits": (1, 9)}
    bundle = replace(bundle, manifest=replace(bundle.manifest, outputs=outputs, signatures={}))
    with pytest.raises(InputError, match="does not fit its manifest"):
        load(bundle, "tensorrt")


def test_options_are_checked():
    for wrong in ({"workspace_mib": 0}, {"level": 6}, {"level": True}, {"max_batch": 0}, {"workspace_mib": "1"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Options(**wrong)
