# SPDX-License-Identifier: Apache-2.0
"""The public calls: ``gemm`` checks its arguments and dispatches to the kernels or, on the CPU, to the reference."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from . import driver, invariance, overlap, reference, selection
from .bundle import Bundle
from .config import UNIT_K, TypeConfig
from .errors import ArgumentError, UnsupportedError
from .fetch import default_bundle
from .kernel import load_kernel
from .launch import Operands, Shape, choose, multiply
from .part import H100
from .prepack import A_DTYPES
from .scalar_type import ScalarType, u4b8
from .validate import Problem, check_gemm

ROW_ALIGNMENT = 8  # elements: 16 bytes, what tensor maps and bulk copies need

A_NAMES = {dtype: name for name, dtype in A_DTYPES.items()}


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
    """``a @ (w_q.to(s.dtype) * s - b_zeros) + bias``: fp32 sums, rounded once to a's dtype, bitwise repeatable.

    a: [..., K] bfloat16 or float16; b: what ``prepack_b`` returned; b_scales: [ceil(K / group), N]; bias: [N]; out:
    [..., N], rows any distance apart; all in a's dtype and on a's device. ``b_group_size``: k that share a scale; -1 or
    None: one group. On a GPU it is a multiple of 64, or one group, and b_zeros is None.
    ``schedule``: one of ``supported_schedules``; None chooses. ``overlap``: False keeps this launch from reading
    weights and scales before earlier kernels have ended; None does what ``set_overlap`` says.
    ``batch_invariant``: a row of the result has the same bits whatever M is and wherever the row stands, on GPUs of one
    type (name, SMs and clocks) and with one bundle. It may be slower: see ``explain``. ``schedule`` must then name one
    that adds up K in the layer's order.

    Tensors on the CPU run the reference on the same prepacked bytes. On a GPU the launch is asynchronous, on torch's
    current stream of a's device. Activations or scales whose rows are not 16-byte aligned are copied first.
    Returns out, or a new tensor [..., N]; no gradients. Raises ArgumentError, UnsupportedError, DeviceError,
    CaptureError and BundleError.
    """
    problem = check_gemm(a, b, b_type, b_scales, b_zeros, b_group_size, bias, out)
    if a.device.type != "cuda":
        return reference.gemm(a, b, b_type, b_scales, b_zeros, b_group_size, bias, out, batch_invariant=batch_invariant)
    bundle = default_bundle()
    types = _types(a.dtype, b_type)
    _check_supported(bundle, types, problem.group, problem.groups, b_zeros is not None)
    result = problem.out2d
    if result is None:
        result = torch.empty(problem.m, problem.n, dtype=problem.out_dtype, device=a.device)
    if problem.m:
        index = a.get_device()
        stream = _current_stream(index)
        run_kernel(bundle, types, problem, b, result, schedule, overlap, index, stream, batch_invariant)
    if out is not None:
        return out
    return result if a.dim() == 2 else result.view(*problem.batch_shape, problem.n)


def supported_schedules(
    a_dtype: torch.dtype, b_type: ScalarType, b_group_size: int | None = 128, with_zeros: bool = False
) -> list[str]:
    """Names of the schedules with which the bundle in use multiplies these types on a GPU; empty if it does not."""
    one_group = b_group_size is None or b_group_size == -1
    if with_zeros or not (one_group or (b_group_size is not None and b_group_size > 0 and b_group_size % UNIT_K == 0)):
        return []
    return [s.name for s in default_bundle().manifest.schedules_for(_types(a_dtype, b_type))]


def warmup(
    a_dtype: torch.dtype,
    b_type: ScalarType,
    shapes: Iterable[tuple[int, int, int]] | None = None,
    device: torch.device | str | int | None = None,
    schedules: Iterable[str] | None = None,
    *,
    batch_invariant: bool = False,
) -> list[str]:
    """Loads kernels, so that later calls need not: before a CUDA graph capture, or to keep a first call fast.

    ``shapes``: (M, N, K) of products to come; ``schedules``: names. Loads the kernels that these need, or, without
    either, all of the types. ``device``: None is torch's current one. ``batch_invariant``: the shapes will be
    multiplied with batch_invariant=True. Returns the kernels' ids.
    Raises ArgumentError, UnsupportedError, DeviceError, CaptureError and BundleError.
    """
    bundle, types = default_bundle(), _types(a_dtype, b_type)
    _check_supported(bundle, types, UNIT_K, 1, False)
    index = _device_index(device)
    part = driver.device(index).part
    if shapes is None and schedules is None:
        chosen = list(bundle.manifest.schedules_for(types))
    else:
        chosen = [choose(bundle, types, shape, None, part, batch_invariant) for shape in shapes or ()]
        chosen += [choose(bundle, types, (1, 1, 1), name, part) for name in schedules or ()]
    kernels = list(dict.fromkeys(bundle.manifest.kernel_for(types, s.name).id for s in chosen))
    for kernel_id in kernels:
        load_kernel(bundle, kernel_id, index, _current_stream(index))
    return kernels


def explain(
    m: int,
    n: int,
    k: int,
    a_dtype: torch.dtype = torch.bfloat16,
    b_type: ScalarType = u4b8,
    *,
    sms: int | None = None,
    batch_invariant: bool = False,
) -> selection.Explanation:
    """Which schedule an [M, K] x [K, N] product gets, and why; ``text()`` of the result is a table of all candidates.

    For torch's current device, or an H100 where there is none; ``sms``: for such a part with as many multiprocessors.
    ``batch_invariant``: the schedule with batch_invariant=True, in which order it adds up K, and what that costs
    against the free choice; the result is an ``invariance.InvariantExplanation``.
    Raises ArgumentError, UnsupportedError and BundleError.
    """
    bundle, types = default_bundle(), _types(a_dtype, b_type)
    _check_supported(bundle, types, UNIT_K, 1, False)
    part = driver.device(torch.cuda.current_device()).part if torch.cuda.is_available() else H100
    if sms is not None:
        part = part._replace(sms=sms)
    explain_choice = invariance.explain if batch_invariant else selection.explain
    return explain_choice(bundle.manifest, types.name, m, n, k, part)


@functools.lru_cache(maxsize=64)
def _types(a_dtype: torch.dtype, b_type: ScalarType) -> TypeConfig:
    if a_dtype not in A_NAMES:
        raise ArgumentError(f"activations are torch.bfloat16 or torch.float16, got {a_dtype}")
    if not isinstance(b_type, ScalarType):
        raise ArgumentError(f"b_type must be a ScalarType such as machete_aot.u4b8, got {b_type!r}")
    name = A_NAMES[a_dtype]
    return TypeConfig(name, b_type.name, name)


def _check_supported(bundle: Bundle, types: TypeConfig, group: int, groups: int, with_zeros: bool) -> None:
    if with_zeros:
        raise UnsupportedError(
            f"{bundle!r} has no kernels that take zero points; it has {_held(bundle)}, without b_zeros; requantise to "
            "a symmetric type, or call machete_aot.reference.gemm"
        )
    if groups > 1 and group % UNIT_K:
        raise UnsupportedError(
            f"the kernels of {bundle!r} take group sizes that are multiples of {UNIT_K}, or one group, got {group}; "
            "repeat or merge the scales, or call machete_aot.reference.gemm"
        )
    if types not in bundle.manifest.types:
        raise UnsupportedError(
            f"{bundle!r} has no kernels for {types.name}, it has {_held(bundle)}; use one of these types, or call "
            "machete_aot.reference.gemm"
        )


def _held(bundle: Bundle) -> str:
    return ", ".join(t.name for t in bundle.manifest.types)


def run_kernel(
    bundle: Bundle,
    types: TypeConfig,
    problem: Problem,
    b: torch.Tensor,
    out: torch.Tensor,
    schedule: str | None,
    overlaps: bool | None,
    index: int,
    stream: int,
    batch_invariant: bool = False,
) -> None:
    """Launches a checked product of at least one row into ``out`` [m, n]. ``stream``: a CUstream of device ``index``.

    ``overlaps`` and ``batch_invariant``: what the caller of ``gemm`` wished.
    """
    m, n, k = problem.m, problem.n, problem.k
    if b.data_ptr() % 16:
        raise ArgumentError(f"b must start on a 16-byte boundary, got address {b.data_ptr():#x}; pass b.clone()")
    acts, scales, bias = aligned_rows(problem.a2d), aligned_rows(problem.scales, whole=True), problem.bias
    shape = Shape(m, n, k, problem.group, row_stride(acts), row_stride(scales), out.stride(0) if m > 1 else n)
    operands = Operands(
        acts.data_ptr(), b.data_ptr(), scales.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    )

    held = []  # until the launch: after it the allocator reuses memory in the stream's order only

    def allocate(size: int) -> int:
        held.append(torch.empty(size, dtype=torch.uint8, device=out.device))
        return held[-1].data_ptr()

    def launch(early: bool) -> None:
        multiply(bundle, types, shape, schedule, operands, index, stream, early, allocate, batch_invariant)

    constants = (b, scales) if bias is None else (b, scales, bias)
    with driver.current(driver.device(index)):  # a new thread has no context yet
        overlap.launch_after_writes(constants, overlaps, stream, launch)


def aligned_rows(matrix: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
    """``matrix`` [rows, columns], or a padded copy where the kernels could not read it: each row starts on 16 bytes.

    ``whole``: rows are read in whole pieces of 16 bytes, so the last one must not end where the memory may end.
    """
    rows, columns = matrix.shape
    stride = matrix.stride(0)
    contiguous = columns == 1 or matrix.stride(1) == 1
    apart = rows == 1 or (stride % ROW_ALIGNMENT == 0 and stride >= columns)
    ends = not whole or columns % ROW_ALIGNMENT == 0
    if contiguous and apart and ends and matrix.data_ptr() % 16 == 0:
        return matrix
    padded = torch.empty(rows, _round_up(columns), dtype=matrix.dtype, device=matrix.device)
    return padded[:, :columns].copy_(matrix)


def row_stride(matrix: torch.Tensor) -> int:
    """Elements between rows of an aligned matrix; of a single row, whose stride means nothing, its padded length."""
    return matrix.stride(0) if matrix.shape[0] > 1 else _round_up(matrix.shape[1])


def _round_up(columns: int) -> int:
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _current_stream(index: int) -> int:
    """Address of torch's current stream of a device. torch.cuda.current_stream takes microseconds more; Inductor and
    Triton use this getter too."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def _device_index(device: torch.device | str | int | None) -> int:
    if isinstance(device, int):
        return device
    chosen = torch.device("cuda") if device is None else torch.device(device)
    if chosen.type != "cuda":
        raise ArgumentError(f"kernels are loaded on CUDA devices, got {chosen}")
    return torch.cuda.current_device() if chosen.index is None else chosen.index
