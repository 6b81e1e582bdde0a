# SPDX-License-Identifier: Apache-2.0
"""HQQ layers, 4 and 8 bits, groups along the inputs (``axis`` 1).

A layer holds ``W_q`` and a dictionary ``meta``. The weights [N, K] are laid out as a matrix of groups, one a row:
[N * K / group_size, group_size]; the rows of output n follow each other.

* ``packing`` "4bit_u8": uint8 [rows / 2, group_size]; byte (r, j) holds row r in its high 4 bits and row
  r + rows / 2 in its low 4 bits. "8bit_u8": uint8 [rows, group_size], a code a byte.
* ``scale``, ``zero``: floating, one a row. value = (code - zero) * scale.
* ``shape``: (N, K). ``group_size``: None for one group a row of the weights.

The zero points are floating. Where all are integers of 0 to 255 they stay integers, subtracted exactly; otherwise
zero * scale is subtracted after the multiplication, rounded to the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ArgumentError, UnsupportedError
from .bits import PLAIN, check_bits, pack_rows
from .weights import QuantizedWeights, check_shape, type_of

PACKINGS = {"4bit_u8": 4, "8bit_u8": 8}


def from_hqq(w_q: torch.Tensor, meta: Mapping[str, Any], bias: torch.Tensor | None = None) -> QuantizedWeights:
    """Weights of an HQQ layer: its ``W_q``, ``meta`` and bias; the module's docstring has shapes and bit order.

    Raises UnsupportedError for groups along the outputs, other packings and quantised scales, ArgumentError for tensors
    that do not fit together.
    """
    bits = int(meta["nbits"])
    check_bits(bits, "HQQ weights")
    if int(meta.get("axis", 1)) != 1:
        raise UnsupportedError("HQQ groups along axis 0 run across outputs; quantise with axis=1")
    if meta.get("quant_scale") or meta.get("quant_zero"):
        raise UnsupportedError("HQQ scales and zeros that are quantised themselves; quantise without it")
    packing = meta.get("packing", f"{bits}bit_u8")
    if PACKINGS.get(packing) != bits:
        raise UnsupportedError(f"HQQ packing {packing!r} of {bits} bits; there are {', '.join(PACKINGS)}")
    n, k = (int(size) for size in meta["shape"])
    size = int(meta["group_size"] or k)
    if k % size:
        raise ArgumentError(f"HQQ groups of {size} do not divide K = {k}")
    groups = k // size
    codes = w_q if w_q.dtype == torch.uint8 else w_q.view(torch.uint8)  # "view_as_float": bytes of a floating tensor
    codes = codes.reshape(-1, size)
    if bits == 4:
        codes = torch.cat([codes >> 4, codes & 15])
    check_shape(codes, "the codes of W_q", (n * groups, size))
    scale, zero = (_per_group(meta[name], name, n, groups) for name in ("scale", "zero"))
    packed = pack_rows(codes.view(n, k).t(), bits)
    if bool((zero == zero.round()).all()) and float(zero.min()) >= 0 and float(zero.max()) <= 255:
        b_type, zeros = type_of(zero.to(torch.int16), bits)
    else:
        b_type, zeros = PLAIN[bits], zero * scale
    return QuantizedWeights(packed, b_type, scale, zeros, k, -1 if groups == 1 else size, bias)


def _per_group(values: torch.Tensor, name: str, n: int, groups: int) -> torch.Tensor:
    """float32 [groups, N]."""
    if values.numel() != n * groups:
        raise ArgumentError(f"HQQ {name} must have {n * groups} values, one a group, got shape {tuple(values.shape)}")
    return values.reshape(n, groups).t().to(torch.float32).contiguous()
