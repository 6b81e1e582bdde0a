# SPDX-License-Identifier: Apache-2.0
"""Tensor maps of activations, scales and zero points: how a product describes them, and their encoding by the driver.

The driver wants the 128 bytes of each on a 64-byte boundary; objects of cuda.bindings lie on 16-byte boundaries only.
So this one call goes through ctypes, into storage that is aligned by hand.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

from .abi import MAPS, TENSOR_MAP_BYTES
from .errors import ArgumentError, DeviceError, DriverCallError

ALIGNMENT = 64
MAX_DIM = 1 << 32
MAX_STRIDE = 1 << 40  # bytes, exclusive

# of cuda.h: CU_TENSOR_MAP_DATA_TYPE_UINT16 (both 16-bit float types are copied as bits), CU_TENSOR_MAP_INTERLEAVE_NONE,
# CU_TENSOR_MAP_SWIZZLE_NONE and _128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE (zeros)
_UINT16, _NO_INTERLEAVE, _SWIZZLES, _PROMOTE_256B, _FILL_ZERO = 1, 0, (0, 3), 3, 0


class TensorMapArgs(NamedTuple):
    """A tensor map without its address: sizes and box in elements of 16 bits, strides of all but the first dimension in
    bytes. ``swizzled``: what is copied lies in the 128-byte swizzle that wgmma reads, else row after row."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: bool = True


class TensorMaps(NamedTuple):
    """The encoded tensor maps of a launch. ``address`` is that of their bytes, inside ``storage``."""

    address: int
    storage: ctypes.Array[ctypes.c_char]


def activations(m: int, k: int, row_stride: int, tokens: int, step_units: int) -> TensorMapArgs:
    """The tensor map of 16-bit activations [m, k], rows ``row_stride`` elements apart (a multiple of 8).

    Rank 3, one copy a ring stage, where k is a multiple of 64 and a tile of ``tokens`` is full; else rank 2, a copy for
    each 64 k, which zeroes the end of each row, and of no more rows than there are: the copy engine takes longer for a
    row of zeros than for one that it reads (measured: docs/performance.md).
    Raises ArgumentError past the limits of a tensor map.
    """
    row_bytes = 2 * row_stride
    if max(m, k) > MAX_DIM or row_bytes >= MAX_STRIDE:
        raise ArgumentError(
            f"activations [{m}, {k}] with rows {row_bytes} bytes apart: a tensor map holds dimensions up to {MAX_DIM} "
            f"and strides below {MAX_STRIDE} bytes; split the product, or make the activations contiguous"
        )
    if k % 64 or m < tokens:
        return TensorMapArgs((k, m), (row_bytes,), (64, min(m, tokens)))
    return TensorMapArgs((64, m, k // 64), (row_bytes, 128), (64, tokens, step_units))


def group_rows(groups: int, columns: int, row_stride: int, rows: int, stage_groups: int) -> TensorMapArgs:
    """The tensor map of 16-bit values [groups, columns], rows ``row_stride`` elements apart (a multiple of 8): scales,
    floating zero points, or pairs of integer ones.

    A copy brings ``stage_groups`` rows of ``rows`` columns; what lies past either end arrives as zeros.
    """
    return TensorMapArgs((columns, groups), (2 * row_stride,), (rows, stage_groups), swizzled=False)


@functools.lru_cache(maxsize=256)
def encode(addresses: tuple[int, ...], args: tuple[TensorMapArgs | None, ...]) -> TensorMaps:
    """The tensor maps of the memory at ``addresses``, multiples of 16, one after the other; zeros where one is None.

    They depend on nothing else, hence the cache.
    """
    storage = ctypes.create_string_buffer(MAPS * TENSOR_MAP_BYTES + ALIGNMENT)
    aligned = -(-ctypes.addressof(storage) // ALIGNMENT) * ALIGNMENT
    for i, (address, map_args) in enumerate(zip(addresses, args, strict=True)):
        if map_args is not None:
            _encode(aligned + i * TENSOR_MAP_BYTES, address, map_args)
    return TensorMaps(aligned, storage)


def _encode(at: int, address: int, args: TensorMapArgs) -> None:
    rank = len(args.dims)
    status = _encoder()(
        at,
        _UINT16,
        rank,
        address,
        (ctypes.c_uint64 * rank)(*args.dims),
        (ctypes.c_uint64 * (rank - 1))(*args.strides),
        (ctypes.c_uint32 * rank)(*args.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE,
        _SWIZZLES[args.swizzled],
        _PROMOTE_256B,
        _FILL_ZERO,
    )
    if status:
        raise DriverCallError("cuTensorMapEncodeTiled", status, "an error", f"for {args} at address {address:#x}")


@functools.lru_cache(maxsize=1)
def _encoder() -> Any:
    """The driver's function. cuda.bindings has loaded libcuda.so.1 by the time this is needed."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise DeviceError(f"the driver cannot encode tensor maps ({error}); CUDA 12.0 or newer is needed") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, integer, ctypes.c_uint32, *[pointer] * 5, *[integer] * 4]
    function.restype = integer
    return function
