# SPDX-License-Identifier: Apache-2.0
"""Tensor maps of the activations: how a product describes them, and their encoding by the driver.

The driver wants the 128 bytes on a 64-byte boundary; objects of cuda.bindings lie on 16-byte boundaries only. So this
one call goes through ctypes, into storage that is aligned by hand.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

from .abi import TENSOR_MAP_BYTES
from .errors import ArgumentError, DeviceError, DriverCallError

ALIGNMENT = 64
MAX_DIM = 1 << 32
MAX_STRIDE = 1 << 40  # bytes, exclusive

# of cuda.h: CU_TENSOR_MAP_DATA_TYPE_UINT16 (both 16-bit float types are copied as bits), CU_TENSOR_MAP_INTERLEAVE_NONE,
# CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE (zeros)
_UINT16, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZERO = 1, 0, 3, 3, 0


class TensorMapArgs(NamedTuple):
    """A tensor map without its address: sizes and box in elements, strides of all but the first dimension in bytes."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


class TensorMap(NamedTuple):
    """An encoded tensor map. ``address`` is that of its 128 bytes, inside ``storage``."""

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


@functools.lru_cache(maxsize=256)
def encode(address: int, args: TensorMapArgs) -> TensorMap:
    """The tensor map of the memory at ``address``, a multiple of 16. Depends on nothing else, hence the cache."""
    storage = ctypes.create_string_buffer(TENSOR_MAP_BYTES + ALIGNMENT)
    aligned = -(-ctypes.addressof(storage) // ALIGNMENT) * ALIGNMENT
    rank = len(args.dims)
    status = _encoder()(
        aligned,
        _UINT16,
        rank,
        address,
        (ctypes.c_uint64 * rank)(*args.dims),
        (ctypes.c_uint64 * (rank - 1))(*args.strides),
        (ctypes.c_uint32 * rank)(*args.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _PROMOTE_256B,
        _FILL_ZERO,
    )
    if status:
        raise DriverCallError("cuTensorMapEncodeTiled", status, "an error", f"for {args} at address {address:#x}")
    return TensorMap(aligned, storage)


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
