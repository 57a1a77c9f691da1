"""Packs over HTTP: installed under load, refused without a trace, and by whom."""

from __future__ import annotations

import threading

import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime import open_bundle
from cdl_edge.runtime.handle import version_name
from cdl_edge.runtime.serve.body import Limits

PNG = {"content-type": "image/png"}


def classes(client):
    return client.get("/health").json()["model"]["classes"]


def test_install_list_and_go_back(make_server, make_client, make_version, pack_between, tiny):
    server = make_server()
    client = make_client(server)
    names = [version_name(open_bundle(make_version(i))) for i in range(2)]
    assert [p["version"] for p in client.get("/packs").json()["packs"]] == names[:1]

    done = client.post("/packs", headers=admin, files={"pack": ("../../evil.pack", pack_between(0, 1).read_bytes())})
    assert done.status_code == 200, done.text
    assert (done.json()["previous"], done.json()["version"]) == tuple(names)
    assert classes(client) == 5
    answer = client.post("/predict?top=9", content=tiny.png((9, 9, 9)), headers=PNG).json()
    assert len(answer["predictions"][0]["top"]) == 5 and answer["version"] == names[1]
    listed = client.get("/packs").json()
    assert [(p["version"], p["current"]) for p in listed["packs"]] == [(names[0], False), (names[1], True)]
    assert version_name(open_bundle(server.source)) == names[1]
    assert client.get("/v2/models/tiny").json()["versions"] == names[1:]

    assert client.post("/packs/rollback", headers=admin).json()["version"] == names[0]
    assert classes(client) == 4
    assert client.post(f"/packs/rollback?to={names[1]}", headers=admin).json()["version"] == names[1]
    assert classes(client) == 5
    assert client.post("/packs/rollback?to=../..", headers=admin).status_code == 400
    assert version_name(open_bundle(server.source)) == names[1]


def test_a_pack_as_the_body(client, pack_between):
    content = pack_between(0, 1).read_bytes()
    assert client.post("/packs", headers=admin, content=content, headers={"content-type": "application/octet-stream"}).json()[
        "version"
    ]
    assert classes(client) == 5


def test_installs_under_load(make_server, make_client, make_version, pack_between, tiny):
    sizes = {version_name(open_bundle(make_version(i))): 4 + i for i in range(4)}
    client = make_client(make_server(runners=2))
    answers, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            answers.append(client.post("/predict?top=99", content=tiny.png((9, 9, 9)), headers=PNG))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(3):
        done = client.post("/packs", headers=admin, content=pack_between(i, i + 1).read_bytes())
        assert done.status_code == 200, done.text
    stop.set()
    for thread in threads:
        thread.join()
    assert {a.status_code for a in answers} == {200}
    assert all(len(a.json()["predictions"][0]["top"]) == sizes[a.json()["version"]] for a in answers)
    last = client.post("/predict", content=tiny.png((9, 9, 9)), headers=PNG)
    assert last.json()["version"] == [*sizes][-1]


def test_what_is_refused_changes_nothing(make_server, make_client, make_version, pack_between, tmp_path):
    server = make_server(limits=Limits(pack_bytes=100_000))
    client = make_client(server)
    content = pack_between(0, 1).read_bytes()
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    before = version_name(open_bundle(server.source))
    wrong = {
        "empty": (400, b""),
        "no pack": (400, b"nothing"),
        "changed byte": (400, bytes(changed)),
        "cut": (400, content[:-10]),
        "another version": (400, pack_between(1, 2).read_bytes()),
        "another backbone": (400, pack_between(0, 1, salt=5).read_bytes()),
        "too large": (413, bytes(100_001)),
    }
    for what, (status, body) in wrong.items():
        answer = client.post("/packs", headers=admin, content=body)
        assert answer.status_code == status and answer.json()["error"], (what, answer.text)
        assert "cdl-edge-pack-" not in answer.text, what
        assert classes(client) == 4 and version_name(open_bundle(server.source)) == before, what
    assert client.post("/packs/rollback", headers=admin).status_code == 400
    assert client.post("/packs", headers=admin, content=content, headers={"content-type": "text/html"}).status_code == 415
    assert client.post("/packs", headers=admin, files=[("a", ("a", content)), ("b", ("b", content))]).status_code == 400
    assert client.post("/packs", headers=admin, data={"a": "b"}).status_code in (400, 415)
    assert client.post("/packs", headers=admin, content=content).status_code == 200
    assert client.post("/packs", headers=admin, content=content).status_code == 400  # a replay
    assert classes(client) == 5


def test_what_cannot_be_put_in_is_taken_back_from_the_disk(make_server, make_client, pack_between, monkeypatch):
    server = make_server()
    client = make_client(server)
    before = server.handle.health()["version"]

    def fail(_):
        raise InputError("not on this machine")

    with monkeypatch.context() as patch:
        patch.setattr(server.handle, "swap", fail)
        answer = client.post("/packs", headers=admin, content=pack_between(0, 1).read_bytes())
    assert answer.status_code == 400 and "not on this machine" in answer.text
    assert version_name(open_bundle(server.source)) == server.handle.health()["version"] == before
    assert 'cdl_edge_swaps_total{result="failed"} 1' in client.get("/metrics").text


def test_one_install_at_a_time(make_server, make_client, pack_between):
    server = make_server()
    client = make_client(server)
    with server.changing:
        assert client.post("/packs", headers=admin, content=pack_between(0, 1).read_bytes()).status_code == 409
    assert classes(client) == 4


# -- who may -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "host", "headers", "status"),
    [
        ("127.0.0.1", "localhost:8000", {}, 200),
        ("127.0.0.1", "127.0.0.1:8000", {"origin": "http://127.0.0.1:8000"}, 200),
        ("::1", "[::1]:8000", {}, 200),
        ("192.168.1.7", "localhost:8000", {}, 403),
        ("192.168.1.7", "192.168.1.2:8000", {}, 403),
        ("127.0.0.1", "localhost:8000", {"x-forwarded-for": "127.0.0.1"}, 403),
        ("127.0.0.1", "localhost:8000", {"origin": "https://evil.example"}, 403),
        ("127.0.0.1", "localhost:8000", {"origin": "null"}, 403),
        ("127.0.0.1", "evil.example", {"origin": "http://evil.example"}, 403),
        ("127.0.0.1", "127.0.0.1.evil.example", {}, 403),
    ],
)
def test_without_a_token_only_this_machine(make_server, make_client, pack_between, peer, host, headers, status):
    content = pack_between(0, 1).read_bytes()
    client = make_client(make_server(), peer, host)
    for path in ("/packs", "/packs/rollback"):
        answer = client.post(path, content=content, headers=headers)
        assert answer.status_code == status, answer.text
    if status == 403:
        assert "--token" in answer.json()["error"]
        assert classes(client) == 4


def test_with_a_token_whoever_has_it(make_server, make_client, pack_between):
    server = make_server(token="söcret")
    far, near = make_client(server, "192.168.1.7", "device:8000"), make_client(server)
    content = pack_between(0, 1).read_bytes()
    for client in (far, near):
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "söcret".encode()}):
            answer = client.post("/packs", headers=admin, content=content, headers=header)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert "söcret" not in answer.text
    assert classes(near) == 4
    assert far.post("/packs", content=content, headers={"authorization": "Bearer söcret".encode()}).status_code == 200
