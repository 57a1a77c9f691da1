"""A look at what a watched camera sees and what is said about it: a page on this machine, for this machine."""

from __future__ import annotations

import io
import json
import threading
from types import TracebackType
from typing import Any

import anyio
import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import listen
from .guard import Guard
from .page import HEADERS, preview_page
from .request_metrics import RequestMetrics

HOST = "127.0.0.1"
LONGEST = 1280
"pixels of the longer side of a picture that is sent"
WAIT_S, LOOK_S = 10.0, 0.02
"for how long a request waits for another frame, and between two looks for it"


class Preview:
    """The last frame and its answer, for a browser of this machine. To be used in a `with` block.

    A frame is encoded when somebody asks for it: nobody looks, nothing is spent. Call it with each frame, uint8
    (H, W, 3), the order of its channels ("rgb" or "bgr") and its answer.

    Args:
        port: 0 takes a free one; `address` names it.

    Raises: InputError when the address cannot be had.
    """

    def __init__(self, port: int) -> None:
        self._listening = listen(HOST, port)
        self.address = f"http://{HOST}:{self._listening.getsockname()[1]}/"
        self._shown: tuple[np.ndarray, str, dict[str, Any]] | None = None
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # no other site reads the camera
        routes = [Route("/", preview_page), Route("/frame.jpg", self._frame)]
        config = uvicorn.Config(
            Starlette(routes=routes, middleware=[hosts]),
            http=Guard(RequestMetrics()).protocol(),
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listening]}, name="preview", daemon=True
        )

    def __call__(self, picture: np.ndarray, order: str, answer: dict[str, Any]) -> None:
        self._shown = (picture, order, answer)

    def __enter__(self) -> Preview:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(2)
        self._listening.close()

    async def _frame(self, request: Request) -> Response:
        """GET /frame.jpg?after=N: the last frame, its answer in `x-answer`; 204 while there is none behind N."""
        after = request.query_params.get("after", "0")
        number = int(after) if after.isascii() and after.isdigit() else 0
        with anyio.move_on_after(WAIT_S):
            while not self._server.should_exit:
                shown = self._shown
                if shown is not None and shown[2]["frame"] > number:
                    picture, order, answer = shown
                    encoded = await anyio.to_thread.run_sync(jpeg, picture, order)
                    headers = {**HEADERS, "content-type": "image/jpeg", "x-answer": json.dumps(answer)}
                    return Response(encoded, headers=headers)
                await anyio.sleep(LOOK_S)
        return Response(status_code=204, headers=HEADERS)


def jpeg(picture: np.ndarray, order: str) -> bytes:
    """A frame as a JPEG of at most LONGEST pixels a side."""
    image = Image.fromarray(np.ascontiguousarray(picture if order == "rgb" else picture[..., ::-1]))
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()
