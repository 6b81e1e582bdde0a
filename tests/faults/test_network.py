# SPDX-License-Identifier: Apache-2.0
"""Servers and networks that misbehave, over real sockets: first a file of a mirror alone, then a whole fetch."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import ipaddress
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from fault_server import (
    Fault,
    FaultServer,
    body_of,
    dripping,
    endless,
    html,
    ignore_range,
    lying_range,
    raw,
    redirect,
    running,
    stalled,
    status,
    truncated,
    wrong_length,
    wrong_range,
)
from machete_aot import download
from machete_aot.download import ATTEMPTS, Remote
from machete_aot.errors import BundleError, CorruptError, MissingError, TruncatedError, UnreachableError
from machete_aot.fetch import fetch_bundle
from places import DATA, DIGEST, JSON, KERNELS, MANIFEST, ZIP, bad_files, is_right, mirror_files


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between tries grow as they do, from less."""
    monkeypatch.setattr(download, "FIRST_DELAY", 0.02)


SHA256 = hashlib.sha256(DATA).hexdigest()
LIMIT = 1 << 20
GONE = "http://127.0.0.1:9/"  # the discard port, which nothing listens to


def get(server: FaultServer, timeouts: tuple[float, float, float] = (2, 2, 20), size: int | None = len(DATA)) -> bytes:
    return Remote(server.url, timeouts=timeouts).fetch(ZIP, limit=LIMIT, want_size=size, want_sha256=SHA256)


HEALED: dict[str, list[Fault]] = {
    "truncated": [truncated()],
    "truncated three times": [truncated(), truncated(900), truncated(1)],
    "nothing of the body": [truncated(0)],
    "truncated, then the range is ignored": [truncated(), ignore_range()],
    "truncated, then another range": [truncated(), wrong_range(3)],
    "truncated, then 416": [truncated(), status(416)],
    "truncated, then a range that is nonsense": [truncated(), lying_range("bytes banana")],
    "truncated, then a range beyond 64 bits": [truncated(), lying_range("bytes 99999999999999999999-1/2")],
    "429 with Retry-After": [status(429, Retry_After="1")],
    "429 with a date": [status(429, Retry_After=formatdate(0, usegmt=True))],
    "429 with Retry-After that is nonsense": [status(429, Retry_After="soon")],
    "a storm": [status(500), status(502), status(503), status(504)],
    "no answer at all": [raw(b"")],
    "an answer that is not HTTP": [raw(b"SSH-2.0-OpenSSH_9.9\r\n")],
    "headers cut off": [raw(b"HTTP/1.1 200 OK\r\nContent-Le")],
    "a redirect": [redirect("/" + ZIP)],
    "five redirects": [redirect("/" + ZIP)] * 5,
    "stalled once": [stalled(3)],
}


@pytest.mark.parametrize("faults", HEALED.values(), ids=HEALED.keys())
def test_faults_that_a_retry_heals(server: FaultServer, faults: list[Fault]) -> None:
    server.script(ZIP, *faults)
    assert get(server, timeouts=(1, 0.5, 20)) == DATA
    assert server.count(ZIP) >= len(faults)


def test_a_broken_body_is_resumed_where_it_broke(server: FaultServer) -> None:
    server.script(ZIP, truncated(1000), truncated(2000))
    assert get(server) == DATA
    assert [r.range for r in server.requests] == ["", "bytes=1000-", "bytes=3000-"]
    assert all("If-Range" in r.headers for r in server.requests[1:])


def test_a_file_that_changes_while_it_is_resumed(server: FaultServer) -> None:
    """The entity tag is another one by then, so the whole file comes."""
    server.files[ZIP] = b"an older version " * 500
    server.script(ZIP, truncated(1000))

    class Swap(dict[str, bytes]):
        def get(self, key: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
            return DATA if server.count(ZIP) > 1 else super().get(key, default)

    server.files = Swap(server.files)
    assert get(server, size=None) == DATA
    assert server.count(ZIP) == 2


BOMB = gzip.compress(bytes(1 << 26), 1)  # once: in each answer it would take longer than a client waits
BAD: dict[str, tuple[Fault, type[BundleError]]] = {
    "always truncated": (truncated(100), TruncatedError),
    "a length that is too large": (wrong_length(10), BundleError),
    "a length that is too small": (wrong_length(-10), BundleError),
    "a captive portal": (html(), CorruptError),
    "other bytes": (body_of(lambda d: d[:-1] + b"?"), CorruptError),
    "a flipped bit": (body_of(lambda d: bytes([d[0] ^ 1]) + d[1:]), CorruptError),
    "nothing": (body_of(lambda d: b""), TruncatedError),
    "too much": (body_of(lambda d: d + b"x"), CorruptError),
    "endless": (endless(), CorruptError),
    "gzip": (body_of(gzip.compress, Content_Encoding="gzip"), CorruptError),
    "a gzip bomb": (body_of(lambda _: BOMB, Content_Encoding="gzip"), CorruptError),
    "404": (status(404), MissingError),
    "410": (status(410), MissingError),
    "401": (status(401), UnreachableError),
    "403": (status(403), UnreachableError),
    "always 500": (status(500), UnreachableError),
    "Retry-After of a week": (status(503, Retry_After="604800"), UnreachableError),
    "Retry-After beyond counting": (status(503, Retry_After="9" * 400), UnreachableError),
    "a redirect loop": (redirect("/" + ZIP), UnreachableError),
    "a redirect to a file": (redirect("file:///etc/passwd"), UnreachableError),
    "a redirect to nowhere": (redirect("http://"), UnreachableError),
    "a redirect that is nonsense": (redirect("http://[::1/"), UnreachableError),
    "a header of a megabyte": (status(200, X_Padding="x" * (1 << 20)), UnreachableError),
    "a thousand headers": (raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n"), UnreachableError),
    "a length that is no number": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"), BundleError),
    "a length below zero": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), BundleError),
    "a length beyond 64 bits": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n"), BundleError),
    "chunks that are nonsense": (
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n"),
        BundleError,
    ),
    "a chunk that is too large": (
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx\r\n"),
        BundleError,
    ),
    "206 where nobody asked": (lying_range("bytes 0-9/10"), BundleError),
    "never anything but headers": (stalled(1.5, after=0), BundleError),
}


@pytest.mark.parametrize(("fault", "kind"), BAD.values(), ids=BAD.keys())
def test_faults_that_nothing_heals(server: FaultServer, fault: Fault, kind: type[BundleError]) -> None:
    server.always(ZIP, fault)
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        result = get(server, timeouts=(0.5, 0.2, 4))
        assert result == DATA, "wrong bytes"
        raise UnreachableError("the server's lie did no harm")
    assert time.monotonic() - began < 8
    assert server.url.rstrip("/") in str(caught.value) or "no harm" in str(caught.value)


def test_a_captive_portal_is_called_by_its_name(server: FaultServer) -> None:
    server.always(ZIP, html())
    with pytest.raises(CorruptError, match="captive portal"):
        get(server)


def test_retry_after_is_waited_for(server: FaultServer) -> None:
    server.script(ZIP, status(429, Retry_After="1"))
    began = time.monotonic()
    assert get(server) == DATA
    assert time.monotonic() - began >= 1


def test_every_try_is_listed_and_their_number_is_bounded(server: FaultServer) -> None:
    server.always(ZIP, status(503))
    with pytest.raises(UnreachableError) as caught:
        get(server)
    assert server.count(ZIP) == len(caught.value.problems) == ATTEMPTS
    assert all("503" in p for p in caught.value.problems)


@pytest.mark.parametrize("fault", [stalled(3), dripping(0.05)], ids=["stalled", "dripping"])
def test_the_total_timeout_holds(server: FaultServer, fault: Fault) -> None:
    server.always(ZIP, fault)
    began = time.monotonic()
    with pytest.raises(BundleError):
        get(server, timeouts=(1, 1, 1.5))
    assert time.monotonic() - began < 4


def test_nobody_listens() -> None:
    with pytest.raises(UnreachableError, match="refused"):
        Remote(GONE, timeouts=(1, 1, 20)).fetch(ZIP, limit=LIMIT)


def test_credentials_are_not_shown(server: FaultServer) -> None:
    server.always(ZIP, status(403))
    url = server.url.replace("//", "//user:hunter2@") + "?token=sesame"
    with pytest.raises(UnreachableError) as caught:
        Remote(url).fetch(ZIP, limit=LIMIT)
    assert "hunter2" not in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert server.requests[0].headers["Authorization"].startswith("Basic ")


def test_a_proxy_is_used_as_the_environment_says(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    remote = Remote("http://mirror.invalid/", timeouts=(2, 2, 10))
    assert remote.fetch(ZIP, limit=LIMIT, want_sha256=SHA256) == DATA
    assert server.requests[0].headers["Host"] == "mirror.invalid"


RANGES: dict[str, tuple[Fault, bool]] = {
    "the whole file with status 200": (ignore_range(), False),
    "416": (status(416), False),
    "another part": (wrong_range(1), False),
    "a label that is wrong": (lying_range("bytes 0-1/2"), False),
    "a label that is nonsense": (lying_range("lines 1-2"), False),
    "as asked": (lambda h, body: h.serve(body or b""), True),
}


@pytest.mark.parametrize(("fault", "works"), RANGES.values(), ids=RANGES.keys())
def test_ranges_come_as_asked_or_not_at_all(server: FaultServer, fault: Fault, works: bool) -> None:
    server.always(ZIP, fault)
    part = Remote(server.url).fetch_range(ZIP, 100, 50)
    assert part == (DATA[100:150] if works else None)


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1, and a server's context that has it."""
    x509 = pytest.importorskip("cryptography.x509", reason="the extra 'sign' is not installed")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).add_extension(alternative, critical=False)
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    signed = builder.sign(key, hashes.SHA256())
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    form, no_password = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, form, no_password)
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return path, context


@pytest.fixture
def secure(certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    with running(mirror_files(), certificate[1]) as state:
        yield state


def test_https_with_an_authority_from_the_environment(secure: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get(secure) == DATA
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    with pytest.raises(UnreachableError):
        get(secure)


def test_a_redirect_from_https_to_http_is_refused(secure: FaultServer, server: FaultServer) -> None:
    secure.always(ZIP, redirect(server.url + ZIP))
    with pytest.raises(UnreachableError, match="redirect"):
        get(secure)
    assert server.requests == []
    server.always(ZIP, redirect(secure.url + "good.zip"))
    secure.files["good.zip"] = DATA
    assert get(server) == DATA  # upwards is fine


# ---------------------------------------------------------------- the whole of fetch_bundle


MIRROR_FAULTS: dict[str, Callable[[FaultServer], None]] = {
    "no index": lambda s: s.always("index.json", status(404)),
    "an index that is HTML": lambda s: s.always("index.json", html()),
    "an index with an absolute name": lambda s: s.files.update(
        {"index.json": s.files["index.json"].replace(ZIP.encode(), b"/etc/passwd")}
    ),
    "an index with a path": lambda s: s.files.update(
        {"index.json": s.files["index.json"].replace(ZIP.encode(), b"../../" + ZIP.encode())}
    ),
    "an index with another host": lambda s: s.files.update(
        {"index.json": s.files["index.json"].replace(ZIP.encode(), b"http://127.0.0.1:9/x.zip")}
    ),
    "an index with a wrong size": lambda s: s.files.update(
        {"index.json": s.files["index.json"].replace(str(len(DATA)).encode(), b"17")}
    ),
    "an index with a size beyond 64 bits": lambda s: s.files.update(
        {"index.json": s.files["index.json"].replace(str(len(DATA)).encode(), b"9" * 25)}
    ),
    "an index with another digest": lambda s: s.files.update(
        {"index.json": s.files["index.json"].replace(DIGEST.encode(), b"0" * 64)}
    ),
    "an index of 20 MB": lambda s: s.files.update({"index.json": b"[" * 20_000_000}),
    "a newer index": lambda s: s.files.update({"index.json": b'{"schema": 2, "anything": []}'}),
    "no detached manifest": lambda s: s.always(JSON, status(404)),
    "another detached manifest": lambda s: s.files.update({JSON: b'{"schema": 1}\n'}),
    "a bundle that is cut": lambda s: s.files.update({ZIP: DATA[:-100]}),
    "a bundle with a flipped bit": lambda s: s.files.update({ZIP: DATA[:900] + b"!" + DATA[901:]}),
    "a bundle that is HTML": lambda s: s.always(ZIP, html()),
    "no bundle": lambda s: s.always(ZIP, status(404)),
    "nothing but 404": lambda s: s.files.clear(),
}


@pytest.mark.parametrize("only", [None, ["bf16_u4b8_bf16"]], ids=["whole", "in part"])
@pytest.mark.parametrize("fault", MIRROR_FAULTS.values(), ids=MIRROR_FAULTS.keys())
def test_mirrors_with_a_fault(
    server: FaultServer, tmp_path: Path, fault: Callable[[FaultServer], None], only: list[str] | None
) -> None:
    """Either the right kernels come out, or an error of ours whose trace names the mirror; the next run is good."""
    fault(server)
    only = [KERNELS[0].split("__")[0]] if only else None
    arguments = dict(source=server.url, cache_dir=tmp_path, expected_sha256=DIGEST)
    try:
        assert is_right(fetch_bundle(only=only, **arguments))
    except BundleError as error:
        assert server.url.rstrip("/") in str(error)
    assert bad_files(tmp_path) == []
    server.files = mirror_files()
    server.scripts.clear()
    assert is_right(fetch_bundle(**arguments))


@pytest.mark.parametrize("fault", [ignore_range(), status(416), wrong_range(1)], ids=["200", "416", "another part"])
def test_part_of_a_bundle_without_ranges_is_the_whole(server: FaultServer, tmp_path: Path, fault: Fault) -> None:
    def no_ranges(h: object, body: bytes | None) -> None:
        (fault if h.headers.get("Range") else ignore_range())(h, body)  # type: ignore[attr-defined,arg-type]

    server.always(ZIP, no_ranges)
    types = KERNELS[0].split("__")[0]
    bundle = fetch_bundle(source=server.url, cache_dir=tmp_path, expected_sha256=DIGEST, only=[types])
    assert is_right(bundle)


def test_part_of_a_bundle_is_part_of_it(server: FaultServer, tmp_path: Path) -> None:
    types = KERNELS[0].split("__")[0]
    arguments = dict(source=server.url, cache_dir=tmp_path, expected_sha256=DIGEST, only=[types])
    bundle = fetch_bundle(**arguments)
    mine = [k for k in KERNELS if k.startswith(types)]
    other = next(k for k in KERNELS if k not in mine)
    asked = server.count(ZIP)
    assert asked >= 1
    assert all(r.range for r in server.requests if r.path == ZIP)
    assert all(bundle.cubin(k) for k in mine)
    assert server.count(ZIP) == asked
    offline = fetch_bundle(**arguments, offline=True)
    with pytest.raises(MissingError, match="offline"):
        offline.cubin(other)
    assert server.count(ZIP) == asked
    assert is_right(bundle)  # fetches what is missing
    assert server.count(ZIP) > asked
    assert bad_files(tmp_path) == []


def test_a_cached_file_that_rots_is_set_aside_and_healed(
    server: FaultServer, tmp_path: Path, counts: Counter[str]
) -> None:
    arguments = dict(source=server.url, cache_dir=tmp_path, expected_sha256=DIGEST)
    fetch_bundle(**arguments)
    [path] = tmp_path.rglob("bundle-*.zip")
    spans = [(k.frame.offset, k.frame.length) for k in MANIFEST.kernels]
    spans += [(d.offset, d.length) for d in MANIFEST.dictionaries]
    for at in [offset + length // 2 for offset, length in spans] + [len(DATA) - 12]:
        rotten = bytearray(DATA)
        rotten[at] ^= 4
        path.write_bytes(rotten)
        bundle = fetch_bundle(**arguments)
        assert is_right(bundle), at
        assert path.read_bytes() == DATA, at
        assert any("corrupt" in line for line in bundle.trace), bundle.trace
        counts["rotten cache files"] += 1
    assert list(tmp_path.rglob("*.corrupt"))


def test_sources_are_tried_in_order_and_all_are_told_of(server: FaultServer, tmp_path: Path) -> None:
    server.always("index.json", status(403))
    server.always(JSON, status(403))
    server.always(ZIP, status(403))
    sources = [GONE, server.url, tmp_path / "none"]
    with pytest.raises(BundleError) as caught:
        fetch_bundle(source=sources, cache_dir=tmp_path / "c", expected_sha256=DIGEST)
    for source in ("127.0.0.1:9", server.url.rstrip("/"), str(tmp_path / "none")):
        assert source in str(caught.value)
    with running(mirror_files()) as good:
        bundle = fetch_bundle(source=[*sources, good.url], cache_dir=tmp_path / "c", expected_sha256=DIGEST)
    assert is_right(bundle)
    assert any("127.0.0.1:9" in line for line in bundle.trace)
