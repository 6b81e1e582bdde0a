# SPDX-License-Identifier: Apache-2.0
"""``warmup``: loads kernels before a product needs them, for products that are named one by one or by a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, overload

import torch

from . import driver, product
from .config import TypeConfig
from .errors import ArgumentError, DeviceError
from .fetch import default_bundle
from .kernel import load_kernel
from .launch import choose
from .permute import load_permute
from .scalar_type import ScalarType


@overload
def warmup(
    a_dtype: torch.dtype,
    b_type: ScalarType,
    shapes: Iterable[tuple[int, int, int]] | None = None,
    device: torch.device | str | int | None = None,
    schedules: Iterable[str] | None = None,
    *,
    batch_invariant: bool = False,
    b_group_size: int | None = 128,
    with_zeros: bool | str = False,
) -> list[str]: ...


@overload
def warmup(
    module: torch.nn.Module,
    /,
    *,
    tokens: Iterable[int] | None = None,
    device: torch.device | str | int | None = None,
) -> list[str]: ...


def warmup(
    a_dtype: torch.dtype | torch.nn.Module,
    b_type: ScalarType | None = None,
    shapes: Iterable[tuple[int, int, int]] | None = None,
    device: torch.device | str | int | None = None,
    schedules: Iterable[str] | None = None,
    *,
    batch_invariant: bool = False,
    b_group_size: int | None = 128,
    with_zeros: bool | str = False,
    tokens: Iterable[int] | None = None,
) -> list[str]:
    """Loads kernels, so that later calls need not: before a CUDA graph capture, or to keep a first call fast.

    ``warmup(a_dtype, b_type, ...)``: for products of these types. ``shapes``: (M, N, K) of products to come;
    ``schedules``: names. Loads the kernels that these need, or, without either, all that multiply these types.
    ``device``: None is torch's current one. ``b_group_size``, ``with_zeros`` and ``batch_invariant`` say how they will
    be multiplied, which decides what kernels these are; of the group size it matters only whether it is a multiple of
    64.

    ``warmup(module, tokens=..., device=...)``: for every ``nn.MacheteLinear`` in a module, as it is now. ``tokens``:
    the numbers of rows M that the layers will multiply. Which kernel is the fastest changes with M at no simple places:
    what is loaded serves these M, and another M between them may need another. None: all kernels of the layers' types,
    so that they need no other for any M. ``device``: None is where each layer is.

    Layers with act-order also need the kernel that gathers their activations.

    Returns the kernels' ids. Raises ArgumentError, UnsupportedError, DeviceError, CaptureError and BundleError.
    """
    if isinstance(a_dtype, torch.nn.Module):
        if b_type is not None or shapes is not None or schedules is not None:
            raise ArgumentError(
                "warmup(module) takes tokens and device alone: the layers say what else there is to say"
            )
        return _warm_layers(a_dtype, tokens, device)
    if b_type is None or tokens is not None:
        raise ArgumentError("call warmup(a_dtype, b_type, shapes), or warmup(module, tokens=...)")
    bundle, zeros = default_bundle(), product._zeros_kind(with_zeros)

    def types_of(k: int | None) -> TypeConfig:
        fine = product._is_fine(b_group_size, k)
        return product.kernel_types(bundle, product._product_types(a_dtype, b_type, zeros, fine))

    types = types_of(None)
    index = _device_index(device)
    part = driver.device(index).part
    if shapes is None and schedules is None:
        chosen = [(types, s) for s in bundle.manifest.schedules_for(types)]
    else:
        found = [(types_of(shape[2]), shape) for shape in shapes or ()]
        chosen = [(t, choose(bundle, t, shape, None, part, batch_invariant)) for t, shape in found]
        chosen += [(types, choose(bundle, types, (1, 1, 1), name, part)) for name in schedules or ()]
    kernels = list(dict.fromkeys(bundle.manifest.kernel_for(t, s.name).id for t, s in chosen))
    for kernel_id in kernels:
        load_kernel(bundle, kernel_id, index, product._current_stream(index))
    return kernels


class _Kind(NamedTuple):
    """What decides which kernels a layer needs."""

    n: int
    k: int
    a_dtype: torch.dtype
    b_type: ScalarType
    group: int
    zeros: str
    batch_invariant: bool
    device: torch.device | str | int


def _warm_layers(
    module: torch.nn.Module, tokens: Iterable[int] | None, device: torch.device | str | int | None
) -> list[str]:
    from .nn.linear import MacheteLinear  # it uses the runtime, which uses it here alone

    rows = None if tokens is None else list(tokens)
    if any(not isinstance(m, int) or m < 1 for m in rows or ()):
        raise ArgumentError(f"tokens are the numbers of rows to come, each at least 1, got {rows}")
    kinds = dict.fromkeys(
        _Kind(
            layer.columns, layer.in_features, layer.scales.dtype, layer.b_type, layer.group_size, layer.zeros_kind,
            layer.batch_invariant, layer.qweight.device if device is None else device,
        )
        for layer in module.modules()
        if isinstance(layer, MacheteLinear)
    )  # fmt: skip
    if not kinds:
        raise ArgumentError(
            f"{type(module).__name__} has no MacheteLinear layers; quantise or load it first (docs/models.md), or call "
            "warmup(a_dtype, b_type, shapes) for products that it computes itself"
        )
    kernels: dict[str, None] = {}
    for kind in kinds:
        shapes = None if rows is None else [(m, kind.n, kind.k) for m in rows]
        loaded = warmup(
            kind.a_dtype, kind.b_type, shapes, kind.device, batch_invariant=kind.batch_invariant,
            b_group_size=kind.group, with_zeros=False if kind.zeros == "none" else kind.zeros,
        )  # fmt: skip
        kernels.update(dict.fromkeys(loaded))
    ordered = [layer for layer in module.modules() if isinstance(layer, MacheteLinear) and layer.perm is not None]
    for place in dict.fromkeys(layer.qweight.device if device is None else device for layer in ordered):
        index = _device_index(place)
        kernels[load_permute(index, product._current_stream(index)).info.id] = None
    return list(kernels)


def _device_index(device: torch.device | str | int | None) -> int:
    if isinstance(device, int):
        return device
    chosen = torch.device("cuda") if device is None else torch.device(device)
    if chosen.type != "cuda":
        raise ArgumentError(f"kernels are loaded on CUDA devices, got {chosen}; name one as device")
    if chosen.index is not None:
        return chosen.index
    if not torch.cuda.is_available():
        raise DeviceError("kernels are loaded on a GPU, and torch sees none; run `machete-aot doctor`")
    return torch.cuda.current_device()
