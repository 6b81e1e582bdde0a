# SPDX-License-Identifier: Apache-2.0
"""The benchmark: machete_aot.gemm beside other implementations of the same products, checked and then timed in turns.

Every result is compared with the reference before it is timed; ``timing.py`` says how it is timed. A peer that fails
or is wrong is left out of that product and named in the notes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import reference
from .clocks import Monitor
from .demo import usable_gpu
from .errors import DeviceError
from .peers import Peer, reason
from .product import A_NAMES, explain
from .record import TOLERANCE
from .timing import (
    U4B8,
    Ceiling,
    Layer,
    Multiply,
    TimedGraph,
    WeightKind,
    Weights,
    ceiling_of,
    compare_us,
    floor_us,
)

OURS = "machete-aot"
CUBLAS = "cublas"
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (8192, 8192), (8192, 28672), (57344, 8192))  # N, K
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
ROUNDS = 9
PEER_FACTOR = 4  # of our tolerance: a peer may round elsewhere, such as scales that it applies to sums
BUSY_US = 5000  # the clocks are read while our kernels run for about this long
ERROR_ROWS = 512  # of a result that are compared at a time


@dataclass(frozen=True)
class Plan:
    """What to time: shapes (N, K), numbers of tokens M, the activations' dtype, k that share a scale (-1: all).

    ``rounds``, ``rest`` and ``alone`` are what ``timing.compare_us`` takes.
    """

    shapes: tuple[tuple[int, int], ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    dtype: torch.dtype = torch.bfloat16
    group: int = 128
    rounds: int = ROUNDS
    weights: WeightKind = U4B8
    rest: float = 0.0
    alone: float = 0.0


@dataclass(frozen=True)
class Timing:
    """One implementation at one product. ``us``: microseconds, None where it was not timed; ``problem`` says why.

    ``error``: ||out - ref|| / ||ref||, None where there is none or it is not finite. ``source``: "timed" in this run,
    or "scaled" from another one's figures.
    """

    us: float | None = None
    error: float | None = None
    problem: str | None = None
    source: str = "timed"

    def facts(self) -> dict[str, Any]:
        us = None if self.us is None else round(self.us, 2)
        error = None if self.error is None else float(f"{self.error:.3g}")
        return {"us": us, "error": error, "source": self.source, "problem": self.problem}


@dataclass(frozen=True)
class Row:
    """One product. ``peers`` by name, cuBLAS among them. Clocks in MHz while ours ran, None where NVML is not there."""

    m: int
    n: int
    k: int
    schedule: str
    floor_us: float
    ours: Timing
    peers: Mapping[str, Timing]
    sm_mhz: int | None = None
    memory_mhz: int | None = None

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest peer and its time."""
        times = {name: peer.us for name, peer in self.peers.items() if peer.us is not None}
        return min(times.items(), key=lambda item: item[1], default=None)

    @property
    def speedup(self) -> float | None:
        """The best peer's time over ours."""
        return None if self.best is None or self.ours.us is None else self.best[1] / self.ours.us

    def facts(self) -> dict[str, Any]:
        """Plain data for JSON."""
        ours, cublas = self.ours.facts(), self.peers.get(CUBLAS, Timing()).facts()
        best = self.best
        return {
            "n": self.n,
            "k": self.k,
            "m": self.m,
            "schedule": self.schedule,
            "us": ours["us"],
            "error": ours["error"],
            "problem": ours["problem"],
            "cublas_us": cublas["us"],
            "floor_us": round(self.floor_us, 2),
            "best_peer": best and best[0],
            "best_peer_us": best and round(best[1], 2),
            "peers": {name: peer.facts() for name, peer in self.peers.items()},
            "sm_mhz": self.sm_mhz,
            "memory_mhz": self.memory_mhz,
        }


def require_gpu() -> None:
    """Raises DeviceError unless our kernels run on torch's current device."""
    device, why = usable_gpu()
    if device is None:
        raise DeviceError(
            f"the benchmark times kernels and needs a GPU of compute capability 9.0, but {why}; run it on a machine "
            "that has one (`machete-aot doctor` tells what is missing here, `machete-aot demo` needs no GPU)"
        )


def run(plan: Plan, peers: Sequence[Peer], monitor: Monitor | None = None, device: str = "cuda") -> Iterator[Row]:
    """Yields one row a product, as each is ready. ``monitor``: where clocks are read, None does not read them.

    Raises whatever ``gemm`` raises, and DeviceError where a peer leaves the GPU unusable.
    """
    ceiling = device_ceiling()[0]
    for n, k in plan.shapes:
        layer = Layer(Weights.make(n, k, plan.group, plan.dtype, device, kind=plan.weights))
        entries: dict[str, Multiply | Timing] = {}
        for peer in peers:
            try:
                entries[peer.name] = peer.prepare(layer.weights, plan.tokens)
            except Exception as error:
                entries[peer.name] = _failure(peer.name, error)
        for m in plan.tokens:
            yield _measure(plan, layer, m, entries, ceiling, monitor)
        del layer, entries
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(
    plan: Plan,
    layer: Layer,
    m: int,
    entries: Mapping[str, Multiply | Timing],
    ceiling: Ceiling,
    monitor: Monitor | None,
) -> Row:
    """The row of one product. ``entries``: the peers that are ready, and what is wrong with the others."""
    n, k = layer.weights.n, layer.weights.k
    expected, limit = reference_product(layer, m), TOLERANCE[A_NAMES[plan.dtype]]
    found: dict[str, Timing] = {OURS: check(layer.ours(), layer, m, expected, limit)}
    graphs: dict[str, TimedGraph] = {}
    if found[OURS].problem is None:
        graphs[OURS] = layer.gemm_graph(m, None)
    for name, entry in entries.items():
        if isinstance(entry, Timing):
            found[name] = entry
            continue
        try:
            found[name] = check(entry, layer, m, expected, PEER_FACTOR * limit)
            if found[name].problem is None:
                graph = layer.graph(m, entry, layer.plain_calls(m) if name == CUBLAS else None)
                graph.replay_us()  # here, so that a failure is its own
                graphs[name] = graph
        except Exception as error:
            found[name] = _failure(name, error)
    times = compare_us(list(graphs.values()), plan.rounds, plan.rest, plan.alone)  # ours first, and alone last too
    for name, us in zip(graphs, times, strict=True):
        found[name] = Timing(us, found[name].error)
    clocks = _clocks(graphs[OURS], times[0], monitor) if monitor is not None and OURS in graphs else (None, None)
    kind = plan.weights
    with_zeros = False if kind.zeros == "none" else kind.zeros
    schedule = explain(m, n, k, plan.dtype, kind.b_type, b_group_size=plan.group, with_zeros=with_zeros).chosen
    floor = floor_us(m, n, k, plan.group, ceiling, kind)
    return Row(m, n, k, schedule, floor, found.pop(OURS), found, *clocks)


def reference_product(layer: Layer, m: int) -> torch.Tensor:
    """The reference's product [m, N] of the layer's activations and first copy of the weights."""
    b, scales, zeros = layer.packed[0]
    return reference.gemm(layer.buffers(m)[0], b, layer.weights.kind.b_type, scales, zeros, layer.weights.group)


def check(multiply: Multiply, layer: Layer, m: int, expected: torch.Tensor, limit: float) -> Timing:
    """Multiplies once, into an output of NaN, and compares: the error, and a problem where it is above ``limit``."""
    a, out, _ = layer.buffers(m)
    result = multiply(0, a, out.fill_(torch.nan))
    if result.shape != expected.shape:
        return Timing(problem=f"wrong: shape {tuple(result.shape)}, not {tuple(expected.shape)}")
    error = relative_error(result, expected)
    if not math.isfinite(error):
        return Timing(problem="wrong: some of the output is not finite, or was not written")
    return Timing(error=error, problem=None if error <= limit else f"wrong: error {error:.2g}, at most {limit:.2g}")


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||, in fp64."""
    off = size = 0.0
    for have, want in zip(out.split(ERROR_ROWS), expected.split(ERROR_ROWS), strict=True):
        exact = want.double()
        off += float((have.double() - exact).square().sum())
        size += float(exact.square().sum())
    return math.sqrt(off / size) if size else math.inf


def _failure(name: str, error: Exception) -> Timing:
    """What to note about a peer that raised. Raises DeviceError if the GPU cannot be used any more."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception as lost:
            raise DeviceError(
                f"{name} left the GPU unusable for this process ({reason(error)}); name the other peers with --peers "
                "and run again"
            ) from lost
    return Timing(problem=f"failed: {reason(error)}")


def _clocks(graph: TimedGraph, us: float, monitor: Monitor) -> tuple[int | None, int | None]:
    """The clocks of the multiprocessors and of the memory while the graph runs."""
    for _ in range(max(1, round(BUSY_US / (us * len(graph.calls))))):
        graph.launch()
    found = monitor.sm_mhz(), monitor.memory_mhz()
    torch.cuda.synchronize()
    return found


def device_ceiling() -> tuple[Ceiling, bool]:
    """The ceiling for the current device, and whether it was measured on such a card."""
    return ceiling_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else ceiling_of("")
