# SPDX-License-Identifier: Apache-2.0
"""Gate and up as one product: the interleaving, the prepacked bytes, and the product against two separate ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import machete_aot as machete
from machete_aot import prepack, reference
from machete_aot.errors import ArgumentError
from machete_aot.scalar_type import SCALAR_TYPES, ScalarType, u4, u4b8, u8
from quantised import gptq, random_codes

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("shape", [(8,), (24,), (3, 16), (2, 0, 8), (2, 3, 40)])
def test_blocks_of_eight_in_turn(shape: tuple[int, ...]) -> None:
    size = shape[-1]
    gate = torch.arange(torch.Size(shape).numel()).view(shape)
    up = -1 - gate
    found = machete.interleave_gate_up(gate, up)
    assert found.shape == (*shape[:-1], 2 * size)
    for i in range(size):
        column = 16 * (i // 8) + i % 8
        assert torch.equal(found[..., column], gate[..., i]) and torch.equal(found[..., column + 8], up[..., i])


@pytest.mark.parametrize("chunk", [1, 1 << 30])
@pytest.mark.parametrize(("size", "k"), [(8, 8), (72, 100), (200, 130)])
@pytest.mark.parametrize("type_", SCALAR_TYPES.values(), ids=str)
def test_prepacked_codes(type_: ScalarType, size: int, k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "CHUNK_BYTES", chunk)
    gate, up = (random_codes(k, size, type_.bits, seed) for seed in (1, 2))
    packed = machete.prepack_gate_up(gptq(gate, type_.bits), gptq(up, type_.bits), type_, FP16, k=k)
    codes = machete.unpack_b(packed, type_, 2 * size, k).numpy()
    blocks = codes.reshape(k, size // 8, 2, 8)
    np.testing.assert_array_equal(blocks[:, :, 0].reshape(k, size), gate)
    np.testing.assert_array_equal(blocks[:, :, 1].reshape(k, size), up)


def test_strides_and_the_default_k() -> None:
    gate, up = (gptq(random_codes(64, 40, 4, seed), 4) for seed in (3, 4))
    expected = machete.prepack_gate_up(gate, up, u4b8)
    both = torch.cat([gate, up], dim=1)  # as a fused checkpoint has them
    assert torch.equal(machete.prepack_gate_up(both[:, :40], both[:, 40:].t().contiguous().t(), u4b8, FP16), expected)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("integer_zeros", [False, True])
@pytest.mark.parametrize("type_", [u4, u8], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_against_two_products(
    dtype: torch.dtype, type_: ScalarType, integer_zeros: bool, batch_invariant: bool
) -> None:
    m, size, k, group = 5, 72, 160, 64
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(m, k, generator=generator).to(dtype)
    parts = []
    for seed in (6, 7):
        w_q = gptq(random_codes(k, size, type_.bits, seed), type_.bits)
        scales = (torch.rand(3, size, generator=generator) / (1 << type_.bits)).to(dtype)
        steps = torch.randint(1 << type_.bits, (3, size), generator=generator, dtype=torch.uint8)
        zeros = steps if integer_zeros else (steps * scales).to(dtype)
        bias = torch.randn(size, generator=generator).to(dtype)
        parts.append((w_q, scales, zeros, bias, torch.rand(size, generator=generator) + 0.5))
    tokens = torch.rand(m, generator=generator) + 0.5
    (gate_q, *gate_rest), (up_q, *up_rest) = parts
    scales, zeros, bias, channels = map(machete.interleave_gate_up, gate_rest, up_rest)
    fused = reference.gemm(
        a, machete.prepack_gate_up(gate_q, up_q, type_, dtype), type_, scales, zeros, group, bias,
        channel_scales=channels, token_scales=tokens, activation="swiglu", batch_invariant=batch_invariant,
    )  # fmt: skip

    def alone(w_q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        weights = reference.dequantize(machete.prepack_b(w_q, type_, dtype), type_, rest[0], rest[1], group, k)
        return a.double() @ weights.double() * rest[3].double() * tokens.double()[:, None] + rest[2].double()

    gate, up = alone(gate_q, *gate_rest), alone(up_q, *up_rest)
    wanted = torch.nn.functional.silu(gate) * up
    assert fused.shape == (m, size) and fused.dtype == dtype
    ulp = {BF16: 2.0**-8, FP16: 2.0**-11}[dtype]
    torch.testing.assert_close(fused.double(), wanted, rtol=1.01 * ulp, atol=1e-4 * ulp)


W = torch.zeros(8, 16, dtype=torch.int32)
WRONG = {
    "sizes": ((W, W[:, :8]), r"gate and up must have one shape, got \(8, 16\) and \(8, 8\)"),
    "k": ((W, W[:7]), "one shape"),
    "a multiple of 8": ((W[:, :12], W[:, :12]), r"I a multiple of 8, got shape \(8, 12\); pad both"),
    "no tensor": ((W, W.numpy()), "up must be a torch.Tensor, got ndarray"),
    "device": ((W, W.to("meta")), "gate is on cpu but up is on meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name: str) -> None:
    (gate, up), message = WRONG[name]
    for call in (machete.interleave_gate_up, lambda *w: machete.prepack_gate_up(*w, u4b8)):
        with pytest.raises(ArgumentError, match=message):
            call(gate, up)


def test_mistakes_of_each() -> None:
    with pytest.raises(ArgumentError, match=r"one dtype, got torch\.float16 and torch\.bfloat16"):
        machete.interleave_gate_up(W.half(), W.bfloat16())
    with pytest.raises(ArgumentError, match=r"I a multiple of 8, got shape \(\)"):
        machete.interleave_gate_up(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ArgumentError, match="multiple of 8"):
        machete.interleave_gate_up(W[:, :0], W[:, :0])
    with pytest.raises(
        ArgumentError, match=r"up must be int32, GPTQ-packed weights \[ceil\(K / 8\), N\]; got torch.int64"
    ):
        machete.prepack_gate_up(W, W.long(), u4b8)
    with pytest.raises(ArgumentError, match="8 rows of 8 codes hold K = 57 to 64"):
        machete.prepack_gate_up(W, W, u4b8, k=65)
    with pytest.raises(ArgumentError, match="a_dtype"):
        machete.prepack_gate_up(W, W, u4b8, torch.float32)
