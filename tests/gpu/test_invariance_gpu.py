# SPDX-License-Identifier: Apache-2.0
"""Batch invariance on a GPU: a row's bits, whatever M is, wherever the row stands and whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import DTYPES, Layer, same_bits

import machete_aot as machete
from build_kernels.catalogue import typed_schedules
from machete_aot.invariance import Order, reduction_order

pytestmark = pytest.mark.gpu

SCHEDULES = [schedule for types, schedule in typed_schedules() if types.name == "bf16_u4b8"]
MOST = 4096
TOKENS = (*range(1, 65), 65, 72, 96, 100, 127, 128, 129, 160, 192, 200, 255, 256, 257, 300, 384, 400, 500, 511, 512)
LAYERS = ((6144, 4096), (4096, 4096), (4304, 1152), (576, 7168))
cases = pytest.mark.parametrize(
    ("n", "k", "group", "dtype"), [(n, k, group, dtype) for n, k in LAYERS for group in (128, -1) for dtype in DTYPES]
)


def multiply(layer: Layer, a: torch.Tensor, **options: object) -> torch.Tensor:
    return layer.gemm(a, batch_invariant=True, **options)


@cases
def test_rows_do_not_depend_on_the_batch(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    layer = Layer(n, k, group, dtype)
    a = layer.acts(MOST)
    expected = multiply(layer, a)
    assert layer.error(expected, layer.expected(a)) <= 1
    bad = []
    for m in (*TOKENS, 1000, 2048, 4095):
        for first in (0, 3, MOST - m):  # as the first rows, in the middle of others, as the last rows
            rows = slice(first, min(first + m, MOST))
            if not same_bits(multiply(layer, a[rows]), expected[rows]):
                bad.append((m, first))
    assert bad == []


@cases
def test_rows_do_not_depend_on_their_place(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    layer = Layer(n, k, group, dtype)
    a, bias = layer.acts(600), layer.bias()
    alone = torch.cat([multiply(layer, row[None], bias=bias) for row in a])
    torch.manual_seed(0)
    for m in (2, 8, 9, 31, 64, 100, 128, 256, 513, 600):
        for _ in range(3):
            rows = torch.randperm(600, device="cuda")[:m]
            assert same_bits(multiply(layer, a[rows], bias=bias), alone[rows]), m
    twice = a[:40].repeat(5, 1)
    assert same_bits(multiply(layer, twice, bias=bias), alone[:40].repeat(5, 1))
    assert same_bits(multiply(layer, a.view(20, 30, k), bias=bias).view(600, n), alone)


@cases
def test_rows_do_not_depend_on_their_neighbours(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    layer = Layer(n, k, group, dtype)
    a = layer.acts(300)
    expected = multiply(layer, a)
    for m in (2, 5, 16, 17, 40, 64, 100, 256, 300):
        for place in {0, 1, m // 2, m - 1}:
            for value in (float("nan"), float("inf"), torch.finfo(dtype).max):
                strange = a[:m].clone()
                strange[place] = value
                found = multiply(layer, strange)
                others = torch.arange(m, device="cuda") != place
                assert same_bits(found[others], expected[:m][others]), (m, place, value)
                assert same_bits(multiply(layer, strange[place]), found[place]), (m, place, value)


def by_order(k: int) -> dict[Order, list[str]]:
    found: dict[Order, list[str]] = {}
    for schedule in SCHEDULES:
        order = reduction_order(schedule.tile, schedule.split, k)
        if order is not None:
            found.setdefault(order, []).append(schedule.name)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(576, 4096, 128), (304, 1152, -1), (200, 7000, 64), (96, 330, 192)])
def test_schedules_of_one_order_give_the_same_bits(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    """All schedules of all orders, forced by name; K of 7000 and 330 ends inside a unit and inside a ring step."""
    layer = Layer(n, k, group, dtype)
    a, bias = layer.acts(300), layer.bias()
    results = {}
    for order, names in by_order(k).items():
        expected = layer.gemm(a, bias=bias, schedule=names[0])
        results[order] = expected
        for name in names:
            for m in (1, 7, 64, 70, 300):
                assert same_bits(layer.gemm(a[:m], bias=bias, schedule=name), expected[:m]), (m, name, names[0])
    different = {result.view(torch.int16).cpu().numpy().tobytes() for result in results.values()}
    assert len(different) > 1  # else the comparison above could not have failed


def test_the_free_choice_does_depend_on_the_batch() -> None:
    """So that the tests above are known to be able to fail."""
    layer = Layer(4096, 4096, 128, torch.bfloat16)
    a = layer.acts(MOST)
    expected = layer.gemm(a)
    assert not all(same_bits(layer.gemm(a[:m]), expected[:m]) for m in TOKENS)


def test_named_schedules() -> None:
    layer = Layer(4096, 4096, 128, torch.bfloat16)
    a = layer.acts(20)
    expected = multiply(layer, a)
    explained = machete.explain(20, 4096, 4096, batch_invariant=True)
    kept = [c.schedule for c in explained.candidates]
    for name in kept:
        assert same_bits(multiply(layer, a, schedule=name), expected)
    other = next(s.name for s in SCHEDULES if reduction_order(s.tile, s.split, 4096) != explained.order)
    with pytest.raises(machete.ArgumentError, match="does not add up K = 4096 in the order"):
        multiply(layer, a, schedule=other)


def test_graphs_after_a_warmup() -> None:
    layer = Layer(6144, 4096, 128, torch.bfloat16)
    a = layer.acts(512)
    expected = multiply(layer, a)
    sizes = (1, 16, 100, 512)
    machete.warmup(torch.bfloat16, machete.u4b8, [(m, 6144, 4096) for m in sizes], batch_invariant=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [multiply(layer, a[:m]) for m in sizes]
    graph.replay()
    assert all(same_bits(out, expected[:m]) for m, out in zip(sizes, outs, strict=True))
