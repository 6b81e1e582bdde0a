# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision matrix products for Hopper GPUs, compiled ahead of time.

Weights are rearranged once, ``b = machete_aot.prepack_b(w_q, machete_aot.u4b8)``, and then multiplied:
``out = machete_aot.gemm(a, b, machete_aot.u4b8, b_scales)``.
"""

from . import reference
from .bundle import Bundle
from .errors import (
    ArgumentError,
    BundleError,
    CacheError,
    CaptureError,
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
from .overlap import set_overlap
from .prepack import prepack_b, unpack_b
from .product import explain, gemm, supported_schedules, warmup
from .scalar_type import ScalarType, u4, u4b8, u8, u8b128
from .version import __version__

__all__ = [
    "ArgumentError",
    "Bundle",
    "BundleError",
    "CacheError",
    "CaptureError",
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
    "prepack_b",
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
