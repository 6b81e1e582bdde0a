# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.machete_aot.gemm``: the product as an operator, for torch.compile, torch.export and dispatch modes.

``machete_aot.gemm`` calls it where torch is tracing; called directly it gives the same results, with more overhead.
``gemm_out`` writes into a tensor instead. The type of the weights goes by its name, "u4b8".

Inference only: a backward pass through the operator raises UnsupportedError. Autocast does not touch it: a product is
computed in the dtype of its activations, which must be that of the scales, whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from . import product, reference
from .errors import ArgumentError, UnsupportedError
from .scalar_type import scalar_type
from .validate import check_gemm

_Tensor = torch.Tensor
_Optional = torch.Tensor | None
# No tensor is an argument by keyword alone: register_autograd takes none.
_ARGUMENTS = (
    "Tensor a, Tensor b, str b_type, Tensor b_scales, Tensor? b_zeros=None, int? b_group_size=128, Tensor? bias=None, "
    "Tensor? channel_scales=None, Tensor? token_scales=None, *, str? schedule=None, bool? overlap=None, "
    "bool batch_invariant=False, str? activation=None, ScalarType? out_dtype=None"
)
_library = torch.library.Library("machete_aot", "FRAGMENT")
_tags = tuple(  # a compiler must not restride the weights
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_fixed_stride_order") if hasattr(torch.Tag, name)
)
_library.define(f"gemm({_ARGUMENTS}) -> Tensor", tags=_tags)
_library.define(f"gemm_out(Tensor(a!) out, {_ARGUMENTS}) -> ()", tags=_tags)


def _named(
    a: _Tensor,
    b: _Tensor,
    b_type: str,
    b_scales: _Tensor,
    b_zeros: _Optional = None,
    b_group_size: int | None = 128,
    bias: _Optional = None,
    channel_scales: _Optional = None,
    token_scales: _Optional = None,
) -> dict[str, Any]:
    """The operator's positional arguments by their names in ``gemm``."""
    return {
        "a": a, "b": b, "b_type": scalar_type(b_type), "b_scales": b_scales, "b_zeros": b_zeros,
        "b_group_size": b_group_size, "bias": bias, "channel_scales": channel_scales, "token_scales": token_scales,
    }  # fmt: skip


def _on_cpu(*arguments: Any, out: _Optional = None, **options: Any) -> _Tensor:
    return reference.gemm(**_named(*arguments), out=out, **options)


def _on_cuda(a: _Tensor, *arguments: Any, out: _Optional = None, **options: Any) -> _Tensor:
    index = a.get_device()
    return product.gemm_on(index, product._current_stream(index), **_named(a, *arguments), out=out, **options)


def _fake(
    a: _Tensor, *arguments: Any, activation: str | None = None, out_dtype: torch.dtype | None = None, **_: Any
) -> _Tensor:
    """A tensor like the result, after the checks of a real call."""
    problem = check_gemm(**_named(a, *arguments), out=None, activation=activation, out_dtype=out_dtype)
    return a.new_empty((*problem.batch_shape, problem.out_columns), dtype=problem.out_dtype)


def _into_out(on_device: Callable[..., _Tensor]) -> Callable[..., None]:
    def run(out: _Tensor, *arguments: Any, **options: Any) -> None:
        on_device(*arguments, out=out, **options)

    return run


def _fake_into_out(fake: Callable[..., _Tensor]) -> Callable[..., None]:
    def run(out: _Tensor, *arguments: Any, **options: Any) -> None:
        result = fake(*arguments, **options)
        if out.dtype != result.dtype or out.shape != result.shape:
            raise ArgumentError(
                f"out must be {result.dtype} of shape {tuple(result.shape)}, "
                f"got {out.dtype} of shape {tuple(out.shape)}"
            )

    return run


def _no_gradient(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        raise UnsupportedError(
            f"machete_aot.{name} computes no gradients: it is for inference; call it under torch.no_grad(), or pass "
            "tensors that do not require gradients"
        )

    return refuse


_library.impl("gemm", _on_cpu, "CPU")
_library.impl("gemm", _on_cuda, "CUDA")
_library.impl("gemm_out", _into_out(_on_cpu), "CPU")
_library.impl("gemm_out", _into_out(_on_cuda), "CUDA")
torch.library.register_fake("machete_aot::gemm", _fake, lib=_library)
torch.library.register_fake("machete_aot::gemm_out", _fake_into_out(_fake), lib=_library)
torch.library.register_autograd("machete_aot::gemm", _no_gradient("gemm"), lib=_library)
