# SPDX-License-Identifier: Apache-2.0
"""Times machete_aot.gemm, with the schedule that it chooses itself, beside cuBLAS and the peers, over peers_h100.json.

    python -m benchmarks.compare --out compare.json

Peers that can be imported are timed in the same run, as `machete-aot bench` does. On an H100 the others' times are
those of peers_h100.json scaled by cuBLAS's time in this run over its time in that file, so that another clock or
another card does not count for or against them; on an H200 they have none.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from machete_aot.bench import CUBLAS, Plan, Row, Timing, require_gpu
from machete_aot.bench_report import run_and_print
from machete_aot.cli_bench import add_heat_options
from machete_aot.peers import PEERS
from machete_aot.prepack import A_DTYPES
from machete_aot.timing import KINDS

from .run_record import command

FIGURES = Path(__file__).with_name("peers_h100.json")
FIGURES_GROUP, FIGURES_WEIGHTS = 128, "u4b8"  # of FIGURES

Figures = Mapping[tuple[int, int, int], Mapping[str, float]]  # (m, n, k) -> name -> microseconds


def load_figures(document: Mapping[str, Any]) -> Figures:
    """What peers_h100.json says, by product."""
    return {
        (m, shape["n"], shape["k"]): {name: us[index] for name, us in shape["us"].items()}
        for shape in document["shapes"]
        for index, m in enumerate(document["tokens"])
    }


def comparable(device_name: str, group: int, weights: str = FIGURES_WEIGHTS) -> bool:
    """Whether the figures may be scaled to a run on such a device."""
    return re.search(r"\bH100\b", device_name) is not None and (group, weights) == (FIGURES_GROUP, FIGURES_WEIGHTS)


def with_scaled(row: Row, figures: Figures) -> Row:
    """The row with a scaled time for each peer that was not timed. Nothing is scaled where cuBLAS was not timed."""
    measured = figures.get((row.m, row.n, row.k), {})
    cublas = row.peers.get(CUBLAS, Timing()).us
    if cublas is None or CUBLAS not in measured:
        return row
    peers = dict(row.peers)
    for name, us in measured.items():
        timing = peers.get(name, Timing())
        if timing.us is None:
            peers[name] = replace(timing, us=us * cublas / measured[CUBLAS], source="scaled")
    return replace(row, peers=peers)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", "--types", default="bf16", choices=list(A_DTYPES))
    parser.add_argument("--weights", default="u4b8", choices=list(KINDS))
    parser.add_argument("--group", type=int, default=128)
    add_heat_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", help="only these of the file's M")
    options = parser.parse_args()
    require_gpu()
    document = json.loads(FIGURES.read_text())
    shapes = tuple((shape["n"], shape["k"]) for shape in document["shapes"])
    kind = KINDS[options.weights]
    plan = Plan(
        shapes,
        tuple(m for m in document["tokens"] if m in (options.tokens or [m])),
        A_DTYPES[options.dtype],
        options.group,
        weights=kind,
        rest=options.rest,
        alone=options.alone,
    )
    figures = load_figures(document)
    scales = comparable(torch.cuda.get_device_name(), options.group, options.weights)
    adjust = partial(with_scaled, figures=figures) if scales else None
    run_and_print(plan, tuple(PEERS), command("compare"), options.out, adjust)
    if scales:
        print(f"~: scaled from {FIGURES.name} (bf16, {FIGURES_WEIGHTS}, group {FIGURES_GROUP}) by cuBLAS's time")
    else:
        print(f"{FIGURES.name} is of an H100, {FIGURES_WEIGHTS} and group {FIGURES_GROUP}: not scaled to this run")


if __name__ == "__main__":
    main()
