# SPDX-License-Identifier: Apache-2.0
"""What eager calls cost the host on a GPU: ``python -m benchmarks.eager --out eager.json``.

Microseconds a call, M = 16 and N = K = 4096, while 100 calls are queued after a synchronisation; the median of many
such queues, all implementations in turns: machete_aot.gemm through the loader and through cuda-bindings,
torch.mm, and Humming where it can be imported. Then the first product of a new process in which torch and the package
are ready; the GPU's time for the products of eight layers in one graph, beside those products each in a graph of its
own; and calls over changing shapes, during which nothing may grow (``soak.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import machete_aot as machete
from machete_aot import loader
from machete_aot.cli_bench import MODELS
from machete_aot.peers import PEERS, find_peers
from machete_aot.timing import Layer, TimedGraph, alternate_us

from .run_record import run_record
from .soak import soak

M, N, K, GROUP = 16, 4096, 4096, 128
QUEUED, REPEATS, SOAK_SECONDS = 100, 40, 60
LAYERS, LAYER = 8, MODELS["llama3-8b"]  # N and K of a layer's products
LOADER = "MACHETE_AOT_LOADER"

Call = Callable[[], object]


def queue_us(calls: dict[str, Call]) -> dict[str, float]:
    """Host microseconds a call of each implementation."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(QUEUED):
            call()
    for _ in range(REPEATS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(QUEUED):
                call()
            times[name].append((time.perf_counter() - start) / QUEUED * 1e6)
    torch.cuda.synchronize()
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def calls_of(layer: Layer) -> dict[str, Call]:
    a = torch.randn(M, K, device="cuda").to(torch.bfloat16)
    codes, scales, _ = layer.weights.copies[0]
    packed = machete.prepack_b(codes, machete.u4b8)
    plain = torch.randn(K, N, device="cuda").to(torch.bfloat16)
    out = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    calls: dict[str, Call] = {
        "gemm": lambda: machete.gemm(a, packed, machete.u4b8, scales, b_group_size=GROUP),
        "gemm, out": lambda: machete.gemm(a, packed, machete.u4b8, scales, b_group_size=GROUP, out=out),
        "torch.mm": lambda: torch.mm(a, plain),
        "torch.mm, out": lambda: torch.mm(a, plain, out=out),
    }
    for peer in find_peers(name for name in PEERS if name == "humming")[0]:
        calls[peer.name] = partial(peer.prepare(layer.weights, (M,)), 0, a, out)
    return calls


def chain_us() -> list[dict[str, float]]:
    """GPU microseconds a layer, of all layers' products in one graph and of each product in its own, added up."""
    products = [Layer.make(n, k, GROUP, torch.bfloat16) for n, k in LAYER]
    found = []
    for m in (1, M, 64):
        alone = [product.gemm_graph(m, None) for product in products]
        calls = []
        for i in range(LAYERS):
            for product in products:
                a, out, _ = product.buffers(m)
                calls.append(partial(product.ours(), i, a, out))
        chain, *each = alternate_us([TimedGraph(calls), *alone], REPEATS)
        found.append({"m": m, "chain_us": round(chain * len(LAYER), 2), "alone_us": round(sum(each), 2)})
    return found


def child(what: str) -> dict[str, Any]:
    """Figures of a process of its own."""
    torch.zeros(1, device="cuda")
    if what == "first":
        a = torch.randn(M, K, device="cuda").to(torch.bfloat16)
        codes = torch.randint(-(2**31), 2**31, (K // 8, N), dtype=torch.int32, device="cuda")
        scales = torch.rand(K // GROUP, N, device="cuda").to(torch.bfloat16)
        packed = machete.prepack_b(codes, machete.u4b8)
        torch.cuda.synchronize()
        start = time.perf_counter()
        machete.gemm(a, packed, machete.u4b8, scales, b_group_size=GROUP)
        torch.cuda.synchronize()
        return {"first_ms": round((time.perf_counter() - start) * 1e3, 2)}
    layer = Layer.make(N, K, GROUP, torch.bfloat16)
    return {"loader": loader.status()[1], "us": queue_us(calls_of(layer))}


def spawn(what: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.eager", "--child", what]
    result = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.eager", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--soak", type=int, default=1_000_000, help="calls over changing shapes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    record = {
        **run_record("eager"),
        "device": torch.cuda.get_device_name(),
        "product": [M, N, K],
        "native": spawn("queue"),
        "bindings": spawn("queue", **{LOADER: "0"}),
        "first_ms": sorted(spawn("first")["first_ms"] for _ in range(5)),
        "chain": chain_us(),
        "soak": soak(options.soak, SOAK_SECONDS),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
