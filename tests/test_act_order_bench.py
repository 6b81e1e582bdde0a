# SPDX-License-Identifier: Apache-2.0
"""The benchmark of act-order without a GPU: what its graphs do, that it compares, and its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks import act_order
from machete_aot import timing
from machete_aot.timing import Layer, Weights


class FakeGraph:
    """Runs the first of its calls, as a capture would."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls, self.first = calls, calls[0]()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """The graphs of a run without a device; they take 1, 2, 3, ... microseconds in their order."""
    found: list[FakeGraph] = []

    def alternate(made: Sequence[FakeGraph], rounds: int) -> list[float]:
        found.extend(made)
        return [float(i + 1) for i in range(len(made))]

    for module in (timing, act_order):
        monkeypatch.setattr(module, "TimedGraph", FakeGraph)
    monkeypatch.setattr(act_order, "alternate_us", alternate)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def make(n: int, k: int, group: int, dtype: torch.dtype) -> Layer:
        return Layer(Weights.make(n, k, group, dtype, device="cpu", copies=2))

    monkeypatch.setattr(act_order.Layer, "make", make)
    return found


def test_rows(graphs: list[FakeGraph], capsys: pytest.CaptureFixture[str]) -> None:
    rows = act_order.run((128, 192), (1, 3), 64, torch.bfloat16, 64, 6, 2)
    assert [(row["k"], row["m"]) for row in rows] == [(128, 1), (128, 3), (192, 1), (192, 3)]
    wanted = {"ours": 1.0, "torch": 2.0, "product": 3.0, "ours + product": 4.0, "torch + product": 5.0}
    assert all(row["us"] == wanted and row["n"] == 64 for row in rows)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["M", "K"] and lines[0].split()[:3] == ["1", "128", "1.00"]
    assert len(graphs) == 5 * 4 and len(graphs[0].calls) == 6
    first = [graph.first for graph in graphs[:5]]
    assert all(isinstance(t, torch.Tensor) for t in first)
    assert torch.equal(first[0], first[1]) and first[0].shape == (1, 128)
    assert torch.equal(first[3], first[4]) and first[3].shape == (1, 64)


def test_a_wrong_gather_is_not_timed(graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(act_order.WAYS, "torch", lambda a, order, out: out.copy_(a))
    with pytest.raises(AssertionError, match="torch gathers wrongly"):
        act_order.run((128,), (2,), 64, torch.bfloat16, 64, 6, 2)
    assert graphs == []
