# SPDX-License-Identifier: Apache-2.0
"""The definition of correct: the product in plain torch, on any device, from the same prepacked bytes.

Dequantised weights are rounded as torch rounds them, in the scales' dtype. The sum over K is taken in fp64, on the CPU
too: fp32 matrix products silently become bf16 or TF32 ones under torch.set_float32_matmul_precision, with an error
above this package's tolerance. The result is rounded to fp32, the bias added there, and that rounded once to a's dtype.
"""

from __future__ import annotations

import torch

from .config import UNIT_ROWS
from .prepack import unpack_b
from .scalar_type import ScalarType
from .validate import Problem, check_gemm

# Elements of the weight matrix that are dequantised at a time: 8 bytes each, and as much again in passing.
CHUNK_ELEMENTS = 16 << 20


@torch.no_grad()
def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    b_type: ScalarType,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None = None,
    b_group_size: int | None = 128,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    schedule: str | None = None,
    *,
    overlap: bool | None = None,
) -> torch.Tensor:
    """``a @ (w_q.to(s.dtype) * s - zeros) + bias``, with the arguments of ``machete_aot.gemm`` and its checks.

    a [..., K] bf16 or fp16, any strides; b from ``prepack_b``; b_scales and b_zeros [ceil(K / group), N], bias [N] and
    out [..., N] in a's dtype. A group size of -1 or None is one group over K; the last group may be partial.
    ``schedule`` and ``overlap`` change how a GPU computes, not what, and are ignored. No gradients are computed.
    Returns out, or a new tensor [..., N]. Raises ArgumentError.
    """
    problem = check_gemm(a, b, b_type, b_scales, b_zeros, b_group_size, bias, out)
    result = problem.out2d
    if result is None:
        result = torch.empty(problem.m, problem.n, dtype=problem.out_dtype, device=a.device)
    _multiply(problem, b, b_type, result)
    return out if out is not None else result.view(*problem.batch_shape, problem.n)


def dequantize(
    b: torch.Tensor,
    b_type: ScalarType,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None,
    group_size: int | None,
    k: int,
) -> torch.Tensor:
    """The weights that a product multiplies by: [K, N] in the scales' dtype, each operation rounded to it.

    ``b``: from ``prepack_b``; ``b_scales`` and ``b_zeros``: [ceil(K / group_size), N]; ``group_size`` -1 or None: one
    group. Raises ArgumentError.
    """
    activations = torch.empty(0, k, dtype=b_scales.dtype, device=b.device)  # K and its dtype, for the checks
    problem = check_gemm(activations, b, b_type, b_scales, b_zeros, group_size, None, None)
    return _dequantize_columns(problem, b, b_type, 0, problem.n)


def _multiply(problem: Problem, b: torch.Tensor, b_type: ScalarType, out: torch.Tensor) -> None:
    acts = problem.a2d.to(torch.float64)
    step = max(1, CHUNK_ELEMENTS // (problem.k * UNIT_ROWS)) * UNIT_ROWS
    for first in range(0, problem.n, step):
        last = min(first + step, problem.n)
        weights = _dequantize_columns(problem, b, b_type, first, last)
        sums = (acts @ weights.to(torch.float64)).to(torch.float32)
        if problem.bias is not None:
            sums += problem.bias[first:last].to(torch.float32)
        out[:, first:last] = sums.to(out.dtype)


def _dequantize_columns(problem: Problem, b: torch.Tensor, b_type: ScalarType, first: int, last: int) -> torch.Tensor:
    """[K, last - first] of the weights; ``first`` is a multiple of the 64 rows of a unit."""
    tiles = b[first // UNIT_ROWS : -(-last // UNIT_ROWS)]
    codes = unpack_b(tiles, b_type, last - first, problem.k)
    # Exact: bf16 and fp16 hold every integer up to 256.
    weights = codes.to(problem.out_dtype) - b_type.bias
    weights *= _per_k(problem.scales, problem, first, last)
    if problem.zeros is not None:
        weights -= _per_k(problem.zeros, problem, first, last)
    return weights


def _per_k(values: torch.Tensor, problem: Problem, first: int, last: int) -> torch.Tensor:
    """A row for each k, or one row for all, of values given a row for each group."""
    columns = values[:, first:last]
    if problem.groups == 1:
        return columns
    return columns.repeat_interleave(problem.group, dim=0)[: problem.k]
