# SPDX-License-Identifier: Apache-2.0
"""From a product to a launch: a plan, which is a pure function of shapes, and the driver call that carries it out.

Everything here is plain integers (addresses, strides, a stream): tensors stay in ``product.py``.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import abi, driver, invariance, loader, placement, tensor_map
from .bundle import Bundle
from .config import BLOCK_K, ScheduleConfig, TileConfig, TypeConfig, ceil_div
from .errors import ArgumentError
from .kernel import LoadedKernel, load_kernel
from .manifest import KernelInfo, ScheduleInfo
from .part import Part
from .selection import select
from .tensor_map import TensorMapArgs

MAX_INT32 = 2**31 - 1
MAX_K = 2**27  # the kernels divide numbers of rows of scales in fp32, which is exact below 2^21 of them; a row is 64 k,
MAX_K_FINE = 2**26  # or 32 in the types of fine groups
MAX_GRID_Y = 65535

_tokens = itertools.count(secrets.randbits(64))  # so that chance does not find one in memory that was never cleared


class Shape(NamedTuple):
    """What a plan depends on. Strides in elements between rows: activations, scales (a multiple of 8) and output.

    ``group``: k that share a scale, a multiple of 32, or at least ``k`` for one group. ``zero_stride``: between rows of
    zeros, a multiple of 16 bytes, 0 where there are none; ``code_zero``: the code of zero then. ``flags``: those of
    ``abi`` that follow from the call alone, FLAG_INTEGER_ZEROS, FLAG_SWIGLU and one FLAG_OUT_.
    """

    m: int
    n: int
    k: int
    group: int
    row_stride: int
    scale_stride: int
    out_stride: int
    zero_stride: int = 0
    code_zero: int = 0
    flags: int = 0


class Operands(NamedTuple):
    """Device addresses; 0: none. Activations, weights, scales and zeros on 16 bytes, the fp32 scales on 4."""

    acts: int
    weights: int
    scales: int
    bias: int
    out: int
    zeros: int = 0
    channel_scales: int = 0
    token_scales: int = 0


@dataclass(frozen=True)
class LaunchPlan:
    """One launch without its addresses. ``params``: GemmParams but for pointers and the flag that depends on one."""

    kernel_id: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_memory: int  # what the kernel needs
    one_per_sm: bool  # no SM is to have two of the CTAs
    every_sm: bool  # and each has one
    workspace: int  # bytes of global memory
    maps: tuple[TensorMapArgs | None, ...]  # of activations, scales and zeros; None: not read
    params: dict[str, int]
    pairs: bool

    @functools.cached_property
    def native(self) -> loader.NativePlan:
        """The same as the native loader reads it."""
        return loader.NativePlan(self)


def make_plan(kernel: KernelInfo, schedule: ScheduleConfig | ScheduleInfo, shape: Shape, sms: int) -> LaunchPlan:
    """The launch of a product by this kernel with this schedule of its tile on a device of ``sms`` SMs.

    Raises ArgumentError past a limit of the kernels or of the driver.
    """
    _check_limits(shape, kernel.types)
    m, n, k = shape.m, shape.n, shape.k
    columns = n // 2 if shape.flags & abi.FLAG_SWIGLU else n
    tile = kernel.tile
    split = tile.effective_split(schedule.split, k)
    shares = even_shares(tile, m, n, k, schedule.even_ctas * sms)
    acts = tensor_map.activations(m, k, shape.row_stride, tile.tokens, tile.step_units // tile.cluster)
    scale_maps = _scale_maps(tile, shape)
    ctas = shares.clusters * tile.cluster
    grid = (ctas, 1, 1) if ctas else _grid(tile, split, (m, n, k), sms)
    cluster = max(split, 1) * tile.cluster  # one of the two is 1
    launched = grid[0] * grid[1]
    one_per_sm = launched <= placement.usable_sms(sms, cluster)
    return LaunchPlan(
        kernel_id=kernel.id,
        grid=grid,
        block=(kernel.threads, 1, 1),
        cluster=(cluster, 1, 1),
        shared_memory=tile.shared_memory(split, kernel.types),
        one_per_sm=one_per_sm,
        every_sm=one_per_sm and launched == sms,
        workspace=tile.workspace(ctas) if shares.tiles else 0,
        maps=(acts, *scale_maps),
        params={
            "m": m,
            "n": n,
            "k": k,
            "scale_stride": shape.scale_stride,
            "zero_stride": shape.zero_stride,
            "out_stride": shape.out_stride,
            "group_blocks": abi.ONE_GROUP if shape.group >= k else shape.group // BLOCK_K,
            "code_zero": shape.code_zero,
            "flags": shape.flags
            | (abi.FLAG_ACTS_2D if len(acts.dims) == 2 else 0)
            | (abi.FLAG_SCALE_MAPS if scale_maps[0] else 0)
            | (abi.FLAG_ONE_PER_SM if one_per_sm else 0),
            "row_tiles": tile.row_tiles(n),
            "token_tiles": ceil_div(m, tile.tokens),
            "steps": tile.steps(k),
            "even_tiles": shares.tiles,
            "share_steps": shares.steps,
            "longer_shares": shares.longer,
            "late_steps": placement.late_steps(tile, split, k, one_per_sm),
        },
        pairs=columns % 8 == 0 and shape.out_stride % 2 == 0 and not shape.flags & abi.FLAG_OUT_FP32,
    )


def _scale_maps(tile: TileConfig, shape: Shape) -> tuple[TensorMapArgs | None, TensorMapArgs | None]:
    """The tensor maps of scales and zeros, where stages hold whole groups or groups whole stages."""
    stage_groups = tile.stage_groups(shape.group, shape.k)
    if not stage_groups:
        return None, None
    groups = ceil_div(shape.k, shape.group)
    scales = tensor_map.group_rows(groups, shape.n, shape.scale_stride, tile.rows, stage_groups)
    if not shape.zero_stride:
        return scales, None
    columns, stride = shape.n, shape.zero_stride
    if shape.flags & abi.FLAG_INTEGER_ZEROS:  # pairs, and twice as many as the tile has, so that all rows are as long
        columns, stride = ceil_div(columns, 2), stride // 2
    return scales, tensor_map.group_rows(groups, columns, stride, tile.rows, stage_groups)


def multiply(
    bundle: Bundle,
    types: TypeConfig,
    shape: Shape,
    schedule: str | None,
    operands: Operands,
    device_index: int,
    stream: int,
    overlap: bool,
    allocate: Callable[[int], int],
    batch_invariant: bool = False,
) -> tuple[LaunchPlan, LoadedKernel]:
    """Launches a product: chooses a schedule (None) or takes the named one, loads its kernel where needed.

    Returns what it has launched.

    ``allocate(bytes)``: the address, on 16 bytes, of memory that is the launch's own while it runs on the stream.
    ``batch_invariant``: only a schedule with the layer's reduction order. The device's context must be current.
    Raises ArgumentError, what ``load_kernel`` raises, and DriverCallError.
    """
    plan = _plan(bundle, types, shape, schedule, device_index, batch_invariant)
    kernel = load_kernel(bundle, plan.kernel_id, device_index, stream)
    launch(plan, kernel, operands, allocate(plan.workspace) if plan.workspace else 0, stream, overlap)
    return plan, kernel


@functools.lru_cache(maxsize=4096)
def _plan(
    bundle: Bundle, types: TypeConfig, shape: Shape, schedule: str | None, device_index: int, batch_invariant: bool
) -> LaunchPlan:
    part = driver.device(device_index).part
    chosen = choose(bundle, types, (shape.m, shape.n, shape.k), schedule, part, batch_invariant)
    return make_plan(bundle.manifest.kernel_for(types, chosen.name), chosen, shape, part.sms)


def choose(
    bundle: Bundle,
    types: TypeConfig,
    product: tuple[int, int, int],
    schedule: str | None,
    part: Part,
    batch_invariant: bool = False,
) -> ScheduleInfo:
    """The schedule of an (M, N, K) product: the named one, or the one that is predicted to be the fastest.

    ``batch_invariant``: of those with the layer's reduction order.
    Raises ArgumentError for a name that these types have no kernel for, or whose order is another.
    """
    manifest = bundle.manifest
    if schedule is None:
        fastest = invariance.select if batch_invariant else select
        return fastest(manifest, types.name, *product, part)
    known = manifest.schedules_for(types)
    for candidate in known:
        if candidate.name == schedule:
            if batch_invariant:
                invariance.check_schedule(manifest, types, candidate, *product[1:], part)
            return candidate
    names = ", ".join(s.name for s in known)
    raise ArgumentError(f"no schedule {schedule!r} for {types.name} in {bundle!r}; it has: {names}")


def launch(
    plan: LaunchPlan, kernel: LoadedKernel, operands: Operands, workspace: int, stream: int, overlap: bool
) -> None:
    """Launches on a stream (a CUstream's address) of the kernel's device, whose context must be current.

    ``overlap``: the kernel may start, and read weights and scales, before earlier kernels of the stream have ended.
    Goes through the native loader where there is one: the same parameters, the same attributes.
    """
    native = loader.active()
    if native is not None:
        where = (plan.native.address, int(kernel.handle), operands, workspace, stream, int(kernel.device.context))
        code = native.launch(loader.pack_call(*where, overlap))
        if code:
            native.fail(code, plan, mapped(operands))
        return
    block = ctypes.create_string_buffer(parameter_bytes(plan, operands, workspace, next(_tokens) % 2**64), abi.SIZE)
    shared_memory = placement.shared_memory(
        plan.shared_memory, plan.one_per_sm, plan.every_sm, (kernel.device.index, stream)
    )
    config = launch_config(plan.grid, plan.block, plan.cluster, shared_memory, stream, overlap)
    maps = tensor_map.encode(mapped(operands), plan.maps)
    pointers = (ctypes.c_void_p * 2)(maps.address, ctypes.addressof(block))
    driver.call("cuLaunchKernelEx", config, kernel.handle, ctypes.addressof(pointers), 0)


def mapped(operands: Operands) -> tuple[int, int, int]:
    """The addresses of ``LaunchPlan.maps``."""
    return operands.acts, operands.scales, operands.zeros


def launch_config(
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    cluster: tuple[int, int, int],
    shared_memory: int,
    stream: int,
    overlap: bool,
) -> Any:
    """What cuLaunchKernelEx takes beside a kernel and its parameters."""
    config = driver.api().CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared_memory
    config.hStream = stream
    attributes = _attributes(cluster, overlap)
    if attributes:
        config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def parameter_bytes(plan: LaunchPlan, operands: Operands, workspace: int, token: int) -> bytes:
    """GemmParams of this plan on these addresses. ``token``: a number that no other launch has."""
    flags = plan.params["flags"]
    if plan.pairs and operands.out % 4 == 0:
        flags |= abi.FLAG_STORE_PAIRS
    return abi.pack_params(
        weights=operands.weights,
        scales=operands.scales,
        zeros=operands.zeros,
        bias=operands.bias,
        channel_scales=operands.channel_scales,
        token_scales=operands.token_scales,
        out=operands.out,
        workspace=workspace,
        token=token,
        **{**plan.params, "flags": flags},
    )


@functools.lru_cache(maxsize=64)
def _attributes(cluster: tuple[int, int, int], overlap: bool) -> list[Any]:
    api = driver.api()
    ids = api.CUlaunchAttributeID
    found = []
    if cluster != (1, 1, 1):
        attribute = api.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = cluster
        found.append(attribute)
    if overlap:
        attribute = api.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        found.append(attribute)
    return found


class Shares(NamedTuple):
    """How family "flat" divides its last ``tiles`` tiles evenly among ``clusters``; all 0 where none are divided.

    Laid end to end their steps of K make shares of ``steps``, and one more in the first ``longer`` ones.
    """

    clusters: int
    tiles: int
    steps: int
    longer: int


def even_shares(tile: TileConfig, m: int, n: int, k: int, ctas: int) -> Shares:
    """The shares of an (m, n, k) product on at most ``ctas`` CTAs, 0 if its schedule has none.

    Tiles that fill all clusters evenly stay whole; the rest and one round more are divided, so that each share is
    longer than a tile. A tile then lies in two shares at most, the first of which ends with it long after the second
    began.
    """
    if ctas == 0:
        return Shares(0, 0, 0, 0)
    tiles, steps, clusters = tile.tiles(m, n), tile.steps(k), tile.clusters(ctas)
    if tiles >= clusters:
        divided = tiles % clusters + clusters if tiles % clusters else 0
    else:
        divided, clusters = tiles, min(clusters, tiles * steps)
    _check_tiles(tile, max(tiles, divided * steps), m, n)
    return Shares(clusters, divided, divided * steps // clusters, divided * steps % clusters)


def _check_tiles(tile: TileConfig, number: int, m: int, n: int) -> None:
    if number > MAX_INT32:
        raise ArgumentError(f"M = {m} and N = {n} make too many tiles or steps of {tile.name}; split the product")


def _grid(tile: TileConfig, split: int, product: tuple[int, int, int], sms: int) -> tuple[int, int, int]:
    m, n, k = product
    if tile.family == "flat":
        tiles = tile.tiles(m, n)
        _check_tiles(tile, tiles, m, n)
        return min(tiles, tile.clusters(sms * tile.ctas_per_sm)) * tile.cluster, 1, 1
    row_tiles, token_tiles = tile.row_tiles(n), ceil_div(m, tile.tokens)
    if token_tiles > MAX_GRID_Y:
        raise ArgumentError(
            f"M = {m} makes {token_tiles} tiles of {tile.tokens} tokens, and {tile.name} takes at most {MAX_GRID_Y}; "
            "use a schedule of family flat, or schedule=None"
        )
    return placement.padded(tile, split, row_tiles, token_tiles, k, sms), token_tiles, 1


def _check_limits(shape: Shape, types: TypeConfig) -> None:
    limits = {
        "m": MAX_INT32,
        "n": MAX_INT32,
        "k": (MAX_K_FINE if types.fine else MAX_K) - 1,
        "scale_stride": MAX_INT32,
        "zero_stride": MAX_INT32,
        "out_stride": MAX_INT32,
    }
    for name, limit in limits.items():
        value = getattr(shape, name)
        if not 0 <= value <= limit:
            raise ArgumentError(f"{name} = {value} is past the kernels' limit of {limit}; split the product")
