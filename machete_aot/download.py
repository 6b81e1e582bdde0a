# SPDX-License-Identifier: Apache-2.0
"""Files of a mirror over HTTP, whole or in part: retries, resuming, limits on sizes and times, checked digests."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar
from urllib.parse import urlsplit, urlunsplit

from .errors import ArgumentError, BundleError, CorruptError, TruncatedError, UnreachableError
from .http_client import Client, Failure, chunks, content_length, content_range, is_http, shown_url

if TYPE_CHECKING:
    from requests import Response

T = TypeVar("T")
Progress = Callable[[int, "int | None"], None]

TIMEOUTS = (10.0, 30.0, 600.0)
ATTEMPTS = 5
FIRST_DELAY, MAX_WAIT = 0.2, 60.0  # seconds
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")


class Remote:
    """The files below one http or https URL.

    ``timeouts`` are seconds: to connect, to wait for bytes, and for a whole call with its retries. ``progress`` is
    called with the bytes so far and in all (None if not known). Raises ArgumentError for another kind of URL.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeouts: tuple[float, float, float] = TIMEOUTS,
        progress: Progress | None = None,
    ) -> None:
        if not is_http(base_url):
            raise ArgumentError(f"{shown_url(base_url)} is not an http or https URL with a host")
        connect, read, self._total = timeouts
        self._base_url = base_url
        self._progress = progress
        self._client = Client(connect, read)

    def shown(self, name: str = "") -> str:
        """The URL of a file as messages show it, without credentials."""
        return shown_url(self._url(name))

    def fetch(
        self,
        name: str,
        *,
        limit: int,
        want_size: int | None = None,
        want_sha256: str | None = None,
    ) -> bytes:
        """The file ``name``, or what the base URL itself names if that is "".

        ``limit`` is the most bytes that are ever kept. ``want_size`` and ``want_sha256`` (hex) are checked.
        Raises MissingError (status 404 or 410), CorruptError (other bytes than wanted, too many, an HTML page),
        TruncatedError (too few), UnreachableError (all else; ``problems`` lists every try), BundleError (a bad name).
        """
        url = self._url(name)
        wanted = _Wanted(shown_url(url), limit if want_size is None else min(limit, want_size), want_size, want_sha256)
        download = _Download(wanted)
        return self._with_retries(url, lambda deadline: self._whole(url, download, deadline))

    def fetch_range(self, name: str, offset: int, length: int) -> bytes | None:
        """``length`` bytes at ``offset`` of the file ``name``; None if the server does not answer with that range.

        The bytes are not checked. Raises the errors of ``fetch``, but for CorruptError.
        """
        url = self._url(name)
        return self._with_retries(url, lambda deadline: self._part(url, offset, length, deadline))

    def _url(self, name: str) -> str:
        if not name:
            return self._base_url
        if not PLAIN_NAME.fullmatch(name):
            raise BundleError(f"{name[:200]!r} is not a plain file name; it is not fetched from {self.shown()}")
        parts = urlsplit(self._base_url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}", fragment=""))

    def _with_retries(self, url: str, attempt: Callable[[float], T]) -> T:
        deadline = time.monotonic() + self._total
        tries: list[str] = []
        while True:
            try:
                return attempt(deadline)
            except Failure as failure:
                tries.append(failure.text)
                wait = _backoff(len(tries)) if failure.wait is None else failure.wait
                late = wait > MAX_WAIT or time.monotonic() + wait >= deadline
                if failure.final or late or len(tries) == ATTEMPTS:
                    _give_up(shown_url(url), failure, tries)
            time.sleep(wait)

    def _whole(self, url: str, download: _Download, deadline: float) -> bytes:
        """One try for the whole file, from where the last one ended if the server can."""
        with self._client.answer(url, download.range_headers(), deadline) as response:
            resumed = download.begin(response)
            for chunk in chunks(response, download.wanted.limit - len(download.body), deadline):
                download.add(chunk)
                if self._progress:
                    self._progress(len(download.body), download.total)
        return download.finish(resumed)

    def _part(self, url: str, offset: int, length: int, deadline: float) -> bytes | None:
        last = offset + length - 1
        with self._client.answer(url, {"Range": f"bytes={offset}-{last}"}, deadline) as response:
            span = content_range(response)
            if response.status_code != 206 or span is None or span[:2] != (offset, last):
                return None
            body = b"".join(chunks(response, length, deadline))
        if len(body) < length:
            raise Failure(f"the body ended after {len(body)} of {length} bytes", truncated=(len(body), length))
        return body if len(body) == length else None


@dataclass(frozen=True)
class _Wanted:
    """What a file must be."""

    what: str
    limit: int
    size: int | None
    sha256: str | None

    def refuse(self, found: str) -> NoReturn:
        want = f"at most {self.limit} bytes" if self.size is None else f"{self.size} bytes"
        raise CorruptError(self.what, found, f"{want} with sha256 {self.sha256}" if self.sha256 else want)


class _Download:
    """As much of a file as there is, over all tries; ``total`` is how large the server says that it is."""

    def __init__(self, wanted: _Wanted) -> None:
        self.wanted, self.body = wanted, bytearray()
        self.total: int | None = None
        self._etag: str | None = None
        self._html = False

    def range_headers(self) -> dict[str, str]:
        if not self.body:
            return {}
        headers = {"Range": f"bytes={len(self.body)}-"}
        return {**headers, "If-Range": self._etag} if self._etag else headers

    def begin(self, response: Response) -> bool:
        """Looks at the answer's headers. Returns whether its body goes on where ``self.body`` ends."""
        status, span = response.status_code, content_range(response)
        if status == 416 or (status == 206 and (span is None or not self.body or span[0] != len(self.body))):
            self.body.clear()
            raise Failure(f"status {status} with another range than asked for", wait=0)
        if status == 200:
            self.body.clear()
        etag = response.headers.get("ETag", "")
        self._etag = etag if etag.startswith('"') else None  # a weak one does not tell bytes apart
        self._html = response.headers.get("Content-Type", "").lower().startswith("text/html")
        self.total = content_length(response) if status == 200 else span[2] if span else None
        if self.total is None:
            self.total = self.wanted.size
        self._check_total()
        return status == 206

    def _check_total(self) -> None:
        size, total = self.wanted.size, self.total
        if total is None or (total <= self.wanted.limit and size in (None, total)):
            return
        if size is not None and total < size and not self._html:
            raise TruncatedError(self.wanted.what, total, size)
        self._refuse(f"{total} bytes")

    def add(self, chunk: bytes) -> None:
        self.body += chunk
        if len(self.body) > self.wanted.limit:
            self._refuse(f"more than {self.wanted.limit} bytes")

    def finish(self, resumed: bool) -> bytes:
        """The file, if it is right. Raises Failure where another try may help, else CorruptError."""
        have = len(self.body)
        if self.total is not None and have < self.total:
            raise Failure(f"the body ended after {have} of {self.total} bytes", truncated=(have, self.total))
        digest = hashlib.sha256(self.body).hexdigest()
        if self.wanted.sha256 is None and self._looks_like_html():
            self._refuse(f"{have} bytes")
        if self.wanted.sha256 not in (None, digest):
            if not resumed:
                self._refuse(f"{have} bytes with sha256 {digest}")
            self.body.clear()
            raise Failure("another digest than wanted, perhaps because the first bytes came earlier", wait=0)
        return bytes(self.body)

    def _refuse(self, found: str) -> NoReturn:
        if self._html or self._looks_like_html():
            found += ", an HTML page as captive portals and login pages send it (open the URL in a browser)"
        self.wanted.refuse(found)

    def _looks_like_html(self) -> bool:
        return self.body[:100].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")  # no file of a mirror does


def _backoff(tries: int) -> float:
    return FIRST_DELAY * 2 ** (tries - 1) * random.uniform(0.5, 1.5)


def _give_up(what: str, failure: Failure, tries: list[str]) -> NoReturn:
    lines = [f"try {i}: {text}" for i, text in enumerate(tries, 1)]
    if failure.truncated:
        truncated = TruncatedError(what, *failure.truncated)
        truncated.add_problems(lines)
        raise truncated from None
    message = f"{what} cannot be fetched; check the URL, the network and the proxy, or name another source"
    raise UnreachableError(message, lines) from None
