# SPDX-License-Identifier: Apache-2.0
"""The one check of a product's arguments, shared by the kernels' gemm and the reference.

It looks at attributes only: no device work, no synchronisation, so that it can run on every call. It does not ask
whether a kernel exists for the product (that is ``selection.py``), nor for a particular device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import ArgumentError
from .layout import packed_shape
from .prepack import A_DTYPES
from .scalar_type import ScalarType

GROUP_MULTIPLE = 32  # every group size is a multiple of this many k


@dataclass(frozen=True)
class Problem:
    """A product whose arguments fit together: out2d[m, n] = a2d[m, k] @ dequantised[k, n] (+ bias).

    ``group``: the number of k that share a scale, ``k`` where there is one group; ``groups`` = ceil(k / group).
    ``batch_shape``: the shape of a without its last dimension; the output's shape is ``(*batch_shape, n)``.
    ``a2d``: the activations as [m, k], a view where the strides allow one, row stride and alignment as they come.
    ``scales``, ``zeros`` [groups, n] and ``bias`` [n]: last dimension contiguous, copied only where it was not.
    ``out2d``: the caller's output as a view [m, n] with a contiguous last dimension, None where none was given.
    """

    m: int
    n: int
    k: int
    group: int
    groups: int
    batch_shape: tuple[int, ...]
    out_dtype: torch.dtype
    a2d: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
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
) -> Problem:
    """Checks the arguments of ``gemm`` against each other and returns what they mean.

    Shapes: a [..., K] bf16 or fp16; b as ``prepack_b`` returned it; b_scales and b_zeros [ceil(K / group), N], bias [N]
    and out [..., N] in a's dtype; everything on one device. N is read from the scales, K from the activations.
    Gradients are neither needed nor computed: ``requires_grad`` is ignored. Raises ArgumentError.
    """
    _check_tensors(a, b, b_scales, b_zeros, bias, out)
    if not isinstance(b_type, ScalarType):
        raise ArgumentError(f"b_type must be a ScalarType such as machete_aot.u4b8, got {b_type!r}")
    dtype = a.dtype
    if dtype not in A_DTYPES.values():
        raise ArgumentError(f"a must be bfloat16 or float16, got {dtype}; convert it with a.to(torch.bfloat16)")
    if a.dim() == 0 or a.shape[-1] == 0:
        raise ArgumentError(f"a must be [..., K] with K > 0, got shape {tuple(a.shape)}")
    *batch, k = a.shape
    group, groups = _groups(k, b_group_size)
    n = _check_scales(b_scales, dtype, groups, k, group)
    if b_zeros is not None:
        _check_like(b_zeros, "b_zeros", (groups, n), dtype, "the shape of b_scales")
    if bias is not None:
        _check_like(bias, "bias", (n,), dtype, "[N]")
    _check_weights(b, b_type, n, k)
    a2d = a if len(batch) == 1 else a.reshape(-1, k)
    m = a2d.shape[0]
    out2d = None
    if out is not None:
        _check_like(out, "out", (*batch, n), dtype, "the shape of a with N for K")
        out2d = _rows_of(out, m, n)
        if _share_memory(out2d, a2d):
            raise ArgumentError("out shares memory with a, which is still read while out is written; pass another out")
    return Problem(
        m, n, k, group, groups, tuple(batch), dtype, a2d,
        _last_contiguous(b_scales),
        None if b_zeros is None else _last_contiguous(b_zeros),
        None if bias is None else _last_contiguous(bias),
        out2d,
    )  # fmt: skip


def _check_tensors(
    a: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
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
    if size % GROUP_MULTIPLE:
        raise ArgumentError(f"b_group_size must be a multiple of {GROUP_MULTIPLE}, got {size}")
    return (k, 1) if size >= k else (size, -(-k // size))


def _check_scales(scales: torch.Tensor, dtype: torch.dtype, groups: int, k: int, group: int) -> int:
    """Returns N."""
    if scales.dtype != dtype:
        raise ArgumentError(f"b_scales must have the dtype of a, {dtype}, got {scales.dtype}; convert it once")
    if scales.dim() != 2 or scales.shape[0] != groups or scales.shape[1] == 0:
        raise ArgumentError(
            f"b_scales must be [{groups}, N]: K = {k} has {groups} groups of {group}; got shape {tuple(scales.shape)}"
        )
    return scales.shape[1]


def _check_like(tensor: torch.Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, meaning: str) -> None:
    if tensor.dtype != dtype:
        raise ArgumentError(f"{name} must have the dtype of a, {dtype}, got {tensor.dtype}")
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


def _rows_of(out: torch.Tensor, m: int, n: int) -> torch.Tensor:
    """``out`` as [m, n] without a copy, rows apart."""
    wanted = "out must be viewable as [M, N] with a contiguous last dimension and rows that do not overlap"
    try:
        rows = out if out.dim() == 2 else out.view(m, n)
    except RuntimeError:
        raise ArgumentError(f"{wanted}, got shape {tuple(out.shape)} with strides {out.stride()}") from None
    if (n > 1 and rows.stride(1) != 1) or (m > 1 and rows.stride(0) < n):
        raise ArgumentError(f"{wanted}, got shape {tuple(out.shape)} with strides {out.stride()}")
    return rows


def _share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two matrices of one dtype may have an element in common. Exact for columns of one row-major buffer."""
    if x.shape[0] == 0:  # y has as many rows
        return False
    x_first, x_last = _span(x)
    y_first, y_last = _span(y)
    if x_last <= y_first or y_last <= x_first:
        return False
    if x.shape[0] == 1 or x.stride() != y.stride() or x.stride(1) != 1:
        return True
    pitch = x.stride(0)
    offset = (y_first - x_first) // x.element_size() % pitch  # where y's columns begin, counted from x's first column
    return offset < x.shape[1] or offset + y.shape[1] > pitch


def _span(matrix: torch.Tensor) -> tuple[int, int]:
    """[first, last) address of the elements of a matrix that has some."""
    rows, columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    start = matrix.data_ptr()
    reach = (rows - 1) * row_stride + (columns - 1) * column_stride + 1
    return start, start + reach * matrix.element_size()


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
