# SPDX-License-Identifier: Apache-2.0
"""How every figure of this project is timed: CUDA graphs of many calls, weights cold in L2, median of replays."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import machete_aot as machete
from machete_aot.selection import traffic

COLD_BYTES = 230e6  # weights in rotation: several times an H100's 50 MB of L2
GRAPH_US = 300  # calls in a graph fill about this long, so that its launch does not count
PEAK_BYTES_PER_US = 3.0e6  # floors are stated for 3.0 TB/s and 790 TFLOP/s, what an H100 sustains
PEAK_FLOPS_PER_US = 790e6

Call = Callable[[], object]


def floor_us(m: int, n: int, k: int) -> float:
    """The time that memory traffic or arithmetic takes at least, in microseconds."""
    return max(traffic(m, n, k) / PEAK_BYTES_PER_US, 2 * m * n * k / PEAK_FLOPS_PER_US)


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


@dataclass
class Layer:
    """One weight shape, in as many copies as it takes to keep L2 cold, and the same in 16 bits for cuBLAS."""

    n: int
    k: int
    group: int
    dtype: torch.dtype
    weights: list[tuple[torch.Tensor, torch.Tensor]]  # prepacked, scales
    plain: list[torch.Tensor]  # [n, k]
    buffers: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    @staticmethod
    def make(n: int, k: int, group: int, dtype: torch.dtype) -> Layer:
        device = torch.device("cuda")
        groups = 1 if group == -1 else math.ceil(k / group)
        weights = []
        for _ in range(_copies(n * k / 2)):
            words = torch.randint(-(2**31), 2**31 - 1, (math.ceil(k / 8), n), dtype=torch.int32, device=device)
            scales = (torch.rand(groups, n, device=device) * 0.03 + 0.002).to(dtype)
            weights.append((machete.prepack_b(words, machete.u4b8, dtype, k=k), scales))
        plain = [torch.randn(n, k, device=device, dtype=dtype) * 0.02 for _ in range(_copies(2 * n * k))]
        return Layer(n, k, group, dtype, weights, plain)

    def calls_in_graph(self, m: int) -> int:
        """Enough calls to fill GRAPH_US, and every copy equally often."""
        wanted = max(4, min(120, int(GRAPH_US / (floor_us(m, self.n, self.k) + 1.5))))
        copies = len(self.weights)
        return math.ceil(wanted / copies) * copies

    def gemm_graph(self, m: int, schedule: str | None) -> TimedGraph:
        """machete_aot.gemm at ``m`` tokens."""
        a, *outs = self._buffers(m)

        def call(i: int) -> Call:
            b, scales = self.weights[i % len(self.weights)]
            return lambda: machete.gemm(
                a, b, machete.u4b8, scales, b_group_size=self.group, out=outs[i % 2], schedule=schedule
            )

        calls = [call(i) for i in range(self.calls_in_graph(m))]
        for warm in calls[: len(self.weights)]:  # the first call on a weight does not overlap its predecessor
            warm()
        return TimedGraph(calls)

    def cublas_graph(self, m: int) -> TimedGraph:
        """torch.mm with 16-bit weights at ``m`` tokens."""
        a, *outs = self._buffers(m)

        def call(i: int) -> Call:
            return lambda: torch.mm(a, self.plain[i % len(self.plain)].t(), out=outs[i % 2])

        calls = [call(i) for i in range(max(len(self.plain), min(30, self.calls_in_graph(m))))]
        calls[0]()
        return TimedGraph(calls)

    def _buffers(self, m: int) -> list[torch.Tensor]:
        """Activations and two outputs, shared by all graphs of the same ``m``."""
        if m not in self.buffers:
            a = torch.randn(m, self.k, device="cuda", dtype=self.dtype)
            self.buffers = {m: [a, *(a.new_empty(m, self.n) for _ in range(2))]}
        return self.buffers[m]


def _copies(size: float) -> int:
    return max(2, math.ceil(COLD_BYTES / size))


def as_lines(record: dict[str, Any]) -> str:
    """JSON of a record with a list "rows", one row a line."""
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
