"""The pages: whole in themselves, and their parts fit each other. A browser looks at them in test_browser.py."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from cdl_edge.server.page import PAGES, html

each = pytest.mark.parametrize("name", PAGES)


def test_it_is_one_answer(client):
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert (answer.text, answer.headers["content-security-policy"]) == html("page.html")


@each
def test_it_loads_nothing(name):
    text, policy = html(name)
    assert text.startswith("<!doctype html>\n") and text.count("<title>") == text.count("</html>") == 1
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for kind in ("style", "script"):
        (inside,) = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert len(inside) > 1000
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert re.findall(r'(?:src|href)="(?!/|data:,)[^"]*"', text) == []
    urls = {*re.findall(r"https?://[^\s\"'`]+", text)}
    assert urls <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert " style=" not in text and not re.search(r"\son\w+=\"", text)  # the policy would forbid them


@each
def test_the_script_finds_what_it_looks_for(name):
    text, _ = html(name)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len({*ids})
    assert {*re.findall(r'\$\("([^"]+)"\)', text)} <= {*ids}
    for attribute in ("for", "aria-labelledby"):
        assert {*re.findall(rf'\b{attribute}="([^"]+)"', text)} <= {*ids}


@each
def test_nothing_is_put_into_the_page_as_markup(name):
    """Class names and file names are the user's."""
    text, _ = html(name)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in text


@each
def test_dark_is_there_and_no_class_is_without_a_style(name):
    text, _ = html(name)
    assert "prefers-color-scheme: dark" in text and 'content="light dark"' in text
    used = {name for names in re.findall(r'class="([^"]+)"', text) for name in names.split()}
    style = text.split("<style>")[1].split("</style>")[0]
    assert {name for name in used if f".{name}" not in style} == set()
