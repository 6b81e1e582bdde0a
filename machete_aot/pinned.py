# SPDX-License-Identifier: Apache-2.0
"""A manifest that this package pins, decoded as far as it is asked.

Its sha256 is the package's own, so its text is the one that build_kernels wrote and that the package's tests have
checked in full. That need not be repeated by every process; and their layout is known (``dump_manifest``). Members
begin on lines of their own, sorted, and no string in JSON can hold the end of a line. So parts are cut out of the text
without parsing the rest: a first product decodes the kernels and the costs of its own types, a tenth of all. What is
decoded is decoded strictly, as everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from .decode import decode
from .errors import BundleError
from .manifest import HeuristicTable, KernelInfo, Manifest, id_start, parse_manifest
from .manifest_rules import SCHEMA

_KINDS = {field.name: field.type for field in dataclasses.fields(Manifest)}
_TABLE = sorted(field.name for field in dataclasses.fields(HeuristicTable))
# Members of a table that have a member for each types, and where that ends: its last one is an object, or a list.
_OF_TYPES = {"coefficients": b"\n}\n}", "measured": b"\n]\n}"}
_LAST = b"\n}\n"
_KERNEL_END = b"\n}\n}"  # its last member is an object of plain values
Span: TypeAlias = tuple[int, int]  # begin and end in the text


def parse_pinned(raw: bytes) -> Manifest:
    """The manifest in a text that comes from bytes whose sha256 this package pins. Raises as ``parse_manifest`` does.

    A text that is laid out in another way, or of another schema, goes there.
    """
    try:
        text = ManifestText(raw)
        if text.field("schema") != SCHEMA:
            return parse_manifest(raw)
    except (BundleError, ValueError):
        return parse_manifest(raw)
    return Manifest.of_text(text)


class ManifestText:
    """The text of a manifest as ``dump_manifest`` writes it: ``manifest.Parts``. Raises ValueError for another one.

    Nothing large is copied: a process that has just started pays for every page of memory that it touches first.
    """

    def __init__(self, raw: bytes) -> None:
        if not (raw.startswith(b"{\n") and raw.endswith(_LAST) and raw.isascii()):
            raise ValueError("the manifest is laid out in another way")
        self._raw = raw
        self._fields = _members(raw, sorted(_KINDS), (0, len(raw) - len(_LAST)))
        self._kernels: dict[str, tuple[KernelInfo, ...]] = {}
        self._tables: dict[tuple[str, str], HeuristicTable] = {}

    def field(self, name: str) -> Any:
        """The value of a field of ``Manifest``."""
        return _decoded(_KINDS[name], self._text(self._fields[name]), name)

    def kernels(self, types_name: str) -> tuple[KernelInfo, ...]:
        """The kernels of these types, in the manifest's order."""
        found = self._kernels.get(types_name)
        if found is None:
            texts = b",".join(map(self._text, self._kernel_spans(types_name)))
            made = _decoded(tuple[KernelInfo, ...], b"[%b]" % texts, "kernels")
            found = self._kernels.setdefault(types_name, made)
        return found

    def _kernel_spans(self, types_name: str) -> Iterator[Span]:
        """Where the kernels of these types are, found by their ids."""
        begin, (end, last) = b'"' + id_start(types_name).encode(), self._fields["kernels"]
        while (at := self._raw.find(begin, end, last)) >= 0:
            start, end = self._raw.rindex(b'\n{\n"cubin":', end, at), _end(self._raw, at, _KERNEL_END)
            yield start, end

    def tables(self, types_name: str, device: str | None) -> tuple[HeuristicTable, ...]:
        """The tables of the cost model, of GPUs of this name (None: all), with what they have on these types alone."""
        found = []
        for name, spans in self._table_spans:
            if device in (None, name):
                key = (name, types_name)
                if key not in self._tables:
                    made = _decoded(HeuristicTable, self._table_text(spans, types_name), f"heuristic of {name}")
                    self._tables.setdefault(key, made)
                found.append(self._tables[key])
        return tuple(found)

    @cached_property
    def _table_spans(self) -> list[tuple[str, dict[str, Span]]]:
        """The GPU of each table, and where the table's fields are."""
        at, end = self._fields["heuristic"]
        found = []
        while _find(self._raw, _TABLE[0], (at, end)) >= 0:
            spans = _members(self._raw, _TABLE, (at, end))
            found.append((json.loads(self._text(spans["device"])), spans))
            at = spans[_TABLE[-1]][1]
        return found

    def _table_text(self, spans: dict[str, Span], types_name: str) -> bytes:
        """The text of a table without what other types have."""
        texts = {name: self._text(span) for name, span in spans.items() if name not in _OF_TYPES}
        for name, end in _OF_TYPES.items():
            own = _find(self._raw, types_name, spans[name])
            texts[name] = b"{%b}" % (b"" if own < 0 else self._text((own, _end(self._raw, own, end))))
        return b"{%b}" % b",".join(b'"%b": %b' % (name.encode(), text) for name, text in texts.items())

    def _text(self, span: Span) -> bytes:
        return self._raw[span[0] : span[1]]


def _members(raw: bytes, names: Sequence[str], within: Span) -> dict[str, Span]:
    """Where the values of an object's members are, whose names these are, in order, and no member's in between.

    That of the last member ends with its line, or where ``within`` does. Raises ValueError.
    """
    at, end = within
    starts = []
    for name in names:
        at = _find(raw, name, (at, end))
        if at < 0:
            raise ValueError(f"the manifest has no {name} where it is looked for")
        starts.append(at)
    found = {}
    for name, start, following in zip(names, starts, (*starts[1:], None), strict=True):
        value = start + len(name) + len('"":')
        if following is not None:
            last = following - len(",\n")
        elif raw[value : value + 1] in b"{[":
            last = end
        else:
            last = raw.index(b"\n", value)
        found[name] = value, last
    return found


def _find(raw: bytes, name: str, within: Span) -> int:
    """Where the first member of this name begins, or -1."""
    at = raw.find(b'\n"%b":' % name.encode(), *within)
    return at if at < 0 else at + 1


def _end(raw: bytes, start: int, closing: bytes) -> int:
    """The end of the object around or behind ``start`` that ends with the next such lines. Raises ValueError."""
    return raw.index(closing, start) + len(closing)


def _decoded(kind: Any, text: bytes, path: str) -> Any:
    problems: list[str] = []
    try:
        found = decode(kind, json.loads(text), path, problems)
    except ValueError as error:
        problems.append(f"{path}: {error}")
    if problems:
        raise BundleError("the manifest is not valid, though this package pins it; install it again", problems)
    return found
