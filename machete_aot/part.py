# SPDX-License-Identifier: Apache-2.0
"""What the cost model has to know of a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """A GPU, as its driver describes it. ``peak_bytes_per_us``: of its memory, by clock and width."""

    name: str
    sms: int
    clock_mhz: float
    peak_bytes_per_us: float


H100 = Part("NVIDIA H100 80GB HBM3", 132, 1980, 3.352e6)
