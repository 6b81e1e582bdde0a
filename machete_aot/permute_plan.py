# SPDX-License-Identifier: Apache-2.0
"""How the kernel that permutes columns is launched: a pure function of the sizes and of the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

from .config import ceil_div
from .errors import ArgumentError
from .permute_abi import PIECE

WARP = 32
MAX_GRID_Y = 65535
MAX_ROWS = 2**31 - 1
MAX_COLUMNS = 2**30 - 1  # a row's bytes are counted in 32 bits

# From global memory an SM gathers about one element a clock: the addresses of a warp lie in as many cache lines.
# Copying rows to shared memory first takes some clocks more at once, and then many fewer. Both are reckoned, not
# measured: `python -m benchmarks.act_order --ways` times either way.
COPY_CLOCKS = 400  # of one more access to L2 and a barrier
COPY_BYTES = 64  # a clock of an SM

CTAS_PER_SM = 2  # of 1024 threads; more of fewer have room, and are not needed
STAGED_BYTES = 64 << 10  # that a CTA copies at a time, if a row is not larger
LEAST_COPYING = 256  # threads of a CTA that copies rows, even if fewer have columns


class PermutePlan(NamedTuple):
    """A launch. ``pieces``, ``stage_rows``: as in ``permute_abi.FIELDS``."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    pieces: int
    stage_rows: int


@functools.lru_cache(maxsize=4096)
def make_plan(rows: int, columns: int, sms: int, threads: int, shared_memory: int) -> PermutePlan:
    """The launch for a matrix of at least one element.

    ``threads``: the most of a CTA; ``shared_memory``: bytes that a CTA may have. Raises ArgumentError past a limit.
    """
    if rows > MAX_ROWS or columns > MAX_COLUMNS:
        raise ArgumentError(
            f"permute_columns takes {MAX_ROWS} rows and {MAX_COLUMNS} columns at most, got {rows} and {columns}; "
            "split the matrix"
        )
    row_bytes = _row_bytes(columns)
    few = rows * columns <= sms * (COPY_CLOCKS + row_bytes // COPY_BYTES)
    if few or row_bytes > shared_memory:
        return direct_plan(rows, columns)
    return staged_plan(rows, columns, sms, threads)


def direct_plan(rows: int, columns: int) -> PermutePlan:
    """Gathering from global memory. A warp a CTA: warps on as many SMs as there are gather fastest."""
    return PermutePlan((ceil_div(ceil_div(columns, PIECE), WARP), min(rows, MAX_GRID_Y), 1), (WARP, 1, 1), 0, WARP, 0)


def staged_plan(rows: int, columns: int, sms: int, threads: int) -> PermutePlan:
    """Gathering from shared memory, which a row must fit into."""
    total, row_bytes = ceil_div(columns, PIECE), _row_bytes(columns)
    # Few rows are divided among CTAs by columns, though each then copies the whole row.
    parts = max(ceil_div(total, threads), min(sms // rows, ceil_div(total, WARP)))
    pieces = ceil_div(total, parts)
    parts = ceil_div(total, pieces)
    groups = max(1, CTAS_PER_SM * sms // parts)  # CTAs along the rows: all at once
    most = max(1, STAGED_BYTES // row_bytes)
    turns = ceil_div(rows, groups * most)
    stage_rows = ceil_div(rows, groups * turns)
    block = min(threads, max(LEAST_COPYING, ceil_div(pieces, WARP) * WARP))
    return PermutePlan(
        (parts, min(groups, ceil_div(rows, stage_rows)), 1), (block, 1, 1), stage_rows * row_bytes, pieces, stage_rows
    )


def _row_bytes(columns: int) -> int:
    """Of a row in shared memory."""
    return ceil_div(2 * columns, 16) * 16
