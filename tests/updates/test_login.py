"""Logins at a registry: what docker has stored or a token, and never to anybody else."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from pathlib import Path

import pytest

from cdl_edge.errors import InputError
from cdl_edge.updates import login
from cdl_edge.updates.registry import Place, Registry

BASIC = base64.b64encode(b"me:secret").decode()


@pytest.fixture
def server(make_registry):
    """A small registry with an empty repository "fruit"."""
    made = make_registry()
    made.manifests["fruit"] = {}
    return made


def tags(server):
    return Registry(Place.of(f"{server.at}/fruit")).tags()


def store(config: object) -> None:
    """What `docker login` writes."""
    file = login.config_file()
    file.parent.mkdir(exist_ok=True)
    file.write_text(config if isinstance(config, str) else json.dumps(config))


def test_basic(server):
    server.login, server.challenge = f"Basic {BASIC}", 'Basic realm="here"'
    with pytest.raises(InputError, match="does not let you in") as caught:
        tags(server)
    said = str(caught.value)
    assert "401" in said and str(login.config_file()) in said and f"docker login {server.at}" in said
    for entry in ({"auth": BASIC}, {"username": "me", "password": "secret"}):
        for name in (server.at, f"http://{server.at}", f"https://{server.at}/v1/"):
            store({"auths": {"other.example.com": {"auth": "bm86bm8="}, name: entry}})
            assert tags(server) == []
    store({"auths": {server.at: {"auth": base64.b64encode(b"me:wrong").decode()}}})
    with pytest.raises(InputError, match="does not let you in"):
        tags(server)


def test_bearer(server):
    realm = f'Bearer realm="http://{server.at}/token",service="here",scope="repository:fruit:pull"'
    server.login, server.challenge = "Bearer t.o.k-en", realm
    asked = "/token?service=here&scope=repository%3Afruit%3Apull"
    server.answer[asked] = (200, {}, b'{"token": "t.o.k-en"}')
    assert tags(server) == []
    (request,) = [r for r in server.seen if r.path == "/token"]
    assert "Authorization" not in request.headers, "nobody is logged in"
    store({"auths": {server.at: {"auth": BASIC}}})
    server.answer[asked] = (200, {}, b'{"access_token": "t.o.k-en"}')
    assert tags(server) == []
    assert [r for r in server.seen if r.path == "/token"][-1].headers["Authorization"] == f"Basic {BASIC}"
    for answer in (b"", b"{}", b"[]", b'{"token": 3}', b'{"token": "a\\nb"}'):
        server.answer[asked] = (200, {}, answer)
        with pytest.raises(InputError, match="gives no token"):
            tags(server)
    server.answer[asked] = (401, {}, b"")
    with pytest.raises(InputError, match="does not let you in"):
        tags(server)


def test_a_token_that_runs_out_between_two_requests(server):
    server.login, server.challenge = "Bearer one", f'Bearer realm="http://{server.at}/token"'
    server.answer["/token"] = (200, {}, b'{"token": "one"}')
    registry = Registry(Place.of(f"{server.at}/fruit"))
    assert registry.tags() == []
    server.login, server.answer["/token"] = "Bearer two", (200, {}, b'{"token": "two"}')
    assert registry.tags() == []
    assert all("Bearer" not in r.headers.get("Authorization", "") for r in server.seen if r.path == "/token")


def test_a_token_of_the_environment(server, monkeypatch):
    server.login, server.challenge = "Bearer mine", 'Bearer realm="http://127.0.0.1:9/never-asked"'
    monkeypatch.setenv(login.TOKEN, "mine\n")
    assert tags(server) == []
    monkeypatch.setenv(login.TOKEN, "old")
    with pytest.raises(InputError, match=f"does not let you in(.|\n)*{login.TOKEN}"):
        tags(server)


def test_a_program_for_credentials(server, monkeypatch, tmp_path):
    program = tmp_path / "docker-credential-box"
    program.write_text('#!/bin/sh\nread -r at\n[ "$at" = "$AT" ] || exit 1\necho "$SAYS"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("AT", server.at)
    monkeypatch.setenv("SAYS", '{"Username": "me", "Secret": "secret"}')
    server.login, server.challenge = f"Basic {BASIC}", "Basic"
    for config in ({"credsStore": "box"}, {"credHelpers": {server.at: "box"}, "auths": {server.at: {}}}):
        store(config)
        assert tags(server) == []
    monkeypatch.setenv("AT", "elsewhere")
    with pytest.raises(InputError, match="does not let you in"):
        tags(server)
    monkeypatch.setenv("AT", server.at)
    monkeypatch.setenv("SAYS", "nothing")
    with pytest.raises(InputError, match="docker-credential-box: gives no credentials"):
        tags(server)
    store({"credsStore": "not-there"})
    with pytest.raises(InputError, match="docker-credential-not-there: gives no credentials"):
        tags(server)
    store({"credsStore": "../evil"})
    with pytest.raises(InputError, match="not as `docker login` writes it"):
        tags(server)


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", '{"auths": 3}', '{"auths": {"AT": {"auth": "no base64!"}}}', '{"auths": {"AT": {"auth": "bm8="}}}'],
)
def test_a_file_that_docker_did_not_write(server, config):
    server.login, server.challenge = "Basic x", "Basic"
    store(config.replace("AT", server.at))
    with pytest.raises(InputError, match="not as `docker login` writes it") as caught:
        tags(server)
    assert "docker login" in str(caught.value)


@pytest.mark.parametrize("challenge", ["", "Negotiate", "Bearer service=x"])
def test_a_challenge_that_nothing_here_answers(server, challenge):
    server.login, server.challenge = "Basic x", challenge
    with pytest.raises(InputError, match="a login of a kind that is not known here"):
        tags(server)


def test_a_login_goes_to_its_registry_alone(server, make_registry, tmp_path):
    """Blobs often lie elsewhere, behind a redirect; that host is told nothing."""
    content, elsewhere = b"a pack", make_registry()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    elsewhere.answer["/stored"] = (200, {}, content)
    server.login, server.challenge = f"Basic {BASIC}", "Basic"
    store({"auths": {server.at: {"auth": BASIC}}})
    registry = Registry(Place.of(f"{server.at}/fruit"))
    assert registry.tags() == []
    server.answer[f"/blobs/{digest}"] = (307, {"Location": f"http://{elsewhere.at}/stored"}, b"")
    assert registry.get_blob(digest, len(content), tmp_path / "part") == 0
    assert (tmp_path / "part").read_bytes() == content
    assert [r.path for r in elsewhere.seen] == ["/stored"] and "Authorization" not in elsewhere.seen[0].headers
    assert "Authorization" in server.seen[-1].headers


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "gopher:x"])
def test_only_http_is_followed(server, tmp_path, target):
    digest = f"sha256:{'0' * 64}"
    server.answer[f"/blobs/{digest}"] = (307, {"Location": target}, b"")
    with pytest.raises(InputError, match="not the answer of a registry"):
        Registry(Place.of(f"{server.at}/fruit")).get_blob(digest, 3, tmp_path / "part")
    server.login, server.challenge = "Bearer x", f'Bearer realm="{target}"'
    with pytest.raises(InputError, match="not the answer of a registry"):
        tags(server)


def test_redirects_end(server, tmp_path):
    digest = f"sha256:{'0' * 64}"
    server.answer[f"/blobs/{digest}"] = (307, {"Location": f"/v2/fruit/blobs/{digest}"}, b"")
    with pytest.raises(InputError, match="the registry refuses"):
        Registry(Place.of(f"{server.at}/fruit")).get_blob(digest, 3, tmp_path / "part")


def test_tls_is_not_left(monkeypatch, tmp_path):
    """A registry with TLS that sends its clients, or their login, to one without."""
    registry = Registry(Place("registry.example.com", "fruit", "https"))
    with pytest.raises(InputError, match="an address with https"):
        registry._token("http://registry.example.com/token", {})


def test_without_docker_nobody_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "nothing"))
    assert login.credentials("registry.example.com") is None
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert login.config_file() == Path(tmp_path) / ".docker" / "config.json"
