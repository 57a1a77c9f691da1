"""What is watched, in a browser of this machine."""

import io
import json
import os
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdl_edge.errors import InputError
from cdl_edge.server.page import html
from cdl_edge.server.preview import Preview

ANSWER = {
    "label": "Käse",
    "confidence": 0.9,
    "unknown": None,
    "task": 0,
    "prompts": {"selected": [1], "weights": [1.0]},
}


@pytest.fixture
def preview():
    with Preview(0) as shown:
        yield shown


def get(preview, path, **headers):
    request = urllib.request.Request(preview.address + path.lstrip("/"), headers=headers)
    return urllib.request.urlopen(request, timeout=20)


def test_the_last_frame_and_its_answer(preview):
    red = np.zeros((90, 160, 3), np.uint8)
    red[..., 2] = 255
    preview(red, "bgr", {**ANSWER, "frame": 7})
    answer = get(preview, "/frame.jpg?after=6")
    assert json.loads(answer.headers["x-answer"]) == {**ANSWER, "frame": 7}
    picture = Image.open(io.BytesIO(answer.read()))
    assert picture.size == (160, 90) and picture.getpixel((80, 45))[0] > 240
    preview(red, "rgb", {**ANSWER, "frame": 8})
    assert Image.open(io.BytesIO(get(preview, "/frame.jpg?after=x").read())).getpixel((80, 45))[2] > 240


def test_a_large_frame_is_made_smaller(preview):
    preview(np.zeros((1080, 1920, 3), np.uint8), "bgr", {**ANSWER, "frame": 1})
    assert Image.open(get(preview, "/frame.jpg")).size == (1280, 720)


def test_a_request_waits_for_a_frame(preview, monkeypatch):
    preview(np.zeros((8, 8, 3), np.uint8), "bgr", {**ANSWER, "frame": 1})
    threading.Timer(0.1, lambda: preview(np.zeros((8, 8, 3), np.uint8), "bgr", {**ANSWER, "frame": 2})).start()
    assert json.loads(get(preview, "/frame.jpg?after=1").headers["x-answer"])["frame"] == 2
    monkeypatch.setattr("cdl_edge.server.preview.WAIT_S", 0.05)
    assert get(preview, "/frame.jpg?after=2").status == 204


def test_the_page_is_one_answer(preview):
    """What is in it is looked at in test_page.py."""
    answer = get(preview, "/")
    assert answer.headers["content-type"].startswith("text/html")
    assert (answer.read().decode(), answer.headers["content-security-policy"]) == html("preview.html")


def test_no_other_site_reads_the_camera(preview):
    """A name that leads to 127.0.0.1 does not make this page part of that site."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(preview, "/frame.jpg", Host="evil.example")
    assert refused.value.code == 400


def test_a_port_that_is_taken(preview):
    with pytest.raises(InputError, match="cannot listen"):
        Preview(int(preview.address.rstrip("/").rsplit(":", 1)[1]))


def test_it_is_over_with_the_watching(tmp_path, bundle):
    """From `watch`: the page is there while frames come, and its port is free afterwards."""
    from cdl_edge import api

    Image.new("RGB", (20, 16), "red").save(tmp_path / "1.png")
    said = []
    answers = api.watch(tmp_path, bundle.path, preview=0, say=said.append)
    next(answers)
    address = said[0].split()[-1]
    shown = urllib.request.urlopen(address + "frame.jpg", timeout=20)
    assert json.loads(shown.headers["x-answer"])["label"] == "red"
    answers.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)


@pytest.mark.slow
def test_a_browser_shows_what_is_watched(preview):
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser driver: pip install playwright")
    chromium = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if chromium is None:
        pytest.skip("no browser: apt install chromium")
    scene = np.random.default_rng(0).integers(0, 256, (45, 80, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, said = browser.new_page(viewport={"width": 900, "height": 700}), []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(preview.address)
        assert page.locator("#frame").is_hidden()
        preview(scene, "bgr", {**ANSWER, "frame": 1})
        page.wait_for_selector("#label:has-text('Käse')")
        page.wait_for_function("document.getElementById('frame').naturalWidth === 1280")
        assert "confidence 90.0 %, task 1, frame 1, prompts 1" in page.text_content("#about")
        preview(scene, "bgr", {**ANSWER, "frame": 2, "label": "<b>Brot</b>", "unknown": True})
        page.wait_for_selector("#state.warn:has-text('none of the classes')")
        assert page.text_content("#label") == "<b>Brot</b>"
        if folder := os.environ.get("CDL_EDGE_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "watch.png")
        browser.close()
        assert said == []
