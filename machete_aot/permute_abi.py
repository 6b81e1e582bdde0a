# SPDX-License-Identifier: Apache-2.0
"""The parameters of the kernel that permutes columns: the one definition from which Python packs and its .cu is made.

Unlike those of the products they are plain parameters, each passed by its own address. ``FIELDS`` gives the order, and
``build_kernels/templates/helper.cu.j2`` the signature from it; the check of a cubin and the loading of a kernel compare
what was compiled with ``PARAMETERS``.
"""

from __future__ import annotations

import struct

from .abi import Field

HELPER_ID = "permute_columns_16"
PIECE = 8  # columns of a thread

FIELDS = (
    Field("a", "const uint16_t*", "Q", "[rows][a_stride], any 16-bit elements"),
    Field("order", "const int32_t*", "Q", "[columns], each from 0 to columns - 1; read before earlier kernels end"),
    Field("out", "uint16_t*", "Q", "[rows][out_stride]: column j is column order[j] of a"),
    Field("a_stride", "int64_t", "q", "elements from one row to the next"),
    Field("out_stride", "int64_t", "q", "elements from one row to the next"),
    Field("rows", "int32_t", "i", "rows of both"),
    Field("columns", "int32_t", "i", "columns of both"),
    Field("pieces", "int32_t", "i", "pieces of 8 columns of a CTA, at most one a thread"),
    Field("stage_rows", "int32_t", "i", "rows that a CTA copies to shared memory at a time; 0: none"),
)

_STRUCT = struct.Struct("<" + "".join(f.code for f in FIELDS))  # wide ones first: nothing to pad
SIZE = _STRUCT.size
OFFSETS = tuple(struct.calcsize("<" + "".join(g.code for g in FIELDS[:i])) for i in range(len(FIELDS)))

# (offset, size) of each kernel parameter
PARAMETERS = tuple((offset, struct.calcsize(f.code)) for offset, f in zip(OFFSETS, FIELDS, strict=True))


def pack_params(
    a: int, order: int, out: int, a_stride: int, out_stride: int, rows: int, columns: int, pieces: int, stage_rows: int
) -> bytes:
    """The bytes of all parameters, each at its offset."""
    return _STRUCT.pack(a, order, out, a_stride, out_stride, rows, columns, pieces, stage_rows)


def unpack_params(data: bytes) -> dict[str, int]:
    """The inverse of ``pack_params``, for tests and for looking at what was launched."""
    return {f.name: value for f, value in zip(FIELDS, _STRUCT.unpack(data), strict=True)}
