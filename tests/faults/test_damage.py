# SPDX-License-Identifier: Apache-2.0
"""Bundles damaged at random: whatever comes out of one was packed into it, and every error is the package's own.

The cubins are compared with what was packed, not with what the manifest says of them.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from machete_aot.archive import last_entry
from machete_aot.bundle import MANIFEST_NAME, open_bundle
from machete_aot.bundle_data import MemoryData
from machete_aot.errors import MacheteError
from machete_aot.fetch import fetch_bundle
from places import CUBINS, DATA, DIGEST, JSON, KERNELS, MANIFEST, TEXT, ZIP, newer, write_mirror
from small_bundle import rewritten

BYTE_CASES, MANIFEST_CASES, FILE_CASES = 6500, 2500, 1000  # together 10,000
QUICK = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))

END = last_entry(MemoryData(DATA), MANIFEST_NAME)
EDGES = sorted(
    {0, 4, 18, 26, 30, END.offset, END.offset + END.size, len(DATA) - 22, len(DATA) - 12, len(DATA) - 1}
    | {f.offset + d for k in MANIFEST.kernels for f in (k.frame,) for d in (-40, -4, 0, 4, f.length - 1)}
    | {d.offset + at for d in MANIFEST.dictionaries for at in (0, 9)}
)
PLACES = st.one_of(
    st.integers(0, len(DATA) - 1),
    st.tuples(st.sampled_from(EDGES), st.integers(-6, 6)).map(lambda p: min(max(sum(p), 0), len(DATA) - 1)),
)
LENGTHS = st.one_of(st.integers(1, 8), st.integers(1, len(DATA)))

Operation = Callable[[bytearray, int, int, bytes], None]


def _flip(data: bytearray, at: int, _: int, salt: bytes) -> None:
    if at < len(data):
        data[at] ^= salt[0] or 1


def _overwrite(data: bytearray, at: int, length: int, salt: bytes) -> None:
    data[at : at + length] = (salt * (length // len(salt) + 1))[: max(0, min(length, len(data) - at))]


def _delete(data: bytearray, at: int, length: int, _: bytes) -> None:
    del data[at : at + length]


def _insert(data: bytearray, at: int, length: int, salt: bytes) -> None:
    data[at:at] = (salt * (length // len(salt) + 1))[:length]


def _repeat(data: bytearray, at: int, length: int, _: bytes) -> None:
    data[at:at] = data[at : at + length]


def _cut(data: bytearray, at: int, *_: object) -> None:
    del data[at:]


def _move(data: bytearray, at: int, length: int, salt: bytes) -> None:
    part = data[at : at + length]
    del data[at : at + length]
    to = int.from_bytes(salt[:2], "little") % (len(data) + 1)
    data[to:to] = part


def _graft(data: bytearray, at: int, length: int, _: bytes) -> None:
    """A part of another valid bundle at the same place."""
    data[at : at + length] = newer()[0][at : at + length]


OPERATIONS: tuple[Operation, ...] = (_flip, _flip, _overwrite, _delete, _insert, _repeat, _cut, _move, _graft)
STEPS = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), PLACES, LENGTHS, st.binary(min_size=2, max_size=8)), min_size=1, max_size=4
)


def damaged(steps: list[tuple[Operation, int, int, bytes]]) -> bytes:
    data = bytearray(DATA)
    for operation, at, length, salt in steps:
        operation(data, at, length, salt)
    return bytes(data)


def kernels_that_come_out(data: bytes, digest: str = DIGEST) -> Iterator[tuple[str, bytes]]:
    """What a loader would get. Only the package's own errors may keep it from that."""
    try:
        bundle = open_bundle(data, manifest_sha256=digest)
        assert all(isinstance(p, MacheteError) for p in bundle.verify())
        names = [k.id for k in bundle.manifest.kernels]
    except MacheteError:
        return
    for name in names:
        try:
            yield name, bundle.cubin(name)
        except MacheteError:
            continue


def test_random_damage_to_a_bundle(counts: Counter[str]) -> None:
    tried = Counter[str]()

    @settings(max_examples=BYTE_CASES, **QUICK)
    @given(STEPS)
    def check(steps: list[tuple[Operation, int, int, bytes]]) -> None:
        data = damaged(steps)
        got = dict(kernels_that_come_out(data))
        assert all(CUBINS[name] == cubin for name, cubin in got.items())
        if len(got) == len(KERNELS) and open_bundle(data, manifest_sha256=DIGEST).verify() == []:
            assert data == DATA
        tried["damaged bundles"] += 1
        tried["of them opened in part"] += len(got) > 0

    check()
    assert tried["damaged bundles"] >= BYTE_CASES
    assert 100 < tried["of them opened in part"] < BYTE_CASES  # the damage is neither harmless nor always fatal
    counts["damaged bundles"] += tried["damaged bundles"]


DOCUMENT = json.loads(TEXT)
VALUES = st.sampled_from(
    [
        *(
            None,
            True,
            -1,
            0,
            1,
            7,
            2**31,
            2**53,
            2**80,
            1e308,
            -0.5,
            [],
            {},
            [[[]]],
            {"a": {"b": []}},
            [0, 0],
            [1] * 300,
        ),
        *("", "x", "../../etc/passwd", "/abs", "\0", "é" * 40, "0" * 64, "y" * 2000, "n64k64-u4", "stream", "bf16"),
    ]
)
DELETE, ADD, REPEAT, REPLACE = "delete", "add", "repeat", "replace"


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _paths(child, (*path, key))


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(list(_paths(DOCUMENT))), st.sampled_from((DELETE, ADD, REPEAT, REPLACE, REPLACE)), VALUES
    ),
    min_size=1,
    max_size=3,
)


def _change(document: Any, path: tuple[Any, ...], kind: str, value: Any) -> None:
    """Changes the document at ``path``, if an earlier change left anything there."""
    try:
        for key in path[:-1]:
            document = document[key]
        old = document[path[-1]]
    except (KeyError, IndexError, TypeError):
        return
    if not isinstance(document, dict | list):
        return
    if kind == DELETE:
        del document[path[-1]]
    elif kind == REPLACE:
        document[path[-1]] = value
    elif isinstance(document, list):
        document.append(copy.deepcopy(old) if kind == REPEAT else value)
    else:
        document["unknown"] = value


def test_random_damage_to_a_manifest_that_is_vouched_for(counts: Counter[str]) -> None:
    """The digest is right and the content is not: nothing but errors of ours, and no cubin unlike its digest."""
    tried = Counter[str]()

    @settings(max_examples=MANIFEST_CASES, **QUICK)
    @given(CHANGES)
    def check(changes: list[tuple[tuple[Any, ...], str, Any]]) -> None:
        document = copy.deepcopy(DOCUMENT)
        for change in changes:
            _change(document, *change)
        data, digest = rewritten(json.dumps(document).encode())
        for name, cubin in kernels_that_come_out(data, digest):
            assert cubin == CUBINS[name]
            tried["kernels"] += 1
        tried["manifests"] += 1

    check()
    assert tried["manifests"] >= MANIFEST_CASES
    assert tried["kernels"]
    counts["damaged manifests"] += tried["manifests"]


def test_random_damage_to_the_files_of_a_mirror_and_a_cache(tmp_path: Path, counts: Counter[str]) -> None:
    """fetch_bundle on a folder whose files are damaged, the index and the detached manifest too."""
    mirror = write_mirror(tmp_path / "mirror")
    original = {p.name: p.read_bytes() for p in mirror.iterdir()}
    tried = Counter[str]()

    @settings(max_examples=FILE_CASES, **QUICK)
    @given(st.sampled_from([ZIP, JSON, "index.json"]), STEPS)
    def check(name: str, steps: list[tuple[Operation, int, int, bytes]]) -> None:
        data = bytearray(original[name])
        for operation, at, length, salt in steps:
            operation(data, at * len(data) // len(DATA), length, salt)
        (mirror / name).write_bytes(data)
        try:
            bundle = fetch_bundle(source=mirror, cache_dir=tmp_path / "cache", expected_sha256=DIGEST)
            assert all(isinstance(p, MacheteError) for p in bundle.verify())
            for kernel in KERNELS:
                try:
                    assert bundle.cubin(kernel) == CUBINS[kernel]
                    tried["kernels"] += 1
                except MacheteError:
                    continue
        except MacheteError:
            tried["refused"] += 1
        finally:
            (mirror / name).write_bytes(original[name])
        tried["files"] += 1

    check()
    assert tried["files"] >= FILE_CASES
    assert tried["kernels"]
    counts["damaged mirror files"] += tried["files"]


@pytest.mark.parametrize("region", ["dictionary", "frame", "manifest", "zip headers", "zip directory", "zip end"])
def test_a_bit_flip_in_every_byte_of_a_region(region: str, counts: Counter[str]) -> None:
    frame, dictionary = MANIFEST.kernels[0].frame, MANIFEST.dictionaries[0]
    directory = END.offset + END.size
    regions = {
        "dictionary": range(dictionary.offset, dictionary.offset + dictionary.length),
        "frame": range(frame.offset, frame.offset + frame.length),
        "manifest": range(END.offset, END.offset + END.size, 7),
        "zip headers": range(dictionary.offset),
        "zip directory": range(directory, len(DATA) - 22),
        "zip end": range(len(DATA) - 22, len(DATA)),
    }
    for at in regions[region]:
        for bit in range(8) if region.startswith("zip") else (at % 8,):
            data = bytearray(DATA)
            data[at] ^= 1 << bit
            got = dict(kernels_that_come_out(bytes(data)))
            assert all(CUBINS[name] == cubin for name, cubin in got.items())
            with pytest.raises(MacheteError):
                problems = open_bundle(bytes(data), manifest_sha256=DIGEST).verify()
                raise problems[0]
            counts["bits flipped"] += 1
