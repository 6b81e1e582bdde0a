# SPDX-License-Identifier: Apache-2.0
"""Times every schedule over a grid of products and writes the evidence that ``benchmarks.fit`` fits the heuristic to.

python -m benchmarks.sweep --out sweep.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import machete_aot as machete
from build_kernels.catalogue import SYMMETRIC, TYPES
from machete_aot import driver
from machete_aot.bench_report import as_lines
from machete_aot.cli_bench import add_heat_options
from machete_aot.config import TypeConfig
from machete_aot.prepack import A_DTYPES
from machete_aot.timing import KINDS, Layer, WeightKind, compare_us

from .run_record import run_record

SHAPES = (
    (4096, 4096),
    (6144, 4096),
    (8192, 8192),
    (28672, 4096),
    (8192, 28672),
    (57344, 8192),
    (1024, 4096),
    (2560, 2560),
    (4096, 14336),
    (12288, 4096),
    (14336, 5120),
    (3584, 18944),
    (2048, 8192),
    (5120, 13824),
    (7168, 2048),
    (11008, 4096),
    (22016, 4096),
    (17408, 5120),
    (10240, 8192),
    (37888, 3584),
    (18432, 7168),
    (9216, 3584),
    (4608, 3584),
)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
HELD_OUT_SHAPES = ((5120, 5120), (3072, 8192), (18944, 3584))
HELD_OUT_TOKENS = (4, 24, 48, 96, 192, 384, 2048)
ROUNDS = 7  # with 3, what is limited by power scatters by 3%, more than the schedules differ


def kind_of(types: TypeConfig) -> WeightKind:
    """Weights that kernels of these types multiply, and no better ones; floating zeros where they take any."""
    zeros = {"none": "none", "int": "int"}.get(types.zeros, "float")
    return next(kind for kind in KINDS.values() if (kind.b_type.name, kind.zeros) == (types.b, zeros))


def group_of(types: TypeConfig) -> int:
    """The size of the groups that kernels of these types are swept with."""
    return 32 if types.fine else 128


def sweep(
    types: TypeConfig,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    group: int,
    rest: float,
    alone: float = 0.0,
) -> Iterator[list[dict[str, Any]]]:
    """For each shape, one row a product: {"types", "m", "n", "k", "group", "cublas_us", "us": {schedule: us}}.

    ``rest`` and ``alone`` are what ``timing.compare_us`` takes.
    """
    manifest, kind = machete.fetch_bundle().manifest, kind_of(types)
    tiles = {kernel.tile.name: kernel.tile for kernel in manifest.kernels_for(types)}
    for n, k in shapes:
        rows = []
        layer = Layer.make(n, k, group, A_DTYPES[types.a], kind)
        for m in tokens:
            names = [s.name for s in manifest.schedules_for(types) if tiles[s.tile].suits(m)]
            graphs = [layer.cublas_graph(m), *(layer.gemm_graph(m, name) for name in names)]
            cublas, *ours = (round(us, 3) for us in compare_us(graphs, ROUNDS, rest, alone))
            times = dict(zip(names, ours, strict=True))
            best = min(times, key=lambda name: times[name])
            rows.append({"types": types.name, "m": m, "n": n, "k": k, "group": group, "cublas_us": cublas, "us": times})
            print(f"{types.name} {n} x {k}  M={m}: {times[best]:.2f} us {best}, cuBLAS {cublas:.2f}", flush=True)
        del layer
        torch.cuda.empty_cache()
        yield rows


def _span(text: str) -> slice:
    first, _, last = text.rpartition(":")
    return slice(int(first or 0), int(last) if last else None)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    known = {types.name: types for types in TYPES}
    default = [types.name for types in SYMMETRIC]
    parser.add_argument("--types", nargs="+", default=default, choices=list(known), help="of kernels")
    parser.add_argument("--held-out", action="store_true", help="the products that the fit never sees")
    parser.add_argument(
        "--shapes", type=_span, default=slice(None), help="only the first N shapes, or those from A to B: A:B"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="only these of the grid's M")
    add_heat_options(parser)
    options = parser.parse_args()
    shapes = (HELD_OUT_SHAPES if options.held_out else SHAPES)[options.shapes]
    tokens = [m for m in (HELD_OUT_TOKENS if options.held_out else TOKENS) if m in (options.tokens or [m])]
    record: dict[str, Any] = {
        **run_record("sweep"),
        "device": driver.device(0).part.facts(),
        "rest": options.rest,
        "alone": options.alone,
        "rows": [],
    }
    for types in options.types:
        for rows in sweep(known[types], shapes, tokens, group_of(known[types]), options.rest, options.alone):
            record["rows"] += rows
            options.out.write_text(as_lines(record))  # after every shape, so that an interrupted run is not lost


if __name__ == "__main__":
    main()
