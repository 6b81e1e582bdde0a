# SPDX-License-Identifier: Apache-2.0
"""``permute_columns``: the columns of activations in another order, by one kernel of the bundle."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch

from . import driver, overlap, product
from .fetch import default_bundle
from .kernel import LoadedKernel, load_kernel
from .launch import launch_config
from .permute_abi import HELPER_ID, OFFSETS, PARAMETERS, SIZE, pack_params
from .permute_plan import PermutePlan, make_plan
from .validate import check_permutation, check_plain

_ALONE = (1, 1, 1)  # no cluster


def permute_columns(
    a: torch.Tensor, order: torch.Tensor, out: torch.Tensor | None = None, overlap: bool | None = None
) -> torch.Tensor:
    """``a.index_select(-1, order)``: column j of the result is column ``order[j]`` of a.

    a: [..., K] bfloat16 or float16; order: int32 [K]; out: of the shape and dtype of a, its rows any distance apart.
    Everything is on one device. On a GPU one kernel does it, which reads the order before earlier kernels of the stream
    have ended where that is safe, as ``gemm`` reads weights (see ``set_overlap``), and lets the product behind it
    fetch its weights meanwhile. ``overlap``: False keeps this launch from reading early; None does what
    ``set_overlap`` says.

    What the order holds is not looked at on a GPU: each value must be from 0 to K - 1, or memory of others is read.
    Gradients are neither needed nor computed: ``requires_grad`` is ignored. Raises ArgumentError, DeviceError,
    CaptureError and BundleError; MissingError where the bundle in use does not have the kernel.
    """
    if product.is_traced(a):
        return product.as_operator(
            "permute_columns", out, (a, order), {"overlap": product.traced_overlap(overlap, order)}
        )
    if not (isinstance(a, torch.Tensor) and a.is_cuda):
        return permute_by_torch(a, order, out)
    index = a.get_device()
    return permute_on(index, product._current_stream(index), a, order, out, overlap)


@torch.no_grad()
def permute_by_torch(a: torch.Tensor, order: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, on any device."""
    problem = check_permutation(a, order, out)
    result = a.index_select(-1, problem.order).contiguous()
    return result if out is None else out.copy_(result)


def permute_on(
    index: int,
    stream: int,
    a: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor | None = None,
    overlap_wish: bool | None = None,
) -> torch.Tensor:
    """``permute_columns`` on a stream (a CUstream) of device ``index``, which is where the tensors are."""
    a2d, order, out2d = check_permutation(a, order, out)
    check_plain(a=a, order=order, out=out)
    if out2d is None:
        out2d = torch.empty_like(a2d, memory_format=torch.contiguous_format)
    rows, columns = a2d.shape
    if rows and columns:
        kernel = load_permute(index, stream)
        device = kernel.device
        plan = make_plan(
            rows, columns, device.sms, kernel.info.threads, device.shared_memory - kernel.info.static_shared_memory
        )
        parameters = pack_params(
            a2d.data_ptr(), order.data_ptr(), out2d.data_ptr(), a2d.stride(0), out2d.stride(0), rows, columns,
            plan.pieces, plan.stage_rows,
        )  # fmt: skip

        def launch(early: bool) -> None:
            _launch(kernel, plan, parameters, stream, early)

        if driver.is_current(device):
            overlap.launch_after_writes((order,), overlap_wish, stream, launch)
        else:  # a new thread has no context yet
            with driver.current(device):
                overlap.launch_after_writes((order,), overlap_wish, stream, launch)
    if out is not None:
        overlap.count_write(out)
        return out
    return out2d if a.dim() == 2 else out2d.view(a.shape)


def load_permute(index: int, stream: int) -> LoadedKernel:
    """The kernel on a device, loaded unless it is already. Raises as ``load_kernel`` does."""
    return load_kernel(default_bundle(), HELPER_ID, index, stream, PARAMETERS)


class _Block(threading.local):
    """Where the driver reads the parameters: one in each thread, because making it takes longer than launching."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(SIZE)
        start = ctypes.addressof(self.memory)
        self.pointers = (ctypes.c_void_p * len(OFFSETS))(*(start + offset for offset in OFFSETS))
        self.address = ctypes.addressof(self.pointers)


_block = _Block()


def _launch(kernel: LoadedKernel, plan: PermutePlan, parameters: bytes, stream: int, early: bool) -> None:
    _block.memory.raw = parameters
    driver.call("cuLaunchKernelEx", _config(plan, stream, early), kernel.handle, _block.address, 0)


@functools.lru_cache(maxsize=1024)
def _config(plan: PermutePlan, stream: int, early: bool) -> Any:
    """Making one takes longer than the launch; the driver only reads it."""
    return launch_config(plan.grid, plan.block, _ALONE, plan.shared_memory, stream, early)
