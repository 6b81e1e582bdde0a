# SPDX-License-Identifier: Apache-2.0
"""The one check of a product's arguments, shared by the kernels' gemm and the reference.

It looks at attributes only: no device work, no synchronisation, so that it can run on every call. It does not ask
whether a kernel exists for the product (that is ``selection.py``), nor for a particular device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .config import BLOCK_K, UNIT_K
from .errors import ArgumentError
from .layout import packed_shape
from .prepack import A_DTYPES
from .scalar_type import ScalarType

GATE_BLOCK = 8  # columns of gate, then as many of up, in turn
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FLOATING = frozenset(A_DTYPES.values())
_INTEGER_ZEROS = frozenset([torch.uint8, torch.int32])


class Problem(NamedTuple):
    """A product whose arguments fit together: y[m, n] = a2d[m, k] @ dequantised[k, n] * channel * token + bias.

    ``group``: the number of k that share a scale, ``k`` where there is one group; ``groups`` = ceil(k / group).
    ``fine``: there are several groups, and one may begin inside a unit of 64 k.
    ``batch_shape``: the shape of a without its last dimension; the output's is ``(*batch_shape, out_columns)``.
    ``a2d``: the activations as [m, k], a view where the strides allow one, row stride and alignment as they come.
    ``scales``, ``zeros`` [groups, n] and ``bias`` [n]: last dimension contiguous, copied only where it was not.
    ``zeros_kind``: "none", "float" (``zeros`` in a's dtype, subtracted from the scaled code) or "int" (``zeros`` uint8,
    subtracted from the code).
    ``channel_scales`` [n] and ``token_scales`` [m]: fp32, contiguous, or None.
    ``activation``: None or "swiglu", and then ``out_columns`` is n / 2, else n.
    ``out2d``: the caller's output as a view [m, out_columns] with a contiguous last dimension, None where none was
    given.
    """

    m: int
    n: int
    k: int
    group: int
    groups: int
    fine: bool
    batch_shape: tuple[int, ...]
    a2d: torch.Tensor
    scales: torch.Tensor
    zeros_kind: str
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    channel_scales: torch.Tensor | None
    token_scales: torch.Tensor | None
    activation: str | None
    out_dtype: torch.dtype
    out_columns: int
    out2d: torch.Tensor | None


def check_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    b_type: ScalarType,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None,
    b_group_size: int | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    *,
    channel_scales: torch.Tensor | None = None,
    token_scales: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Problem:
    """Checks the arguments of ``gemm`` against each other and returns what they mean.

    a [..., K] bf16 or fp16; b as ``prepack_b`` returned it; b_scales [ceil(K / group), N] and bias [N] in a's dtype;
    b_zeros like b_scales, in a's dtype, or uint8 or int32; channel_scales [N] and token_scales ([M], or the shape of a
    without K) fp32; out [..., N], or [..., N / 2] with an activation, in ``out_dtype``, which is a's if None;
    everything on one device. N is read from the scales, K from the activations. Gradients are neither needed nor
    computed: ``requires_grad`` is ignored. No device work, but for tensors that are copied as Problem says, and int32
    zeros, which become uint8. Raises ArgumentError.
    """
    _check_tensors(a, b, b_scales, b_zeros, bias, out, channel_scales, token_scales)
    check_b_type(b_type)
    dtype = a.dtype
    if dtype not in _FLOATING:
        raise ArgumentError(f"a must be bfloat16 or float16, got {dtype}; convert it with a.to(torch.bfloat16)")
    if a.dim() == 0 or a.shape[-1] == 0:
        raise ArgumentError(f"a must be [..., K] with K > 0, got shape {tuple(a.shape)}")
    *batch, k = a.shape
    group, groups = _groups(k, b_group_size)
    n = _check_scales(b_scales, dtype, groups, k, group)
    zeros_kind = "none" if b_zeros is None else _check_zeros(b_zeros, b_type, dtype, (groups, n))
    if bias is not None:
        _check_like(bias, "bias", (n,), dtype, "[N]")
    _check_weights(b, b_type, n, k)
    a2d = a if len(batch) == 1 else a.reshape(-1, k)
    m = a2d.shape[0]
    if channel_scales is not None:
        channel_scales = _checked_channel_scales(channel_scales, n)
    if token_scales is not None:
        token_scales = _checked_token_scales(token_scales, m, tuple(batch))
    out_columns = n if activation is None else _activated_columns(activation, n)
    if out_dtype is None:
        out_dtype = dtype
    elif out_dtype not in OUT_DTYPES:
        raise ArgumentError(f"out_dtype must be torch.float32, torch.float16 or torch.bfloat16, got {out_dtype!r}")
    out2d = None
    if out is not None:
        if out.dtype != out_dtype:
            raise ArgumentError(
                f"out must be {out_dtype}, what out_dtype says or else the dtype of a; got {out.dtype}: pass "
                f"out_dtype={out.dtype}, or another out"
            )
        columns = "N" if activation is None else "N / 2"
        _check_shape(out, "out", (*batch, out_columns), f"the shape of a with {columns} for K")
        out2d = _rows_of(out, m, out_columns)
        if _share_memory(out2d, a2d):
            raise ArgumentError("out shares memory with a, which is still read while out is written; pass another out")
    return Problem(
        m, n, k, group, groups,
        groups > 1 and group % UNIT_K != 0,
        tuple(batch), a2d,
        _last_contiguous(b_scales),
        zeros_kind,
        None if b_zeros is None else _last_contiguous(b_zeros if b_zeros.dtype != torch.int32 else b_zeros.byte()),
        None if bias is None else _last_contiguous(bias),
        channel_scales, token_scales, activation, out_dtype, out_columns, out2d,
    )  # fmt: skip


class Permutation(NamedTuple):
    """Columns to be permuted: ``a2d`` [m, k] and ``order`` [k], last dimension contiguous, copied where it was not.

    ``out2d``: the caller's output as a view [m, k], None where none was given.
    """

    a2d: torch.Tensor
    order: torch.Tensor
    out2d: torch.Tensor | None


def check_permutation(a: torch.Tensor, order: torch.Tensor, out: torch.Tensor | None) -> Permutation:
    """Checks the arguments of ``permute_columns`` against each other and returns what they mean.

    What ``order`` holds is not looked at: that would wait for the device. Raises ArgumentError.
    """
    for name, tensor in (("a", a), ("order", order), ("out", out)):
        if tensor is None and name == "out":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != a.device:
            raise ArgumentError(f"{name} is on {tensor.device} but a is on {a.device}; move all to one device")
    if a.dtype not in _FLOATING:
        raise ArgumentError(f"a must be bfloat16 or float16, got {a.dtype}; convert it with a.to(torch.bfloat16)")
    if a.dim() == 0:
        raise ArgumentError("a must be [..., K], got a scalar")
    k = a.shape[-1]
    if order.dtype != torch.int32:
        raise ArgumentError(f"order must be torch.int32, got {order.dtype}; convert it once with .to(torch.int32)")
    _check_shape(order, "order", (k,), "a column of a for each of its columns, [K]")
    a2d = _last_contiguous(a if a.dim() == 2 else a.reshape(-1 if k else a.shape[:-1].numel(), k))
    out2d = None
    if out is not None:
        if out.dtype != a.dtype:
            raise ArgumentError(f"out must have the dtype of a, {a.dtype}, got {out.dtype}")
        _check_shape(out, "out", tuple(a.shape), "the shape of a")
        out2d = _rows_of(out, a2d.shape[0], k)
        if k and _share_memory(out2d, a2d):
            raise ArgumentError("out shares memory with a, which is still read while out is written; pass another out")
    return Permutation(a2d, order if order.is_contiguous() else order.contiguous(), out2d)


def stands_for_others(tensor: torch.Tensor) -> bool:
    """Whether this is of a class that makes operators of its own of torch's, such as DTensor, and has no memory."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def check_plain(**tensors: torch.Tensor | None) -> None:
    """Raises ArgumentError for a tensor that stands for others: its address is 0, which kernels read as none given."""
    for name, tensor in tensors.items():
        if tensor is not None and stands_for_others(tensor):
            raise ArgumentError(
                f"{name} is a {type(tensor).__name__}, which stands for other tensors; wanted a plain one: of a "
                "DTensor pass to_local() or full_tensor()"
            )


def check_b_type(b_type: object) -> None:
    """Raises ArgumentError unless this is a ScalarType."""
    if not isinstance(b_type, ScalarType):
        raise ArgumentError(f"b_type must be a ScalarType such as machete_aot.u4b8, got {b_type!r}")


def _check_tensors(
    a: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    channel_scales: torch.Tensor | None,
    token_scales: torch.Tensor | None,
) -> None:
    """Required arguments and given options are tensors on one device."""
    if not isinstance(a, torch.Tensor):
        raise ArgumentError(f"a must be a torch.Tensor, got {type(a).__name__}")
    device = a.device
    for name, tensor, optional in (
        ("b", b, False),
        ("b_scales", b_scales, False),
        ("b_zeros", b_zeros, True),
        ("bias", bias, True),
        ("out", out, True),
        ("channel_scales", channel_scales, True),
        ("token_scales", token_scales, True),
    ):
        if optional and tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ArgumentError(f"{name} is on {tensor.device} but a is on {device}; move all to one device")


def _groups(k: int, size: int | None) -> tuple[int, int]:
    """(group, groups) of a group size as the caller gives it."""
    if size is None or size == -1:
        return k, 1
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise ArgumentError(f"b_group_size must be a positive int, or -1 or None for one group over K, got {size!r}")
    if size % BLOCK_K:
        raise ArgumentError(f"b_group_size must be a multiple of {BLOCK_K}, got {size}")
    return (k, 1) if size >= k else (size, -(-k // size))


def _check_scales(scales: torch.Tensor, dtype: torch.dtype, groups: int, k: int, group: int) -> int:
    """Returns N."""
    if scales.dtype != dtype:
        raise ArgumentError(f"b_scales must have the dtype of a, {dtype}, got {scales.dtype}; convert it once")
    if scales.dim() != 2 or scales.shape[0] != groups or scales.shape[1] == 0:
        shape = tuple(scales.shape)
        hint = "check b_group_size, and that a has the K of the weights"
        if len(shape) == 2 and shape[0] == 1:
            hint = "for one group over K pass b_group_size=-1"
        elif len(shape) == 2 and shape[1] == groups:
            hint = "transpose them"
        raise ArgumentError(
            f"b_scales must be [{groups}, N]: K = {k} has {groups} groups of {group}; got shape {shape}: {hint}"
        )
    return scales.shape[1]


def _check_zeros(zeros: torch.Tensor, b_type: ScalarType, dtype: torch.dtype, shape: tuple[int, int]) -> str:
    """Returns their kind."""
    kind = "float"
    if zeros.dtype != dtype:
        if zeros.dtype not in _INTEGER_ZEROS:
            raise ArgumentError(
                f"b_zeros must have the dtype of a, {dtype} (value = scale * code - zero), or be uint8 or int32 "
                f"(value = (code - zero) * scale), got {zeros.dtype}"
            )
        if b_type.bias:
            raise ArgumentError(
                f"b_zeros are integers, and {b_type} has a zero point of its own, {b_type.bias}; pass the weights as "
                f"u{b_type.bits}, the same codes without it, or leave b_zeros out"
            )
        kind = "int"
    _check_shape(zeros, "b_zeros", shape, "the shape of b_scales")
    return kind


def _checked_channel_scales(scales: torch.Tensor, n: int) -> torch.Tensor:
    _check_fp32(scales, "channel_scales")
    _check_shape(scales, "channel_scales", (n,), "a value for each column of the product, [N]")
    return _last_contiguous(scales)


def _checked_token_scales(scales: torch.Tensor, m: int, batch: tuple[int, ...]) -> torch.Tensor:
    """Flat: a value for each row of the product."""
    _check_fp32(scales, "token_scales")
    if scales.shape != (m,) and scales.shape != batch:
        either = f"{batch}" if len(batch) == 1 else f"{batch} or ({m},)"
        raise ArgumentError(
            f"token_scales must have a value for each row of a, {either}, got shape {tuple(scales.shape)}"
        )
    return (scales if scales.dim() == 1 else scales.reshape(-1)).contiguous()


def _activated_columns(activation: str, n: int) -> int:
    """Columns of the output of an activation of n columns."""
    if activation != "swiglu":
        raise ArgumentError(f"activation must be None or 'swiglu', got {activation!r}")
    if n % (2 * GATE_BLOCK):
        raise ArgumentError(
            f"swiglu takes columns of gate and up in turn, {GATE_BLOCK} of each, so N must be a multiple of "
            f"{2 * GATE_BLOCK}, got {n}; prepack_gate_up and interleave_gate_up give that order"
        )
    return n // 2


def _check_fp32(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype != torch.float32:
        raise ArgumentError(f"{name} must be torch.float32, got {tensor.dtype}; convert them once with .float()")


def _check_like(tensor: torch.Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, meaning: str) -> None:
    if tensor.dtype != dtype:
        raise ArgumentError(f"{name} must have the dtype of a, {dtype}, got {tensor.dtype}")
    _check_shape(tensor, name, shape, meaning)


def _check_shape(tensor: torch.Tensor, name: str, shape: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != shape:
        raise ArgumentError(f"{name} must have {meaning}, {shape}, got shape {tuple(tensor.shape)}")


def _check_weights(b: torch.Tensor, b_type: ScalarType, n: int, k: int) -> None:
    wanted = packed_shape(n, k, b_type)
    if b.dtype == torch.int32 and b.shape == wanted:
        if not b.is_contiguous():
            raise ArgumentError(f"b must be contiguous, as prepack_b returns it; got strides {b.stride()}")
        return
    found = f"got {b.dtype} of shape {tuple(b.shape)}"
    if b.dim() == 2:
        hint = "this looks like weights that were not prepacked: call machete_aot.prepack_b once and pass its result"
    else:
        hint = "N comes from b_scales and K from a: pass prepack_b's result for the same type, N and K"
    raise ArgumentError(f"b must be int32 {wanted} for {b_type} with N = {n} and K = {k}, {found}; {hint}")


def _rows_of(out: torch.Tensor, m: int, columns: int) -> torch.Tensor:
    """``out`` as [m, columns] without a copy, rows apart."""
    wanted = "out must be viewable as a matrix with a contiguous last dimension and rows that do not overlap"
    try:
        rows = out if out.dim() == 2 else out.view(m, columns)
    except RuntimeError:
        raise ArgumentError(f"{wanted}, got shape {tuple(out.shape)} with strides {out.stride()}") from None
    if (columns > 1 and rows.stride(1) != 1) or (m > 1 and rows.stride(0) < columns):
        raise ArgumentError(f"{wanted}, got shape {tuple(out.shape)} with strides {out.stride()}")
    return rows


def _share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two matrices may have a byte in common. Exact for columns of one row-major buffer, of any dtypes."""
    if x.shape[0] == 0 or x.is_meta:  # y has as many rows
        return False
    x_first, x_last = _span(x)
    y_first, y_last = _span(y)
    if x_last <= y_first or y_last <= x_first:
        return False
    pitch = x.stride(0) * x.element_size()
    rows_alike = pitch == y.stride(0) * y.element_size() and x.stride(1) == y.stride(1) == 1
    if x.shape[0] == 1 or not rows_alike:
        return True
    offset = (y_first - x_first) % pitch  # where y's columns begin, counted from x's first column
    return offset < x.shape[1] * x.element_size() or offset + y.shape[1] * y.element_size() > pitch


def _span(matrix: torch.Tensor) -> tuple[int, int]:
    """[first, last) address of the elements of a matrix that has some."""
    rows, columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    start = matrix.data_ptr()
    reach = (rows - 1) * row_stride + (columns - 1) * column_stride + 1
    return start, start + reach * matrix.element_size()


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
