# SPDX-License-Identifier: Apache-2.0
"""The reference against an independent computation in numpy: decoded codes, one emulated rounding at a time, fp64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from machete_aot import reference
from machete_aot.errors import ArgumentError
from machete_aot.prepack import prepack_b
from machete_aot.scalar_type import SCALAR_TYPES, ScalarType, u4, u4b8, u8
from quantised import gptq, random_codes

DTYPES = [torch.bfloat16, torch.float16]
MANTISSA = {torch.bfloat16: 8, torch.float16: 11}  # significant bits
LOWEST = {torch.bfloat16: -126, torch.float16: -14}  # exponent of the smallest normal number
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place of 1


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fp64 values rounded to nearest even to a 16-bit type, by scaling to integers; no overflow expected."""
    exponent = np.maximum(np.frexp(values)[1] - 1, LOWEST[dtype])
    ulp = np.exp2(exponent - (MANTISSA[dtype] - 1))
    return np.rint(values / ulp) * ulp


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


@dataclass
class Data:
    """A product's arguments and the codes that b was made from."""

    codes: np.ndarray
    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor
    integer_zeros: torch.Tensor  # uint8
    channel_scales: torch.Tensor
    token_scales: torch.Tensor


def make(m: int, n: int, k: int, group: int, type_: ScalarType, dtype: torch.dtype, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else -(-k // group)
    codes = random_codes(k, n, type_.bits, seed)
    return Data(
        codes=codes,
        a=torch.randn(m, k, generator=generator).to(dtype),
        b=prepack_b(gptq(codes, type_.bits), type_, dtype, k=k),
        scales=(torch.rand(groups, n, generator=generator) / 40 + 0.001).to(dtype),
        zeros=torch.randn(groups, n, generator=generator).mul(0.1).to(dtype),
        bias=torch.randn(n, generator=generator).to(dtype),
        integer_zeros=torch.randint(1 << type_.bits, (groups, n), generator=generator, dtype=torch.uint8),
        channel_scales=torch.randn(n, generator=generator),
        token_scales=torch.rand(m, generator=generator) + 0.1,
    )


def weights(data: Data, type_: ScalarType, group: int, with_zeros: bool) -> np.ndarray:
    """fp64 [K, N], each operation rounded to the scales' dtype."""
    k = data.codes.shape[0]
    index = np.arange(k) // (k if group == -1 else group)
    dtype = data.scales.dtype
    values = rounded((data.codes.astype(np.float64) - type_.bias) * wide(data.scales)[index], dtype)
    return rounded(values - wide(data.zeros)[index], dtype) if with_zeros else values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_model_agrees_with_torch(dtype: torch.dtype) -> None:
    """The model used below is itself checked, ties and subnormal numbers included."""
    random = np.random.default_rng(0).standard_normal(20000) * np.exp2(np.random.default_rng(1).integers(-30, 8, 20000))
    values = np.concatenate([random, np.arange(1, 4096) / 1024, [0.0, -0.0, 1 + UNIT[dtype], 1 + 3 * UNIT[dtype]]])
    values = values.astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(rounded(values, dtype), wide(torch.from_numpy(values).float().to(dtype)))


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group", [-1, 32, 64, 128, 4096])
@pytest.mark.parametrize("type_", SCALAR_TYPES.values(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_exact(dtype: torch.dtype, type_: ScalarType, group: int, with_zeros: bool) -> None:
    data = make(1, 70, 200, group, type_, dtype)
    zeros = data.zeros if with_zeros else None
    result = reference.dequantize(data.b, type_, data.scales, zeros, group, 200)
    assert result.dtype == dtype and result.shape == (200, 70)
    np.testing.assert_array_equal(wide(result), weights(data, type_, group, with_zeros))


@pytest.mark.parametrize("group", [-1, 32, 96, 128])
@pytest.mark.parametrize("type_", [u4, u8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_zeros_are_subtracted_exactly(dtype: torch.dtype, type_: ScalarType, group: int) -> None:
    data = make(3, 70, 200, group, type_, dtype)
    index = np.arange(200) // (200 if group == -1 else group)
    steps = data.codes.astype(int) - data.integer_zeros.numpy().astype(int)[index]
    exact = rounded(steps * wide(data.scales)[index], dtype)
    for zeros in (data.integer_zeros, data.integer_zeros.int()):
        found = reference.dequantize(data.b, type_, data.scales, zeros, group, 200)
        assert found.dtype == dtype
        np.testing.assert_array_equal(wide(found), exact)
        out = reference.gemm(data.a, data.b, type_, data.scales, zeros, group, out_dtype=torch.float32)
        np.testing.assert_allclose(out.numpy(), wide(data.a) @ exact, rtol=2.0**-23, atol=1e-9)


def test_a_biased_type_is_an_unbiased_one_with_its_bias_as_integer_zeros() -> None:
    data = make(3, 64, 128, 64, u4b8, torch.bfloat16)
    zeros = torch.full((2, 64), 8, dtype=torch.uint8)
    b = prepack_b(gptq(data.codes, 4), u4)
    expected = reference.gemm(data.a, data.b, u4b8, data.scales, b_group_size=64)
    assert torch.equal(reference.gemm(data.a, b, u4, data.scales, zeros, 64), expected)


@pytest.mark.parametrize("value", [-1, 256])
def test_integer_zeros_are_codes(value: int) -> None:
    data = make(1, 64, 64, 64, u8, torch.float16)
    zeros = data.integer_zeros.int()
    zeros[0, 5] = value
    with pytest.raises(ArgumentError, match="integer b_zeros must be 0 to 255, found"):
        reference.gemm(data.a, data.b, u8, data.scales, zeros, 64)
    with pytest.raises(ArgumentError, match="integer b_zeros must be 0 to 255, found"):
        reference.dequantize(data.b, u8, data.scales, zeros, 64, 64)


EPILOGUES = [
    dict(zip(("bias", "channel_scales", "token_scales", "activation"), chosen, strict=True))
    for chosen in itertools.product([False, True], repeat=4)
]
OUT_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def epilogue_options(data: Data, chosen: dict[str, bool]) -> dict[str, Any]:
    tensors = {name: getattr(data, name) for name in ("bias", "channel_scales", "token_scales") if chosen[name]}
    return {**tensors, "activation": "swiglu" if chosen["activation"] else None}


def epilogue_in_fp64(data: Data, values: np.ndarray, chosen: dict[str, bool]) -> np.ndarray:
    """The same, without rounding."""
    if chosen["channel_scales"]:
        values = values * wide(data.channel_scales)
    if chosen["token_scales"]:
        values = values * wide(data.token_scales)[:, None]
    if chosen["bias"]:
        values = values + wide(data.bias)
    if chosen["activation"]:
        blocks = values.reshape(len(values), -1, 2, 8)
        gate, up = (blocks[:, :, i].reshape(len(values), -1) for i in (0, 1))
        values = gate / (1 + np.exp(-gate)) * up
    return values


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("chosen", EPILOGUES, ids=lambda c: "+".join(n for n in c if c[n]) or "none")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues(dtype: torch.dtype, chosen: dict[str, bool], out_dtype: torch.dtype) -> None:
    data = make(7, 144, 200, 64, u4, dtype)
    exact = epilogue_in_fp64(data, wide(data.a) @ weights(data, u4, 64, True), chosen)
    arguments = (data.a, data.b, u4, data.scales, data.zeros, 64)
    options = epilogue_options(data, chosen)
    out = reference.gemm(*arguments, out_dtype=out_dtype, **options)
    assert out.dtype == out_dtype and out.shape == exact.shape
    # What a few roundings to fp32 leave, then one to the output.
    in_fp32 = 2.0**-20 * (np.abs(exact) + 1)
    single = reference.gemm(*arguments, out_dtype=torch.float32, **options)
    assert (np.abs(wide(single) - exact) <= in_fp32).all()
    assert torch.equal(out, single.to(out_dtype))
    invariant = reference.gemm(*arguments, out_dtype=out_dtype, batch_invariant=True, **options)
    assert (np.abs(wide(invariant) - exact) <= in_fp32 + UNIT.get(out_dtype, 0) * np.abs(exact)).all()


def test_the_epilogue_rounds_in_its_order() -> None:
    """sum * channel * token + bias: each step to fp32, in this order."""
    sums = torch.tensor([[1.0 + 2.0**-23, 3.0]])
    channel, token, bias = (
        torch.tensor([1.0 + 2.0**-12, 7.0]),
        torch.tensor([1.0 + 2.0**-11]),
        torch.tensor([2.0, -21.0]),
    )
    step = np.float32(sums.numpy() * channel.numpy())
    step = np.float32(step * token.numpy())
    wanted = np.float32(step + bias.numpy())
    found = reference.epilogue(sums, channel_scales=channel, token_scales=token, bias=bias)
    np.testing.assert_array_equal(found.numpy(), wanted)


def test_swiglu_of_extreme_values() -> None:
    values = [0.0, -0.0, 80.0, -80.0, 200.0, -200.0, 3e38, -3e38]
    values += [math.inf, -math.inf, math.nan, 1e-38, -1e-38, 0.5, -1.0, 1.0]
    gate = torch.tensor(values)
    sums = torch.cat([torch.stack([part, torch.ones(8)]).view(16) for part in gate.split(8)])[None]
    found = reference.epilogue(sums, activation="swiglu")[0]
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), rtol=2.0**-22, atol=1e-38, equal_nan=True)


def test_swiglu_does_not_depend_on_the_batch() -> None:
    """Elementwise functions of torch may have other bits at the end of a vector than inside it."""
    sums = torch.randn(37, 48, generator=torch.Generator().manual_seed(1)) * 4
    whole = reference.epilogue(sums, activation="swiglu")
    for m in (1, 2, 3, 5, 36):
        assert torch.equal(reference.epilogue(sums[-m:], activation="swiglu"), whole[-m:])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "group"), [(1, 64, 64, -1), (5, 130, 200, 64), (17, 65, 333, 128)])
@pytest.mark.parametrize("type_", SCALAR_TYPES.values(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm(
    dtype: torch.dtype, type_: ScalarType, m: int, n: int, k: int, group: int, with_zeros: bool, with_bias: bool
) -> None:
    data = make(m, n, k, group, type_, dtype)
    out = reference.gemm(
        data.a,
        data.b,
        type_,
        data.scales,
        data.zeros if with_zeros else None,
        group,
        data.bias if with_bias else None,
    )
    exact = wide(data.a) @ weights(data, type_, group, with_zeros)
    if with_bias:
        exact = exact + wide(data.bias)
    assert out.dtype == dtype and out.shape == (m, n)
    # One rounding to the dtype; what rounding to fp32 before it adds is 2^-24 of the terms.
    magnitude = np.abs(exact) + (np.abs(wide(data.bias)) if with_bias else 0)
    assert (np.abs(wide(out) - exact) <= UNIT[dtype] * np.abs(exact) + 2.0**-22 * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_n_do_not_change_the_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(3, 300, 128, 64, u4b8, dtype)
    whole = reference.gemm(data.a, data.b, u4b8, data.scales, data.zeros, 64, data.bias)
    gated = make(3, 304, 128, 64, u4, dtype)
    arguments = (gated.a, gated.b, u4, gated.scales, gated.integer_zeros, 64)
    options = epilogue_options(gated, dict.fromkeys(EPILOGUES[0], True))
    gated_whole = reference.gemm(*arguments, **options)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    assert torch.equal(reference.gemm(data.a, data.b, u4b8, data.scales, data.zeros, 64, data.bias), whole)
    assert torch.equal(reference.gemm(*arguments, **options), gated_whole)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_settings_do_not_matter(precision: str) -> None:
    data = make(16, 64, 2048, 128, u4b8, torch.float16)
    expected = reference.gemm(data.a, data.b, u4b8, data.scales)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(reference.gemm(data.a, data.b, u4b8, data.scales), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_group_has_three_spellings() -> None:
    data = make(4, 64, 96, -1, u4b8, torch.bfloat16)
    results = [reference.gemm(data.a, data.b, u4b8, data.scales, b_group_size=g) for g in (-1, None, 96, 128)]
    assert all(torch.equal(r, results[0]) for r in results)


def test_batch_dimensions() -> None:
    data = make(12, 64, 64, 64, u4b8, torch.bfloat16)
    expected = reference.gemm(data.a, data.b, u4b8, data.scales, b_group_size=64)
    for shape in ((12,), (3, 4), (2, 3, 2), (1, 12, 1)):
        out = reference.gemm(data.a.view(*shape, 64), data.b, u4b8, data.scales, b_group_size=64)
        assert out.shape == (*shape, 64) and torch.equal(out.view(12, 64), expected)
    vector = reference.gemm(data.a[3], data.b, u4b8, data.scales, b_group_size=64)
    assert vector.shape == (64,)
    torch.testing.assert_close(vector, expected[3])


@pytest.mark.parametrize("shape", [(0, 64), (0, 5, 64), (5, 0, 64)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    data = make(1, 70, 64, 64, u4b8, torch.float16)
    a = torch.empty(shape, dtype=torch.float16)
    out = reference.gemm(a, data.b, u4b8, data.scales, b_group_size=64, bias=data.bias)
    assert out.shape == (*shape[:-1], 70) and out.dtype == torch.float16
    given = torch.empty(*shape[:-1], 70, dtype=torch.float16)
    assert reference.gemm(a, data.b, u4b8, data.scales, b_group_size=64, out=given) is given


def test_strides_of_the_arguments_do_not_matter() -> None:
    data = make(6, 96, 128, 64, u4b8, torch.bfloat16)
    expected = reference.gemm(data.a, data.b, u4b8, data.scales, data.zeros, 64, data.bias)
    spread = torch.zeros(12, 256, dtype=torch.bfloat16)
    spread[::2, ::2] = data.a
    scales, zeros = (t.t().contiguous().t() for t in (data.scales, data.zeros))
    bias = torch.stack([data.bias, -data.bias], dim=1)[:, 0]
    for a in (spread[::2, ::2], data.a.t().contiguous().t(), spread[::2, ::2].reshape(6, 128)):
        assert torch.equal(reference.gemm(a, data.b, u4b8, scales, zeros, 64, bias), expected)
    batched = spread[::2, ::2].unflatten(0, (2, 3)).transpose(0, 1)  # cannot be viewed as a matrix
    out = reference.gemm(batched, data.b, u4b8, scales, zeros, 64, bias)
    assert torch.equal(out.transpose(0, 1).reshape(6, 96), expected)


def test_out_is_filled_and_nothing_beside_it() -> None:
    data = make(5, 70, 64, 64, u4b8, torch.bfloat16)
    expected = reference.gemm(data.a, data.b, u4b8, data.scales, b_group_size=64)
    buffer = torch.full((9, 90), float("nan"), dtype=torch.bfloat16)
    out = buffer[2:7, 3:73]
    assert reference.gemm(data.a, data.b, u4b8, data.scales, b_group_size=64, out=out) is out
    assert torch.equal(out, expected)
    out.fill_(float("nan"))
    assert bool(buffer.isnan().all())
    batched = torch.empty(5, 1, 70, dtype=torch.bfloat16)
    reference.gemm(data.a[:, None], data.b, u4b8, data.scales, b_group_size=64, out=batched)
    assert torch.equal(batched[:, 0], expected)


def test_gradients_are_not_computed() -> None:
    data = make(2, 64, 64, -1, u4b8, torch.bfloat16)
    a = data.a.clone().requires_grad_()
    out = reference.gemm(a, data.b, u4b8, data.scales, b_group_size=-1)
    assert not out.requires_grad


def test_how_a_gpu_would_run_it_is_ignored() -> None:
    data = make(2, 64, 64, -1, u4b8, torch.bfloat16)
    plain = reference.gemm(data.a, data.b, u4b8, data.scales, b_group_size=-1)
    forced = reference.gemm(data.a, data.b, u4b8, data.scales, b_group_size=-1, schedule="any", overlap=False)
    assert torch.equal(plain, forced)


def test_arguments_are_checked() -> None:
    data = make(2, 64, 64, -1, u4b8, torch.bfloat16)
    with pytest.raises(ArgumentError, match="b_scales"):
        reference.gemm(data.a, data.b, u4b8, data.scales.float())
    with pytest.raises(ArgumentError, match="b must be int32"):
        reference.dequantize(data.b, u4b8, data.scales, None, -1, 65)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    data = make(33, 200, 1000, 64, u4b8, dtype)
    expected = reference.gemm(data.a, data.b, u4b8, data.scales, data.zeros, 64, data.bias)
    sums = torch.randn(33, 208) * 5
    assert torch.equal(
        reference.epilogue(sums.cuda(), activation="swiglu").cpu(), reference.epilogue(sums, activation="swiglu")
    )
    moved = [t.cuda() for t in (data.a, data.b, data.scales, data.zeros, data.bias)]
    out = reference.gemm(moved[0], moved[1], u4b8, moved[2], moved[3], 64, moved[4])
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), expected, rtol=2 * UNIT[dtype], atol=0)
