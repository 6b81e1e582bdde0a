# SPDX-License-Identifier: Apache-2.0
"""``permute_columns`` on a GPU: every bit is torch's, whatever the strides, in graphs, and in front of products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_layers import BITS, DTYPES, GUARD, POISON, Layer, same_bits

import machete_aot as machete
from machete_aot import kernel, overlap, permute
from machete_aot.nn import MacheteLinear
from machete_aot.permute import load_permute
from machete_aot.permute_abi import HELPER_ID
from machete_aot.qualify_permute import cases, run_case

pytestmark = pytest.mark.gpu

BF16, FP16 = DTYPES


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(3)
    with torch.no_grad():
        yield


def bits(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Elements of any bits, NaNs of all kinds among them."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device="cuda").view(dtype)


def shuffled(k: int) -> torch.Tensor:
    return torch.randperm(k, device="cuda").to(torch.int32)


def gathered(a: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """By torch, without interpreting the elements."""
    return a.view(torch.int16).index_select(-1, order).view(a.dtype)


def test_the_cases_of_the_qualification() -> None:
    generator = torch.Generator("cuda").manual_seed(5)
    for case in cases():
        assert run_case(case, generator) == (True, True, True), case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 8, 9, 255, 256, 257, 4095, 4096, 8200, 14336, 28680, 116_224, 116_240, 200_001])
def test_sizes(k: int, dtype: torch.dtype) -> None:
    """Both ways of gathering, CTAs with one thread at work and with all, rows that no shared memory holds."""
    order = shuffled(k)
    for m in (1, 2, 17, 133, 700):
        a = bits(m, k, dtype=dtype)
        assert same_bits(machete.permute_columns(a, order), gathered(a, order)), m


@pytest.mark.parametrize("m", [70_000, 300_000])
def test_more_rows_than_a_grid_has(m: int) -> None:
    for k in (1, 24, 300):
        a, order = bits(m, k), shuffled(k)
        assert same_bits(machete.permute_columns(a, order), gathered(a, order)), k


@pytest.mark.parametrize("left", [0, 1, 3, 8])
@pytest.mark.parametrize("right", [0, 1, 8])
def test_rows_apart_and_off_their_alignment(left: int, right: int) -> None:
    for m, k in ((1, 4096), (5, 104), (64, 4096), (300, 4100)):
        a = bits(2 * m, left + k + right)[::2, left : left + k]
        order = torch.cat([shuffled(k)[:1].repeat(left), shuffled(k)])[left:]
        buffer = torch.full((m + 2, GUARD + left + k + GUARD + right), POISON[2], dtype=BITS[2], device="cuda")
        inner = slice(1, -1), slice(GUARD + left, GUARD + left + k)
        out = buffer.view(BF16)[inner]
        assert machete.permute_columns(a, order, out) is out
        assert same_bits(out.contiguous(), gathered(a.contiguous(), order)), (m, k)
        buffer[inner] = POISON[2]
        assert bool((buffer == POISON[2]).all()), "something beside the output was written"


def test_operands_that_are_copied() -> None:
    a, order = bits(512, 40).t(), shuffled(1024)[::2] // 2
    assert same_bits(machete.permute_columns(a, order), gathered(a.contiguous(), order.contiguous()))
    batch = bits(2, 3, 512)
    assert same_bits(machete.permute_columns(batch, order), gathered(batch, order.contiguous()))
    assert machete.permute_columns(bits(0, 512), order.contiguous()).shape == (0, 512)


def test_elements_may_occur_twice() -> None:
    a, order = bits(9, 5000), torch.randint(5000, (5000,), device="cuda").to(torch.int32)
    assert same_bits(machete.permute_columns(a, order), gathered(a, order))


def test_the_operator() -> None:
    order = shuffled(512)
    for a in (bits(5, 512), bits(600, 512)):
        op = torch.ops.machete_aot.permute_columns
        assert same_bits(op(a, order), gathered(a, order))
        torch.library.opcheck(op, (torch.randn(a.shape, device="cuda").to(BF16), order))
        out = torch.empty_like(a)
        torch.ops.machete_aot.permute_columns_out(out, a, order)
        assert same_bits(out, gathered(a, order))


def test_mistakes() -> None:
    a, order = bits(3, 64), shuffled(64)
    for wrong in ((a, order.long()), (a, order[:-1]), (a, order.cpu()), (a.float(), order), (a, order, a)):
        with pytest.raises(machete.ArgumentError):
            machete.permute_columns(*wrong)


@pytest.mark.parametrize("m", [1, 16, 64, 600])
def test_captured(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before it is loaded; then what the graph does follows the input."""
    a, order = bits(m, 4096), shuffled(4096)
    monkeypatch.setattr(kernel, "_cache", kernel.KernelCache())
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(machete.CaptureError, match=HELPER_ID), torch.cuda.graph(graph):
        machete.permute_columns(a, order)
    machete.permute_columns(a, order)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = machete.permute_columns(a, order)
    for _ in range(3):
        a.copy_(bits(m, 4096))
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, gathered(a, order))


def chain(layer: Layer, order: torch.Tensor, x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Products of gathered activations, each of the result of the one before."""
    found = []
    for _ in range(count):
        gather = machete.permute_columns(x, order)
        x = layer.gemm(gather)
        found += [gather, x]
    return found


@pytest.mark.parametrize("m", [1, 8, 64, 300])
@pytest.mark.parametrize("captured", [False, True])
def test_in_front_of_products_that_overlap(m: int, captured: bool) -> None:
    """Gather and product read what the kernel before them writes, which may still run when they start."""
    k, count = 2048, 24
    layer, order = Layer(k, k, 128, BF16), shuffled(k)
    x = layer.acts(m)
    overlap.set_overlap(False)
    expected = [t.clone() for t in chain(layer, order, x, count)]
    overlap.set_overlap(True)
    chain(layer, order, x, 2)  # now weights and order have been waited for
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            found = chain(layer, order, x, count)
    for _ in range(20):
        if captured:
            for t in found:
                t.fill_(float("nan"))
            graph.replay()
        else:
            found = chain(layer, order, x, count)
        assert all(map(same_bits, found, expected))


def test_an_order_that_is_written_by_the_kernel_before() -> None:
    """The launch after a write waits, so that it reads what was written."""
    a, k = bits(4, 8192), 8192
    order, orders = shuffled(k), [shuffled(k) for _ in range(8)]
    busy = torch.randn(4096, 4096, device="cuda")
    for new in orders:
        machete.permute_columns(a, order)
        torch.mm(busy, busy)
        order.copy_(new)
        assert same_bits(machete.permute_columns(a, order), gathered(a, new))


@pytest.mark.parametrize("m", [1, 33, 500])
def test_layers_with_act_order(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what the layer gives on activations that torch has gathered."""
    k, n = 1024, 512
    linear = torch.nn.Linear(k, n, dtype=BF16)
    plain = MacheteLinear.from_float(linear, machete.u4b8, 128).cuda()
    ordered = MacheteLinear.from_packed(
        plain.qweight, plain.b_type, plain.scales, None, k, 128, plain.bias, shuffled(k)
    )
    seen: list[str] = []

    def load(index: int, stream: int) -> kernel.LoadedKernel:
        found = load_permute(index, stream)
        seen.append(found.info.id)
        return found

    monkeypatch.setattr(permute, "load_permute", load)
    x = torch.randn(m, k, device="cuda").to(BF16)
    assert same_bits(ordered(x), plain(gathered(x, ordered.perm)))
    assert seen == [HELPER_ID]
    assert HELPER_ID in machete.warmup(ordered, tokens=[m])


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_on_another_device_than_the_current_one() -> None:
    a, order = bits(40, 4096), shuffled(4096)
    other = machete.permute_columns(a.to("cuda:1"), order.to("cuda:1"))
    assert other.get_device() == 1 and torch.cuda.current_device() == 0
    assert same_bits(other.to("cuda:0"), gathered(a, order))


def test_on_another_stream() -> None:
    a, order = bits(400, 8192), shuffled(8192)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = machete.permute_columns(a, order)
    stream.synchronize()
    assert same_bits(found, gathered(a, order))
