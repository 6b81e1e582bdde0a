# SPDX-License-Identifier: Apache-2.0
"""Calls of ``gemm`` that were made before: what their checks and plans came to, by all that these depend on.

A key holds the shapes, strides, types and devices of all tensors and every option: whatever ``check_gemm`` and the plan
look at, but for addresses. An entry is made after a call has been checked, planned and launched in full, so a key that
is found needs none of that again. What depends on addresses is looked at in every call: alignment, whether ``out`` and
the activations overlap, and whether weights and scales may be read early (``overlap.py``). Calls whose operands are
copied first are not kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from typing import TypeAlias

import torch

from . import driver, loader, overlap
from .bundle import Bundle
from .kernel import LoadedKernel
from .launch import LaunchPlan, Operands, launch
from .loader import CALL_BYTES, CALL_MAGIC, pack
from .overlap import version
from .scalar_type import ScalarType

MOST = 4096  # entries; then the oldest go
Key: TypeAlias = tuple[Hashable, ...]
_Optional: TypeAlias = torch.Tensor | None


def key_of(
    a: torch.Tensor,
    b: torch.Tensor,
    b_type: ScalarType,
    b_scales: torch.Tensor,
    b_zeros: _Optional,
    b_group_size: int | None,
    bias: _Optional,
    out: _Optional,
    schedule: str | None,
    batch_invariant: bool,
    channel_scales: _Optional,
    token_scales: _Optional,
    activation: str | None,
    out_dtype: torch.dtype | None,
) -> Key | None:
    """The key of a call, None where it has none: some argument is not even of the right kind.

    The type of the weights goes by its identity: an entry keeps it, so that no other can come to have it.
    """
    if b_group_size.__class__ is not int and b_group_size is not None:  # 128.0 equals 128 and is refused
        return None
    try:
        if b_zeros is None and bias is None and out is None and channel_scales is None and token_scales is None:
            more: Hashable = None
        else:
            more = tuple(
                [
                    None if t is None else (t.shape, t.stride(), t.dtype, t.device)
                    for t in (b_zeros, bias, out, channel_scales, token_scales)
                ]
            )
        return (
            *(a.shape, a.stride(), a.dtype, a.device),
            *(b.shape, b.is_contiguous(), b.dtype, b.device),
            *(b_scales.shape, b_scales.stride(), b_scales.dtype, b_scales.device),
            *(id(b_type), b_group_size, schedule, not batch_invariant, activation, out_dtype, more),
        )
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one without strides
        return None


class Call:
    """What is launched for a key. ``run`` returns the result, or None where this call must be looked at in full."""

    __slots__ = (
        *("_b_type", "_device", "_dtype", "_in_graphs", "_kernel", "_kernel_handle", "_context", "_loader", "_plan"),
        *("_plan_address", "_reach", "_shape", "_workspace", "bundle"),
    )

    def __init__(
        self,
        bundle: Bundle,
        b_type: ScalarType,
        plan: LaunchPlan,
        kernel: LoadedKernel,
        result: tuple[tuple[int, ...], torch.dtype, torch.device],
        reach: tuple[int, int],
    ) -> None:
        """``result``: shape, dtype and device of the output; ``reach``: bytes from the first to the last element of the
        activations and of the output."""
        self.bundle, self._b_type, self._plan, self._kernel, self._reach = bundle, b_type, plan, kernel, reach
        self._shape, self._dtype, self._device = result
        self._workspace = plan.workspace
        self._in_graphs, self._loader = driver.overlap_in_graphs(), loader.active()
        if self._loader is not None:
            self._plan_address = plan.native.address
            self._kernel_handle, self._context = int(kernel.handle), int(kernel.device.context)

    def run(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        b_scales: torch.Tensor,
        b_zeros: _Optional,
        bias: _Optional,
        out: _Optional,
        channel_scales: _Optional,
        token_scales: _Optional,
        override: bool | None,
        stream: int,
    ) -> torch.Tensor | None:
        acts, weights, scales = a.data_ptr(), b.data_ptr(), b_scales.data_ptr()
        zeros = 0 if b_zeros is None else b_zeros.data_ptr()
        if (acts | weights | scales | zeros) & 15 or not (acts and weights and scales):
            return None
        if out is None:
            result = torch.empty(*self._shape, dtype=self._dtype, device=self._device)
            target = result.data_ptr()
        else:
            result, target = out, out.data_ptr()
            if acts < target + self._reach[1] and target < acts + self._reach[0]:
                return None

        held = overlap.constants
        early = held.holds(b, weights) and held.holds(b_scales, scales)
        biases = channels = 0
        if b_zeros is not None:
            if not zeros:
                return None
            early = early and held.holds(b_zeros, zeros)
        if bias is not None:
            biases = bias.data_ptr()
            if not biases:
                return None
            early = early and held.holds(bias, biases)
        if channel_scales is not None:
            channels = channel_scales.data_ptr()
            if not channels:
                return None
            early = early and held.holds(channel_scales, channels)
        if early:
            fresh = None
            early = overlap.enabled(override) and (self._in_graphs or self._can_overlap(stream))
        else:  # as overlap.launch_after_writes does it
            fresh = [(t, version(t)) for t in (b, b_scales, b_zeros, bias, channel_scales) if t is not None]
        tokens = 0
        if token_scales is not None:
            tokens = token_scales.data_ptr()
            if not tokens:
                return None
        workspace = 0
        if self._workspace:
            held_workspace = torch.empty(self._workspace, dtype=torch.uint8, device=self._device)
            workspace = held_workspace.data_ptr()

        native = self._loader
        if native is None:
            operands = Operands(acts, weights, scales, biases, target, zeros, channels, tokens)
            with driver.current(self._kernel.device):
                launch(self._plan, self._kernel, operands, workspace, stream, early)
        else:
            code = native.launch(
                pack(
                    CALL_MAGIC, CALL_BYTES, 1 if early else 0, 0, self._plan_address, self._kernel_handle, stream,
                    self._context, acts, weights, scales, zeros, biases, channels, tokens, target, workspace,
                )
            )  # fmt: skip
            if code:
                native.fail(code, self._plan, (acts, scales, zeros))
        if fresh is not None:
            with driver.current(self._kernel.device):
                if not driver.is_capturing(stream):
                    for tensor, at in fresh:
                        held.add(tensor, at)
        if out is not None:
            overlap.count_write(out)
        return result

    def _can_overlap(self, stream: int) -> bool:
        with driver.current(self._kernel.device):
            return driver.can_overlap(stream)


class Calls:
    """Entries by key, of one bundle at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[Key, Call] = {}
        self.find = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: Key, call: Call) -> None:
        """Adds an entry, or replaces one, and drops the oldest where there are too many."""
        with self._lock:
            self._entries[key] = call
            while len(self._entries) > MOST:
                del self._entries[next(iter(self._entries))]


known = Calls()


def _start_over() -> None:
    global known
    known = Calls()


os.register_at_fork(after_in_child=_start_over)
