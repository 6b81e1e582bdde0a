# SPDX-License-Identifier: Apache-2.0
"""Gate and up projections as one product, in the order of columns that ``gemm(..., activation="swiglu")`` takes.

Columns come in blocks: 8 of gate, the 8 of up that they multiply, the next 8 of gate, and so on, so that a thread of a
kernel holds both factors of each of its outputs.
"""

from __future__ import annotations

import torch

from .errors import ArgumentError
from .prepack import check_gptq, prepack_columns
from .scalar_type import ScalarType
from .validate import GATE_BLOCK


def prepack_gate_up(
    gate: torch.Tensor,
    up: torch.Tensor,
    b_type: ScalarType,
    a_dtype: torch.dtype = torch.bfloat16,
    *,
    k: int | None = None,
) -> torch.Tensor:
    """``prepack_b`` of two projections of one size, interleaved: weights of N = 2 I for ``activation="swiglu"``.

    ``gate``, ``up``: int32 [ceil(K / b_type.per_int32), I] in GPTQ order, I a multiple of 8, any strides, on one
    device. ``k``, ``a_dtype``, the result and the scratch are those of ``prepack_b``. Scales, zeros, biases and channel
    scales are brought into the same order by ``interleave_gate_up``. Raises ArgumentError and UnsupportedError.
    """
    check_gptq(gate, "gate", b_type)
    check_gptq(up, "up", b_type)
    _check_pair(gate, up)
    rows, size = gate.shape

    def columns(first: int, last: int) -> torch.Tensor:
        half = slice(first // 2, last // 2)
        return _interleaved(gate[:, half], up[:, half])

    return prepack_columns(columns, (rows, 2 * size), gate.device, b_type, a_dtype, k)


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[..., I] and [..., I] -> [..., 2 I]: 8 of gate, 8 of up, in turn. I is a multiple of 8.

    For what belongs to the columns of gate and up: scales, zeros, bias, channel_scales. Both of one shape, dtype and
    device. Raises ArgumentError.
    """
    _check_pair(gate, up)
    return _interleaved(gate, up)


def _interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    blocks = (gate.shape[-1] // GATE_BLOCK, GATE_BLOCK)
    return torch.stack((gate.unflatten(-1, blocks), up.unflatten(-1, blocks)), dim=-2).flatten(-3)


def _check_pair(gate: torch.Tensor, up: torch.Tensor) -> None:
    for name, tensor in (("gate", gate), ("up", up)):
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if gate.shape != up.shape:
        raise ArgumentError(f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    if gate.dtype != up.dtype:
        raise ArgumentError(f"gate and up must have one dtype, got {gate.dtype} and {up.dtype}; convert one of them")
    if gate.device != up.device:
        raise ArgumentError(f"gate is on {gate.device} but up is on {up.device}; move both to one device")
    if gate.dim() == 0 or gate.shape[-1] == 0 or gate.shape[-1] % GATE_BLOCK:
        raise ArgumentError(
            f"gate and up must be [..., I], I a multiple of {GATE_BLOCK}, got shape {tuple(gate.shape)}; pad both with "
            "columns whose scales are 0"
        )
