# SPDX-License-Identifier: Apache-2.0
"""The public calls: ``gemm`` checks its arguments and dispatches to the kernels or, on the CPU, to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from . import calls, driver, invariance, reference, selection
from .bundle import Bundle
from .config import BLOCK_K, PRODUCTS, UNIT_K, ProductTypes, TypeConfig
from .errors import ArgumentError, UnsupportedError
from .fetch import default_bundle
from .operands import as_given, reach, run_kernel
from .overlap import count_write
from .part import H100
from .prepack import A_NAMES as A_NAMES
from .scalar_type import SCALAR_TYPES, ScalarType, u4b8
from .validate import check_b_type, check_gemm, check_plain, stands_for_others

_is_compiling = torch.compiler.is_compiling
_tracing_state: Callable[[], object] = getattr(torch._C, "_get_tracing_state", lambda: None)  # of torch.jit.trace
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)

_ZEROS = {False: "none", True: "float", "float": "float", "int": "int"}


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
    """``a @ weights * channel_scales * token_scales + bias``: fp32 sums, rounded once, bitwise repeatable.

    a: [..., K] bfloat16 or float16; b: what ``prepack_b`` returned; b_scales: [ceil(K / group), N], bias: [N], both in
    a's dtype. ``b_group_size``: k that share a scale, a multiple of 32; -1 or None: one group. b_zeros, of the shape of
    b_scales: None, weights = code * scale (less the type's zero point); in a's dtype, weights = code * scale - zero;
    uint8 or int32 of 0 to 255, weights = (code - zero) * scale. int32 ones are converted at every call: pass uint8.
    channel_scales: [N], token_scales: [M] or the shape of a without K, fp32.
    ``activation`` "swiglu": the product's columns are gate and up in turn, 8 of each (see ``prepack_gate_up``), and the
    result is silu(gate) * up, [..., N / 2]. ``out_dtype``: float32, float16 or bfloat16; None is a's. out: [..., N] or
    [..., N / 2] of that dtype, rows any distance apart. Everything is on a's device.
    K is read from a: packed weights do not say theirs, and any K that fills as many units of 64 goes through.
    ``schedule``: one of ``supported_schedules``, not looked at on the CPU; None chooses. ``overlap``: False keeps this
    launch from reading weights, scales and zeros before earlier kernels have ended; None does what ``set_overlap``
    says.
    ``batch_invariant``: a row of the result has the same bits whatever M is and wherever the row stands, on GPUs of one
    type (name, SMs and clocks) and with one bundle. It may be slower: see ``explain``. ``schedule`` must then name one
    that adds up K in the layer's order.

    Tensors on the CPU run the reference on the same prepacked bytes. On a GPU the launch is asynchronous, on torch's
    current stream of a's device. Activations, scales or zeros whose rows are not 16-byte aligned are copied first.
    Returns out, or a new tensor; no gradients. Raises ArgumentError, UnsupportedError, DeviceError, CaptureError and
    BundleError.
    """
    if is_traced(a):
        return _traced(
            a, b, b_type, b_scales, b_zeros, b_group_size, bias, out, schedule, overlap, batch_invariant,
            channel_scales, token_scales, activation, out_dtype,
        )  # fmt: skip
    if not (isinstance(a, torch.Tensor) and a.is_cuda):
        return reference.gemm(
            a, b, b_type, b_scales, b_zeros, b_group_size, bias, out, batch_invariant=batch_invariant,
            channel_scales=channel_scales, token_scales=token_scales, activation=activation, out_dtype=out_dtype,
        )  # fmt: skip
    index = a.get_device()
    return gemm_on(
        index, _current_stream(index), a, b, b_type, b_scales, b_zeros, b_group_size, bias, out, schedule, overlap,
        batch_invariant, channel_scales, token_scales, activation, out_dtype,
    )  # fmt: skip


def gemm_on(
    index: int,
    stream: int,
    a: torch.Tensor,
    b: torch.Tensor,
    b_type: ScalarType,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None,
    b_group_size: int | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    schedule: str | None = None,
    overlap: bool | None = None,
    batch_invariant: bool = False,
    channel_scales: torch.Tensor | None = None,
    token_scales: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``gemm`` on a stream (a CUstream) of device ``index``, which is where the tensors are."""
    key = calls.key_of(
        a, b, b_type, b_scales, b_zeros, b_group_size, bias, out, schedule, batch_invariant, channel_scales,
        token_scales, activation, out_dtype,
    )  # fmt: skip
    bundle = default_bundle()
    try:
        known = None if key is None else calls.known.find(key)
    except TypeError:  # an option that has no hash, and is refused below
        key = known = None
    if known is not None and known.bundle is bundle:
        found = known.run(a, b, b_scales, b_zeros, bias, out, channel_scales, token_scales, overlap, stream)
        if found is not None:
            return found
    problem = check_gemm(
        a, b, b_type, b_scales, b_zeros, b_group_size, bias, out, channel_scales=channel_scales,
        token_scales=token_scales, activation=activation, out_dtype=out_dtype,
    )  # fmt: skip
    check_plain(
        a=a, b=b, b_scales=b_scales, b_zeros=b_zeros, bias=bias, out=out, channel_scales=channel_scales,
        token_scales=token_scales,
    )  # fmt: skip
    if schedule is not None and not isinstance(schedule, str):
        raise ArgumentError(f"schedule must be a name, as supported_schedules gives them, or None, got {schedule!r}")
    types = kernel_types(bundle, _product_types(a.dtype, b_type, problem.zeros_kind, problem.fine))
    result = problem.out2d
    if result is None:
        result = torch.empty(problem.m, problem.out_columns, dtype=problem.out_dtype, device=a.device)
    if problem.m:
        launched = run_kernel(
            bundle, types, problem, b, b_type, result, schedule, overlap, index, stream, batch_invariant
        )
        given = as_given(problem, a, b_scales, b_zeros, bias, channel_scales, token_scales)
        if key is not None and launched is not None and given:
            what = (*problem.batch_shape, problem.out_columns), problem.out_dtype, a.device
            calls.known.add(key, calls.Call(bundle, b_type, *launched, what, (reach(problem.a2d), reach(result))))
    if out is not None:
        count_write(out)
        return out
    return result if a.dim() == 2 else result.view(*problem.batch_shape, problem.out_columns)


def supported_schedules(
    a_dtype: torch.dtype, b_type: ScalarType, b_group_size: int | None = 128, with_zeros: bool | str = False
) -> list[str]:
    """Names of the schedules with which the bundle in use multiplies these types on a GPU; empty if it does not.

    ``with_zeros``: "float" (or True) or "int" for zeros of that kind. A ``b_group_size`` counts as less than K.
    """
    zeros = _zeros_kind(with_zeros)
    try:
        product = _product_types(a_dtype, b_type, zeros, _is_fine(b_group_size))
    except _GroupSizeError:
        return []
    manifest = default_bundle().manifest
    types = manifest.types_for(product)
    return [] if types is None else [s.name for s in manifest.schedules_for(types)]


def explain(
    m: int,
    n: int,
    k: int,
    a_dtype: torch.dtype = torch.bfloat16,
    b_type: ScalarType = u4b8,
    *,
    sms: int | None = None,
    batch_invariant: bool = False,
    b_group_size: int | None = 128,
    with_zeros: bool | str = False,
) -> selection.Explanation:
    """Which schedule an [M, K] x [K, N] product gets, and why; ``text()`` of the result is a table of all candidates.

    For torch's current device, or an H100 where there is none; ``sms``: for such a part with as many multiprocessors.
    ``batch_invariant``: the schedule with batch_invariant=True, in which order it adds up K, and what that costs
    against the free choice; the result is an ``invariance.InvariantExplanation``. ``b_group_size`` and ``with_zeros``
    decide which kernels it can have, see ``supported_schedules``.
    Raises ArgumentError, UnsupportedError and BundleError.
    """
    if any(not isinstance(size, int) or size < 1 for size in (m, n, k)):
        raise ArgumentError(f"M, N and K must be positive integers, got {m!r}, {n!r} and {k!r}")
    bundle = default_bundle()
    product = _product_types(a_dtype, b_type, _zeros_kind(with_zeros), _is_fine(b_group_size, k))
    types = kernel_types(bundle, product)
    part = driver.device(torch.cuda.current_device()).part if torch.cuda.is_available() else H100
    if sms is not None:
        part = replace(part, sms=sms)
    explain_choice = invariance.explain if batch_invariant else selection.explain
    return explain_choice(bundle.manifest, types.name, m, n, k, part)


def _traced(
    a: torch.Tensor,
    b: torch.Tensor,
    b_type: ScalarType,
    b_scales: torch.Tensor,
    b_zeros: torch.Tensor | None,
    b_group_size: int | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    schedule: str | None,
    overlap: bool | None,
    batch_invariant: bool,
    channel_scales: torch.Tensor | None,
    token_scales: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """``gemm`` as an operator of torch, which compilers and modes see as one piece (``torch_op.py``)."""
    check_b_type(b_type)
    overlap = traced_overlap(overlap, b, b_scales, b_zeros, bias, channel_scales)
    tensors = (a, b, b_type.name, b_scales, b_zeros, b_group_size, bias, channel_scales, token_scales)
    options = {
        "schedule": schedule, "overlap": overlap, "batch_invariant": batch_invariant, "activation": activation,
        "out_dtype": out_dtype,
    }  # fmt: skip
    return as_operator("gemm", out, tensors, options)


def traced_overlap(overlap: bool | None, *constants: torch.Tensor | None) -> bool | None:
    """A traced call's wish for overlap: without one, none under torch.compile but beside parameters.

    Inductor writes one tensor object several times and counts no write, so that what a graph computes looks constant.
    """
    if overlap is None and _is_compiling():
        return None if all(t is None or isinstance(t, torch.nn.Parameter) for t in constants) else False
    return overlap


def as_operator(
    name: str, out: torch.Tensor | None, arguments: tuple[Any, ...], options: dict[str, Any]
) -> torch.Tensor:
    """Calls the operator of this name, or with an output the one that writes into it. ``requires_grad`` is ignored."""
    differentiable = any(isinstance(t, torch.Tensor) and t.requires_grad for t in arguments)
    if torch.is_grad_enabled() and differentiable:
        with torch.no_grad():
            return as_operator(name, out, arguments, options)
    if out is None:
        result: torch.Tensor = getattr(torch.ops.machete_aot, name)(*arguments, **options)
        return result
    getattr(torch.ops.machete_aot, f"{name}_out")(out, *arguments, **options)
    return out


def is_traced(a: object) -> bool:
    """Whether torch compiles or traces, some mode sees what is done to this tensor, or it stands for others."""
    if _is_compiling() or _tracing_state() is not None:
        return True
    if a.__class__ is torch.Tensor and not _modes():  # as nearly always; the rest takes longer
        return False
    return isinstance(a, torch.Tensor) and (bool(_modes()) or stands_for_others(a))


class _GroupSizeError(ArgumentError):
    """A group size that no product can have."""


def _is_fine(group: int | None, k: int | None = None) -> bool:
    """Whether groups of this size, of a K that has several of them if it is not known, begin within units of 64 k."""
    if group is None or group == -1:
        return False
    if not isinstance(group, int) or group <= 0 or group % BLOCK_K:
        raise _GroupSizeError(f"b_group_size must be a positive multiple of {BLOCK_K}, or -1 or None, got {group!r}")
    return group % UNIT_K != 0 and (k is None or group < k)


def _zeros_kind(with_zeros: bool | str) -> str:
    kind = _ZEROS.get(with_zeros)
    if kind is None:
        raise ArgumentError(f'with_zeros must be False, True, "float" or "int", got {with_zeros!r}')
    return kind


@functools.lru_cache(maxsize=64)
def _product_types(a_dtype: torch.dtype, b_type: ScalarType, zeros: str, fine: bool) -> ProductTypes:
    if a_dtype not in A_NAMES:
        raise ArgumentError(f"activations are torch.bfloat16 or torch.float16, got {a_dtype}")
    check_b_type(b_type)
    if SCALAR_TYPES.get(b_type.name) != b_type:
        raise UnsupportedError(
            f"there are kernels for weights of type {', '.join(SCALAR_TYPES)} alone, got {b_type!r}; call "
            "machete_aot.reference.gemm"
        )
    return ProductTypes(A_NAMES[a_dtype], b_type.name, zeros, fine)


@functools.lru_cache(maxsize=256)
def kernel_types(bundle: Bundle, product: ProductTypes) -> TypeConfig:
    """The types of the bundle's kernels that compute such products. Raises UnsupportedError with what it has."""
    types = bundle.manifest.types_for(product)
    if types is None:
        raise UnsupportedError(
            f"{bundle!r} has no kernels for {product}; it has {_held(bundle)}; use one of these, or call "
            "machete_aot.reference.gemm"
        )
    return types


def _held(bundle: Bundle) -> str:
    """What products the bundle's kernels compute, by the kernels' types."""
    found = []
    for types in bundle.manifest.types:
        served = [replace(p, fine=False) for p in PRODUCTS if bundle.manifest.types_for(p) == types]
        groups = f"other multiples of {BLOCK_K}" if types.fine else f"multiples of {UNIT_K}, or one"
        found.append(f"{types.name} for {', '.join(map(str, served))} (groups: {groups})")
    return "; ".join(found)


def _current_stream(index: int) -> int:
    """Address of torch's current stream of a device. torch.cuda.current_stream takes microseconds more; Inductor and
    Triton use this getter too."""
    return int(torch._C._cuda_getCurrentRawStream(index))
