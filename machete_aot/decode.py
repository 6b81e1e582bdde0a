# SPDX-License-Identifier: Apache-2.0
"""JSON to frozen dataclasses, strictly: exact keys, exact types, no conversion, every problem reported.

What a value must be is read from the dataclass's annotations. Supported: str, int, float (an int is a float too),
unions of these, dataclasses, ``tuple[X, ...]``, ``tuple[X, Y]`` and ``Mapping[str, X]``.

There are two decoders. The usual document is valid and large, so the first one takes all values of the same kind
together, a column at a time, and stops at the first misfit without a word. Then the second one, which goes value by
value and is several times as slow, says what is wrong and where. It decides.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain, islice
from operator import itemgetter
from typing import Any

MAX_STRING = 1000
MAX_INTEGER = 2**53


def parse_json(data: bytes, limit: int, problems: list[str]) -> Any:
    """The document in ``data``, or None with a line in ``problems``. Refuses repeated keys, NaN and deep nesting."""
    if len(data) > limit:
        problems.append(f"{len(data)} bytes, where {limit} is the limit")
        return None
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:  # ValueError: of json, of UTF-8 and of integers with too many digits
        problems.append(f"not JSON: {str(e)[:200]}")
        return None


def decode(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """``value`` as a ``kind``. Adds a line to ``problems`` for each misfit; the result counts only if there is none."""
    try:
        return _column_decoder(kind)([value])[0]
    except _Misfit:
        return decode_and_explain(kind, value, path, problems)


def prepare(kind: Any) -> None:
    """Looks into a kind's annotations now, which the first ``decode`` of it would do otherwise."""
    _column_decoder(kind)


def decode_and_explain(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """The same as ``decode``, a value at a time."""
    form, parts = _form(kind)
    if form is _SCALAR:
        return _decode_scalar(parts, value, path, problems)
    if form is tuple:
        return _decode_tuple(parts, value, path, problems)
    if not isinstance(value, dict):
        problems.append(f"{path}: expected an object, found {_describe(value)}")
        return None
    if form is Mapping:
        _check_keys(value, path, problems)
        return {k: decode_and_explain(parts, v, f"{path}.{k[:80]}", problems) for k, v in value.items()}
    return _decode_object(form, parts, value, path, problems)


_SCALAR = object()


@cache
def _form(kind: Any) -> tuple[Any, Any]:
    """How to decode a kind: its form and its parts. Annotations are slow to look into, so once for each kind."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind, {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple, arguments
    if origin is Mapping:
        return Mapping, arguments[1]
    kinds = arguments if origin in (typing.Union, types.UnionType) else (kind,)
    return _SCALAR, frozenset((*kinds, int) if float in kinds else kinds)


def _decode_object(kind: Any, hints: dict[str, Any], value: dict[str, Any], path: str, problems: list[str]) -> Any:
    if value.keys() != hints.keys():
        problems.extend(f"{path}.{name}: missing" for name in hints if name not in value)
        problems.extend(f"{path}.{name[:80]}: unknown" for name in value if name not in hints)
    before = len(problems)
    fields = {n: decode_and_explain(h, value[n], f"{path}.{n}", problems) for n, h in hints.items() if n in value}
    return kind(**fields) if len(problems) == before and len(fields) == len(hints) else None


def _decode_tuple(arguments: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, list):
        problems.append(f"{path}: expected a list, found {_describe(value)}")
        return None
    if arguments[-1] is ...:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        problems.append(f"{path}: expected {len(arguments)} values, found {len(value)}")
        return None
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(decode_and_explain(a, v, f"{path}[{i}]", problems) for i, (a, v) in pairs)


def _decode_scalar(kinds: frozenset[Any], value: Any, path: str, problems: list[str]) -> Any:
    kind = type(value)
    if kind not in kinds:
        names = " or ".join(sorted(k.__name__ for k in kinds))
        problems.append(f"{path}: expected {names}, found {_describe(value)}")
    elif kind is str and (len(value) > MAX_STRING or not value.isprintable()):
        problems.append(f"{path}: longer than {MAX_STRING} characters or not printable")
    elif kind is int and abs(value) > MAX_INTEGER:
        problems.append(f"{path}: an integer beyond 2^53")
    elif kind is float and not math.isfinite(value):
        problems.append(f"{path}: not finite")
    return value


def _check_keys(value: dict[str, Any], path: str, problems: list[str]) -> None:
    problems.extend(
        f"{path}: a key is over {MAX_STRING} characters or not printable"
        for k in value
        if len(k) > MAX_STRING or not k.isprintable()
    )


def _describe(value: Any) -> str:
    return {dict: "an object", list: "a list", type(None): "null"}.get(
        type(value), f"{type(value).__name__} {str(value)[:40]!r}"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# ---------------------------------------------------------------- a column at a time

_Decoder = Callable[[Sequence[Any]], Sequence[Any]]  # of all values of a kind


class _Misfit(Exception):
    """Some value is not of its kind. Which one, the other decoder finds."""


@cache
def _column_decoder(kind: Any) -> _Decoder:
    form, parts = _form(kind)
    if form is _SCALAR:
        return partial(_scalars, parts)
    if form is tuple and parts[-1] is ...:
        return partial(_lists, _column_decoder(parts[0]))
    if form is tuple:
        return partial(_rows, [_column_decoder(part) for part in parts])
    if form is Mapping:
        return partial(_mappings, _column_decoder(parts))
    make = _equal_once if all(part in (str, int) for part in parts.values()) else map
    return partial(_objects, partial(make, form), {name: _column_decoder(part) for name, part in parts.items()})


def _scalars(kinds: frozenset[Any], values: Sequence[Any]) -> Sequence[Any]:
    found = set(map(type, values))
    for kind in found:
        same = values if len(found) == 1 else [v for v in values if type(v) is kind]
        if kind not in kinds or not _in_bounds(kind, same):
            raise _Misfit
    return values


def _in_bounds(kind: Any, values: Sequence[Any]) -> bool:
    if kind is str:
        return max(map(len, values)) <= MAX_STRING and "".join(values).isprintable()
    if kind is int:
        return max(values) <= MAX_INTEGER and min(values) >= -MAX_INTEGER
    return kind is not float or all(map(math.isfinite, values))


def _lists(decoder: _Decoder, values: Sequence[Any]) -> Sequence[Any]:
    _all_of_type(list, values)
    items = iter(decoder([*chain.from_iterable(values)]))
    return [tuple(islice(items, length)) for length in map(len, values)]


def _rows(decoders: Sequence[_Decoder], values: Sequence[Any]) -> Sequence[Any]:
    _all_of_type(list, values)
    width = len(decoders)
    _all_of_length(width, values)
    items = [*chain.from_iterable(values)]
    return [*zip(*(decoder(items[i::width]) for i, decoder in enumerate(decoders)), strict=True)]


def _mappings(decoder: _Decoder, values: Sequence[Any]) -> Sequence[Any]:
    _all_of_type(dict, values)
    _scalars(frozenset([str]), [*set(chain.from_iterable(values))])
    items = iter(decoder([*chain.from_iterable(map(dict.values, values))]))
    return [dict(zip(v, items, strict=False)) for v in values]  # takes as many items as there are keys


def _objects(
    make: Callable[..., Iterable[Any]], decoders: Mapping[str, _Decoder], values: Sequence[Any]
) -> Sequence[Any]:
    _all_of_type(dict, values)
    _all_of_length(len(decoders), values)
    try:
        columns = [decoder([*map(itemgetter(name), values)]) for name, decoder in decoders.items()]
    except KeyError:
        raise _Misfit from None
    return [*make(*columns)]


def _equal_once(kind: Any, *columns: Sequence[Any]) -> Iterable[Any]:
    """Like map, with one object for all equal ones: a few tiles serve many kernels. Columns of str or int only."""
    rows = [*zip(*columns, strict=True)]
    made = {row: kind(*row) for row in set(rows)}
    return map(made.__getitem__, rows)


def _all_of_type(kind: Any, values: Sequence[Any]) -> None:
    if not set(map(type, values)) <= {kind}:
        raise _Misfit


def _all_of_length(length: int, values: Sequence[Any]) -> None:
    if not set(map(len, values)) <= {length}:
        raise _Misfit
