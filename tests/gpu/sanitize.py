# SPDX-License-Identifier: Apache-2.0
"""Runs schedules on small ragged products, for compute-sanitizer:

    compute-sanitizer --tool memcheck --report-api-errors no --kernel-name kns=machete python tests/gpu/sanitize.py

Every schedule of the kernels of one type (``--types``) with each kind of output, and of those of each other type the
narrowest and the widest tile of each family, with other zeros and kinds of output in turn. K is long enough that every
ring stage is used again. And permuted columns, in all ways of gathering and storing them. docs/sanitizer.md has the
commands and what they report.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_layers import Layer

import machete_aot as machete
from machete_aot import placement
from machete_aot.bundle import open_bundle
from machete_aot.config import TileConfig, TypeConfig
from machete_aot.fetch import default_bundle
from machete_aot.manifest import Manifest, ScheduleInfo
from machete_aot.permute_abi import HELPER_ID
from machete_aot.prepack import A_DTYPES
from machete_aot.qualify import Weights, weights_of
from machete_aot.qualify_permute import Case, run_case
from machete_aot.scalar_type import scalar_type

KINDS = 3  # of output: with a bias; with all that a sum can become; silu(gate) * up alone


def product(tile: TileConfig, split: int, kind: int) -> tuple[int, int, int]:
    """(M, N, K): two token tiles, the second with a row, or a part of one; two row tiles, the second with 16 or 80.

    K has a ragged end. In a cluster the second row tile leaves CTAs without any row.
    """
    steps = max(split, 1) * (tile.stages + 1)  # of even shares (split 0), each is a part of a tile
    m, rest = (tile.tokens + 1, 16) if kind < 2 else (tile.tokens - 3, 80)
    return m, tile.rows * tile.cluster + rest, 64 * tile.step_units * steps + 72


def twice_as_many(tile: TileConfig, split: int, row_tiles: int, *_: int) -> int:
    """Padding, which products of this size do not have."""
    return 2 * row_tiles * split


def chosen(manifest: Manifest, whole: str) -> Iterator[tuple[TypeConfig, ScheduleInfo, int]]:
    """What is run: types, schedule, and how many of its types came before it."""
    for types in manifest.types:
        schedules = manifest.schedules_for(types)
        if types.name != whole:
            families: dict[str, list[ScheduleInfo]] = {}
            for schedule in schedules:
                families.setdefault(manifest.kernel_for(types, schedule.name).tile.family, []).append(schedule)
            schedules = tuple(dict.fromkeys(s for found in families.values() for s in (found[0], found[-1])))
        for number, schedule in enumerate(schedules):
            yield types, schedule, number


def run(types: TypeConfig, weights: Weights, schedule: ScheduleInfo, tile: TileConfig, kind: int) -> float:
    """The error of a product, over its tolerance."""
    m, n, k = product(tile, schedule.split, kind)
    b_type, dtype = scalar_type(weights.b), A_DTYPES[types.a]
    layer = Layer(n, k, weights.group, dtype, b_type=b_type, zeros=weights.zeros)
    a, options = layer.acts(m), {"bias": layer.bias()}
    if kind == 1:
        options |= {"channel_scales": layer.channel_scales(), "token_scales": layer.token_scales(m)}
    if kind > 0:
        options |= {"activation": "swiglu"}
    out_dtype = torch.float32 if kind == 1 else dtype
    out = layer.gemm(a, schedule=schedule.name, out_dtype=out_dtype, **options)
    error = layer.error(out, layer.expected(a, **options))
    words = f"{weights.b}, zeros {weights.zeros}, groups of {weights.group}, {', '.join(options)}, {out_dtype}"
    print(f"{types.name} {schedule.name}  M={m} N={n} K={k} {words}: error {error:.2f} of the tolerance", flush=True)
    return error


PERMUTED = (1, 8), (3, 100), (2, 4096), (70, 4096), (300, 1000), (140, 9000)  # M, K: few elements and many


def permuted(m: int, k: int, types: str, aligned: bool) -> bool:
    """Whether permuted columns are right."""
    case = Case(m, k, types, aligned)
    right = all(run_case(case, torch.Generator("cuda").manual_seed(k)))
    print(f"{HELPER_ID} {case}: {'right' if right else 'wrong'}", flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a folder with a bundle and pins.json, else the embedded one")
    parser.add_argument("--only", default="", help="only schedules, and helpers, whose name contains this")
    parser.add_argument("--types", default="bf16_u4b8", help="the types of which every schedule runs: %(default)s")
    options = parser.parse_args()
    if options.bundle:
        (pin,) = json.loads((options.bundle / "pins.json").read_text())["bundles"]
        machete.use_bundle(open_bundle(options.bundle / pin["file"], manifest_sha256=pin["manifest_sha256"]))
    manifest = default_bundle().manifest
    names = [types.name for types in manifest.types]
    if options.types not in names:
        parser.error(f"--types: the bundle has no kernels for {options.types!r}; it has {', '.join(names)}")
    placement.padded = twice_as_many
    failures = 0
    for types, schedule, number in chosen(manifest, options.types):
        if options.only in schedule.name:
            # Neighbours in this list have other zeros and types; half of the group sizes are copied by tensor maps.
            weights = [w for w in weights_of(manifest, types) if w.group in (32, 64, 96, 192)]
            tile = manifest.kernel_for(types, schedule.name).tile
            for kind in range(KINDS) if types.name == options.types else [number % KINDS]:
                failures += not run(types, weights[(number + kind) % len(weights)], schedule, tile, kind) <= 1
    if options.only in HELPER_ID:
        for m, k in PERMUTED:
            failures += sum(not permuted(m, k, types, aligned) for types in A_DTYPES for aligned in (True, False))
    print(f"{failures} failed")
    return failures != 0


if __name__ == "__main__":
    sys.exit(main())
