# SPDX-License-Identifier: Apache-2.0
"""What every checkpoint format is turned into: codes in GPTQ order, scales and zero points a group, an order of k.

The parts that formats share are here: what zero points say about the type, and what ``g_idx`` says about the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from ..scalar_type import ScalarType
from .bits import PLAIN, SYMMETRIC, pack_rows, unpack_words


@dataclass
class QuantizedWeights:
    """Weights of a linear layer of N outputs and K = ``k`` inputs, all on one device.

    ``w_q``: int32 [ceil(K / b_type.per_int32), N], the lowest bits first. ``scales``: [groups, N], floating.
    ``zeros``: None; uint8 [groups, N], value = (code - zero) * scale; or floating, value = code * scale - zero.
    ``group_size``: k that share a scale, -1 for one group. ``bias``: [N] or None.
    ``perm``: int32 [K] or None; row i of ``w_q`` multiplies activation ``perm[i]``.
    """

    w_q: torch.Tensor
    b_type: ScalarType
    scales: torch.Tensor
    zeros: torch.Tensor | None
    k: int
    group_size: int
    bias: torch.Tensor | None = None
    perm: torch.Tensor | None = None


def group_of(k: int, group_size: int | None, groups: int) -> int:
    """The group size, -1 for one group. Raises ArgumentError unless K has so many groups of it."""
    size = k if group_size is None or group_size == -1 else group_size
    if size <= 0 or -(-k // size) != groups:
        raise ArgumentError(
            f"K = {k} has {-(-k // max(size, 1))} groups of {group_size}, but there are scales of {groups}"
        )
    return -1 if groups == 1 else size


def type_of(points: torch.Tensor, bits: int) -> tuple[ScalarType, torch.Tensor | None]:
    """The weights' type and uint8 zeros for zero points [groups, N] of any integer dtype.

    Zero points that are all the middle code are the type's own: u4b8 or u8b128 without zeros. Raises ArgumentError for
    points that uint8 does not hold. Reads the points' smallest and largest value back from the device.
    """
    least, most = (int(value) for value in points.aminmax())
    symmetric = SYMMETRIC[bits]
    if least == most == symmetric.bias:
        return symmetric, None
    if least < 0 or most > 255:
        raise ArgumentError(f"zero points are {least} to {most}; only 0 to 255 can be represented")
    return PLAIN[bits], points.to(torch.uint8)


def order_by_group(g_idx: torch.Tensor | None, k: int, group_size: int) -> torch.Tensor | None:
    """The order of k in which groups are contiguous, int32 [K], or None where they are already.

    ``g_idx``: integers [K], the group of each k; None, or negative ones (never written), mean k // group_size.
    ``group_size``: -1 for one group. A group's k keep their order. Raises ArgumentError where the groups are not those
    of an order of k: one has not ``group_size`` members. Reads back from the device.
    """
    if g_idx is None or group_size == -1:
        return None
    if g_idx.shape != (k,):
        raise ArgumentError(f"g_idx must be [{k}], the group of each k, got shape {tuple(g_idx.shape)}")
    natural = torch.arange(k, device=g_idx.device, dtype=torch.int32) // group_size
    groups = g_idx.to(torch.int32)
    if bool((groups == natural).all()) or bool((groups < 0).all()):
        return None
    perm = torch.argsort(groups, stable=True)
    if not bool((groups[perm] == natural).all()):
        raise ArgumentError(f"g_idx must have {group_size} k in each group (the last may have fewer); it has not")
    return perm.to(torch.int32)


def reorder_rows(w_q: torch.Tensor, bits: int, perm: torch.Tensor | None) -> torch.Tensor:
    """GPTQ-packed weights [ceil(K / per), N] with their k in the order of ``perm``, if there is one."""
    if perm is None:
        return w_q
    return pack_rows(unpack_words(w_q, bits, 0).index_select(0, perm), bits)


def check_shape(tensor: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Raises ArgumentError where a checkpoint's tensor has another shape than the others imply."""
    if tuple(tensor.shape) != shape:
        raise ArgumentError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
