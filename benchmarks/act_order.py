# SPDX-License-Identifier: Apache-2.0
"""Times what act-order costs: ``python -m benchmarks.act_order --out act-order.json``.

Microseconds in CUDA graphs of many calls, the median of replays in turns: columns permuted by machete_aot and by torch,
products of N rows on plain activations, and the same behind either gather. The weights are cold in L2, the activations
are not, as behind the kernel that has made them. The results are compared with torch's first. Then the host's
microseconds of a call of either gather, while many are queued. ``--ways`` adds what permute_plan.py chooses from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import machete_aot as machete
from machete_aot import driver, permute
from machete_aot.bench import require_gpu
from machete_aot.bench_report import device_facts
from machete_aot.clocks import Monitor
from machete_aot.permute_plan import direct_plan, make_plan, staged_plan
from machete_aot.prepack import A_DTYPES
from machete_aot.timing import Layer, TimedGraph, alternate_us

from .eager import queue_us
from .run_record import run_record

TOKENS = (1, 16, 64)
SIZES = (4096, 14336)  # K
COLUMNS = 4096  # N of the products
GATHERS = 100  # in a graph
ROUNDS = 25
ROWS_OF_WAYS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
WAYS_OF = ("direct", "staged")
COLUMNS_OF_TABLE = ("ours", "torch", "product", "ours + product", "torch + product")


def by_torch(a: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.index_select(a, -1, order, out=out)


Gather = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
WAYS: dict[str, Gather] = {"ours": machete.permute_columns, "torch": by_torch}


def check(a: torch.Tensor, order: torch.Tensor) -> None:
    """Raises AssertionError where a gather differs from the definition in some bit."""
    expected = a.view(torch.int16).index_select(-1, order)
    for name, gather in WAYS.items():
        out = torch.empty_like(a)
        gather(a, order, out)
        assert torch.equal(out.view(torch.int16), expected), f"{name} gathers wrongly"


def gather_graph(gather: Gather, a: torch.Tensor, order: torch.Tensor, calls: int) -> TimedGraph:
    """Gathers of the same activations into two outputs in turn."""
    outs = [torch.empty_like(a) for _ in range(2)]
    captured = [partial(gather, a, order, outs[i % 2]) for i in range(calls)]
    for call in captured[:4]:  # loads the kernel; ours overlaps its predecessor from a second call on
        call()
    return TimedGraph(captured)


def pair_graph(gather: Gather, layer: Layer, m: int, order: torch.Tensor) -> TimedGraph:
    """Products of gathered activations: the time of both together."""
    multiply, into = layer.ours(), torch.empty_like(layer.buffers(m)[0])

    def both(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return multiply(i, gather(a, order, into), out)

    return layer.graph(m, both)


def measure(layer: Layer, m: int, calls: int, rounds: int) -> dict[str, Any]:
    """Microseconds by what is done, for ``m`` tokens."""
    a = layer.buffers(m)[0]
    order = torch.randperm(layer.weights.k, device=a.device).to(torch.int32)
    check(a, order)
    graphs = [gather_graph(gather, a, order, calls) for gather in WAYS.values()]
    graphs += [layer.gemm_graph(m, None), *(pair_graph(gather, layer, m, order) for gather in WAYS.values())]
    times = alternate_us(graphs, rounds)
    us = {name: round(value, 2) for name, value in zip(COLUMNS_OF_TABLE, times, strict=True)}
    return {"m": m, "n": layer.weights.n, "k": layer.weights.k, "us": us}


def ways(k: int, dtype: torch.dtype, calls: int, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a gather from global memory and from shared memory, and which the plan prefers, by rows."""
    device = driver.device(torch.cuda.current_device())
    threads = permute.load_permute(device.index, 0).info.threads
    order, rows = torch.randperm(k, device="cuda").to(torch.int32), []
    for m in ROWS_OF_WAYS:
        a = torch.randn(m, k, device="cuda").to(dtype)
        plans = direct_plan(m, k), staged_plan(m, k, device.sms, threads)
        planned = make_plan(m, k, device.sms, threads, device.shared_memory)
        graphs = []
        for plan in plans:
            permute.make_plan = lambda *_, plan=plan: plan
            try:
                check(a, order)
                graphs.append(gather_graph(machete.permute_columns, a, order, calls))
            finally:
                permute.make_plan = make_plan
        us = [round(value, 2) for value in alternate_us(graphs, rounds)]
        rows.append({"m": m, "k": k, "direct_us": us[0], "staged_us": us[1], "chosen": WAYS_OF[plans.index(planned)]})
        print(f"{m:>6}{k:>8}{us[0]:>17.2f}{us[1]:>17.2f}  {rows[-1]['chosen']}", flush=True)
    return rows


def host_us(m: int, k: int, dtype: torch.dtype) -> dict[str, float]:
    """Host microseconds a call."""
    a = torch.randn(m, k, device="cuda").to(dtype)
    order, out = torch.randperm(k, device="cuda").to(torch.int32), torch.empty_like(a)
    calls: dict[str, Callable[[], object]] = {}
    for name, gather in WAYS.items():
        calls[f"{name}, out"] = partial(gather, a, order, out)
    calls["ours"] = partial(machete.permute_columns, a, order)
    calls["torch"] = partial(torch.index_select, a, -1, order)
    return queue_us(calls)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return f"{row['m']:>6}{row['k']:>8}" + "".join(f"{row['us'][name]:>17.2f}" for name in COLUMNS_OF_TABLE)


def run(
    sizes: Sequence[int], tokens: Sequence[int], n: int, dtype: torch.dtype, group: int, calls: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each size and number of tokens, printed as it comes."""
    print(f"{'M':>6}{'K':>8}" + "".join(f"{name:>17}" for name in COLUMNS_OF_TABLE))
    rows = []
    for k in sizes:
        layer = Layer.make(n, k, group, dtype)
        for m in tokens:
            rows.append(measure(layer, m, calls, rounds))
            print(line(rows[-1]), flush=True)
        del layer
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.act_order", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="K")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--columns", type=int, default=COLUMNS, help="N of the products")
    parser.add_argument("--dtype", default="bf16", choices=list(A_DTYPES))
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--calls", type=int, default=GATHERS, help="gathers in a graph")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--ways", action="store_true", help="also time both ways of gathering, which permute_plan chooses from"
    )
    options = parser.parse_args()
    require_gpu()
    monitor = Monitor(torch.cuda.current_device())
    dtype = A_DTYPES[options.dtype]
    rows = run(options.sizes, options.tokens, options.columns, dtype, options.group, options.calls, options.rounds)
    host = host_us(options.tokens[0], options.sizes[0], dtype)
    print("on the host: " + ", ".join(f"{name} {us:.2f} us" for name, us in host.items()))
    record = {
        **run_record("act_order"),
        "device": device_facts(monitor),
        "types": options.dtype,
        "group": options.group,
        "rows": rows,
        "host_us": host,
    }
    if options.ways:
        print(f"{'M':>6}{'K':>8}{'from global':>17}{'from shared':>17}  chosen")
        record["ways"] = [row for k in options.sizes for row in ways(k, dtype, options.calls, options.rounds)]
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
