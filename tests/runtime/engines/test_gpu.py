"""TensorRT itself, on a real GPU: build, answers, precision, refit, CUDA graph, memory.

Skipped where there is none, with the reason. Everything here is "not run" until a machine with a GPU has run it.
"""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch

from cdl_edge.machine import cuda_driver
from cdl_edge.runtime import load
from cdl_edge.runtime.backends.tensorrt import build_engine, open_tensorrt
from cdl_edge.runtime.engines import memory
from cdl_edge.runtime.engines.build import Options

REASON = None
if not cuda_driver().devices:
    REASON = f"not run: {cuda_driver().detail}"
elif importlib.util.find_spec("tensorrt") is None:
    REASON = "not run: tensorrt is not installed: pip install 'cdl-edge[tensorrt]'"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda", "apt"])
def test_answers_of_every_learner(lab, make_student, learner, precision):
    student = lab.student(learner)
    bundle = make_student(student, precisions=("fp32",) if precision == "fp32" else ("fp32", precision))
    images = lab.pixels(4)
    with load(bundle, "tensorrt", precision=precision) as runner:
        outputs = runner.run(images)
        described = runner.describe()
    want = lab.truth(student, images)
    np.testing.assert_allclose(outputs.logits, want["logits"], atol=1e-3 if precision == "fp32" else 0.1)
    if "prompt_weights" in want:
        np.testing.assert_allclose(
            outputs.prompt_weights, want["prompt_weights"], atol=1e-3 if precision == "fp32" else 0.02
        )
    assert described["cuda_graph"] is True
    assert described["achieved"]["layers"].get(precision, 0) > 0


def test_unfused_attention_gives_the_same_answers(lab, make_student):
    student = lab.student("apt")
    bundle = make_student(student, precisions=("fp32", "fp16"))
    result = build_engine(bundle, precision="fp16", options=Options(unfuse_attention=True))
    assert result["sidecar"]["achieved"]["attention"] == []
    with load(bundle, "tensorrt", precision="fp16") as runner:
        np.testing.assert_allclose(runner.infer(lab.pixels(3)), lab.truth(student, lab.pixels(3))["logits"], atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_refit_without_a_build(lab, make_student, precision):
    student = lab.student("coda")
    other = copy.deepcopy(student)
    for parameter in [*other.learner.parameters(), *other.head.parameters()]:
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    precisions = ("fp32",) if precision == "fp32" else ("fp32", precision)
    old, new = (make_student(s, n, precisions=precisions) for s, n in ((student, "old"), (other, "new")))
    built = build_engine(old, precision=precision)
    (old.path / "engines").rename(new.path / "engines")
    with load(new, "tensorrt", precision=precision) as runner:
        known = runner.engine.sidecar
        assert known["refits"] == 1 and known["build_seconds"] == built["sidecar"]["build_seconds"]
        got = runner.infer(lab.pixels(3))
    np.testing.assert_allclose(
        got, lab.truth(other, lab.pixels(3))["logits"], atol=1e-3 if precision == "fp32" else 0.1
    )


def test_with_and_without_cuda_graph(lab, make_student):
    bundle = make_student(lab.student("apt"))
    with open_tensorrt(bundle) as launched, open_tensorrt(bundle, cuda_graph=False) as queued:
        assert launched.describe()["cuda_graph"] is True and queued.describe()["cuda_graph"] is False
        np.testing.assert_array_equal(launched.infer(lab.pixels(4)), queued.infer(lab.pixels(4)))
        _, times = launched.engine.timed({"images": lab.pixels(1)})
        assert all(value >= 0 for value in times.values()) and times["gpu_ms"] > 0


@pytest.mark.parametrize("module", ["pycuda.driver", "cuda.bindings.runtime"])
def test_memory_of_either_library(module):
    library = pytest.importorskip(module, reason=f"not run: {module} is not installed")
    found = (memory.PyCuda if module == "pycuda.driver" else memory.CudaPython)(library)
    with found:
        address, sent, got = found.device(1 << 20), found.host(1 << 20), found.host(1 << 20)
        sent[:] = np.arange(1 << 20, dtype=np.uint32).astype(np.uint8)
        got[:] = 0
        begin = found.mark()
        found.upload(address, sent)
        found.download(got, address)
        end = found.mark()
        found.synchronize()
        assert found.between_ms(begin, end) > 0
    np.testing.assert_array_equal(got, sent)
    found.close()
