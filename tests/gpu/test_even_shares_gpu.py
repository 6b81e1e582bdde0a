# SPDX-License-Identifier: Apache-2.0
"""Even shares on a GPU: partial tiles that pass through a workspace of old bytes, in repeated graphs and streams."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import Layer, same_bits

import machete_aot as machete
from build_kernels.catalogue import typed_schedules

pytestmark = pytest.mark.gpu

EVEN = [s.name for types, s in typed_schedules() if types.name == "bf16_u4b8" and s.even_ctas]
N, K = 17_040, 1_096  # more 128-row tiles than SMs, and K that ends inside a unit


def fill_free_memory(value: float) -> None:
    """Leaves ``value`` in memory that the allocator will hand out next."""
    torch.full((64 << 20,), value, device="cuda")
    torch.cuda.synchronize()


@pytest.mark.parametrize("schedule", EVEN)
@pytest.mark.parametrize("m", [3, 130])
def test_what_the_workspace_held_does_not_matter(schedule: str, m: int) -> None:
    layer = Layer(N, K, 64, torch.bfloat16)
    a = layer.acts(m)
    expected = layer.gemm(a, schedule=schedule)
    assert layer.error(expected, layer.expected(a)) <= 1
    for value in (float("nan"), 0.0, 1.0):
        fill_free_memory(value)
        assert same_bits(layer.gemm(a, schedule=schedule), expected)


def test_a_graph_that_is_replayed_finds_no_flag_of_its_last_run() -> None:
    schedule = next(name for name in EVEN if "128x64x" in name)
    layer = Layer(N, K, 64, torch.bfloat16)
    a = layer.acts(40)
    machete.warmup(torch.bfloat16, machete.u4b8, schedules=[schedule])
    layer.gemm(a, schedule=schedule)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.gemm(a, schedule=schedule)
    for _ in range(20):
        a.copy_(torch.randn_like(a))
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, layer.gemm(a, schedule=schedule))


def test_two_streams_do_not_share_a_workspace() -> None:
    schedule = next(name for name in EVEN if "128x64x" in name)
    layer = Layer(N, K, 64, torch.bfloat16)
    inputs = [layer.acts(40) for _ in range(2)]
    expected = [layer.gemm(a, schedule=schedule) for a in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for index, (a, stream) in enumerate(zip(inputs, streams, strict=True)):
            with torch.cuda.stream(stream):
                found[index].append(layer.gemm(a, schedule=schedule))
    torch.cuda.synchronize()
    for outs, wanted in zip(found, expected, strict=True):
        assert all(same_bits(out, wanted) for out in outs)
