# SPDX-License-Identifier: Apache-2.0
"""The manifest's parser: accepts what the writer writes, reports all else, never fails in another way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from machete_aot.config import ProductTypes, TileConfig, TypeConfig
from machete_aot.decode import MAX_INTEGER, MAX_STRING, _column_decoder, _Misfit, decode, decode_and_explain
from machete_aot.errors import BundleError, IncompatibleError, MissingError, SchemaTooNewError
from machete_aot.frames import manifest_text
from machete_aot.manifest import Manifest, dump_manifest, kernel_id, parse_manifest
from machete_aot.manifest_rules import SCHEMA
from small_bundle import SCHEDULES, TILES, TYPES, small_bundle

TEXT = manifest_text(small_bundle()[1])
DOCUMENT = json.loads(TEXT)
MANIFEST = parse_manifest(TEXT)


def problems_of(change: Callable[[Any], None]) -> tuple[str, ...]:
    document = copy.deepcopy(DOCUMENT)
    change(document)
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(document).encode())
    assert caught.value.problems
    return caught.value.problems


def test_writing_is_the_inverse_of_parsing() -> None:
    assert dump_manifest(MANIFEST) == TEXT
    assert parse_manifest(dump_manifest(MANIFEST)) == MANIFEST


def test_canonical_form() -> None:
    assert json.dumps(DOCUMENT, sort_keys=True, indent=0, separators=(",", ":")).encode() + b"\n" == TEXT
    assert list(DOCUMENT) == sorted(DOCUMENT)


def test_every_field_of_the_contract_is_there() -> None:
    assert set(DOCUMENT) == {
        *("schema", "bundle", "abi", "layouts", "toolchain", "provenance", "compat"),
        *("dictionaries", "kernels", "helpers", "schedules", "heuristic"),
    }
    assert DOCUMENT["abi"] == {"version": 8, "parameters": [[0, 384], [384, 136]]}
    assert DOCUMENT["compat"] == {"compute_capability": [9, 0], "min_driver": 12000, "elf_abi": 7}
    kernel = DOCUMENT["kernels"][0]
    assert kernel["symbol"] == "machete_" + kernel["id"]
    assert set(kernel) == {
        *("id", "symbol", "layout", "types", "tile", "threads", "registers", "spills", "static_shared_memory"),
        *("frame", "cubin"),
    }
    assert [set(s) for s in DOCUMENT["schedules"]] == [{"name", "tile", "split", "even_ctas", "types"}] * 4


def test_lookups() -> None:
    bf16, stream = TYPES[0], TILES[0]
    assert MANIFEST.types == TYPES
    assert {k.tile for k in MANIFEST.kernels_for(bf16)} == set(TILES)
    assert [s.name for s in MANIFEST.schedules_for(bf16)] == [s.name for s in SCHEDULES]
    kernel = MANIFEST.kernel(kernel_id(bf16, stream.name))
    assert (kernel.types, kernel.tile) == (bf16, stream)
    assert MANIFEST.kernel_for(bf16, SCHEDULES[1].name) is kernel
    assert MANIFEST.schedule(SCHEDULES[1].name).types == tuple(t.name for t in TYPES)
    assert [s.name for s in MANIFEST.schedules_of(kernel)] == [s.name for s in SCHEDULES if s.tile == stream]
    assert MANIFEST.types_for(ProductTypes("bf16", "u4b8", "none", False)) == bf16
    assert MANIFEST.types_for(ProductTypes("bf16", "u4", "none", False)) is None


def test_lookups_of_what_is_not_there() -> None:
    other = TypeConfig("bf16", "u8b128", "bf16")
    assert MANIFEST.kernels_for(other) == MANIFEST.schedules_for(other) == ()
    for look_up in (MANIFEST.kernel, MANIFEST.schedule):
        with pytest.raises(MissingError, match="no_such_thing"):
            look_up("no_such_thing")


def test_a_newer_schema_is_told_from_a_damaged_manifest() -> None:
    with pytest.raises(SchemaTooNewError) as caught:
        parse_manifest(json.dumps({"schema": SCHEMA + 1, "unheard": "of"}).encode())
    assert (caught.value.have, caught.value.want) == (SCHEMA + 1, SCHEMA) == (7, 6)


@pytest.mark.parametrize("schema", [1, 2, 3, 4, 5])
def test_an_older_schema_is_told_from_a_damaged_manifest(schema: int) -> None:
    """Its other fields are those of that schema, and say nothing about damage."""
    with pytest.raises(IncompatibleError, match=f"schema {schema}, from an older version of machete-aot") as caught:
        parse_manifest(json.dumps({"schema": schema, "heard": "of"}).encode())
    assert caught.value.problems == (f"schema: {schema} is not 6",)


def test_types_may_share_a_tile_and_divide_k_otherwise() -> None:
    """Schedules are those of their types, not of all that have a kernel with the tile."""

    def change(document: Any) -> None:
        (schedule,) = (s for s in document["schedules"] if s["name"] == SCHEDULES[1].name)
        schedule["types"] = [TYPES[1].name]
        del document["heuristic"]["tables"][0]["coefficients"][TYPES[0].name][SCHEDULES[1].name]

    document = copy.deepcopy(DOCUMENT)
    change(document)
    manifest = parse_manifest(json.dumps(document).encode())
    first, second = ([s.name for s in manifest.schedules_for(types)] for types in TYPES)
    assert [*first[:1], SCHEDULES[1].name, *first[1:]] == second == [s.name for s in SCHEDULES]
    assert [s.name for s in manifest.schedules_of(manifest.kernel(kernel_id(TYPES[0], TILES[0].name)))] == first[:1]


def test_another_number_of_stages_is_fine_where_they_fit() -> None:
    document = copy.deepcopy(DOCUMENT)
    with_stages(0, 6)(document)
    assert len(parse_manifest(json.dumps(document).encode()).schedules) > len(MANIFEST.schedules)


def test_all_problems_are_listed_at_once() -> None:
    def change(document: Any) -> None:
        document["bundle"]["arch"] = 9
        del document["toolchain"]["nvcc"]
        document["kernels"][1]["threads"] = "many"
        document["surprise"] = 1

    found = "\n".join(problems_of(change))
    for word in ("manifest.bundle.arch", "toolchain.nvcc: missing", "kernels[1].threads", "surprise: unknown"):
        assert word in found


def kernel(**changes: Any) -> Callable[[Any], None]:
    return lambda document: document["kernels"][0].update(changes)


def nested(part: str, **changes: Any) -> Callable[[Any], None]:
    return lambda document: document["kernels"][0][part].update(changes)


def section(name: str, **changes: Any) -> Callable[[Any], None]:
    return lambda document: document[name].update(changes)


def dictionary(**changes: Any) -> Callable[[Any], None]:
    return lambda document: document["dictionaries"][0].update(changes)


def table(**changes: Any) -> Callable[[Any], None]:
    return lambda document: document["heuristic"]["tables"][0].update(changes)


def schedule(index: int, suffix: str, **changes: Any) -> Callable[[Any], None]:
    """Changes a schedule, and its name to its tile's with another suffix."""

    def change(document: Any) -> None:
        found = document["schedules"][index]
        found.update(name=f"{found['tile']}_{suffix}", **changes)

    return change


def with_stages(index: int, stages: int) -> Callable[[Any], None]:
    """Gives a kernel and its schedules a tile of so many stages."""

    def change(document: Any) -> None:
        kernel = document["kernels"][index]
        old = TileConfig(**kernel["tile"])
        tile = replace(old, stages=stages)
        types = TypeConfig(**kernel["types"])
        kernel.update(
            tile=asdict(tile), id=kernel_id(types, tile.name), symbol="machete_" + kernel_id(types, tile.name)
        )
        del document["heuristic"]["tables"][0]
        for found in [s for s in document["schedules"] if s["tile"] == old.name]:
            found["types"].remove(types.name)
            name = found["name"].replace(old.name, tile.name)
            document["schedules"].append({**found, "name": name, "tile": tile.name, "types": [types.name]})

    return change


def swap_frames(document: Any) -> None:
    document["kernels"][0]["frame"]["offset"] = document["kernels"][1]["frame"]["offset"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (kernel(registers=True), "expected int, found bool"),
        (kernel(registers=90.0), "expected int, found float"),
        (kernel(registers=None), "found null"),
        (kernel(registers=2**60), "beyond 2^53"),
        (kernel(registers=256), "registers 256"),
        (kernel(spills=-1), "out of range"),
        (kernel(id="other"), "id should be"),
        (kernel(symbol="machete_other"), "symbol"),
        (kernel(symbol="a\nb"), "not printable"),
        (kernel(layout="n64k64-u8"), "layout"),
        (kernel(threads=321), "threads 321"),
        (kernel(frame=[]), "expected an object, found a list"),
        (nested("tile", family="banana"), "tile.family"),
        (nested("tile", tokens=12), "multiple of 8"),
        (nested("tile", stages=0), "tile.stages: 0"),
        (nested("tile", cluster=3), "tile.cluster: 3 is not within 1..2"),
        (nested("tile", cluster=2, units=3), "tile.cluster: 2 in family 'flat' with 3 units"),
        (nested("tile", cluster=2, units=2, family="stream"), "tile.cluster: 2 in family 'stream'"),
        (lambda d: d["kernels"][0]["tile"].pop("cluster"), "tile.cluster: missing"),
        (nested("types", a="../x"), "types.a"),
        (nested("frame", offset=-1), "frame: bytes -1"),
        (nested("frame", length=0), "frame: bytes"),
        (nested("frame", offset=2**40), "outside"),
        (nested("frame", sha256="AB" * 32), "sha256"),
        (nested("cubin", size=0), "cubin: size 0"),
        (nested("cubin", size=2**30), "cubin: size"),
        (swap_frames, "overlap"),
        (dictionary(raw_size=2**40), "dictionary 'flat': size"),
        (dictionary(offset=0, length=10**6), "overlap"),
        (dictionary(family="stream"), "dictionary 'stream' occurs twice"),
        (dictionary(family="other"), "not one for each family of the kernels, flat, stream"),
        (lambda d: d["dictionaries"].pop(), "not one for each family of the kernels"),
        (section("bundle", version="0 1"), "bundle.version"),
        (section("provenance", source_digest=""), "source_digest"),
        (section("abi", parameters=[[0, 128], [100, 136]]), "abi.parameters"),
        (section("abi", parameters=[[0, 128, 1]]), "expected 2 values, found 3"),
        (table(coefficients={"int3": {}}), "int3"),
        (table(coefficients={TYPES[0].name: {"x": {}}}), "'x', which the bundle lacks"),
        (table(coefficients={TYPES[0].name: {"x": {"y": "z"}}}), "expected float or int, found str"),
        (table(measured={"t": {"products": [[1, 0, 1]], "deviations": {}}}), "a product with a size below 1"),
        (table(measured={"t": {"products": [[1, 1, 1]], "deviations": {"s": "OO"}}}), "2 deviations for 1 products"),
        (table(measured={"t": {"products": [[1, 1, 1]], "deviations": {"s": "~"}}}), "over 44 percent"),
        (table(clock_mhz=0), "must be positive"),
        (lambda d: d["heuristic"]["tables"].append(copy.deepcopy(d["heuristic"]["tables"][0])), "occurs twice"),
        (lambda d: d["kernels"].append(copy.deepcopy(d["kernels"][0])), "occurs twice"),
        (lambda d: d["schedules"].append(d["schedules"][0]), "occurs twice"),
        (lambda d: d["layouts"].append(d["layouts"][0]), "occurs twice"),
        (lambda d: d["schedules"][0].update(split=3), "name should be"),
        (lambda d: d["schedules"][3].update(even_ctas=2), "name should be"),
        (schedule(0, "x0", split=0), "name should be"),
        (schedule(0, "e0", split=0), "split 0 with even_ctas 0: wanted 1..16 with 0, or 0 with 1..32"),
        (schedule(0, "x1", even_ctas=1), "split 1 with even_ctas 1"),
        (schedule(0, "x32", split=32), "split 32 with even_ctas 0"),
        (schedule(0, "x-1", split=-1), "split -1 with even_ctas 0"),
        (schedule(3, "e33", even_ctas=33), "split 0 with even_ctas 33"),
        (schedule(3, "e-1", even_ctas=-1), "split 0 with even_ctas -1"),
        (schedule(0, "e1", split=0, even_ctas=1), "split 0, which family stream does not have"),
        (schedule(3, "x2", split=2, even_ctas=0), "split 2, which family flat does not have"),
        (lambda d: d["schedules"][3].pop("even_ctas"), "even_ctas: missing"),
        (lambda d: d["schedules"][0].update(tile="none"), "no kernel has its tile"),
        (lambda d: d["schedules"][0].update(types=[]), "types: empty"),
        (lambda d: d["schedules"][0].update(types=["bf16_u4b8", "bf16_u4b8"]), "types 'bf16_u4b8' occurs twice"),
        (lambda d: d["schedules"][0].update(types=["bf16_u4_any"]), "no kernel has its tile"),
        (nested("types", b="u9"), "types.b: 'u9' is none of u4b8"),
        (nested("types", zeros="some"), "types.zeros: 'some' is none of none, float"),
        (with_stages(0, 64), "bytes of shared memory for bf16_u4b8, where a CTA has 232448 at most"),
        (lambda d: d.update(schema=0), "schema: 0"),
        (lambda d: d.update(schema="1"), "expected int"),
        (lambda d: d.update(kernels=[]), "kernels: empty"),
    ],
)
def test_violations(change: Callable[[Any], None], word: str) -> None:
    assert any(word in problem for problem in problems_of(change)), problems_of(change)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
        b'{"schema": NaN}',
        b'{"schema": 1, "schema": 1}',
        b"null",
        b'"\\ud800"',
        TEXT[:-3],
        TEXT + b"x",
        TEXT.replace(b'"registers":90', b'"registers":90,"registers":90', 1),
        TEXT.replace(b'"fixed_us":1.5', b'"fixed":1e999', 1),
        TEXT.replace(b'"fixed_us":1.5', b'"fixed":Infinity', 1),
        b" " * (16 << 20) + TEXT,
    ],
)
def test_hostile_bytes(data: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        parse_manifest(data)
    assert caught.value.problems


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4))


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(p for key, child in items for p in paths(child, (*prefix, key)))]


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(paths(DOCUMENT)[1:]), value=VALUES, drop=st.booleans())
def test_any_change_is_rejected_or_harmless(path: tuple[Any, ...], value: Any, drop: bool) -> None:
    document = copy.deepcopy(DOCUMENT)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if drop:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    try:
        parsed = parse_manifest(json.dumps(document).encode())
    except BundleError as e:
        assert e.problems or isinstance(e, SchemaTooNewError)
    else:
        assert json.loads(dump_manifest(parsed)) == document


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:0123456789eE+-.ntrufalse \\', max_size=200).map(str.encode))
def test_any_bytes_are_rejected(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.integers(1, 255))
def test_flipped_bytes_never_escape_as_other_errors(at: int, mask: int) -> None:
    damaged = bytearray(TEXT)
    damaged[at] ^= mask
    try:
        assert parse_manifest(bytes(damaged)) != MANIFEST or json.loads(damaged) == DOCUMENT
    except BundleError as e:
        assert e.problems or isinstance(e, SchemaTooNewError)


@dataclass(frozen=True)
class Pair:
    """All of its fields are of str or int: equal ones are made once."""

    name: str
    count: int


@dataclass(frozen=True)
class Everything:
    """A field of each form that annotations may have."""

    text: str
    ratio: float
    maybe: float | None
    flag: bool
    several: tuple[int | str, ...]
    spans: tuple[tuple[int, float], ...]
    pairs: tuple[Pair, ...]
    table: Mapping[str, Mapping[str, float]]


def decoders_agree(kind: Any, document: Any) -> bool:
    """Whether the document is of this kind, about which both decoders must be of one opinion."""
    problems: list[str] = []
    explained = decode_and_explain(kind, document, "it", problems)
    try:
        by_columns = _column_decoder(kind)([document])[0]
    except _Misfit:
        assert problems
        return False
    assert not problems
    assert repr(by_columns) == repr(explained)  # tells 1 from 1.0, and 0.0 from -0.0
    return True


def changed(document: Any, path: tuple[Any, ...], value: Any, drop: bool) -> Any:
    """A copy in which another value is at this path, or none."""
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if drop:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


def texts(most: int = 3) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=most)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2)
EVERYTHING = st.fixed_dictionaries(
    {
        "text": texts(),
        "ratio": NUMBERS,
        "maybe": st.none() | NUMBERS,
        "flag": st.booleans(),
        "several": st.lists(st.integers(-(2**53), 2**53) | texts(), max_size=4),
        "spans": st.lists(st.tuples(st.integers(-2, 2), NUMBERS).map(list), max_size=3),
        "pairs": st.lists(st.fixed_dictionaries({"name": texts(1), "count": st.integers(0, 1)}), max_size=4),
        "table": st.dictionaries(texts(), st.dictionaries(texts(), NUMBERS, max_size=3), max_size=3),
    }
)
MISFITS = st.sampled_from(
    [
        *(True, None, 1, 1.0, -0.0, 2**53, -(2**53) - 1, 10**400, 1e308, float("nan"), float("inf"), "", "a", "a\n"),
        *("\ud800", "x" * MAX_STRING, "x" * (MAX_STRING + 1), [], [1], [1, 2.5], [[]], [1, 2, 3], {}, {"": 1.0}),
        *({"a": "a"}, {"\n": {}}, {"a\n": 1}, {"name": "a", "count": 1}, {"name": "a", "count": 1, "more": 1}),
        {"name": "a", "counts": 1},
    ]
)


@settings(max_examples=300, deadline=None)
@given(document=EVERYTHING, data=st.data())
def test_both_decoders_agree_on_everything(document: Any, data: st.DataObject) -> None:
    assert decoders_agree(Everything, document)
    path = data.draw(st.sampled_from(paths(document)[1:]))
    decoders_agree(Everything, changed(document, path, data.draw(MISFITS | VALUES), data.draw(st.booleans())))


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(paths(DOCUMENT)[1:]), value=MISFITS | VALUES, drop=st.booleans())
def test_both_decoders_agree_on_manifests(path: tuple[Any, ...], value: Any, drop: bool) -> None:
    decoders_agree(Manifest, changed(DOCUMENT, path, value, drop))


def test_both_decoders_agree_on_the_manifest() -> None:
    assert decoders_agree(Manifest, DOCUMENT)
    assert decode(Manifest, DOCUMENT, "manifest", []) == MANIFEST


@pytest.mark.parametrize(
    ("value", "good"),
    [
        *((MAX_INTEGER, True), (-MAX_INTEGER, True), (MAX_INTEGER + 1, False), (-MAX_INTEGER - 1, False)),
        *(("x" * MAX_STRING, True), ("x" * (MAX_STRING + 1), False), (True, False), (1.0, False), (None, False)),
    ],
)
def test_bounds_of_scalars(value: Any, good: bool) -> None:
    for several in ([value], [value, "a", 1], [1, "a", value]):  # a column of one type, and of two
        assert decoders_agree(tuple[int | str, ...], several) == good


def test_equal_parts_are_made_once() -> None:
    assert len({id(k.tile) for k in MANIFEST.kernels}) == len({k.tile for k in MANIFEST.kernels})
