"""Pictures worth keeping: which ones, where, how many; and the gallery over HTTP."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from cdl_edge.data import load_dataset
from cdl_edge.decoder import EXTENSIONS
from cdl_edge.errors import InputError
from cdl_edge.runtime.scene import Scene
from cdl_edge.server import collect
from cdl_edge.server.collect import Collection

PNG = {"content-type": "image/png"}
UNSURE = {"label": "red", "confidence": 0.2, "unknown": False, "probability": 0.3}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """make(**limits) -> a Collection; what it was given is on the disk when `close` returns."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    opened = []

    def make(folder="kept", **limits):
        for name, value in limits.items():
            monkeypatch.setattr(collect, name, value)
        opened.append(Collection(tmp_path / folder))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def scenes(count, seed=0, side=16):
    """Pictures that look different from far away."""
    cells = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return list(cells.repeat(side // 8, 1).repeat(side // 8, 2))


def offer(collection, colours, frames, answer=UNSURE):
    for frame in frames:
        while collection._waiting >= collect.WAITING:
            pass
        collection.offer(colours.png(frame), frame, answer, "v")
    collection.close()


def test_what_nobody_is_sure_of_is_kept(made, colours):
    collection = made()
    sure = {**UNSURE, "confidence": 0.9}
    first, second, third = scenes(3)
    offer(collection, colours, [first])
    again = made()
    for frame, answer in ((second, sure), (third, {**sure, "unknown": True})):
        again.offer(colours.png(frame), frame, answer, "v")
    again.close()
    found = again.listed()["pictures"]
    assert [(p["label"], p["unknown"]) for p in found] == [("red", True), ("red", False)] or len(found) == 2
    assert {again.read(p["id"]) for p in found} == {colours.png(first), colours.png(third)}
    assert all(p["at"].endswith("Z") and p["version"] == "v" for p in found)


def test_one_of_each_scene(made, colours):
    collection = made()
    (frame,) = scenes(1)
    rng = np.random.default_rng(1)
    trembling = [np.clip(frame + rng.integers(-2, 3, frame.shape), 0, 255).astype(np.uint8) for _ in range(5)]
    offer(collection, colours, [frame, *trembling])
    assert len(collection.listed()["pictures"]) == 1
    assert Scene.of(frame).same(Scene.of(trembling[0])) and not Scene.of(frame).same(Scene.of(scenes(1, seed=2)[0]))
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert not Scene.of(black).same(Scene.of(white))


def test_a_scene_that_was_discarded_does_not_come_back(made, colours):
    collection = made()
    (frame,) = scenes(1)
    collection.offer(colours.png(frame), frame, UNSURE, "v")
    collection._writer.submit(int).result()
    (picture,) = collection.listed()["pictures"]
    assert collection.discard([picture["id"]]) == 1
    offer(collection, colours, [frame])
    assert collection.listed()["pictures"] == [] and list(collection.new.iterdir()) == []


def test_bounded_and_the_oldest_goes(made, colours, monkeypatch):
    collection = made(MOST_PICTURES=4)
    stamps = iter(range(100))
    monkeypatch.setattr(collect.time, "gmtime", lambda: (2026, 1, 1, 0, 0, next(stamps), 0, 0, 0))
    frames = scenes(7)
    offer(collection, colours, frames)
    kept = collection.listed()["pictures"]
    assert [collection.read(p["id"]) for p in kept] == [colours.png(f) for f in frames[:2:-1]]
    assert len(list(collection.new.iterdir())) == 8


def test_bounded_by_bytes_those_that_were_sorted_too(made, colours):
    frames = scenes(6)
    size = max(len(colours.png(f)) for f in frames)
    collection = made(MOST_BYTES=3 * size)
    offer(collection, colours, frames)
    assert collection.listed()["bytes"] <= 3 * size and 2 <= len(collection.listed()["pictures"]) <= 3
    collection.sort([p["id"] for p in collection.listed()["pictures"]], "thing")
    again = made()
    offer(again, colours, scenes(3, seed=5))
    assert again.listed()["bytes"] <= 3 * size and again.listed()["sorted"]["thing"] >= 2


def test_private_and_whole(made, colours, tmp_path):
    before = os.umask(0)
    try:
        collection = made()
        offer(collection, colours, scenes(2))
        collection.sort([collection.listed()["pictures"][0]["id"]], "thing")
    finally:
        os.umask(before)
    places = [tmp_path / "kept", *(tmp_path / "kept").rglob("*")]
    modes = (
        {stat.S_IMODE(p.stat().st_mode) for p in places if p.is_dir()},
        {stat.S_IMODE(p.stat().st_mode) for p in places if p.is_file()},
    )
    assert modes == ({0o700}, {0o600})


def test_what_a_killed_server_left(made, colours, tmp_path):
    offer(made(), colours, scenes(2))
    new = tmp_path / "kept" / "new"
    names = sorted(p.name for p in new.iterdir())
    (new / f".{names[0]}.part").write_bytes(b"half")
    (new / "20260101T000000-0123456789abcdef.jpg.json").write_text("{}")
    (new / "mine.txt").write_text("not ours")
    (new / "20260101T000000-0123456789abcdee.jpg").write_bytes(b"without its note")
    again = made()
    assert len(again.listed()["pictures"]) == 3
    assert sorted(p.name for p in new.iterdir()) == sorted([*names, "mine.txt", "20260101T000000-0123456789abcdee.jpg"])


def test_sorted_pictures_are_an_image_folder(made, colours, tmp_path):
    collection = made()
    offer(collection, colours, scenes(12))
    ids = [p["id"] for p in collection.listed()["pictures"]]
    assert collection.sort(ids[:6], "a") == 6 and collection.sort(ids[6:], "b") == 6
    dataset = load_dataset(f"folder:{collection.sorted}")
    assert sorted(dataset.classes) == ["a", "b"] and len(dataset.train.labels) + len(dataset.val.labels) == 12
    assert collection.listed()["sorted"] == {"a": 6, "b": 6} and collection.listed()["pictures"] == []


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "", " x", ".."])
def test_names_that_lead_elsewhere(made, colours, name):
    collection = made()
    offer(collection, colours, scenes(1))
    with pytest.raises(InputError):
        collection.sort([collection.listed()["pictures"][0]["id"]], name)
    assert len(collection.listed()["pictures"]) == 1


@pytest.mark.parametrize("id", ["../new", "nothing", "", "/etc/passwd"])
def test_pictures_that_are_not_there(made, id):
    collection = made()
    for do in (collection.read, lambda i: collection.discard([i]), lambda i: collection.sort([i], "a")):
        with pytest.raises(InputError, match="no such picture"):
            do(id)


def test_pictures_and_folders_that_somebody_took_away(made, colours, tmp_path):
    """All of it was a trace: the folder of sorted pictures is there to be taken to a training."""
    collection = made()
    offer(collection, colours, scenes(4))
    ids = [p["id"] for p in collection.listed()["pictures"]]
    collection.sort(ids[:1], "mug")
    (collection.sorted / "mug" / "gone.png").symlink_to(tmp_path / "nowhere")
    assert collection.listed()["sorted"] == {"mug": 1}
    (collection.new / ids[1]).unlink()
    for ask in (collection.read, lambda id: collection.sort([id], "mug"), lambda id: collection.discard([id])):
        with pytest.raises(InputError, match="no such picture"):
            ask(ids[1])
    assert ids[1] not in [p["id"] for p in collection.listed()["pictures"]]
    collection.sorted.rename(tmp_path / "taken")
    assert collection.listed()["sorted"] == {}
    assert collection.sort(ids[2:3], "cup") == 1 and collection.listed()["sorted"] == {"cup": 1}


def test_the_folder_of_new_pictures_comes_back(made, colours):
    collection = made()
    collection.new.rmdir()
    offer(collection, colours, scenes(1))
    assert len(collection.listed()["pictures"]) == 1


def test_no_room_beside_what_was_sorted_is_said(tmp_path, colours, monkeypatch, said):
    monkeypatch.setattr(collect, "MOST_PICTURES", 1)
    collection = Collection(tmp_path / "kept")
    (collection.sorted / "mug").mkdir()
    (collection.sorted / "mug" / "1.png").write_bytes(b"x")
    offer(collection, colours, scenes(2))
    assert len(said) == 1 and "all were sorted: move folders of" in said[0]
    assert collection.listed()["pictures"] == []


def test_a_full_disk_fails_no_answer(tmp_path, colours, monkeypatch, said):
    collection = Collection(tmp_path / "kept")

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collect, "_write", full)
    offer(collection, colours, scenes(3))
    assert len(said) == 1 and "No space left" in said[0] and collection.listed()["pictures"] == []


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(made, make_server, make_client, make_teachable):
    return make_client(make_server(make_teachable(), collection=made()))


def ask(client, colours, frames):
    for frame in frames:
        assert client.post("/predict", content=colours.png(frame), headers=PNG).status_code == 200


def test_the_gallery(client, colours, admin, monkeypatch, tmp_path):
    monkeypatch.setattr(collect, "UNSURE", 2.0)
    ask(client, colours, scenes(3, side=64))
    client.app.state.server.collection._writer.submit(int).result()
    found = client.get("/collected", headers=admin).json()
    ids = [p["id"] for p in found["pictures"]]
    assert len(ids) == 3 and found["most_pictures"] == 500
    one = client.get("/collected/picture", params={"id": ids[0]}, headers=admin)
    assert one.content[:4] == b"\x89PNG" and one.headers["x-content-type-options"] == "nosniff"
    assert client.post("/collected/sort", params={"id": ids[:2], "name": "thing"}, headers=admin).json() == {
        "pictures": 2
    }
    assert client.post("/collected/discard", params={"id": ids[2:]}, headers=admin).json() == {"pictures": 1}
    assert client.get("/collected", headers=admin).json()["sorted"] == {"thing": 2}
    assert len(list((tmp_path / "kept" / "sorted" / "thing").iterdir())) == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/collected"),
        ("GET", "/collected/picture?id=x"),
        ("POST", "/collected/sort?id=x&name=a"),
        ("POST", "/collected/discard?id=x"),
    ],
)
def test_they_are_private(client, make_client, make_server, admin, method, path):
    assert client.request(method, path).status_code == 401
    assert client.request(method, path, headers=admin).status_code == (200 if path == "/collected" else 400)
    off = make_client(make_server()).request(method, path, headers=admin)
    assert off.status_code == 404 and "--collect" in off.json()["error"]


def test_nothing_is_kept_unasked(make_server, make_client, colours, tmp_path, make_teachable):
    client = make_client(make_server(make_teachable()))
    before = sorted(tmp_path.iterdir())
    ask(client, colours, scenes(2, side=64))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JP2", "J2K", "AVIF", "HEIF"])
def test_a_kept_picture_is_one_for_training(made, colours, name):
    """Folders of pictures go by the ends of names: a phone's HEIC had one that they leave out."""
    if name == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    collection, stream = made(), io.BytesIO()
    (frame,) = scenes(1, side=64)
    Image.fromarray(frame).save(stream, "JPEG2000" if name in ("JP2", "J2K") else name, no_jp2=name == "J2K")
    collection.offer(stream.getvalue(), frame, UNSURE, "v")
    collection.close()
    (kept,) = collection.listed()["pictures"]
    assert Path(kept["id"]).suffix in EXTENSIONS
    assert made().listed()["pictures"] == [kept]  # known again after a start


def test_notes_are_json(made, colours):
    collection = made()
    offer(collection, colours, scenes(1))
    (note,) = collection.new.glob("*.json")
    assert json.loads(note.read_text())["scene"].keys() == {"bits", "colour"}
