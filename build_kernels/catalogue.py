# SPDX-License-Identifier: Apache-2.0
"""What is built: the types, the tiles and the splits of K that each tile ships. Everything else follows from this file.

A row is a tile (see TileConfig) and its splits. A new type needs one entry in TYPES, and its traits in
csrc/kernels/types.cuh.
"""

from __future__ import annotations

from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig

from .configs import ImplConfig, Specialization

ARCH = "sm90a"

TYPES = (
    TypeConfig(a="bf16", b="u4b8", scale="bf16"),
    TypeConfig(a="fp16", b="u4b8", scale="fp16"),
)

# fmt: off
# row   k    blocks  units  tokens  stages  CTAs     splits
# warpgroups                                per SM   of K
STREAM = (
    ((1, 2,  1,      2,     8,      8,      2),      (1, 2)),
    ((1, 2,  1,      4,     8,      4,      2),      (1, 2)),
    ((2, 1,  1,      4,     8,      5,      2),      (1, 2, 4)),
    ((2, 1,  1,      4,     8,      4,      2),      (1, 2, 4)),
    ((1, 2,  1,      2,     16,     6,      2),      (1, 2)),
    ((1, 2,  1,      4,     16,     3,      2),      (1, 2)),
    ((2, 1,  1,      4,     16,     4,      2),      (1, 2, 4)),
    ((2, 1,  1,      4,     16,     3,      2),      (1, 2, 4)),
    ((1, 2,  1,      2,     32,     4,      2),      (1, 2)),
    ((1, 2,  1,      2,     32,     6,      1),      (1, 2)),
    ((1, 1,  1,      4,     32,     4,      2),      (1, 2, 4)),
    ((2, 1,  1,      4,     32,     3,      2),      (1, 2, 4)),
    ((2, 1,  1,      4,     32,     6,      1),      (1, 2, 4)),
    ((1, 2,  1,      2,     64,     5,      1),      (1, 2)),
    ((2, 1,  1,      2,     64,     6,      1),      (1, 2, 4)),
    ((2, 1,  1,      2,     64,     4,      2),      (1,)),
    ((1, 1,  2,      2,     64,     3,      2),      (1, 2, 4)),
    ((2, 2,  1,      2,     64,     3,      1),      (1, 2)),
    ((2, 1,  1,      2,     128,    4,      1),      (1, 2, 4)),
    ((1, 2,  1,      2,     128,    2,      1),      (1, 2)),
)
DENSE = (
    ((2, 1,  2,      1,     64,     8,      1),      (1,)),
    ((2, 1,  1,      1,     128,    8,      1),      (1,)),
    ((2, 1,  1,      2,     128,    5,      1),      (1,)),
    ((2, 1,  2,      1,     128,    7,      1),      (1,)),
    ((2, 1,  2,      2,     128,    4,      1),      (1,)),
    ((2, 1,  1,      1,     256,    5,      1),      (1,)),
)
# fmt: on

Rows = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def _schedules(family: str, rows: Rows) -> tuple[ScheduleConfig, ...]:
    return tuple(ScheduleConfig(TileConfig(family, *tile), split) for tile, splits in rows for split in splits)


IMPLEMENTATIONS = (
    ImplConfig(TYPES, _schedules("stream", STREAM)),
    ImplConfig(TYPES, _schedules("dense", DENSE)),
)


def specializations() -> tuple[Specialization, ...]:
    """Every kernel of the bundle, sorted by id."""
    return tuple(sorted((s for impl in IMPLEMENTATIONS for s in impl.specializations), key=lambda s: s.id))


def schedules() -> tuple[ScheduleConfig, ...]:
    """Every schedule of the bundle, in the order of the catalogue: fewest tokens first."""
    return tuple(dict.fromkeys(s for impl in IMPLEMENTATIONS for s in impl.schedules))
