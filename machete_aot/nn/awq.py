# SPDX-License-Identifier: Apache-2.0
"""AWQ checkpoints of version "gemm", 4 bits.

Tensors of a linear layer of K inputs and N outputs:

* ``qweight`` int32 [K, N / 8]: a word (k, c) has the codes of columns 8 c to 8 c + 7 of row k. Their order is
  interleaved: bits 4 i to 4 i + 3 are column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
* ``qzeros`` int32 [groups, N / 8]: the zero points of the columns, in the same order.
* ``scales`` floating [groups, N].

value = (code - zero point) * scale.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentError, UnsupportedError
from .bits import pack_rows, unpack_words
from .weights import QuantizedWeights, check_shape, group_of, type_of

COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word, from its lowest bits up

NEEDED = ("qweight", "qzeros", "scales")
OPTIONAL = ("bias",)


def from_awq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int | None = 128,
) -> QuantizedWeights:
    """Weights of a layer of an AWQ checkpoint; the module's docstring has shapes and bit order.

    Raises ArgumentError for tensors that do not fit together, UnsupportedError for other numbers of bits.
    """
    if bits != 4:
        raise UnsupportedError(f"AWQ weights of {bits} bits; the format has 4")
    if qweight.dim() != 2 or scales.dim() != 2:
        raise ArgumentError(f"qweight and scales must be matrices, got {tuple(qweight.shape)}, {tuple(scales.shape)}")
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = scales.shape[0]
    check_shape(scales, "scales", (groups, n))
    check_shape(qzeros, "qzeros", (groups, n // 8))
    size = group_of(k, group_size, groups)
    b_type, zeros = type_of(unpack_words(qzeros, 4, 1, COLUMNS), 4)
    w_q = pack_rows(unpack_words(qweight, 4, 1, COLUMNS), 4)
    return QuantizedWeights(w_q, b_type, scales, zeros, k, size, bias)
