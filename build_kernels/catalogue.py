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


def EVEN(ctas: int) -> int:
    """Stands for even shares in the tables below."""
    return -ctas


# Every schedule wins somewhere in the sweeps of benchmarks/results by 2% or more, or is the cluster-free twin (split 1)
# of one that does. Splits of K: CTAs of a cluster, or EVEN(CTAs an SM that share the product evenly).
# fmt: off
# row   k    blocks  units  tokens  stages  CTAs     splits
# warpgroups                                per SM   of K
STREAM = (
    ((1, 2,  1,      2,     8,      8,      2),      (1, 2)),
    ((1, 2,  1,      4,     8,      4,      2),      (1, 2)),
    ((2, 1,  1,      4,     8,      5,      2),      (1, 2, 4)),
    ((2, 1,  1,      4,     8,      4,      2),      (1, 2)),
    ((1, 2,  1,      2,     16,     6,      2),      (1, 2)),
    ((2, 1,  1,      4,     16,     4,      2),      (1, 2, 4)),
    ((1, 2,  1,      2,     32,     4,      2),      (1, 2)),
    ((1, 2,  1,      2,     32,     6,      1),      (1, 2)),
    ((1, 1,  1,      4,     32,     4,      2),      (1, 2, 4)),
    ((2, 1,  1,      4,     32,     6,      1),      (1, 2, 4)),
    ((1, 2,  1,      2,     64,     5,      1),      (1, 2)),
    ((2, 1,  1,      2,     64,     6,      1),      (1, 2, 4)),
    ((2, 1,  1,      2,     128,    4,      1),      (1, 2, 4)),
)
FLAT = (
    ((2, 1,  1,      4,     8,      5,      2),      (EVEN(1),)),
    ((2, 1,  1,      4,     16,     4,      2),      (1, EVEN(1))),
    ((2, 1,  1,      4,     32,     3,      2),      (1, EVEN(1), EVEN(2))),
    ((2, 1,  1,      2,     64,     4,      2),      (1, EVEN(1))),
    ((1, 1,  2,      2,     64,     4,      2),      (EVEN(1),)),
    ((4, 1,  1,      2,     64,     6,      1),      (EVEN(1),)),
    ((1, 1,  2,      1,     128,    5,      2),      (EVEN(2),)),
    ((2, 1,  1,      2,     128,    5,      1),      (1, EVEN(1))),
    ((3, 1,  1,      2,     128,    4,      1),      (1, EVEN(1))),
    ((2, 1,  2,      2,     128,    4,      1),      (1, EVEN(1))),
    ((2, 1,  1,      2,     256,    3,      1),      (1, EVEN(1))),
)
# fmt: on

Rows = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def _schedules(family: str, rows: Rows) -> tuple[ScheduleConfig, ...]:
    return tuple(
        ScheduleConfig(TileConfig(family, *tile), max(split, 0), max(-split, 0))
        for tile, splits in rows
        for split in splits
    )


IMPLEMENTATIONS = (
    ImplConfig(TYPES, _schedules("stream", STREAM)),
    ImplConfig(TYPES, _schedules("flat", FLAT)),
)


def specializations() -> tuple[Specialization, ...]:
    """Every kernel of the bundle, sorted by id."""
    return tuple(sorted((s for impl in IMPLEMENTATIONS for s in impl.specializations), key=lambda s: s.id))


def schedules() -> tuple[ScheduleConfig, ...]:
    """Every schedule of the bundle, in the order of the catalogue: fewest tokens first."""
    return tuple(dict.fromkeys(s for impl in IMPLEMENTATIONS for s in impl.schedules))
