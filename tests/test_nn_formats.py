# SPDX-License-Identifier: Apache-2.0
"""Layers of checkpoint formats against dequantised weights that follow from the formats' definitions alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from checkpoints import BF16, CASES, FP16, Case, make
from machete_aot import nn
from machete_aot.errors import ArgumentError, UnsupportedError
from machete_aot.nn import MacheteLinear
from machete_aot.nn.bits import pack_rows, unpack_words
from machete_aot.scalar_type import SCALAR_TYPES, u4, u4b8, u8, u8b128

N, K = 80, 256


def layer_of(
    case: Case, stored: checkpoints.Layer, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> MacheteLinear:
    if case.format == "HQQ":
        return MacheteLinear.from_hqq(stored.tensors["W_q"], stored.options["meta"], bias, dtype=dtype)
    build = {"AWQ": MacheteLinear.from_awq, "compressed-tensors": MacheteLinear.from_compressed_tensors}
    return build.get(case.format, MacheteLinear.from_gptq)(**stored.tensors, **stored.options, bias=bias, dtype=dtype)


def weights_of(layer: MacheteLinear) -> torch.Tensor:
    """[K, N] as the product has them: exact, because every sum has one term."""
    return layer(torch.eye(layer.in_features, dtype=layer.scales.dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights(case: Case, dtype: torch.dtype) -> None:
    stored = make(case, N, K, dtype=dtype)
    layer = layer_of(case, stored, dtype)
    expected = stored.weights(dtype)
    if case.zeros == "floating":  # code * scale - zero * scale, three roundings
        step = {BF16: 2.0**-8, FP16: 2.0**-11}[dtype]
        largest = float(torch.from_numpy(stored.scales).max()) * (1 << case.bits)
        torch.testing.assert_close(weights_of(layer), expected, rtol=0, atol=2 * step * largest)
    else:
        assert torch.equal(weights_of(layer), expected)
    symmetric, plain = (u4b8, u4) if case.bits == 4 else (u8b128, u8)
    kind = {"symmetric": "none", "integer": "int", "floating": "float"}[case.zeros]
    assert (layer.b_type, layer.zeros_kind) == (symmetric if kind == "none" else plain, kind)
    assert (layer.perm is not None) == case.act_order
    assert layer.group_size == case.group and (layer.in_features, layer.out_features) == (K, N)


@pytest.mark.parametrize("case", [c for c in CASES if c.group == 32 and c.bits == 4 and c.zeros == "integer"], ids=str)
def test_bias_and_activations(case: Case) -> None:
    stored = make(case, N, K)
    bias = torch.randn(N).to(FP16)
    layer = layer_of(case, stored, FP16, bias)
    x = torch.randn(3, 2, K).to(FP16)
    expected = x.double() @ stored.weights(FP16).double() + bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=1e-3)


def test_gptq_zero_point_of_16_is_kept() -> None:
    case = Case("GPTQ", 4, 32, False, "integer")
    stored = make(case, N, K)
    assert stored.points.max() == 16
    layer = layer_of(case, stored, FP16)
    assert layer.zeros is not None and int(layer.zeros.max()) == 16


@pytest.mark.parametrize("word", [0x77777777, -0x77777778])  # 7 as version 1 has it, 8 as some writers do
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_that_says_it_is_symmetric(word: int, version: int) -> None:
    stored = make(Case("GPTQ", 4, 64, False, "symmetric"), 16, 64)
    stored.tensors["qzeros"] = torch.full((1, 2), word, dtype=torch.int32)
    layer = MacheteLinear.from_gptq(**stored.tensors, group_size=64, version=version, symmetric=True, dtype=FP16)
    assert layer.b_type == u4b8 and torch.equal(weights_of(layer), stored.weights(FP16))


def test_gptq_of_8_bits_with_a_zero_point_of_256() -> None:
    stored = make(Case("GPTQ", 8, 64, False, "integer"), 16, 64)
    stored.tensors["qzeros"][0, 0] = -1
    with pytest.raises(ArgumentError, match=r"zero points are \d+ to 256; only 0 to 255"):
        MacheteLinear.from_gptq(**stored.tensors, **stored.options)


def test_act_order_keeps_the_order_within_a_group_and_vanishes_where_there_is_none() -> None:
    g_idx = torch.tensor([1, 0] * 32)
    stored = make(Case("GPTQ", 4, 32, True, "symmetric"), 16, 64)
    stored.tensors["g_idx"] = g_idx
    weights = nn.from_gptq(**stored.tensors, group_size=32)
    assert weights.perm is not None
    assert weights.perm.tolist() == [*range(1, 64, 2), *range(0, 64, 2)]
    stored.tensors["g_idx"] = torch.arange(64) // 32
    assert nn.from_gptq(**stored.tensors, group_size=32).perm is None
    stored.tensors["g_idx"] = torch.arange(64) // 16
    with pytest.raises(ArgumentError, match="g_idx must have 32 k in each group"):
        nn.from_gptq(**stored.tensors, group_size=32)
    stored.tensors["g_idx"] = torch.arange(63)
    with pytest.raises(ArgumentError, match=r"g_idx must be \[64\]"):
        nn.from_gptq(**stored.tensors, group_size=32)


def test_compressed_tensors_variants() -> None:
    """K that does not fill the last word, signed int8 zero points, one scale for all, an unused g_idx."""
    for k in (100, 256):
        stored = make(Case("compressed-tensors", 4, -1, False, "integer"), N, k)
        layer = MacheteLinear.from_compressed_tensors(**stored.tensors, group_size=None, dtype=FP16)
        assert torch.equal(weights_of(layer), stored.weights(FP16))
    stored = make(Case("compressed-tensors", 4, 64, False, "integer"), N, K)
    old = dict(stored.tensors, weight_zero_point=torch.from_numpy(stored.points.T.astype("int8") - 8))
    old["weight_g_idx"] = torch.full((K,), -1)
    layer = MacheteLinear.from_compressed_tensors(**old, group_size=64, dtype=FP16)
    assert torch.equal(weights_of(layer), stored.weights(FP16))
    one = make(Case("compressed-tensors", 8, -1, False, "symmetric"), N, K)
    one.scales[:] = one.scales[0, 0]
    del one.tensors["weight_shape"]
    one.tensors["weight_scale"] = one.tensors["weight_scale"][:1, 0]
    layer = MacheteLinear.from_compressed_tensors(**one.tensors, bits=8, group_size=-1, dtype=FP16)
    assert torch.equal(weights_of(layer), one.weights(FP16))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 100, -1])
@pytest.mark.parametrize("b_type", SCALAR_TYPES.values(), ids=str)
def test_round_to_nearest(b_type: Any, group: int, symmetric: bool) -> None:
    linear = torch.nn.Linear(96, 40).to(BF16)
    group = 96 if group == 100 else group
    if b_type.bias and not symmetric:
        with pytest.raises(ArgumentError, match=f"{b_type} is symmetric; pass u"):
            MacheteLinear.from_float(linear, b_type, group, symmetric)
        return
    layer = MacheteLinear.from_float(linear, b_type, group, symmetric)
    assert torch.equal(layer.bias, linear.bias)
    layer.bias = None
    found, wanted = weights_of(layer).double(), linear.weight.detach().t().double()
    step = layer.scales.double().repeat_interleave(96 if layer.group_size == -1 else layer.group_size, dim=0)
    # Half a step, and at the end of the range what the scale's own rounding takes away.
    bound = step * (0.5 + (1 << b_type.bits) / 2**8) + found.abs() / 2**8
    assert bool(((found - wanted).abs() <= bound).all())
    assert layer.zeros_kind == ("none" if b_type.bias else "int")


def test_round_to_nearest_of_zeros_and_of_multiples() -> None:
    zero = MacheteLinear.from_float(torch.nn.Linear(64, 8, bias=False).to(BF16).requires_grad_(False), u4, 32)
    assert zero.bias is None
    linear = torch.nn.Linear(64, 8, bias=False, dtype=BF16)
    linear.weight.data.zero_()
    assert not weights_of(MacheteLinear.from_float(linear, u4, 32)).any()
    linear.weight.data[:] = torch.arange(-8, 8).repeat(4) / 4
    for b_type in (u4, u4b8):
        assert torch.equal(weights_of(MacheteLinear.from_float(linear, b_type, 32)), linear.weight.t())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_packing_is_the_inverse_of_unpacking(bits: int, rows: int) -> None:
    packed = torch.randint(-(2**31), 2**31, (rows, 5), dtype=torch.int32)
    assert torch.equal(pack_rows(unpack_words(packed, bits, 0), bits), packed)
    assert torch.equal(pack_rows(unpack_words(packed, bits, 1).t(), bits).t(), packed)


STORED = make(Case("GPTQ", 4, 64, False, "integer"), N, K)
GPTQ = STORED.tensors
AWQ = make(Case("AWQ", 4, 64, False, "integer"), N, K).tensors
PACKED = make(Case("compressed-tensors", 4, 64, False, "integer"), N, K).tensors
META = make(Case("HQQ", 4, 64, False, "floating"), N, K).options["meta"]
W_Q = torch.zeros(N * 4 // 2, 64, dtype=torch.uint8)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "bits": (lambda: nn.from_gptq(**GPTQ, bits=3), UnsupportedError, "GPTQ weights of 3 bits; weights of 4 and 8"),
    "version": (lambda: nn.from_gptq(**GPTQ, version=3), ArgumentError, "version must be 1 or 2"),
    "groups": (lambda: nn.from_gptq(**GPTQ), ArgumentError, "K = 256 has 2 groups of 128, but there are scales of 4"),
    "zeros": (
        lambda: nn.from_gptq(**dict(GPTQ, qzeros=GPTQ["qzeros"].t()), group_size=64),
        ArgumentError, r"qzeros must have shape \(4, 10\), got \(10, 4\)",
    ),
    "matrix": (lambda: nn.from_gptq(**dict(GPTQ, scales=GPTQ["scales"][0])), ArgumentError, "must be matrices"),
    "awq bits": (lambda: nn.from_awq(**AWQ, bits=8), UnsupportedError, "AWQ weights of 8 bits; the format has 4"),
    "awq scales": (
        lambda: nn.from_awq(**dict(AWQ, scales=AWQ["scales"][:, :8]), group_size=64),
        ArgumentError, r"scales must have shape \(4, 80\)",
    ),
    "packed shape": (
        lambda: nn.from_compressed_tensors(**dict(PACKED, weight_shape=(N, 300)), group_size=64),
        ArgumentError, r"weight_packed must have shape \(80, 38\)",
    ),
    "packed zeros": (
        lambda: nn.from_compressed_tensors(**dict(PACKED, weight_zero_point=W_Q[:, :4].int()), group_size=64),
        ArgumentError, r"weight_zero_point must have shape \(10, 4\)",
    ),
    "packed dtype": (
        lambda: nn.from_awq(**dict(AWQ, qweight=AWQ["qweight"].long()), group_size=64),
        ArgumentError, "packed codes must be an int32 matrix",
    ),
    "axis": (lambda: nn.from_hqq(W_Q, dict(META, axis=0)), UnsupportedError, "axis 0 run across outputs"),
    "hqq bits": (lambda: nn.from_hqq(W_Q, dict(META, nbits=2)), UnsupportedError, "HQQ weights of 2 bits"),
    "hqq packing": (lambda: nn.from_hqq(W_Q, dict(META, packing="4bit_32")), UnsupportedError, "packing '4bit_32'"),
    "hqq meta": (lambda: nn.from_hqq(W_Q, dict(META, quant_scale=True)), UnsupportedError, "quantised themselves"),
    "hqq scale": (lambda: nn.from_hqq(W_Q, dict(META, scale=torch.ones(3))), ArgumentError, "scale must have 320"),
    "hqq codes": (lambda: nn.from_hqq(W_Q[:9], META), ArgumentError, "the codes of W_q must have shape"),
    "group of 16": (
        lambda: MacheteLinear.from_float(torch.nn.Linear(64, 64).to(BF16), group_size=16),
        UnsupportedError, "groups of 16; a group size is a multiple of 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_the_documented_table_is_what_is_tested() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "models.md"
    assert checkpoints.support_table() in page.read_text(), "run python tests/checkpoints.py and copy its table"
