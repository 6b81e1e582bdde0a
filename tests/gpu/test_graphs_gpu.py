# SPDX-License-Identifier: Apache-2.0
"""Products inside other programs on a GPU: what torch.compile, torch.export and autocast make of them, and what a CUDA
graph of them holds. Results are compared bit for bit: the operations between products round alike, fused or not.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from gpu_layers import DTYPES, Layer, same_bits

import machete_aot as machete
from machete_aot import calls, driver, kernel, product
from machete_aot.nn import MacheteLinear
from machete_aot.nn.fuse import merge_gate_up

pytestmark = pytest.mark.gpu

BF16, FP16 = DTYPES
HIDDEN, INNER, GROUP = 512, 768, 128
PRODUCTS = 4  # of a block


def linear(k: int, n: int, dtype: torch.dtype = BF16, gain: float = 1.0, bias: float = 0.0) -> MacheteLinear:
    weights = torch.nn.Linear(k, n, dtype=dtype)
    torch.nn.init.normal_(weights.weight, std=gain * k**-0.5)
    torch.nn.init.constant_(weights.bias, bias)
    return MacheteLinear.from_float(weights, machete.u4b8, GROUP).cuda()


class Products(torch.nn.Module):
    """The four products of a decoder layer, one after another: one reads a part of the rows of the one before.

    What goes in comes out at about the same size, so that many can follow each other: gates are all near 1.
    """

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.qkv, self.o = linear(HIDDEN, HIDDEN + 256, dtype), linear(HIDDEN, HIDDEN, dtype)
        gate, up = linear(HIDDEN, INNER, dtype, gain=0.1, bias=1.28), linear(HIDDEN, INNER, dtype)
        self.gate_up, self.down = merge_gate_up(gate, up), linear(INNER, HIDDEN, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up(self.o(self.qkv(x)[..., :HIDDEN])))


class Block(Products):
    """The same with other operations between: one rounded sum at most, because a compiler that fuses two skips one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(self.qkv(x)[..., :HIDDEN].relu() * 2)
        return self.down(self.gate_up(x * 0.5).relu()).relu()


def acts(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, device="cuda").to(dtype)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(1)
    with torch.no_grad():
        yield


@pytest.fixture
def inductor() -> Iterator[None]:
    """Skips where Inductor cannot compile for a GPU."""
    pytest.importorskip("triton", reason="Inductor needs triton")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("triton needs a C compiler")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it leaves the package as in a new process: no kernel is loaded, no call was made before."""

    def start_over() -> None:
        monkeypatch.setattr(kernel, "_cache", kernel.KernelCache())
        monkeypatch.setattr(calls, "known", calls.Calls())

    return start_over


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with every product that the host launches, or captures. A replayed graph adds none."""
    found: list[None] = []
    plain = product.gemm_on

    def gemm_on(*arguments: Any, **options: Any) -> torch.Tensor:
        found.append(None)
        return plain(*arguments, **options)

    monkeypatch.setattr(product, "gemm_on", gemm_on)
    return found


# ---------------------------------------------------------------- torch.compile


def test_one_compilation_for_any_number_of_tokens(inductor: None) -> None:
    block = Block()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=compiles)
    for m in (2, 7, 64, 300, 1025):
        x = acts(m)
        assert same_bits(compiled(x), block(x)), m
    assert compiles.frame_count == 1


def test_compiled_with_everything_and_out(inductor: None) -> None:
    """Into a tensor that the graph goes on to use: the compiler must see that it is written."""
    layer = Layer(HIDDEN, HIDDEN, 64, BF16, b_type=machete.u4, zeros="int")
    a, out = layer.acts(2, 5), torch.empty(2, 5, HIDDEN, device="cuda")
    bias, channel_scales, token_scales = layer.bias(), layer.channel_scales(), layer.token_scales(10)

    def run(a: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"bias": bias, "channel_scales": channel_scales, "token_scales": token_scales.view(2, 5)}
        layer.gemm(a, out=out, out_dtype=torch.float32, **options)
        return out * 2, layer.gemm(a, activation="swiglu", **options)

    compiled = torch.compile(run, fullgraph=True)
    for _ in range(2):
        a.copy_(layer.acts(2, 5))
        found, found_out = compiled(a, out), out.clone()
        expected = run(a, out)
        assert all(map(same_bits, found, expected)) and same_bits(found_out, out)


@pytest.mark.parametrize("warm", [True, False])
def test_reduce_overhead(warm: bool, inductor: None, forget: Callable[[], None], launched: list[None]) -> None:
    """Graphs that torch.compile captures by itself, after ``warmup`` and without: it runs a function before that."""
    blocks = torch.nn.Sequential(Block(), Block())
    tokens = (4, 33) if warm else (16,)
    inputs = [[acts(m) for _ in range(6)] for m in tokens]
    expected = [[blocks(x) for x in xs] for xs in inputs]
    forget()
    if warm:
        machete.warmup(blocks, tokens=tokens)
    compiled = torch.compile(blocks, fullgraph=True, dynamic=warm, mode="reduce-overhead")
    for m, xs, wanted in zip(tokens, inputs, expected, strict=True):
        counts = []
        for x, want in zip(xs, wanted, strict=True):
            before = len(launched)
            assert same_bits(compiled(x), want), (m, counts)
            counts.append(len(launched) - before)
        assert counts[0] >= 2 * PRODUCTS, counts
        assert counts[-3:] == [0, 0, 0], f"M = {m}: the graph was not replayed, products launched: {counts}"
    again = compiled(inputs[0][0])  # after graphs of another size
    assert same_bits(again, expected[0][0])


# ---------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("tokens", [(5,), None], ids=str)
def test_a_capture_right_after_the_model_s_warmup(tokens: tuple[int, ...] | None, forget: Callable[[], None]) -> None:
    block, x = Block(), acts(5)
    block(x)  # torch's own kernels
    forget()
    loaded = machete.warmup(block, tokens=tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(x)
    assert len(kernel._cache._ready) == len(loaded)
    for _ in range(3):
        x.copy_(acts(5))
        graph.replay()
        assert same_bits(out, block(x))


def captured(run: Callable[[], Any]) -> tuple[Any, torch.cuda.CUDAGraph, list[str]]:
    """A graph of ``run``: what run returned, the graph, the kinds of its nodes. Skips where torch does not show it."""
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        pytest.skip(f"torch {torch.__version__} does not show the nodes of a captured graph; 2.8 does")
    run()  # loads the kernels
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = run()
    raw = driver.api().CUgraph(graph.raw_cuda_graph())
    _, count = driver.call("cuGraphGetNodes", raw, 0)
    nodes, _ = driver.call("cuGraphGetNodes", raw, count)
    kinds = [driver.call("cuGraphNodeGetType", node).name.removeprefix("CU_GRAPH_NODE_TYPE_") for node in nodes]
    return result, graph, kinds


@pytest.mark.parametrize("m", [1, 16, 64, 300, 1024])
def test_a_chain_of_8_layers_is_32_kernels(m: int) -> None:
    """No memset, no copy, no kernel but the products, and between them nothing waits for the host."""
    layers = torch.nn.Sequential(*(Products() for _ in range(8)))
    x = acts(m)
    out, graph, nodes = captured(lambda: layers(x))
    assert nodes == ["KERNEL"] * 8 * PRODUCTS
    for _ in range(3):
        x.copy_(acts(m))
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, layers(x))
    assert 0.1 < float(out.float().std()) < 10


def test_a_product_is_one_kernel_whatever_it_does() -> None:
    """With every schedule, even shares and their workspace among them, and every kind of weights and results."""
    names = machete.supported_schedules(BF16, machete.u4b8, GROUP)
    assert any("_e" in name for name in names)
    plain = Layer(1040, 4096, GROUP, BF16)
    general = Layer(1040, 4096, 32, BF16, b_type=machete.u4, zeros="int")
    floating = Layer(1040, 4096, 64, FP16, b_type=machete.u8, zeros="float")
    m = 70
    a, half = plain.acts(2 * m)[::2], floating.acts(m)  # rows apart
    more = {"bias": plain.bias(), "channel_scales": plain.channel_scales(), "token_scales": plain.token_scales(m)}

    def run() -> list[torch.Tensor]:
        return [
            *(plain.gemm(a, schedule=name) for name in names),
            general.gemm(a, activation="swiglu", out_dtype=torch.float32, **more),
            general.gemm(a, batch_invariant=True),
            floating.gemm(half, out_dtype=BF16),
        ]

    outs, graph, nodes = captured(run)
    assert nodes == ["KERNEL"] * (len(names) + 3)
    expected = run()
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    assert all(map(same_bits, outs, expected))


def test_a_graph_s_nodes_are_all_seen() -> None:
    """What the two tests above look for would be found."""
    block, x = Products(), acts(3)
    kept = torch.empty_like(x)
    _, _, nodes = captured(lambda: kept.copy_(block(x)))
    assert len(nodes) == PRODUCTS + 1


# ---------------------------------------------------------------- torch.export, autocast


def test_exported() -> None:
    block = Block()
    tokens = torch.export.Dim("tokens", min=2, max=2048)
    program = torch.export.export(block, (acts(5),), dynamic_shapes={"x": {0: tokens}})
    assert str(program.graph).count("machete_aot.gemm") == PRODUCTS
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for m in (2, 5, 100, 1500):
        x = acts(m)
        assert same_bits(loaded(x), block(x)), m


def test_autocast() -> None:
    """It decides about torch's layers; a product is computed in the dtype of its activations."""
    block, x = Block(), acts(6)
    expected = block(x)
    first, halves, y = torch.nn.Linear(64, HIDDEN).cuda(), Block(FP16), torch.randn(6, 64, device="cuda")
    by_hand = halves(first(y).half()).double()
    model = torch.nn.Sequential(first, halves)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cuda", dtype=FP16):
        assert same_bits(block(x), expected)
        for found in (model(y), compiled(y)):
            assert found.dtype == FP16
            assert float((found - by_hand).norm()) < 1e-2 * float(by_hand.norm())
        with pytest.raises(machete.ArgumentError, match="float32"):
            block(x.float())
