# SPDX-License-Identifier: Apache-2.0
"""Where bundles come from: files, the package's pins, and the bundle that a process uses."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from file_server import FileServer
from machete_aot import fetch
from machete_aot.bundle import Bundle, open_bundle
from machete_aot.cache import Cache, bundle_name, manifest_name
from machete_aot.errors import (
    ArgumentError,
    BundleError,
    CacheError,
    CorruptError,
    IncompatibleError,
    MissingError,
    TruncatedError,
    UnreachableError,
    UntrustedError,
)
from machete_aot.frames import manifest_frame, manifest_text
from machete_aot.manifest import parse_manifest
from machete_aot.mirror import export_bundle
from machete_aot.trust import sign_manifest
from small_bundle import products, rewritten, small_bundle

DATA, FRAME, DIGEST = small_bundle()
TEXT = manifest_text(FRAME)
MANIFEST = parse_manifest(TEXT)


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package data folder that embeds the small bundle."""
    pin = {"arch": "sm90a", "version": fetch.__version__, "file": "small.zip", "manifest_sha256": DIGEST}
    (tmp_path / "pins.json").write_text(json.dumps({"schema": 1, "bundles": [pin]}))
    (tmp_path / "small.zip").write_bytes(DATA)
    monkeypatch.setattr(fetch, "_data", lambda: tmp_path)
    for name in (fetch.SOURCE_VARIABLE, fetch.PATH_VARIABLE, fetch.OFFLINE_VARIABLE, "MACHETE_AOT_KEYS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MACHETE_AOT_CACHE", str(tmp_path / "cache"))
    fetch.use_bundle(None)
    fetch.pins.cache_clear()
    yield tmp_path
    fetch.pins.cache_clear()
    fetch.use_bundle(None)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    with pytest.raises(MissingError, match=r"b\.zip"):
        open_bundle(path, manifest_sha256=DIGEST)
    path.write_bytes(DATA)
    bundle = open_bundle(str(path), manifest_sha256=DIGEST)
    assert bundle.verify() == []
    assert str(path) in repr(bundle)
    path.write_bytes(b"overwritten later")
    assert {type(problem) for problem in bundle.verify()} == {TruncatedError}
    with pytest.raises(UnreachableError):
        open_bundle(tmp_path, manifest_sha256=DIGEST)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_files_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    path.write_bytes(DATA)
    path.chmod(0)
    with pytest.raises(UnreachableError):
        open_bundle(path, manifest_sha256=DIGEST)


def test_the_embedded_bundle_is_the_default(pinned: Path) -> None:
    assert fetch.fetch_bundle("sm90a").manifest == MANIFEST
    assert fetch.fetch_bundle("sm90a", "0.1.0").origin == str(pinned / "small.zip")
    (pinned / "small.zip").unlink()
    with pytest.raises(MissingError, match="build_kernels"):
        fetch.fetch_bundle()


@pytest.mark.parametrize(("arch", "version"), [("sm100a", None), ("sm90a", "9.9.9")])
def test_bundles_that_are_not_embedded(pinned: Path, arch: str, version: str | None) -> None:
    with pytest.raises(MissingError, match=r"there are: sm90a 0\.1\.0"):
        fetch.fetch_bundle(arch, version)


def test_damage_to_the_embedded_bundle(pinned: Path) -> None:
    (pinned / "small.zip").write_bytes(DATA[:-1])
    with pytest.raises(TruncatedError):
        fetch.fetch_bundle()
    (pinned / "pins.json").unlink()
    fetch.pins.cache_clear()
    with pytest.raises(MissingError, match=r"pins\.json"):
        fetch.fetch_bundle()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"bundles": 3}',
        '{"bundles": [{"arch": "sm90a"}]}',
        '{"bundles": [{"arch": 1, "version": 2, "file": 3, "manifest_sha256": 4}]}',
    ],
)
def test_damaged_pins(pinned: Path, text: str) -> None:
    (pinned / "pins.json").write_text(text)
    fetch.pins.cache_clear()
    with pytest.raises(BundleError, match="damaged"):
        fetch.fetch_bundle()


def test_sources(pinned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pinned / "elsewhere.zip"
    path.write_bytes(DATA)
    assert fetch.fetch_bundle(source=path).origin == str(path)
    monkeypatch.setenv(fetch.SOURCE_VARIABLE, str(path))
    assert fetch.fetch_bundle().origin == str(path)
    monkeypatch.setenv(fetch.SOURCE_VARIABLE, "")
    assert fetch.fetch_bundle().origin == str(pinned / "small.zip")


def test_sources_of_another_digest(pinned: Path) -> None:
    data, digest = rewritten(
        dataclasses.replace(MANIFEST, bundle=dataclasses.replace(MANIFEST.bundle, version="0.2.0"))
    )
    path = pinned / "newer.zip"
    path.write_bytes(data)
    with pytest.raises(UntrustedError, match="expected_sha256="):
        fetch.fetch_bundle(source=path)
    with pytest.raises(UntrustedError):
        fetch.fetch_bundle(source=path, expected_sha256="1" * 64)
    assert fetch.fetch_bundle(source=path, expected_sha256=digest).manifest.bundle.version == "0.2.0"
    with pytest.raises(IncompatibleError, match=r"wanted sm90a 0\.3\.0"):
        fetch.fetch_bundle("sm90a", "0.3.0", path, expected_sha256=digest)
    with pytest.raises(IncompatibleError, match="wanted sm100a"):
        fetch.fetch_bundle("sm100a", source=path, expected_sha256=digest)


@pytest.mark.parametrize("source", ["s3://b", "file:///etc/passwd", "ftp://u:secret@h/b.zip", "", [], [""]])
def test_what_is_no_source(pinned: Path, source: str | list[str]) -> None:
    with pytest.raises(ArgumentError) as caught:
        fetch.fetch_bundle(source=source)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"version": "../x"}, {"arch": "a/b"}, {"expected_sha256": "12"}, {"only": []}])
def test_wrong_arguments(pinned: Path, mirror: Path, wrong: dict[str, str]) -> None:
    with FileServer(mirror) as server, pytest.raises(ArgumentError):
        fetch.fetch_bundle(**{"source": server.url, **wrong})  # type: ignore[arg-type]


def test_the_bundle_of_the_process(pinned: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fetch.default_bundle(), range(32)))
    assert len(set(map(id, found))) == 1
    mine = open_bundle(DATA, manifest_sha256=DIGEST)
    fetch.use_bundle(mine)
    assert fetch.default_bundle() is mine
    fetch.use_bundle(None)
    assert fetch.default_bundle() is not mine


# ---------------------------------------------------------------- the order of sources, and its trace

CUBINS = {p.kernel.id: p.cubin for p in products()}
IDS = [k.id for k in MANIFEST.kernels]
BF16 = [i for i in IDS if i.startswith("bf16_u4b8__")]


def newer(version: str = "0.2.0") -> tuple[bytes, str]:
    return rewritten(dataclasses.replace(MANIFEST, bundle=dataclasses.replace(MANIFEST.bundle, version=version)))


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A folder as export writes it."""
    export_bundle(open_bundle(DATA, manifest_sha256=DIGEST), tmp_path / "mirror")
    return tmp_path / "mirror"


def all_right(bundle: Bundle) -> bool:
    return bundle.verify() == [] and {i: bundle.cubin(i) for i in IDS} == CUBINS


def test_a_list_is_tried_in_order(pinned: Path, tmp_path: Path, mirror: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(DATA[:-4])
    bundle = fetch.fetch_bundle(source=[tmp_path / "none.zip", tmp_path / "bad.zip", str(mirror)])
    assert bundle.origin == str(mirror / "machete-aot-sm90a-0.1.0.zip")
    assert [line.split(": ")[1] for line in bundle.trace] == [
        "MissingError",
        "TruncatedError",
        f"in use, {bundle.origin}",
    ]


def test_all_failures_are_listed_and_the_most_telling_raised(pinned: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(DATA[:-4])
    with pytest.raises(TruncatedError) as caught:
        fetch.fetch_bundle(source=[tmp_path / "none.zip", tmp_path / "bad.zip", tmp_path / "gone"])
    assert len(caught.value.problems) == 3 and str(tmp_path / "gone") in str(caught.value)


def test_the_default_order(pinned: Path, tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fetch.SOURCE_VARIABLE, f"{tmp_path / 'no.zip'}, {tmp_path / 'neither'}")
    monkeypatch.setenv(fetch.PATH_VARIABLE, os.pathsep.join([str(tmp_path / "empty"), str(mirror)]))
    (tmp_path / "empty").mkdir()
    bundle = fetch.fetch_bundle()
    assert bundle.origin == str(pinned / "small.zip")
    assert [line.split()[0] for line in bundle.trace] == ["MACHETE_AOT_SOURCE", "MACHETE_AOT_SOURCE", "embedded"]
    (pinned / "small.zip").write_bytes(b"not a bundle")
    bundle = fetch.fetch_bundle()
    assert bundle.origin == str(mirror / "machete-aot-sm90a-0.1.0.zip")
    assert [line.split(": ")[1] for line in bundle.trace[2:]] == [
        "CorruptError",
        "MissingError",
        f"in use, {bundle.origin}",
    ]
    monkeypatch.delenv(fetch.PATH_VARIABLE)
    with pytest.raises(CorruptError) as caught:
        fetch.fetch_bundle()
    assert "the user's cache: MissingError" in str(caught.value)
    cache = Cache()
    cache.put(bundle_name(DIGEST), DATA)
    assert all_right(fetch.fetch_bundle())
    assert str(cache.folder) in fetch.fetch_bundle().origin


def test_nothing_is_written_where_a_bundle_is_found(pinned: Path, mirror: Path) -> None:
    before = sorted(pinned.rglob("*"))
    assert all_right(fetch.fetch_bundle()) and all_right(fetch.fetch_bundle(source=mirror))
    assert sorted(pinned.rglob("*")) == before


# ---------------------------------------------------------------- mirrors


@pytest.mark.parametrize(
    "index",
    [
        None,
        b"",
        b"<html>log in</html>",
        b'{"schema": 2, "bundles": []}',
        b'{"schema": 1, "bundles": []}',
        b'{"schema": 1, "bundles": [{"arch": "sm90a", "version": "0.1.0", "file": "../small.zip", "size": 1, '
        b'"manifest": "x.json", "manifest_sha256": ""}]}',
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_the_index_is_a_hint(pinned: Path, mirror: Path, index: bytes | None, remote: bool) -> None:
    (mirror / "index.json").unlink()
    if index is not None:
        (mirror / "index.json").write_bytes(index)
    with FileServer(mirror) as server:
        bundle = fetch.fetch_bundle(source=server.url if remote else mirror)
    assert all_right(bundle)
    assert not any("small.zip" in name for name in server.names)


@pytest.mark.parametrize("remote", [False, True])
def test_a_mirror_of_several_versions(pinned: Path, mirror: Path, remote: bool) -> None:
    data, digest = newer()
    export_bundle(open_bundle(data, manifest_sha256=digest), mirror)
    with FileServer(mirror) as server:
        source = server.url if remote else mirror
        assert fetch.fetch_bundle(source=source).manifest.bundle.version == "0.1.0"  # the one that is pinned
        with pytest.raises(UntrustedError):
            fetch.fetch_bundle("sm90a", "0.2.0", source)
        found = fetch.fetch_bundle("sm90a", "0.2.0", source, expected_sha256=digest.upper())
        assert found.manifest_sha256 == digest
        assert fetch.fetch_bundle(source=source, expected_sha256=digest).manifest.bundle.version == "0.2.0"
        with pytest.raises(MissingError, match=r"0\.3\.0"):
            fetch.fetch_bundle("sm90a", "0.3.0", source)
        with pytest.raises(MissingError, match="sm100a"):
            fetch.fetch_bundle("sm100a", source=source)


def test_a_download_is_kept_and_not_repeated(pinned: Path, mirror: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    with FileServer(mirror) as server:
        bundle = fetch.fetch_bundle(source=server.url, progress=lambda *p: seen.append(p))
        assert all_right(bundle) and bundle.size == len(DATA) and seen[-1] == (len(DATA), len(DATA))
        assert server.names == ["index.json", "machete-aot-sm90a-0.1.0.json.zst", "machete-aot-sm90a-0.1.0.zip"]
        assert all_right(fetch.fetch_bundle(source=server.url + "/"))
        assert all_right(fetch.fetch_bundle(source=server.url, only=["bf16_u4b8"]))
        assert len(server.names) == 3
    kinds = [e.kind for e in Cache(tmp_path / "cache").entries()]
    assert sorted(kinds) == ["bundle", "lock", "manifest"]
    assert all_right(fetch.fetch_bundle(source=server.url))  # nobody answers there any more
    assert all_right(fetch.fetch_bundle(source=server.url, offline=True))


def test_the_url_of_a_file(pinned: Path, mirror: Path, tmp_path: Path) -> None:
    (mirror / "mine.zip").write_bytes(DATA)
    with FileServer(mirror) as server:
        assert all_right(fetch.fetch_bundle(source=f"{server.url}/mine.zip?token=secret", cache_dir=tmp_path / "a"))
        assert server.names == ["mine.json.zst", "mine.zip"]
        bundle = fetch.fetch_bundle(source=f"{server.url}/machete-aot-sm90a-0.1.0.zip", cache_dir=tmp_path / "b")
        assert all_right(bundle)
        assert server.names[2:] == ["machete-aot-sm90a-0.1.0.json.zst", "machete-aot-sm90a-0.1.0.zip"]
        with pytest.raises(MissingError) as caught:
            fetch.fetch_bundle(source=f"{server.url}/none.zip?token=secret", cache_dir=tmp_path / "c")
    assert "secret" not in str(caught.value)


def test_only_some_kernels(pinned: Path, mirror: Path, tmp_path: Path) -> None:
    with FileServer(mirror) as server:
        bundle = fetch.fetch_bundle(source=server.url, only=["bf16_u4b8"])
        assert ("machete-aot-sm90a-0.1.0.zip", "") not in server.requests  # never the whole file
        assert sum(bool(wanted) for _, wanted in server.requests) == 1
        asked = len(server.requests)
        assert all(bundle.cubin(i) == CUBINS[i] for i in BF16) and len(server.requests) == asked
        offline = fetch.fetch_bundle(source=server.url, only=["bf16_u4b8"], offline=True)
        assert all(offline.cubin(i) == CUBINS[i] for i in BF16)
        other = next(i for i in IDS if i not in BF16)
        with pytest.raises(MissingError, match="nothing may be downloaded"):
            offline.cubin(other)
        with pytest.raises(MissingError, match="offline"):
            fetch.fetch_bundle(source=server.url, only=["fp16_u4b8"], offline=True)
        assert bundle.cubin(other) == CUBINS[other]  # on demand
        assert all_right(bundle) and bundle.to_bytes() == DATA
        again = fetch.fetch_bundle(source=server.url)
    assert all_right(again) and again.size == len(DATA)
    assert not Cache(tmp_path / "cache").reports


def test_what_was_fetched_in_part_serves_offline(pinned: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileServer(mirror) as server:
        fetch.fetch_bundle(source=server.url, only=["bf16_u4b8"])
    monkeypatch.setenv(fetch.OFFLINE_VARIABLE, "1")
    monkeypatch.setenv(fetch.SOURCE_VARIABLE, server.url)
    assert {i: fetch.default_bundle().cubin(i) for i in BF16} == {i: CUBINS[i] for i in BF16}


def test_servers_without_ranges_give_the_whole_file(pinned: Path, mirror: Path) -> None:
    with FileServer(mirror, ranges=False) as server:
        bundle = fetch.fetch_bundle(source=server.url, only=["bf16_u4b8"])
        asked = len(server.requests)
        assert all_right(bundle) and len(server.requests) == asked


def test_wrong_ranges_are_replaced_by_the_whole_file(pinned: Path, mirror: Path) -> None:
    with FileServer(mirror) as server:
        bundle = fetch.fetch_bundle(source=server.url, only=["bf16_u4b8"])
        damaged = bytearray(DATA)
        for kernel in MANIFEST.kernels:
            damaged[kernel.frame.offset + 1] ^= 1
        (mirror / "machete-aot-sm90a-0.1.0.zip").write_bytes(damaged)
        other = next(i for i in IDS if i not in BF16)
        with pytest.raises(CorruptError):
            bundle.cubin(other)
        assert bundle.cubin(BF16[0]) == CUBINS[BF16[0]]
        (mirror / "machete-aot-sm90a-0.1.0.zip").write_bytes(DATA)
        assert bundle.cubin(other) == CUBINS[other]


@pytest.mark.parametrize("where", ["start", "frame", "manifest", "end", "empty"])
def test_a_damaged_cache_is_healed_and_reported(pinned: Path, mirror: Path, tmp_path: Path, where: str) -> None:
    at = {"start": 0, "frame": MANIFEST.kernels[0].frame.offset + 1, "manifest": len(DATA) - 2000, "end": -1}
    with FileServer(mirror) as server:
        fetch.fetch_bundle(source=server.url)
        path = Cache(tmp_path / "cache").folder / bundle_name(DIGEST)
        damaged = bytearray(DATA)
        if where != "empty":
            damaged[at[where]] ^= 1
        path.write_bytes(b"" if where == "empty" else damaged)
        bundle = fetch.fetch_bundle(source=server.url)
        assert {i: bundle.cubin(i) for i in IDS} == CUBINS
    assert path.read_bytes() == DATA and path.with_name(path.name + ".corrupt").exists()
    assert "set aside" in bundle.trace[0] and bundle.verify() == []


def test_damage_that_cannot_be_healed_is_corruption(pinned: Path, mirror: Path, tmp_path: Path) -> None:
    with FileServer(mirror) as server:
        fetch.fetch_bundle(source=server.url)
    path = Cache(tmp_path / "cache").folder / bundle_name(DIGEST)
    damaged = bytearray(DATA)
    damaged[MANIFEST.kernels[0].frame.offset + 1] ^= 1
    path.write_bytes(damaged)
    bundle = fetch.fetch_bundle(source=server.url, offline=True)
    assert bundle.cubin(IDS[1]) == CUBINS[IDS[1]]
    with pytest.raises(CorruptError):
        bundle.cubin(IDS[0])


def test_threads_share_one_download(pinned: Path, mirror: Path) -> None:
    with FileServer(mirror) as server, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fetch.fetch_bundle(source=server.url), range(16)))
    assert all(all_right(b) for b in found)
    assert server.names.count("machete-aot-sm90a-0.1.0.zip") == 1


def test_a_mirror_that_lies(pinned: Path, mirror: Path, tmp_path: Path) -> None:
    (mirror / "machete-aot-sm90a-0.1.0.zip").write_bytes(DATA[:-1])
    with FileServer(mirror) as server:
        with pytest.raises(TruncatedError):
            fetch.fetch_bundle(source=server.url)
        other = manifest_frame(TEXT.replace(b'"a test"', b'"A TEST"'))
        (mirror / "machete-aot-sm90a-0.1.0.json.zst").write_bytes(other)
        (tmp_path / "cache" / "v1" / manifest_name(DIGEST)).unlink()
        with pytest.raises(CorruptError):  # the index promised another one
            fetch.fetch_bundle(source=server.url)
        (mirror / "index.json").unlink()
        with pytest.raises(UntrustedError):
            fetch.fetch_bundle(source=server.url)
    assert [e.kind for e in Cache(tmp_path / "cache").entries()] == ["lock"]


def test_a_cache_that_cannot_be_written(pinned: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pinned / "file").write_text("not a folder")
    with FileServer(mirror) as server:
        with pytest.raises(CacheError, match="file"):
            fetch.fetch_bundle(source=server.url, cache_dir=pinned / "file")
        monkeypatch.setenv("MACHETE_AOT_CACHE", str(pinned / "file"))
        bundle = fetch.fetch_bundle(source=server.url)
        assert all_right(bundle) and "without a cache" in "".join(bundle.trace)
        partial = fetch.fetch_bundle(source=server.url, only=["bf16_u4b8"])
        assert all_right(partial)


# ---------------------------------------------------------------- signatures


@pytest.fixture
def keys(tmp_path: Path) -> tuple[bytes, Path, Path]:
    """A private key, the file of its public key, and that of another."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = [Ed25519PrivateKey.generate() for _ in range(2)]
    paths = [tmp_path / f"key{i}.pem" for i in range(2)]
    for key, path in zip(made, paths, strict=True):
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        path.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    pem = made[0].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, paths[0], paths[1]


@pytest.mark.parametrize("remote", [False, True])
def test_signed_bundles(
    pinned: Path, mirror: Path, tmp_path: Path, keys: tuple[bytes, Path, Path], remote: bool
) -> None:
    private, mine, other = keys
    data, digest = newer()
    bundle = open_bundle(data, manifest_sha256=digest)
    bundle.signature = sign_manifest(bundle.manifest_bytes, private)
    export_bundle(bundle, mirror)
    with FileServer(mirror) as server:
        source = server.url if remote else mirror
        for wrong in ({}, {"keys": [other]}, {"keys": [mine], "expected_sha256": "1" * 64}):
            with pytest.raises(UntrustedError):
                fetch.fetch_bundle("sm90a", "0.2.0", source, **wrong)
        found = fetch.fetch_bundle("sm90a", "0.2.0", source, keys=[other, mine])
        assert all_right(found) and found.signature == bundle.signature
        assert fetch.fetch_bundle(source=source, keys=[mine]).manifest_sha256 == DIGEST  # pinned before signed
        assert export_bundle(found, tmp_path / "copy")[2].read_bytes() == bundle.signature
    if remote:
        assert all_right(fetch.fetch_bundle("sm90a", "0.2.0", server.url, keys=[mine]))
        assert all_right(fetch.fetch_bundle("sm90a", "0.2.0", server.url, keys=[mine], offline=True))
        with pytest.raises(MissingError):
            fetch.fetch_bundle("sm90a", "0.2.0", server.url, keys=[other], offline=True)


def test_use_bundle_takes_a_bundle() -> None:
    with pytest.raises(ArgumentError, match=r"takes a Bundle or None, got 'x.zip'; open one with fetch_bundle"):
        fetch.use_bundle("x.zip")  # type: ignore[arg-type]


def test_a_fork_while_another_thread_opens_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child must not wait for a lock that nobody in it will release."""
    opening, done = threading.Event(), threading.Event()

    def slow() -> Bundle:
        opening.set()
        done.wait(60)
        return open_bundle(DATA, manifest_sha256=DIGEST)

    monkeypatch.setattr(fetch, "fetch_bundle", slow)
    thread = threading.Thread(target=fetch.default_bundle)
    thread.start()
    opening.wait(60)
    child = os.fork()
    if child == 0:
        done.set()
        os._exit(0 if fetch.default_bundle().verify() == [] else 1)
    limit = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < limit:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    done.set()
    thread.join()
    assert ended == (child, 0)
