# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints of format "pack-quantized", integers of 4 and 8 bits.

Codes are signed integers with an offset: stored = signed + 2^(bits - 1). Tensors of a linear layer of K inputs and N
outputs, per = 32 / bits codes an int32:

* ``weight_packed`` int32 [N, ceil(K / per)]: bits * i to bits * (i + 1) - 1 of word (n, r)
  are stored (n, per * r + i).
* ``weight_scale`` floating [N, groups]; strategy "channel" has one group, "tensor" one scale, [1] or [1, 1].
* ``weight_zero_point``, of asymmetric weights alone: int32 [ceil(N / per), groups], packed with the offset along N, or,
  in older checkpoints, signed int8 [N, groups].
* ``weight_shape`` integers [2]: N and K.
* ``weight_g_idx`` integers [K], with act-order of kind "group": the group of each k; -1 throughout where it is unused.

value = (signed code - signed zero point) * scale, which the offset leaves as it is.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from .bits import SYMMETRIC, check_bits, unpack_words
from .weights import QuantizedWeights, check_shape, group_of, order_by_group, reorder_rows, type_of

NEEDED = ("weight_packed", "weight_scale")
OPTIONAL = ("weight_zero_point", "weight_shape", "weight_g_idx", "bias")


def from_compressed_tensors(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    weight_shape: torch.Tensor | tuple[int, int] | None = None,
    weight_g_idx: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int | None = 128,
) -> QuantizedWeights:
    """Weights of a layer of a pack-quantized checkpoint; the module's docstring has shapes and bit order.

    ``weight_zero_point`` None: symmetric. ``weight_shape`` None: every packed code counts. ``group_size``: -1 or None
    for strategies "channel" and "tensor". Raises ArgumentError for tensors that do not fit together, UnsupportedError
    for other numbers of bits.
    """
    check_bits(bits, "compressed-tensors weights")
    per = 32 // bits
    if weight_packed.dim() != 2:
        raise ArgumentError(f"weight_packed must be a matrix, got shape {tuple(weight_packed.shape)}")
    if weight_shape is None:
        n, k = weight_packed.shape[0], weight_packed.shape[1] * per
    else:
        n, k = (int(size) for size in weight_shape)
    check_shape(weight_packed, "weight_packed", (n, -(-k // per)))
    scales = weight_scale.expand(n, 1) if weight_scale.numel() == 1 else weight_scale
    if scales.dim() != 2:
        raise ArgumentError(f"weight_scale must be [{n}, groups], got shape {tuple(weight_scale.shape)}")
    groups = scales.shape[1]
    check_shape(scales, "weight_scale", (n, groups))
    size = group_of(k, group_size, groups)
    b_type, zeros = SYMMETRIC[bits], None
    if weight_zero_point is not None:
        b_type, zeros = type_of(_points(weight_zero_point, bits, n, groups).t(), bits)
    perm = order_by_group(weight_g_idx, k, size)
    w_q = reorder_rows(weight_packed.t(), bits, perm)
    zeros = None if zeros is None else zeros.contiguous()
    return QuantizedWeights(w_q, b_type, scales.t().contiguous(), zeros, k, size, bias, perm)


def _points(zero_point: torch.Tensor, bits: int, n: int, groups: int) -> torch.Tensor:
    """Zero points [N, groups] as unsigned codes have them."""
    if zero_point.dtype == torch.int32:
        check_shape(zero_point, "weight_zero_point", (-(-n * bits // 32), groups))
        return unpack_words(zero_point, bits, 0)[:n]
    signed = zero_point.expand(n, 1) if zero_point.numel() == 1 else zero_point
    check_shape(signed, "weight_zero_point", (n, groups))
    return signed.to(torch.int16) + SYMMETRIC[bits].bias
