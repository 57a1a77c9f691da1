"""What the inspector says is counted rightly.

Proves the reading of TensorRT 10's and 11's JSON as NVIDIA documents it (the migration page of 11.0: Format/Datatype
was split), and of layers that tensorrt_rtx 1.7 printed for a real fp16 graph. No JSON here came from a GPU.
"""

from __future__ import annotations

import json

import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime.engines import achieved


def layer(kind, *, key="Format/Datatype", name="gemm", metadata="", tactic="", inputs=()):
    return {
        "Name": name,
        "LayerType": "gemm",
        "Inputs": [{"Name": "i", "Dimensions": [1, 2], key: k} for k in inputs],
        "Outputs": [{"Name": "o", "Dimensions": [1, 2], key: kind}],
        "TacticName": tactic,
        "Metadata": metadata,
    }


def found(*layers):
    return achieved.read(json.dumps({"Layers": list(layers), "Bindings": []}))


@pytest.mark.parametrize("key", ["Format/Datatype", "Datatype", "DataType"])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Row major linear FP16 format", "fp16"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("Row major linear FP32", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear BF16", "bf16"),
        ("Int8", "int8"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("UInt8", "other"),
        ("Int32", "other"),
        ("Bool", "other"),
    ],
)
def test_types(key, text, kind):
    assert found(layer(text, key=key))["layers"] == {kind: 1}


def test_a_layer_counts_as_its_narrowest_type():
    assert found(layer("Half", inputs=["Int8", "Float"]))["layers"] == {"int8": 1}
    assert found(layer("Float", inputs=["UInt8"]))["layers"] == {"fp32": 1}


def test_linears_and_attention():
    result = found(
        layer("Half", metadata="[ONNX Layer: prompted.blocks.0.q]\x1f[ONNX Layer: prompted.blocks.0.k]"),
        layer("Half", inputs=["Int8"], metadata="[ONNX Layer: query.blocks.11.fc1]"),
        layer("Float", metadata="[ONNX Layer: query.blocks.11.fc1]", name="cast"),
        layer("Half", tactic="_gemm_mha_v2_0x84f84d3aea2a5545f4e1703b4f425145"),
        layer("Half", tactic="_gemm_mha_v2_0x5ebb5f2ff721ec59a1868d6e5d3c130e"),
        layer("Float", metadata="[ONNX Layer: LayerNormalization_4]"),
    )
    assert result["layers"] == {"fp16": 3, "int8": 1, "fp32": 2}
    assert result["linears"] == {"fp16": 2, "int8": 1}
    assert result["attention"] == ["_gemm_mha_v2"]


@pytest.mark.parametrize(("asked", "kind"), [("fp16", "Half"), ("bf16", "BFloat16"), ("int8", "Int8")])
def test_what_was_asked_for_has_to_be_there(asked, kind):
    achieved.check(asked, found(layer(kind), layer("Float")))
    with pytest.raises(InputError, match=f"does not compute in {asked}") as caught:
        achieved.check(asked, found(layer("Float"), layer("Float")))
    assert "2 fp32" in str(caught.value)


def test_a_cast_alone_is_not_the_precision():
    """Half somewhere, but every linear layer of the encoder in fp32."""
    layers = [layer("Half", name="cast"), layer("Float", metadata="[ONNX Layer: prompted.blocks.0.fc1]")]
    with pytest.raises(InputError, match="linear layers of the encoder: 1 fp32"):
        achieved.check("fp16", found(*layers))


def test_fp32_means_all_of_it():
    achieved.check("fp32", found(layer("Float"), layer("Int32")))
    with pytest.raises(InputError, match="fp32 layers only"):
        achieved.check("fp32", found(layer("Float"), layer("Half")))


@pytest.mark.parametrize("text", ["", "no", "{}", '{"Layers": []}', '{"Layers": ["gemm", "softmax"]}', "[1]"])
def test_an_answer_that_tells_nothing(text):
    with pytest.raises(InputError, match="inspector"):
        achieved.read(text)
