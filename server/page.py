"""The web pages: each one answer that holds all of it, and a policy that lets it load nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

FOLDER = Path(__file__).parent
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
PAGES = {
    "page.html": (("page.js", "teach.js"), "img-src 'self' blob: data:; media-src blob: mediastream:"),
    "preview.html": (("preview.js",), "img-src blob: data:"),
}
"file with title and body -> the scripts that are put in, and what its policy says of pictures and videos"


@cache
def html(name: str) -> tuple[str, str]:
    """A page and its Content-Security-Policy: head.html, a file of PAGES, page.css and the scripts, all in one."""
    scripts, media = PAGES[name]
    text = _read("head.html") + _read(name)
    sources = {}
    for kind, names in (("style", ("page.css",)), ("script", scripts)):
        inside = "\n" + "\n".join(map(_read, names))
        text = text.replace(f"<{kind}></{kind}>", f"<{kind}>{inside}</{kind}>")
        sources[kind] = "'sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() + "'"
    policy = (
        f"default-src 'none'; style-src {sources['style']}; script-src {sources['script']}; connect-src 'self'; "
        f"{media}; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


async def page(request: Request) -> Response:
    """GET /."""
    return _answer("page.html")


async def preview_page(request: Request) -> Response:
    """GET / of a preview, see preview.py."""
    return _answer("preview.html")


def _answer(name: str) -> Response:
    text, policy = html(name)
    return HTMLResponse(text, headers={**HEADERS, "content-security-policy": policy})
