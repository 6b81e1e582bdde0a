# SPDX-License-Identifier: Apache-2.0
"""Random weights in checkpoints' formats of 4 bits and groups of 128, and what they are by the formats' definitions.

Codes are normally distributed around their zero points: uniform ones would give the weights a mean.
"""

from __future__ import annotations

import torch

GROUP = 128
WEIGHT = 0.02  # standard deviation of the weights
CODE = 2.5  # that of codes of 4 bits, before they are cut off at 0 and 15
PREFERENCE = 14.0  # standard deviations of a logit, where the last layer's output is the token's embedding alone
AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # where column c % 8 lies in a word, in codes from its lowest bits


def preferred(embeddings: torch.Tensor) -> torch.Tensor:
    """What makes an output layer [V, hidden] prefer one token after each other one: a trained model mostly does.

    With layers that add as much as the embedding, the preferred logit lies about one and a half times as far above the
    others' mean as the largest of these does: nearly all choices are clear, and few are closer than bf16 rounds.
    """
    v, hidden = embeddings.shape
    after = torch.randperm(v, device=embeddings.device)
    return embeddings[after].float().mul_(PREFERENCE / hidden**0.5)


def random_codes(points: torch.Tensor, k: int) -> torch.Tensor:
    """Codes [K, N] of 4 bits, int32, around their groups' zero points [groups, N]."""
    centres = points.repeat_interleave(GROUP, 0).float()
    return centres.add_(torch.randn(k, points.shape[1], device=points.device).mul_(CODE)).round_().clamp_(0, 15).int()


def packed_rows(codes: torch.Tensor) -> torch.Tensor:
    """int32 [R / 8, C] of codes [R, C]: row 8 r + i is bits 4 i of row r."""
    shifts = torch.arange(0, 32, 4, device=codes.device, dtype=torch.int32)
    return (codes.unflatten(0, (-1, 8)) << shifts[:, None]).sum(1, dtype=torch.int32)


def packed_awq(codes: torch.Tensor) -> torch.Tensor:
    """int32 [R, C / 8] of codes [R, C], in AWQ's order of columns."""
    shifts = 4 * torch.tensor(AWQ_PLACE, device=codes.device, dtype=torch.int32)
    return (codes.unflatten(1, (-1, 8)) << shifts).sum(2, dtype=torch.int32)


def random_scales(groups: int, n: int, device: torch.device) -> torch.Tensor:
    return torch.rand(groups, n, device=device).mul_(0.6).add_(0.7).mul_(WEIGHT / CODE).to(torch.float16)


def random_gptq(n: int, k: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Version 1 of the format: a stored zero point of 7 is 8."""
    codes = random_codes(torch.full((k // GROUP, n), 8, device=device), k)
    zeros = torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32)
    g_idx = (torch.arange(k) // GROUP).to(torch.int32)
    scales = random_scales(k // GROUP, n, device)
    return {"qweight": packed_rows(codes), "qzeros": zeros, "scales": scales, "g_idx": g_idx}


def random_awq(n: int, k: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Zero points of 5 to 10."""
    points = torch.randint(5, 11, (k // GROUP, n), device=device, dtype=torch.int32)
    scales = random_scales(k // GROUP, n, device)
    return {"qweight": packed_awq(random_codes(points, k)), "qzeros": packed_awq(points), "scales": scales}


def dequantised_gptq(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, K] in bf16: (code - (stored zero point + 1)) * scale."""
    shifts = torch.arange(0, 32, 4, device=tensors["qweight"].device)
    codes = (tensors["qweight"][:, None, :] >> shifts[None, :, None] & 15).flatten(0, 1)
    points = (tensors["qzeros"][:, :, None] >> shifts & 15).flatten(1) + 1
    return _values(codes, points, tensors["scales"])


def dequantised_awq(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, K] in bf16: (code - zero point) * scale, columns from their places in a word."""
    shifts = 4 * torch.tensor(AWQ_PLACE, device=tensors["qweight"].device)
    codes, points = ((tensors[name][:, :, None] >> shifts & 15).flatten(1) for name in ("qweight", "qzeros"))
    return _values(codes, points, tensors["scales"])


def _values(codes: torch.Tensor, points: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    exact = (codes - points.repeat_interleave(GROUP, 0)).to(torch.bfloat16)
    return (exact * scales.to(torch.bfloat16).repeat_interleave(GROUP, 0)).t().contiguous()


RANDOM = {"gptq": random_gptq, "awq": random_awq}
DEQUANTISED = {"gptq": dequantised_gptq, "awq": dequantised_awq}
