# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: weights quantised from floating point with nothing but each group's range. No calibration data."""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from ..scalar_type import ScalarType, u4b8
from .bits import check_bits, pack_rows
from .weights import QuantizedWeights


def round_to_nearest(
    weight: torch.Tensor,
    b_type: ScalarType = u4b8,
    group_size: int | None = 128,
    symmetric: bool | None = None,
    bias: torch.Tensor | None = None,
) -> QuantizedWeights:
    """Weights [N, K], floating, as ``torch.nn.Linear`` has them, each rounded to its group's nearest code.

    ``symmetric``: around zero, or between a group's least and greatest weight (and zero), with integer zero points.
    None: as the type says; u4b8 and u8b128 can only be symmetric. Scales are rounded to the weights' dtype first, so
    that codes are nearest for the scale that is kept. Raises ArgumentError and UnsupportedError.
    """
    check_bits(b_type.bits, f"weights of type {b_type}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ArgumentError(f"weight must be a floating [N, K], got {weight.dtype} of shape {tuple(weight.shape)}")
    if symmetric is None:
        symmetric = b_type.bias != 0
    if b_type.bias and not symmetric:
        raise ArgumentError(f"{b_type} is symmetric; pass u{b_type.bits} for zero points of its own")
    n, k = weight.shape
    size = k if group_size is None or group_size == -1 else min(group_size, k)
    groups = -(-k // size)
    padded = torch.nn.functional.pad(weight.detach().to(torch.float32), (0, groups * size - k)).view(n, groups, size)
    least, most = padded.amin(dim=2).clamp(max=0), padded.amax(dim=2).clamp(min=0)
    top = (1 << b_type.bits) - 1
    middle = (top + 1) // 2
    scales = torch.maximum(most / (top - middle), -least / middle) if symmetric else (most - least) / top
    kept = scales.clamp(min=torch.finfo(weight.dtype).tiny).to(weight.dtype)
    exact = kept.to(torch.float32)
    points = torch.full_like(exact, middle) if symmetric else (-least / exact).round().clamp(0, top)
    codes = (padded / exact[..., None]).round().add_(points[..., None]).clamp_(0, top).to(torch.uint8)
    packed = pack_rows(codes.view(n, -1)[:, :k].t(), b_type.bits)
    zeros = None if b_type.bias else points.to(torch.uint8).t().contiguous()
    return QuantizedWeights(packed, b_type, kept.t().contiguous(), zeros, k, -1 if groups == 1 else size, bias)
