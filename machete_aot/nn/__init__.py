# SPDX-License-Identifier: Apache-2.0
"""From quantised checkpoints to running models: GPTQ, AWQ, compressed-tensors and HQQ.

``model = machete_aot.nn.load_quantized(model, folder)`` fills a Hugging Face model; see docs/models.md. Reading and
writing files needs the extra "models" (safetensors).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .awq import from_awq
from .compressed_tensors import from_compressed_tensors
from .fuse import FuseReport, fuse
from .gptq import from_gptq
from .hqq import from_hqq
from .linear import MacheteLinear
from .loading import load_quantized, replace_hqq
from .nearest import round_to_nearest
from .prepacked import load_prepacked, save_prepacked
from .tree import parameters_on_meta
from .weights import QuantizedWeights

if TYPE_CHECKING:
    from .parallel import ColumnParallel, RowParallel


def __getattr__(name: str) -> object:
    if name in ("ColumnParallel", "RowParallel"):  # torch.distributed.tensor takes a second to import
        from . import parallel

        return getattr(parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ColumnParallel",
    "FuseReport",
    "MacheteLinear",
    "QuantizedWeights",
    "RowParallel",
    "from_awq",
    "from_compressed_tensors",
    "from_gptq",
    "from_hqq",
    "fuse",
    "load_prepacked",
    "load_quantized",
    "parameters_on_meta",
    "replace_hqq",
    "round_to_nearest",
    "save_prepacked",
]
