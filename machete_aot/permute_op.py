# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.machete_aot.permute_columns`` and ``permute_columns_out``: what ``torch_op.py`` is for ``gemm``."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from . import permute, product
from .errors import ArgumentError, UnsupportedError
from .torch_op import _library, _tags
from .validate import check_permutation

_Tensor = torch.Tensor
_library.define("permute_columns(Tensor a, Tensor order) -> Tensor", tags=_tags)
_library.define("permute_columns_out(Tensor(a!) out, Tensor a, Tensor order) -> ()", tags=_tags)


def _on_cuda(a: _Tensor, order: _Tensor, out: _Tensor | None = None) -> _Tensor:
    index = a.get_device()
    return permute.permute_on(index, product._current_stream(index), a, order, out)


def _on_cuda_out(out: _Tensor, a: _Tensor, order: _Tensor) -> None:
    _on_cuda(a, order, out)


def _on_cpu(a: _Tensor, order: _Tensor) -> _Tensor:
    return permute.permute_by_torch(a, order)


def _on_cpu_out(out: _Tensor, a: _Tensor, order: _Tensor) -> None:
    permute.permute_by_torch(a, order, out)


def _fake(a: _Tensor, order: _Tensor) -> _Tensor:
    """A tensor like the result, after the checks of a real call."""
    check_permutation(a, order, None)
    return a.new_empty(a.shape)


def _fake_out(out: _Tensor, a: _Tensor, order: _Tensor) -> None:
    check_permutation(a, order, None)
    if out.dtype != a.dtype or out.shape != a.shape:
        raise ArgumentError(
            f"out must be {a.dtype} of shape {tuple(a.shape)}, got {out.dtype} of shape {tuple(out.shape)}"
        )


def _no_gradient(*_: Any) -> NoReturn:
    raise UnsupportedError(
        "machete_aot.permute_columns computes no gradients: it is for inference; call it under torch.no_grad(), or "
        "pass tensors that do not require gradients"
    )


_library.impl("permute_columns", _on_cpu, "CPU")
_library.impl("permute_columns", _on_cuda, "CUDA")
_library.impl("permute_columns_out", _on_cpu_out, "CPU")
_library.impl("permute_columns_out", _on_cuda_out, "CUDA")
torch.library.register_fake("machete_aot::permute_columns", _fake, lib=_library)
torch.library.register_fake("machete_aot::permute_columns_out", _fake_out, lib=_library)
torch.library.register_autograd("machete_aot::permute_columns", _no_gradient, lib=_library)
