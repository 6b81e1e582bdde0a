# SPDX-License-Identifier: Apache-2.0
"""What names a kernel: the types it multiplies, its tile, and the schedule that it runs with.

A *tile* and a *type* together make one cubin. A *schedule* is a tile with a division of K; several schedules share a
cubin, because the division is chosen by the launch. The numbers here follow from csrc/kernels; the template renders
them into every kernel as constants, with static assertions on the derived ones, so that both sides agree or the build
fails.
"""

from __future__ import annotations

from dataclasses import dataclass

from .scalar_type import SCALAR_TYPES, scalar_type

UNIT_K = 64  # k of a prepacked unit
UNIT_ROWS = 64  # rows of n of a prepacked unit: the M of a wgmma instruction
WARPGROUP = 128  # threads
BLOCK_K = 32  # k of half a unit: group sizes are multiples of it
SHARED_PER_SM = 228 * 1024  # bytes of shared memory
SHARED_RESERVED = 1024  # of every CTA, by the system


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class TypeConfig:
    """Types of a kernel. ``a``: activations and bias, ``b``: weights, ``scale``: group scales.

    ``zeros``: which zero points it subtracts. "none": those of ``b`` alone; "float": floating ones, or a constant;
    "int": integer ones; "any": all of these. ``fine``: of groups that may begin inside a unit of 64 k, else of others.
    """

    a: str  # "bf16" or "fp16"
    b: str  # name of a ScalarType
    scale: str  # same names as a
    zeros: str = "none"
    fine: bool = False

    @property
    def name(self) -> str:
        zeros = "" if self.zeros == "none" else f"_{self.zeros}"
        return f"{self.a}_{self.b}{zeros}" + ("_fine" if self.fine else "")

    @property
    def weight_bits(self) -> int:
        """Bits of a weight's code."""
        return scalar_type(self.b).bits

    @property
    def general(self) -> bool:
        """Whether a unit has zeros in shared memory beside its scales."""
        return self.zeros != "none"

    @property
    def unit_bytes(self) -> int:
        """Bytes of a prepacked unit."""
        return UNIT_ROWS * UNIT_K * self.weight_bits // 8

    @property
    def aux_rows(self) -> int:
        """Rows of scales, and of zeros, that a unit has in shared memory: of fine groups for each of its halves."""
        return 4 if self.fine else 2 if self.general else 1

    @property
    def zero_bytes(self) -> int:
        """Bytes of a zero point in global memory, for the cost model; the larger kind where there are both."""
        return {"none": 0, "int": 1}.get(self.zeros, 2)


@dataclass(frozen=True)
class ProductTypes:
    """What of a product decides which kernels can compute it.

    ``a``: activations, "bf16" or "fp16"; ``b``: weights, the name of a ScalarType; ``zeros``: of the call, "none",
    "float" or "int"; ``fine``: a group's size is not a multiple of 64, and there is more than one group.
    """

    a: str
    b: str
    zeros: str
    fine: bool

    def kernel_types(self) -> tuple[TypeConfig, ...]:
        """The types of the kernels that compute it, best first; empty where there are none."""
        code = scalar_type(self.b)
        if code.bias and self.zeros != "none":  # its zero point is a constant in the kernels
            return ()
        kind = "any" if self.a == "fp16" else "int" if self.zeros == "int" else "float"
        general = TypeConfig(self.a, f"u{code.bits}", self.a, kind, self.fine)
        if self.b == "u4b8" and not self.fine:
            return TypeConfig(self.a, self.b, self.a), general
        return (general,)

    def __str__(self) -> str:
        zeros = {"none": "", "float": " with floating zeros", "int": " with integer zeros"}[self.zeros]
        groups = ", groups of a size that is no multiple of 64" if self.fine else ""
        return f"{self.a} x {self.b}{zeros}{groups}"


PRODUCTS = tuple(
    ProductTypes(a, b, zeros, fine)
    for a in ("bf16", "fp16")
    for b in SCALAR_TYPES
    for zeros in ("none", "float", "int")
    for fine in (False, True)
)


@dataclass(frozen=True)
class TileConfig:
    """One CTA's share of the work and how its warps divide it.

    ``row_warpgroups`` x ``blocks`` x 64 rows of N; ``tokens`` rows of the activations; ``k_warpgroups`` x ``units`` x
    64 of K in each of ``stages`` ring stages. ``ctas_per_sm`` bounds the registers (``__launch_bounds__``).
    ``cluster`` CTAs, of different rows and the same tokens, copy the activations for each other.
    """

    family: str  # "stream": one tile a CTA, K split over a cluster; "flat": persistent, whole tiles or even shares
    row_warpgroups: int
    k_warpgroups: int
    blocks: int
    units: int
    tokens: int
    stages: int
    ctas_per_sm: int
    cluster: int = 1  # in family "flat"; a divisor of units

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
        return consumers + (96 if self.family == "stream" else WARPGROUP)

    @property
    def name(self) -> str:
        return (
            f"{self.family}_{self.rows}x{self.tokens}x{self.step_units * UNIT_K}"
            f"_r{self.row_warpgroups}k{self.k_warpgroups}_s{self.stages}c{self.ctas_per_sm}"
        ) + (f"m{self.cluster}" if self.cluster > 1 else "")

    def row_tiles(self, n: int) -> int:
        """Tiles along ``n`` rows of the weights; a tile is what the CTAs of ``cluster`` take together."""
        return ceil_div(n, self.rows * self.cluster)

    def tiles(self, m: int, n: int) -> int:
        """Tiles of a product of ``m`` tokens and ``n`` rows of the weights."""
        return self.row_tiles(n) * ceil_div(m, self.tokens)

    def clusters(self, ctas: int) -> int:
        """Clusters where there is room for so many CTAs."""
        return max(1, ctas // self.cluster)

    def steps(self, k: int) -> int:
        """Ring stages that a reduction of length ``k`` fills."""
        return ceil_div(ceil_div(k, UNIT_K), self.step_units)

    def stage_groups(self, group: int, k: int) -> int:
        """Groups of ``group`` k that every ring stage holds a whole number of, or one of which holds whole stages.

        0 where neither is so: then the groups of a stage differ from one to the next.
        """
        stage = self.step_units * UNIT_K
        if group >= k or group % stage == 0:
            return 1
        return 0 if stage % group else stage // group

    def effective_split(self, split: int, k: int) -> int:
        """The largest power of two, at most ``split``, that leaves every CTA of a cluster at least one step of K."""
        while split > self.steps(k):
            split //= 2
        return split

    def suits(self, m: int) -> bool:
        """Whether ``m`` tokens are in the tile's range: the one that is measured, and in which the model is trusted."""
        most = (4 if self.tokens >= 32 else 2) * self.tokens
        return self.tokens <= max(16, 4 * m) and (m <= most or (self.tokens >= 128 and self.family == "flat"))

    def barriers_at(self, types: TypeConfig) -> int:
        """Offset of the mbarriers: after activations, weights, and scales and zeros of every stage."""
        acts = self.step_units * self.tokens * 128
        weights = self.step_units * self.rows // UNIT_ROWS * types.unit_bytes
        scales = self.step_units * self.rows * 2 * types.aux_rows
        return self.stages * (acts + weights + scales)

    def shared_memory(self, split: int, types: TypeConfig) -> int:
        """Bytes of dynamic shared memory of a launch of a kernel of these types with this split of K."""
        barriers = (4 if self.tokens < 128 else 2) * self.stages + 1  # full and empty, of both operands or of each
        end = ceil_div(self.barriers_at(types) + barriers * 8, 128) * 128
        if self.family == "flat":
            chunks = 0 if self.tokens < 64 else 1 if types.general else 2  # of output, 16 tokens by 64 rows
            return end + self.row_warpgroups * chunks * 16 * 128
        workers = split * self.k_warpgroups
        slabs = self.rows // 16
        return end + self.k_warpgroups * (workers - 1) * (slabs // workers) * 16 * self.tokens * 4

    def workspace(self, ctas: int) -> int:
        """Bytes of global memory in which ``ctas`` CTAs of even shares hand over partial tiles: flags, then tiles."""
        return ceil_div(ctas * 8, 1024) * 1024 + ctas * self.rows * self.tokens * 4

    def fits(self, split: int, types: TypeConfig) -> bool:
        """Whether ``ctas_per_sm`` CTAs of a launch with this split of K have room on an SM."""
        return self.shared_memory(split, types) <= SHARED_PER_SM // self.ctas_per_sm - SHARED_RESERVED

    def splits(self, types: TypeConfig) -> tuple[int, ...]:
        """The splits of K that this tile can run with and keep ``ctas_per_sm`` CTAs on an SM; 0: even shares."""
        if self.family == "flat":
            return (1, 0) if self.fits(1, types) else ()
        divide = (s for s in (1, 2, 4, 8) if self.rows // 16 % (s * self.k_warpgroups) == 0)
        return tuple(s for s in divide if self.fits(s, types))


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


def schedule_name(tile: str, split: int, even_ctas: int) -> str:
    """The name of a schedule of the tile of this name."""
    return f"{tile}_x{split}" if split else f"{tile}_e{even_ctas}"
