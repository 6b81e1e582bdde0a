# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of README.md and docs/performance.md from the files in benchmarks/results.

python -m benchmarks.tables [--plot docs/performance-h100.svg]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from build_kernels.catalogue import TYPES, typed_schedules
from machete_aot.bench import Row, Timing
from machete_aot.config import TypeConfig
from machete_aot.plot import write_plot
from machete_aot.timing import H100, floor_us

from .sweep import group_of, kind_of

RESULTS = Path(__file__).parent / "results"
SHAPE = 8192, 8192  # N, K of the tables of one shape
PLOTTED = (4096, 4096), SHAPE, (28672, 4096)
H200_SHAPES = (4096, 4096), (6144, 4096), SHAPE, (28672, 4096), (8192, 28672), (57344, 8192)
AIMS = {1: 1.50, 8: 1.55, 16: 1.50, 32: 1.65, 64: 1.75, 128: 1.35, 256: 1.12, 512: 1.04, 1024: 1.01, 4096: 1.03}
LEAST = 0.97  # of the best peer: what is slower is listed
SWEPT = (
    *("bf16-to-64", "bf16-from-128", "fp16-to-64", "fp16-from-128", "general-to-64", "general-uneven"),
    *("general-from-128", "fine-to-64", "fine-from-128"),
)
FEW = 64  # tokens up to which other weights are compared at equal bytes
OTHER_TYPES = {  # label in the table, and whether it shows u4b8's fraction too
    "bf16_u4_float": "bf16_u4_float",
    "bf16_u4_int": "bf16_u4_int",
    "fp16_u4_any": "fp16_u4_any, floating zeros",
    "bf16_u8_float": "bf16_u8_float, over floor (u4b8)",
    "bf16_u8_int": "bf16_u8_int, over floor",
    "fp16_u8_any": "fp16_u8_any, over floor (u4b8)",
    "bf16_u4_float_fine": "bf16_u4_float_fine, groups of 32",
    "bf16_u4_int_fine": "bf16_u4_int_fine, groups of 32",
    "fp16_u4_any_fine": "fp16_u4_any_fine, groups of 32",
}
Run = dict[str, Any]
Product = tuple[int, int, int]  # M, N, K
Times = Mapping[Product, float]


def load(name: str, folder: Path = RESULTS) -> Run:
    run: Run = json.loads((folder / f"{name}.json").read_text())
    return run


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def times_of(run: Run) -> dict[Product, float]:
    """Our microseconds by product."""
    return {(row["m"], row["n"], row["k"]): row["us"] for row in run["rows"]}


def over_cublas(run: Run) -> dict[Product, float]:
    """Our time over cuBLAS's by product."""
    return {(row["m"], row["n"], row["k"]): row["us"] / row["cublas_us"] for row in run["rows"]}


def one_shape(run: Run) -> list[str]:
    """Of each M at SHAPE: our time, the schedule, the floor, cuBLAS, the best peer, and its time over ours."""
    return [
        line(
            *(row["m"], f"{row['us']:.1f}", row["schedule"], f"{row['floor_us']:.1f}"),
            f"{row['peers']['cublas']['us']:.1f}",
            f"{row['best_peer_us']:.1f} {row['best_peer']}",
            f"{row['best_peer_us'] / row['us']:.2f}",
        )
        for row in run["rows"]
        if (row["n"], row["k"]) == SHAPE
    ]


def readme(run: Run, alone: Run) -> list[str]:
    """The table of README.md: our time and cuBLAS's at SHAPE, and the mean speed-up, in turns and each on its own."""

    def short(us: float) -> str:
        return f"{us:.1f}" if us < 100 else f"{us:.0f}"

    rows = [row for row in run["rows"] if (row["n"], row["k"]) == SHAPE]
    own = {mean["m"]: f"{mean['speedup']:.2f}" for mean in alone["means"]}
    return [
        line("machete-aot, us", *(short(row["us"]) for row in rows)),
        line("cuBLAS, bf16 weights, us", *(short(row["peers"]["cublas"]["us"]) for row in rows)),
        line("speed-up over the fastest, six shapes", *(f"{mean['speedup']:.2f}" for mean in run["means"])),
        line("the same, each on its own", *(own.get(mean["m"], "") for mean in run["means"])),
    ]


def ratio(over: Times, under: Times, m: int) -> str:
    """The geometric mean over the products of M that both have; empty without one."""
    common = [over[p] / under[p] for p in under if p[0] == m and p in over]
    return f"{geometric_mean(common):.2f}" if common else ""


def means(run: Run, fp16: Run, group_64: Run, one_group: Run) -> list[str]:
    """Of each M, over all shapes: speed-up, aim, worst shape, time over floor, fp16, and other groups' time / 128's.

    Groups were timed in runs of their own with the same kernels, on other cards: each is taken over cuBLAS in its run.
    """
    other = {mean["m"]: mean["speedup"] for mean in fp16["means"]}
    ours, small, one = map(over_cublas, (run, group_64, one_group))
    return [
        line(
            *(m := mean["m"], f"{mean['speedup']:.2f}", f"{AIMS[m]:.2f}", f"{mean['worst']:.2f}"),
            *(f"{mean['over_floor']:.2f}", f"{other[m]:.2f}", ratio(small, ours, m), ratio(one, ours, m)),
        )
        for mean in run["means"]
    ]


def by_tokens(run: Run) -> list[str]:
    """Of each M: speed-up, worst shape, time over floor."""
    return [line(x["m"], f"{x['speedup']:.2f}", f"{x['worst']:.2f}", f"{x['over_floor']:.2f}") for x in run["means"]]


def h200(run: Run) -> list[str]:
    """The same, and our time at each shape."""
    times = times_of(run)
    lines = []
    for cells, mean in zip(by_tokens(run), run["means"], strict=True):
        each = (f"{times[(mean['m'], *shape)]:.1f}" for shape in H200_SHAPES)
        lines.append(cells + line(*each)[1:])
    return lines


def slower(run: Run) -> list[str]:
    """The products that take longer than a peer's time over LEAST."""
    rows = [(row["best_peer_us"] / row["us"], row) for row in run["rows"]]
    return [f"{row['n']} x {row['k']} at M = {row['m']}: {of:.3f}" for of, row in rows if of < LEAST]


def swept(folder: Path = RESULTS) -> dict[str, dict[Product, float]]:
    """Of each kernels' types the fastest schedule's time, scaled by cuBLAS's to the run that has u4b8's at the product.

    Schedules that the catalogue no longer has do not count.
    """
    known = {(types.name, schedule.name) for types, schedule in typed_schedules()}
    cublas: dict[tuple[str, Product], float] = {}
    found: dict[str, dict[Product, float]] = {}
    for name in SWEPT:
        for row in load(f"sweep-h100-{name}", folder)["rows"]:
            types, product = row["types"], (row["m"], row["n"], row["k"])
            best = min(us for schedule, us in row["us"].items() if (types, schedule) in known)
            reference = cublas.setdefault((types[:4], product), row["cublas_us"])
            found.setdefault(types, {})[product] = best * reference / row["cublas_us"]
    return found


def swept_floor_us(types: TypeConfig, product: Product) -> float:
    """The floor of a product as ``benchmarks.sweep`` times it with these types."""
    return floor_us(*product, group_of(types), H100, kind_of(types))


def other_weights(times: Mapping[str, Times]) -> list[str]:
    """Of 4 bits the time over u4b8's, in brackets at equal bytes; of 8 bits over the own floor, in brackets u4b8's."""
    known = {types.name: types for types in TYPES}
    lines = []
    for name, label in OTHER_TYPES.items():
        types, base = known[name], known[f"{name[:4]}_u4b8"]
        ours, u4b8, cells = times[name], times[base.name], []
        for m in AIMS:
            products = [p for p in ours if p[0] == m and p in u4b8]
            over_floor = geometric_mean(ours[p] / swept_floor_us(types, p) for p in products)
            its = geometric_mean(u4b8[p] / swept_floor_us(base, p) for p in products)
            over_u4b8 = geometric_mean(ours[p] / u4b8[p] for p in products)
            if types.weight_bits == 8:
                cells.append(f"{over_floor:.2f}" + (f" ({its:.2f})" if "(" in label else ""))
            else:
                cells.append(f"{over_u4b8:.2f}" + (f" ({over_floor / its:.2f})" if m <= FEW else ""))
        lines.append(line(label, *cells))
    return lines


def plot(run: Run, path: Path) -> None:
    """The picture of README.md."""
    names = {field.name for field in dataclasses.fields(Timing)}

    def timing(values: Mapping[str, Any]) -> Timing:
        return Timing(**{name: values[name] for name in names if name in values})

    rows = [
        Row(
            *(row["m"], row["n"], row["k"], row["schedule"], row["floor_us"], timing(row)),
            {name: timing(peer) for name, peer in row["peers"].items()},
        )
        for row in run["rows"]
        if (row["n"], row["k"]) in PLOTTED
    ]
    write_plot(rows, f"{run['types']} x {run['weights']}, group {run['group']}, {run['device']['name']}", path)


def tables(folder: Path = RESULTS) -> dict[str, list[str]]:
    """Every table by what it shows; its lines stand so in README.md (the first) and docs/performance.md."""
    bf16, fp16, h200_run = (load(f"compare-{name}", folder) for name in ("h100-bf16", "h100-fp16", "h200-bf16"))
    alone = load("compare-h100-bf16-alone", folder)
    groups = [load(f"compare-h100-bf16-{name}", folder) for name in ("group-64", "one-group")]
    return {
        "README.md": readme(bf16, alone),
        "8192 x 8192": one_shape(bf16),
        "all shapes": means(bf16, fp16, *groups),
        "a card that rests": by_tokens(load("compare-h100-bf16-rested", folder)),
        "each on its own": by_tokens(alone),
        "H200": h200(h200_run),
        "other weights": other_weights(swept(folder)),
    }


def show(titled: Mapping[str, Iterable[str]]) -> None:
    for title, lines in titled.items():
        print(f"\n{title}", *lines, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--plot", type=Path, help="also draw the picture of README.md there")
    options = parser.parse_args()
    runs = {name: load(f"compare-{name}") for name in ("h100-bf16", "h100-fp16", "h200-bf16")}
    show(tables())
    show({f"slower than {LEAST} of the best peer, {name}": slower(run) for name, run in runs.items()})
    if options.plot:
        plot(runs["h100-bf16"], options.plot)


if __name__ == "__main__":
    main()
