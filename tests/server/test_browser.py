"""The page in a real browser: upload, classes and prompts, a pack with a new class, camera, narrow and dark.

Needs playwright and a chromium; screenshots go to the folder that CDL_EDGE_SCREENSHOTS names, if it does.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cdl_edge.runtime import load
from cdl_edge.server.collect import Collection

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 420, "height": 900}


@pytest.fixture(scope="module")
def browser():
    """A headless chromium whose camera shows a test picture."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser driver: pip install playwright")
    if not CHROMIUM:
        pytest.skip("no browser: apt install chromium")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(port, **options) -> page; at the end nothing may have been complained about in the console."""
    opened = []

    def make(port, **options):
        context = browser.new_context(permissions=["camera"], **{"viewport": WIDE, **options})
        context.set_default_timeout(60_000)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        opened.append((context, said))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#health.good")
        return page

    yield make
    for context, said in opened:
        context.close()
        # A refused request is told on the page; the browser tells its console too.
        assert [text for text in said if "Failed to load resource" not in text] == []


def look(page, name):
    if folder := os.environ.get("CDL_EDGE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def file(name, content, kind="image/png"):
    return {"name": name, "mimeType": kind, "buffer": content}


def colour_of(bundle, label):
    """A colour that the bundle takes for a class."""
    with load(bundle, threads=1) as runner:
        for colour in np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8):
            image = np.broadcast_to(colour, (1, 8, 8, 3))
            if runner.bundle.classes[int(runner.infer(image).argmax())] == label:
                return tuple(int(c) for c in colour)
    raise AssertionError(f"no colour is {label}")


@pytest.mark.slow
def test_upload_then_install_a_pack_and_see_the_new_class(
    open_page, make_server, listen, make_version, pack_between, tiny
):
    colour = colour_of(make_version(1), "class 4")  # which version 0 has not learnt
    pack = pack_between(0, 1).read_bytes()
    server = make_server()
    page = open_page(listen(server))
    page.fill("#token", server.token)
    assert page.text_content("#name") == "tiny"
    assert "4 classes in 4 tasks" in page.text_content("#model")

    page.set_input_files("#file", file("picture.png", tiny.png(colour, 200)))
    page.wait_for_selector("#classes li:nth-child(4)")
    assert "class 4" not in page.text_content("#classes")
    assert page.locator("#prompts li").count() == 4  # two blocks, two entries each
    assert page.locator("#prompts .block").all_text_contents() == ["Block 0", "Block 1"]
    assert re.search(r"\d ms", page.text_content("#page-p50"))
    old = re.search("version ([0-9a-f]{16})", page.text_content("#timing"))[1]
    assert page.locator("#packs tr").count() == 1

    page.set_input_files("#pack", file("update.pack", pack, "application/octet-stream"))
    page.wait_for_selector("#packs tr:nth-child(2)")
    assert "answers now" in page.text_content("#pack-state")
    page.wait_for_selector("#label:has-text('class 4')")
    assert "5 classes" in page.text_content("#model")
    new = re.search("version ([0-9a-f]{16})", page.text_content("#timing"))[1]
    assert new != old
    look(page, "installed")

    page.click(f"#packs button[aria-label='Use version {old}']")
    page.wait_for_selector(f"#timing:has-text('{old}')")
    assert "class 4" not in page.text_content("#label")


@pytest.mark.slow
def test_what_is_refused_is_told_on_the_page(open_page, make_server, listen, tiny):
    page = open_page(listen(make_server()))
    page.set_input_files("#file", file("broken.png", b"nothing"))
    page.wait_for_selector("#problem:not([hidden])")
    assert "not a readable image" in page.text_content("#problem")
    assert page.text_content("#label") == "No answer."
    page.set_input_files("#pack", file("broken.pack", b"nothing", "application/octet-stream"))
    page.wait_for_selector("#pack-problem:not([hidden])")
    look(page, "refused")
    page.set_input_files("#file", file("good.png", tiny.png((255, 0, 0))))
    page.wait_for_selector("#problem", state="hidden")


@pytest.mark.slow
def test_a_token_is_asked_for(open_page, make_server, listen, pack_between):
    pack = file("update.pack", pack_between(0, 1).read_bytes(), "application/octet-stream")
    page = open_page(listen(make_server(token="secret")))
    page.set_input_files("#pack", pack)
    page.wait_for_selector("#pack-problem:has-text('a token is needed')")
    assert page.evaluate("document.activeElement.id") == "token"
    page.fill("#token", "secret")
    page.set_input_files("#pack", pack)
    page.wait_for_selector("#packs tr:nth-child(2)")


@pytest.mark.slow
def test_the_camera(open_page, make_server, listen):
    page = open_page(listen(make_server()))
    page.click("#camera")
    page.locator("#page-n", has_text=re.compile(r"([5-9]|\d\d) answers$")).wait_for()
    assert page.is_visible("#video") and not page.is_visible("#hint")
    look(page, "camera")
    page.click("#camera")
    assert page.is_hidden("#video") and page.is_visible("#hint")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_fits(open_page, make_server, listen, tiny, viewport, scheme):
    page = open_page(listen(make_server()), viewport=viewport, color_scheme=scheme)
    page.set_input_files("#file", file("picture.png", tiny.png((200, 120, 40), 300)))
    page.wait_for_selector("#classes li")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    table = "document.querySelector('#packs').closest('.scroll')"
    assert page.evaluate(f"{table}.scrollWidth <= {table}.clientWidth"), "the last column is cut"
    assert page.locator("#known dt").first.text_content() == "Task 1"  # as the command line counts
    assert page.locator("#task option").nth(1).text_content() == "1"
    assert re.match(r"class \d+ confidence [\d.]+ % · task [1-4] ", page.text_content("#label"))
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    look(page, f"{viewport['width']}-{scheme}")
    # Of weighted prompts the longest bar comes first.
    page.evaluate("model.selection = {kind: 'weighted'}; prompts({selected: [7, 3, 9], weights: [0.1, -0.3, 0.2]})")
    assert [text.split()[1][0] for text in page.locator("#prompts li").all_text_contents()] == ["3", "9", "7"]


@pytest.mark.slow
def test_the_keyboard_is_enough(open_page, make_server, listen):
    page = open_page(listen(make_server()))
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"file", "camera", "top", "task", "pack"} <= reached


@pytest.mark.slow
def test_teach_a_class_see_it_recognised_and_undo(open_page, make_server, listen, make_teachable, colours):
    yellow = (230, 210, 20)
    frames = [colours.png(frame) for frame in colours.different(yellow, 10, side=96)]
    unseen = colours.png(colours.different(yellow, 1, seed=5, side=96)[0])
    server = make_server(make_teachable(head="ranpac"))
    page = open_page(listen(server))
    page.set_input_files("#file", file("unseen.png", unseen))
    page.wait_for_selector("#classes li")
    assert "yellow" not in page.text_content("#label")

    page.click("#tab-teach")
    page.fill("#teach-name", "yellow")
    page.fill("#teach-token", server.token)
    page.set_input_files("#teach-files", [file(f"{i}.png", frame) for i, frame in enumerate(frames[:4])])
    page.wait_for_selector("#teach-sentence:has-text('recognised by what the others teach')")
    look(page, "teach-4")
    page.set_input_files("#teach-files", [file(f"{i}.png", frame) for i, frame in enumerate(frames[4:])])
    page.wait_for_selector("#teach-count:has-text('10 of 10')")
    page.wait_for_selector("#teach-sentence:has-text('of 10 are recognised')")
    look(page, "teach-10")
    page.click("#teach-go")
    page.wait_for_selector("#teach-state:has-text('yellow is learnt')")
    page.wait_for_selector("#taught:has-text('yellow, 10 pictures')")
    look(page, "taught")

    page.click("#tab-look")
    page.set_input_files("#file", file("unseen.png", unseen))
    page.wait_for_selector("#label:has-text('yellow')")
    assert "4 classes" in page.text_content("#model")
    look(page, "recognised")

    page.click("#tab-teach")
    page.click("#teach-undo")
    page.wait_for_selector("#teach-state:has-text('yellow is taken out')")
    page.wait_for_selector("#teach-undo", state="hidden")
    page.wait_for_selector("#teach-count:has-text('No picture yet')")  # no figures of a class that is gone
    assert "recognised" not in page.text_content("#teach-figures") + page.text_content("#teach-sentence")
    page.click("#tab-look")
    page.set_input_files("#file", file("unseen.png", unseen))
    page.wait_for_selector("#model:has-text('3 classes')")
    page.wait_for_selector("#label:not(:has-text('yellow'))")
    look(page, "undone")


@pytest.mark.slow
def test_ten_frames_of_the_camera(open_page, make_server, listen, make_teachable):
    server = make_server(make_teachable())
    page = open_page(listen(server))
    page.click("#tab-teach")
    page.click("#teach-camera")
    page.wait_for_selector("#teach-ten:not([disabled])")
    page.click("#teach-ten")
    page.wait_for_selector("#teach-tray li:nth-child(10)")
    look(page, "teach-camera")
    page.click("#teach-tray li:nth-child(10) button")
    assert page.locator("#teach-tray li").count() == 9
    page.click("#teach-clear")
    assert page.locator("#teach-tray li").count() == 0
    page.click("#tab-look")
    assert page.is_hidden("#teach-video")


@pytest.mark.slow
def test_what_cannot_be_taught_is_told(open_page, make_server, listen, make_teachable, colours):
    page = open_page(listen(make_server(make_teachable())))
    page.click("#tab-teach")
    page.fill("#teach-name", "scarlet")
    red = [colours.png(f) for f in colours.different(colours.CLASSES["red"], 4, side=96)]
    page.set_input_files("#teach-files", [file(f"{i}.png", frame) for i, frame in enumerate(red)])
    page.wait_for_selector("#teach-sentence:has-text('the token')")
    page.click("#teach-go")
    page.wait_for_selector("#teach-problem:has-text('a token is needed')")
    look(page, "teach-denied")


@pytest.mark.slow
def test_a_bundle_that_learns_nothing_says_so_first(open_page, make_server, listen, make_teachable):
    page = open_page(listen(make_server(make_teachable(statistics=None))))
    page.click("#tab-teach")
    page.wait_for_selector("#teach-obstacle:not([hidden])")
    assert "no class statistics in this bundle" in page.inner_text("#teach-obstacle")
    assert page.evaluate("document.getElementById('teach-pictures').inert")
    page.fill("#teach-token", "t")  # the gallery below needs it
    look(page, "teach-obstacle")


@pytest.mark.slow
def test_the_gallery_is_sorted_and_taught(
    open_page, make_server, listen, make_teachable, colours, tmp_path, monkeypatch
):
    monkeypatch.setattr("cdl_edge.server.collect.UNSURE", 2.0)
    collection = Collection(tmp_path / "kept")
    server = make_server(make_teachable(), collection=collection)
    page = open_page(listen(server))
    for frame in colours.different((230, 210, 20), 5, side=96):
        page.set_input_files("#file", file("seen.png", colours.png(frame)))
        page.wait_for_selector("#classes li")
        page.wait_for_timeout(300)
    slow, held = [True], []  # a slow network: the pictures are chosen before they can be seen
    page.route("**/collected/picture?*", lambda route: held.append(route) if slow else route.continue_())
    page.click("#tab-teach")
    page.fill("#teach-token", server.token)
    page.dispatch_event("#teach-token", "change")
    page.wait_for_selector("#gallery-pictures li:nth-child(5)")
    look(page, "gallery")
    for i in range(4):
        page.check(f"#gallery-pictures li:nth-child({i + 1}) input")
    page.fill("#gallery-name", "yellow")
    page.click("#gallery-teach")
    page.wait_for_timeout(200)
    slow.clear()
    for route in held:
        route.continue_()
    page.wait_for_selector("#teach-tray li:nth-child(4)")
    page.wait_for_selector("#gallery-sorted:has-text('yellow 4')")
    page.check("#gallery-pictures li:nth-child(1) input")
    page.click("#gallery-discard")
    page.wait_for_selector("#gallery-pictures li", state="detached")
    page.click("#teach-go")
    page.wait_for_selector("#taught:has-text('yellow, 4 pictures')")
    look(page, "gallery-taught")
    collection.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_teach_tab_fits(open_page, make_server, listen, make_teachable, colours, scheme):
    page = open_page(listen(make_server(make_teachable())), viewport=NARROW, color_scheme=scheme)
    page.click("#tab-teach")
    frames = colours.different((230, 210, 20), 7, side=96)
    page.set_input_files("#teach-files", [file(f"{i}.png", colours.png(f)) for i, f in enumerate(frames)])
    page.wait_for_selector("#teach-tray li:nth-child(7)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    look(page, f"teach-{scheme}")
