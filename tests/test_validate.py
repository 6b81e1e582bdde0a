# SPDX-License-Identifier: Apache-2.0
"""check_gemm: what a valid product means, and that every mistake is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from machete_aot.errors import ArgumentError, UnsupportedError
from machete_aot.prepack import prepack_b
from machete_aot.scalar_type import ScalarType, u4, u4b8, u8, u8b128
from machete_aot.validate import Problem, check_gemm

M, N, K, GROUP = 6, 200, 320, 128
BF16, FP16 = torch.bfloat16, torch.float16


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments that fit together, with changes."""
    fitting = {
        "a": torch.zeros(M, K, dtype=BF16),
        "b": prepack_b(torch.zeros(K // 8, N, dtype=torch.int32), u4b8),
        "b_type": u4b8,
        "b_scales": torch.zeros(3, N, dtype=BF16),
        "b_zeros": torch.zeros(3, N, dtype=BF16),
        "b_group_size": GROUP,
        "bias": torch.zeros(N, dtype=BF16),
        "out": torch.zeros(M, N, dtype=BF16),
    }
    return fitting | changes


def check(**changes: Any) -> Problem:
    return check_gemm(**arguments(**changes))


def test_a_problem() -> None:
    given = arguments()
    problem = check_gemm(**given)
    assert (problem.m, problem.n, problem.k, problem.group, problem.groups) == (M, N, K, 128, 3)
    assert problem.batch_shape == (M,) and problem.out_dtype == BF16
    assert problem.a2d is given["a"] and problem.scales is given["b_scales"]
    assert problem.zeros is given["b_zeros"] and problem.bias is given["bias"] and problem.out2d is given["out"]
    with pytest.raises(AttributeError):
        problem.m = 1  # type: ignore[misc]


def test_options_left_out() -> None:
    problem = check(b_zeros=None, bias=None, out=None)
    assert problem.zeros is None and problem.bias is None and problem.out2d is None
    assert problem.zeros_kind == "none" and problem.channel_scales is None and problem.token_scales is None
    assert problem.activation is None and problem.out_dtype == BF16 and problem.out_columns == N


@pytest.mark.parametrize(
    ("size", "group", "groups", "fine"),
    [
        *((-1, K, 1, False), (None, K, 1, False), (K, K, 1, False), (4096, K, 1, False), (352, K, 1, False)),
        *((32, 32, 10, True), (96, 96, 4, True), (160, 160, 2, True), (64, 64, 5, False), (192, 192, 2, False)),
    ],
)
def test_groups(size: int | None, group: int, groups: int, fine: bool) -> None:
    scales = torch.zeros(groups, N, dtype=BF16)
    problem = check(b_group_size=size, b_scales=scales, b_zeros=scales)
    assert (problem.group, problem.groups, problem.fine) == (group, groups, fine)


@pytest.mark.parametrize("b_type", [u4b8, u8b128, u4, u8], ids=str)
def test_floating_zeros_go_with_every_type(b_type: ScalarType) -> None:
    b, zeros = (
        prepack_b(torch.zeros(K // b_type.per_int32, N, dtype=torch.int32), b_type),
        torch.zeros(3, N, dtype=BF16),
    )
    problem = check(b=b, b_type=b_type, b_zeros=zeros)
    assert problem.zeros_kind == "float" and problem.zeros is zeros


@pytest.mark.parametrize("b_type", [u4, u8], ids=str)
def test_integer_zeros(b_type: ScalarType) -> None:
    b = prepack_b(torch.zeros(K // b_type.per_int32, N, dtype=torch.int32), b_type)
    zeros = torch.arange(3 * N).remainder(256).to(torch.uint8).view(3, N)
    problem = check(b=b, b_type=b_type, b_zeros=zeros)
    assert problem.zeros_kind == "int" and problem.zeros is zeros
    for given in (zeros.int(), zeros.int().t().contiguous().t(), zeros.t().contiguous().t()):
        made = check(b=b, b_type=b_type, b_zeros=given).zeros
        assert made is not None and made.dtype == torch.uint8 and made.is_contiguous() and torch.equal(made, zeros)


def test_scales_of_channels_and_tokens() -> None:
    channels, tokens = torch.rand(N), torch.rand(M)
    problem = check(channel_scales=channels, token_scales=tokens)
    assert problem.channel_scales is channels and problem.token_scales is tokens
    problem = check(channel_scales=channels.repeat(2, 1).t()[:, 1], token_scales=tokens.repeat(2, 1).t()[:, 0])
    for made, wanted in ((problem.channel_scales, channels), (problem.token_scales, tokens)):
        assert made is not None and made.is_contiguous() and torch.equal(made, wanted)


@pytest.mark.parametrize("batch", [(), (1,), (6,), (2, 3), (4, 0, 2), (0,)])
def test_token_scales_may_have_the_shape_of_the_batch(batch: tuple[int, ...]) -> None:
    a, m = torch.zeros(*batch, K, dtype=BF16), torch.Size(batch).numel()
    tokens = torch.rand(batch)
    for given in (tokens, tokens.reshape(-1), torch.stack([tokens, tokens], -1)[..., 0]):
        made = check(a=a, out=None, token_scales=given).token_scales
        assert made is not None and made.shape == (m,) and made.is_contiguous()
        assert torch.equal(made, tokens.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=str)
def test_the_dtype_of_the_output(dtype: torch.dtype) -> None:
    assert check(out=None, out_dtype=dtype).out_dtype == dtype
    out = torch.zeros(M, N, dtype=dtype)
    assert check(out=out, out_dtype=dtype).out2d is out


def swiglu(n: int, **changes: Any) -> Problem:
    b, scales = prepack_b(torch.zeros(K // 8, n, dtype=torch.int32), u4b8), torch.zeros(3, n, dtype=BF16)
    fitting = {"b": b, "b_scales": scales, "b_zeros": None, "bias": None, "out": None, "activation": "swiglu"}
    return check(**(fitting | changes))


def test_an_activation_halves_the_columns() -> None:
    problem = swiglu(208)
    assert (problem.n, problem.out_columns, problem.activation) == (208, 104, "swiglu")
    out = torch.zeros(2, 3, 104, dtype=BF16)
    out2d = swiglu(208, a=torch.zeros(2, 3, K, dtype=BF16), out=out).out2d
    assert out2d is not None and out2d.shape == (M, 104)
    with pytest.raises(ArgumentError, match=r"out must have the shape of a with N / 2 for K, \(6, 104\), got shape"):
        swiglu(208, out=torch.zeros(M, 208, dtype=BF16))
    with pytest.raises(ArgumentError, match="N must be a multiple of 16, got 200; prepack_gate_up"):
        swiglu(200)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (0,), (4, 0, 2), (2, 1, 3)])
def test_batch_shapes(shape: tuple[int, ...]) -> None:
    a, out = torch.zeros(*shape, K, dtype=BF16), torch.zeros(*shape, N, dtype=BF16)
    problem = check(a=a, out=out)
    m = torch.Size(shape).numel()
    assert problem.m == m and problem.batch_shape == shape
    assert problem.a2d.shape == (m, K) and problem.a2d.data_ptr() == a.data_ptr()
    assert problem.out2d is not None
    assert problem.out2d.shape == (m, N) and problem.out2d.data_ptr() == out.data_ptr()


def test_strided_activations_are_not_copied() -> None:
    wide = torch.zeros(2, 3, 2 * K, dtype=BF16)
    problem = check(a=wide[..., :K], out=None)
    assert problem.a2d.data_ptr() == wide.data_ptr() and problem.a2d.stride() == (2 * K, 1)
    swapped = torch.randn(3, 2, K).to(BF16).transpose(0, 1)
    assert torch.equal(check(a=swapped, out=None).a2d, swapped.reshape(6, K))


def test_last_dimensions_become_contiguous() -> None:
    scales, zeros = (torch.randn(N, 3).to(BF16).t() for _ in range(2))
    bias = torch.randn(N, 2).to(BF16)[:, 0]
    problem = check(b_scales=scales, b_zeros=zeros, bias=bias)
    for made, given in ((problem.scales, scales), (problem.zeros, zeros), (problem.bias, bias)):
        assert made is not None and made.stride(-1) == 1 and torch.equal(made, given)
    padded = torch.zeros(3, N + 8, dtype=BF16)[:, :N]
    assert check(b_scales=padded).scales is padded


WRONG = {
    "a: dtype": ({"a": torch.zeros(M, K)}, "a must be bfloat16 or float16, got torch.float32; convert"),
    "a: no dimension": ({"a": torch.zeros((), dtype=BF16)}, r"a must be \[..., K\] with K > 0, got shape \(\)"),
    "a: no k": ({"a": torch.zeros(M, 0, dtype=BF16)}, "K > 0"),
    "a: no tensor": ({"a": [[1.0]]}, "a must be a torch.Tensor, got list"),
    "b: no tensor": ({"b": None}, "b must be a torch.Tensor, got NoneType"),
    "b: not prepacked": (
        {"b": torch.zeros(K // 8, N, dtype=torch.int32)},
        r"b must be int32 \(4, 5, 512\) for u4b8 with N = 200 and K = 320, got torch.int32 of shape \(40, 200\); "
        ".*not prepacked: call machete_aot.prepack_b",
    ),
    "b: dtype": ({"b": torch.zeros(4, 5, 512, dtype=torch.int64)}, "b must be int32 .*got torch.int64"),
    "b: other n and k": ({"b": torch.zeros(3, 5, 512, dtype=torch.int32)}, "N comes from b_scales and K from a"),
    "b: other type": ({"b_type": u8b128}, r"int32 \(4, 5, 1024\) for u8b128"),
    "b: strides": ({"b": torch.zeros(4, 5, 1024, dtype=torch.int32)[..., :512]}, "b must be contiguous"),
    "b_type: a string": ({"b_type": "u4b8"}, "b_type must be a ScalarType such as machete_aot.u4b8, got 'u4b8'"),
    "b_scales: none": ({"b_scales": None}, "b_scales must be a torch.Tensor, got NoneType"),
    "b_scales: dtype": ({"b_scales": torch.zeros(3, N, dtype=FP16)}, "b_scales must have the dtype of a"),
    "b_scales: groups": (
        {"b_scales": torch.zeros(2, N, dtype=BF16)},
        r"b_scales must be \[3, N\]: K = 320 has 3 groups of 128; got shape \(2, 200\)",
    ),
    "b_scales: of one group": (
        {"b_scales": torch.zeros(1, N, dtype=BF16)},
        r"for one group over K pass b_group_size=-1",
    ),
    "b_scales: transposed": ({"b_scales": torch.zeros(N, 3, dtype=BF16)}, r"got shape \(200, 3\): transpose them"),
    "b_scales: of another k": (
        {"b_scales": torch.zeros(4, N, dtype=BF16)},
        r"check b_group_size, and that a has the K",
    ),
    "b_scales: dimensions": ({"b_scales": torch.zeros(N, dtype=BF16)}, r"b_scales must be \[3, N\]"),
    "b_scales: no n": ({"b_scales": torch.zeros(3, 0, dtype=BF16)}, r"b_scales must be \[3, N\]"),
    "b_zeros: shape": ({"b_zeros": torch.zeros(3, N + 1, dtype=BF16)}, r"b_zeros must have the shape of b_scales"),
    "b_zeros: dtype": (
        {"b_zeros": torch.zeros(3, N, dtype=torch.int8)},
        "b_zeros must have the dtype of a, torch.bfloat16 .*or be uint8 or int32 .*got torch.int8",
    ),
    "b_zeros: other floats": ({"b_zeros": torch.zeros(3, N, dtype=FP16)}, "b_zeros must have the .*got torch.float16"),
    "b_zeros: integers for a biased type": (
        {"b_zeros": torch.zeros(3, N, dtype=torch.uint8)},
        "b_zeros are integers, and u4b8 has a zero point of its own, 8; pass the weights as u4",
    ),
    "b_zeros: shape of integers": (
        {"b_type": u4, "b_zeros": torch.zeros(1, N, dtype=torch.int32)},
        r"b_zeros must have the shape of b_scales, \(3, 200\), got shape \(1, 200\)",
    ),
    "b_group_size: 0": ({"b_group_size": 0}, "b_group_size must be a positive int, or -1 or None.*got 0"),
    "b_group_size: -2": ({"b_group_size": -2}, "got -2"),
    "b_group_size: float": ({"b_group_size": 128.0}, r"got 128\.0"),
    "b_group_size: bool": ({"b_group_size": True}, "got True"),
    "b_group_size: 48": ({"b_group_size": 48}, "multiple of 32, got 48"),
    "bias: shape": ({"bias": torch.zeros(1, N, dtype=BF16)}, r"bias must have \[N\], \(200,\), got shape \(1, 200\)"),
    "bias: dtype": ({"bias": torch.zeros(N)}, "bias must have the dtype of a"),
    "bias: a number": ({"bias": 1.0}, "bias must be a torch.Tensor, got float"),
    "out: shape": ({"out": torch.zeros(M, N + 1, dtype=BF16)}, "out must have the shape of a with N for K"),
    "out: batch": ({"out": torch.zeros(1, M, N, dtype=BF16)}, r"out must have .*\(6, 200\), got shape \(1, 6, 200\)"),
    "out: dtype": (
        {"out": torch.zeros(M, N)},
        "out must be torch.bfloat16, .*got torch.float32: pass out_dtype=torch.f",
    ),
    "out: not out_dtype": ({"out_dtype": torch.float32}, "out must be torch.float32, .*got torch.bfloat16"),
    "out_dtype: int8": (
        {"out_dtype": torch.int8},
        "out_dtype must be torch.float32, torch.float16 or .*got torch.int8",
    ),
    "out_dtype: a string": ({"out_dtype": "float32"}, "out_dtype must be .*got 'float32'"),
    "channel_scales: dtype": (
        {"channel_scales": torch.zeros(N, dtype=BF16)},
        "channel_scales must be torch.float32, got",
    ),
    "channel_scales: shape": (
        {"channel_scales": torch.zeros(1, N)},
        r"channel_scales must have a value for each column of the product, \[N\], \(200,\), got shape \(1, 200\)",
    ),
    "channel_scales: a number": ({"channel_scales": 2.0}, "channel_scales must be a torch.Tensor, got float"),
    "token_scales: dtype": (
        {"token_scales": torch.zeros(M, dtype=torch.float64)},
        "token_scales must be torch.float32",
    ),
    "token_scales: column": (
        {"token_scales": torch.zeros(M, 1)},
        r"token_scales must have a value for each row of a, \(6,\), got shape \(6, 1\)",
    ),
    "token_scales: batch": (
        {"a": torch.zeros(2, 3, K, dtype=BF16), "out": None, "token_scales": torch.zeros(3, 2)},
        r"each row of a, \(2, 3\) or \(6,\), got shape \(3, 2\)",
    ),
    "token_scales: elsewhere": ({"token_scales": torch.zeros(M, device="meta")}, "token_scales is on meta but a is on"),
    "activation: unknown": ({"activation": "gelu"}, "activation must be None or 'swiglu', got 'gelu'"),
    "activation: n": ({"activation": "swiglu"}, "N must be a multiple of 16, got 200"),
    "out: columns": ({"out": torch.zeros(N, M, dtype=BF16).t()}, r"contiguous last dimension.*strides \(1, 6\)"),
    "out: rows overlap": ({"out": torch.zeros(N, dtype=BF16).expand(M, N)}, r"do not overlap.*strides \(0, 1\)"),
    "out: elsewhere": ({"out": torch.zeros(M, N, dtype=BF16, device="meta")}, "out is on meta but a is on cpu"),
    "b: elsewhere": ({"b": torch.zeros(4, 5, 512, dtype=torch.int32, device="meta")}, "b is on meta but a is on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ArgumentError, match=message):
        check(**changes)


def test_a_type_without_a_layout() -> None:
    with pytest.raises(UnsupportedError, match="2-bit"):
        check(b_type=ScalarType("u2", 2, 0))


def test_out_that_is_no_matrix() -> None:
    a = torch.zeros(2, 3, K, dtype=BF16)
    with pytest.raises(ArgumentError, match="viewable as a matrix"):
        check(a=a, out=torch.zeros(3, 2, N, dtype=BF16).transpose(0, 1))
    rows = torch.zeros(2, 3, 2 * N, dtype=BF16)
    out2d = check(a=a, out=rows[..., :N]).out2d
    assert out2d is not None and out2d.stride() == (2 * N, 1)


def test_out_must_not_share_memory_with_a() -> None:
    """K = N here, so that every kind of overlap can be made from one buffer."""
    k = 128
    fitting = {
        "b": prepack_b(torch.zeros(k // 8, k, dtype=torch.int32), u4b8),
        "b_scales": torch.zeros(1, k, dtype=BF16),
        "b_zeros": None,
        "bias": None,
    }
    buffer = torch.zeros(20, 2 * k, dtype=BF16)
    left, right, middle = buffer[:, :k], buffer[:, k:], buffer[:, k // 2 : k // 2 + k]
    one_row = left[:1].as_strided((1, k), (0, 1))  # the stride of a single row means nothing
    column_major = left[:3].t().contiguous().t()
    for a, out in (
        (left, left),
        (left, middle),
        (middle, left),
        (left[1:], middle[:-1]),
        (left[:1], left[:1]),
        (left[:3], buffer.view(-1)[k : k + 3 * k].view(3, k)),
        (one_row, one_row),
        (column_major, column_major.t().view(3, k)),
    ):
        with pytest.raises(ArgumentError, match="out shares memory with a"):
            check(**fitting, a=a, out=out)
    for a, out in (
        (left, right),
        (right, left),
        (left[1:], right[:-1]),
        (right[:-1], left[1:]),
        (left[:3], left[3:6]),
        (left[:1], right[:1]),
        (left[:0], left[:0]),
    ):
        assert check(**fitting, a=a, out=out).out2d is out


def test_out_of_another_size_beside_a() -> None:
    """Columns of one buffer, a of 2 bytes and out of 4."""
    buffer = torch.zeros(M, 2 * K + 4 * N, dtype=torch.uint8)
    left = buffer[:, : 2 * K].view(BF16)
    right, inside = buffer[:, 2 * K :].view(torch.float32), buffer[:, 2 * K - 4 : -4].view(torch.float32)
    changes = {"a": left, "out_dtype": torch.float32}
    assert check(**changes, out=right).out2d is right
    with pytest.raises(ArgumentError, match="out shares memory with a"):
        check(**changes, out=inside)
    with pytest.raises(ArgumentError, match="out shares memory with a"):  # other distances between rows
        check(
            a=left[: M // 2],
            out_dtype=torch.float32,
            out=buffer.view(-1)[8 : 8 + 2 * N * M].view(torch.float32).view(M // 2, N),
        )


def test_requires_grad_is_fine() -> None:
    a = torch.zeros(M, K, dtype=BF16, requires_grad=True)
    assert check(a=a).a2d is a
