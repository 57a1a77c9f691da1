"""The Open Inference Protocol: parsed alone, over HTTP, and by Triton's own client."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime import load, open_bundle
from cdl_edge.server.live_model import version_name
from cdl_edge.server.protocol import LENGTH_HEADER, parse

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
        top = [triton.InferRequestedOutput("logits", binary_data=binary, class_count=2)]
        for packed in ("gzip", "deflate"):
            result = client.infer("tiny", [given], outputs=top, request_compression_algorithm=packed)
            first = result.as_numpy("logits")[0][0]
            best = int(expected.logits[0].argmax())
            assert (first.decode() if isinstance(first, bytes) else first).endswith(f":{best}:class {best}")
        assert client.get_model_config("tiny")["max_batch_size"] == 64
        assert client.get_inference_statistics("tiny")["model_stats"][0]["inference_count"] > 0
        assert client.get_model_repository_index()[0]["state"] == "READY"
        given.set_shape([3, 8, 8, 1])
        with pytest.raises(triton.InferenceServerException, match="UINT8"):
            client.infer("tiny", [given])


# -- bounds of JSON ----------------------------------------------------------------------------------------------------

HEAVY = {
    "lists in lists": b"[" + b"[]," * 200_000 + b"[]]",
    "dicts": b"[" + b"{}," * 200_000 + b"{}]",
    "strings": b'["' + b'","' * 200_000 + b'"]',
    "escapes": b'"' + b'\\"' * 200_000,
    "one string": b'{"id": "' + b"x" * 600_000 + b'"}',
    "arrays": b"[" + b'{"data":[1]},' * 100_000 + b"{}]",
}


@pytest.mark.parametrize("heavy", HEAVY)
def test_json_that_is_mostly_not_numbers(bundle, heavy, monkeypatch):
    """Refused before it is parsed: the parser would hold up all threads, and take 30 times the memory."""
    from cdl_edge.server import document

    monkeypatch.setattr(document.json, "loads", lambda text, **_: pytest.fail(f"{len(text)} characters parsed"))
    with pytest.raises(InputError, match="too much JSON"):
        parse(HEAVY[heavy], None, bundle.signature(), 8)


def test_numbers_are_parsed_in_pieces(bundle, images, monkeypatch):
    from cdl_edge.server import document

    real, lengths = json.loads, []

    def loads(text, **options):
        lengths.append(len(text))
        return real(text, **options)

    monkeypatch.setattr(document, "PIECE_BYTES", 100)
    monkeypatch.setattr(document.json, "loads", loads)
    for data in (images.tolist(), images.ravel().tolist()):
        body = json.dumps({"inputs": [tensor(images, data=data)]}).encode()
        np.testing.assert_array_equal(parse(body, None, bundle.signature(), 8).inputs["images"], images)
        body = json.dumps({"inputs": [tensor(images, data=data)]}, indent=1).encode()
        np.testing.assert_array_equal(parse(body, None, bundle.signature(), 8).inputs["images"], images)
    assert max(lengths) < 300 and len(lengths) > 10


@pytest.mark.parametrize(
    "data",
    ["[0,,0]", "[0,0,0,]", "[,0,0]", "[0 0,0]", "[0,0,0]]", "[[0,0,0]", "[[0,0],[0]]", "[0,-,0]", "[0,1e999,0]",
     "[1,2,3", "[01,2,3]", "[NaN,0,0]", '"data"', "null", "{}", "[0,true,0]", "[[[0,0,0]]]",
     "[" + "9" * 5000 + ",0,0]"],
)  # fmt: skip
def test_numbers_that_are_none(data):
    from cdl_edge.server.document import Numbers
    from cdl_edge.server.document import parse as read

    try:
        found = read(b'{"data":' + data.encode() + b"}")["data"]
    except InputError:
        return
    if isinstance(found, Numbers):
        with pytest.raises(ValueError, match=r"number|JSON|Expecting|digits|finite"):
            found.read([3])


def test_a_name_called_data_is_a_name():
    from cdl_edge.server.document import parse as read

    found = read(rb'{"a": "\"data\": [1]", "data": [1, 2], "data\\": "x", "b": {"data": [3]}, "c": [4]}')
    assert found["a"] == '"data": [1]' and found["c"] == [4]
    assert found["data"].read([2]).tolist() == [1, 2] and found["b"]["data"].read([1]).tolist() == [3]


ODD_NAMES = [["images"], {"a": 1}, "\ud800", 7, True, "x" * 1000, "\0"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_refused(client, name):
    for body in ({"inputs": [tensor(ONE, name=name)]}, {"inputs": [tensor(ONE)], "outputs": [{"name": name}]}):
        answer = client.post(INFER, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "no such" in json.loads(answer.content)["error"]
    answer = client.post(INFER, content=json.dumps({"inputs": [tensor(ONE)], "id": "\ud800"}))
    assert answer.status_code == 200 and json.loads(answer.content)["id"] == "\ud800"


# -- what real clients ask for -----------------------------------------------------------------------------------------


def test_packed_requests(client, images, expected):
    body = gzip.compress(json.dumps({"inputs": [tensor(images)]}).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    np.testing.assert_array_equal(
        arrays(client.post(INFER, content=body, headers=headers).json())["logits"], expected.logits
    )


@pytest.mark.parametrize("binary", [False, True])
def test_classification(client, images, expected, binary):
    asked = {"name": "logits", "parameters": {"classification": 2, "binary_data": binary}}
    answer = client.post(INFER, json={"inputs": [tensor(images)], "outputs": [asked]})
    length = int(answer.headers.get(LENGTH_HEADER, len(answer.content)))
    (found,) = json.loads(answer.content[:length])["outputs"]
    assert (found["datatype"], found["shape"]) == ("BYTES", [3, 2])
    texts, rest = found.get("data", []), answer.content[length:]
    while rest:
        size = int.from_bytes(rest[:4], "little")
        texts, rest = [*texts, rest[4 : 4 + size].decode()], rest[4 + size :]
    best = [i for row in expected.logits for i in np.argsort(-row)[:2]]
    assert [text.split(":", 1)[1] for text in texts] == [f"{i}:class {i}" for i in best]
    values = [float(text.split(":")[0]) for text in texts]
    np.testing.assert_allclose(values, np.sort(expected.logits)[:, :1:-1].ravel(), atol=1e-5)


@pytest.mark.parametrize("count", [-1, "2", True, 1.5, [1]])
def test_wrong_classification(client, count):
    for name, number in (("logits", count), ("prompt_weights", 2)):
        asked = {"name": name, "parameters": {"classification": number}}
        assert client.post(INFER, json={"inputs": [tensor(ONE)], "outputs": [asked]}).status_code == 400


@pytest.mark.parametrize("parameter", ["class_count", "shared_memory_region", "clasification"])
def test_what_would_change_the_answer_is_not_ignored(client, parameter):
    asked = {"name": "logits", "parameters": {parameter: 2}}
    refused = client.post(INFER, json={"inputs": [tensor(ONE)], "outputs": [asked]})
    assert refused.status_code == 400 and f"{parameter!r}" in refused.json()["error"]
    assert "classification" in refused.json()["error"]


@pytest.mark.parametrize("parameter", ["classification", "class_count", "binary_data"])
def test_a_parameter_of_an_output_at_the_whole_request(client, parameter):
    refused = client.post(INFER, json={"inputs": [tensor(ONE)], "parameters": {parameter: 1}})
    assert refused.status_code == 400 and parameter in refused.json()["error"]
    kept = {"inputs": [tensor(ONE)], "parameters": {"priority": 0, "timeout": 5000, "mine": "x"}}
    assert client.post(INFER, json=kept).status_code == 200  # what clients send along


def test_config_statistics_and_index(client, make_version, images):
    name = version_name(open_bundle(make_version(0)))
    for path in ("/v2/models/tiny", f"/v2/models/tiny/versions/{name}"):
        found = client.get(f"{path}/config").json()
        assert (found["name"], found["max_batch_size"], found["platform"]) == ("tiny", 64, "onnxruntime_onnx")
        assert found["input"] == [
            {"name": "images", "data_type": "TYPE_UINT8", "dims": [8, 8, 3], "format": "FORMAT_NHWC"}
        ]
        assert found["output"][0] == {"name": "logits", "data_type": "TYPE_FP32", "dims": [4]}
        assert json.loads(found["parameters"]["labels"]["string_value"]) == [f"class {i}" for i in range(4)]
    assert client.post(INFER, json={"inputs": [tensor(images)]}).status_code == 200
    assert client.post(INFER, content=b"{").status_code == 400
    for path in ("/v2/models/stats", "/v2/models/tiny/stats", f"/v2/models/tiny/versions/{name}/stats"):
        (found,) = client.get(path).json()["model_stats"]
        assert (found["name"], found["version"], found["inference_count"]) == ("tiny", name, 3)
        counts = {key: value["count"] for key, value in found["inference_stats"].items()}
        assert counts["success"] == counts["fail"] == counts["compute_infer"] == found["execution_count"] == 1
        assert found["inference_stats"]["success"]["ns"] > 0
    assert client.post("/v2/repository/index").json() == [
        {"name": "tiny", "version": name, "state": "READY", "reason": ""}
    ]
    assert client.get("/v2/models/other/config").status_code == client.get("/v2/models/other/stats").status_code == 404
