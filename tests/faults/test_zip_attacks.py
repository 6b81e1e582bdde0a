# SPDX-License-Identifier: Apache-2.0
"""Archives made to do harm around the very manifest that is trusted, and manifests that are vouched for and wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from fault_server import FaultServer, endless
from machete_aot.archive import write_archive
from machete_aot.bundle import MANIFEST_NAME, open_bundle
from machete_aot.errors import BundleError, IncompatibleError, MacheteError, SchemaTooNewError
from machete_aot.fetch import fetch_bundle
from machete_aot.frames import compressor, manifest_frame, manifest_text
from machete_aot.manifest_rules import SCHEMA
from places import CUBINS, DATA, DIGEST, FRAME, JSON, MANIFEST, TEXT, ZIP, manifest_of, write_mirror
from run_children import children
from small_bundle import rewritten, with_stored

BIG = 1 << 28


def entries() -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(DATA)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(*extra: tuple[str, bytes], compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    """The bundle's entries and more, as Python's zip writer writes them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in (*entries()[:-1], *extra, entries()[-1]):
            archive.writestr(zipfile.ZipInfo(name), content, compression)
        archive.comment = comment
    return out.getvalue()


def with_first(name: str) -> bytes:
    """The bundle with one more entry before the manifest, in its own form of zip: all the rest stays where it was."""
    return write_archive([*entries()[:-1], (name, b"#!/bin/sh\n"), entries()[-1]])


def end_record(**fields: int) -> bytes:
    names = ("disk", "first_disk", "here", "count", "size", "start", "comment")
    values = dict(zip(names, struct.unpack("<HHHHIIH", DATA[-18:]), strict=True)) | fields
    return DATA[:-18] + struct.pack("<HHHHIIH", *(values[n] for n in names))


def local_header(offset_in_header: int, value: bytes) -> bytes:
    return DATA[:offset_in_header] + value + DATA[offset_in_header + len(value) :]


def symlink() -> bytes:
    """External attributes of a symbolic link in the directory's first row."""
    at = DATA.index(b"PK\x01\x02") + 38
    return DATA[:at] + struct.pack("<I", 0o120777 << 16) + DATA[at + 4 :]


def every_row_at_zero() -> bytes:
    """All rows of the directory point to the first entry: what an overlapping bomb does."""
    data, at = bytearray(DATA), DATA.index(b"PK\x01\x02")
    while data[at : at + 4] == b"PK\x01\x02":
        data[at + 42 : at + 46] = bytes(4)
        at += 46 + struct.unpack_from("<H", data, at + 28)[0]
    return bytes(data)


def second_directory() -> bytes:
    """A whole other archive behind this one, whose end record is the last."""
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(MANIFEST_NAME, manifest_frame(b'{"schema": 1}'))
    return DATA + other.getvalue()


ATTACKS: dict[str, Callable[[], bytes]] = {
    "a path that climbs": lambda: with_first("../../../../tmp/evil"),
    "a frame that climbs": lambda: with_first("frames/../../evil"),
    "an absolute name": lambda: with_first("/etc/cron.d/evil"),
    "a drive": lambda: with_first("C:\\evil.dll"),
    "an empty name": lambda: with_first("."),
    "a name with a NUL": lambda: with_first("dictionaries/flat\0.txt"),
    "a name of 60,000 bytes": lambda: with_first("x" * 60_000),
    "names of another writer": lambda: zipped(("../evil", b"x")),
    "a second dictionary": lambda: with_first("dictionaries/flat"),
    "a second manifest": lambda: with_first(MANIFEST_NAME),
    "a manifest before the trusted one": lambda: write_archive([(MANIFEST_NAME, manifest_frame(b"{}")), *entries()]),
    "the trusted manifest twice": lambda: write_archive([*entries(), entries()[-1]]),
    "a second archive behind": second_directory,
    "an archive in front": lambda: zipped() + DATA,
    "bytes in front": lambda: b"#!/bin/sh\nexit 1\n" + DATA,
    "bytes behind": lambda: DATA + bytes(100),
    "a comment with an end record": lambda: zipped(comment=DATA[-22:]),
    "deflated": lambda: zipped(compression=zipfile.ZIP_DEFLATED),
    "a deflated bomb": lambda: zipped(("bomb", bytes(BIG)), compression=zipfile.ZIP_DEFLATED),
    "a bomb in the format's own form": lambda: write_archive(
        [*entries()[:-1], ("bomb", zlib.compress(bytes(BIG), 9)), entries()[-1]]
    ),
    "a symbolic link": symlink,
    "overlapping entries": every_row_at_zero,
    "65,535 entries": lambda: end_record(here=65_535, count=65_535),
    "no entries": lambda: end_record(here=0, count=0),
    "a directory of 4 GB": lambda: end_record(size=0xFFFFFFFF),
    "a directory at 4 GB": lambda: end_record(start=0xFFFFFFFF),
    "zip64": lambda: end_record(here=0xFFFF, count=0xFFFF, size=0xFFFFFFFF, start=0xFFFFFFFF),
    "many disks": lambda: end_record(disk=3, first_disk=2),
    "a comment longer than the file": lambda: end_record(comment=0xFFFF),
    "an entry of 4 GB": lambda: local_header(18, b"\xff" * 8),
    "a name longer than the file": lambda: local_header(26, b"\xff\xff"),
    "an encrypted entry": lambda: local_header(6, b"\x01\x00"),
    "another method": lambda: local_header(8, b"\x08\x00"),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_archives_made_to_do_harm(attack: Callable[[], bytes], tmp_path: Path, counts: Counter[str]) -> None:
    """Refused by the check of the whole; what can be read for all that is right, and no file has its names."""
    data = attack()
    assert data != DATA
    with pytest.raises(MacheteError):
        raise open_bundle(data, manifest_sha256=DIGEST).verify()[0]
    mirror = write_mirror(tmp_path / "mirror")
    (mirror / ZIP).write_bytes(data)
    before = set(tmp_path.rglob("*"))
    try:
        bundle = fetch_bundle(source=mirror, cache_dir=tmp_path / "cache", expected_sha256=DIGEST)
        for name, cubin in CUBINS.items():
            assert bundle.cubin(name) == cubin
    except MacheteError:
        pass
    new = set(tmp_path.rglob("*")) - before
    assert all(p.is_relative_to(tmp_path / "cache") and not p.is_symlink() for p in new)
    assert not any("evil" in p.name for p in new)
    counts["hostile archives"] += 1


def frame_bomb() -> tuple[bytes, str]:
    """A frame of 256 MB of zeros, vouched for, under a kernel that announces its true size."""
    kernel = MANIFEST.kernels[-1]
    bomb = zstandard.ZstdCompressor().compress(bytes(BIG))
    frame = dataclasses.replace(kernel.frame, length=len(bomb), sha256=hashlib.sha256(bomb).hexdigest())
    kernels = (*MANIFEST.kernels[:-1], dataclasses.replace(kernel, frame=frame))
    return rewritten(dataclasses.replace(MANIFEST, kernels=kernels), **{f"frames/{kernel.id}": bomb})


def test_a_bomb_takes_no_memory(tmp_path: Path, counts: Counter[str]) -> None:
    data, digest = frame_bomb()
    mirror = write_mirror(tmp_path / "m", (data, manifest_of(data), digest))
    found = children("bounded", source=mirror, cache=tmp_path / "c", sha256=digest)
    assert found["error"] == "CorruptError" or not found["right"]
    assert found["grew"] < 64 << 20, found
    counts["bombs"] += 1


def test_an_endless_bundle_takes_no_memory(server: FaultServer, tmp_path: Path, counts: Counter[str]) -> None:
    for path in (ZIP, JSON, "index.json"):
        server.always(path, endless())
    found = children("bounded", source=server.url, cache=tmp_path / "c", sha256=DIGEST)
    assert found["error"] == "CorruptError", found
    assert found["grew"] < 160 << 20, found
    counts["bombs"] += 3


# ---------------------------------------------------------------- manifests


def changed(**fields: Any) -> tuple[bytes, str]:
    return rewritten(json.dumps(json.loads(TEXT) | fields, sort_keys=True, indent=2).encode() + b"\n")


def deep(levels: int) -> tuple[bytes, str]:
    return rewritten(b'{"schema": ' + b"[" * levels + b"]" * levels + b"}")


def kernel_with(**fields: Any) -> tuple[bytes, str]:
    kernels = json.loads(TEXT)["kernels"]
    return changed(kernels=[kernels[0] | fields, *kernels[1:]])


MANIFESTS: dict[str, tuple[Callable[[], tuple[bytes, str]], type[BundleError]]] = {
    "a newer schema": (lambda: changed(schema=SCHEMA + 1), SchemaTooNewError),
    "a newer schema of another form": (lambda: rewritten(b'{"schema": 7, "all": "different"}'), SchemaTooNewError),
    "an older schema": (lambda: changed(schema=SCHEMA - 1), BundleError),
    "schema 0": (lambda: changed(schema=0), BundleError),
    "no number for a schema": (lambda: changed(schema="1"), BundleError),
    "true for a schema": (lambda: changed(schema=True), BundleError),
    "an unknown field": (lambda: changed(comment="hello"), BundleError),
    "an unknown field of a kernel": (lambda: kernel_with(comment="hello"), BundleError),
    "an unknown ABI": (lambda: changed(abi={"version": 99, "parameters": [[0, 128], [128, 64]]}), IncompatibleError),
    "an unknown layout": (
        lambda: changed(layouts=[*json.loads(TEXT)["layouts"], {"name": "n1k1", "version": 1}]),
        IncompatibleError,
    ),
    "a path for an id": (lambda: kernel_with(id="../../evil"), BundleError),
    "a path for an architecture": (
        lambda: changed(bundle={"name": "machete-aot", "version": "0.1.0", "arch": "../x"}),
        BundleError,
    ),
    "a cubin of an exabyte": (lambda: kernel_with(cubin={"size": 1 << 50, "sha256": "0" * 64}), BundleError),
    "a frame of an exabyte": (
        lambda: kernel_with(frame={"offset": 0, "length": 1 << 50, "sha256": "0" * 64}),
        BundleError,
    ),
    "a frame before the file": (
        lambda: kernel_with(frame={"offset": -5, "length": 10, "sha256": "0" * 64}),
        BundleError,
    ),
    "registers without end": (lambda: kernel_with(registers=1 << 40), BundleError),
    "threads without end": (lambda: kernel_with(threads=1 << 40), BundleError),
    "a number beyond 64 bits": (lambda: kernel_with(registers=1 << 80), BundleError),
    "a number of 5,000 digits": (lambda: rewritten(b'{"schema": ' + b"9" * 5000 + b"}"), BundleError),
    "100,000 brackets": (lambda: deep(100_000), BundleError),
    "a repeated key": (lambda: rewritten(TEXT.replace(b'{\n"abi"', b'{\n"schema":1,\n"abi"', 1)), BundleError),
    "NaN": (lambda: rewritten(TEXT.replace(b"1.5", b"NaN")), BundleError),
    "no UTF-8": (lambda: rewritten(b'{"schema": "\xff"}'), BundleError),
    "no JSON": (lambda: rewritten(b"schema: 1\n"), BundleError),
    "larger than 16 MB": (lambda: rewritten(b" " * (16 << 20) + TEXT), BundleError),
    "16 MB as stored": (lambda: with_stored(bytes((16 << 20) + 1)), BundleError),
    "a bomb": (lambda: with_stored(zstandard.ZstdCompressor().compress(bytes(BIG))), BundleError),
    "a bomb of no size": (
        lambda: with_stored(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(BIG))),
        BundleError,
    ),
    "a bomb that says it is small": (lambda: with_stored(announcing(100, BIG)), BundleError),
    "more than it announces": (lambda: with_stored(announcing(len(TEXT) - 1, None)), BundleError),
    "less than it announces": (lambda: with_stored(announcing(len(TEXT) + 1, None)), BundleError),
    "bytes behind its frame": (lambda: with_stored(FRAME + b"\0"), BundleError),
    "two frames": (lambda: with_stored(FRAME + FRAME), BundleError),
    "a cut frame": (lambda: with_stored(FRAME[:-1]), BundleError),
    "a frame that is skipped": (lambda: with_stored(b"\x50\x2a\x4d\x18\x04\0\0\0hide"), BundleError),
    "a damaged frame": (lambda: with_stored(FRAME[:300] + b"XXXXXXXX" + FRAME[308:]), BundleError),
    "a frame that needs a dictionary": (
        lambda: with_stored(compressor(TEXT).compress(TEXT)),
        BundleError,
    ),
    "no frame": (lambda: with_stored(b"not zstd at all"), BundleError),
    "nothing": (lambda: with_stored(b""), BundleError),
    "not compressed": (lambda: with_stored(TEXT), IncompatibleError),
}


def announcing(size: int, content: int | None) -> bytes:
    """A manifest's frame (or one of so many zeros) whose header says that it has this many bytes."""
    frame = zstandard.ZstdCompressor(write_checksum=False).compress(TEXT if content is None else bytes(content))
    window = bytes([0x58])  # 2 MiB: a header of 4 bytes of size and one of the window, then the same blocks
    return frame[:4] + b"\x80" + window + struct.pack("<I", size) + frame[zstandard.frame_header_size(frame) :]


def test_a_frame_with_another_header_is_read_as_it_says() -> None:
    """The attacks above are frames but for the size that they announce."""
    assert manifest_text(announcing(len(TEXT), None)) == TEXT


@pytest.mark.parametrize(("make", "kind"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifests_that_are_vouched_for_and_wrong(
    make: Callable[[], tuple[bytes, str]], kind: type[BundleError], tmp_path: Path, counts: Counter[str]
) -> None:
    data, digest = make()
    with pytest.raises(kind):
        open_bundle(data, manifest_sha256=digest)
    (tmp_path / ZIP).write_bytes(data)
    with pytest.raises(kind) as caught:
        fetch_bundle(source=tmp_path, cache_dir=tmp_path / "cache", expected_sha256=digest)
    assert str(tmp_path) in str(caught.value)
    counts["hostile manifests"] += 1


def test_all_violations_are_listed_at_once() -> None:
    data, digest = kernel_with(registers=0, threads=5, spills=-1)
    with pytest.raises(BundleError) as caught:
        open_bundle(data, manifest_sha256=digest)
    assert len(caught.value.problems) >= 3
