# SPDX-License-Identifier: Apache-2.0
"""Which kernels of a bundle a user means who names types, schedules or shapes."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ArgumentError, UnsupportedError
from .manifest import Manifest
from .part import H100
from .selection import select

Only = Sequence[str | tuple[int, int, int]]


def kernel_ids(manifest: Manifest, only: Only) -> list[str]:
    """The ids of the kernels that ``only`` selects, in manifest order.

    ``only``: names of types ("bf16_u4b8"), names of schedules, and (M, N, K) shapes, which stand for the schedules that
    they get on an H100. Types restrict: without any, all types are meant; schedules and
    shapes restrict likewise. Raises ArgumentError for what is none of these.
    """
    types = {t.name for t in manifest.types}
    tiles = {s.name: s.tile for s in manifest.schedules}
    if isinstance(only, str) or not only:
        raise ArgumentError(f"only= is a list of types, schedules or (M, N, K) shapes, got {only!r}")
    shapes = [item for item in only if not isinstance(item, str)]
    for item in only:
        known = item in types or item in tiles if isinstance(item, str) else _is_shape(item)
        if not known:
            raise ArgumentError(
                f"only= has {item!r}, which is no type ({', '.join(sorted(types))}), no schedule and no (M, N, K) "
                "shape; `machete-aot list` shows what there is"
            )
    chosen_types = [name for name in only if isinstance(name, str) and name in types] or sorted(types)
    chosen = {(t, tiles[name]) for t in chosen_types for name in only if isinstance(name, str) and name in tiles}
    chosen |= {(t, tile) for t in chosen_types for m, n, k in shapes if (tile := _tile(manifest, t, m, n, k))}
    everything = not shapes and not any(isinstance(name, str) and name in tiles for name in only)
    return [
        kernel.id
        for kernel in manifest.kernels
        if kernel.types.name in chosen_types and (everything or (kernel.types.name, kernel.tile.name) in chosen)
    ]


def _is_shape(item: object) -> bool:
    return isinstance(item, tuple | list) and len(item) == 3 and all(type(i) is int and i > 0 for i in item)


def _tile(manifest: Manifest, types: str, m: int, n: int, k: int) -> str | None:
    try:
        return select(manifest, types, m, n, k, H100).tile
    except UnsupportedError:  # no coefficients for these types: nothing would select a kernel of them
        return None
