# SPDX-License-Identifier: Apache-2.0
"""The parameter block of every kernel: the one definition from which Python packs and the C header is generated.

A kernel takes two parameters by value: three CUtensorMap of 128 bytes each (offset 0), of the activations, the scales
and the zero points, and ``GemmParams`` (offset 384). ``python -m build_kernels abi`` writes csrc/kernels/gemm_params.h
from ``FIELDS``; a test compiles that header and compares every offset with ``OFFSETS``. Change a field and
``ABI_VERSION`` must change with it, and with ``TileConfig.shared_memory``.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

ABI_VERSION = 8
TENSOR_MAP_BYTES = 128
MAPS = 3  # tensor maps of a launch: only with FLAG_SCALE_MAPS are those of scales and, if there are any, zeros read
ONE_GROUP = 2**26  # group_blocks where one scale serves all of K: more blocks than any K has


class Field(NamedTuple):
    """One member of GemmParams. ``code`` is the struct module's character for ``ctype``."""

    name: str
    ctype: str
    code: str
    doc: str


FIELDS = (
    Field("weights", "const uint8_t*", "Q", "prepacked weights: [ceil(n/64)][ceil(k/64)] units of 2048 or 4096 bytes"),
    Field("scales", "const uint16_t*", "Q", "group scales [groups][scale_stride], 16-bit floats"),
    Field("zeros", "const void*", "Q", "[groups][zero_stride] 16-bit floats, uint8 with FLAG_INTEGER_ZEROS, or null"),
    Field("bias", "const uint16_t*", "Q", "[n] in the activations' type, or null"),
    Field("channel_scales", "const float*", "Q", "[n], or null"),
    Field("token_scales", "const float*", "Q", "[m], or null"),
    Field("out", "void*", "Q", "output [m][out_stride] in the activations' type, or as a FLAG_OUT_ says"),
    Field(
        "workspace", "uint8_t*", "Q", "where CTAs of even shares hand over partial tiles, TileConfig.workspace bytes"
    ),
    Field("token", "uint64_t", "Q", "what flags in the workspace are set to: a number that no earlier launch had"),
    Field("m", "int32_t", "i", "tokens: rows of the activations"),
    Field("n", "int32_t", "i", "rows of the weights: columns of the product"),
    Field("k", "int32_t", "i", "reduction length: columns of the activations"),
    Field("scale_stride", "int32_t", "i", "elements from one group's scales to the next, a multiple of 8"),
    Field("zero_stride", "int32_t", "i", "elements from one group's zeros to the next, a multiple of 16 bytes"),
    Field("out_stride", "int32_t", "i", "elements from one output row to the next"),
    Field("group_blocks", "int32_t", "i", "32-k blocks that share a scale; 2^26: one group over K"),
    Field("code_zero", "int32_t", "i", "the code that stands for zero where zeros is null"),
    Field("flags", "int32_t", "i", "sum of the FLAG_ values"),
    Field("row_tiles", "int32_t", "i", "tiles along n"),
    Field("token_tiles", "int32_t", "i", "tiles along m"),
    Field("steps", "int32_t", "i", "ring steps of K of a tile"),
    Field("even_tiles", "int32_t", "i", "the last tiles, whose steps of K all CTAs share evenly"),
    Field("share_steps", "int32_t", "i", "steps of each CTA's share of them"),
    Field("longer_shares", "int32_t", "i", "the first so many shares have one step more"),
    Field(
        "late_steps",
        "int32_t",
        "i",
        "family stream: steps before a CTA's end at which it lets the next kernel in, or 0",
    ),
)

FLAG_ACTS_2D = 1  # the tensor map is {k, m}; else {64, m, k/64}, which takes one copy a stage but needs k % 64 == 0
FLAG_STORE_PAIRS = 2  # out, its stride and its columns allow 4-byte stores of two neighbouring 16-bit elements
FLAG_INTEGER_ZEROS = 4  # zeros are uint8, value = (code - zero) * scale; else value = code * scale - zero
# One of the next three says what the output's elements are, in every launch that does more after the sums than adding a
# bias and rounding to the activations' type. Where none is set a kernel takes the short way.
FLAG_OUT_FP32 = 8
FLAG_OUT_BF16 = 16
FLAG_OUT_FP16 = 32
FLAG_SWIGLU = 64  # the output has n / 2 columns: silu(gate) * up of columns in turns, 8 of gate and 8 of up
FLAG_SCALE_MAPS = 128  # groups are copied by tensor maps: their size divides a ring stage's K or is a multiple of it
FLAG_ONE_PER_SM = 256  # no SM has two CTAs of the launch

_STRUCT = struct.Struct("<" + "".join(f.code for f in FIELDS))
SIZE = _STRUCT.size  # 136: a multiple of the pointers' alignment

OFFSETS = {f.name: struct.calcsize("<" + "".join(g.code for g in FIELDS[:i])) for i, f in enumerate(FIELDS)}

# (offset, size) of each kernel parameter; offsets count from the first one
PARAMETERS = ((0, MAPS * TENSOR_MAP_BYTES), (MAPS * TENSOR_MAP_BYTES, SIZE))


def pack_params(**values: int) -> bytes:
    """The bytes of GemmParams. Takes exactly the names in FIELDS."""
    if values.keys() != OFFSETS.keys():
        raise TypeError(f"GemmParams takes {sorted(OFFSETS)}, got {sorted(values)}")
    return _STRUCT.pack(*(values[f.name] for f in FIELDS))


def unpack_params(data: bytes) -> dict[str, int]:
    """The inverse of ``pack_params``, for tests and for looking at what was launched."""
    return dict(zip(OFFSETS, _STRUCT.unpack(data), strict=True))
