# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision matrix products for Hopper GPUs, compiled ahead of time.

Weights are rearranged once, ``b = machete_aot.prepack_b(w_q, machete_aot.u4b8)``, and then multiplied:
``out = machete_aot.gemm(a, b, machete_aot.u4b8, b_scales)``.
"""

from typing import TYPE_CHECKING

from .bundle import Bundle
from .errors import (
    ArgumentError,
    BundleError,
    CacheError,
    CaptureError,
    CheckpointError,
    CorruptError,
    DeviceError,
    DriverCallError,
    IncompatibleError,
    MacheteError,
    MissingError,
    SchemaTooNewError,
    TruncatedError,
    UnreachableError,
    UnsupportedError,
    UntrustedError,
)
from .fetch import fetch_bundle, use_bundle
from .scalar_type import ScalarType, u4, u4b8, u8, u8b128
from .version import __version__

if TYPE_CHECKING:
    from . import nn as nn

_NEED_TORCH: frozenset[str] = frozenset()
try:
    from . import permute_op as permute_op
    from . import reference
    from . import torch_op as torch_op
    from .gate_up import interleave_gate_up, prepack_gate_up
    from .overlap import set_overlap
    from .permute import permute_columns
    from .preload import warmup
    from .prepack import prepack_b, unpack_b
    from .product import explain, gemm, supported_schedules
except ModuleNotFoundError as error:  # bundles can be built, verified and mirrored without torch
    if error.name != "torch":
        raise
    _NEED_TORCH = frozenset(
        [
            *("explain", "gemm", "interleave_gate_up", "nn", "permute_columns", "prepack_b", "prepack_gate_up"),
            *("reference", "set_overlap", "supported_schedules", "unpack_b", "warmup"),
        ]
    )


def __getattr__(name: str) -> object:
    if name in _NEED_TORCH:
        raise ImportError(f"machete_aot.{name} needs torch, which is not installed; pip install torch")
    if name == "nn":  # a fifth of the package's import, and programs that only multiply do not need it
        import machete_aot.nn

        return machete_aot.nn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ArgumentError",
    "Bundle",
    "BundleError",
    "CacheError",
    "CaptureError",
    "CheckpointError",
    "CorruptError",
    "DeviceError",
    "DriverCallError",
    "IncompatibleError",
    "MacheteError",
    "MissingError",
    "ScalarType",
    "SchemaTooNewError",
    "TruncatedError",
    "UnreachableError",
    "UnsupportedError",
    "UntrustedError",
    "__version__",
    "explain",
    "fetch_bundle",
    "gemm",
    "interleave_gate_up",
    "nn",
    "permute_columns",
    "prepack_b",
    "prepack_gate_up",
    "reference",
    "set_overlap",
    "supported_schedules",
    "u4",
    "u4b8",
    "u8",
    "u8b128",
    "unpack_b",
    "use_bundle",
    "warmup",
]
