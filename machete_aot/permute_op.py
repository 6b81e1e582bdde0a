# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.machete_aot.permute_columns`` and ``permute_columns_out``: what ``torch_op.py`` is for ``gemm``."""

from __future__ import annotations

import torch

from . import permute, product
from .torch_op import _fake_into_out, _into_out, _library, _no_gradient, _tags
from .validate import check_permutation

_Tensor = torch.Tensor
_ARGUMENTS = "Tensor a, Tensor order, *, bool? overlap=None"
_library.define(f"permute_columns({_ARGUMENTS}) -> Tensor", tags=_tags)
_library.define(f"permute_columns_out(Tensor(a!) out, {_ARGUMENTS}) -> ()", tags=_tags)


def _on_cuda(a: _Tensor, order: _Tensor, out: _Tensor | None = None, overlap: bool | None = None) -> _Tensor:
    index = a.get_device()
    return permute.permute_on(index, product._current_stream(index), a, order, out, overlap)


def _on_cpu(a: _Tensor, order: _Tensor, out: _Tensor | None = None, overlap: bool | None = None) -> _Tensor:
    return permute.permute_by_torch(a, order, out)


def _fake(a: _Tensor, order: _Tensor, overlap: bool | None = None) -> _Tensor:
    """A tensor like the result, after the checks of a real call."""
    check_permutation(a, order, None)
    return a.new_empty(a.shape)


_library.impl("permute_columns", _on_cpu, "CPU")
_library.impl("permute_columns", _on_cuda, "CUDA")
_library.impl("permute_columns_out", _into_out(_on_cpu), "CPU")
_library.impl("permute_columns_out", _into_out(_on_cuda), "CUDA")
torch.library.register_fake("machete_aot::permute_columns", _fake, lib=_library)
torch.library.register_fake("machete_aot::permute_columns_out", _fake_into_out(_fake), lib=_library)
torch.library.register_autograd("machete_aot::permute_columns", _no_gradient("permute_columns"), lib=_library)
