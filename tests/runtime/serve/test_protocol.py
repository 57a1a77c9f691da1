"""The Open Inference Protocol: parsed alone, over HTTP, and by Triton's own client."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime import load, open_bundle
from cdl_edge.runtime.handle import version_name
from cdl_edge.runtime.serve.protocol import LENGTH_HEADER, parse

INFER = "/v2/models/tiny/infer"


@pytest.fixture
def images():
    """uint8 (3, 8, 8, 3), noise."""
    return np.random.default_rng(5).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def expected(make_version, images):
    """What version 0 says."""
    with load(make_version(0), threads=1) as runner:
        return runner.run(images)


def tensor(images, **changes):
    return {"name": "images", "shape": list(images.shape), "datatype": "UINT8", "data": images.tolist()} | changes


def arrays(document):
    return {o["name"]: np.array(o["data"], np.float32).reshape(o["shape"]) for o in document["outputs"]}


def test_metadata(client, make_version):
    name = version_name(open_bundle(make_version(0)))
    about = client.get("/v2").json()
    assert about["name"] == "cdl-edge" and "binary_tensor_data" in about["extensions"] and about["version"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/tiny", f"/v2/models/tiny/versions/{name}"):
        assert client.get(f"{path}/ready").status_code == 200
        assert client.get(path).json() == {
            "name": "tiny",
            "versions": [name],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}],
            "outputs": [
                {
                    "name": "logits",
                    "datatype": "FP32",
                    "shape": [-1, 4],
                    "parameters": {"labels": [f"class {i}" for i in range(4)]},
                },
                {"name": "prompt_weights", "datatype": "FP32", "shape": [-1, 2, 3]},
            ],
        }
    for path in ("/v2/models/other", "/v2/models/tiny/versions/1", "/v2/models/other/ready"):
        assert client.get(path).status_code == 404
    assert client.post("/v2/models/other/infer", json={"inputs": [tensor(np.zeros((1, 8, 8, 3)))]}).status_code == 404


@pytest.mark.parametrize("flat", [True, False])
def test_infer_as_json(client, images, expected, flat):
    data = images.ravel().tolist() if flat else images.tolist()
    answer = client.post(INFER, json={"id": "seven", "inputs": [tensor(images, data=data)]})
    document = answer.json()
    assert (document["model_name"], document["id"]) == ("tiny", "seven")
    assert document["model_version"] == answer.headers["x-bundle-version"]
    found = arrays(document)
    np.testing.assert_array_equal(found["logits"], expected.logits)
    np.testing.assert_array_equal(found["prompt_weights"], expected.prompt_weights)


def test_infer_as_bytes(client, images, expected):
    fields = tensor(images, parameters={"binary_data_size": images.nbytes})
    del fields["data"]
    asked = [{"name": "logits", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [fields], "outputs": asked}).encode()
    headers = {LENGTH_HEADER: str(len(head)), "content-type": "application/octet-stream"}
    answer = client.post(INFER, content=head + images.tobytes(), headers=headers)
    length = int(answer.headers[LENGTH_HEADER])
    (described,) = json.loads(answer.content[:length])["outputs"]
    assert described["shape"] == [3, 4] and "data" not in described
    found = np.frombuffer(answer.content[length:], "<f4").reshape(3, 4)
    np.testing.assert_array_equal(found, expected.logits)


def test_only_what_was_asked_for(client, images):
    document = client.post(INFER, json={"inputs": [tensor(images)], "outputs": [{"name": "logits"}]}).json()
    assert [o["name"] for o in document["outputs"]] == ["logits"] and "id" not in document


ONE = np.zeros((1, 8, 8, 3), np.uint8)
WRONG = {
    "no JSON": b"{",
    "no object": b"[]",
    "depth": b"[" * 100_000,
    "no text": b"\xff\xfe",
    "no inputs": {},
    "inputs": {"inputs": "images"},
    "entries": {"inputs": [1]},
    "name": {"inputs": [tensor(ONE, name="pixels")]},
    "name type": {"inputs": [tensor(ONE, name=None)]},
    "none": {"inputs": [tensor(ONE, shape=[0, 8, 8, 3], data=[])]},
    "datatype": {"inputs": [tensor(ONE, datatype="FP32")]},
    "shape": {"inputs": [tensor(ONE, shape=[1, 8, 8])]},
    "shape type": {"inputs": [tensor(ONE, shape="1")]},
    "shape true": {"inputs": [tensor(ONE, shape=[True, 8, 8, 3])]},
    "rows": {"inputs": [tensor(ONE, shape=[10**9, 8, 8, 3])]},
    "negative": {"inputs": [tensor(ONE, shape=[-1, 8, 8, 3])]},
    "few": {"inputs": [tensor(ONE, data=[1, 2])]},
    "ragged": {"inputs": [tensor(ONE, data=[[1], [1, 2]])]},
    "words": {"inputs": [tensor(ONE, data=["a"] * 192)]},
    "above": {"inputs": [tensor(ONE, data=[256] * 192)]},
    "below": {"inputs": [tensor(ONE, data=[-1] * 192)]},
    "huge": {"inputs": [tensor(ONE, data=[10**30] * 192)]},
    "fraction": {"inputs": [tensor(ONE, data=[0.5] * 192)]},
    "no data": {"inputs": [{"name": "images", "shape": [1, 8, 8, 3], "datatype": "UINT8"}]},
    "bytes": {"inputs": [tensor(ONE, parameters={"binary_data_size": 192})]},
    "bytes type": {"inputs": [tensor(ONE, parameters={"binary_data_size": "192"})]},
    "parameters": {"inputs": [tensor(ONE, parameters=[])]},
    "output": {"inputs": [tensor(ONE)], "outputs": [{"name": "nothing"}]},
    "outputs": {"inputs": [tensor(ONE)], "outputs": {"name": "logits"}},
    "id": {"inputs": [tensor(ONE)], "id": 7},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_requests(client, wrong):
    content = WRONG[wrong]
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = client.post(INFER, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]
    assert client.post(INFER, json={"inputs": [tensor(ONE)]}).status_code == 200


@pytest.mark.parametrize("length", ["x", "-1", "99999999", "1.5", ""])
def test_a_wrong_length_header(bundle, length):
    with pytest.raises(InputError, match=LENGTH_HEADER):
        parse(b"{}", length, bundle.signature(), 8)


def test_bytes_that_belong_to_nothing(bundle):
    body = json.dumps({"inputs": [tensor(ONE)]}).encode()
    with pytest.raises(InputError, match="bytes behind"):
        parse(body + b"xx", str(len(body)), bundle.signature(), 8)


def test_the_wrong_content_type(client):
    answer = client.post(INFER, content=b"<x/>", headers={"content-type": "text/xml"})
    assert answer.status_code == 415 and "text/xml" in answer.json()["error"]


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client(make_server, listen, images, expected, binary):
    triton = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    server = make_server()
    with triton.InferenceServerClient(f"127.0.0.1:{listen(server)}") as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
        assert client.get_server_metadata()["name"] == "cdl-edge"
        version = client.get_model_metadata("tiny")["versions"][0]
        given = triton.InferInput("images", list(images.shape), "UINT8")
        given.set_data_from_numpy(images, binary_data=binary)
        wanted = [triton.InferRequestedOutput(n, binary_data=binary) for n in ("logits", "prompt_weights")]
        for options in ({}, {"outputs": wanted}, {"outputs": wanted, "model_version": version}):
            result = client.infer("tiny", [given], **options)
            np.testing.assert_array_equal(result.as_numpy("logits"), expected.logits)
            np.testing.assert_array_equal(result.as_numpy("prompt_weights"), expected.prompt_weights)
            assert result.get_response()["model_version"] == version
        given.set_shape([3, 8, 8, 1])
        with pytest.raises(triton.InferenceServerException, match="UINT8"):
            client.infer("tiny", [given])
