# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: ColumnParallel and RowParallel styles for torch's ``parallelize_module``.

Weights are cut where the prepacked layout can be cut: N in rows of units, 64, and K in units of 64 that no group
straddles, multiples of lcm(64, group size). Each rank keeps a copy of its part and lets go of the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from ..config import UNIT_K, UNIT_ROWS
from ..errors import ArgumentError, UnsupportedError
from .fuse import GateUpMLP, MergedPart
from .linear import MacheteLinear


class ColumnParallel(ParallelStyle):
    """Each rank has some outputs of a MacheteLinear: x [..., K], the same on all ranks -> [..., N / ranks].

    ``gather_output``: collect all outputs, [..., N], on every rank. ``uneven``: ranks may have different numbers of
    outputs, where N is not a multiple of 64 * ranks; whole units of 64 either way. ``multiple``: cut in units of so
    many outputs, a multiple of 64; None, of 64 columns. Where a RowParallel layer takes these outputs in its parts,
    both must be cut at the same places, and that one is cut in units of lcm(64, its group size), 128 for groups of 128.
    Of a layer with activation "swiglu" the interleaved columns are cut, 64 of them being 32 outputs.
    """

    def __init__(self, *, gather_output: bool = False, uneven: bool = False, multiple: int | None = None) -> None:
        super().__init__()
        if multiple is not None and (not isinstance(multiple, int) or multiple < UNIT_ROWS or multiple % UNIT_ROWS):
            raise ArgumentError(f"multiple must be a positive multiple of {UNIT_ROWS} outputs, got {multiple!r}")
        self.gather_output, self.uneven, self.multiple = gather_output, uneven, multiple

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        layer, ranks, rank = _checked(module, device_mesh)
        per_output = 1 if layer.activation is None else 2
        unit = UNIT_ROWS if self.multiple is None else per_output * self.multiple
        cuts = cut(layer.columns, unit, ranks, self.uneven, "N")
        shard_columns(layer, cuts[rank], cuts[rank + 1])
        if self.gather_output:
            sizes = [(end - start) // per_output for start, end in pairwise(cuts)]
            layer.sharding = _Gather(device_mesh.get_group(), tuple(sizes), rank)
        return layer


class RowParallel(ParallelStyle):
    """Each rank has some inputs of a MacheteLinear, and the products are summed over the ranks: [..., N] on each.

    ``input_is_parallel``: x is [..., K / ranks] already, as ColumnParallel layers leave it; False: x is [..., K], the
    same on all ranks. ``reduce_dtype``: torch.float32 sums the ranks' fp32 sums and rounds once, at twice the bytes;
    None sums what each has rounded to its dtype. ``uneven``: as in ColumnParallel. The bias is added on rank 0. Raises
    UnsupportedError for a layer with act-order: its k are in another order than the outputs of the layer before. The
    second product of an MLP that ``fuse`` has made one has none.
    """

    def __init__(
        self, *, input_is_parallel: bool = True, reduce_dtype: torch.dtype | None = None, uneven: bool = False
    ) -> None:
        super().__init__()
        if reduce_dtype not in (None, torch.float32):
            raise ArgumentError(f"reduce_dtype must be None or torch.float32, got {reduce_dtype}")
        self.input_is_parallel, self.reduce_dtype, self.uneven = input_is_parallel, reduce_dtype, uneven

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        layer, ranks, rank = _checked(module, device_mesh)
        if layer.perm is not None:
            raise UnsupportedError(
                "a layer with act-order cannot be cut along K: its groups hold k from all over the input, so every "
                "rank would need all activations; cut it along N with ColumnParallel, or use a checkpoint without it "
                "(desc_act=False); the down_proj of a gated MLP has none after fuse"
            )
        if layer.activation is not None:
            raise UnsupportedError("a layer with an activation cannot be cut along K: the sum comes before it")
        unit = UNIT_K if layer.group_size == -1 else math.lcm(UNIT_K, layer.group_size)
        cuts = cut(layer.in_features, unit, ranks, self.uneven, "K")
        dtype = layer.scales.dtype
        shard_rows(layer, cuts[rank], cuts[rank + 1], keep_bias=rank == 0)
        span = None if self.input_is_parallel else (cuts[rank], cuts[rank + 1])
        layer.sharding = _Reduce(device_mesh.get_group(), span, dtype, self.reduce_dtype)
        return layer


def cut(size: int, unit: int, ranks: int, uneven: bool, what: str) -> list[int]:
    """ranks + 1 places at which a size is cut, multiples of ``unit`` but the last. Raises UnsupportedError."""
    units = -(-size // unit)
    if not uneven and size % (unit * ranks):
        raise UnsupportedError(
            f"{what} = {size} cannot be cut evenly for {ranks} ranks in units of {unit}: it is no multiple of "
            f"{unit * ranks}; pass uneven=True for parts of different sizes: to both layers where one takes the "
            "other's outputs, and then also multiple= to ColumnParallel, the other's unit of K"
        )
    if units < ranks:
        raise UnsupportedError(f"{what} = {size} has {units} units of {unit}, fewer than {ranks} ranks")
    return [min(size, unit * (units * rank // ranks)) for rank in range(ranks)] + [size]


@torch.no_grad()
def shard_columns(layer: MacheteLinear, first: int, last: int) -> None:
    """Keeps columns [first, last) of a layer's N; ``first`` is a multiple of 64, and ``last`` too or N."""
    tiles = slice(first // UNIT_ROWS, -(-last // UNIT_ROWS))
    layer.qweight = layer.qweight[tiles].clone()
    layer.scales = layer.scales[:, first:last].clone()
    layer.zeros = None if layer.zeros is None else layer.zeros[:, first:last].clone()
    layer.bias = None if layer.bias is None else layer.bias[first:last].clone()
    layer.out_features = (last - first) // (1 if layer.activation is None else 2)
    layer.is_part = True


@torch.no_grad()
def shard_rows(layer: MacheteLinear, first: int, last: int, keep_bias: bool) -> None:
    """Keeps k [first, last) of a layer without act-order; ``first`` is a multiple of 64 and of the group size."""
    group = layer.group_size
    layer.qweight = layer.qweight[:, first // UNIT_K : -(-last // UNIT_K)].clone()
    if group != -1:
        groups = slice(first // group, -(-last // group))
        layer.scales = layer.scales[groups].clone()
        layer.zeros = None if layer.zeros is None else layer.zeros[groups].clone()
        layer.group_size = -1 if layer.scales.shape[0] == 1 else group
    layer.in_features = last - first
    layer.bias = layer.bias if keep_bias else None
    layer.is_part = True


@dataclass
class _Gather:
    """Collects the outputs of all ranks."""

    group: dist.ProcessGroup
    sizes: tuple[int, ...]
    rank: int
    out_dtype: torch.dtype | None = None

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return _local(x)

    def after(self, y: torch.Tensor) -> torch.Tensor:
        widest = max(self.sizes)  # gloo gathers equal sizes alone
        padded = torch.nn.functional.pad(y, (0, widest - y.shape[-1])) if y.shape[-1] < widest else y.contiguous()
        with torch.inference_mode(False):  # gloo writes in threads of its own, which torch 2.4 keeps off others
            parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., :size] for part, size in zip(parts, self.sizes, strict=True)], dim=-1)


@dataclass
class _Reduce:
    """Sums the products of all ranks."""

    group: dist.ProcessGroup
    span: tuple[int, int] | None
    dtype: torch.dtype
    out_dtype: torch.dtype | None

    def before(self, x: torch.Tensor) -> torch.Tensor:
        x = _local(x)
        return x if self.span is None else x[..., self.span[0] : self.span[1]]

    def after(self, y: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(y, group=self.group)
        return y.to(self.dtype)


def _checked(module: torch.nn.Module, mesh: DeviceMesh) -> tuple[MacheteLinear, int, int]:
    """The layer, and the number of ranks and this one's place among them."""
    if isinstance(module, MergedPart | GateUpMLP):
        raise UnsupportedError("a merged layer cannot be cut: call parallelize_module before fuse")
    if not isinstance(module, MacheteLinear):
        raise ArgumentError(
            f"these styles are for MacheteLinear, got {type(module).__name__}; use torch's ColwiseParallel and "
            "RowwiseParallel for floating layers"
        )
    if module.is_part:
        raise ArgumentError("the layer holds one rank's part already")
    return module, mesh.size(), mesh.get_local_rank()


def _local(x: torch.Tensor) -> torch.Tensor:
    if type(x).__name__ == "DTensor":
        raise ArgumentError("MacheteLinear takes plain tensors; pass x.full_tensor() or x.to_local()")
    return x
