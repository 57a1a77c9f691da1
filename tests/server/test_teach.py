"""Classes over HTTP: judged, taught, taken out again; by whom, and what is refused."""

from __future__ import annotations

import pytest

from cdl_edge.artefacts.bundle import open_bundle
from cdl_edge.server import change
from cdl_edge.server import teach as room

YELLOW = (220, 200, 30)
PNG = {"content-type": "image/png"}


@pytest.fixture(autouse=True)
def _here(request, monkeypatch):
    """Changes happen in this process, which is faster; where `apart` is asked for in one of their own, as always."""
    if "apart" not in request.fixturenames:
        monkeypatch.setattr(room, "in_a_process", lambda order, *_: change.changed(order))
        monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def apart():
    """See `_here`."""


@pytest.fixture
def server(make_server, make_teachable):
    return make_server(make_teachable())


def form(colours, colour=YELLOW, count=6, seed=0):
    frames = colours.pictures(colour, count, seed)
    return [("image", (f"{i}.png", colours.png(frame), "image/png")) for i, frame in enumerate(frames)]


def label(client, colours, colour=YELLOW):
    (frame,) = colours.pictures(colour, 1, seed=9)
    return client.post("/predict", content=colours.png(frame), headers=PNG).json()["predictions"][0]["label"]


def test_judged_taught_recognised_and_taken_out(server, make_client, colours, admin):
    client = make_client(server)
    before = open_bundle(server.source).manifest.version
    judged = client.post("/enrolments/judge?name=yellow", files=form(colours), headers=admin)
    assert judged.status_code == 200, judged.text
    assert judged.json()["leave_one_out"]["accuracy"] == 100 and client.get("/enrolments").json()["enrolments"] == []
    assert open_bundle(server.source).manifest.version == before
    done = client.post("/enrolments?name=yellow", files=form(colours), headers=admin)
    assert done.status_code == 200, done.text
    assert done.json()["taught"]["leave_one_out"] == judged.json()["leave_one_out"]
    assert done.json()["previous"] == before and label(client, colours) == "yellow"
    found = client.get("/enrolments").json()
    assert [(e["name"], e["images"], e["kept"]) for e in found["enrolments"]] == [("yellow", 6, 0)]
    assert found["version"] == done.json()["version"] and found["limits"]["max_drop"] == 0.5
    gone = client.post("/enrolments/remove?name=yellow", headers=admin).json()
    assert gone["removed"]["images"] == 6 and gone["version"] == before
    assert label(client, colours) != "yellow" and client.get("/enrolments").json()["enrolments"] == []


def test_a_bundle_that_learns_nothing_says_so_before_anybody_takes_pictures(make_server, make_teachable, make_client):
    good, none = make_teachable("good"), make_teachable("none", statistics=None)
    assert make_client(make_server(good)).get("/enrolments").json()["obstacle"] is None
    why = make_client(make_server(none)).get("/enrolments").json()["obstacle"]
    assert why == "no class statistics in this bundle: nothing can be enrolled"


def test_pictures_are_kept_where_it_is_said(server, make_client, colours, admin):
    client = make_client(server)
    client.post("/enrolments?name=yellow&keep=1", files=form(colours), headers=admin)
    assert client.get("/enrolments").json()["enrolments"][0]["kept"] == 6


@pytest.mark.parametrize("path", ["/enrolments", "/enrolments/judge", "/enrolments/remove"])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
def test_only_who_may(server, make_client, colours, path, headers):
    answer = make_client(server).post(f"{path}?name=yellow", files=form(colours), headers=headers)
    assert answer.status_code == 401 and answer.json()["kind"] == "denied"
    assert open_bundle(server.source).manifest.enrolments == ()


@pytest.mark.parametrize("path", ["/enrolments", "/enrolments/judge"])
@pytest.mark.parametrize(
    ("query", "count", "words"),
    [
        ("name=yellow", 2, "too few pictures"),
        ("", 6, "cannot be the name"),
        ("name=%20a", 6, "cannot be the name"),
        ("name=yellow", 65, "form cannot be read"),
    ],
)
def test_refused_without_a_trace(server, make_client, colours, admin, contents, path, query, count, words):
    before = contents(server.source)
    answer = make_client(server).post(f"{path}?{query}", files=form(colours, count=count), headers=admin)
    assert answer.status_code == 400 and words in answer.json()["error"]
    assert contents(server.source) == before and server.changing.acquire(blocking=False)


def test_the_client_s_names_are_in_the_message(server, make_client, colours, admin):
    files = [*form(colours, count=3), ("image", ("broken.png", b"no picture", "image/png"))]
    error = make_client(server).post("/enrolments?name=yellow", files=files, headers=admin).json()["error"]
    assert "broken.png: not a readable image" in error and "/tmp" not in error


@pytest.mark.parametrize("points", ["-1", "nan", "many", "101"])
def test_points_out_of_range(server, make_client, colours, admin, points):
    answer = make_client(server).post(f"/enrolments?name=yellow&max_drop={points}", files=form(colours), headers=admin)
    assert answer.status_code == 400 and "max_drop" in answer.json()["error"]


def test_one_is_judged_at_a_time(server, make_client, colours, admin):
    client = make_client(server)
    with server.judging:
        answer = client.post("/enrolments/judge?name=yellow", files=form(colours), headers=admin)
    assert answer.status_code == 503 and "being judged" in answer.json()["error"]
    assert client.post("/enrolments/judge?name=yellow", files=form(colours), headers=admin).status_code == 200


def test_a_bundle_that_nothing_can_be_enrolled_in(make_server, make_client, colours, admin):
    answer = make_client(make_server()).post("/enrolments?name=yellow", files=form(colours), headers=admin)
    assert answer.status_code == 400 and "no class statistics" in answer.json()["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("head", ["slda", "ranpac"])
def test_in_a_process_of_its_own(make_server, make_teachable, make_client, admin, colours, head):
    """As it is served; limits there are those of every other process: its own judgement of duplicates."""
    client = make_client(make_server(make_teachable(head=head)))
    files = [("image", (f"{i}.png", colours.png(frame))) for i, frame in enumerate(colours.different(YELLOW, 6))]
    done = client.post("/enrolments?name=yellow", files=files, headers=admin)
    assert done.status_code == 200, done.text
    assert client.post("/enrolments/remove?name=yellow", headers=admin).status_code == 200
