"""8-bit graphs in the real parser and builder of NVIDIA: tensorrt_rtx, on the CPU (see tests/runtime/engines)."""

from __future__ import annotations

import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime.engines.build import Options, build, define

trt = pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no real TensorRT parser and builder to test with"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NO_REFIT = Options(refit=False)
LEARNERS = ("l2p", "dualprompt", "coda", "apt")


def kinds(known):
    """Types of everything that the network computes."""
    return {known.network.get_layer(i).get_output(0).dtype for i in range(known.network.num_layers)}


@pytest.mark.parametrize("suffix", ["", ".fp16"], ids=["fp32", "fp16"])
@pytest.mark.parametrize("profile", ["trt10", "trt11"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_is_understood(tools, learner, profile, suffix):
    """In 8 bits around fp32 and around fp16, which is what `calibrate` takes where it is there."""
    graphs = tools.make(learner, profile=profile)
    folder = graphs.write(graphs.quantise("int8-trt", suffix=suffix), f"trt{suffix}")
    for name in ("student", "query", "prompted"):
        if name in graphs.names:
            known = define(trt, folder / f"{name}.onnx", NO_REFIT)
            assert trt.DataType.INT8 in kinds(known)
            assert (trt.DataType.HALF in kinds(known)) == bool(suffix)


def test_it_compiles(tools):
    graphs = tools.make("coda", profile="trt10")
    folder = graphs.write(graphs.quantise("int8-trt", smooth=0.5, suffix=".fp16"), "build")
    assert len(build(trt, folder / "student.onnx", NO_REFIT).data) > 100_000


def test_with_layers_in_float_and_many_tokens(tools):
    graphs = tools.make("dualprompt", profile="trt10", patch=4)
    quantised = graphs.quantise("int8-trt", skip=["blocks.0.qkv", "blocks.1.fc2"])
    assert define(trt, graphs.write(quantised) / "student.onnx", NO_REFIT)


def test_graphs_for_x86_are_refused_in_words(tools):
    """Asymmetric zero points, biases as integers."""
    graphs = tools.make("coda", profile="trt10")
    folder = graphs.write(graphs.quantise("int8-x86"), "x86")
    with pytest.raises(InputError, match="cannot read the graph") as error:
        define(trt, folder / "student.onnx", NO_REFIT)
    assert "use the graph int8-trt" in str(error.value)
