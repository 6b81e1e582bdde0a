# SPDX-License-Identifier: Apache-2.0
"""The cache: names by digest, verified on reading, never half a file under a final name, and only its own files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from machete_aot import cache as cache_module
from machete_aot.cache import Cache, bundle_name, frame_name, manifest_name, signature_name
from machete_aot.errors import ArgumentError, CacheError, CorruptError, MacheteError, UnreachableError
from machete_aot.frames import manifest_text
from machete_aot.manifest import parse_manifest
from small_bundle import rewritten, small_bundle

DATA, FRAME, DIGEST = small_bundle()
TEXT = manifest_text(FRAME)
CONTENT = b"some frame" * 100
SHA = hashlib.sha256(CONTENT).hexdigest()
NAME = frame_name(SHA)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_what_is_put_is_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get(NAME, SHA) is None
    assert files(tmp_path) == []
    cache.put(NAME, CONTENT)
    assert cache.get(NAME, SHA) == CONTENT
    assert files(tmp_path) == ["v1", f"v1/{NAME}"]
    assert Cache(tmp_path).get(NAME, SHA) == CONTENT and cache.reports == []


def test_looking_writes_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "none")
    assert cache.entries() == cache.prune(0) == cache.clear() == cache.check() == []
    assert cache.get(NAME, SHA) is None
    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT + b"x", b"X" + CONTENT[1:]])
def test_a_corrupt_file_is_set_aside_reported_and_replaced(tmp_path: Path, damage: bytes) -> None:
    cache = Cache(tmp_path)
    cache.put(NAME, CONTENT)
    (cache.folder / NAME).write_bytes(damage)
    assert cache.get(NAME, SHA) is None
    assert files(cache.folder) == [f"{NAME}.corrupt"]
    assert len(cache.reports) == 1 and NAME in cache.reports[0] and "set aside" in cache.reports[0]
    assert cache.get(NAME, SHA) is None and len(cache.reports) == 1
    cache.put(NAME, CONTENT)
    assert cache.get(NAME, SHA) == CONTENT


def test_a_check_of_ones_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(bundle_name(DIGEST), b"whatever")

    def refuse(data: bytes) -> None:
        raise CorruptError("it", repr(data), "else")

    assert cache.get(bundle_name(DIGEST), lambda _: None) == b"whatever"
    assert cache.get(bundle_name(DIGEST), refuse) is None
    assert "b'whatever'" in cache.reports[0]


def test_what_cannot_be_read_is_reported(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (cache.folder / NAME).mkdir(parents=True)
    assert cache.get(NAME, SHA) is None
    assert "cannot be read" in cache.reports[0]
    with pytest.raises(CacheError):
        cache.put(NAME, CONTENT)
    assert files(cache.folder) == [NAME]


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "frame-00.zst", f"{NAME}.corrupt", "", f"x{NAME}", NAME + "\n"]
)
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    cache = Cache(tmp_path / "cache")
    with pytest.raises(ArgumentError):
        cache.put(name, b"x")
    with pytest.raises(ArgumentError):
        cache.get(name, SHA)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", Path("/proc/machete")):
        cache = Cache(folder)
        assert cache.get(NAME, SHA) is None
        with pytest.raises(CacheError, match="cannot be written") as caught:
            cache.put(NAME, CONTENT)
        assert isinstance(caught.value, UnreachableError) and isinstance(caught.value, MacheteError)
        with pytest.raises(CacheError):
            cache.keep(NAME, CONTENT)  # the caller named the folder
        with cache.lock("key") as held:
            assert not held


def test_a_default_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(cache_module.CACHE_VARIABLE, str(tmp_path / "file"))
    cache = Cache()
    assert not cache.explicit
    for _ in range(3):
        cache.keep(NAME, CONTENT)
    assert len(cache.reports) == 1 and "without a cache" in cache.reports[0]


def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache_module.CACHE_VARIABLE, raising=False)
    assert Cache().folder == tmp_path / "machete-aot" / "v1"
    monkeypatch.setenv(cache_module.CACHE_VARIABLE, str(tmp_path / "own"))
    assert Cache().folder == tmp_path / "own" / "v1"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own: the write ends in the middle."""
    code = f"""
import resource, signal
from machete_aot.cache import Cache
from machete_aot.errors import CacheError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    Cache({str(tmp_path)!r}).put({NAME!r}, bytes(6000))
except CacheError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert files(tmp_path) == ["v1"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    sha = hashlib.sha256(content).hexdigest()
    stop = threading.Event()

    def read() -> tuple[int, list[str]]:
        cache, found = Cache(tmp_path), 0
        while not stop.is_set():
            found += cache.get(frame_name(sha), sha) is not None
        return found, cache.reports

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        list(pool.map(lambda _: Cache(tmp_path).put(frame_name(sha), content), range(40)))
        stop.set()
        results = [r.result() for r in readers]
    assert all(reports == [] for _, reports in results) and sum(found for found, _ in results) > 0
    assert files(Cache(tmp_path).folder) == [frame_name(sha)]


def test_the_lock_is_exclusive_and_its_wait_bounded(tmp_path: Path) -> None:
    first, second = Cache(tmp_path), Cache(tmp_path)
    with first.lock("key") as held:
        assert held
        with second.lock("key", seconds=0.1) as again:
            assert not again
        with second.lock("other key", seconds=0.1) as other:
            assert other
    with second.lock("key", seconds=0.1) as held:
        assert held
    with pytest.raises(KeyError), first.lock("key"):  # not swallowed
        raise KeyError
    assert {e.kind for e in first.entries()} == {"lock"}


def filled(folder: Path) -> tuple[Cache, str]:
    """A cache of two bundles, the second stored later, with litter and with files that are not its own."""
    manifest = parse_manifest(TEXT)
    other, digest = rewritten(TEXT.replace(b'"a test"', b'"another"'))
    cache = Cache(folder)
    cache.put(manifest_name(DIGEST), FRAME)
    cache.put(bundle_name(DIGEST), DATA)
    cache.put(signature_name(DIGEST), b"signature")
    frame = manifest.kernels[0].frame
    cache.put(frame_name(frame.sha256), DATA[frame.offset : frame.offset + frame.length])
    cache.put(bundle_name(digest), other)
    for name in (manifest_name(DIGEST), bundle_name(DIGEST), signature_name(DIGEST)):
        os.utime(cache.folder / name, (1000, 1000))
    (cache.folder / f".tmp-12-{'0' * 16}-{NAME}").write_bytes(b"half")
    (cache.folder / f"{NAME}.corrupt").write_bytes(b"bad")
    with cache.lock("key"):
        pass
    for name in ("notes.txt", "bundle-1.zip", ".tmp-x", f"my-{NAME}"):
        (cache.folder / name).write_text("the user's own")
    return cache, digest


def test_entries_prune_and_clear_touch_only_their_own(tmp_path: Path) -> None:
    cache, digest = filled(tmp_path)
    kinds = [e.kind for e in cache.entries()]
    assert sorted(kinds) == sorted(
        ["manifest", "bundle", "bundle", "signature", "frame", "temporary", "corrupt", "lock"]
    )
    removed = cache.prune(1)
    assert len(removed) == 7
    assert [e.name for e in cache.entries()] == [bundle_name(digest)]
    assert cache.clear() == [bundle_name(digest)]
    assert files(cache.folder) == sorted(["notes.txt", "bundle-1.zip", ".tmp-x", f"my-{NAME}"])


def test_prune_keeps_the_frames_of_what_it_keeps(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path)
    assert len(cache.prune(5)) == 3  # the litter
    assert sorted(e.kind for e in cache.entries()) == ["bundle", "bundle", "frame", "manifest", "signature"]
    assert cache.check() == []


def test_clear_removes_an_empty_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(NAME, CONTENT)
    assert cache.clear() == [NAME]
    assert files(tmp_path) == []


def test_check_finds_damage_that_opening_does_not(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path)
    damaged = bytearray(DATA)
    damaged[parse_manifest(TEXT).kernels[1].frame.offset + 2] ^= 1
    (cache.folder / bundle_name(DIGEST)).write_bytes(damaged)
    (cache.folder / manifest_name(DIGEST)).write_bytes(FRAME[:-1])
    found = dict(cache.check())
    assert set(found) == {bundle_name(DIGEST), manifest_name(DIGEST)}
    assert all(isinstance(e, CorruptError) for e in found.values())
    assert cache.check() == [] and len(cache.reports) == 2
    assert (cache.folder / f"{bundle_name(DIGEST)}.corrupt").read_bytes() == damaged
