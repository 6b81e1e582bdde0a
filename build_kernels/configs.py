# SPDX-License-Identifier: Apache-2.0
"""What the pipeline compiles: specializations (one kernel each), and the implementations that list them.

TypeConfig, TileConfig and ScheduleConfig are the runtime's, from machete_aot/config.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig
from machete_aot.layout import Layout, layout_for
from machete_aot.manifest import kernel_id
from machete_aot.manifest_rules import SYMBOL_PREFIX
from machete_aot.scalar_type import scalar_type


@dataclass(frozen=True)
class Specialization:
    """One kernel: types and a tile. ``splits`` are those that it is launched with."""

    types: TypeConfig
    tile: TileConfig
    splits: tuple[int, ...]

    @property
    def id(self) -> str:
        return kernel_id(self.types, self.tile.name)

    @property
    def symbol(self) -> str:
        return SYMBOL_PREFIX + self.id

    @property
    def layout(self) -> Layout:
        """The layout that its weights are prepacked in."""
        return layout_for(scalar_type(self.types.b))

    @property
    def cpp_types(self) -> str:
        """Name of its traits struct in csrc/kernels/types.cuh."""
        zeros = "" if self.types.zeros == "none" else self.types.zeros.capitalize()
        return f"machete::{self.types.a.capitalize()}{self.types.b.capitalize()}{zeros}"

    @property
    def cpp_tile(self) -> str:
        """Name of its tile template in csrc/kernels/<family>_gemm.cuh."""
        return f"machete::{self.tile.family.capitalize()}Tile"


@dataclass(frozen=True)
class ImplConfig:
    """One family's implementation: every type is compiled with the tile of every schedule."""

    types: tuple[TypeConfig, ...]
    schedules: tuple[ScheduleConfig, ...]

    @property
    def typed_schedules(self) -> tuple[tuple[TypeConfig, ScheduleConfig], ...]:
        """Every schedule with each of the types, in the order of the schedules."""
        return tuple((types, schedule) for schedule in self.schedules for types in self.types)

    @property
    def tiles(self) -> tuple[TileConfig, ...]:
        return tuple(dict.fromkeys(s.tile for s in self.schedules))

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        splits = {t: tuple(dict.fromkeys(s.split for s in self.schedules if s.tile == t)) for t in self.tiles}
        return tuple(Specialization(types, tile, splits[tile]) for types in self.types for tile in self.tiles)
