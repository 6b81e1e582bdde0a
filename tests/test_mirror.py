# SPDX-License-Identifier: Apache-2.0
"""The folder of a mirror: what export writes, what its index may say, and which kernels a selection means."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from machete_aot.bundle import Bundle, open_bundle
from machete_aot.errors import ArgumentError, BundleError, CorruptError, UnreachableError
from machete_aot.frames import manifest_text
from machete_aot.index import INDEX_NAME, IndexEntry, conventional_entry, dump_index, parse_index, version_key
from machete_aot.manifest import parse_manifest
from machete_aot.mirror import export_bundle
from machete_aot.part import H100
from machete_aot.selection import select
from machete_aot.subset import kernel_ids
from small_bundle import SCHEDULES, TILES, TYPES, rewritten, small_bundle

DATA, FRAME, DIGEST = small_bundle()
MANIFEST = parse_manifest(manifest_text(FRAME))
FILES = ["index.json", "machete-aot-sm90a-0.1.0.json.zst", "machete-aot-sm90a-0.1.0.zip"]


def opened() -> Bundle:
    return open_bundle(DATA, manifest_sha256=DIGEST)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_export_writes_what_is_documented(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "mirror"
    written = export_bundle(opened(), folder)
    assert sorted(p.name for p in written) == names(folder) == FILES
    assert (folder / FILES[1]).read_bytes() == FRAME and (folder / FILES[2]).read_bytes() == DATA
    assert json.loads((folder / INDEX_NAME).read_bytes()) == {
        "schema": 1,
        "bundles": [
            {
                "arch": "sm90a",
                "version": "0.1.0",
                "file": FILES[2],
                "size": len(DATA),
                "manifest": FILES[1],
                "manifest_sha256": DIGEST,
            }
        ],
    }
    before = (folder / INDEX_NAME).read_bytes()
    export_bundle(opened(), folder)
    assert (folder / INDEX_NAME).read_bytes() == before


def test_export_keeps_other_versions_and_drops_stale_signatures(tmp_path: Path) -> None:
    versions = ("0.1.0", "0.10.0", "0.9.0")
    for version in versions:
        data, digest = rewritten(
            dataclasses.replace(MANIFEST, bundle=dataclasses.replace(MANIFEST.bundle, version=version))
        )
        bundle = open_bundle(data, manifest_sha256=digest)
        bundle.signature = b"signature\n"
        export_bundle(bundle, tmp_path)
    assert [e.version for e in parse_index((tmp_path / INDEX_NAME).read_bytes())] == ["0.1.0", "0.9.0", "0.10.0"]
    assert "machete-aot-sm90a-0.1.0.json.zst.sig" in names(tmp_path) and len(names(tmp_path)) == 10
    export_bundle(opened(), tmp_path)
    assert "machete-aot-sm90a-0.1.0.json.zst.sig" not in names(tmp_path) and len(names(tmp_path)) == 9


def test_a_damaged_bundle_is_not_exported(tmp_path: Path) -> None:
    damaged = bytearray(DATA)
    damaged[MANIFEST.kernels[0].frame.offset + 1] ^= 1
    with pytest.raises(CorruptError):
        export_bundle(open_bundle(bytes(damaged), manifest_sha256=DIGEST), tmp_path)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UnreachableError, match="cannot be written"):
        export_bundle(opened(), tmp_path / "file")
    assert names(tmp_path) == ["file"]


ENTRY = conventional_entry("sm90a", "0.1.0", 5, DIGEST)


def test_the_index_round_trips() -> None:
    entries = (ENTRY, conventional_entry("sm90a", "0.2.0", 6, DIGEST))
    assert parse_index(dump_index(reversed(entries))) == entries


@pytest.mark.parametrize(
    "document",
    [
        "",
        "[]",
        "{}",
        '{"schema": 1}',
        '{"schema": 1, "bundles": [], "more": 1}',
        '{"schema": 2, "bundles": []}',
        '{"schema": 1, "bundles": [{}]}',
        '{"schema": 1, "schema": 1, "bundles": []}',
        "<html></html>",
        "[" * 100_000,
    ],
)
def test_indexes_that_are_not_valid(document: str) -> None:
    with pytest.raises(BundleError, match="not valid"):
        parse_index(document.encode())


@pytest.mark.parametrize(
    "name", ["../a.zip", "/a.zip", "a/b.zip", "", ".zip", "a\\b.zip", "a.zip?x", "x" * 300, "é.zip"]
)
@pytest.mark.parametrize("field", ["file", "manifest"])
def test_names_that_are_no_plain_names(name: str, field: str) -> None:
    entry: IndexEntry = dataclasses.replace(ENTRY, **{field: name})
    with pytest.raises(BundleError) as caught:
        parse_index(dump_index([entry]))
    assert len(caught.value.problems) == 1


def test_versions_are_ordered_by_their_numbers() -> None:
    assert sorted(["0.10.0", "0.9.1", "1.0", "0.9.1.1"], key=version_key) == ["0.9.1", "0.9.1.1", "0.10.0", "1.0"]
    assert version_key("9" * 5000)


def ids(*pairs: tuple[int, int]) -> list[str]:
    """Kernel ids of (index of types, index of tile), in manifest order."""
    wanted = {f"{TYPES[t].name}__{TILES[i].name}" for t, i in pairs}
    return [k.id for k in MANIFEST.kernels if k.id in wanted]


def test_selections_of_kernels() -> None:
    bf16, fp16 = (t.name for t in TYPES)
    stream, flat = SCHEDULES[1].name, SCHEDULES[2].name
    everything = [k.id for k in MANIFEST.kernels]
    assert kernel_ids(MANIFEST, [bf16]) == ids((0, 0), (0, 1))
    assert kernel_ids(MANIFEST, [bf16, fp16]) == everything
    assert kernel_ids(MANIFEST, [flat]) == ids((0, 1), (1, 1))
    assert kernel_ids(MANIFEST, [stream, flat]) == everything
    assert kernel_ids(MANIFEST, [fp16, stream]) == ids((1, 0))
    tile = select(MANIFEST, bf16, 1, 4096, 4096, H100).tile
    assert kernel_ids(MANIFEST, [bf16, (1, 4096, 4096)]) == [f"{bf16}__{tile}"]
    assert kernel_ids(MANIFEST, [(1, 4096, 4096)]) == [k for k in everything if k.endswith(tile)]


@pytest.mark.parametrize("only", [[], "bf16_u4b8", ["banana"], [(1, 2)], [(0, 1, 1)], [("a", 1, 1)], [3], [None]])
def test_selections_that_mean_nothing(only: list[str]) -> None:
    with pytest.raises(ArgumentError, match="only="):
        kernel_ids(MANIFEST, only)
