# SPDX-License-Identifier: Apache-2.0
"""Products on a GPU: correct over the whole grid of shapes, repeatable, and nothing but the output is written."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import DTYPES, Guarded, Layer, same_bits

import machete_aot as machete
from build_kernels.catalogue import typed_schedules

pytestmark = pytest.mark.gpu

SCHEDULES = [schedule.name for types, schedule in typed_schedules() if types.name == "bf16_u4b8"]
TOKENS = (1, 2, 7, 16, 17, 33, 64, 100, 256, 257, 1000, 4096)
LAYERS = ((6144, 4096), (8192, 8192), (4096, 14336), (128, 128), (4224, 4160), (4304, 1152), (576, 7168))
RAGGED = ((1, 1), (7, 8), (64, 64), (65, 130), (100, 1000), (192, 72), (250, 4100), (1032, 321), (130, 2112))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [-1, 64, 128])
@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_acceptance(n: int, k: int, group: int, dtype: torch.dtype) -> None:
    layer = Layer(n, k, group, dtype)
    a = layer.acts(max(TOKENS))
    expected = layer.expected(a)
    bad = {}
    for m in TOKENS:
        first, second = Guarded(m, n, dtype), Guarded(m, n, dtype)
        for guarded in (first, second):
            layer.gemm(a[:m], out=guarded.out)
            guarded.check()
        error = layer.error(first.out, expected[:m])
        if error > 1 or not same_bits(first.out, second.out):
            bad[m] = f"error {error:.3f} of the tolerance, repeatable: {same_bits(first.out, second.out)}"
    assert bad == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name: str, dtype: torch.dtype) -> None:
    bad = {}
    for n, k, group in ((512, 1024, 128), (4304, 1152, 64), (200, 4160, -1), (1000, 448, 192), (96, 60, 128)):
        layer = Layer(n, k, group, dtype)
        for m in (1, 5, 64, 70, 300):
            a, bias = layer.acts(m), layer.bias()
            runs = [Guarded(m, n, dtype, n + 5 * (n % 8 != 0)) for _ in range(3)]
            for guarded in runs:
                layer.gemm(a, bias=bias, out=guarded.out, schedule=name)
                guarded.check()
            error = layer.error(runs[0].out, layer.expected(a, bias))
            repeatable = all(same_bits(runs[0].out, other.out) for other in runs)
            if error > 1 or not repeatable:
                bad[m, n, k, group] = f"error {error:.3f} of the tolerance, repeatable: {repeatable}"
    assert bad == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), RAGGED)
def test_ragged(n: int, k: int, dtype: torch.dtype) -> None:
    for group in (-1, 64, 128, 320):
        layer = Layer(n, k, group, dtype)
        for m in (1, 3, 20, 129):
            a, guarded = layer.acts(m), Guarded(m, n, dtype)
            layer.gemm(a, out=guarded.out)
            guarded.check()
            assert layer.error(guarded.out, layer.expected(a)) <= 1, (m, n, k, group)


def test_agrees_with_the_reference() -> None:
    layer = Layer(320, 704, 128, torch.bfloat16)
    a, bias = layer.acts(2, 9), layer.bias()
    reference = machete.reference.gemm(a, layer.b, machete.u4b8, layer.scales, bias=bias)
    assert layer.error(layer.gemm(a, bias=bias), reference.double()) <= 1
    cpu = machete.gemm(a.cpu(), layer.b.cpu(), machete.u4b8, layer.scales.cpu(), bias=bias.cpu())
    assert layer.error(cpu.cuda(), reference.double()) <= 1


@pytest.mark.parametrize(("stride", "offset"), [(512, 0), (520, 0), (514, 0), (513, 0), (515, 1), (512, 1), (512, 2)])
@pytest.mark.parametrize("m", [1, 9, 200])
def test_output_strides_and_alignment(m: int, stride: int, offset: int) -> None:
    layer = Layer(512, 768, 128, torch.bfloat16)
    a, guarded = layer.acts(m), Guarded(m, 512, torch.bfloat16, stride, offset)
    assert layer.gemm(a, out=guarded.out) is guarded.out
    guarded.check()
    assert same_bits(guarded.out, layer.gemm(a))


@pytest.mark.parametrize("m", [1, 6, 300])
def test_activations_as_they_come(m: int) -> None:
    layer = Layer(384, 1024, 128, torch.float16)
    a = layer.acts(m)
    expected = layer.gemm(a)
    wide = torch.full((m, 1100), float("nan"), device="cuda", dtype=a.dtype)
    for offset, width in ((0, 1100), (8, 1100), (1, 1100), (0, 1048), (3, 1033)):
        view = wide[:, :width].as_strided((m, 1024), (width, 1), offset)
        view.copy_(a)
        assert same_bits(layer.gemm(view), expected), (offset, width)
    assert same_bits(layer.gemm(a.t().contiguous().t()), expected)
    assert same_bits(layer.gemm(a.repeat_interleave(2, 1)[:, ::2]), expected)
    row = a[:1].expand(m, 1024)
    assert same_bits(layer.gemm(row), expected[:1].expand(m, 384)) or m > 1
    assert layer.error(layer.gemm(row), layer.expected(row)) <= 1


def test_scales_as_they_come() -> None:
    layer = Layer(200, 1024, 128, torch.bfloat16)
    a = layer.acts(3)
    expected, scales = layer.gemm(a), layer.scales
    wide = torch.zeros(8, 208, device="cuda", dtype=torch.bfloat16)
    wide[:, 4:204] = scales
    for view in (wide[:, 4:204], torch.cat([scales, scales], 1)[:, :200], scales.t().contiguous().t()):
        layer.scales = view
        assert same_bits(layer.gemm(a), expected)


def test_batches() -> None:
    layer = Layer(256, 512, 64, torch.bfloat16)
    a = layer.acts(3, 1, 5)
    flat = layer.gemm(a.view(15, 512))
    assert same_bits(layer.gemm(a), flat.view(3, 1, 5, 256))
    assert same_bits(layer.gemm(a.transpose(0, 2)), flat.view(3, 1, 5, 256).transpose(0, 2))
    assert layer.gemm(a[0, 0, 0]).shape == (256,)
    out = torch.empty(3, 1, 5, 256, device="cuda", dtype=torch.bfloat16)
    assert layer.gemm(a, out=out) is out
    assert same_bits(out, flat.view(3, 1, 5, 256))


def test_no_rows() -> None:
    layer = Layer(256, 512, 64, torch.bfloat16)
    assert layer.gemm(layer.acts(0)).shape == (0, 256)
    assert layer.gemm(layer.acts(2, 0, 3)).shape == (2, 0, 3, 256)


@pytest.mark.parametrize("m", [1, 100])
def test_bias(m: int) -> None:
    layer = Layer(260, 512, 64, torch.float16)
    a, bias = layer.acts(m), layer.bias()
    expected = layer.gemm(a, bias=bias)
    assert layer.error(expected, layer.expected(a, bias)) <= 1
    assert same_bits(layer.gemm(a, bias=torch.stack([bias, bias], 1)[:, 0]), expected)
    assert same_bits(layer.gemm(a, bias=torch.cat([bias[:1], bias])[1:]), expected)


def test_what_is_refused() -> None:
    layer = Layer(256, 512, 64, torch.bfloat16)
    a = layer.acts(2)
    with pytest.raises(machete.UnsupportedError, match="no kernels for"):  # the type has a zero point already
        layer.gemm(a, b_zeros=layer.scales)
    with pytest.raises(machete.ArgumentError, match="u4b8 has a zero point of its own"):
        layer.gemm(a, b_zeros=layer.scales.byte())
    with pytest.raises(machete.ArgumentError, match="multiple of 32"):
        layer.gemm(a, b_group_size=48)
    with pytest.raises(machete.UnsupportedError, match="kernels for weights of type"):
        layer.b_type = machete.ScalarType("u4b7", 4, 7)
        layer.gemm(a)
    layer.b_type = machete.u4b8
    with pytest.raises(machete.ArgumentError, match="no schedule 'nonsense'"):
        layer.gemm(a, schedule="nonsense")
    with pytest.raises(machete.ArgumentError, match="one device"):
        layer.gemm(a.cpu())


@pytest.mark.parametrize("m", [1, 48])
def test_weights_that_change_between_calls(m: int) -> None:
    """A launch that overlaps must not read weights or scales which the kernels before it have yet to write."""
    layer, other = (Layer(8192, 4096, 128, torch.bfloat16, seed) for seed in (1, 2))
    a = layer.acts(m)
    operands = [(layer.b.clone(), layer.scales.clone()), (other.b.clone(), other.scales.clone())]
    expected = [layer.gemm(a, overlap=False), other.gemm(a, overlap=False)]
    neighbour = Layer(4096, 4096, 128, torch.bfloat16, 3)
    slow = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        layer.gemm(a), neighbour.gemm(a)  # from here on both may overlap
    outs = []
    for i in range(40):
        slow = slow @ slow
        b, scales = operands[i % 2]
        layer.b.copy_(b)
        if i % 4 < 2:
            neighbour.gemm(a)  # lets the next kernel in before it has waited itself
        layer.scales.copy_(scales)
        outs.append([layer.gemm(a) for _ in range(3)])
    bad = [(i, j) for i, three in enumerate(outs) for j, out in enumerate(three) if not same_bits(out, expected[i % 2])]
    assert bad == []


def test_dependent_products_overlap_safely() -> None:
    """Activations are the previous product's output: they must be read after the wait."""
    layers = [Layer(2048, 2048, 128, torch.bfloat16, seed) for seed in range(4)]
    for layer in layers:
        layer.scales.div_(4)
    a = layers[0].acts(16)

    def chain(overlap: bool) -> torch.Tensor:
        x = a
        for _ in range(5):
            for layer in layers:
                x = layer.gemm(x, overlap=overlap)
        return x

    expected = chain(False)
    assert torch.isfinite(expected).all()
    assert all(same_bits(chain(True), expected) for _ in range(20))
