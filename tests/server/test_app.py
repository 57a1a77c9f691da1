"""Pictures and wrong things through the whole application; nothing of it ends the server."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import threading
import time
import zlib
from http.client import HTTPConnection

import numpy as np
import pytest
from PIL import Image

from cdl_edge.decoders import Decoders
from cdl_edge.errors import InputError
from cdl_edge.runtime import load, open_bundle
from cdl_edge.runtime.predict import predict
from cdl_edge.server import app as application
from cdl_edge.server.body import Limits
from cdl_edge.server.live_model import version_name

PNG = {"content-type": "image/png"}


def good(client, tiny):
    """The server still answers."""
    answer = client.post("/predict", content=tiny.png((255, 0, 0)), headers=PNG)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status, *words):
    assert answer.status_code == status, answer.text
    text = answer.json()["error"]
    for word in words:
        assert word in text, text
    assert "Traceback" not in text


def blank_png(width, height):
    """A small file that unpacks to width x height white pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_picture_as_the_body(client, tiny, make_version):
    picture = tiny.png((200, 30, 90))
    with load(make_version(0), threads=1) as runner:
        expected = predict(runner, [picture], top=3)["predictions"][0]
        name = version_name(runner.bundle)
    for headers in (PNG, {"content-type": "application/octet-stream"}, {}):
        answer = client.post("/predict?top=3", content=picture, headers=headers)
        assert answer.json()["predictions"] == [expected]
        assert answer.json()["version"] == answer.headers["x-bundle-version"] == name
        assert answer.json()["bundle"] == "tiny"
        assert {*answer.json()["ms"]} == {"waited", "computed"}


def test_a_picture_as_a_form_and_one_task(client, tiny):
    answer = client.post("/predict?task=2", files={"image": ("red one.png", tiny.png((255, 0, 0)), "image/png")})
    assert answer.json()["predictions"][0]["image"] == "red one.png"
    assert answer.json()["predictions"][0]["label"] == "class 2"


def test_several_pictures(client, tiny):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    files = [("images", (f"{c}.png", tiny.png(c), "image/png")) for c in colours]
    answers = client.post("/batch?top=2", files=files).json()["predictions"]
    assert [a["image"] for a in answers] == [f"{c}.png" for c in colours]
    for colour, answer in zip(colours, answers, strict=True):
        alone = client.post("/predict?top=2", content=tiny.png(colour), headers=PNG).json()["predictions"][0]
        assert {**answer, "image": ""} == {**alone, "image": ""}


def test_health(client, tiny):
    good(client, tiny)
    found = client.get("/health")
    assert found.status_code == 200
    document = found.json()
    assert document["status"] == "ok" and document["latency"]["n"] == 1
    assert document["model"]["classes"] == 4 and document["model"]["runner"]["backend"] == "onnxruntime"
    assert document["model"]["version"] == document["version"]


def test_a_picture_that_takes_too_long_is_stopped(make_server, make_client, tiny, slow_jpeg):
    """Not only given up: nothing goes on computing for it."""
    with Decoders() as decoders:
        client = make_client(make_server(decoders=decoders, limits=Limits(decode_s=0.05)))
        decoders.start()
        (process,) = decoders.processes()
        answer = client.post("/predict", files={"a": ("slow.jpg", slow_jpeg, "image/jpeg")})
        assert answer.status_code == 400 and "slow.jpg: the image takes too long to decode" in answer.json()["error"]
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    client = make_client(make_server(limits=Limits(answer_s=0.0)))
    assert client.post("/predict", content=tiny.png((255, 0, 0)), headers=PNG).status_code == 504


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff" + bytes(100)])
def test_no_picture(client, tiny, content):
    refused(client.post("/predict", content=content, headers=PNG), 400, "not a readable image")
    refused(client.post("/batch", files=[("a", ("odd.png", content))]), 400, "odd.png", "not a readable image")
    good(client, tiny)


@pytest.mark.parametrize("size", [(20000, 20000), (60000, 60000), (2**31 - 1, 1)])
def test_a_large_picture_and_a_decompression_bomb(client, tiny, size):
    content = blank_png(8, 8).replace(struct.pack(">II", 8, 8), struct.pack(">II", *size))
    assert len(content) < 100_000
    answer = client.post("/predict", content=content, headers=PNG)
    assert answer.status_code == 400 and "got:" in answer.json()["error"]
    good(client, tiny)


def test_a_small_file_of_forty_megapixels_may_come(client):
    image = io.BytesIO()
    Image.fromarray(np.zeros((600, 800), np.uint8)).save(image, "PNG")
    assert client.post("/predict", content=image.getvalue(), headers=PNG).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/x-www-form-urlencoded", "video/mp4"])
def test_the_wrong_content_type(client, tiny, kind):
    answer = client.post("/predict", content=tiny.png((1, 2, 3)), headers={"content-type": kind})
    refused(answer, 415, kind, "image/*", "curl")
    good(client, tiny)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"nothing of a form"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\ncut'),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nnameless\r\n--x--\r\n"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n--x--\r\n',
        ),
    ],
)
def test_a_broken_form(client, tiny, kind, content):
    for path in ("/predict", "/batch"):
        assert client.post(path, content=content, headers={"content-type": kind}).status_code == 400
    good(client, tiny)


def test_the_wrong_number_of_pictures(make_server, make_client, tiny):
    client = make_client(make_server(limits=Limits(pictures=3)))
    files = [("a", ("a.png", tiny.png((1, 2, 3)), "image/png"))]
    refused(client.post("/predict", files=files * 2), 400, "one picture", "/batch")
    assert client.post("/batch", files=files * 3).status_code == 200
    refused(client.post("/batch", files=files * 4), 400, "form")
    good(client, tiny)


@pytest.mark.parametrize("query", ["top=0", "top=-1", "top=x", "top=9999999999999999999", "task=4", "task=1.5"])
def test_wrong_parameters(client, tiny, query):
    refused(client.post(f"/predict?{query}", content=tiny.png((1, 2, 3)), headers=PNG), 400, "expected")
    good(client, tiny)


def test_a_body_that_is_too_large(make_server, make_client, tiny):
    client = make_client(make_server(limits=Limits(body_bytes=2000)))
    for count in (2001, 100_000):  # read to its end and thrown away, or not read at all
        refused(client.post("/predict", content=bytes(count), headers=PNG), 413, "too large", f"{count} bytes")
    stream = (bytes(1000) for _ in range(1000))  # no content-length
    refused(client.post("/predict", content=stream, headers=PNG), 413, "too large")
    refused(client.post("/batch", files={"a": bytes(3000)}), 413, "too large")
    refused(client.post("/v2/models/tiny/infer", content=bytes(3000)), 413, "too large")
    good(client, tiny)


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/predict/..", "/packs/../../x", "/v2/models/..%2fx", "/x\0"],
)
def test_paths_that_lead_nowhere(make_server, listen, path):
    port = listen(make_server())
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("GET", path.replace("\0", "%00"), skip_host=False)  # httpx would tidy the path
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status in (404, 405)
    assert "error" in json.loads(answer.read())


def test_unknown_paths_and_methods(client, tiny):
    refused(client.get("/nothing"), 404, "GET /nothing")
    refused(client.get("/predict"), 405, "GET /predict")
    refused(client.post("/health"), 405)
    good(client, tiny)


def test_a_bug_is_a_500_and_not_the_end(make_server, make_client, tiny, monkeypatch):
    server = make_server()
    client = make_client(server)
    with monkeypatch.context() as patch:
        patch.setattr(type(server.live.runner.runners[0].engine), "call", lambda *_: 1 / 0)
        refused(client.post("/predict", content=tiny.png((1, 2, 3)), headers=PNG), 500, "log of the server")
    good(client, tiny)
    assert 'kind="internal"} 1' in client.get("/metrics").text


# -- load --------------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(make_server, make_client, tiny):
    server = make_server(queue=0)
    client = make_client(server)
    go = threading.Event()
    held = [server.live.submit(lambda _: go.wait(20)) for _ in range(server.live.capacity)]
    answer = client.post("/predict", content=tiny.png((1, 2, 3)), headers=PNG)
    refused(answer, 503, "too many")
    assert int(answer.headers["retry-after"]) >= 1
    assert client.get("/health").status_code == 200
    go.set()
    assert all(future.result() for future in held)
    good(client, tiny)


def test_a_stuck_call(make_server, make_client, tiny, monkeypatch):
    server = make_server(limit_s=0.01, limits=Limits(answer_s=0.1))
    client = make_client(server)
    go = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(type(server.live.runner.runners[0].engine), "call", lambda *_: go.wait(20) and {})
        refused(client.post("/predict", content=tiny.png((1, 2, 3)), headers=PNG), 504, "/health")
        found = client.get("/health")
        assert found.status_code == 503 and found.json()["status"] == "stuck"
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        assert "cdl_edge_healthy 0" in client.get("/metrics").text
    go.set()
    while server.live.health()["in_flight"]:
        time.sleep(0.01)
    good(client, tiny)


def test_a_body_that_never_ends(make_server, listen, tiny):
    port = listen(make_server(limits=Limits(body_s=0.2)))
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/predict")
    for name, value in {**PNG, "content-length": "1000"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(bytes(10))
    answer = connection.getresponse()
    assert answer.status == 408 and "10 bytes" in json.loads(answer.read())["error"]


def test_a_client_that_leaves(make_server, listen, tiny):
    server = make_server()
    port = listen(server)
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/predict")
    connection.putheader("content-length", "1000")
    connection.endheaders()
    connection.close()
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/predict", tiny.png((1, 2, 3)), PNG)
    assert connection.getresponse().status == 200


# -- --watch -----------------------------------------------------------------------------------------------------------


def putter(place):
    """put(bundle): make it the version that runs in a store at `place`."""
    (place / "versions").mkdir(parents=True)

    def put(bundle):
        name = version_name(open_bundle(bundle, verify=False))
        bundle.rename(place / "versions" / name)
        (place / "next").symlink_to(f"versions/{name}")
        (place / "next").replace(place / "current")

    return put


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_version_that_came_while_the_first_one_was_loaded_is_put_in(
    make_server, make_client, make_version, tmp_path, monkeypatch
):
    monkeypatch.setattr(application, "WATCH_S", 0.02)
    place = tmp_path / "store"
    put = putter(place)
    put(make_version(0))
    server = make_server(place)
    put(make_version(1))
    client = make_client(server, watch=True)
    until(lambda: client.get("/health").json()["model"]["classes"] == 5)


def test_a_version_that_appears_on_the_disk_is_put_in(
    make_server, make_client, make_version, tmp_path, monkeypatch, said
):
    monkeypatch.setattr(application, "WATCH_S", 0.02)
    place = tmp_path / "store"
    put = putter(place)
    put(make_version(0))
    server = make_server(place)
    client = make_client(server, watch=True)
    assert client.get("/health").json()["model"]["classes"] == 4
    put(make_version(1))
    until(lambda: client.get("/health").json()["model"]["classes"] == 5)
    until(lambda: said)
    names = [version_name(open_bundle(p, verify=False)) for p in sorted((place / "versions").iterdir())]
    assert all(name in said[0] for name in names) and "5 classes" in said.pop()
    bad = make_version(2)
    (bad / "prompts.bin").write_bytes(bytes((bad / "prompts.bin").stat().st_size))
    put(bad)
    until(lambda: said)
    assert len(said) == 1 and "the old one goes on" in said[0] and "prompts.bin" in said[0]
    assert client.get("/health").json()["model"]["classes"] == 5
    text = client.get("/metrics").text
    assert 'cdl_edge_swaps_total{result="done"} 1' in text and 'cdl_edge_swaps_total{result="failed"} 1' in text


def test_a_bundle_that_is_copied_over_file_by_file_is_put_in(make_server, make_client, make_version, monkeypatch, said):
    """By rsync, say, which takes the manifest before the weights: the first look finds a broken bundle."""
    monkeypatch.setattr(application, "WATCH_S", 0.02)
    place, new = make_version(0), make_version(1)
    client = make_client(make_server(place), watch=True)
    files = sorted((p for p in new.iterdir() if p.is_file()), key=lambda p: (p.name != "manifest.json", p.name))

    def copy(file):
        shutil.copy(file, place / "part")
        os.replace(place / "part", place / file.name)

    copy(files[0])
    until(lambda: any("the old one goes on" in line for line in said))
    for file in files[1:]:
        copy(file)
    until(lambda: client.get("/health").json()["model"]["classes"] == 5)


def test_the_watch_waits_until_nothing_is_copied_any_more(make_server, make_client, monkeypatch):
    """Each file of a bundle that is copied over was loaded with, refused, logged and counted as a failed exchange."""
    monkeypatch.setattr(application, "WATCH_S", 0.005)
    server, looks, followed = make_server(), [], []
    monkeypatch.setattr(server, "stamp", lambda: looks.append(1) or min(len(looks), 20))
    monkeypatch.setattr(server, "follow", lambda: followed.append(len(looks)))
    make_client(server, watch=True)
    until(lambda: len(looks) > 25)
    assert followed == [21]  # the first look that found what the one before had found


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("odd"), KeyError("signatures"), InputError("bad"), RecursionError()]
)
def test_whatever_lies_on_the_disk_the_watch_goes_on(make_server, make_client, monkeypatch, said, error):
    """A manifest that was hashed anew may raise anything; the tasks beside the watch, systemd's among them, go on."""
    monkeypatch.setattr(application, "WATCH_S", 0.01)
    stamps = iter(range(1_000_000))
    server = make_server()
    monkeypatch.setattr(server, "stamp", lambda: next(stamps) // 2)  # two looks find the same
    monkeypatch.setattr(server, "follow", lambda: _raise(error))
    client = make_client(server, watch=True)
    end = time.monotonic() + 20
    while len(said) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(said) >= 3 and all("the old one goes on" in line for line in said)
    assert client.get("/health").status_code == 200


def _raise(error):
    raise error


# -- health ------------------------------------------------------------------------------------------------------------


def test_health_tells_of_answers(make_server, make_client, tiny, monkeypatch):
    """The engine is well, but no picture gets an answer."""
    monkeypatch.setattr(application, "PROBE_S", 0.02)
    server = make_server()
    client = make_client(server)

    def until(status):
        end = time.monotonic() + 20
        while client.get("/health").json()["status"] != status:
            assert time.monotonic() < end
            time.sleep(0.01)

    until("ok")
    with monkeypatch.context() as patch:
        patch.setattr(
            type(server.live.runner), "certainty", property(lambda _: _raise(InputError("confidence is odd")))
        )
        until("failing")
        found = client.get("/health")
        assert found.status_code == 503 and "confidence is odd" in found.json()["reason"]
        assert client.get("/v2/health/ready").status_code == 503
        state = client.post("/v2/repository/index").json()[0]
        assert state["state"] == "UNAVAILABLE" and "confidence" in state["reason"]
    until("ok")
    good(client, tiny)


# -- odd requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-7", "unicode_escape", "undefined", "base64", "nothing"])
def test_a_form_of_an_odd_charset(client, tiny, charset):
    form = b'--x\r\nContent-Disposition: form-data; name="a"; filename="\xff\\ud800-\xe9"\r\n\r\n'
    body = form + tiny.png((255, 0, 0)) + b"\r\n--x--\r\n"
    for path in ("/predict", "/batch"):
        answer = client.post(
            path, content=body, headers={"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        )
        assert answer.status_code == 200, answer.text


def test_a_form_of_header_lines_only(client, tiny):
    body = b"--x\r\n" + b"a: b\r\n" * 100_000
    answer = client.post("/predict", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    refused(answer, 400, "form")
    good(client, tiny)


@pytest.mark.parametrize("host", ["[", "]", "[::1", "a b", "", "é", "x" * 1000, "localhost:99999999"])
@pytest.mark.parametrize("path", ["/nothing", "/health/", "/packs", "/health"])
def test_odd_hosts(make_server, listen, host, path):
    connection = HTTPConnection("127.0.0.1", listen(make_server()), timeout=20)
    connection.putrequest("POST", path, skip_host=True)
    connection.putheader("Host", host.encode())
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status in (400, 401, 404, 405) and json.loads(answer.read())["error"]


def test_the_classes(client):
    found = client.get("/classes").json()
    assert [task["classes"] for task in found["tasks"]] == [[f"class {i}"] for i in range(4)]
    assert [task["task"] for task in found["tasks"]] == [0, 1, 2, 3]
    assert found["version"] == client.get("/health").json()["version"]


# -- packed bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)]
)
def test_a_packed_picture(client, tiny, encoding, pack):
    answer = client.post("/predict", content=pack(tiny.png((255, 0, 0))), headers={**PNG, "content-encoding": encoding})
    assert answer.status_code == 200, answer.text


def test_wrongly_packed(make_server, make_client, tiny):
    client = make_client(make_server(limits=Limits(body_bytes=100_000)))
    bomb = gzip.compress(bytes(10_000_000))
    wrong = [
        ("gzip", b"no", 400),
        ("gzip", bomb, 413),
        ("gzip", gzip.compress(b"x" * 999)[:-9], 400),
        ("br", b"x", 415),
    ]
    for encoding, content, status in wrong:
        refused(client.post("/predict", content=content, headers={**PNG, "content-encoding": encoding}), status)
    form = {"content-type": "multipart/form-data; boundary=x", "content-encoding": "gzip"}
    refused(client.post("/predict", content=gzip.compress(b"--x--"), headers=form), 415)
    good(client, tiny)
