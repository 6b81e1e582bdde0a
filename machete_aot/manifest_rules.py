# SPDX-License-Identifier: Apache-2.0
"""What a manifest of the right types must still satisfy: names that follow from their parts, sane sizes, no overlap."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from .config import TileConfig, TypeConfig, schedule_name
from .scalar_type import SCALAR_TYPES

if TYPE_CHECKING:
    from .manifest import HelperInfo, KernelInfo, Manifest, Measured, ScheduleInfo

SCHEMA = 6
SYMBOL_PREFIX = "machete_"
TYPES_END = "__"  # in a kernel's id, between types and tile; no helper's id has it

MAX_MANIFEST_BYTES = 16 << 20
MAX_CUBIN_BYTES = 16 << 20
MAX_DICTIONARY_BYTES = 16 << 20
MAX_BUNDLE_BYTES = 1 << 30
MAX_SHARED_MEMORY = 227 * 1024  # what one CTA may have on compute capability 9.0
MAX_REGISTERS = 255
MAX_THREADS = 1024
MAX_SPLIT = 16  # CTAs of the largest cluster
MAX_EVEN_CTAS = 32  # CTAs that an SM can hold

DEVIATION_ZERO = 79  # the character of no deviation, in the middle of the printable ones
MOST_DEVIATION = 44  # percent; keeps clear of the quotation mark
NOT_MEASURED = "!"

_LEAST, _MOST = chr(DEVIATION_ZERO - MOST_DEVIATION), chr(DEVIATION_ZERO + MOST_DEVIATION)
_DEVIATIONS = re.compile(f"[{NOT_MEASURED}{re.escape(_LEAST)}-{re.escape(_MOST)}]*\\Z")
_TYPE = re.compile(r"[a-z][a-z0-9]{0,15}\Z")
_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,126}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_HELPER = re.compile(r"(?=.{1,100}\Z)[a-z][a-z0-9]*(_[a-z0-9]+)*\Z")
_FAMILIES = ("stream", "flat")
_ZEROS = ("none", "float", "int", "any")
_TILE_LIMITS = {
    "row_warpgroups": 8,
    "k_warpgroups": 8,
    "blocks": 8,
    "units": 16,
    "tokens": 256,
    "stages": 64,
    "ctas_per_sm": 32,
    "cluster": 2,
}


def violations(m: Manifest) -> Iterator[str]:
    """A line for everything in ``m`` that breaks a rule. Its types are right already."""
    if m.schema != SCHEMA:
        yield f"schema: {m.schema} is not {SCHEMA}"
    yield from _header_violations(m)
    layouts = {layout.name for layout in m.layouts}
    for kernel in m.kernels:
        yield from (f"kernel {kernel.id[:200]!r}: {p}" for p in _kernel_violations(kernel, layouts))
    for helper in m.helpers:
        yield from (f"helper {helper.id[:200]!r}: {p}" for p in _helper_violations(helper))
    kernels = {(k.types.name, _tile_name(k.tile)): k for k in m.kernels}
    for schedule in m.schedules:
        yield from (f"schedule {schedule.name[:200]!r}: {p}" for p in _schedule_violations(schedule, kernels))
    yield from _repeated("kernel id", (k.id for k in m.kernels))
    yield from _repeated("helper id", (h.id for h in m.helpers))
    yield from _repeated("schedule name", (s.name for s in m.schedules))
    yield from _repeated("layout name", (layout.name for layout in m.layouts))
    yield from _overlaps(m)
    yield from _heuristic_violations(m)


def _header_violations(m: Manifest) -> Iterator[str]:
    for name, value in dataclasses.asdict(m.bundle).items():
        if not _TOKEN.match(value):
            yield f"bundle.{name}: {value[:80]!r} is not a name"
    if not _DIGEST.match(m.provenance.source_digest):
        yield "provenance.source_digest: not a sha256 hex digest"
    if not m.kernels:
        yield "kernels: empty"
    for d in m.dictionaries:
        where = f"dictionary {d.family[:80]!r}"
        yield from (f"{where}: {p}" for p in _span_violations(d.offset, d.length, d.sha256))
        yield from (f"{where}: {p}" for p in _content_violations(d.raw_size, d.raw_sha256, MAX_DICTIONARY_BYTES))
    yield from _repeated("dictionary", (d.family for d in m.dictionaries))
    families = {k.tile.family for k in m.kernels}
    if {d.family for d in m.dictionaries} != families:
        yield f"dictionaries: not one for each family of the kernels, {', '.join(sorted(families))[:80]}"
    end = 0
    for offset, size in m.abi.parameters:
        if not (end <= offset and size > 0 and offset + size <= 4096):
            yield f"abi.parameters: ({offset}, {size}) overlaps its neighbour, is empty or ends past 4096 bytes"
        end = max(end, offset + size)


def _kernel_violations(k: KernelInfo, layouts: set[str]) -> Iterator[str]:
    yield from _type_violations(k.types)
    yield from _tile_violations(k.tile)
    if not _tile_violations(k.tile):
        wanted = f"{k.types.name}{TYPES_END}{_tile_name(k.tile)}"
        if k.id != wanted:
            yield f"id should be {wanted!r}, from its types and tile"
        if k.threads != k.tile.threads or k.threads > MAX_THREADS:
            yield f"threads {k.threads}, where the tile has {k.tile.threads} and the limit is {MAX_THREADS}"
    if k.layout not in layouts:
        yield f"layout {k.layout[:80]!r} is not among the manifest's layouts"
    yield from _compiled_violations(k)


def _helper_violations(h: HelperInfo) -> Iterator[str]:
    if not _HELPER.match(h.id):
        yield "id is not a name of lower case words with a '_' between them"
    if not 1 <= h.threads <= MAX_THREADS or h.threads % 32:
        yield f"threads {h.threads} are not whole warps within 1..{MAX_THREADS}"
    yield from _compiled_violations(h)


def _compiled_violations(k: KernelInfo | HelperInfo) -> Iterator[str]:
    if k.symbol != SYMBOL_PREFIX + k.id:
        yield f"symbol {k.symbol[:200]!r} is not {SYMBOL_PREFIX!r} and the id"
    if not 1 <= k.registers <= MAX_REGISTERS:
        yield f"registers {k.registers} are not within 1..{MAX_REGISTERS}"
    if k.spills < 0 or not 0 <= k.static_shared_memory <= MAX_SHARED_MEMORY:
        yield f"spills {k.spills} or static_shared_memory {k.static_shared_memory} out of range"
    yield from (f"frame: {p}" for p in _span_violations(k.frame.offset, k.frame.length, k.frame.sha256))
    yield from (f"cubin: {p}" for p in _content_violations(k.cubin.size, k.cubin.sha256, MAX_CUBIN_BYTES))


# Many kernels have the same types and the same tile, and a schedule asks again.
_KEPT = 1024


@lru_cache(_KEPT)
def _tile_name(tile: TileConfig) -> str:
    return tile.name


@lru_cache(_KEPT)
def _type_violations(types: TypeConfig) -> tuple[str, ...]:
    found = [
        f"types.{field.name}: {value[:80]!r} is not the name of a type"
        for field in dataclasses.fields(types)
        if isinstance(value := getattr(types, field.name), str) and not _TYPE.match(value)
    ]
    if types.b not in SCALAR_TYPES:
        found.append(f"types.b: {types.b[:80]!r} is none of {', '.join(SCALAR_TYPES)}")
    if types.zeros not in _ZEROS:
        found.append(f"types.zeros: {types.zeros[:80]!r} is none of {', '.join(_ZEROS)}")
    if types.fine and not types.general:
        found.append("types.fine: true of types without zero points")
    return tuple(found)


@lru_cache(_KEPT)
def _tile_violations(tile: TileConfig) -> tuple[str, ...]:
    found = []
    if tile.family not in _FAMILIES:
        found.append(f"tile.family: {tile.family[:80]!r} is none of {', '.join(_FAMILIES)}")
    for name, limit in _TILE_LIMITS.items():
        value = getattr(tile, name)
        if not 1 <= value <= limit:
            found.append(f"tile.{name}: {value} is not within 1..{limit}")
    if tile.tokens % 8:
        found.append(f"tile.tokens: {tile.tokens} is not a multiple of 8")
    if tile.cluster > 1 and (tile.family != "flat" or tile.units % tile.cluster):
        found.append(f"tile.cluster: {tile.cluster} in family {tile.family[:80]!r} with {tile.units} units")
    return tuple(found)


def _schedule_violations(s: ScheduleInfo, kernels: Mapping[tuple[str, str], KernelInfo]) -> Iterator[str]:
    wanted = schedule_name(s.tile, s.split, s.even_ctas)
    if s.name != wanted:
        yield f"name should be {wanted[:200]!r}, from its tile, split and even_ctas"
    split, even = s.split, s.even_ctas
    divides = (1 <= split <= MAX_SPLIT and even == 0) or (split == 0 and 1 <= even <= MAX_EVEN_CTAS)
    if not divides:
        yield f"split {split} with even_ctas {even}: wanted 1..{MAX_SPLIT} with 0, or 0 with 1..{MAX_EVEN_CTAS}"
    yield from _repeated("types", s.types)
    if not s.types:
        yield "types: empty"
    for name in s.types:
        kernel = kernels.get((name, s.tile))
        if kernel is None:
            yield f"no kernel has its tile {s.tile[:200]!r} and types {name[:80]!r}"
        elif (kernel.tile.family == "stream" and split == 0) or (kernel.tile.family == "flat" and split > 1):
            yield f"split {split}, which family {kernel.tile.family} does not have"
        elif divides and not _type_violations(kernel.types) and not _tile_violations(kernel.tile):
            used = kernel.tile.shared_memory(split, kernel.types)
            if used > MAX_SHARED_MEMORY:
                yield f"{used} bytes of shared memory for {name}, where a CTA has {MAX_SHARED_MEMORY} at most"


def _heuristic_violations(m: Manifest) -> Iterator[str]:
    types = {t.name: t for t in m.types}
    yield from _repeated("heuristic device", (table.device for table in m.heuristic.tables))
    for table in m.heuristic.tables:
        where = f"heuristic of {table.device[:80]!r}"
        if min(table.sms, table.clock_mhz, table.peak_bytes_per_us, table.bytes_per_us) <= 0:
            yield f"{where}: sms, clock_mhz, peak_bytes_per_us and bytes_per_us must be positive"
        for name, schedules in table.coefficients.items():
            if name not in types:
                yield f"{where}: coefficients for types {name[:80]!r}, which no kernel has"
                continue
            known = {s.name for s in m.schedules_for(types[name])}
            for schedule in sorted(schedules.keys() - known):
                yield f"{where}: coefficients for {name} schedule {schedule[:200]!r}, which the bundle lacks"
        for name, measured in table.measured.items():
            yield from (f"{where}: measured {name[:80]!r}: {p}" for p in _measured_violations(measured))


def _measured_violations(measured: Measured) -> Iterator[str]:
    if min(itertools.chain.from_iterable(measured.products), default=1) < 1:
        yield "a product with a size below 1"
    for schedule, text in measured.deviations.items():
        if len(text) != len(measured.products):
            yield f"{schedule[:200]!r} has {len(text)} deviations for {len(measured.products)} products"
        elif not _DEVIATIONS.match(text):
            yield f"{schedule[:200]!r} has a deviation of over {MOST_DEVIATION} percent"


def _span_violations(offset: int, length: int, digest: str) -> Iterator[str]:
    if offset < 0 or length < 1 or offset + length > MAX_BUNDLE_BYTES:
        yield f"bytes {offset} to {offset + length} are empty or outside 0..{MAX_BUNDLE_BYTES}"
    if not _DIGEST.match(digest):
        yield "sha256: not a sha256 hex digest"


def _content_violations(size: int, digest: str, limit: int) -> Iterator[str]:
    if not 1 <= size <= limit:
        yield f"size {size} is not within 1..{limit}"
    if not _DIGEST.match(digest):
        yield "sha256 of the content: not a sha256 hex digest"


def _repeated(what: str, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"{what} {name[:200]!r} occurs twice"
        seen.add(name)


def _overlaps(m: Manifest) -> Iterator[str]:
    spans = [(d.offset, d.length, f"the dictionary {d.family!r}") for d in m.dictionaries]
    spans += [(k.frame.offset, k.frame.length, f"the frame of {k.id!r}") for k in m.compiled]
    spans.sort()
    for (offset, length, first), (start, _, second) in itertools.pairwise(spans):
        if start < offset + length:
            yield f"{first} and {second} overlap at byte {start}"
