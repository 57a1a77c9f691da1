"""The web page: one answer that holds all of it, and a policy that lets it load nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

FOLDER = Path(__file__).parent


@cache
def html() -> tuple[str, str]:
    """(page, its Content-Security-Policy): page.html with page.css, and page.js and teach.js, put in."""
    text = (FOLDER / "page.html").read_text(encoding="utf-8")
    sources = {}
    for kind, names in (("style", ("page.css",)), ("script", ("page.js", "teach.js"))):
        inside = "\n" + "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)
        text = text.replace(f"<{kind}></{kind}>", f"<{kind}>{inside}</{kind}>")
        sources[kind] = "'sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() + "'"
    policy = (
        f"default-src 'none'; style-src {sources['style']}; script-src {sources['script']}; connect-src 'self'; "
        "img-src 'self' blob: data:; media-src blob: mediastream:; form-action 'none'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


async def page(request: Request) -> Response:
    """GET /."""
    text, policy = html()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return HTMLResponse(text, headers=headers)
