# SPDX-License-Identifier: Apache-2.0
"""prepack_b and its inverses: GPTQ-packed weights to and from the prepacked layouts, in chunks, on any device.

Both directions only move bytes (and, for 4-bit codes, swap nibbles), as views and permuted copies. ``layout.py`` and
docs/architecture.md define where each code goes; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from . import ahead
from .config import UNIT_K, UNIT_ROWS
from .errors import ArgumentError
from .layout import layout_for, packed_shape
from .scalar_type import ScalarType

# Codes, as bytes, of one chunk. Scratch is a small multiple of it; small enough that a CPU's caches help.
CHUNK_BYTES = 8 << 20

A_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of activations, by the names that TypeConfig uses
A_NAMES = {dtype: name for name, dtype in A_DTYPES.items()}


def prepack_b(
    w_q: torch.Tensor, b_type: ScalarType, a_dtype: torch.dtype = torch.bfloat16, *, k: int | None = None
) -> torch.Tensor:
    """Rearranges quantised weights once, at load time, into the order in which the kernels read them.

    ``w_q``: int32 [ceil(K / b_type.per_int32), N] in GPTQ order (the lowest bits hold the lowest k), any strides, on
    the CPU or a GPU. ``k``: the number of k that count, where the last int32 row holds fewer than ``per_int32``;
    otherwise every code counts. ``a_dtype``: the activations' dtype, torch.bfloat16 or torch.float16 (one layout
    serves both). N and K may be any positive number.

    Returns int32 [ceil(N/64), ceil(K/64), 512 (4 bits) or 1024 (8 bits)] on the same device; rows and k that fill up
    the last units hold the code of zero. On a GPU the first call also opens the bundle that this package holds, so that
    the first product need not. Scratch is a few times ``CHUNK_BYTES`` (one strip of 64 rows, if more).
    Raises ArgumentError for a wrong dtype, shape, ``k`` or ``a_dtype``, UnsupportedError for a type without a layout.
    """
    check_gptq(w_q, "w_q", b_type)
    return prepack_columns(lambda first, last: w_q[:, first:last], w_q.shape, w_q.device, b_type, a_dtype, k)


def prepack_columns(
    columns: Callable[[int, int], torch.Tensor],
    shape: tuple[int, ...],
    device: torch.device,
    b_type: ScalarType,
    a_dtype: torch.dtype,
    k: int | None,
) -> torch.Tensor:
    """``prepack_b`` of weights [ceil(K / per_int32), N] = ``shape`` that are made or found some columns at a time.

    ``columns(first, last)``: these columns, first a multiple of 64, int32 on ``device``; last may be past N.
    """
    if a_dtype not in A_NAMES:
        raise ArgumentError(f"a_dtype must be torch.bfloat16 or torch.float16, got {a_dtype}")
    rows, n = shape
    k = _checked_k(rows, b_type, k)
    tiles_n, tiles_k, words = packed_shape(n, k, b_type)
    out = torch.empty(tiles_n, tiles_k, words, dtype=torch.int32, device=device)
    for first, last in _chunks(tiles_n, k):
        strip = _padded_strip(columns(first * UNIT_ROWS, last * UNIT_ROWS), b_type, k, last - first)
        packed = out[first:last].view(torch.uint8)
        if layout_for(b_type).bits == 4:
            _pack_u4(strip, packed)
        else:
            _pack_u8(strip, packed)
    ahead.prepare(out, b_type, A_NAMES[a_dtype])  # while the GPU works
    return out


def unpack_b(packed: torch.Tensor, b_type: ScalarType, n: int, k: int) -> torch.Tensor:
    """The codes of prepacked weights: uint8 [K, N] on the same device, padding dropped. The inverse of prepacking.

    ``packed``: what ``prepack_b`` returned for weights of N = ``n`` and K = ``k``. Raises ArgumentError where its dtype
    or shape says otherwise.
    """
    _check_prepacked(packed, b_type, n, k)
    codes = torch.empty(k, n, dtype=torch.uint8, device=packed.device)
    for first, last in _chunks(packed.shape[0], k):
        strip = _unpack_units(packed[first:last], b_type)
        columns = codes[:, first * UNIT_ROWS : last * UNIT_ROWS]
        columns.copy_(strip[:k, : columns.shape[1]])
    return codes


def unpack_to_gptq(packed: torch.Tensor, b_type: ScalarType, n: int, k: int) -> torch.Tensor:
    """The GPTQ-packed weights again: int32 [ceil(K / b_type.per_int32), N], the exact inverse of ``prepack_b``.

    Codes past ``k`` in the last row are the code of zero, whatever they were before. Raises as ``unpack_b`` does.
    """
    _check_prepacked(packed, b_type, n, k)
    per, bits = b_type.per_int32, b_type.bits
    w_q = torch.empty(-(-k // per), n, dtype=torch.int32, device=packed.device)
    for first, last in _chunks(packed.shape[0], k):
        strip = _unpack_units(packed[first:last], b_type)
        columns = w_q[:, first * UNIT_ROWS : last * UNIT_ROWS]
        words = strip.view(-1, per, strip.shape[1])[: w_q.shape[0], :, : columns.shape[1]]
        columns.zero_()
        for i in range(per):
            columns |= words[:, i].to(torch.int32) << (bits * i)
    return w_q


def check_gptq(w_q: torch.Tensor, name: str, b_type: ScalarType) -> None:
    """Raises ArgumentError unless this is an int32 matrix, as GPTQ-packed weights are."""
    _check_int32(w_q, name, 2, f"GPTQ-packed weights [ceil(K / {b_type.per_int32}), N]")


def _chunks(tiles_n: int, k: int) -> Iterator[tuple[int, int]]:
    """[first, last) of the 64-row tiles that are worked on at a time."""
    step = max(1, CHUNK_BYTES // (UNIT_ROWS * k))
    for first in range(0, tiles_n, step):
        yield first, min(first + step, tiles_n)


def _padded_strip(w_q: torch.Tensor, b_type: ScalarType, k: int, tiles: int) -> torch.Tensor:
    """A contiguous int32 [padded K / per_int32, 64 * tiles] copy of some columns, filled up with the code of zero."""
    per, (rows, columns) = b_type.per_int32, w_q.shape
    shape = (-(-k // UNIT_K) * UNIT_K // per, tiles * UNIT_ROWS)
    strip = torch.empty(shape, dtype=torch.int32, device=w_q.device)
    strip[rows:].fill_(b_type.zero_word)
    strip[:rows, columns:].fill_(b_type.zero_word)
    strip[:rows, :columns].copy_(w_q)
    if k % per:
        kept = (1 << (b_type.bits * (k % per))) - 1
        strip[rows - 1].bitwise_and_(kept).bitwise_or_(b_type.zero_word & ~kept)
    return strip


# Dimensions below, all of the byte views: tn, tk units along N and K; block: k16 of the unit; half: k + 8;
# warp, lower, g: row = 16 * warp + 8 * lower + g; pair: k = 2 * pair + odd of the 8 in a half. See Layout.position.


def _pack_u4(strip: torch.Tensor, packed: torch.Tensor) -> None:
    tn, tk = packed.shape[:2]
    codes = strip.view(torch.uint8).view(tk, 4, 2, tn, 4, 2, 8, 4)  # tk block half tn warp lower g pair; 2 odd a byte
    first, second = codes[:, :, 0], codes[:, :, 1]
    target = packed.view(tn, tk, 4, 8, 4, 4, 2, 2)  # tn tk warp g pair block odd lower; 2 halves a byte
    even = (first & 0x0F).bitwise_or_(second << 4)
    target[..., 0, :].copy_(even.permute(2, 0, 3, 5, 6, 1, 4))
    odd = (first >> 4).bitwise_or_(second & 0xF0)
    target[..., 1, :].copy_(odd.permute(2, 0, 3, 5, 6, 1, 4))


def _pack_u8(strip: torch.Tensor, packed: torch.Tensor) -> None:
    tn, tk = packed.shape[:2]
    # tk block/2 block%2 half pair/2 tn warp lower g pair%2 odd
    codes = strip.view(torch.uint8).view(tk, 2, 2, 2, 2, tn, 4, 2, 8, 2, 2)
    # tn tk block/2 warp g pair/2 pair%2 block%2 half odd lower
    packed.view(tn, tk, 2, 4, 8, 2, 2, 2, 2, 2, 2).copy_(codes.permute(5, 0, 1, 6, 8, 4, 9, 2, 3, 10, 7))


def _unpack_units(packed: torch.Tensor, b_type: ScalarType) -> torch.Tensor:
    """uint8 [padded K, padded N] codes of some tiles of 64 rows."""
    tn, tk = packed.shape[:2]
    source = packed.contiguous().view(torch.uint8)
    codes = torch.empty(tk * UNIT_K, tn * UNIT_ROWS, dtype=torch.uint8, device=packed.device)
    if layout_for(b_type).bits == 4:
        ordered = source.view(tn, tk, 4, 8, 4, 4, 2, 2).permute(1, 5, 4, 6, 0, 2, 7, 3)
        target = codes.view(tk, 4, 2, 4, 2, tn, 4, 2, 8)  # tk block half pair odd tn warp lower g
        both = ordered.contiguous()
        target[:, :, 0].copy_(both & 0x0F)
        target[:, :, 1].copy_(both >> 4)
    else:
        ordered = source.view(tn, tk, 2, 4, 8, 2, 2, 2, 2, 2, 2).permute(1, 2, 7, 8, 5, 6, 9, 0, 3, 10, 4)
        codes.view(tk, 2, 2, 2, 2, 2, 2, tn, 4, 2, 8).copy_(ordered)
    return codes


def _check_int32(tensor: torch.Tensor, name: str, dims: int, wanted: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise ArgumentError(f"{name} must be int32, {wanted}; got {tensor.dtype}")
    if tensor.dim() != dims or 0 in tensor.shape:
        raise ArgumentError(f"{name} must be {wanted}, none of them 0; got shape {tuple(tensor.shape)}")


def _checked_k(rows: int, b_type: ScalarType, k: int | None) -> int:
    per = b_type.per_int32
    if k is None:
        return rows * per
    if not rows * per - per < k <= rows * per:
        raise ArgumentError(
            f"k={k} does not fit w_q: {rows} rows of {per} codes hold K = {rows * per - per + 1} to {rows * per}; "
            f"w_q is int32 [ceil(K / {per}), N]"
        )
    return k


def _check_prepacked(packed: torch.Tensor, b_type: ScalarType, n: int, k: int) -> None:
    wanted = packed_shape(n, k, b_type)
    _check_int32(packed, "packed", 3, f"weights from prepack_b {list(wanted)}")
    if n < 1 or k < 1 or tuple(packed.shape) != wanted:
        raise ArgumentError(
            f"{b_type} weights of n={n}, k={k} are prepacked as {wanted}, got shape {tuple(packed.shape)}; "
            "check n, k and the type, or call prepack_b"
        )
