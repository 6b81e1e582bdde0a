# SPDX-License-Identifier: Apache-2.0
"""Downloads from a real server on 127.0.0.1, which answers as each test says."""

from __future__ import annotations

import hashlib
import os
import random
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from machete_aot import download
from machete_aot.download import Remote
from machete_aot.errors import (
    ArgumentError,
    BundleError,
    CorruptError,
    MissingError,
    TruncatedError,
    UnreachableError,
)
from machete_aot.http_client import shown_url

CONTENT = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
LIMIT = 1 << 20
FAST = (2.0, 2.0, 20.0)


class Handler(BaseHTTPRequestHandler):
    """Answers by the next step of the server's script; once that is empty, as a server with ranges does."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        step = self.server.script.pop(0) if self.server.script else good
        self.close_connection = True
        step(self)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.head(status, **{"Content-Length": len(body), **headers})
        self.wfile.write(body)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Connection", "close")
        self.end_headers()


Step = Callable[[Handler], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    script: list[Step]
    requests: list[tuple[str, dict[str, str]]]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests = [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that closes early is what some tests are about."""


def good(h: Handler, etag: str = '"one"') -> None:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range", ""))
    if not match or h.headers.get("If-Range", etag) != etag:
        return h.answer(200, CONTENT, ETag=etag)
    start, end = int(match[1]), min(int(match[2] or len(CONTENT)), len(CONTENT) - 1)
    if start >= len(CONTENT):
        return h.answer(416, Content_Range=f"bytes */{len(CONTENT)}")
    part = CONTENT[start : end + 1]
    return h.answer(206, part, ETag=etag, Content_Range=f"bytes {start}-{end}/{len(CONTENT)}")


def cut(size: int, etag: str | None = '"one"') -> Step:
    """Announces the whole file and sends ``size`` bytes of it."""

    def step(h: Handler) -> None:
        h.head(200, Content_Length=len(CONTENT), ETag=etag)
        h.wfile.write(CONTENT[:size])

    return step


def status(code: int, **headers: object) -> Step:
    return lambda h: h.answer(code, b"no", **headers)


def whole(body: bytes, **headers: object) -> Step:
    return lambda h: h.answer(200, body, **headers)


def redirect(target: str, code: int = 302) -> Step:
    return lambda h: h.answer(code, Location=target)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_DELAY", 0.005)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def fetch(server: Server, **options: Any) -> bytes:
    options = {"limit": LIMIT, "want_sha256": SHA, **options}
    return Remote(server.url + "/folder", timeouts=FAST).fetch("file.zip", **options)


# ---------------------------------------------------------------- whole files


def test_a_file_of_a_folder(server: Server) -> None:
    assert fetch(server, want_size=len(CONTENT)) == CONTENT
    path, headers = server.requests[0]
    assert path == "/folder/file.zip"
    assert headers["Accept-Encoding"] == "identity" and headers["User-Agent"].startswith("machete-aot/")


@pytest.mark.parametrize(
    ("base", "path"), [("/a/", "/a/f"), ("", "/f"), ("/a?token=1", "/a/f?token=1"), ("/a#x", "/a/f")]
)
def test_the_url_of_a_file(server: Server, base: str, path: str) -> None:
    assert Remote(server.url + base).fetch("f", limit=LIMIT) == CONTENT
    assert server.requests[0][0] == path


def test_the_base_url_itself(server: Server) -> None:
    assert Remote(server.url + "/some.zip?x=1").fetch("", limit=LIMIT) == CONTENT
    assert server.requests[0][0] == "/some.zip?x=1"


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc/passwd", ".hidden", "a\\b", "a?b", "a b", "%2e%2e", "x" * 201, "a\n"]
)
def test_a_name_that_leaves_the_folder(server: Server, name: str) -> None:
    with pytest.raises(BundleError, match="plain file name"):
        Remote(server.url).fetch(name, limit=LIMIT)
    assert server.requests == []


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "file:///etc/passwd", "http://", "host/x", "http://[::1", "http://h:99999/"]
)
def test_other_urls(url: str) -> None:
    with pytest.raises(ArgumentError, match="http"):
        Remote(url)


def test_progress(server: Server) -> None:
    calls: list[tuple[int, int | None]] = []
    remote = Remote(server.url, progress=lambda done, total: calls.append((done, total)))
    remote.fetch("f", limit=LIMIT)
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls) and len(calls) > 1


@pytest.mark.parametrize("code", [404, 410])
def test_missing(server: Server, code: int) -> None:
    server.script = [status(code)]
    with pytest.raises(MissingError, match=f"status {code}"):
        fetch(server)
    assert len(server.requests) == 1


# ---------------------------------------------------------------- retries


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_status_that_passes_is_retried(server: Server, code: int) -> None:
    server.script = [status(code), status(code)]
    assert fetch(server) == CONTENT
    assert len(server.requests) == 3


def test_a_storm_of_errors_ends_with_every_try_listed(server: Server) -> None:
    server.script = [status(500 + i % 5) for i in range(100)]
    with pytest.raises(UnreachableError) as e:
        fetch(server)
    assert len(server.requests) == download.ATTEMPTS
    assert len(e.value.problems) == download.ATTEMPTS
    assert "try 1: status 500" in e.value.problems[0] and "try 5: status 504" in e.value.problems[4]


@pytest.mark.parametrize("code", [400, 401, 403, 407, 418, 304, 204])
def test_a_status_that_stays_is_not_retried(server: Server, code: int) -> None:
    server.script = [status(code)]
    with pytest.raises(UnreachableError, match=f"status {code}"):
        fetch(server)
    assert len(server.requests) == 1


def test_retry_after_in_seconds_is_waited_for(server: Server) -> None:
    server.script = [status(429, Retry_After=1)]
    start = time.monotonic()
    assert fetch(server) == CONTENT
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("skew", [-86400 * 400, 0, 86400 * 400])
def test_retry_after_as_a_date_is_the_server_s_clock(server: Server, skew: int) -> None:
    def step(h: Handler) -> None:
        now = int(time.time()) + skew
        h.send_response_only(503)
        h.send_header("Date", formatdate(now, usegmt=True))
        h.send_header("Retry-After", formatdate(now + 1, usegmt=True))
        h.send_header("Content-Length", "0")
        h.end_headers()

    server.script = [step]
    start = time.monotonic()
    assert fetch(server) == CONTENT
    assert 1 <= time.monotonic() - start < 3


@pytest.mark.parametrize("value", ["3600", "9" * 18, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_retry_after_beyond_the_bound_ends_at_once(server: Server, value: str) -> None:
    server.script = [status(503, Retry_After=value)]
    with pytest.raises(UnreachableError, match="retry after"):
        fetch(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", ["-5", "soon", "", "9" * 5000, "1e9", "Thu, 99 Foo 2020 00:00:00 GMT"])
def test_a_retry_after_without_sense_counts_as_none(server: Server, value: str) -> None:
    server.script = [status(503, Retry_After=value)]
    assert fetch(server) == CONTENT


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UnreachableError) as e:
        Remote(url).fetch("f", limit=LIMIT)
    assert len(e.value.problems) == download.ATTEMPTS and "Connection refused" in e.value.problems[0]


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(UnreachableError):
        Remote("http://no-such-host.invalid", timeouts=(2, 2, 5)).fetch("f", limit=LIMIT)


# ---------------------------------------------------------------- broken bodies


def test_a_broken_body_is_resumed(server: Server) -> None:
    server.script = [cut(100_000)]
    assert fetch(server) == CONTENT
    assert server.requests[1][1]["Range"] == "bytes=100000-"
    assert server.requests[1][1]["If-Range"] == '"one"'


def test_a_body_that_breaks_twice(server: Server) -> None:
    def half(h: Handler) -> None:
        h.head(206, Content_Length=200_000, Content_Range=f"bytes 100000-{len(CONTENT) - 1}/{len(CONTENT)}")
        h.wfile.write(CONTENT[100_000:150_000])

    server.script = [cut(100_000, etag='W/"weak"'), half]
    assert fetch(server) == CONTENT
    assert "If-Range" not in server.requests[1][1]
    assert server.requests[2][1]["Range"] == "bytes=150000-"


def test_a_part_shorter_than_the_rest_is_not_the_end(server: Server) -> None:
    part = CONTENT[100_000:150_000]
    server.script = [cut(100_000), lambda h: h.answer(206, part, Content_Range=f"bytes 100000-149999/{len(CONTENT)}")]
    assert fetch(server, want_sha256=None) == CONTENT


def test_a_file_that_changed_meanwhile_starts_again(server: Server) -> None:
    server.script = [cut(100_000, etag='"old"')]
    assert fetch(server, want_sha256=None) == CONTENT
    assert server.requests[1][1]["If-Range"] == '"old"'


def test_a_server_without_ranges_starts_again(server: Server) -> None:
    server.script = [cut(100_000), whole(CONTENT)]
    assert fetch(server) == CONTENT


@pytest.mark.parametrize("span", ["bytes 5-299999/300000", "bytes 0-299999/300000", "nonsense", None, "bytes a-b/c"])
def test_another_range_than_asked_for_starts_again(server: Server, span: str | None) -> None:
    server.script = [cut(100_000), lambda h: h.answer(206, CONTENT[5:], Content_Range=span)]
    assert fetch(server) == CONTENT
    assert "Range" not in server.requests[2][1]


def test_416_starts_again(server: Server) -> None:
    server.script = [cut(100_000), status(416)]
    assert fetch(server) == CONTENT
    assert "Range" not in server.requests[2][1]


def test_a_part_that_nobody_asked_for(server: Server) -> None:
    server.script = [lambda h: h.answer(206, CONTENT[:9], Content_Range="bytes 0-8/9")]
    assert fetch(server, want_sha256=None) == CONTENT


@pytest.mark.parametrize("step", [cut(100_000), cut(0)])
def test_always_truncated(server: Server, step: Step) -> None:
    server.script = [step] * 9
    with pytest.raises(TruncatedError) as e:
        fetch(server)
    assert e.value.want == len(CONTENT) and len(e.value.problems) == download.ATTEMPTS


def test_chunked_bodies(server: Server) -> None:
    def chunked(end: bytes) -> Step:
        def step(h: Handler) -> None:
            h.head(200, Transfer_Encoding="chunked")
            for i in range(0, len(CONTENT), 50_000):
                h.wfile.write(b"c350\r\n" + CONTENT[i : i + 50_000] + b"\r\n")
            h.wfile.write(end)

        return step

    server.script = [chunked(b"0\r\n\r\n")]
    assert fetch(server) == CONTENT
    server.script = [chunked(b""), chunked(b"zz\r\n"), chunked(b"0\r\n\r\n")]
    assert fetch(server, want_sha256=None) == CONTENT


# ---------------------------------------------------------------- other bytes than wanted


def test_flipped_bits(server: Server) -> None:
    body = bytearray(CONTENT)
    body[1234] ^= 4
    server.script = [whole(bytes(body))]
    with pytest.raises(CorruptError) as e:
        fetch(server)
    assert SHA in str(e.value) and hashlib.sha256(body).hexdigest() in str(e.value)


@pytest.mark.parametrize("digest", [SHA, None])
@pytest.mark.parametrize("size", [len(CONTENT), None])
@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/zip"])
def test_a_captive_portal(server: Server, digest: str | None, size: int | None, kind: str) -> None:
    server.script = [whole(b"\n <!DOCTYPE html><html>Log in</html>", Content_Type=kind)]
    with pytest.raises((CorruptError, TruncatedError)) as e:
        fetch(server, want_sha256=digest, want_size=size)
    if kind.startswith("text/html") or size is None:
        assert isinstance(e.value, CorruptError) and "captive portal" in str(e.value)


def test_another_size_than_wanted(server: Server) -> None:
    server.script = [whole(CONTENT[:-1]), whole(CONTENT + b"x")]
    with pytest.raises(TruncatedError):
        fetch(server, want_size=len(CONTENT))
    with pytest.raises(CorruptError, match="300001 bytes"):
        fetch(server, want_size=len(CONTENT))


def test_a_body_longer_than_announced_is_cut_there(server: Server) -> None:
    def step(h: Handler) -> None:
        h.head(200, Content_Length=100)
        h.wfile.write(CONTENT)

    server.script = [step]
    assert fetch(server, want_sha256=None) == CONTENT[:100]


def test_the_limit_holds_for_what_is_announced(server: Server) -> None:
    server.script = [lambda h: h.head(200, Content_Length=10**15)]
    with pytest.raises(CorruptError, match=f"at most {LIMIT} bytes"):
        fetch(server, want_sha256=None)


def test_the_limit_holds_for_what_is_not_announced(server: Server) -> None:
    sent = 0

    def endless(h: Handler) -> None:
        nonlocal sent
        h.head(200)
        while sent < 100 * LIMIT:
            h.wfile.write(CONTENT)
            sent += len(CONTENT)

    server.script = [endless]
    with pytest.raises(CorruptError, match=f"more than {LIMIT} bytes"):
        fetch(server, want_sha256=None)
    assert sent < 50 * LIMIT  # what sockets buffer comes on top


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "GZIP", "identity, gzip"])
def test_encoded_answers_are_refused(server: Server, encoding: str) -> None:
    server.script = [whole(CONTENT, Content_Encoding=encoding)]
    with pytest.raises(CorruptError, match="encoded"):
        fetch(server)


@pytest.mark.parametrize("length", ["-1", "many", "3e5", "", "300000, 5", "9" * 30])
def test_lengths_without_sense(server: Server, length: str) -> None:
    """Either the file itself or a typed error."""

    def step(h: Handler) -> None:
        h.head(200, Content_Length=length)
        h.wfile.write(CONTENT)

    server.script = [step] * 9
    try:
        result = fetch(server)
    except (UnreachableError, TruncatedError, CorruptError) as error:
        assert server.url in str(error)
    else:
        assert result == CONTENT


def huge_line(h: Handler) -> None:
    h.head(200, X="x" * 100_000)


def many_lines(h: Handler) -> None:
    h.head(200, **{f"X-{i}": i for i in range(1000)})


def not_http(h: Handler) -> None:
    h.wfile.write(b"SSH-2.0-OpenSSH_9.7\r\n")


def silence(h: Handler) -> None:
    """Closes the connection."""


@pytest.mark.parametrize("step", [huge_line, many_lines, not_http, silence])
def test_hostile_or_broken_headers(server: Server, step: Step) -> None:
    server.script = [step] * 9
    with pytest.raises(UnreachableError) as e:
        fetch(server)
    assert all(len(line) < 300 for line in e.value.problems)
    server.script = [step]
    assert fetch(server) == CONTENT


# ---------------------------------------------------------------- time


def stall(after: int, seconds: float = 30) -> Step:
    def step(h: Handler) -> None:
        h.head(200, Content_Length=len(CONTENT), ETag='"one"')
        h.wfile.write(CONTENT[:after])
        h.wfile.flush()
        time.sleep(seconds)

    return step


def test_a_read_that_stalls_is_tried_again(server: Server) -> None:
    server.script = [stall(1000)]
    assert Remote(server.url, timeouts=(1, 0.3, 20)).fetch("f", limit=LIMIT) == CONTENT
    assert server.requests[1][1]["Range"] == "bytes=1000-"


def test_bytes_that_trickle_end_with_the_total_timeout(server: Server) -> None:
    def trickle(h: Handler) -> None:
        h.head(200, Content_Length=len(CONTENT))
        for i in range(300):
            h.wfile.write(CONTENT[i : i + 1])
            h.wfile.flush()
            time.sleep(0.05)

    server.script = [trickle] * 9
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="total timeout"):
        Remote(server.url, timeouts=(1, 1, 0.7)).fetch("f", limit=LIMIT)
    assert time.monotonic() - start < 2


def test_headers_that_trickle_end_with_the_total_timeout(server: Server) -> None:
    def trickle(h: Handler) -> None:
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50:
            h.wfile.write(bytes([byte]))
            h.wfile.flush()
            time.sleep(0.05)

    server.script = [trickle]
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="total timeout"):
        Remote(server.url, timeouts=(1, 1, 0.7)).fetch("f", limit=LIMIT)
    assert time.monotonic() - start < 2


def test_no_answer_at_all(server: Server) -> None:
    server.script = [lambda h: time.sleep(30)] * 9
    start = time.monotonic()
    with pytest.raises(UnreachableError) as e:
        Remote(server.url, timeouts=(0.2, 0.2, 20)).fetch("f", limit=LIMIT)
    assert time.monotonic() - start < 4 and "Timeout" in e.value.problems[0]


# ---------------------------------------------------------------- redirects and secrets


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, code: int) -> None:
    server.script = [redirect("/other/place", code), redirect(server.url + "/third", code)]
    assert fetch(server) == CONTENT
    assert [path for path, _ in server.requests] == ["/folder/file.zip", "/other/place", "/third"]


def test_a_redirect_loop_ends(server: Server) -> None:
    server.script = [redirect("/folder/file.zip")] * 99
    with pytest.raises(UnreachableError, match="redirects"):
        fetch(server)
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://x/y", "//", "http://[::1", "javascript:1", "http://\xff\xfe"]
)
def test_a_redirect_to_something_else(server: Server, target: str) -> None:
    server.script = [redirect(target)] * 9
    with pytest.raises(UnreachableError):
        fetch(server)


@pytest.fixture
def https(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A second server, with a certificate that REQUESTS_CA_BUNDLE makes trusted."""
    certificate = _certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with Server() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        threading.Thread(target=secure.serve_forever, args=(0.01,), daemon=True).start()
        yield secure
        secure.shutdown()


def _certificate(folder: Path) -> Path:
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(1))
    certificate = (
        builder.add_extension(names, critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "certificate.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def secure_url(https: Server) -> str:
    return https.url.replace("http:", "https:")


def test_https_with_the_user_s_certificate_authority(https: Server) -> None:
    assert Remote(secure_url(https)).fetch("f", limit=LIMIT, want_sha256=SHA) == CONTENT


def test_a_certificate_that_nobody_trusts(https: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED") as e:
        Remote(secure_url(https)).fetch("f", limit=LIMIT)
    assert len(e.value.problems) == 1


def test_a_redirect_from_https_to_http_is_refused(https: Server, server: Server) -> None:
    https.script = [redirect(server.url + "/x")]
    with pytest.raises(UnreachableError, match=r"https://\S+ to http://\S+ is refused"):
        Remote(secure_url(https)).fetch("f", limit=LIMIT)
    assert server.requests == []
    server.script = [redirect(secure_url(https) + "/f")]
    assert fetch(server) == CONTENT


def test_credentials_are_sent_but_not_shown(server: Server) -> None:
    host = server.url.removeprefix("http://")
    remote = Remote(f"http://user:secret@{host}/a?token=hidden")
    server.script = [redirect("/b"), good]
    assert remote.fetch("f", limit=LIMIT) == CONTENT
    assert [h["Authorization"].split()[0] for _, h in server.requests] == ["Basic", "Basic"]
    outcomes: list[Step] = [status(403), status(404), whole(b"<html>"), redirect("ftp://u:secret@h/?hidden"), cut(5)]
    for step in outcomes:
        server.script = [step] * 9
        with pytest.raises(BundleError) as e:
            remote.fetch("f", limit=LIMIT, want_sha256=SHA)
        assert "secret" not in str(e.value) and "hidden" not in str(e.value) and f"{host}/a/f" in str(e.value)
    assert "secret" not in remote.shown("f") and "hidden" not in remote.shown("f")


def test_credentials_are_not_shown_when_nobody_listens() -> None:
    url = "http://user:secret@127.0.0.1:1/x?token=hidden"
    with pytest.raises(UnreachableError) as e:
        Remote(url).fetch("", limit=LIMIT)
    text = "".join(traceback.format_exception(e.value))
    assert "http://127.0.0.1:1/x?..." in text
    assert "secret" not in text and "hidden" not in text


def test_credentials_do_not_follow_a_redirect_to_another_host(server: Server) -> None:
    server.script = [redirect(server.url.replace("127.0.0.1", "localhost") + "/x")]
    Remote(server.url.replace("//", "//user:secret@")).fetch("f", limit=LIMIT)
    assert "Authorization" in server.requests[0][1] and "Authorization" not in server.requests[1][1]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h:1/a/b?q=1#f", "https://h:1/a/b?..."),
        ("http://h/", "http://h/"),
        ("http://[::1", "a URL that cannot be parsed"),
        ("http://a@b@h/", "http://h/"),
    ],
)
def test_shown_url(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_a_proxy_of_the_environment_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert Remote("http://mirror.invalid/x").fetch("f", limit=LIMIT) == CONTENT
    assert server.requests[0][0] == "http://mirror.invalid/x/f"


# ---------------------------------------------------------------- ranges


def test_a_range(server: Server) -> None:
    remote = Remote(server.url)
    assert remote.fetch_range("f", 1000, 50) == CONTENT[1000:1050]
    assert remote.fetch_range("f", 0, 1) == CONTENT[:1]
    assert server.requests[0][1]["Range"] == "bytes=1000-1049"


def wrong_span(h: Handler) -> None:
    h.answer(206, CONTENT[:50], Content_Range="bytes 0-49/300000")


def no_span(h: Handler) -> None:
    h.answer(206, CONTENT[1000:1050])


def too_long(h: Handler) -> None:
    h.answer(206, CONTENT[1000:2000], Content_Range="bytes 1000-1049/300000")


@pytest.mark.parametrize("step", [whole(CONTENT), status(416), wrong_span, no_span, too_long])
def test_a_server_that_does_not_do_ranges(server: Server, step: Step) -> None:
    server.script = [step]
    assert Remote(server.url).fetch_range("f", 1000, 50) is None
    assert len(server.requests) == 1


def test_a_range_is_retried(server: Server) -> None:
    def short(h: Handler) -> None:
        h.head(206, Content_Length=50, Content_Range="bytes 1000-1049/300000")
        h.wfile.write(CONTENT[1000:1010])

    server.script = [status(503), short]
    assert Remote(server.url).fetch_range("f", 1000, 50) == CONTENT[1000:1050]
    server.script = [short] * 9
    with pytest.raises((TruncatedError, UnreachableError)):
        Remote(server.url).fetch_range("f", 1000, 50)
    server.script = [status(404)]
    with pytest.raises(MissingError):
        Remote(server.url).fetch_range("f", 1000, 50)


def test_after_a_fork_each_process_has_its_own_connection(server: Server) -> None:
    class KeepAlive(Handler):
        peers: ClassVar[list[int]] = []

        def do_GET(self) -> None:
            self.peers.append(self.client_address[1])
            self.send_response(206)
            self.send_header("Content-Range", "bytes 0-9/300000")
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(CONTENT[:10])

    server.RequestHandlerClass = KeepAlive
    remote = Remote(server.url)
    assert remote.fetch_range("f", 0, 10) == remote.fetch_range("f", 0, 10) == CONTENT[:10]
    child = os.fork()
    if child == 0:
        os._exit(0 if remote.fetch_range("f", 0, 10) == CONTENT[:10] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert remote.fetch_range("f", 0, 10) == CONTENT[:10]
    first, second, child_peer, last = KeepAlive.peers
    assert first == second == last != child_peer
