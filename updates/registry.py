"""A client of registries for containers (OCI distribution specification 1.1), as far as packs need one.

It is not the package `oras`. That (0.2.43) brings requests and jsonschema with a compiled part to the board, waits 131
seconds before it says that a registry is gone, starts every download anew, and compares no digest of what it has got.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..errors import InputError
from ..files import sha256, writable
from . import login

TIMEOUT_S = 30
"seconds without a byte after which a registry counts as gone"
MOST_TEXT = 4 << 20
"bytes of a manifest or a list, as the specification has it"
MOST_PAGES = 1000
MOST_REDIRECTS = 5
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_BLOCK = 1 << 16
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LABEL = "[A-Za-z0-9-]+"
_REGISTRY = re.compile(rf"(localhost|{_LABEL}(\.{_LABEL})+|{_LABEL}(?=:)|\[[0-9A-Fa-f:]+\])(:[0-9]{{1,5}})?")
_NAME = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_NAME}(/{_NAME})*")
_LOOPBACK = re.compile(r"(localhost|127(\.[0-9]+){3}|\[::1\])(:[0-9]+)?")


@dataclass(frozen=True)
class Place:
    """A repository in a registry: REGISTRY/REPOSITORY."""

    registry: str
    "host, with a port where it is not the usual one"
    repository: str
    scheme: str = "https"

    @classmethod
    def of(cls, text: str, plain_http: bool = False) -> Place:
        """Read it. On this machine itself registries are spoken to without TLS, as docker does.

        Raises: InputError for what names no repository of a registry.
        """
        registry, _, repository = text.partition("/")
        if not _REGISTRY.fullmatch(registry) or not _REPOSITORY.fullmatch(repository) or len(repository) > 255:
            raise InputError(
                "this names no repository of a registry",
                got=repr(text)[:200],
                expected="REGISTRY/REPOSITORY, as registry.example.com/fruit/camera: small letters behind the first /, "
                "no https:// before it, no tag behind it",
            )
        plain = plain_http or _LOOPBACK.fullmatch(registry)
        return cls(registry, repository, "http" if plain else "https")

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}"

    def url(self, *parts: str) -> str:
        """Address of something in the repository."""
        return "/".join((f"{self.scheme}://{self.registry}/v2", self.repository, *parts))


class Registry:
    """One repository of a registry. Every method raises InputError for a registry that is gone or refuses."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._authorization: str | None = None
        self._opener = build_opener(_NoRedirect)

    def tags(self) -> list[str] | None:
        """Of everything in the repository; None where there is no such repository."""
        found: list[str] = []
        url = self.place.url("tags", "list") + "?n=1000"
        for _ in range(MOST_PAGES):
            with self._send("GET", url, ok=(200, 404)) as response:
                if response.status == 404:
                    return None
                document, more = self._json(response), response.headers.get("Link", "")
            tags = document.get("tags") or []
            if not isinstance(tags, list):
                raise self._nonsense("a list of tags", document)
            found += [tag for tag in tags if isinstance(tag, str)]
            following = re.search(r"<([^>]*)>\s*;\s*rel=\"?next\"?", more)
            if following is None:
                return found
            url = urljoin(url, following[1])
        raise self._nonsense("a list of tags that ends", f"{MOST_PAGES} pages")

    def manifest(self, tag: str) -> dict[str, Any] | None:
        """What a tag names, with "digest" of the whole text beside its own fields; None where there is no such tag."""
        url = self.place.url("manifests", tag)
        with self._send("GET", url, {"Accept": MANIFEST_TYPE}, ok=(200, 404)) as response:
            if response.status == 404:
                return None
            text, stated = self._text(response), response.headers.get("Docker-Content-Digest")
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        if stated is not None and stated.startswith("sha256:") and stated != digest:
            raise self._damaged(f"the manifest of {tag}", digest, stated)
        return {**self._parsed(text), "digest": digest}

    def put_manifest(self, tag: str, document: Mapping[str, Any]) -> str:
        """Give a tag its content. Returns: the digest."""
        text = json.dumps(document, indent=2).encode("utf-8")
        with self._send("PUT", self.place.url("manifests", tag), {"Content-Type": MANIFEST_TYPE}, text, ok=(201,)):
            return f"sha256:{hashlib.sha256(text).hexdigest()}"

    def put_blob(self, digest: str, content: Path | bytes) -> bool:
        """Send a blob, unless the registry has it. content: a file, or itself. Returns: whether it was sent."""
        with self._send("HEAD", self.place.url("blobs", digest), ok=(200, 404)) as response:
            if response.status == 200:
                return False
        start = self.place.url("blobs", "uploads") + "/"
        with self._send("POST", start, {"Content-Length": "0"}, b"", ok=(202,)) as response:
            target = urljoin(start, response.headers.get("Location") or "")
        url = f"{target}{'&' if urlsplit(target).query else '?'}{urlencode({'digest': digest})}"
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        stream = io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")  # noqa: SIM115 (closed below)
        with stream, self._send("PUT", url, headers, stream, ok=(201,)):
            return True

    def get_blob(self, digest: str, size: int, part: Path) -> int:
        """Bring a blob into the file `part`, going on where an earlier call was cut off; then compare its digest.

        Returns: bytes that were there already.

        Raises: InputError as all methods do, for a connection that ends early (what has come is kept), and for another
            content than the digest says (the file is removed).
        """
        if not _DIGEST.fullmatch(digest):
            raise self._nonsense("a digest sha256:...", digest)
        with writable(part):
            kept = part.stat().st_size if part.exists() else 0
            if kept > size:
                part.unlink()
                kept = 0
        if kept < size:
            kept = self._download(self.place.url("blobs", digest), kept, size, part)
        with writable(part):
            have, length = sha256(part), part.stat().st_size
            if length == size and f"sha256:{have}" == digest:
                return kept
            if length >= size:
                part.unlink()
                raise self._damaged("a pack", f"sha256:{have}", digest)
        raise InputError(
            f"{self.place}: the connection ended early",
            got=f"{length} of {size} bytes, kept",
            fix="run the same command again: it goes on from there",
        )

    def _download(self, url: str, kept: int, size: int, part: Path) -> int:
        headers = {"Range": f"bytes={kept}-"} if kept else {}
        with self._send("GET", url, headers, ok=(200, 206, 416) if kept else (200,)) as response:
            if response.status != 416:
                goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {kept}-")
                kept = kept if response.status == 206 and goes_on else 0
                if response.status == 206 and not goes_on:
                    raise self._nonsense(f"the bytes from {kept} on", response.headers.get("Content-Range"))
                with writable(part), open(part, "ab" if kept else "wb") as stream:
                    left = size - kept
                    while left >= 0 and (block := self._read(response, min(_BLOCK, left + 1))):
                        stream.write(block)
                        left -= len(block)
                return kept
        with writable(part):  # what is kept is not what the registry has
            part.unlink(missing_ok=True)
        return self._download(url, 0, size, part)

    def _read(self, response: Any, most: int) -> bytes:
        try:
            return bytes(response.read(most))
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error, "what has come is kept: run the same command again") from error

    @contextmanager
    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        data: bytes | IO[bytes] | None = None,
        ok: tuple[int, ...] = (200,),
    ) -> Iterator[Any]:
        """An answer whose status is one of `ok`; logs in where the registry asks for it, follows to where blobs lie."""
        response = self._try(method, url, headers or {}, data)
        if response.status == 401:
            challenge, self._authorization = response.headers.get("WWW-Authenticate", ""), None
            self._authorization = login.authorization(self.place.registry, challenge, self._token)
            if self._authorization is not None:
                response.close()
                if data is not None and not isinstance(data, bytes):
                    data.seek(0)
                response = self._try(method, url, headers or {}, data)
        for _ in range(MOST_REDIRECTS):
            if response.status not in (301, 302, 303, 307, 308) or method not in ("GET", "HEAD"):
                break
            with response:
                url = urljoin(url, response.headers.get("Location") or "")
            response = self._try(method, url, headers or {}, None)
        with response:
            if response.status not in ok:
                raise self._refused(response)
            yield response

    def _try(self, method: str, url: str, headers: Mapping[str, str], data: bytes | IO[bytes] | None) -> Any:
        """One request. The login goes to the registry alone, nothing but http and https is opened, TLS is kept."""
        scheme, host = _origin(url)
        if scheme not in ("http", "https") or (scheme == "http" and self.place.scheme == "https"):
            raise self._nonsense("an address with https", url)
        request = Request(url, data, {"User-Agent": "cdl-edge", **headers}, method=method)
        if self._authorization and (scheme, host) == (self.place.scheme, self.place.registry):
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            return self._opener.open(request, timeout=TIMEOUT_S)
        except HTTPError as error:
            return error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._gone(error) from error

    def _token(self, url: str, headers: Mapping[str, str]) -> bytes:
        with self._try("GET", url, headers, None) as response:
            if response.status != 200:
                raise self._refused(response)
            return self._text(response)

    def _text(self, response: Any) -> bytes:
        text = self._read(response, MOST_TEXT + 1)
        if len(text) > MOST_TEXT:
            raise self._nonsense(f"{MOST_TEXT} bytes or fewer", f"{len(text)} and more")
        return text

    def _json(self, response: Any) -> dict[str, Any]:
        return self._parsed(self._text(response))

    def _parsed(self, text: bytes) -> dict[str, Any]:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self._nonsense("JSON, as a registry has it", text[:80])
        return document

    def _refused(self, response: Any) -> InputError:
        status, at = response.status, str(self.place)
        got = f"{status} {response.reason or ''}{_said(response)}".strip()
        if status in (401, 403):
            return InputError(
                f"{at}: the registry does not let you in",
                got=got,
                expected=f"a login that may do this, in {login.config_file()} or in {login.TOKEN}",
                fix=f"docker login {self.place.registry}",
            )
        if status == 429 or status >= 500:
            return InputError(f"{at}: the registry fails", got=got, fix="run the same command again later")
        return InputError(f"{at}: the registry refuses", got=got, expected="an OCI registry (distribution API 1.0)")

    def _gone(self, error: Exception, fix: str = "") -> InputError:
        reason = error.reason if isinstance(error, URLError) and not isinstance(error.reason, str) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            fix = "SSL_CERT_FILE=FILE names the certificate of a registry that is its own authority"
        elif isinstance(reason, ssl.SSLError):
            fix = "--plain-http for a registry without TLS, in a network that you trust"
        text = str(reason) or type(reason).__name__
        return InputError(
            f"{self.place}: the registry cannot be reached",
            got=text[:200],
            fix=fix or "check its name, the network, and that it runs; then run the same command again",
        )

    def _nonsense(self, expected: str, got: object) -> InputError:
        return InputError(f"{self.place}: not the answer of a registry", got=f"{got!r:.200}", expected=expected)

    def _damaged(self, what: str, got: str, expected: str) -> InputError:
        return InputError(
            f"{self.place}: {what} is not what its digest says",
            got=got,
            expected=expected,
            fix="run the same command again; if it stays so, push the pack again",
        )


class _NoRedirect(HTTPRedirectHandler):
    """Redirects are followed above, where the login is left out and the scheme is looked at."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the answer itself is wanted."""


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _said(response: Any) -> str:
    """What a registry says about an error, in one line."""
    try:
        errors = json.loads(response.read(1 << 16))["errors"]
        text = "; ".join(f"{e['code']}: {e.get('message', '')}" for e in errors[:3])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return ", " + "".join(c if c.isprintable() else " " for c in text)[:200] if text else ""
