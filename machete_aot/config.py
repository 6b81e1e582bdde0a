# SPDX-License-Identifier: Apache-2.0
"""What names a kernel: the types it multiplies, its tile, and the schedule that it runs with.

A *tile* and a *type* together make one cubin. A *schedule* is a tile with a division of K; several schedules share a
cubin, because the division is chosen by the launch. The numbers here follow from csrc/kernels; the template renders
them into every kernel as constants, with static assertions on the derived ones, so that both sides agree or the build
fails.
"""

from __future__ import annotations

from dataclasses import dataclass

UNIT_K = 64  # k of a prepacked unit
UNIT_ROWS = 64  # rows of n of a prepacked unit: the M of a wgmma instruction
WARPGROUP = 128  # threads


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class TypeConfig:
    """Types of one product. ``a``: activations and output, ``b``: weights, ``scale``: group scales."""

    a: str  # "bf16" or "fp16"
    b: str  # name of a ScalarType
    scale: str  # same names as a
    zeros: str = "none"

    @property
    def name(self) -> str:
        return f"{self.a}_{self.b}" + ("" if self.zeros == "none" else f"_{self.zeros}")


@dataclass(frozen=True)
class TileConfig:
    """One CTA's share of the work and how its warps divide it.

    ``row_warpgroups`` x ``blocks`` x 64 rows of N; ``tokens`` rows of the activations; ``k_warpgroups`` x ``units`` x
    64 of K in each of ``stages`` ring stages. ``ctas_per_sm`` bounds the registers (``__launch_bounds__``).
    """

    family: str  # "stream": one tile a CTA, K split over a cluster; "flat": persistent, whole tiles or even shares
    row_warpgroups: int
    k_warpgroups: int
    blocks: int
    units: int
    tokens: int
    stages: int
    ctas_per_sm: int

    @property
    def rows(self) -> int:
        return UNIT_ROWS * self.row_warpgroups * self.blocks

    @property
    def step_units(self) -> int:
        """64-k units of K that one ring stage holds."""
        return self.k_warpgroups * self.units

    @property
    def threads(self) -> int:
        consumers = WARPGROUP * self.row_warpgroups * self.k_warpgroups
        return consumers + (64 if self.family == "stream" else WARPGROUP)

    @property
    def name(self) -> str:
        return (
            f"{self.family}_{self.rows}x{self.tokens}x{self.step_units * UNIT_K}"
            f"_r{self.row_warpgroups}k{self.k_warpgroups}_s{self.stages}c{self.ctas_per_sm}"
        )

    def steps(self, k: int) -> int:
        """Ring stages that a reduction of length ``k`` fills."""
        return ceil_div(ceil_div(k, UNIT_K), self.step_units)

    def effective_split(self, split: int, k: int) -> int:
        """The largest power of two, at most ``split``, that leaves every CTA of a cluster at least one step of K."""
        while split > self.steps(k):
            split //= 2
        return split

    def suits(self, m: int) -> bool:
        """Whether ``m`` tokens are in the tile's range: the one that is measured, and in which the model is trusted."""
        most = (4 if self.tokens >= 32 else 2) * self.tokens
        return self.tokens <= max(16, 4 * m) and (m <= most or (self.tokens >= 128 and self.family == "flat"))

    def barriers_at(self) -> int:
        """Offset of the mbarriers: after activations, weights and scales of every stage."""
        acts = self.step_units * self.tokens * 128
        weights = self.step_units * self.rows // UNIT_ROWS * 2048
        scales = self.step_units * self.rows * 2
        return self.stages * (acts + weights + scales)

    def shared_memory(self, split: int) -> int:
        """Bytes of dynamic shared memory of a launch with this split of K (16-bit activations, 4-bit weights)."""
        end = ceil_div(self.barriers_at() + (2 * self.stages + 1) * 8, 128) * 128
        if self.family == "flat":
            return end
        workers = split * self.k_warpgroups
        slabs = self.rows // 16
        return end + self.k_warpgroups * (workers - 1) * (slabs // workers) * 16 * self.tokens * 4

    def workspace(self, ctas: int) -> int:
        """Bytes of global memory in which ``ctas`` CTAs of even shares hand over partial tiles: flags, then tiles."""
        return ceil_div(ctas * 8, 1024) * 1024 + ctas * self.rows * self.tokens * 4

    def splits(self) -> tuple[int, ...]:
        """The splits of K that this tile can run with and keep ``ctas_per_sm`` CTAs on an SM; 0: even shares.

        An SM has 228 KiB of shared memory, of which each CTA takes 1 KiB for the system.
        """
        room = 228 * 1024 // self.ctas_per_sm - 1024
        if self.family == "flat":
            return (1, 0) if self.shared_memory(1) <= room else ()
        fits = (s for s in (1, 2, 4, 8) if self.rows // 16 % (s * self.k_warpgroups) == 0)
        return tuple(s for s in fits if self.shared_memory(s) <= room)


@dataclass(frozen=True)
class ScheduleConfig:
    """A tile and how K is divided.

    ``split`` CTAs (one cluster) divide the K of a tile among themselves. 0, in family "flat": ``even_ctas`` CTAs an SM
    divide all of the product evenly, and a tile's K wherever that falls; ``even_ctas`` is 0 otherwise.
    """

    tile: TileConfig
    split: int
    even_ctas: int = 0

    @property
    def name(self) -> str:
        return schedule_name(self.tile.name, self.split, self.even_ctas)

    @property
    def shared_memory(self) -> int:
        return self.tile.shared_memory(self.split)


def schedule_name(tile: str, split: int, even_ctas: int) -> str:
    """The name of a schedule of the tile of this name."""
    return f"{tile}_x{split}" if split else f"{tile}_e{even_ctas}"
