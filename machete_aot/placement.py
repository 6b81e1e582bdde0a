# SPDX-License-Identifier: Apache-2.0
"""Where the CTAs of launches that overlap come to lie, and when: padding, shared memory, and letting the next one in.

Under overlap a kernel's CTAs move in beside those of the kernel before it, or as these end, and then wait. An SM with
more room gets more of them. So a launch of at most one CTA an SM may get two on some SMs and none on others, and then
takes up to twice as long (measured: docs/performance.md). Two things prevent that:

* Such a launch asks for more than half of an SM's shared memory, unless the launch before it on the stream leaves the
  same room on every SM. Then it asks for what it needs, and the two lie side by side.
* A launch that would leave few SMs empty is padded with CTAs past the last row, which hold their places.
"""

from __future__ import annotations

import threading

from .config import SHARED_PER_SM, SHARED_RESERVED, TileConfig, ceil_div

OVER_HALF = SHARED_PER_SM // 2 - SHARED_RESERVED + 512  # what two CTAs of an SM cannot both have, in what is handed out


def usable_sms(sms: int, cluster: int) -> int:
    """On how many SMs clusters of so many CTAs can lie, one CTA each: 4 and more leave SMs of a GPC unused."""
    return sms if cluster <= 2 else max(1, sms * 10 // 11)


def padded(tile: TileConfig, split: int, row_tiles: int, token_tiles: int, k: int, sms: int) -> int:
    """How many CTAs of family "stream" along the rows: those of the row tiles, or more, which fill all SMs evenly.

    More where that is less than a tenth more; and where most SMs have a CTA, whose ring holds all of its K: the next
    launch can then copy all that it needs beside this one, which is worth more than some idle SMs.
    """
    ctas = row_tiles * split
    full = ceil_div(ctas * token_tiles, sms) * sms
    evenly = ceil_div(full, token_tiles * split) * split
    near = 10 * full < 11 * ctas * token_tiles
    short = full == sms < 2 * ctas * token_tiles and ceil_div(tile.steps(k), split) <= tile.stages
    if split <= 2 and (near or short) and (token_tiles == 1 or evenly * token_tiles == full):
        return evenly
    return ctas


def late_steps(tile: TileConfig, split: int, k: int, one_per_sm: bool) -> int:
    """How many ring steps before its end a CTA of family "stream" lets the next kernel in; 0: at its start.

    ``one_per_sm``: no SM has two CTAs of the launch. The next kernel's first copies should arrive while this one ends,
    not while it is itself waiting for memory: a filling of the ring before the end, or two where the next kernel's CTAs
    have room beside these (measured: docs/performance.md). Short ranges of K have been copied by then in any case.
    """
    if tile.family != "stream" or not one_per_sm:
        return 0
    late = tile.stages * min(tile.ctas_per_sm, 2)
    return late if tile.steps(k) // max(split, 1) > late else 0


class _Last(threading.local):
    """The last launch of this thread: device and stream, and shared memory of each CTA if every SM has one, else 0."""

    place = (-1, 0)
    shared_memory = 0


_last = _Last()


def shared_memory(needed: int, one_per_sm: bool, every_sm: bool, place: tuple[int, int]) -> int:
    """The dynamic shared memory that the next launch of this thread asks for: ``needed``, or more.

    ``one_per_sm``: no SM is to have two of its CTAs; ``every_sm``: each has one. ``place``: device and stream, since
    every device has a default stream of the same address.
    """
    found = needed
    if one_per_sm:
        beside = _last.place == place and 0 < _last.shared_memory <= SHARED_PER_SM - 2 * SHARED_RESERVED - needed
        found = needed if beside else max(needed, OVER_HALF)
    _last.place, _last.shared_memory = place, found if every_sm else 0
    return found
