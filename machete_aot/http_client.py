# SPDX-License-Identifier: Apache-2.0
"""One HTTP request: redirects, time limits and statuses. What goes wrong becomes a ``Failure``, without secrets.

No message shows what may be a credential: user names, passwords and queries of URLs are left out, and so are the texts
of other libraries' errors, which quote URLs. Proxies and certificates are configured by the environment variables that
requests reads.
"""

from __future__ import annotations

import email.utils
import http.client
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urljoin, urlsplit, urlunsplit

from .errors import CorruptError, MissingError
from .version import __version__

if TYPE_CHECKING:
    from requests import Response, Session
    from requests.models import PreparedRequest

MAX_REDIRECTS = 5
CHUNK = 1 << 16


class Failure(Exception):
    """A try that failed. ``wait``: seconds until the next one, if server or reason tell; ``final``: it would not help.

    ``truncated``: (bytes that came, bytes announced), where the body ended early.
    """

    def __init__(
        self, text: str, *, wait: float | None = None, final: bool = False, truncated: tuple[int, int] | None = None
    ) -> None:
        self.text, self.wait, self.final, self.truncated = text, wait, final, truncated
        super().__init__(text)


class Client:
    """Makes requests. ``connect`` and ``read`` are seconds, to connect and to wait for bytes."""

    def __init__(self, connect: float, read: float) -> None:
        self._connect, self._read = connect, read
        self._own_session: tuple[int, Session] | None = None

    @contextmanager
    def answer(self, url: str, headers: dict[str, str], deadline: float) -> Iterator[Response]:
        """The answer to GET after redirects: status 200, 206 or 416, body unread and not encoded.

        ``deadline`` is a time.monotonic(). Raises Failure, MissingError or CorruptError.
        """
        response = self._follow(url, headers, deadline)
        try:
            if response.status_code not in (200, 206, 416):
                _refuse_status(response, shown_url(url))
            encoding = response.headers.get("Content-Encoding", "identity").lower()
            if encoding != "identity":
                raise CorruptError(shown_url(url), f"an answer encoded as {encoding[:40]!r}", "the plain file")
            yield response
        finally:
            response.close()

    def _follow(self, url: str, headers: dict[str, str], deadline: float) -> Response:
        session, trusted = self._session(), True
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(session, url, headers, trusted, deadline)
            location = response.headers.get("Location")
            if response.status_code not in (301, 302, 303, 307, 308) or not location:
                return response
            response.close()
            with _failures():
                target = _keep_user(url, urljoin(url, location))
            if not is_http(target) or (url.startswith("https:") and not target.startswith("https:")):
                raise Failure(f"the redirect from {shown_url(url)} to {shown_url(target)} is refused", final=True)
            trusted = trusted and not session.should_strip_auth(url, target)
            url = target
        raise Failure(f"more than {MAX_REDIRECTS} redirects", final=True)

    def _send(self, session: Session, url: str, headers: dict[str, str], trusted: bool, deadline: float) -> Response:
        """One request. It has a thread of its own because headers that trickle in outlast every timeout of a socket."""
        sent: dict[str, str | None] = {"Accept-Encoding": "identity", "User-Agent": f"machete-aot/{__version__}"}
        sent.update(headers)
        if not trusted:
            sent["Authorization"] = None  # leaves out the session's own
        auth = None if trusted else _no_auth
        left = _time_left(deadline)
        timeout = (min(self._connect, left), min(self._read, left))
        done: list[Response | BaseException] = []

        def get() -> None:
            try:
                done.append(
                    session.get(url, headers=sent, auth=auth, timeout=timeout, stream=True, allow_redirects=False)
                )
            except BaseException as error:
                done.append(error)

        thread = threading.Thread(target=get, daemon=True)
        thread.start()
        thread.join(left)
        if not done:
            raise Failure("no complete answer within the total timeout", final=True)
        if isinstance(done[0], BaseException):
            with _failures():
                raise done[0]
        return done[0]

    def _session(self) -> Session:
        if self._own_session is None or self._own_session[0] != os.getpid():  # a fork shares its parent's sockets
            from requests import Session

            self._own_session = os.getpid(), Session()
        return self._own_session[1]


def chunks(response: Response, limit: int, deadline: float) -> Iterator[bytes]:
    """The body as it comes, at most ``limit`` bytes and one more. Raises Failure."""
    response.raw.enforce_content_length = False  # a body that ends early is not a failure of the network
    got = 0
    while got <= limit:
        with _failures():
            chunk = response.raw.read1(min(CHUNK, limit + 1 - got), decode_content=False)
        if not chunk:
            return
        got += len(chunk)
        yield chunk
        _time_left(deadline)


def content_length(response: Response) -> int | None:
    """Bytes of the body as announced; None without a header that says so."""
    return _digits(response.headers.get("Content-Length", ""))


def content_range(response: Response) -> tuple[int, int, int | None] | None:
    """First byte, last byte and size of the whole, if known; None without a header that says so."""
    value = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(\*|[0-9]{1,18})", value)
    return (int(match[1]), int(match[2]), _digits(match[3])) if match else None


def shown_url(url: str) -> str:
    """``url`` as messages show it: without user name, password, fragment and the content of its query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a URL that cannot be parsed"
    host, query = parts.netloc.rpartition("@")[2], "..." if parts.query else ""
    text = urlunsplit((parts.scheme, host, parts.path, query, ""))
    return text if text.isprintable() else ascii(text)


def is_http(url: str) -> bool:
    """Whether this is an http or https URL with a host."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _keep_user(url: str, target: str) -> str:
    """``target`` with the user and password of ``url``, if it is on the same host and names none."""
    old, new = urlsplit(url), urlsplit(target)
    user, at, host = old.netloc.rpartition("@")
    if at and (old.scheme, host) == (new.scheme, new.netloc):
        return urlunsplit(new._replace(netloc=f"{user}@{host}"))
    return target


def _no_auth(request: PreparedRequest) -> PreparedRequest:
    """Keeps requests from looking for credentials."""
    return request


def _refuse_status(response: Response, what: str) -> NoReturn:
    status = response.status_code
    text = f"status {status} {http.client.responses.get(status, '')}".rstrip()
    if status in (404, 410):
        raise MissingError(f"{what} is not there ({text}); check the URL, or name another source")
    if status in (408, 425, 429) or status >= 500:
        wait = _retry_after(response)
        asked = "" if wait is None else f", retry after {wait:.0f} s"
        raise Failure(text + asked, wait=wait)
    hint = ": check user name and password in the URL or in netrc" if status in (401, 403, 407) else ""
    raise Failure(text + hint, final=True)


def _retry_after(response: Response) -> float | None:
    """Seconds that the server asks for. A date is compared with the server's own clock where it tells that."""
    value = response.headers.get("Retry-After", "").strip()
    seconds = _digits(value)
    if seconds is not None:
        return float(seconds)
    until, now = _timestamp(value), _timestamp(response.headers.get("Date", ""))
    return None if until is None else max(0.0, until - (time.time() if now is None else now))


def _timestamp(value: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _digits(value: str) -> int | None:
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else None


def _time_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Failure("the total timeout is over", final=True)
    return left


@contextmanager
def _failures() -> Iterator[None]:
    """Makes a Failure of every error of the network. A ValueError is a URL or a header that makes no sense."""
    from requests.exceptions import SSLError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (OSError, ValueError, HTTPError, http.client.HTTPException) as error:  # requests' errors are OSErrors
        raise Failure(_describe(error), final=isinstance(error, (ValueError, SSLError))) from None


def _describe(error: BaseException) -> str:
    """What went wrong, in words that hold no URL: the system's own text, or else the kinds of the error's causes."""
    kinds: list[str] = []
    cause: object = error
    while isinstance(cause, BaseException) and len(kinds) < 8:
        kinds.append(type(cause).__name__)
        if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
            return f"{kinds[0]}: {cause.strerror}"
        cause = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__ or next(iter(cause.args), None)
    return " <- ".join(dict.fromkeys(kinds))
