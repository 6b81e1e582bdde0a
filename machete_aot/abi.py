# SPDX-License-Identifier: Apache-2.0
"""The parameter block of every kernel: the one definition from which Python packs and the C header is generated.

A kernel takes two parameters by value: a 128-byte CUtensorMap of the activations (offset 0) and ``GemmParams`` (offset
128). ``python -m build_kernels abi`` writes csrc/kernels/gemm_params.h from ``FIELDS``; a test compiles that header
and compares every offset with ``OFFSETS``. Change a field and ``ABI_VERSION`` must change with it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

ABI_VERSION = 2
TENSOR_MAP_BYTES = 128


class Field(NamedTuple):
    """One member of GemmParams. ``code`` is the struct module's character for ``ctype``."""

    name: str
    ctype: str
    code: str
    doc: str


FIELDS = (
    Field("weights", "const uint8_t*", "Q", "prepacked weights: [ceil(n/64)][ceil(k/64)] units of 2048 bytes"),
    Field("scales", "const uint16_t*", "Q", "group scales [ceil(k/group)][scale_stride], 16-bit floats"),
    Field("bias", "const uint16_t*", "Q", "[n] in the output's type, or null"),
    Field("out", "uint16_t*", "Q", "output [m][out_stride], 16-bit floats"),
    Field(
        "workspace", "uint8_t*", "Q", "where CTAs of even shares hand over partial tiles, TileConfig.workspace bytes"
    ),
    Field("token", "uint64_t", "Q", "what flags in the workspace are set to: a number that no earlier launch had"),
    Field("m", "int32_t", "i", "tokens: rows of the activations"),
    Field("n", "int32_t", "i", "rows of the weights: columns of the output"),
    Field("k", "int32_t", "i", "reduction length: columns of the activations"),
    Field("scale_stride", "int32_t", "i", "elements from one group's scales to the next, a multiple of 8"),
    Field("out_stride", "int32_t", "i", "elements from one output row to the next"),
    Field("group_units", "int32_t", "i", "64-k units that share a scale; at least ceil(k/64): one group over all of K"),
    Field("flags", "int32_t", "i", "sum of the FLAG_ values"),
    Field("row_tiles", "int32_t", "i", "family flat: tiles along n"),
    Field("token_tiles", "int32_t", "i", "tiles along m"),
    Field("steps", "int32_t", "i", "ring steps of K of a tile"),
    Field("even_tiles", "int32_t", "i", "the last tiles, whose steps of K all CTAs share evenly"),
    Field("share_steps", "int32_t", "i", "steps of each CTA's share of them"),
    Field("longer_shares", "int32_t", "i", "the first so many shares have one step more"),
)

FLAG_ACTS_2D = 1  # the tensor map is {k, m}; else {64, m, k/64}, which takes one copy a stage but needs k % 64 == 0
FLAG_STORE_PAIRS = 2  # out, out_stride and n allow 4-byte stores of two neighbouring columns

_STRUCT = struct.Struct("<" + "".join(f.code for f in FIELDS) + "4x")
SIZE = _STRUCT.size  # 104: a multiple of the pointers' alignment

OFFSETS = {f.name: struct.calcsize("<" + "".join(g.code for g in FIELDS[:i])) for i, f in enumerate(FIELDS)}

# (offset, size) of each kernel parameter; offsets count from the first one
PARAMETERS = ((0, TENSOR_MAP_BYTES), (TENSOR_MAP_BYTES, SIZE))


def pack_params(**values: int) -> bytes:
    """The bytes of GemmParams. Takes exactly the names in FIELDS."""
    if values.keys() != OFFSETS.keys():
        raise TypeError(f"GemmParams takes {sorted(OFFSETS)}, got {sorted(values)}")
    return _STRUCT.pack(*(values[f.name] for f in FIELDS))


def unpack_params(data: bytes) -> dict[str, int]:
    """The inverse of ``pack_params``, for tests and for looking at what was launched."""
    return dict(zip(OFFSETS, _STRUCT.unpack(data), strict=True))
