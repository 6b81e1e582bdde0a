# SPDX-License-Identifier: Apache-2.0
"""Where CTAs of launches come to lie: padding, the shared memory that is asked for, and letting the next one in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from machete_aot import abi, placement
from machete_aot.config import SHARED_PER_SM, SHARED_RESERVED, ScheduleConfig, TileConfig
from machete_aot.launch import LaunchPlan, Shape, make_plan
from machete_aot.manifest import KernelInfo
from machete_aot.placement import OVER_HALF
from stub.bundles import BF16, FLAT, NARROW, WIDE, make_bundle, schedule

BUNDLE = make_bundle()
ROOM = SHARED_PER_SM - 2 * SHARED_RESERVED  # of two CTAs on an SM
HERE = (0, 1)  # device and stream


@pytest.fixture(autouse=True)
def _start_over() -> Iterator[None]:
    placement._last.__dict__.clear()
    yield
    placement._last.__dict__.clear()


def kernel(tile: TileConfig) -> KernelInfo:
    return BUNDLE.manifest.kernel_for(BF16, schedule(tile))


def shape(m: int, n: int, k: int) -> Shape:
    return Shape(m, n, k, 128, -(-k // 8) * 8, -(-n // 8) * 8, n)


def plan(tile: TileConfig, split: int, m: int, n: int, k: int, sms: int = 132) -> LaunchPlan:
    return make_plan(kernel(tile), ScheduleConfig(tile, split), shape(m, n, k), sms=sms)


@pytest.mark.parametrize(
    ("n", "k", "split", "expected"),
    # tiles of 128 rows, steps of 256 k, 5 stages
    [
        (128 * 121, 4096, 1, 132),  # within 10%
        (128 * 120, 4096, 1, 120),  # exactly 10%: not below
        (8192, 4096, 1, 64),
        (8192, 4096, 2, 132),  # 128
        (8192, 4096, 4, 256),  # clusters of 4 do not fill all SMs
        (128 * 133, 4096, 1, 133),  # the next multiple, 264, is far
        (128 * 240, 4096, 1, 240),
        (128 * 241, 4096, 1, 264),
        (128 * 132, 4096, 1, 132),
        (1, 4096, 4, 4),
        (128 * 67, 1280, 1, 132),  # more than half of the SMs, and all of K in the ring
        (128 * 66, 1280, 1, 66),
        (128 * 67, 1281, 1, 67),
        (128 * 34, 2560, 2, 132),
        (128 * 34, 2561, 2, 68),
        (128 * 133, 1280, 1, 133),
    ],
)
def test_padding(n: int, k: int, split: int, expected: int) -> None:
    found = plan(NARROW, split, 8, n, k)
    assert found.grid == (expected, 1, 1)
    assert found.cluster == (split, 1, 1)
    assert found.params["row_tiles"] <= expected // split < 2 * found.params["row_tiles"]  # a tile twice at most


def test_padding_is_a_multiple_of_the_cluster() -> None:
    assert plan(NARROW, 2, 1, 128 * 55, 4096, sms=113).grid == (114, 1, 1)


def test_padding_of_several_token_tiles_fits_exactly() -> None:
    assert plan(NARROW, 2, 9, 4096, 4096).grid == (66, 2, 1)  # 128 to 132
    assert plan(NARROW, 2, 9, 4096, 4096, sms=130).grid == (64, 2, 1)  # 65 is no multiple of 2
    assert plan(NARROW, 1, 9, 4096, 4096, sms=70).grid == (35, 2, 1)
    assert plan(NARROW, 1, 17, 128 * 42, 4096).grid == (44, 3, 1)
    assert plan(NARROW, 1, 17, 128 * 42, 4096, sms=131).grid == (42, 3, 1)
    assert plan(WIDE, 1, 4096, 128, 4096).grid == (2, 64, 1)


@pytest.mark.parametrize(
    ("ctas_per_sm", "stages", "split", "m", "n", "k", "late"),
    # steps of 256 k, 128 rows a tile
    [
        (2, 3, 1, 8, 8192, 256 * 7, 6),  # two fillings of three stages before the end
        (2, 3, 1, 8, 8192, 256 * 6, 0),  # copied by then
        (1, 3, 1, 8, 8192, 256 * 4, 3),
        (1, 3, 1, 8, 8192, 256 * 3, 0),
        (2, 3, 2, 8, 8192, 256 * 14, 6),  # 7 steps a CTA
        (2, 3, 2, 8, 8192, 256 * 13, 0),  # 6 in one of the two
        (2, 3, 1, 8, 128 * 132, 256 * 7, 6),
        (2, 3, 1, 8, 128 * 133, 256 * 7, 0),  # two CTAs on an SM
        (2, 3, 1, 9, 128 * 67, 256 * 7, 0),  # 67 for each of two tiles of tokens
        (2, 3, 1, 9, 128 * 66, 256 * 7, 6),
    ],
)
def test_late_steps(ctas_per_sm: int, stages: int, split: int, m: int, n: int, k: int, late: int) -> None:
    tile = replace(NARROW, ctas_per_sm=ctas_per_sm, stages=stages)
    found = make_plan(replace(kernel(NARROW), tile=tile), ScheduleConfig(tile, split), shape(m, n, k), sms=132)
    assert found.params["late_steps"] == late
    assert plan(FLAT, 1, m, n, k).params["late_steps"] == 0


@pytest.mark.parametrize(
    ("tile", "split", "m", "n", "one", "every"),
    [
        (NARROW, 2, 8, 8192, True, True),  # 128 and padding
        (NARROW, 1, 8, 8192, True, False),
        (NARROW, 1, 8, 128 * 133, False, False),
        (NARROW, 4, 8, 128 * 30, True, False),  # 120 SMs have a place in a cluster of 4
        (NARROW, 4, 8, 128 * 31, False, False),
        (NARROW, 1, 9, 128 * 66, True, True),
        (NARROW, 1, 9, 128 * 67, False, False),
        (FLAT, 1, 4096, 8192, True, True),
        (FLAT, 1, 257, 129, True, False),
    ],
)
def test_who_has_an_sm_alone(tile: TileConfig, split: int, m: int, n: int, one: bool, every: bool) -> None:
    found = plan(tile, split, m, n, 8192)
    assert (found.one_per_sm, found.every_sm) == (one, every)
    assert bool(found.params["flags"] & abi.FLAG_ONE_PER_SM) == one


def test_two_ctas_of_over_half_do_not_fit() -> None:
    assert 2 * OVER_HALF > ROOM
    assert OVER_HALF + 112 * 1024 <= ROOM  # but one beside any kernel of which two do
    for found in BUNDLE.manifest.kernels_for(BF16):
        if found.tile.ctas_per_sm > 1:
            assert found.tile.shared_memory(2, BF16) <= 112 * 1024


def asked(*launches: tuple[int, bool, bool, tuple[int, int]]) -> list[int]:
    return [placement.shared_memory(*launch) for launch in launches]


def test_over_half_unless_every_sm_has_the_same_room() -> None:
    one = (100_000, True, True, HERE)
    assert asked(one, one, one) == [OVER_HALF, 100_000, 100_000]
    assert asked((100_000, False, False, HERE), one, one) == [100_000, OVER_HALF, 100_000]
    few = (100_000, True, False, HERE)  # leaves some SMs empty
    assert asked(few, few, one, few, one) == [100_000, OVER_HALF, OVER_HALF, 100_000, OVER_HALF]
    for elsewhere in ((0, 2), (1, 1)):  # another stream, another device's stream of the same address
        other = (100_000, True, True, elsewhere)
        assert asked(other, one, one, other) == [OVER_HALF, OVER_HALF, 100_000, OVER_HALF]


def test_a_launch_that_has_no_room_beside_the_last() -> None:
    large, small = (150_000, True, True, HERE), (ROOM - 150_000, True, True, HERE)
    assert asked(large, small, small) == [150_000, ROOM - 150_000, ROOM - 150_000]
    more = (ROOM - 150_000 + 1, True, True, HERE)
    assert asked(large, more) == [150_000, OVER_HALF]
    assert asked(large, large) == [150_000, 150_000]


def test_threads_have_launched_nothing_of_each_other() -> None:
    one, found = (100_000, True, True, HERE), []
    assert asked(one, one) == [OVER_HALF, 100_000]
    thread = threading.Thread(target=lambda: found.extend(asked(one, one)))
    thread.start()
    thread.join()
    assert found == [OVER_HALF, 100_000]
