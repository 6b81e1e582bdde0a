# SPDX-License-Identifier: Apache-2.0
"""The definition of correct: the product in plain torch, on any device, from the same prepacked bytes.

Dequantised weights are rounded as torch rounds them, in the scales' dtype: with floating zeros ``code * scale - zero``
is rounded twice, with integer zeros ``(code - zero) * scale`` once, because the difference is exact. The sum over K is
taken in fp64, on the CPU too: fp32 matrix products silently become bf16 or TF32 ones under
torch.set_float32_matmul_precision, with an error above this package's tolerance. It is rounded to fp32. ``epilogue``
does the rest in fp32, rounding each operation, and the result is rounded once to the output's dtype.

torch promises nothing about the order in which a matrix product is summed; it may depend on M, on alignment and on the
number of threads. For ``batch_invariant`` the sum is therefore written out, in the order of k, with elementwise
operations. Products of two 16-bit floating-point numbers are exact in fp64, so each step rounds once, to the same bits
with and without fused multiply-add, vectors or threads. The exponential of swiglu is written out for the same reason:
that of torch differs in the last bit between the vector unit and the rest of a vector's length.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .config import UNIT_ROWS
from .errors import ArgumentError
from .prepack import unpack_b
from .scalar_type import ScalarType
from .validate import GATE_BLOCK, Problem, check_gemm

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
    channel_scales: torch.Tensor | None = None,
    token_scales: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``a @ weights * channel_scales * token_scales + bias``: arguments and checks are those of ``machete_aot.gemm``.

    a [..., K] bf16 or fp16, any strides; b from ``prepack_b``; b_scales [ceil(K / group), N] and bias [N] in a's dtype.
    A group size of -1 or None is one group over K; the last group may be partial. b_zeros: [ceil(K / group), N], in a's
    dtype (weights ``code * scale - zero``), or uint8 or int32 of 0 to 255 (weights ``(code - zero) * scale``), or None.
    channel_scales [N] and token_scales ([M], or the shape of a without K): fp32. activation "swiglu": columns are gate
    and up in turn, 8 of each, and the result is silu(gate) * up of N / 2 columns, see ``epilogue``.
    out [..., N] or [..., N / 2] in out_dtype: fp32, fp16 or bf16, a's dtype if None.
    ``schedule`` and ``overlap`` change how a GPU computes, not what, and are ignored. No gradients are computed.
    ``batch_invariant``: every row has the same bits whatever M is and wherever it stands; many times slower for many
    rows.
    Returns out, or a new tensor of that shape. Raises ArgumentError.
    """
    problem = check_gemm(
        a, b, b_type, b_scales, b_zeros, b_group_size, bias, out, channel_scales=channel_scales,
        token_scales=token_scales, activation=activation, out_dtype=out_dtype,
    )  # fmt: skip
    _check_zero_range(b_zeros)
    result = problem.out2d
    if result is None:
        result = torch.empty(problem.m, problem.out_columns, dtype=problem.out_dtype, device=a.device)
    _multiply(problem, b, b_type, result, _sums_in_order if batch_invariant else torch.matmul)
    if batch_invariant:
        result.masked_fill_(result.isnan(), torch.nan)  # which NaN an operation gives is not defined
    return out if out is not None else result.view(*problem.batch_shape, problem.out_columns)


@torch.no_grad()
def epilogue(
    sums: torch.Tensor,
    *,
    channel_scales: torch.Tensor | None = None,
    token_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What becomes of fp32 sums [M, N]: ``sums * channel_scales * token_scales + bias``, every step rounded to fp32.

    channel_scales [N] and token_scales [M] fp32, bias [N] of any dtype. With activation "swiglu", 8 columns of gate and
    8 of up in turn, then silu(gate) * up [M, N / 2], where silu(x) = x / (1 + exp(-x)) is rounded to fp32 and so is the
    product. Returns ``out_dtype``, rounded once.
    """
    values = sums
    if channel_scales is not None:
        values = values * channel_scales
    if token_scales is not None:
        values = values * token_scales[:, None]
    if bias is not None:
        values = values + bias.to(torch.float32)
    if activation is not None:
        m, n = values.shape
        gate, up = values.reshape(m, n // (2 * GATE_BLOCK), 2, GATE_BLOCK).unbind(2)
        values = (_silu(gate.to(torch.float64)).to(torch.float32) * up).view(m, n // 2)
    return values.to(out_dtype)


def dequantize(
    b: torch.Tensor,
    b_type: ScalarType,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None,
    group_size: int | None,
    k: int,
) -> torch.Tensor:
    """The weights that a product multiplies by: [K, N] in the scales' dtype, each operation rounded to it.

    ``b``: from ``prepack_b``; ``b_scales`` and ``b_zeros``: [ceil(K / group_size), N], zeros floating or integer as in
    ``gemm``; ``group_size`` -1 or None: one group. Raises ArgumentError.
    """
    _check_zero_range(b_zeros)
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
    acts, columns = problem.a2d.to(torch.float64), problem.out_columns
    step = max(1, CHUNK_ELEMENTS // (problem.k * UNIT_ROWS)) * UNIT_ROWS
    for first in range(0, problem.n, step):
        last = min(first + step, problem.n)
        weights = _dequantize_columns(problem, b, b_type, first, last)
        sums = matmul(acts, weights.to(torch.float64)).to(torch.float32)
        result = epilogue(
            sums,
            channel_scales=None if problem.channel_scales is None else problem.channel_scales[first:last],
            token_scales=problem.token_scales,
            bias=None if problem.bias is None else problem.bias[first:last],
            activation=problem.activation,
            out_dtype=out.dtype,
        )
        out[:, first * columns // problem.n : last * columns // problem.n] = result


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
    weights = codes.to(problem.scales.dtype) - b_type.bias
    if problem.zeros is not None and problem.zeros_kind == "int":
        weights -= _per_k(problem.zeros, problem, first, last).to(weights.dtype)
    weights *= _per_k(problem.scales, problem, first, last)
    if problem.zeros is not None and problem.zeros_kind == "float":
        weights -= _per_k(problem.zeros, problem, first, last)
    return weights


def _per_k(values: torch.Tensor, problem: Problem, first: int, last: int) -> torch.Tensor:
    """A row for each k, or one row for all, of values given a row for each group."""
    columns = values[:, first:last]
    if problem.groups == 1:
        return columns
    return columns.repeat_interleave(problem.group, dim=0)[: problem.k]


def _silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) in fp64: the limit 0 far below 0, NaN for -infinity, as torch has it."""
    return x / (1 + _exp(-x))


# exp(r) = sum of r^i / i!: 14 terms leave 4e-18 for |r| <= ln(2) / 2.
_TAYLOR = tuple(1 / math.factorial(i) for i in reversed(range(14)))


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp(x) of fp64, to 1e-13 of it, by operations that can round in one way only: the same bits wherever it runs.

    Infinite above x = 700; below -700 it stops falling.
    """
    bounded = x.clamp(-700, 700)
    exponent = (bounded * (1 / math.log(2))).round()
    rest = bounded - exponent * math.log(2)
    value = torch.full_like(rest, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        value = value * rest  # not in one call: that may or may not be a fused multiply-add
        value = value + coefficient
    power = (exponent.nan_to_num().to(torch.int64) + 1023 << 52).view(torch.float64)
    return (value * power).masked_fill(x > 700, math.inf)


def _check_zero_range(zeros: torch.Tensor | None) -> None:
    """int32 zeros fit into uint8, which ``check_gemm`` makes of them."""
    if isinstance(zeros, torch.Tensor) and zeros.dtype == torch.int32 and zeros.numel() and not zeros.is_meta:
        least, most = (int(value) for value in zeros.aminmax())
        if least < 0 or most > 255:
            raise ArgumentError(f"integer b_zeros must be 0 to 255, found {least} to {most}")
