# SPDX-License-Identifier: Apache-2.0
"""JSON to frozen dataclasses, strictly: exact keys, exact types, no conversion, every problem reported.

What a value must be is read from the dataclass's annotations. Supported: str, int, float (an int is a float too),
unions of these, dataclasses, ``tuple[X, ...]``, ``tuple[X, Y]`` and ``Mapping[str, X]``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
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
        return {k: decode(parts, v, f"{path}.{k[:80]}", problems) for k, v in value.items()}
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
    fields = {n: decode(h, value[n], f"{path}.{n}", problems) for n, h in hints.items() if n in value}
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
    return tuple(decode(a, v, f"{path}[{i}]", problems) for i, (a, v) in enumerate(zip(arguments, value, strict=True)))


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
