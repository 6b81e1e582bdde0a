# SPDX-License-Identifier: Apache-2.0
"""How every figure of this project is timed: CUDA graphs of many calls, weights cold in L2, median of replays."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import torch

from . import reference
from .prepack import prepack_b
from .product import gemm
from .scalar_type import u4b8
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


def floor_us(m: int, n: int, k: int, group: int = 128, ceiling: Ceiling = H100) -> float:
    """The time that memory traffic or arithmetic takes at least, in microseconds. ``group`` -1: one group over K."""
    moved = traffic(m, n, k, group=k if group == -1 else group)
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


def alternate_us(graphs: Sequence[TimedGraph], rounds: int) -> list[float]:
    """Microseconds per call of each graph: the median over rounds in which all take turns.

    In turns, because a card that is limited by power is faster in a first graph than in a tenth.
    """
    times: list[list[float]] = [[] for _ in graphs]
    for graph in graphs:
        graph.replay_us()
    for _ in range(rounds):
        for graph, found in zip(graphs, times, strict=True):
            found.append(graph.replay_us())
    return [statistics.median(found) for found in times]


@dataclass(frozen=True)
class Weights:
    """One weight shape, quantised, in as many copies of other values as it takes to keep L2 cold.

    ``copies``: w_q int32 [ceil(K / 8), N] of u4b8 codes in GPTQ order, and scales [ceil(K / group), N] in ``dtype``.
    ``group`` -1 is one group over K. Every implementation that is timed multiplies by these values, in 16 bits by the
    first ``plain_copies``.
    """

    n: int
    k: int
    group: int
    dtype: torch.dtype
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    plain_copies: int

    @staticmethod
    def make(
        n: int, k: int, group: int, dtype: torch.dtype, device: str = "cuda", copies: int | None = None
    ) -> Weights:
        """Random codes, each equally frequent, and positive scales.

        ``copies``: None makes as many as keep L2 cold, fewer of them in 16 bits; a number makes so many of both.
        """
        groups = 1 if group == -1 else math.ceil(k / group)
        made = []
        for _ in range(_cold_copies(n * k / 2) if copies is None else copies):
            words = torch.randint(-(2**31), 2**31, (math.ceil(k / 8), n), dtype=torch.int32, device=device)
            made.append((words, (torch.rand(groups, n, device=device) * 0.03 + 0.002).to(dtype)))
        plain = min(_cold_copies(2 * n * k), len(made)) if copies is None else len(made)
        return Weights(n, k, group, dtype, tuple(made), plain)

    def prepacked(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each copy as ``machete_aot.gemm`` takes it: prepacked, scales."""
        for words, scales in self.copies:
            yield prepack_b(words, u4b8, self.dtype, k=self.k), scales


def ours(
    weights: Weights, packed: Sequence[tuple[torch.Tensor, torch.Tensor]], schedule: str | None, overlap: bool | None
) -> Multiply:
    """machete_aot.gemm on prepacked weights and their scales. ``schedule`` and ``overlap`` are what gemm takes."""

    def multiply(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        b, scales = packed[i % len(packed)]
        return gemm(a, b, u4b8, scales, b_group_size=weights.group, out=out, schedule=schedule, overlap=overlap)

    return multiply


def cublas(weights: Weights) -> Multiply:
    """torch.mm with the weights dequantised to 16 bits, [N, K] in memory as torch.nn.Linear has them."""
    plain = []
    for words, scales in weights.copies[: weights.plain_copies]:
        packed = prepack_b(words, u4b8, weights.dtype, k=weights.k)
        plain.append(reference.dequantize(packed, u4b8, scales, None, weights.group, weights.k).t().contiguous())

    def multiply(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, plain[i % len(plain)].t(), out=out)

    return multiply


class Layer:
    """Weights with what it takes to time products by them: prepacked copies, activations, outputs, graphs."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._buffers: tuple[int, list[torch.Tensor]] = (-1, [])

    @staticmethod
    def make(n: int, k: int, group: int, dtype: torch.dtype) -> Layer:
        return Layer(Weights.make(n, k, group, dtype))

    @cached_property
    def packed(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(self.weights.prepacked())

    @cached_property
    def _cublas(self) -> Multiply:
        return cublas(self.weights)

    def ours(self, schedule: str | None = None, overlap: bool | None = None) -> Multiply:
        return ours(self.weights, self.packed, schedule, overlap)

    def buffers(self, m: int) -> list[torch.Tensor]:
        """Activations [m, K] and two outputs [m, N], shared by all graphs of the same ``m``."""
        if self._buffers[0] != m:
            w, device = self.weights, self.weights.copies[0][0].device
            a = torch.randn(m, w.k, device=device).to(w.dtype)
            self._buffers = m, [a, *(a.new_empty(m, w.n) for _ in range(2))]
        return self._buffers[1]

    def calls_in_graph(self, m: int) -> int:
        """Enough calls to fill GRAPH_US, and every copy equally often."""
        w, copies = self.weights, len(self.weights.copies)
        wanted = max(4, min(120, int(GRAPH_US / (floor_us(m, w.n, w.k, w.group) + 1.5))))
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
