# SPDX-License-Identifier: Apache-2.0
"""GPTQ checkpoints, versions 1 and 2 of the format, 4 and 8 bits.

Tensors of a linear layer of K inputs and N outputs, per = 32 / bits codes an int32:

* ``qweight`` int32 [K / per, N]: bits * i to bits * (i + 1) - 1 of word (r, n) are the code of k = per * r + i.
* ``qzeros`` int32 [groups, N / per]: the same bits of word (g, c) are the stored zero point of column per * c + i.
  Version 1 (``checkpoint_format`` "gptq") stores the zero point less 1, version 2 ("gptq_v2") the zero point itself.
* ``scales`` floating [groups, N].
* ``g_idx`` int32 [K]: the group of each k; with act-order (``desc_act``) not k // group_size.

value = (code - zero point) * scale. A stored 15 of version 1 is the zero point 16, which uint8 holds.

Some writers of symmetric 4-bit checkpoints store 8 and call it version 1. A checkpoint that is said to be symmetric is
therefore taken as such when all stored zero points are the middle code or all are one less.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from .bits import SYMMETRIC, check_bits, unpack_words
from .weights import QuantizedWeights, check_shape, group_of, order_by_group, reorder_rows, type_of

NEEDED = ("qweight", "qzeros", "scales")
OPTIONAL = ("g_idx", "bias")


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int | None = 128,
    version: int = 1,
    symmetric: bool = False,
) -> QuantizedWeights:
    """Weights of a layer of a GPTQ checkpoint; the module's docstring has shapes and bit order.

    ``version``: 1 or 2, see there. ``symmetric``: the checkpoint says that it is. ``group_size``: -1 or None for one.
    Raises ArgumentError for tensors that do not fit together, UnsupportedError for other numbers of bits.
    """
    check_bits(bits, "GPTQ weights")
    if version not in (1, 2):
        raise ArgumentError(f"version must be 1 or 2 of the GPTQ format, got {version!r}")
    per = 32 // bits
    if qweight.dim() != 2 or scales.dim() != 2:
        raise ArgumentError(f"qweight and scales must be matrices, got {tuple(qweight.shape)}, {tuple(scales.shape)}")
    k, n = qweight.shape[0] * per, qweight.shape[1]
    groups = scales.shape[0]
    check_shape(scales, "scales", (groups, n))
    check_shape(qzeros, "qzeros", (groups, -(-n // per)))
    size = group_of(k, group_size, groups)
    stored = unpack_words(qzeros, bits, 1)[:, :n]
    middle = SYMMETRIC[bits].bias
    if symmetric and bool((stored == stored[0, 0]).all()) and int(stored[0, 0]) in (middle - 1, middle):
        points = torch.full_like(stored, middle)
    else:
        points = stored.to(torch.int16) + (2 - version)
    b_type, zeros = type_of(points, bits)
    perm = order_by_group(g_idx, k, size)
    return QuantizedWeights(reorder_rows(qweight, bits, perm), b_type, scales, zeros, k, size, bias, perm)
