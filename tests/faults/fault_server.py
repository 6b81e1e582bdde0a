# SPDX-License-Identifier: Apache-2.0
"""A real web server on 127.0.0.1 that serves files from memory and misbehaves as a script tells it to.

A script is a list of faults for a path, one for each request; when it is used up the server behaves. It answers GET
with ranges, ETag and If-Range as common static servers do, counts what it did, and speaks TLS if given a context.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 14


@dataclass(frozen=True)
class Request:
    """One request as the server saw it. ``path`` is without query; ``range`` is the header, or ''."""

    path: str
    range: str
    headers: Mapping[str, str]


@dataclass
class FaultServer:
    """``files`` maps paths without their leading slash to contents; ``scripts`` maps paths to faults still to come."""

    files: dict[str, bytes] = field(default_factory=dict)
    scripts: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    requests: list[Request] = field(default_factory=list)
    faults_served: int = 0
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def script(self, path: str, *faults: Fault) -> None:
        """The next requests for ``path`` meet these faults, in this order."""
        self.scripts[path].extend(faults)

    def always(self, path: str, fault: Fault, most: int = 1000) -> None:
        """Every request for ``path`` meets this fault."""
        self.script(path, *[fault] * most)

    def count(self, path: str) -> int:
        """Requests for ``path`` so far."""
        return Counter(r.path for r in self.requests)[path]

    def take(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            script = self.scripts.get(request.path)
            if not script:
                return None
            self.faults_served += 1
            return script.pop(0)


class Handler(BaseHTTPRequestHandler):
    """Answers one request. Faults are functions of the handler and the file's content (None if there is no file)."""

    protocol_version = "HTTP/1.1"
    state: FaultServer
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        request = Request(path, self.headers.get("Range", ""), dict(self.headers.items()))
        fault = self.state.take(request)
        body = self.state.files.get(path)
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            if fault:
                fault(self, body)
            elif body is None:
                self.send(404, b"not found")
            else:
                self.serve(body)

    def serve(self, body: bytes, **headers: str) -> None:
        """The file, or the part of it that a Range asks for if If-Range allows."""
        etag = entity_tag(body)
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **headers}
        span = self.span(len(body), etag)
        if span is None:
            self.send(200, body, **headers)
        elif span[0] >= len(body) or span[1] < span[0]:
            self.send(416, b"", **headers, **{"Content-Range": f"bytes */{len(body)}"})
        else:
            first, last = span[0], min(span[1], len(body) - 1)
            content_range = f"bytes {first}-{last}/{len(body)}"
            self.send(206, body[first : last + 1], **headers, **{"Content-Range": content_range})

    def span(self, size: int, etag: str) -> tuple[int, int] | None:
        """First and last byte asked for; None for the whole file."""
        value = self.headers.get("Range", "")
        if not value.startswith("bytes=") or self.headers.get("If-Range", etag) != etag:
            return None
        first, _, last = value[len("bytes=") :].partition("-")
        return int(first), int(last) if last else size - 1

    def send(self, status: int, body: bytes, **headers: str) -> None:
        """Status, headers and body; a header given as '' is left out."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.head(status, {"Content-Length": str(len(body)), "Content-Type": "application/octet-stream", **named})
        for at in range(0, len(body), CHUNK):
            self.wfile.write(body[at : at + CHUNK])

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Tests read ``FaultServer.requests`` instead."""


def entity_tag(body: bytes) -> str:
    return '"' + hashlib.sha256(body).hexdigest()[:16] + '"'


Fault = Callable[[Handler, "bytes | None"], None]


# ---------------------------------------------------------------- faults


def truncated(keep: int | None = None) -> Fault:
    """Announces the whole body, sends ``keep`` bytes of it (default: half) and hangs up. Honours ranges."""

    def fault(h: Handler, body: bytes | None) -> None:
        whole = body or b""
        etag = entity_tag(whole)
        span = h.span(len(whole), etag)
        part = whole[span[0] :] if span else whole
        sent = len(part) // 2 if keep is None else keep
        length = {"Content-Length": str(len(part)), "ETag": etag}
        if span:
            length["Content-Range"] = f"bytes {span[0]}-{len(whole) - 1}/{len(whole)}"
        h.head(206 if span else 200, length)
        h.wfile.write(part[:sent])
        h.hang_up()

    return fault


def body_of(change: Callable[[bytes], bytes], **headers: str) -> Fault:
    """Serves something else than the file, correctly framed."""
    return lambda h, body: h.send(200, change(body or b""), **headers)


def wrong_length(by: int) -> Fault:
    """The whole body under a Content-Length that is ``by`` off."""

    def fault(h: Handler, body: bytes | None) -> None:
        whole = body or b""
        h.head(200, {"Content-Length": str(len(whole) + by)})
        h.wfile.write(whole)
        h.hang_up()

    return fault


def html() -> Fault:
    """What a captive portal sends: status 200 and a page to log in."""
    page = b"<!DOCTYPE html>\n<html><body>Please log in to the network</body></html>"
    return lambda h, _: h.send(200, page, Content_Type="text/html; charset=utf-8")


def status(code: int, **headers: str) -> Fault:
    return lambda h, _: h.send(code, b"no", **headers)


def ignore_range() -> Fault:
    """The whole file with status 200, whatever the request's Range says."""
    return lambda h, body: h.send(200, body or b"")


def wrong_range(shift: int) -> Fault:
    """Another part than was asked for, honestly labelled."""

    def fault(h: Handler, body: bytes | None) -> None:
        whole = body or b""
        span = h.span(len(whole), "") or (0, len(whole) - 1)
        first, last = max(0, span[0] + shift), min(len(whole) - 1, span[1] + shift)
        h.send(206, whole[first : last + 1], **{"Content-Range": f"bytes {first}-{last}/{len(whole)}"})

    return fault


def lying_range(content_range: str) -> Fault:
    """The right bytes under a Content-Range that is wrong or is nonsense."""

    def fault(h: Handler, body: bytes | None) -> None:
        whole = body or b""
        first, last = h.span(len(whole), "") or (0, len(whole) - 1)
        h.send(206, whole[first : last + 1], **{"Content-Range": content_range})

    return fault


def stalled(seconds: float, after: int = 10) -> Fault:
    """Sends ``after`` bytes and then nothing for a while."""

    def fault(h: Handler, body: bytes | None) -> None:
        whole = body or b""
        h.head(200, {"Content-Length": str(len(whole))})
        h.wfile.write(whole[:after])
        h.wfile.flush()
        time.sleep(seconds)
        h.hang_up()

    return fault


def dripping(pause: float) -> Fault:
    """One byte at a time: every read succeeds, the whole never ends."""

    def fault(h: Handler, body: bytes | None) -> None:
        whole = body or b""
        h.head(200, {"Content-Length": str(len(whole))})
        for at in range(len(whole)):
            h.wfile.write(whole[at : at + 1])
            time.sleep(pause)

    return fault


def endless(chunk: bytes = bytes(CHUNK), most: int = 1 << 28) -> Fault:
    """A body without a length that goes on for ``most`` bytes."""

    def fault(h: Handler, _: bytes | None) -> None:
        h.head(200, {"Content-Type": "application/octet-stream", "Connection": "close"})
        for _ in range(most // len(chunk)):
            h.wfile.write(chunk)
        h.hang_up()

    return fault


def raw(answer: bytes) -> Fault:
    """These very bytes instead of an answer, then the end of the connection."""

    def fault(h: Handler, _: bytes | None) -> None:
        h.wfile.write(answer)
        h.hang_up()

    return fault


def redirect(location: str, code: int = 302) -> Fault:
    return lambda h, _: h.send(code, b"", Location=location)


# ---------------------------------------------------------------- running it


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients of these tests hang up, and are killed, at any moment."""


@contextlib.contextmanager
def running(files: Mapping[str, bytes] | None = None, tls: ssl.SSLContext | None = None) -> Iterator[FaultServer]:
    """A server with these files, on a port of its own, until the block ends."""
    state = FaultServer(dict(files or {}))
    handler = type("BoundHandler", (Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    state.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
