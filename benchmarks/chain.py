# SPDX-License-Identifier: Apache-2.0
"""Times the products of decoder layers where they stand: between the other kernels of a decode step, in one CUDA graph.

    python -m benchmarks.chain --out chain.json

A layer is RMSNorm, qkv product, attention over a cache of 1024 positions, output product, residual sum, RMSNorm, gate
and up product, SiLU times up, down product, residual sum. Everything but the products is torch's and the same for all.
Each token is a sequence of its own. Layers follow each other until their 4-bit weights are too many for L2. One variant
leaves the products out, so that what they take is visible.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from machete_aot.bench import OURS, PEER_FACTOR, Timing, check, reference_product, relative_error, require_gpu
from machete_aot.bench_report import device_facts
from machete_aot.clocks import Monitor
from machete_aot.peers import Peer, find_peers, reason
from machete_aot.prepack import A_DTYPES
from machete_aot.product import A_NAMES
from machete_aot.record import TOLERANCE
from machete_aot.timing import COLD_BYTES, Layer, Multiply, TimedGraph, Weights, alternate_us

from .run_record import run_record

TOKENS = (1, 16, 64)
POSITIONS = 1024  # in the cache of each sequence
HEAD = 128  # elements of a head
EPSILON = 1e-5
REPEATS = 2  # of the layers in a graph, so that its launch does not count
ROUNDS = 15
WAITING = f"{OURS}, no overlap"
ALONE = "no products"


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder layer, all of it on one GPU."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """N and K of each product."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * HEAD, self.hidden),
            "o": (self.hidden, self.heads * HEAD),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def layers(self) -> int:
        """How many layers keep the weights cold in L2: at least two."""
        return max(2, math.ceil(COLD_BYTES / sum(n * k / 2 for n, k in self.shapes.values())))


MODELS = {m.name: m for m in (Model("llama3-8b", 4096, 14336, 32, 8), Model("llama3-70b", 8192, 28672, 64, 8))}
Products = Mapping[str, Multiply]  # by the product's name in Model.shapes


class Decoder:
    """What the layers read beside the products' weights, and where they write, for ``m`` tokens."""

    def __init__(self, model: Model, m: int, dtype: torch.dtype, device: str = "cuda") -> None:
        self.model, self.m = model, m
        made = partial(torch.randn, device=device, dtype=dtype)
        self.x = made(m, model.hidden)
        self.norms = [(made(model.hidden), made(model.hidden)) for _ in range(model.layers)]
        cache = (m, model.kv_heads, POSITIONS, HEAD)
        self.caches = [(made(*cache), made(*cache)) for _ in range(model.layers)]
        self.outs = {name: made(m, n) for name, (n, _) in model.shapes.items()}  # shared by the layers

    def run(self, products: Products, result: torch.Tensor) -> torch.Tensor:
        """All layers, one after the other; the last residual sum goes to ``result`` [m, hidden]."""
        model, m, x = self.model, self.m, self.x
        last = model.layers - 1
        for i, ((first, second), (keys, values)) in enumerate(zip(self.norms, self.caches, strict=True)):

            def product(name: str, a: torch.Tensor, i: int = i) -> torch.Tensor:
                return products[name](i, a, self.outs[name])

            qkv = product("qkv", functional.rms_norm(x, (model.hidden,), first, EPSILON))
            # The heads that share keys are taken as positions of one: the same sums, and torch's kernel reads the
            # cache once for them.
            queries = qkv[:, : model.heads * HEAD].view(m, model.kv_heads, model.heads // model.kv_heads, HEAD)
            mixed = functional.scaled_dot_product_attention(queries, keys, values)
            x = x + product("o", mixed.reshape(m, model.heads * HEAD))
            gate_up = product("gate_up", functional.rms_norm(x, (model.hidden,), second, EPSILON))
            gate, up = gate_up.chunk(2, dim=1)
            down = product("down", functional.silu(gate) * up)
            x = torch.add(x, down, out=result) if i == last else x + down
        return x


def no_product(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Stands for a product and takes no time."""
    return out


def variants(
    model: Model, layers: Mapping[str, Layer], peers: Sequence[Peer], tokens: Sequence[int]
) -> tuple[dict[str, Products], dict[str, str]]:
    """The products by implementation, ours first; and the peers that could not be made ready, with the reason."""
    found: dict[str, Products] = {
        OURS: {name: layer.ours() for name, layer in layers.items()},
        WAITING: {name: layer.ours(overlap=False) for name, layer in layers.items()},
    }
    problems = {}
    for peer in peers:
        try:
            found[peer.name] = {name: peer.prepare(layer.weights, tokens) for name, layer in layers.items()}
        except Exception as error:
            problems[peer.name] = reason(error)
    found[ALONE] = dict.fromkeys(model.shapes, no_product)
    return found, problems


def problem_of(products: Products, layers: Mapping[str, Layer], m: int, limit: float) -> str | None:
    """What is wrong with these products at ``m`` tokens, each compared with the reference; None if nothing is."""
    for name, layer in layers.items():
        try:
            timing = check(products[name], layer, m, reference_product(layer, m), limit)
        except Exception as error:
            timing = Timing(problem=f"failed: {reason(error)}")
        if timing.problem:
            return f"{name} {timing.problem}"
    return None


def measure(
    model: Model, m: int, dtype: torch.dtype, layers: Mapping[str, Layer], found: Mapping[str, Products], rounds: int
) -> dict[str, Any]:
    """Microseconds a layer of each variant that is right, and how far each chain's result is from ours."""
    limit = PEER_FACTOR * TOLERANCE[A_NAMES[dtype]]
    decoder = Decoder(model, m, dtype)
    graphs: dict[str, TimedGraph] = {}
    results: dict[str, torch.Tensor] = {}
    problems: dict[str, str] = {}
    for name, products in found.items():
        problem = None if name == ALONE else problem_of(products, layers, m, limit)
        if problem is None:
            results[name] = torch.empty_like(decoder.x)
            calls = [partial(decoder.run, products, results[name])] * REPEATS
            for _ in range(2):  # ours overlaps from the second call on
                calls[0]()
            graphs[name] = TimedGraph(calls)
        else:
            problems[name] = problem
    times = dict(zip(graphs, alternate_us(list(graphs.values()), rounds), strict=True))
    us = {name: time / model.layers for name, time in times.items()}
    alone = us[ALONE]
    ours = results.get(OURS)
    errors = {
        name: relative_error(out, ours)
        for name, out in results.items()
        if ours is not None and name not in (OURS, ALONE)
    }
    return {
        "model": model.name,
        "m": m,
        "layers": model.layers,
        "us": {name: round(value, 2) for name, value in us.items()},
        "products_us": {name: round(value - alone, 2) for name, value in us.items() if name != ALONE},
        "distance_from_ours": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "problems": problems,
    }


def chain(
    model: Model, tokens: Sequence[int], dtype: torch.dtype, group: int, rounds: int, peers: Sequence[Peer]
) -> list[dict[str, Any]]:
    """A row for each number of tokens, printed as it comes."""
    layers = {
        name: Layer(Weights.make(n, k, group, dtype, copies=model.layers)) for name, (n, k) in model.shapes.items()
    }
    found, failed = variants(model, layers, peers, tokens)
    rows = []
    for m in tokens:
        row = measure(model, m, dtype, layers, found, rounds)
        row["problems"] |= failed
        rows.append(row)
        print(lines(row), flush=True)
    return rows


def lines(row: Mapping[str, Any]) -> str:
    """A row for people: a line for each variant."""
    text = [f"{row['model']}, M = {row['m']}: microseconds a layer (of them products), {row['layers']} layers in turn"]
    ours = row["us"].get(OURS)
    for name, us in row["us"].items():
        if name == ALONE:
            text.append(f"  {name:<26}{us:9.1f}")
        else:
            ratio = f"{us / ours:8.2f} times ours" if ours else ""
            text.append(f"  {name:<26}{us:9.1f}{row['products_us'][name]:9.1f}{ratio}")
    text += [f"  {name}: not timed, {problem}" for name, problem in row["problems"].items()]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.chain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", default="bf16", choices=list(A_DTYPES))
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    require_gpu()
    peers, missing = find_peers()
    for name, problem in missing.items():
        print(f"{name}: not timed, {problem}")
    monitor = Monitor(torch.cuda.current_device())
    rows = []
    for name in options.models:
        rows += chain(MODELS[name], options.tokens, A_DTYPES[options.dtype], options.group, options.rounds, peers)
        record = {
            **run_record("chain"),
            "device": device_facts(monitor),
            "types": options.dtype,
            "group": options.group,
            "peers": {peer.name: peer.version for peer in peers} | dict.fromkeys(missing),
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
