# SPDX-License-Identifier: Apache-2.0
"""The bundle's reader, on a small real bundle: every byte of the file is covered, and each damage has its own error."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from machete_aot import bundle as bundle_module
from machete_aot.archive import last_entry, write_archive
from machete_aot.bundle import MANIFEST_NAME, Bundle, bundle_size, frame_digests, open_bundle, open_manifest
from machete_aot.bundle_data import MemoryData
from machete_aot.errors import (
    BundleError,
    CorruptError,
    IncompatibleError,
    MacheteError,
    MissingError,
    SchemaTooNewError,
    TruncatedError,
    UntrustedError,
)
from machete_aot.frames import manifest_frame, manifest_text
from machete_aot.manifest import LayoutInfo, Manifest, dump_manifest, parse_manifest
from machete_aot.manifest_rules import SCHEMA
from small_bundle import products, rewritten, small_bundle, with_stored

DATA, FRAME, DIGEST = small_bundle()
TEXT = manifest_text(FRAME)
MANIFEST = parse_manifest(TEXT)
END = last_entry(MemoryData(DATA), MANIFEST_NAME)  # the manifest's place


def opened(data: bytes = DATA) -> Bundle:
    return open_bundle(data, manifest_sha256=DIGEST)


def flipped(at: int, mask: int = 0x01) -> bytes:
    damaged = bytearray(DATA)
    damaged[at] ^= mask
    return bytes(damaged)


def test_reading_gives_what_was_packed() -> None:
    bundle = opened()
    assert dump_manifest(bundle.manifest) == TEXT
    assert bundle.manifest_sha256 == DIGEST
    assert {p.kernel.id: p.cubin for p in products()} == {k.id: bundle.cubin(k.id) for k in bundle.manifest.kernels}
    assert bundle.verify() == []


def test_any_zip_tool_reads_it() -> None:
    with zipfile.ZipFile(io.BytesIO(DATA)) as archive:
        assert archive.testzip() is None
        kernels = [f"frames/{k.id}" for k in MANIFEST.kernels]
        assert archive.namelist() == ["dictionaries/flat", "dictionaries/stream", *kernels, MANIFEST_NAME]
        assert archive.read(MANIFEST_NAME) == FRAME
        assert {(i.compress_type, i.date_time) for i in archive.infolist()} == {(0, (1980, 1, 1, 0, 0, 0))}
        for kernel in MANIFEST.kernels:
            frame = DATA[kernel.frame.offset : kernel.frame.offset + kernel.frame.length]
            assert archive.read(f"frames/{kernel.id}") == frame


def test_packing_is_deterministic() -> None:
    small_bundle.cache_clear()
    assert small_bundle()[0] == DATA


def covers(start: int, length: int) -> range:
    return range(start, start + length)


def test_each_flipped_byte_is_detected_and_has_the_right_type() -> None:
    frames = {k.id: covers(k.frame.offset, k.frame.length) for k in MANIFEST.kernels}
    dictionaries = {k.id: covers(d.offset, d.length) for k in MANIFEST.kernels if (d := MANIFEST.dictionary_of(k))}
    assert len(set(dictionaries.values())) == 2
    header = len(END.local_header)
    last_record = len(DATA) - len(END.central_header) - 22  # the end record has 22 bytes
    needed = {*covers(END.offset - header, header + END.size), *range(last_record, len(DATA))}  # by opening
    for at in range(len(DATA)):
        data = flipped(at, 1 << at % 8)
        try:
            bundle = opened(data)
        except CorruptError:
            assert at in needed, at
            continue
        assert bundle.verify(), f"byte {at} is not covered"
        assert all(isinstance(p, CorruptError) for p in bundle.verify()), bundle.verify()
        assert at not in needed, at
        for name, frame in frames.items():
            if at in dictionaries[name] or at in frame:
                with pytest.raises(CorruptError):
                    bundle.cubin(name)
            else:
                assert hashlib.sha256(bundle.cubin(name)).hexdigest() == MANIFEST.kernel(name).cubin.sha256


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_each_byte_of_headers_and_ends_is_detected_whatever_the_flip(mask: int) -> None:
    contents = {i for k in MANIFEST.kernels for i in covers(k.frame.offset, k.frame.length)}
    contents |= {i for d in MANIFEST.dictionaries for i in covers(d.offset, d.length)}
    contents |= {*covers(END.offset, END.size)}
    for at in sorted(set(range(len(DATA))) - contents):
        try:
            problems = opened(flipped(at, mask)).verify()
        except CorruptError:
            continue
        assert problems, f"byte {at} is not covered"


def test_each_truncation_says_how_much_is_missing() -> None:
    for size in range(len(DATA)):
        with pytest.raises(TruncatedError) as caught:
            opened(DATA[:size])
        assert caught.value.have == size < caught.value.want <= len(DATA), size


def test_a_damaged_manifest_is_corrupt_and_a_foreign_one_untrusted() -> None:
    with pytest.raises(CorruptError) as caught:
        opened(flipped(END.offset + 40))
    assert caught.value.have != caught.value.want
    with pytest.raises(UntrustedError, match=DIGEST):
        open_bundle(DATA, manifest_sha256="0" * 64)
    with pytest.raises(UntrustedError, match="trusted: none"):
        open_bundle(DATA, manifest_sha256=[])
    assert open_bundle(DATA, manifest_sha256=["0" * 64, DIGEST]).manifest == MANIFEST


@pytest.mark.parametrize("junk", [b"x", b"junk of some length" * 20, DATA + b"\0", b"\0" + DATA, TEXT, FRAME])
def test_what_is_no_bundle_is_corrupt(junk: bytes) -> None:
    with pytest.raises(CorruptError):
        opened(junk)


def test_another_zip_writer_is_refused() -> None:
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST_NAME, FRAME)
    with pytest.raises(CorruptError):
        opened(other.getvalue())


def test_the_manifest_is_trusted_before_it_is_decompressed_and_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(_: bytes) -> Manifest:
        raise AssertionError("looked into before it was trusted")

    for name in ("manifest_text", "parse_manifest"):
        monkeypatch.setattr(bundle_module, name, look)
    with pytest.raises(UntrustedError):
        open_bundle(DATA, manifest_sha256="0" * 64)
    with pytest.raises(CorruptError):
        opened(flipped(END.offset + 40))


def test_the_manifest_is_one_frame_of_the_form_of_all_others() -> None:
    assert manifest_frame(TEXT) == FRAME and hashlib.sha256(FRAME).hexdigest() == DIGEST
    for frame in (FRAME, *(DATA[d.offset : d.offset + d.length] for d in MANIFEST.dictionaries)):
        found = zstandard.get_frame_parameters(frame)
        assert (found.dict_id, found.has_checksum) == (0, False) and found.content_size > 0
    assert zstandard.get_frame_parameters(FRAME).content_size == len(TEXT) > len(FRAME)


def test_a_bundle_of_the_older_form_is_called_old() -> None:
    """Its manifest was not compressed, and had another name."""
    with zipfile.ZipFile(io.BytesIO(DATA)) as archive:
        files = [(name, archive.read(name)) for name in archive.namelist()[:-1]]
    data = write_archive([*files, ("manifest.json", TEXT)])
    with pytest.raises(IncompatibleError, match="from an older version of machete-aot"):
        open_bundle(data, manifest_sha256=hashlib.sha256(TEXT).hexdigest())
    data, digest = with_stored(TEXT)  # as where a mirror's manifest is such a one
    with pytest.raises(IncompatibleError, match="from an older version of machete-aot"):
        open_bundle(data, manifest_sha256=digest)
    with pytest.raises(CorruptError):
        open_bundle(write_archive([*files, ("manifest.txt", TEXT)]), manifest_sha256=DIGEST)


def test_a_manifest_above_the_limit_is_not_even_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", len(FRAME))
    assert opened().verify() == []
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", len(FRAME) - 1)
    with pytest.raises(CorruptError, match="at most"):
        opened()


def test_a_frame_is_checked_before_it_is_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = opened(flipped(MANIFEST.kernels[0].frame.offset + 5))
    assert bundle.cubin(MANIFEST.kernels[2].id)  # decompresses the dictionary

    def decompress(*_: object) -> bytes:
        raise AssertionError("decompressed before its digest was checked")

    monkeypatch.setattr(bundle_module, "decompress", decompress)
    with pytest.raises(CorruptError) as caught:
        bundle.cubin(MANIFEST.kernels[0].id)
    assert caught.value.want == MANIFEST.kernels[0].frame.sha256


def with_first_kernel(change: Callable[[bytes], bytes], size: int) -> tuple[bytes, str, str]:
    """A bundle whose first frame is ``change``d and vouched for by its manifest, with a cubin size of ``size``."""
    kernel = MANIFEST.kernels[0]
    frame = change(DATA[kernel.frame.offset : kernel.frame.offset + kernel.frame.length])
    moved = len(frame) - kernel.frame.length
    kernels = []
    for k in MANIFEST.kernels:
        shift = moved if k.frame.offset > kernel.frame.offset else 0
        kernels.append(dataclasses.replace(k, frame=dataclasses.replace(k.frame, offset=k.frame.offset + shift)))
    info = dataclasses.replace(kernels[0].frame, length=len(frame), sha256=hashlib.sha256(frame).hexdigest())
    kernels[0] = dataclasses.replace(kernels[0], frame=info, cubin=dataclasses.replace(kernel.cubin, size=size))
    data, digest = rewritten(dataclasses.replace(MANIFEST, kernels=tuple(kernels)), **{f"frames/{kernel.id}": frame})
    return data, digest, kernel.id


SIZE = MANIFEST.kernels[0].cubin.size
BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 28))


@pytest.mark.parametrize(
    ("change", "size"),
    [
        (lambda frame: BOMB, SIZE),
        (lambda frame: frame, SIZE - 1),
        (lambda frame: frame + b"\0", SIZE),
        (lambda frame: frame[:-1], SIZE),
        (lambda frame: b"not zstd at all", SIZE),
        (lambda frame: zstandard.ZstdCompressor().compress(bytes(SIZE)), SIZE),
        (lambda frame: zstandard.ZstdCompressor(write_content_size=False).compress(bytes(SIZE)), SIZE),
    ],
    ids=["bomb", "other size", "extra byte", "short", "no zstd", "other content", "no size"],
)
def test_frames_that_do_not_hold_what_is_announced(change: Callable[[bytes], bytes], size: int) -> None:
    data, digest, name = with_first_kernel(change, size)
    bundle = open_bundle(data, manifest_sha256=digest)
    with pytest.raises(CorruptError):
        bundle.cubin(name)
    assert any(name in str(p) for p in bundle.verify())
    assert bundle.cubin(MANIFEST.kernels[1].id)


def test_offsets_past_the_end_are_truncation() -> None:
    kernel = MANIFEST.kernels[0]
    moved = dataclasses.replace(kernel, frame=dataclasses.replace(kernel.frame, offset=1 << 20))
    data, digest = rewritten(dataclasses.replace(MANIFEST, kernels=(moved, *MANIFEST.kernels[1:])))
    bundle = open_bundle(data, manifest_sha256=digest)
    with pytest.raises(TruncatedError) as caught:
        bundle.cubin(kernel.id)
    assert caught.value.want == (1 << 20) + kernel.frame.length
    assert bundle.verify()


def test_a_crc_that_is_wrong_in_both_headers_is_found() -> None:
    kernel = MANIFEST.kernels[0]
    content = DATA[kernel.frame.offset : kernel.frame.offset + kernel.frame.length]
    crc = zlib.crc32(content).to_bytes(4, "little")
    assert DATA.count(crc) == 2
    bundle = opened(DATA.replace(crc, bytes(4)))
    assert [p.want for p in bundle.verify() if isinstance(p, CorruptError)] == ["crc32 00000000"]
    assert bundle.cubin(kernel.id)


def test_a_dictionary_of_other_content_is_corrupt() -> None:
    first = MANIFEST.dictionaries[0]
    others = dataclasses.replace(first, raw_sha256="0" * 64), *MANIFEST.dictionaries[1:]
    data, digest = rewritten(dataclasses.replace(MANIFEST, dictionaries=others))
    bundle = open_bundle(data, manifest_sha256=digest)
    (problem,) = bundle.verify()
    assert isinstance(problem, CorruptError)
    assert (problem.have, problem.want) == (first.raw_sha256, "0" * 64)
    assert all(bundle.cubin(k.id) for k in MANIFEST.kernels)  # whose own digests are right


def test_a_kernel_needs_the_dictionary_of_its_family_alone() -> None:
    flat, stream = MANIFEST.dictionaries
    assert (flat.family, stream.family) == ("flat", "stream")
    bundle = opened(flipped(flat.offset + 3))
    for kernel in MANIFEST.kernels:
        if kernel.tile.family == "stream":
            assert bundle.cubin(kernel.id)
        else:
            with pytest.raises(CorruptError, match="dictionary 'flat'"):
                bundle.cubin(kernel.id)
    damaged, crc = map(str, bundle.verify())
    assert "dictionary 'flat'" in damaged and "crc32" in crc


def test_verify_lists_all_problems() -> None:
    damaged = bytearray(DATA)
    for kernel in MANIFEST.kernels[:2]:
        damaged[kernel.frame.offset + 3] ^= 1
    for dictionary in MANIFEST.dictionaries:
        damaged[dictionary.offset + 3] ^= 1
    text = "\n".join(map(str, opened(bytes(damaged)).verify()))
    for what in ("the dictionary 'flat'", "the dictionary 'stream'", *(k.id for k in MANIFEST.kernels[:2])):
        assert what in text
    assert MANIFEST.kernels[2].id not in text


def test_incompatible_bundles_say_why() -> None:
    other = dataclasses.replace(
        MANIFEST,
        abi=dataclasses.replace(MANIFEST.abi, version=99),
        layouts=(LayoutInfo("n64k64-u4", 7), LayoutInfo("banana", 1)),
    )
    data, digest = rewritten(other)
    with pytest.raises(IncompatibleError) as caught:
        open_bundle(data, manifest_sha256=digest)
    assert [p.split(",")[0] for p in caught.value.problems] == [
        "ABI 99 with parameters ((0",
        "layout n64k64-u4 version 7",
        "layout banana version 1",
    ]


def test_newer_schemas_and_invalid_manifests() -> None:
    data, digest = rewritten(json.dumps({"schema": SCHEMA + 1}).encode())
    with pytest.raises(SchemaTooNewError):
        open_bundle(data, manifest_sha256=digest)
    data, digest = rewritten(json.dumps({"schema": SCHEMA - 1}).encode())
    with pytest.raises(IncompatibleError, match="from an older version"):
        open_bundle(data, manifest_sha256=digest)
    data, digest = rewritten(json.dumps({"schema": SCHEMA}).encode())
    with pytest.raises(BundleError) as caught:
        open_bundle(data, manifest_sha256=digest)
    assert len(caught.value.problems) == 11


def test_missing_kernels() -> None:
    with pytest.raises(MissingError, match="no kernel 'banana'"):
        opened().cubin("banana")


def test_reading_from_threads() -> None:
    bundle = opened()
    names = [k.id for k in MANIFEST.kernels] * 50
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(bundle.cubin, names))
    assert [hashlib.sha256(c).hexdigest() for c in found] == [MANIFEST.kernel(n).cubin.sha256 for n in names]


def test_every_error_is_the_packages_own() -> None:
    errors = [MissingError, TruncatedError, CorruptError, SchemaTooNewError, UntrustedError, IncompatibleError]
    assert all(issubclass(e, BundleError) and issubclass(e, MacheteError) for e in errors)


class CountingData(MemoryData):
    """Bytes that are not at hand as a whole; ``reads`` lists what was asked for."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return super().read(offset, length)

    def whole(self) -> None:  # type: ignore[override]
        return None


def test_a_bundle_can_be_put_together_from_its_frames() -> None:
    data = CountingData(DATA)
    bundle = open_manifest(FRAME, lambda _: data, "elsewhere", [DIGEST])
    assert data.reads == [] and bundle.size == len(DATA)
    assert bundle.to_bytes() == DATA
    assert sorted(data.reads) == sorted(frame_digests(MANIFEST))
    assert bundle.verify() == [] and bundle.manifest_bytes == FRAME
    kernel = MANIFEST.kernels[1]
    shared = MANIFEST.dictionary_of(kernel)
    assert shared and list(frame_digests(MANIFEST, [kernel.id]).values()) == [shared.sha256, kernel.frame.sha256]


def test_a_damaged_bundle_is_not_copied() -> None:
    for at in (0, MANIFEST.kernels[0].frame.offset + 1, len(DATA) - 60):
        try:
            bundle = opened(flipped(at))
        except CorruptError:
            continue
        with pytest.raises(CorruptError):
            bundle.to_bytes()
    assert opened().to_bytes() == DATA


def test_what_is_not_all_here_is_an_archive_too_short() -> None:
    """An end record alone, which says that the directory begins at once."""
    with pytest.raises(CorruptError, match="no room for an entry"):
        opened(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, 0, 0, 0))


def test_the_size_follows_from_the_manifest() -> None:
    assert bundle_size(MANIFEST, len(FRAME)) == len(DATA)


def test_what_was_parsed_is_remembered_by_digest_alone(tmp_path: Path) -> None:
    """Same path, size and time stamps: the bytes decide, and an untrusted manifest is never taken from memory."""
    path = tmp_path / "b.zip"
    path.write_bytes(DATA)
    os.utime(path, (1000, 1000))
    first = open_bundle(path, manifest_sha256=DIGEST)
    assert open_bundle(path, manifest_sha256=DIGEST).manifest is first.manifest
    with pytest.raises(UntrustedError):
        open_bundle(path, manifest_sha256="0" * 64)
    path.write_bytes(flipped(END.offset + 40))
    os.utime(path, (1000, 1000))
    with pytest.raises(CorruptError):
        open_bundle(path, manifest_sha256=DIGEST)


def test_many_manifests_are_not_all_remembered() -> None:
    for i in range(20):
        info = dataclasses.replace(MANIFEST.bundle, version=f"0.1.{i}")
        data, digest = rewritten(dataclasses.replace(MANIFEST, bundle=info))
        assert open_bundle(data, manifest_sha256=digest).manifest.bundle.version == f"0.1.{i}"
    assert len(bundle_module._parsed_manifests) <= 8
