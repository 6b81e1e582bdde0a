# SPDX-License-Identifier: Apache-2.0
"""What the cost model has to know of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Clocks(NamedTuple):
    """How fast a GPU is: MHz of its multiprocessors, bytes per microsecond of its memory, by clock and width."""

    sm_mhz: float
    peak_bytes_per_us: float


@dataclass(frozen=True)
class Part:
    """A GPU, as its driver describes it.

    ``clocks`` is asked where they are needed: a driver takes half a millisecond for each of the two, and the choice of
    a schedule on a GPU that was measured needs neither. GPUs of one name have the same ones, so they are not compared.
    """

    name: str
    sms: int
    clocks: Callable[[], Clocks] = field(compare=False)

    @staticmethod
    def known(name: str, sms: int, clock_mhz: float, peak_bytes_per_us: float) -> Part:
        clocks = Clocks(clock_mhz, peak_bytes_per_us)
        return Part(name, sms, lambda: clocks)

    @property
    def clock_mhz(self) -> float:
        return self.clocks().sm_mhz

    @property
    def peak_bytes_per_us(self) -> float:
        return self.clocks().peak_bytes_per_us

    def facts(self) -> dict[str, str | float]:
        """Plain data for JSON."""
        clock_mhz, peak_bytes_per_us = self.clocks()
        return {"name": self.name, "sms": self.sms, "clock_mhz": clock_mhz, "peak_bytes_per_us": peak_bytes_per_us}


H100 = Part.known("NVIDIA H100 80GB HBM3", 132, 1980, 3.352e6)
