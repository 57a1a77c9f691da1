"""Packs over HTTP: installed under load, refused without a trace, and by whom."""

from __future__ import annotations

import os
import socket
import threading
from functools import partial
from http.client import HTTPConnection

import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime import open_bundle
from cdl_edge.runtime.secret import default_file, kept
from cdl_edge.server import admin as admin_room
from cdl_edge.server import change, guard, listen_locally, serve
from cdl_edge.server.body import Limits
from cdl_edge.server.change import changed
from cdl_edge.server.live_model import version_name

PNG = {"content-type": "image/png"}


@pytest.fixture(autouse=True)
def _here(request, monkeypatch):
    """Changes happen in this process, which is faster; where `apart` is asked for in one of their own, as always."""
    if "apart" not in request.fixturenames:
        monkeypatch.setattr(admin_room, "in_a_process", lambda order, *_: change.changed(order))


@pytest.fixture
def apart():
    """See `_here`."""


def classes(client):
    return client.get("/health").json()["model"]["classes"]


def test_install_list_and_go_back(make_server, make_client, make_version, pack_between, tiny, admin):
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


@pytest.mark.slow
def test_a_pack_as_the_body(client, pack_between, admin, apart):
    content = pack_between(0, 1).read_bytes()
    assert client.post("/packs", content=content, headers={**admin, "content-type": "application/octet-stream"}).json()[
        "version"
    ]
    assert classes(client) == 5


@pytest.mark.slow
def test_installs_under_load(make_server, make_client, make_version, pack_between, tiny, admin):
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


def test_what_is_refused_changes_nothing(make_server, make_client, make_version, pack_between, tmp_path, admin):
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
    assert client.post("/packs", content=content, headers={**admin, "content-type": "text/html"}).status_code == 415
    assert client.post("/packs", headers=admin, files=[("a", ("a", content)), ("b", ("b", content))]).status_code == 400
    assert client.post("/packs", headers=admin, data={"a": "b"}).status_code in (400, 415)
    assert client.post("/packs", headers=admin, content=content).status_code == 200
    assert client.post("/packs", headers=admin, content=content).status_code == 400  # a replay
    assert classes(client) == 5


def test_what_cannot_be_put_in_is_taken_back_from_the_disk(make_server, make_client, pack_between, monkeypatch, admin):
    server = make_server()
    client = make_client(server)
    before = server.live.health()["version"]

    def fail(_):
        raise InputError("not on this machine")

    with monkeypatch.context() as patch:
        patch.setattr(server.live, "swap", fail)
        answer = client.post("/packs", headers=admin, content=pack_between(0, 1).read_bytes())
    assert answer.status_code == 400 and "not on this machine" in answer.text
    assert version_name(open_bundle(server.source)) == server.live.health()["version"] == before
    assert 'cdl_edge_swaps_total{result="failed"} 1' in client.get("/metrics").text


def test_a_change_whose_process_was_ended_too_late_is_taken_back(
    make_server, make_client, pack_between, monkeypatch, admin
):
    """The version was swapped in already when the time was over: to be refused has to mean that nothing has changed."""
    server = make_server()
    client, before = make_client(server), server.live.health()["version"]
    monkeypatch.setattr("cdl_edge.server.admin.in_a_process", late := Late())
    answer = client.post("/packs", headers=admin, content=pack_between(0, 1).read_bytes())
    assert answer.status_code == 400 and "does not come to an answer" in answer.text
    assert [order["do"] for order in late.orders] == ["install", "rollback"]
    assert version_name(open_bundle(server.source)) == server.live.health()["version"] == before


class Late:
    """In place of `in_a_process`: an install is done, and its process then ended."""

    def __init__(self):
        self.orders = []

    def __call__(self, order, seconds, started):
        self.orders.append(order)
        done = changed(order)
        if order["do"] == "install":
            raise InputError("the new version does not come to an answer")
        return done


def test_one_install_at_a_time(make_server, make_client, pack_between, admin):
    server = make_server()
    client = make_client(server)
    with server.changing:
        assert client.post("/packs", headers=admin, content=pack_between(0, 1).read_bytes()).status_code == 409
    assert classes(client) == 4


# -- who may -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "192.168.1.7"])
@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "device"])
def test_no_address_is_trusted(make_server, make_client, peer, host):
    """A proxy on the same machine, as the page of deployment advises it, has the address of this machine."""
    client = make_client(make_server(), peer, host)
    for path in ("/packs", "/packs/rollback"):
        answer = client.post(path, content=b"")
        assert answer.status_code == 401 and "--token" in answer.json()["error"]


def test_whoever_has_the_token(make_server, make_client, pack_between, admin):
    client = make_client(make_server(), "192.168.1.7", "device:8000")
    content = pack_between(0, 1).read_bytes()
    token = admin["authorization"].split()[1]
    for given in ("", "Bearer ", "Bearer wrong", token, f"Basic {token}", "Bearer söcret".encode()):
        answer = client.post("/packs", content=content, headers={"authorization": given})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert token not in answer.text
    assert classes(client) == 4
    assert client.post("/packs", content=content, headers=admin).status_code == 200


def test_without_any_token_nobody(make_server, make_client):
    client = make_client(make_server(token=None))
    for header in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer None"}):
        assert client.post("/packs", content=b"", headers=header).status_code == 403


@pytest.mark.slow
def test_unsigned_packs_only_where_they_are_allowed(
    make_server, make_client, make_version, pack_between, admin, tmp_path
):
    cryptography = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519", reason="no cryptography")
    from cryptography.hazmat.primitives import serialization

    from cdl_edge.updates.packs import create

    client = make_client(make_server(allow_unsigned=False))
    answer = client.post("/packs", content=pack_between(0, 1).read_bytes(), headers=admin)
    assert answer.status_code == 403 and "--allow-unsigned" in answer.json()["error"]
    assert classes(client) == 4

    key = cryptography.Ed25519PrivateKey.generate()
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    create(make_version(0), make_version(1), tmp_path / "signed.pack", private)
    client = make_client(make_server(allow_unsigned=False, public_key=public))
    answer = client.post("/packs", content=pack_between(0, 1).read_bytes(), headers=admin)
    assert answer.status_code == 400 and "sign" in answer.json()["error"]
    answer = client.post("/packs", content=(tmp_path / "signed.pack").read_bytes(), headers=admin)
    assert answer.status_code == 200 and answer.json()["installed"]["signature"] == "verified"
    # Keys alone: the next key is trusted, the same version answers on.
    second = tmp_path / "second.pem"
    raw = cryptography.Ed25519PrivateKey.generate().public_key()
    second.write_bytes(raw.public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    create(make_version(1), make_version(1), tmp_path / "keys.pack", private, add_keys=[second])
    answer = client.post("/packs", content=(tmp_path / "keys.pack").read_bytes(), headers=admin)
    assert answer.status_code == 200 and raw.public_bytes_raw().hex() in answer.json()["installed"]["keys"]["trusted"]
    assert answer.json()["version"] == answer.json()["previous"] and classes(client) == 5


class Unix(HTTPConnection):
    """A client of a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=30)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self.path)


def test_the_owner_of_the_unix_socket_needs_no_token(make_server, listen, pack_between, tmp_path, monkeypatch):
    path = tmp_path / "admin.sock"
    with listen_locally(path) as local:
        assert path.stat().st_mode & 0o777 == 0o600
        port = listen(make_server(), also=(local,))
        content = pack_between(0, 1).read_bytes()

        def send(connection):
            connection.request("POST", "/packs", content)
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert send(HTTPConnection("127.0.0.1", port, timeout=30))[0] == 401
        with monkeypatch.context() as patch:  # another user, a proxy say, that can open the file all the same
            patch.setattr(guard, "is_owner", lambda _: False)
            assert send(Unix(path))[0] == 401
        status, text = send(Unix(path))
        assert status == 200, text
    assert not path.exists()


def test_a_socket_is_taken_over_only_from_the_dead(tmp_path):
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listen_locally(path):
        with pytest.raises(InputError, match="another server"), listen_locally(path):
            pass
        assert path.exists()
    path.write_text("mine")
    with pytest.raises(InputError, match="no socket"), listen_locally(path):
        pass
    assert path.read_text() == "mine"


# -- what a pack may do to the server ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pack_that_never_ends_or_crashes_stops_nothing(make_server, make_client, pack_between, admin, apart):
    server = make_server()
    client = make_client(server)
    content = pack_between(0, 1).read_bytes()
    bad = {"import time; time.sleep(600)": "does not come", "import os; os.abort()": "ends the process"}
    for code, message in bad.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(change.subprocess, "Popen", partial(_instead, change.subprocess.Popen, code))
            patch.setattr(server, "install_s", 0.2 if "sleep" in code else 60.0)
            answer = client.post("/packs", content=content, headers=admin)
        assert answer.status_code == 400 and message in answer.json()["error"], answer.text
        assert classes(client) == 4
    assert client.post("/packs", content=content, headers=admin).status_code == 200
    assert classes(client) == 5


def _instead(real, code, command, **options):
    """A process that does something else than it was started for."""
    return real([command[0], "-c", code], **options)


def test_a_pack_whose_answers_are_none_is_refused(make_server, make_client, make_version, admin, tmp_path):
    """The graph is good, what the bundle says of confidence is not: each picture would get an error."""
    from cdl_edge.updates.packs import create

    server = make_server()
    client = make_client(server)
    broken = {"temperature": "hot", "unknown": {"below": 0.0}, "task": {"scale": 0.0}}
    with pytest.MonkeyPatch.context() as patch:  # whoever makes a bad pack does not test it
        patch.setattr("cdl_edge.updates.packs.self_test", lambda *_: {})
        create(make_version(0), make_version(1, confidence=broken), tmp_path / "bad.pack")
    answer = client.post("/packs", content=(tmp_path / "bad.pack").read_bytes(), headers=admin)
    assert answer.status_code == 400 and "confidence" in answer.json()["error"], answer.text
    assert classes(client) == 4 and client.get("/health").status_code == 200


# -- the token's file --------------------------------------------------------------------------------------------------


def test_a_token_is_made_once_and_read_by_its_user_alone(tmp_path, monkeypatch):
    path = tmp_path / "state" / "token"
    made, new = kept(path)
    assert new and len(made) >= 40 and path.stat().st_mode & 0o777 == 0o600
    assert kept(path) == (made, False)
    path.chmod(0o644)
    with pytest.raises(InputError, match="others may read"):
        kept(path)
    path.chmod(0o600)
    path.write_text("")
    with pytest.raises(InputError, match="holds no token"):
        kept(path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no secret can be kept"):
        kept(path)
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    assert default_file() == tmp_path / "token"


def test_a_token_is_whole_or_not_there(tmp_path, monkeypatch):
    """Ended, or out of room, while it is written: an empty file stayed, which every later start refused."""
    path = tmp_path / "token"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InputError, match="No space left"):
            kept(path)
    assert list(tmp_path.iterdir()) == []
    assert kept(path)[1]


def test_two_services_that_start_at_the_same_time_have_one_token(tmp_path, monkeypatch):
    path = tmp_path / "token"
    real, others = os.link, []

    def link(source, target):
        if not others:
            others.append("")
            others.append(kept(path))
        real(source, target)

    monkeypatch.setattr("os.link", link)
    assert kept(path) == (others[1][0], False) and others[1][1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("token", ["", " ", "short", "x" * 15, "ö" * 20, "two words of a token", "a" * 20 + "\n"])
def test_a_token_that_guards_nothing_is_refused(token, make_version):
    with pytest.raises(InputError, match="token"):
        serve(make_version(0), port=0, token=token)
