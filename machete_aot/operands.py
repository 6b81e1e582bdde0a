# SPDX-License-Identifier: Apache-2.0
"""From a checked product to its launch: operands as the kernels can read them, copied where they are not; flags."""

from __future__ import annotations

import torch

from . import abi, driver, overlap
from .bundle import Bundle
from .config import TypeConfig
from .errors import ArgumentError
from .kernel import LoadedKernel
from .launch import LaunchPlan, Operands, Shape, multiply
from .scalar_type import ScalarType
from .validate import Problem

PIECE = 16  # bytes: what tensor maps and bulk copies align rows to
_OUT_FLAGS = {
    torch.float32: abi.FLAG_OUT_FP32,
    torch.bfloat16: abi.FLAG_OUT_BF16,
    torch.float16: abi.FLAG_OUT_FP16,
}


def run_kernel(
    bundle: Bundle,
    types: TypeConfig,
    problem: Problem,
    b: torch.Tensor,
    b_type: ScalarType,
    out: torch.Tensor,
    schedule: str | None,
    overlaps: bool | None,
    index: int,
    stream: int,
    batch_invariant: bool = False,
) -> tuple[LaunchPlan, LoadedKernel] | None:
    """Launches a checked product of at least one row into ``out`` [m, out_columns], by kernels of ``types``.

    ``stream``: a CUstream of device ``index``. ``overlaps``, ``batch_invariant``: what the caller of ``gemm`` wished.
    Returns what it has launched, None if it had to copy an operand first.
    """
    m, n, k = problem.m, problem.n, problem.k
    if b.data_ptr() % PIECE:
        raise ArgumentError(f"b must start on a 16-byte boundary, got address {b.data_ptr():#x}; pass b.clone()")
    acts, scales, bias, zeros = aligned_rows(problem.a2d), aligned_rows(problem.scales, whole=True), problem.bias, None
    constants, zero_stride = [b, scales], 0
    if problem.zeros is not None:
        zeros = aligned_rows(problem.zeros, whole=True)
        zero_stride = row_stride(zeros)
    constants += [t for t in (zeros, bias, problem.channel_scales) if t is not None]
    shape = Shape(
        m, n, k, problem.group, row_stride(acts), row_stride(scales),
        out.stride(0) if m > 1 else problem.out_columns, zero_stride, b_type.bias, call_flags(problem),
    )  # fmt: skip
    operands = Operands(
        acts.data_ptr(), b.data_ptr(), scales.data_ptr(), _address(bias), out.data_ptr(), _address(zeros),
        _address(problem.channel_scales), _address(problem.token_scales),
    )  # fmt: skip

    held = []  # until the launch: after it the allocator reuses memory in the stream's order only
    launched = []

    def allocate(size: int) -> int:
        held.append(torch.empty(size, dtype=torch.uint8, device=out.device))
        return held[-1].data_ptr()

    def launch(early: bool) -> None:
        launched.append(
            multiply(bundle, types, shape, schedule, operands, index, stream, early, allocate, batch_invariant)
        )

    with driver.current(driver.device(index)):  # a new thread has no context yet
        # Token scales are no constants: like the activations they are read after the earlier kernels have ended.
        overlap.launch_after_writes(constants, overlaps, stream, launch)
    copied = acts is not problem.a2d or scales is not problem.scales or zeros is not problem.zeros
    return None if copied else launched[0]


def as_given(
    problem: Problem,
    a: torch.Tensor,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    channel_scales: torch.Tensor | None,
    token_scales: torch.Tensor | None,
) -> bool:
    """Whether the operands of a problem are the caller's own tensors, or views of them, and no copies."""
    same = problem.scales is b_scales and problem.zeros is b_zeros and problem.bias is bias
    same = same and problem.channel_scales is channel_scales and problem.a2d.data_ptr() == a.data_ptr()
    return same and _address(problem.token_scales) == _address(token_scales)


def reach(matrix: torch.Tensor) -> int:
    """Bytes from the first element of a matrix with contiguous rows to behind its last one."""
    rows, columns = matrix.shape
    return ((rows - 1) * matrix.stride(0) + columns) * matrix.element_size()


def call_flags(problem: Problem) -> int:
    """The flags of ``abi`` that follow from the call: one FLAG_OUT_, unless nothing is done but adding a bias."""
    flags = abi.FLAG_INTEGER_ZEROS if problem.zeros_kind == "int" else 0
    if problem.activation is not None:
        flags |= abi.FLAG_SWIGLU
    elif problem.channel_scales is None and problem.token_scales is None and problem.out_dtype == problem.a2d.dtype:
        return flags
    return flags | _OUT_FLAGS[problem.out_dtype]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def aligned_rows(matrix: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
    """``matrix`` [rows, columns], or a padded copy where the kernels could not read it: each row starts on 16 bytes.

    ``whole``: rows are read in whole pieces of 16 bytes, so the last one must not end where the memory may end.
    """
    rows, columns = matrix.shape
    stride, piece = matrix.stride(0), PIECE // matrix.element_size()
    contiguous = columns == 1 or matrix.stride(1) == 1
    apart = rows == 1 or (stride % piece == 0 and stride >= columns)
    ends = not whole or columns % piece == 0
    if contiguous and apart and ends and matrix.data_ptr() % PIECE == 0:
        return matrix
    padded = torch.empty(rows, _round_up(columns, piece), dtype=matrix.dtype, device=matrix.device)
    return padded[:, :columns].copy_(matrix)


def row_stride(matrix: torch.Tensor) -> int:
    """Elements between rows of an aligned matrix; of a single row, whose stride means nothing, its padded length."""
    return matrix.stride(0) if matrix.shape[0] > 1 else _round_up(matrix.shape[1], PIECE // matrix.element_size())


def _round_up(columns: int, piece: int) -> int:
    return -(-columns // piece) * piece
