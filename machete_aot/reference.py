# SPDX-License-Identifier: Apache-2.0
"""The definition of correct: the product in plain torch, on any device, from the same prepacked bytes.

Dequantised weights are rounded as torch rounds them, in the scales' dtype. The sum over K is taken in fp64, on the CPU
too: fp32 matrix products silently become bf16 or TF32 ones under torch.set_float32_matmul_precision, with an error
above this package's tolerance. The result is rounded to fp32, the bias added there, and that rounded once to a's dtype.

torch promises nothing about the order in which a matrix product is summed; it may depend on M, on alignment and on the
number of threads. For ``batch_invariant`` the sum is therefore written out, in the order of k, with elementwise
operations. Products of two 16-bit floating-point numbers are exact in fp64, so each step rounds once, to the same bits
with and without fused multiply-add, vectors or threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .config import UNIT_ROWS
from .prepack import unpack_b
from .scalar_type import ScalarType
from .validate import Problem, check_gemm

# Elements of the weight matrix that are dequantised at a time: 8 bytes each, and as much again in passing.
CHUNK_ELEMENTS = 16 << 20
# Sums that are taken together where the order of k is kept: half a megabyte, so that they stay in a core's cache.
BLOCK_SUMS = 1 << 16


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
    batch_invariant: bool = False,
) -> torch.Tensor:
    """``a @ (w_q.to(s.dtype) * s - zeros) + bias``, with the arguments of ``machete_aot.gemm`` and its checks.

    a [..., K] bf16 or fp16, any strides; b from ``prepack_b``; b_scales and b_zeros [ceil(K / group), N], bias [N] and
    out [..., N] in a's dtype. A group size of -1 or None is one group over K; the last group may be partial.
    ``schedule`` and ``overlap`` change how a GPU computes, not what, and are ignored. No gradients are computed.
    ``batch_invariant``: every row has the same bits whatever M is and wherever it stands; many times slower for many
    rows.
    Returns out, or a new tensor [..., N]. Raises ArgumentError.
    """
    problem = check_gemm(a, b, b_type, b_scales, b_zeros, b_group_size, bias, out)
    result = problem.out2d
    if result is None:
        result = torch.empty(problem.m, problem.n, dtype=problem.out_dtype, device=a.device)
    _multiply(problem, b, b_type, result, _sums_in_order if batch_invariant else torch.matmul)
    if batch_invariant:
        result.masked_fill_(result.isnan(), torch.nan)  # which NaN an operation gives is not defined
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


def _multiply(
    problem: Problem,
    b: torch.Tensor,
    b_type: ScalarType,
    out: torch.Tensor,
    matmul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    acts = problem.a2d.to(torch.float64)
    step = max(1, CHUNK_ELEMENTS // (problem.k * UNIT_ROWS)) * UNIT_ROWS
    for first in range(0, problem.n, step):
        last = min(first + step, problem.n)
        weights = _dequantize_columns(problem, b, b_type, first, last)
        sums = matmul(acts, weights.to(torch.float64)).to(torch.float32)
        if problem.bias is not None:
            sums += problem.bias[first:last].to(torch.float32)
        out[:, first:last] = sums.to(out.dtype)


def _sums_in_order(acts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """acts [m, k] @ weights [k, n], both fp64 of 16-bit values: every element summed from 0 on, k after k."""
    sums = torch.zeros(acts.shape[0], weights.shape[1], dtype=torch.float64, device=acts.device)
    for rows, their_sums in zip(acts.split(128), sums.split(128), strict=True):
        columns = rows.t().contiguous().unsqueeze(2)
        wide = BLOCK_SUMS // max(1, len(rows))
        for values, block in zip(weights.split(wide, dim=1), their_sums.split(wide, dim=1), strict=True):
            for column, row in zip(columns, values, strict=True):
                block.addcmul_(column, row)
    return sums


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
