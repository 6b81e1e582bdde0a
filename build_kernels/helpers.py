# SPDX-License-Identifier: Apache-2.0
"""The kernels of the bundle that compute no product: what they are called and how they are compiled.

A helper is a device function of its own header in csrc/kernels; ``templates/helper.cu.j2`` makes its entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from machete_aot import permute_abi
from machete_aot.abi import Field
from machete_aot.manifest_rules import SYMBOL_PREFIX

from .configs import Specialization


@dataclass(frozen=True)
class Helper:
    """``function``: of namespace machete, in ``<function>.cuh``; it takes ``fields``, in this order.

    ``parameters``: (offset, size) of each as the runtime passes them. ``threads``: the most of a CTA, of which
    ``ctas_per_sm`` are to be resident.
    """

    id: str
    function: str
    fields: tuple[Field, ...]
    parameters: tuple[tuple[int, int], ...]
    threads: int
    ctas_per_sm: int

    @property
    def symbol(self) -> str:
        return SYMBOL_PREFIX + self.id


Target = Specialization | Helper  # whatever is compiled

HELPERS = (
    Helper(
        permute_abi.HELPER_ID,
        "permute_columns",
        permute_abi.FIELDS,
        permute_abi.PARAMETERS,
        threads=1024,
        ctas_per_sm=2,
    ),
)
