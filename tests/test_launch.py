# SPDX-License-Identifier: Apache-2.0
"""Launches: plans as a pure function, and what reaches the driver, parameter byte by parameter byte."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machete_aot import abi, driver, launch
from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig
from machete_aot.errors import ArgumentError, CaptureError, DriverCallError
from machete_aot.launch import LaunchPlan, Operands, Shape, make_plan, multiply, parameter_bytes
from machete_aot.manifest import KernelInfo
from machete_aot.placement import OVER_HALF
from stub.bundles import BF16, FLAT, FP16, NARROW, WIDE, make_bundle, schedule
from stub.harness import Stub, stubbed

STREAM = 0x5EED0
WORKSPACE = 0x7F5000000000
OPERANDS = Operands(acts=0x7F0000000000, weights=0x7F1000000000, scales=0x7F2000000000, bias=0, out=0x7F4000000000)
BUNDLE = make_bundle()


def kernel(tile: TileConfig) -> KernelInfo:
    return BUNDLE.manifest.kernel_for(BF16, schedule(tile))


def shape(m: int, n: int, k: int, group: int = 128, **more: int) -> Shape:
    full = {"row_stride": -(-k // 8) * 8, "scale_stride": -(-n // 8) * 8, "out_stride": n, **more}
    return Shape(m, n, k, group, **full)


def plan(tile: TileConfig, split: int, m: int, n: int, k: int, group: int = 128, **strides: int) -> LaunchPlan:
    return make_plan(kernel(tile), ScheduleConfig(tile, split), shape(m, n, k, group, **strides), sms=132)


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
    assert found.acts.box == (64, 256, 1)  # each CTA copies one of a step's two units
    assert plan(FLAT, 1, 256, n, 4096).acts.box == (64, 256, 2)


def test_a_tile_that_is_not_full_copies_no_more_tokens_than_there_are() -> None:
    for tile, m, rows in ((NARROW, 1, 1), (NARROW, 7, 7), (WIDE, 33, 33), (FLAT, 255, 255)):
        found = plan(tile, 1, m, 8192, 4096)
        assert found.acts == ((4096, m), (8192,), (64, rows))
        assert found.params["flags"] == abi.FLAG_ACTS_2D
    for tile, m in ((NARROW, 8), (NARROW, 9), (WIDE, 65), (FLAT, 256), (FLAT, 257)):
        found = plan(tile, 1, m, 8192, 4096)
        assert found.acts == ((64, m, 64), (8192, 128), (64, tile.tokens, tile.step_units))
        assert found.params["flags"] == 0
    assert plan(WIDE, 1, 33, 8192, 4100).acts == ((4100, 33), (8208,), (64, 33))
    assert plan(WIDE, 1, 65, 8192, 4100).acts == ((4100, 65), (8208,), (64, 64))


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
    assert plan(FLAT, 1, 2, 128, 128, row_stride=2**39 - 8).acts.strides[0] == 2**40 - 16


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
        *((4096, 128, 4), (4096, 64, 2), (4096, 32, 1), (4096, 96, 3), (4096, 4096, 128), (4100, 8192, 129)),
        *((4160, 4160, 130), (100, 100, 4), (576, 192, 6)),
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
    assert params["flags"] == flags | (abi.FLAG_STORE_PAIRS if pairs else 0)
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
        assert made.shared_memory == 5 * stage + 128 + 4096 // 2  # barriers, and half of the slabs, from the other CTA
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
    assert launch.tensor_map == (
        1, OPERANDS.acts, (64, 8, 64), (8208, 128), (64, 8, 4), (1, 1, 1), 0, 3, 3, 0
    )  # fmt: skip
    assert len(launch.parameters) == 128 + abi.SIZE == 264
    found = abi.unpack_params(launch.parameters[128:])
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
        "flags": abi.FLAG_STORE_PAIRS,
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
    params = abi.unpack_params(launch.parameters[128:])
    assert params["flags"] == abi.FLAG_ACTS_2D | abi.FLAG_STORE_PAIRS
    assert params["group_blocks"] == 37  # of 32 k, as many as there are: one group


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
    params = abi.unpack_params(launch.parameters[128:])
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
    params = abi.unpack_params(launch.parameters[128:])
    assert params["workspace"] == WORKSPACE
    assert (params["row_tiles"], params["token_tiles"], params["steps"]) == (64, 16, 32)
    assert (params["even_tiles"], params["share_steps"], params["longer_shares"]) == (232, 56, 32)


@stubbed
def test_even_shares_ask_for_what_they_use(stub: Stub) -> None:
    tile = 128 * 256 * 4
    assert run(FLAT, 0, shape(1, 128, 256), even_ctas=1) == [1024 + 2 * tile]  # two steps, for two CTAs
    assert run(FLAT, 0, shape(256, 128 * 132, 4096), even_ctas=1) == []  # a tile for each CTA: nothing to hand over
    assert [x.grid for x in stub.launches] == [(2, 1, 1), (132, 1, 1)]
    params = [abi.unpack_params(x.parameters[128:]) for x in stub.launches]
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
    tokens = [abi.unpack_params(x.parameters[128:])["token"] for x in stub.launches]
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
    assert stub.calls("cuTensorMapEncodeTiled") == 3
    assert len({launch.parameters[:128] for launch in stub.launches}) == 3


@stubbed
def test_failed_encoding_and_launch_are_typed(stub: Stub) -> None:
    with pytest.raises(DriverCallError, match="cuTensorMapEncodeTiled failed"):
        run(NARROW, 1, shape(1, 128, 4096), OPERANDS._replace(acts=OPERANDS.acts + 2))
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
