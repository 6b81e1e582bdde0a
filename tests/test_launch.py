# SPDX-License-Identifier: Apache-2.0
"""Launches: plans as a pure function, and what reaches the driver, parameter byte by parameter byte."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from math import lcm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_kernels.catalogue import specializations
from machete_aot import abi, driver, launch, tensor_map
from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig
from machete_aot.errors import ArgumentError, CaptureError, DriverCallError
from machete_aot.launch import LaunchPlan, Operands, Shape, make_plan, multiply, parameter_bytes
from machete_aot.manifest import KernelInfo
from machete_aot.placement import OVER_HALF
from stub.bundles import BF16, FLAT, FP16, GENERAL, NARROW, WIDE, make_bundle, schedule
from stub.harness import Stub, stubbed

STREAM = 0x5EED0
WORKSPACE = 0x7F5000000000
OPERANDS = Operands(acts=0x7F0000000000, weights=0x7F1000000000, scales=0x7F2000000000, bias=0, out=0x7F4000000000)
BUNDLE = make_bundle(general=GENERAL)


def kernel(tile: TileConfig) -> KernelInfo:
    return BUNDLE.manifest.kernel_for(BF16, schedule(tile))


def shape(m: int, n: int, k: int, group: int = 128, **more: int) -> Shape:
    full = {"row_stride": -(-k // 8) * 8, "scale_stride": -(-n // 8) * 8, "out_stride": n, **more}
    return Shape(m, n, k, group, **full)


def plan(tile: TileConfig, split: int, m: int, n: int, k: int, group: int = 128, **more: int) -> LaunchPlan:
    return make_plan(kernel(tile), ScheduleConfig(tile, split), shape(m, n, k, group, **more), sms=132)


def even_plan(m: int, n: int, k: int) -> LaunchPlan:
    return make_plan(kernel(FLAT), ScheduleConfig(FLAT, 0, 1), shape(m, n, k), sms=132)


@pytest.mark.parametrize(
    ("split", "k", "expected"),
    # a step of NARROW is 256 k
    [
        (4, 4096, 4),
        (4, 1024, 4),
        (4, 1000, 4),
        (4, 768, 2),
        (4, 513, 2),
        (4, 512, 2),
        (4, 256, 1),
        (4, 1, 1),
        (2, 768, 2),
    ],
)
def test_split_leaves_every_cta_a_step(split: int, k: int, expected: int) -> None:
    assert NARROW.effective_split(split, k) == expected


def test_grid_of_whole_tiles_is_at_most_what_fits() -> None:
    assert plan(FLAT, 1, 4096, 8192, 4096).grid == (132, 1, 1)
    assert plan(FLAT, 1, 257, 129, 4096).grid == (4, 1, 1)
    two = replace(kernel(FLAT), tile=replace(FLAT, stages=1, ctas_per_sm=2))
    assert make_plan(two, ScheduleConfig(two.tile, 1), shape(4096, 8192, 4096), sms=132).grid == (264, 1, 1)
    for found in (plan(FLAT, 1, 4096, 8192, 4096), plan(FLAT, 1, 257, 129, 4096)):
        assert (found.cluster, found.workspace, found.params["even_tiles"]) == ((1, 1, 1), 0, 0)


@pytest.mark.parametrize(
    ("m", "n", "k", "ctas", "tiles", "steps", "longer"),
    # 1024 tiles of 32 steps for 132 CTAs: seven rounds and 100 tiles, of which six rounds stay whole
    [
        (4096, 8192, 4096, 132, 232, 56, 32),
        (256, 128 * 132, 4096, 132, 0, 0, 0),  # even already
        (256, 128 * 133, 4096, 132, 133, 32, 32),
        (256, 128 * 131, 4096, 132, 131, 31, 100),
        (100, 1024, 4096, 132, 8, 1, 124),
        (1, 1, 1, 1, 1, 1, 0),
        (257, 129, 129, 8, 4, 1, 0),  # fewer steps than CTAs
    ],
)
def test_even_shares(m: int, n: int, k: int, ctas: int, tiles: int, steps: int, longer: int) -> None:
    found = even_plan(m, n, k)
    assert (found.grid, found.cluster, found.shared_memory) == ((ctas, 1, 1), (1, 1, 1), FLAT.shared_memory(1, BF16))
    p = found.params
    assert (p["even_tiles"], p["share_steps"], p["longer_shares"]) == (tiles, steps, longer)
    assert (p["row_tiles"], p["token_tiles"], p["steps"]) == (-(-n // 128), -(-m // 256), -(-k // 128))
    assert bool(found.workspace) == (tiles > 0)


@pytest.mark.parametrize(
    ("m", "n", "k", "ctas", "tiles", "steps", "longer"),
    # as above, in pairs of 256 rows: 512 tiles for 66 clusters
    [
        (4096, 8192, 4096, 132, 116, 56, 16),
        (256, 256 * 66, 4096, 132, 0, 0, 0),
        (256, 128 * 131, 4096, 132, 0, 0, 0),  # the last CTA has no rows
        (256, 128 * 133, 4096, 132, 67, 32, 32),
        (1, 1, 129, 4, 1, 1, 0),  # two steps for two clusters
    ],
)
def test_even_shares_of_clusters(m: int, n: int, k: int, ctas: int, tiles: int, steps: int, longer: int) -> None:
    pair = replace(FLAT, cluster=2)
    found = make_plan(replace(kernel(FLAT), tile=pair), ScheduleConfig(pair, 0, 1), shape(m, n, k), sms=132)
    assert (found.grid, found.cluster, found.shared_memory) == ((ctas, 1, 1), (2, 1, 1), FLAT.shared_memory(1, BF16))
    p = found.params
    assert (p["even_tiles"], p["share_steps"], p["longer_shares"]) == (tiles, steps, longer)
    assert (p["row_tiles"], p["token_tiles"], p["steps"]) == (-(-n // 256), -(-m // 256), -(-k // 128))
    assert found.workspace == (FLAT.workspace(ctas) if tiles else 0)


@pytest.mark.parametrize(("n", "ctas"), [(1, 2), (257, 4), (128 * 131, 132), (128 * 133, 132)])
def test_whole_tiles_of_clusters(n: int, ctas: int) -> None:
    pair = replace(FLAT, cluster=2)
    found = make_plan(replace(kernel(FLAT), tile=pair), ScheduleConfig(pair, 1), shape(256, n, 4096), sms=132)
    assert (found.grid, found.cluster, found.workspace) == ((ctas, 1, 1), (2, 1, 1), 0)
    assert found.params["row_tiles"] == -(-n // 256)
    acts, scales, _ = found.maps
    assert acts and acts.box == (64, 256, 1)  # each CTA copies one of a step's two units
    assert scales and scales.box == (128, 1)  # and all scales of its own rows
    acts = plan(FLAT, 1, 256, n, 4096).maps[0]
    assert acts and acts.box == (64, 256, 2)


def flags_of(found: LaunchPlan) -> int:
    """Flags of a launch but for the one that says how many of its CTAs an SM has, which has a test of its own."""
    return found.params["flags"] & ~abi.FLAG_ONE_PER_SM


def test_a_tile_that_is_not_full_copies_no_more_tokens_than_there_are() -> None:
    for tile, m, rows in ((NARROW, 1, 1), (NARROW, 7, 7), (WIDE, 33, 33), (FLAT, 255, 255)):
        found = plan(tile, 1, m, 8192, 4096)
        assert found.maps[0] == ((4096, m), (8192,), (64, rows), True)
        assert flags_of(found) == abi.FLAG_ACTS_2D | abi.FLAG_SCALE_MAPS
    for tile, m in ((NARROW, 8), (NARROW, 9), (WIDE, 65), (FLAT, 256), (FLAT, 257)):
        found = plan(tile, 1, m, 8192, 4096)
        assert found.maps[0] == ((64, m, 64), (8192, 128), (64, tile.tokens, tile.step_units), True)
        assert flags_of(found) == abi.FLAG_SCALE_MAPS
    assert plan(WIDE, 1, 33, 8192, 4100).maps[0] == ((4100, 33), (8208,), (64, 33), True)
    assert plan(WIDE, 1, 65, 8192, 4100).maps[0] == ((4100, 65), (8208,), (64, 64), True)


@pytest.mark.parametrize(
    ("tile", "group", "k", "groups"),
    [
        # a stage of FLAT is 128 k
        *((FLAT, 128, 4096, 1), (FLAT, 64, 4096, 2), (FLAT, 32, 4096, 4), (FLAT, 256, 4096, 1), (FLAT, 384, 4096, 1)),
        *((FLAT, 192, 4096, 0), (FLAT, 96, 4096, 0), (FLAT, 160, 4096, 0), (FLAT, 4064, 4096, 0)),
        # of NARROW and WIDE 256
        *((NARROW, 128, 4096, 2), (NARROW, 64, 4096, 4), (NARROW, 32, 4096, 8), (NARROW, 256, 4096, 1)),
        *((WIDE, 512, 4096, 1), (WIDE, 192, 4096, 0), (WIDE, 384, 4096, 0), (WIDE, 96, 4096, 0)),
        # one group, whatever its size
        *((NARROW, 4096, 4096, 1), (NARROW, 4100, 4100, 1), (NARROW, 8192, 4100, 1), (FLAT, 192, 192, 1)),
        *((FLAT, 192, 100, 1), (FLAT, 32, 1, 1), (FLAT, 192, 193, 0)),
        # K ends inside a stage or a group
        *((FLAT, 64, 4100, 2), (NARROW, 128, 129, 2), (FLAT, 384, 385, 1)),
    ],
)
def test_groups_of_a_stage(tile: TileConfig, group: int, k: int, groups: int) -> None:
    assert tile.stage_groups(group, k) == groups
    found = plan(tile, 1, 1, 256, k, group)
    assert bool(found.params["flags"] & abi.FLAG_SCALE_MAPS) is (groups > 0)
    assert found.maps[1] == (((256, -(-k // group)), (512,), (tile.rows, groups), False) if groups else None)


@given(st.sampled_from([NARROW, WIDE, FLAT, replace(FLAT, units=1, stages=1)]), st.integers(1, 40))
def test_groups_of_a_stage_are_those_of_every_stage(tile: TileConfig, blocks: int) -> None:
    group, stage = 32 * blocks, 64 * tile.step_units
    k = 2 * lcm(group, stage)  # after which stages and groups begin together again
    touched = [(first // group, (first + stage - 1) // group, first % group) for first in range(0, k, stage)]
    numbers = {last - first + 1 for first, last, _ in touched}
    begin = {at for _, _, at in touched}
    alike = len(numbers) == 1 and (numbers == {1} or begin == {0})
    assert tile.stage_groups(group, k) == (numbers.pop() if alike else 0)


@pytest.mark.parametrize(
    ("n", "more", "zeros"),
    [
        (8192, {}, None),
        (8192, {"flags": abi.FLAG_OUT_FP32}, None),
        (8192, {"zero_stride": 8208}, ((8192, 32), (16416,), (128, 2), False)),
        (8191, {"zero_stride": 8192}, ((8191, 32), (16384,), (128, 2), False)),
        # integers by pairs of bytes
        (8192, {"zero_stride": 8208, "flags": abi.FLAG_INTEGER_ZEROS}, ((4096, 32), (8208,), (128, 2), False)),
        (8191, {"zero_stride": 8192, "flags": abi.FLAG_INTEGER_ZEROS}, ((4096, 32), (8192,), (128, 2), False)),
        (1, {"zero_stride": 16, "flags": abi.FLAG_INTEGER_ZEROS}, ((1, 32), (16,), (128, 2), False)),
    ],
)
def test_maps_of_scales_and_zeros(n: int, more: dict[str, int], zeros: tuple[object, ...] | None) -> None:
    found = plan(NARROW, 1, 8, n, 4096, scale_stride=8200, **more)
    scales = ((n, 32), (16400,), (128, 2), False)  # 128 rows of weights, and two groups in a stage of 256 k
    assert found.maps[1:] == (scales, zeros)
    assert flags_of(found) == more.get("flags", 0) | abi.FLAG_SCALE_MAPS
    # of groups that are not aligned with the stages there are none
    found = plan(NARROW, 1, 8, n, 4096, 192, scale_stride=8200, **more)
    assert found.maps[1:] == (None, None)
    assert flags_of(found) == more.get("flags", 0)
    assert (found.params["group_blocks"], found.params["zero_stride"]) == (6, more.get("zero_stride", 0))


def test_a_tensor_map_can_copy_what_a_stage_of_any_kernel_reads() -> None:
    for tile in {s.tile for s in specializations()}:
        for group in (32, 64, 128, 256, 1 << 20):
            args = tensor_map.group_rows(1 << 15, 1 << 20, 1 << 20, tile.rows, tile.stage_groups(group, 1 << 20))
            assert max(args.box) <= 256 and 2 * args.box[0] % 16 == 0


def test_limits_are_typed() -> None:
    with pytest.raises(ArgumentError, match="at most 65535"):
        plan(NARROW, 1, 8 * 65536, 128, 128)
    with pytest.raises(ArgumentError, match="k = 134217728"):
        plan(NARROW, 1, 1, 128, 2**27)
    with pytest.raises(ArgumentError, match="n = 2147483648"):
        plan(FLAT, 1, 1, 2**31, 128)
    with pytest.raises(ArgumentError, match="out_stride"):
        plan(FLAT, 1, 2, 128, 128, out_stride=2**31)
    with pytest.raises(ArgumentError, match="strides below"):
        plan(FLAT, 1, 2, 128, 128, row_stride=2**39)
    with pytest.raises(ArgumentError, match="tiles"):
        plan(FLAT, 1, 2**31 - 1, 2**31 - 8, 128)


def test_largest_row_stride_is_accepted() -> None:
    assert plan(FLAT, 1, 2, 128, 128, row_stride=2**39 - 8).maps[0].strides[0] == 2**40 - 16


@given(
    st.sampled_from([NARROW, WIDE]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 300),
    st.integers(1, 70000),
    st.integers(1, 20000),
    st.integers(1, 200),
)
def test_stream_grid_covers_the_product(tile: TileConfig, split: int, m: int, n: int, k: int, sms: int) -> None:
    found = make_plan(kernel(tile), ScheduleConfig(tile, split), shape(m, n, k), sms)
    used = found.cluster[0]
    needed = -(-n // tile.rows) * used
    assert used <= split
    assert used & (used - 1) == 0
    assert found.grid[0] % used == 0
    assert found.grid[1] * tile.tokens >= m > (found.grid[1] - 1) * tile.tokens
    assert needed <= found.grid[0]
    if found.grid[0] > needed:  # padding, of less than a tenth or up to all SMs
        assert found.grid[0] * found.grid[1] >= sms
        assert found.grid[0] * 10 < needed * 11 + 10 * used or found.grid[0] < min(sms, 2 * needed) + used
    assert found.shared_memory == tile.shared_memory(used, BF16)


@pytest.mark.parametrize(
    ("k", "group", "blocks"),
    [
        *((4096, 128, 4), (4096, 64, 2), (4096, 32, 1), (4096, 96, 3), (576, 192, 6)),
        *((k, group, 2**26) for k, group in ((4096, 4096), (4100, 8192), (4160, 4160), (100, 100))),  # one group
    ],
)
def test_group_blocks(k: int, group: int, blocks: int) -> None:
    assert plan(NARROW, 1, 1, 128, k, group).params["group_blocks"] == blocks


@pytest.mark.parametrize(
    ("n", "out_stride", "out", "pairs"),
    [(128, 128, 0, True), (128, 130, 4, True), (132, 132, 0, False), (128, 129, 0, False), (128, 128, 2, False)],
)
def test_pairs_are_stored_where_they_are_aligned(n: int, out_stride: int, out: int, pairs: bool) -> None:
    operands = OPERANDS._replace(out=4096 + out)
    data = parameter_bytes(plan(NARROW, 1, 2, n, 128, out_stride=out_stride), operands, 0, 0)
    assert bool(abi.unpack_params(data)["flags"] & abi.FLAG_STORE_PAIRS) is pairs


@pytest.mark.parametrize(
    ("n", "flags", "pairs"),
    [
        (128, 0, True),
        (128, abi.FLAG_OUT_FP16, True),
        (128, abi.FLAG_OUT_FP32, False),  # they are pairs of 16 bits
        (48, abi.FLAG_OUT_BF16 | abi.FLAG_SWIGLU, True),  # 24 columns
        (16, abi.FLAG_OUT_BF16 | abi.FLAG_SWIGLU, True),
        (16, abi.FLAG_OUT_FP32 | abi.FLAG_SWIGLU, False),
        (24, 0, True),
        (20, abi.FLAG_INTEGER_ZEROS, False),
    ],
)
def test_flags_of_the_call_reach_the_kernel(n: int, flags: int, pairs: bool) -> None:
    found = make_plan(kernel(NARROW), ScheduleConfig(NARROW, 1), shape(8, n, 128, flags=flags), sms=132)
    operands = OPERANDS._replace(zeros=0x7F6000000000, channel_scales=0x7F7000000000, token_scales=0x7F8000000000)
    params = abi.unpack_params(parameter_bytes(found, operands, 0, 0))
    stores = abi.FLAG_STORE_PAIRS if pairs else 0
    assert params["flags"] == flags | stores | abi.FLAG_SCALE_MAPS | abi.FLAG_ONE_PER_SM
    for name in ("zeros", "channel_scales", "token_scales"):
        assert params[name] == getattr(operands, name)


def test_flags_are_bits_of_their_own() -> None:
    flags = [value for name, value in vars(abi).items() if name.startswith("FLAG_")]
    assert sorted(flags) == [1 << i for i in range(len(flags))]


def test_general_types_need_more_shared_memory_and_fine_ones_take_a_shorter_k() -> None:
    plain = kernel(NARROW)
    general, fine = (replace(plain, types=TypeConfig("bf16", "u8", "bf16", "float", f)) for f in (False, True))
    for types, aux in (
        (general, 4 * 128 * 4),  # a row of scales and one of zeros in each unit
        (fine, 4 * 128 * 8),  # two of each
    ):
        made = make_plan(types, ScheduleConfig(NARROW, 2), shape(2, 128, 4096, zero_stride=128, code_zero=128), sms=132)
        stage = 4 * 8 * 128 + 4 * 2 * 4096 + aux  # activations, weights, scales and zeros
        assert made.shared_memory == 5 * stage + 256 + 4096 // 2  # 21 barriers, half the slabs
        assert (made.params["zero_stride"], made.params["code_zero"]) == (128, 128)
    with pytest.raises(ArgumentError, match="k = 67108864"):
        make_plan(fine, ScheduleConfig(NARROW, 1), shape(1, 128, 2**26), sms=132)
    make_plan(fine, ScheduleConfig(NARROW, 1), shape(1, 128, 2**26 - 64), sms=132)
    for types in (plain, general):
        make_plan(types, ScheduleConfig(NARROW, 1), shape(1, 128, 2**26), sms=132)
        with pytest.raises(ArgumentError, match="k = 134217728"):
            make_plan(types, ScheduleConfig(NARROW, 1), shape(1, 128, 2**27), sms=132)
    with pytest.raises(ArgumentError, match="zero_stride"):
        make_plan(general, ScheduleConfig(NARROW, 1), shape(1, 128, 128, zero_stride=2**31), sms=132)


def run(
    tile: TileConfig,
    split: int,
    shape: Shape,
    operands: Operands = OPERANDS,
    overlap: bool = False,
    *,
    types: TypeConfig = BF16,
    even_ctas: int = 0,
) -> list[int]:
    """Launches on the stub driver. Returns the sizes of the workspaces that the launch asked for."""
    sizes: list[int] = []

    def allocate(size: int) -> int:
        sizes.append(size)
        return WORKSPACE

    name = schedule(tile, split, even_ctas)
    with driver.current(driver.device(0)):
        multiply(BUNDLE, types, shape, name, operands, 0, STREAM, overlap, allocate)
    return sizes


@stubbed
def test_aligned_launch(stub: Stub) -> None:
    operands = OPERANDS._replace(bias=0x7F3000000000)
    assert run(NARROW, 2, shape(8, 8192, 4096, row_stride=4104, out_stride=8200), operands) == []
    (launch,) = stub.launches
    assert launch.symbol == f"machete_bf16_u4b8__{NARROW.name}"
    assert (launch.grid, launch.block, launch.cluster) == ((132, 1, 1), (352, 1, 1), (2, 1, 1))
    assert launch.shared_memory == OVER_HALF > NARROW.shared_memory(2, BF16)
    assert (launch.device, launch.stream, launch.programmatic, launch.attributes) == (0, STREAM, False, 1)
    assert launch.tensor_maps == (
        (1, OPERANDS.acts, (64, 8, 64), (8208, 128), (64, 8, 4), (1, 1, 1), 0, 3, 3, 0),
        (1, OPERANDS.scales, (8192, 32), (16384,), (128, 2), (1, 1), 0, 0, 3, 0),
        None,
    )
    assert abi.PARAMETERS == ((0, 384), (384, 136))
    assert len(launch.parameters) == 520
    found = launch.params
    assert 0 <= found.pop("token") < 2**64
    assert found == {
        "weights": OPERANDS.weights,
        "scales": OPERANDS.scales,
        "zeros": 0,
        "bias": 0x7F3000000000,
        "channel_scales": 0,
        "token_scales": 0,
        "out": OPERANDS.out,
        "workspace": 0,
        "m": 8,
        "n": 8192,
        "k": 4096,
        "scale_stride": 8192,
        "zero_stride": 0,
        "out_stride": 8200,
        "group_blocks": 4,
        "code_zero": 0,
        "flags": abi.FLAG_STORE_PAIRS | abi.FLAG_SCALE_MAPS | abi.FLAG_ONE_PER_SM,
        "row_tiles": 64,
        "token_tiles": 1,
        "steps": 16,
        "even_tiles": 0,
        "share_steps": 0,
        "longer_shares": 0,
        "late_steps": 0,
    }


@stubbed
def test_ragged_k_takes_the_2d_tensor_map(stub: Stub) -> None:
    run(WIDE, 2, shape(100, 4304, 1160, group=-(-1160 // 64) * 64))
    (launch,) = stub.launches
    assert launch.grid == (2 * -(-4304 // 64), 2, 1)
    assert launch.tensor_map.dims == (1160, 100)
    assert launch.tensor_map.strides == (2320,)
    assert launch.tensor_map.box == (64, 64)
    params = launch.params
    assert params["flags"] == abi.FLAG_ACTS_2D | abi.FLAG_STORE_PAIRS | abi.FLAG_SCALE_MAPS
    assert params["group_blocks"] == abi.ONE_GROUP
    scales = launch.tensor_maps[1]
    assert scales and (scales.dims, scales.box) == ((4304, 1), (64, 1))


@stubbed
def test_launch_with_zeros(stub: Stub) -> None:
    operands = OPERANDS._replace(zeros=0x7F6000000000)
    for flags in (0, abi.FLAG_INTEGER_ZEROS):
        for group in (64, 192):
            sizes = shape(8, 136, 4096, group, zero_stride=144, flags=flags)
            types = TypeConfig("bf16", "u4", "bf16", "int" if flags else "float")
            run(NARROW, 1, sizes, operands, types=types)
    floating, unaligned, integer, unaligned_too = stub.launches
    scales = (1, OPERANDS.scales, (136, 64), (272,), (128, 4), (1, 1), 0, 0, 3, 0)
    zeros = (1, operands.zeros, (136, 64), (288,), (128, 4), (1, 1), 0, 0, 3, 0)
    assert floating.tensor_maps[1:] == (scales, zeros)
    assert integer.tensor_maps[1:] == (scales, (*zeros[:2], (68, 64), (144,), *zeros[4:]))
    for found in (unaligned, unaligned_too):
        assert found.tensor_maps[0] == floating.tensor_maps[0]
        assert found.tensor_maps[1:] == (None, None)
        assert found.params["zeros"] == operands.zeros and not found.params["flags"] & abi.FLAG_SCALE_MAPS


@stubbed
def test_split_is_clamped_with_its_shared_memory(stub: Stub) -> None:
    run(NARROW, 4, shape(1, 128, 600))
    run(NARROW, 4, shape(1, 128, 256))
    assert [(x.cluster, x.attributes) for x in stub.launches] == [((2, 1, 1), 1), ((1, 1, 1), 0)]
    assert plan(NARROW, 4, 1, 128, 600).shared_memory == NARROW.shared_memory(2, BF16)
    assert plan(NARROW, 4, 1, 128, 256).shared_memory == NARROW.shared_memory(1, BF16)


@stubbed
def test_launch_of_whole_tiles(stub: Stub) -> None:
    assert run(FLAT, 1, shape(4096, 8192, 4096), types=FP16) == []  # no workspace
    (launch,) = stub.launches
    assert launch.symbol == f"machete_fp16_u4b8__{FLAT.name}"
    assert (launch.grid, launch.block, launch.attributes) == ((132, 1, 1), (384, 1, 1), 0)
    assert launch.tensor_map.box == (64, 256, 2)
    params = launch.params
    assert (params["workspace"], params["even_tiles"]) == (0, 0)
    assert (params["row_tiles"], params["token_tiles"], params["steps"]) == (64, 16, 32)


@stubbed
def test_launch_of_even_shares(stub: Stub) -> None:
    bytes_of_132 = 2048 + 132 * 128 * 256 * 4  # 1,056 bytes of flags in whole KiB, and a tile of sums for each CTA
    assert run(FLAT, 0, shape(4096, 8192, 4096), even_ctas=1) == [bytes_of_132]
    (launch,) = stub.launches
    assert launch.symbol == f"machete_bf16_u4b8__{FLAT.name}"
    assert (launch.grid, launch.block, launch.cluster) == ((132, 1, 1), (384, 1, 1), (1, 1, 1))
    assert (launch.attributes, launch.shared_memory) == (0, FLAT.shared_memory(1, BF16))
    params = launch.params
    assert params["workspace"] == WORKSPACE
    assert (params["row_tiles"], params["token_tiles"], params["steps"]) == (64, 16, 32)
    assert (params["even_tiles"], params["share_steps"], params["longer_shares"]) == (232, 56, 32)


@stubbed
def test_even_shares_ask_for_what_they_use(stub: Stub) -> None:
    tile = 128 * 256 * 4
    assert run(FLAT, 0, shape(1, 128, 256), even_ctas=1) == [1024 + 2 * tile]  # two steps, for two CTAs
    assert run(FLAT, 0, shape(256, 128 * 132, 4096), even_ctas=1) == []  # a tile for each CTA: nothing to hand over
    assert [x.grid for x in stub.launches] == [(2, 1, 1), (132, 1, 1)]
    params = [x.params for x in stub.launches]
    assert [(p["workspace"], p["even_tiles"]) for p in params] == [(WORKSPACE, 1), (0, 0)]


@stubbed
def test_even_shares_follow_the_device(stub: Stub) -> None:
    stub.set(sms=114)
    run(FLAT, 0, shape(4096, 8192, 4096), even_ctas=1)
    assert stub.launches[0].grid == (114, 1, 1)


@stubbed
def test_every_launch_has_a_token_of_its_own(stub: Stub) -> None:
    launch._tokens = itertools.count(2**64 - 2)  # the last ones before it starts again
    for _ in range(4):
        run(FLAT, 0, shape(100, 1024, 4096), even_ctas=1)
    tokens = [x.params["token"] for x in stub.launches]
    assert tokens == [2**64 - 2, 2**64 - 1, 0, 1]


def test_tokens_start_anywhere() -> None:
    """What lies in memory that was never cleared is no token but by chance."""
    command = [sys.executable, "-c", "from machete_aot import launch; print(next(launch._tokens))"]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) > 2**32


@stubbed
def test_even_shares_overlap_too(stub: Stub) -> None:
    run(FLAT, 0, shape(100, 1024, 4096), even_ctas=1, overlap=True)
    assert [(x.programmatic, x.cluster, x.attributes) for x in stub.launches] == [(1, (1, 1, 1), 1)]


@stubbed
def test_nothing_is_allocated_for_a_launch_that_cannot_be(stub: Stub) -> None:
    def allocate(size: int) -> int:
        pytest.fail(f"{size} bytes")

    stub.set(capturing=1)
    with pytest.raises(CaptureError), driver.current(driver.device(0)):
        multiply(BUNDLE, BF16, shape(1, 128, 256), schedule(FLAT, 0, 1), OPERANDS, 0, STREAM, False, allocate)
    assert not stub.launches


@stubbed
def test_overlap_is_one_attribute(stub: Stub) -> None:
    run(NARROW, 1, shape(1, 128, 4096), overlap=True)
    run(NARROW, 2, shape(1, 128, 4096), overlap=True)
    run(NARROW, 2, shape(1, 128, 4096), overlap=False)
    assert [(x.programmatic, x.cluster[0], x.attributes) for x in stub.launches] == [(1, 1, 1), (1, 2, 2), (0, 2, 1)]


@stubbed
def test_tensor_maps_are_encoded_once(stub: Stub) -> None:
    for _ in range(3):
        run(NARROW, 1, shape(1, 128, 4096))
        run(NARROW, 1, shape(2, 128, 4096))
        run(NARROW, 1, shape(1, 128, 4096), OPERANDS._replace(acts=OPERANDS.acts + 16))
        run(NARROW, 1, shape(1, 128, 4096), OPERANDS._replace(scales=OPERANDS.scales + 16))
    assert stub.calls("cuTensorMapEncodeTiled") == 8  # of activations and of scales
    assert len({launch.tensor_maps for launch in stub.launches}) == 4
    for _ in range(2):
        run(NARROW, 1, shape(1, 128, 4096, 192))  # only of the activations
    assert stub.calls("cuTensorMapEncodeTiled") == 9


@stubbed
def test_failed_encoding_and_launch_are_typed(stub: Stub) -> None:
    for name in ("acts", "scales"):
        wrong = OPERANDS._replace(**{name: getattr(OPERANDS, name) + 2})
        with pytest.raises(DriverCallError, match=f"cuTensorMapEncodeTiled failed.* address {getattr(wrong, name):#x}"):
            run(NARROW, 1, shape(1, 128, 4096), wrong)
    stub.fail("cuLaunchKernelEx", 701)
    with pytest.raises(DriverCallError, match=r"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES \(701\)") as caught:
        run(NARROW, 1, shape(1, 128, 4096))
    assert (caught.value.call, caught.value.code) == ("cuLaunchKernelEx", 701)
    stub.fail("cuLaunchKernelEx", 0)
    run(NARROW, 1, shape(1, 128, 4096))
    assert len(stub.launches) == 1


@stubbed
def test_unknown_schedule_lists_what_there_is(stub: Stub) -> None:
    with pytest.raises(ArgumentError, match=schedule(NARROW, 4)):
        multiply(BUNDLE, BF16, shape(1, 128, 128), "nonsense", OPERANDS, 0, STREAM, False, lambda size: 0)
    assert not stub.launches
