# SPDX-License-Identifier: Apache-2.0
"""A bundle's file as it is read in parts: while it is replaced, cut or damaged, by threads and by forks."""

from __future__ import annotations

import errno
import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from machete_aot import bundle_data
from machete_aot.archive import last_entry
from machete_aot.bundle import MANIFEST_NAME, Bundle, open_bundle
from machete_aot.bundle_data import FileData, MemoryData
from machete_aot.errors import (
    BundleError,
    CorruptError,
    MissingError,
    TruncatedError,
    UnreachableError,
    UntrustedError,
)
from machete_aot.frames import manifest_text
from machete_aot.manifest import parse_manifest
from small_bundle import products, small_bundle

DATA, FRAME, DIGEST = small_bundle()
MANIFEST = parse_manifest(manifest_text(FRAME))
END = last_entry(MemoryData(DATA), MANIFEST_NAME)  # the manifest's place


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "b.zip").write_bytes(DATA)
    return tmp_path / "b.zip"


def cubins(bundle: Bundle) -> dict[str, bytes]:
    return {k.id: bundle.cubin(k.id) for k in bundle.manifest.kernels}


def test_opening_a_file_reads_its_end_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda f, length, at: (read.append((at, length)), pread(f, length, at))[1])
    bundle = open_bundle(path, manifest_sha256=DIGEST)
    assert sum(length for _, length in read) < len(FRAME) + 200 and min(read)[0] > END.offset - 60
    read.clear()
    kernel = MANIFEST.kernels[0]
    shared = MANIFEST.dictionary_of(kernel)
    assert bundle.cubin(kernel.id) and shared
    assert sorted(read) == sorted([(shared.offset, shared.length), (kernel.frame.offset, kernel.frame.length)])


def test_a_file_that_is_replaced_or_removed_stays_readable(path: Path, tmp_path: Path) -> None:
    bundle = open_bundle(path, manifest_sha256=DIGEST)
    (tmp_path / "new").write_bytes(b"another one")
    os.replace(tmp_path / "new", path)
    assert bundle.to_bytes() == DATA and bundle.verify() == []
    path.unlink()
    assert cubins(bundle) == {p.kernel.id: p.cubin for p in products()}


def test_a_file_that_shrinks_or_changes_where_it_lies(path: Path) -> None:
    bundle = open_bundle(path, manifest_sha256=DIGEST)
    kernel = MANIFEST.kernels[-1]
    os.truncate(path, kernel.frame.offset + 2)
    with pytest.raises(TruncatedError) as caught:
        bundle.cubin(kernel.id)
    assert caught.value.have == kernel.frame.offset + 2 < caught.value.want
    for action in (bundle.to_bytes, lambda: open_bundle(path, manifest_sha256=DIGEST)):
        with pytest.raises(TruncatedError):
            action()
    problems = bundle.verify()
    assert len(problems) == 2 and all(isinstance(p, TruncatedError) for p in problems)
    path.write_bytes(DATA[:-1] + b"!")  # the same file, of the same size
    assert cubins(bundle) and [type(p) for p in bundle.verify()] == [CorruptError]


def test_reads_that_give_less_than_there_is_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, at: pread(file, min(length, 100), at))
    assert open_bundle(path, manifest_sha256=DIGEST).to_bytes() == DATA


def test_a_device_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(path, manifest_sha256=DIGEST)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UnreachableError, match="Input/output error"):
        bundle.cubin(MANIFEST.kernels[0].id)
    assert all(isinstance(p, UnreachableError) for p in bundle.verify())
    with pytest.raises(UnreachableError, match="Input/output error"):
        open_bundle(path, manifest_sha256=DIGEST)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to which nobody writes
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UnreachableError, match=path.name):
            open_bundle(path, manifest_sha256=DIGEST)


def test_a_file_above_the_limit_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_data, "MAX_BUNDLE_BYTES", len(DATA))
    assert FileData(path).whole() == DATA
    monkeypatch.setattr(bundle_data, "MAX_BUNDLE_BYTES", len(DATA) - 1)
    with pytest.raises(BundleError, match="larger than"):
        FileData(path)


def test_a_span_past_the_end_takes_no_memory(path: Path) -> None:
    with pytest.raises(TruncatedError):
        FileData(path).read(0, 1 << 50)


def test_a_file_is_closed_with_its_bundle(path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def descriptors() -> list[str]:
        there = (f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd"))
        return [found for found in map(os.path.realpath, there) if found == str(path)]

    bundle = open_bundle(path, manifest_sha256=DIGEST)
    again = pickle.loads(pickle.dumps(bundle._data))
    assert len(descriptors()) == 1
    del bundle
    gc.collect()
    for wrong in ("0" * 64, DIGEST[::-1]):
        with pytest.raises(UntrustedError):
            open_bundle(path, manifest_sha256=wrong)
    with pytest.raises(MissingError):
        FileData(path.with_name("none"))
    gc.collect()
    assert descriptors() == [] and [str(w.message) for w in recwarn] == []
    assert again.read(END.offset, END.size) == FRAME


def test_threads_and_forks_read_the_same_file(path: Path) -> None:
    bundle = open_bundle(path, manifest_sha256=DIGEST)
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(0 if all(cubins(bundle) for _ in range(50)) and bundle.verify() == [] else 1)
        children.append(child)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cubins(open_bundle(path, manifest_sha256=DIGEST)), range(50)))
    assert all(one == found[0] for one in found) and cubins(bundle) == found[0]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
