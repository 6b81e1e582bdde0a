# SPDX-License-Identifier: Apache-2.0
"""What is built: the types, the tiles and the splits of K that each tile ships. Everything else follows from this file.

A row is a tile (see TileConfig) and its splits. New types need an entry in one of the tuples of types below, and their
traits in csrc/kernels/types.cuh.
"""

from __future__ import annotations

from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig

from .configs import ImplConfig, Specialization

ARCH = "sm90a"

SYMMETRIC = (
    TypeConfig(a="bf16", b="u4b8", scale="bf16"),
    TypeConfig(a="fp16", b="u4b8", scale="fp16"),
)


def _general(b: str, fine: bool) -> tuple[TypeConfig, ...]:
    bf16 = tuple(TypeConfig("bf16", b, "bf16", zeros, fine) for zeros in ("float", "int"))
    return (*bf16, TypeConfig("fp16", b, "fp16", "any", fine))


GENERAL_4, GENERAL_8 = _general("u4", fine=False), _general("u8", fine=False)
FINE_4, FINE_8 = _general("u4", fine=True), _general("u8", fine=True)
TYPES = (*SYMMETRIC, *GENERAL_4, *GENERAL_8, *FINE_4, *FINE_8)


def EVEN(ctas: int) -> int:
    """Stands for even shares in the tables below."""
    return -ctas


# Without one of these schedules some product of the sweeps in benchmarks/results would take 2% longer, or it is the
# cluster-free twin (split 1) of such a one. Tiles of one warpgroup, and whole tiles of family "flat" of up to 32
# tokens, are left out: they win where a product follows itself, and lose between others.
# Splits of K: CTAs of a cluster, or EVEN(CTAs an SM that share the product evenly). A row of family "flat" may end in
# the CTAs of a cluster that share activations.
# fmt: off
# row   k    blocks  units  tokens  stages  CTAs     splits
# warpgroups                                per SM   of K
STREAM = (
    ((1, 2,  1,      2,     8,      8,      2),      (1, 2)),
    ((2, 1,  1,      4,     8,      5,      2),      (1, 2, 4)),
    ((1, 2,  1,      2,     16,     6,      2),      (1, 2)),
    ((2, 1,  1,      4,     16,     4,      2),      (1, 2)),
    ((1, 2,  1,      2,     32,     4,      2),      (1, 2)),
    ((1, 2,  1,      2,     32,     6,      1),      (1, 2)),
    ((2, 1,  1,      4,     32,     3,      2),      (1, 2)),
    ((1, 2,  1,      2,     64,     5,      1),      (1, 2)),
    ((2, 1,  1,      4,     64,     4,      1),      (1, 2, 4)),
    ((2, 1,  1,      2,     128,    4,      1),      (1, 2, 4)),
)
FLAT = (
    ((2, 1,  1,      4,     8,      5,      2),      (EVEN(1),)),
    ((2, 1,  1,      4,     16,     4,      2),      (EVEN(1),)),
    ((2, 1,  1,      4,     32,     3,      2),      (EVEN(1), EVEN(2))),
    ((2, 1,  1,      4,     64,     4,      1),      (EVEN(1),)),
    ((4, 1,  1,      4,     64,     3,      1),      (EVEN(1),)),
    ((2, 1,  1,      2,     128,    5,      1, 2),   (1, EVEN(1))),
    ((3, 1,  1,      2,     128,    4,      1),      (1,)),
    ((2, 1,  2,      2,     128,    4,      1, 2),   (EVEN(1),)),
    ((2, 1,  1,      2,     256,    3,      1),      (1,)),
    ((2, 1,  1,      2,     256,    3,      1, 2),   (EVEN(1),)),
)
STREAM_4 = (
    ((1, 2,  1,      2,     8,      8,      2),      (1, 2)),
    ((2, 1,  1,      4,     8,      5,      2),      (1,)),
    ((1, 2,  1,      2,     16,     6,      2),      (1, 2)),
    ((2, 1,  1,      4,     16,     4,      2),      (1,)),
    ((1, 2,  1,      2,     32,     4,      2),      (1, 2)),
    ((1, 2,  1,      2,     32,     6,      1),      (1, 2)),
    ((2, 1,  1,      4,     32,     3,      2),      (1,)),
    ((1, 2,  1,      2,     64,     4,      1),      (1, 2)),
    ((2, 1,  1,      4,     64,     4,      1),      (1, 2)),
    ((2, 1,  1,      2,     128,    4,      1),      (1, 2)),
)
FLAT_4 = (
    ((2, 1,  1,      4,     8,      5,      2),      (EVEN(1),)),
    ((2, 1,  1,      4,     16,     4,      2),      (EVEN(1),)),
    ((2, 1,  1,      4,     32,     3,      2),      (EVEN(1),)),
    ((2, 1,  1,      4,     64,     4,      1),      (EVEN(1),)),
    ((4, 1,  1,      4,     64,     3,      1),      (EVEN(1),)),
    ((2, 1,  1,      2,     128,    5,      1, 2),   (EVEN(1),)),
    ((3, 1,  1,      2,     128,    4,      1),      (1,)),
    ((2, 1,  2,      2,     128,    4,      1, 2),   (EVEN(1),)),
    ((2, 1,  1,      2,     256,    3,      1, 2),   (EVEN(1),)),
)
# 8 bits: mostly half the units of k, so that a step has as many bytes.
STREAM_8 = (
    ((1, 2,  1,      2,     8,      5,      2),      (1, 2)),
    ((2, 1,  1,      2,     8,      5,      2),      (1,)),
    ((1, 2,  1,      2,     16,     4,      2),      (1, 2)),
    ((2, 1,  1,      2,     32,     8,      1),      (1, 2, 4)),
    ((1, 2,  1,      2,     64,     4,      1),      (2,)),
    ((2, 1,  1,      2,     64,     6,      1),      (1, 2)),
    ((2, 1,  1,      2,     128,    3,      1),      (2,)),
)
FLAT_8 = (
    ((2, 1,  1,      2,     32,     8,      1),      (EVEN(1),)),
    ((2, 1,  1,      2,     64,     6,      1),      (EVEN(1),)),
    ((2, 1,  1,      2,     128,    4,      1, 2),   (1, EVEN(1))),
    ((3, 1,  1,      2,     128,    3,      1),      (1,)),
    ((2, 1,  2,      2,     128,    3,      1, 2),   (1, EVEN(1))),
)
# Groups of k that are no multiples of 64: a few tiles for all sizes.
STREAM_FINE_4 = (
    ((1, 2,  1,      2,     8,      7,      2),      (2,)),
    ((2, 1,  1,      4,     8,      4,      2),      (1,)),
    ((1, 2,  1,      2,     16,     5,      2),      (2,)),
    ((1, 2,  1,      2,     32,     5,      1),      (2,)),
    ((2, 1,  1,      2,     32,     5,      2),      (1, 2)),
    ((2, 1,  1,      4,     64,     4,      1),      (1, 2)),
    ((2, 1,  1,      2,     128,    4,      1),      (1, 2)),
)
FLAT_FINE_4 = (
    ((4, 1,  1,      4,     64,     3,      1),      (EVEN(1),)),
    ((2, 1,  1,      2,     128,    5,      1, 2),   (EVEN(1),)),
    ((3, 1,  1,      2,     128,    4,      1),      (1,)),
    ((2, 1,  1,      2,     256,    3,      1, 2),   (1, EVEN(1))),
)
STREAM_FINE_8 = (
    ((1, 2,  1,      2,     8,      8,      1),      (1, 2)),
    ((2, 1,  1,      2,     32,     7,      1),      (1, 2)),
    ((2, 1,  1,      2,     64,     5,      1),      (1, 2)),
    ((2, 1,  1,      2,     128,    3,      1),      (1, 2)),
)
FLAT_FINE_8 = (
    ((2, 1,  1,      2,     128,    4,      1),      (1, EVEN(1))),
    ((2, 1,  2,      2,     128,    3,      1, 2),   (1,)),
)
# fmt: on

Rows = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def _implementation(types: tuple[TypeConfig, ...], family: str, rows: Rows) -> ImplConfig:
    schedules = [
        ScheduleConfig(TileConfig(family, *tile), max(split, 0), max(-split, 0))
        for tile, splits in rows
        for split in splits
    ]
    return ImplConfig(types, tuple(schedules))


IMPLEMENTATIONS = (
    _implementation(SYMMETRIC, "stream", STREAM),
    _implementation(SYMMETRIC, "flat", FLAT),
    _implementation(GENERAL_4, "stream", STREAM_4),
    _implementation(GENERAL_4, "flat", FLAT_4),
    _implementation(GENERAL_8, "stream", STREAM_8),
    _implementation(GENERAL_8, "flat", FLAT_8),
    _implementation(FINE_4, "stream", STREAM_FINE_4),
    _implementation(FINE_4, "flat", FLAT_FINE_4),
    _implementation(FINE_8, "stream", STREAM_FINE_8),
    _implementation(FINE_8, "flat", FLAT_FINE_8),
)


def specializations() -> tuple[Specialization, ...]:
    """Every kernel of the bundle, sorted by id."""
    return tuple(sorted((s for impl in IMPLEMENTATIONS for s in impl.specializations), key=lambda s: s.id))


def typed_schedules() -> tuple[tuple[TypeConfig, ScheduleConfig], ...]:
    """Every schedule with each of its types, in the order of the catalogue: fewest tokens first in each family."""
    return tuple(pair for impl in IMPLEMENTATIONS for pair in impl.typed_schedules)


def schedules() -> tuple[ScheduleConfig, ...]:
    """Every schedule of the bundle, in the same order."""
    return tuple(dict.fromkeys(schedule for _, schedule in typed_schedules()))
