# SPDX-License-Identifier: Apache-2.0
"""How every figure of this project is timed: CUDA graphs of many calls, weights cold in L2, median of replays."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

import torch

from . import reference
from .prepack import prepack_b
from .product import gemm
from .scalar_type import ScalarType, u4, u4b8, u8, u8b128
from .selection import traffic

COLD_BYTES = 230e6  # weights in rotation: several times a Hopper's 50 to 60 MB of L2
GRAPH_US = 300  # calls in a graph fill about this long, so that its launch does not count
MOST_PLAIN_CALLS = 30  # of 16-bit weights in a graph: they take longer and need fewer

Call: TypeAlias = Callable[[], object]
# (copy of the weights, activations [M, K], output [M, N]) -> the result, in the output where that is possible
Multiply: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ceiling:
    """What a card sustains, per microsecond: bytes, floating-point operations. ``of``: the card that was measured."""

    of: str
    bytes_per_us: float
    flops_per_us: float


H100 = Ceiling("H100 80GB HBM3", 3.0e6, 790e6)
H200 = Ceiling("H200", 4.69e6, 790e6)


def ceiling_of(device_name: str) -> tuple[Ceiling, bool]:
    """The ceiling to state floors for on a device of this name, and whether it is that card's own.

    Cards that nobody has measured get the H100's, and False.
    """
    if re.search(r"\bH200\b", device_name):
        return H200, True
    return H100, H100.of in device_name


@dataclass(frozen=True)
class WeightKind:
    """How weights are quantised. ``zeros``: "none", "float" or "int", zero points beside the type's own."""

    b_type: ScalarType = u4b8
    zeros: str = "none"

    @property
    def name(self) -> str:
        return self.b_type.name + {"none": "", "float": "+zeros", "int": "+int-zeros"}[self.zeros]

    @property
    def zero_bytes(self) -> int:
        """Bytes of a zero point."""
        return {"none": 0, "float": 2, "int": 1}[self.zeros]


KINDS = {
    kind.name: kind
    for kind in (
        *(WeightKind(b_type) for b_type in (u4b8, u8b128, u4, u8)),
        *(WeightKind(b_type, zeros) for b_type in (u4, u8) for zeros in ("float", "int")),
    )
}
U4B8 = KINDS["u4b8"]


def floor_us(m: int, n: int, k: int, group: int = 128, ceiling: Ceiling = H100, kind: WeightKind = U4B8) -> float:
    """The time that memory traffic or arithmetic takes at least, in microseconds. ``group`` -1: one group over K."""
    moved = traffic(m, n, k, kind.b_type.bits, k if group == -1 else group, kind.zero_bytes)
    return max(moved / ceiling.bytes_per_us, 2 * m * n * k / ceiling.flops_per_us)


class TimedGraph:
    """Calls captured into one graph. They must have been called before, so that nothing is loaded in the capture."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls  # keeps their tensors alive: the graph holds addresses only
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            for call in calls:
                call()

    def launch(self) -> None:
        """Starts a replay and does not wait for it."""
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def replay_us(self) -> float:
        """Microseconds per call of one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(self.calls)


def alternate_us(graphs: Sequence[TimedGraph], rounds: int, rest: float = 0.0) -> list[float]:
    """Microseconds per call of each graph: the median over rounds in which all take turns.

    In turns, because a card that is limited by power is faster in a first graph than in a tenth. ``rest``: for how many
    times its duration the card idles after each replay. Many graphs in turns heat a card as a program with other work
    between its products does not, and its clocks then hide what tells their schedules apart.
    """
    times: list[list[float]] = [[] for _ in graphs]
    for graph in graphs:
        graph.replay_us()
    for _ in range(rounds):
        for graph, found in zip(graphs, times, strict=True):
            found.append(graph.replay_us())
            if rest:
                time.sleep(rest * found[-1] * len(graph.calls) * 1e-6)
    return [statistics.median(found) for found in times]


def alone_us(graphs: Sequence[TimedGraph], seconds: float) -> list[float]:
    """Microseconds per call of each graph while it is all that runs, as in a program that has no other kernels.

    In turns, graphs share the clock of a card that is limited by power: one that needs little energy waits for the
    others' heat. Here each has stretches of ``seconds`` of its own, the second half of which counts, from the first
    graph to the last and back again, so that none has the cooler card.
    """
    times: list[list[float]] = [[] for _ in graphs]
    there = list(zip(graphs, times, strict=True))
    for graph, found in (*there, *reversed(there)):
        start, passed = time.monotonic(), 0.0
        while passed < seconds:
            us = graph.replay_us()
            passed = time.monotonic() - start
            if passed >= seconds / 2:
                found.append(us)
    return [statistics.median(found) for found in times]


def compare_us(graphs: Sequence[TimedGraph], rounds: int, rest: float, alone: float) -> list[float]:
    """Microseconds per call of each graph: ``alone_us`` of so many seconds, or with 0 ``alternate_us``."""
    return alone_us(graphs, alone) if alone else alternate_us(graphs, rounds, rest)


class Quantised(NamedTuple):
    """One copy of a layer's weights: codes, packed or prepacked, scales and zeros."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True)
class Weights:
    """One weight shape, quantised, in as many copies of other values as it takes to keep L2 cold.

    ``copies``: codes int32 [ceil(K / b_type.per_int32), N] in GPTQ order, scales [ceil(K / group), N] in ``dtype``, and
    zeros of that shape in ``dtype`` or uint8, or None. ``group`` -1 is one group over K. Every implementation that is
    timed multiplies by these values, in 16 bits by the first ``plain_copies``.
    """

    n: int
    k: int
    group: int
    dtype: torch.dtype
    copies: tuple[Quantised, ...]
    plain_copies: int
    kind: WeightKind = U4B8

    @staticmethod
    def make(
        n: int,
        k: int,
        group: int,
        dtype: torch.dtype,
        device: str = "cuda",
        copies: int | None = None,
        kind: WeightKind = U4B8,
    ) -> Weights:
        """Random codes, each equally frequent, positive scales, and zero points in the middle half of the codes.

        ``copies``: None makes as many as keep L2 cold, fewer of them in 16 bits; a number makes so many of both.
        """
        groups, b_type = 1 if group == -1 else math.ceil(k / group), kind.b_type
        made = []
        for _ in range(_cold_copies(n * k * b_type.bits / 8) if copies is None else copies):
            shape = math.ceil(k / b_type.per_int32), n
            words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
            scales = (torch.rand(groups, n, device=device) * 0.03 + 0.002).to(dtype)
            zeros = None
            if kind.zeros != "none":
                codes = 1 << b_type.bits
                zeros = torch.randint(codes // 4, 3 * codes // 4, (groups, n), device=device, dtype=torch.uint8)
                if kind.zeros == "float":
                    zeros = scales * zeros.to(dtype)
            made.append(Quantised(words, scales, zeros))
        plain = min(_cold_copies(2 * n * k), len(made)) if copies is None else len(made)
        return Weights(n, k, group, dtype, tuple(made), plain, kind)

    def prepacked(self) -> Iterator[Quantised]:
        """Each copy as ``machete_aot.gemm`` takes it: its codes prepacked."""
        for copy in self.copies:
            yield copy._replace(codes=prepack_b(copy.codes, self.kind.b_type, self.dtype, k=self.k))


def ours(weights: Weights, packed: Sequence[Quantised], schedule: str | None, overlap: bool | None) -> Multiply:
    """machete_aot.gemm on prepacked weights. ``schedule`` and ``overlap`` are what gemm takes."""
    b_type = weights.kind.b_type

    def multiply(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        b, scales, zeros = packed[i % len(packed)]
        return gemm(a, b, b_type, scales, zeros, weights.group, out=out, schedule=schedule, overlap=overlap)

    return multiply


def cublas(weights: Weights) -> Multiply:
    """torch.mm with the weights dequantised to 16 bits, [N, K] in memory as torch.nn.Linear has them."""
    plain, b_type = [], weights.kind.b_type
    for words, scales, zeros in weights.copies[: weights.plain_copies]:
        packed = prepack_b(words, b_type, weights.dtype, k=weights.k)
        values = reference.dequantize(packed, b_type, scales, zeros, weights.group, weights.k)
        plain.append(values.t().contiguous())

    def multiply(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, plain[i % len(plain)].t(), out=out)

    return multiply


class Layer:
    """Weights with what it takes to time products by them: prepacked copies, activations, outputs, graphs."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._buffers: tuple[int, list[torch.Tensor]] = (-1, [])

    @staticmethod
    def make(n: int, k: int, group: int, dtype: torch.dtype, kind: WeightKind = U4B8) -> Layer:
        return Layer(Weights.make(n, k, group, dtype, kind=kind))

    @cached_property
    def packed(self) -> list[Quantised]:
        return list(self.weights.prepacked())

    @cached_property
    def _cublas(self) -> Multiply:
        return cublas(self.weights)

    def ours(self, schedule: str | None = None, overlap: bool | None = None) -> Multiply:
        return ours(self.weights, self.packed, schedule, overlap)

    def buffers(self, m: int) -> list[torch.Tensor]:
        """Activations [m, K] and two outputs [m, N], shared by all graphs of the same ``m``."""
        if self._buffers[0] != m:
            w, device = self.weights, self.weights.copies[0].codes.device
            a = torch.randn(m, w.k, device=device).to(w.dtype)
            self._buffers = m, [a, *(a.new_empty(m, w.n) for _ in range(2))]
        return self._buffers[1]

    def calls_in_graph(self, m: int) -> int:
        """Enough calls to fill GRAPH_US, and every copy equally often."""
        w, copies = self.weights, len(self.weights.copies)
        wanted = max(4, min(120, int(GRAPH_US / (floor_us(m, w.n, w.k, w.group, kind=w.kind) + 1.5))))
        return math.ceil(wanted / copies) * copies

    def graph(self, m: int, multiply: Multiply, calls: int | None = None) -> TimedGraph:
        """Products at ``m`` tokens, each by the next copy of the weights, every copy having been used before."""
        a, *outs = self.buffers(m)
        captured = [partial(multiply, i, a, outs[i % 2]) for i in range(calls or self.calls_in_graph(m))]
        for warm in captured[: len(self.weights.copies)]:  # ours overlaps its predecessor from a second call on
            warm()
        return TimedGraph(captured)

    def gemm_graph(self, m: int, schedule: str | None) -> TimedGraph:
        """machete_aot.gemm at ``m`` tokens."""
        return self.graph(m, self.ours(schedule))

    def cublas_graph(self, m: int) -> TimedGraph:
        """torch.mm with 16-bit weights at ``m`` tokens."""
        return self.graph(m, self._cublas, self.plain_calls(m))

    def plain_calls(self, m: int) -> int:
        """Calls in a graph of products by 16-bit weights."""
        return max(self.weights.plain_copies, min(MOST_PLAIN_CALLS, self.calls_in_graph(m)))


def _cold_copies(size: float) -> int:
    return max(2, math.ceil(COLD_BYTES / size))
