# SPDX-License-Identifier: Apache-2.0
"""Layers for the tests on a GPU: random weights, the product in fp64 from the codes, and outputs between guards."""

from __future__ import annotations

import torch

import machete_aot as machete

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}
DTYPES = tuple(TOLERANCE)
POISON = 0x7FC1  # a NaN in both types, of a payload that no product makes
GUARD = 64  # elements, keeps the alignment


class Layer:
    """u4b8 weights of [K, N] with scales of ``group`` (-1: one group), on the current device."""

    def __init__(self, n: int, k: int, group: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.n, self.k, self.group, self.dtype = n, k, group, dtype
        self.generator = torch.Generator("cuda").manual_seed(seed)
        per_group = k if group == -1 else group
        groups = -(-k // per_group)
        codes = torch.randint(16, (k, n), device="cuda", dtype=torch.uint8, generator=self.generator)
        self.scales = (torch.rand(groups, n, device="cuda", generator=self.generator) * 0.02 + 0.001).to(dtype)
        self.b = machete.prepack_b(pack(codes), machete.u4b8, dtype, k=k)
        rows = torch.arange(k, device="cuda") // per_group
        self.weights = (codes.to(dtype) - 8) * self.scales[rows]

    def acts(self, *shape: int) -> torch.Tensor:
        """Random activations [*shape, K]."""
        return torch.randn(*shape, self.k, device="cuda", generator=self.generator).to(self.dtype)

    def bias(self) -> torch.Tensor:
        return torch.randn(self.n, device="cuda", generator=self.generator).to(self.dtype)

    def expected(self, a: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product in fp64."""
        product = a.double() @ self.weights.double()
        return product if bias is None else product + bias.double()

    def gemm(self, a: torch.Tensor, **options: object) -> torch.Tensor:
        return machete.gemm(a, self.b, machete.u4b8, self.scales, b_group_size=self.group, **options)  # type: ignore[arg-type]

    def error(self, out: torch.Tensor, expected: torch.Tensor) -> float:
        """The relative error over the tolerance: at most 1 is good. Infinite where something is not finite."""
        if not torch.isfinite(out).all():
            return float("inf")
        return float((out.double() - expected).norm() / expected.norm()) / TOLERANCE[self.dtype]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """GPTQ: int32 [ceil(K / 8), N], the lowest bits hold the lowest k."""
    k, n = codes.shape
    padded = torch.full((-(-k // 8) * 8, n), 8, dtype=torch.int64, device=codes.device)
    padded[:k] = codes
    shifts = torch.arange(8, device=codes.device) * 4
    words = (padded.view(-1, 8, n) << shifts[None, :, None]).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Guarded:
    """An output [m, n], rows ``stride`` apart and ``offset`` elements past 16 bytes, in a poisoned buffer."""

    def __init__(self, m: int, n: int, dtype: torch.dtype, stride: int | None = None, offset: int = 0) -> None:
        stride = stride or n
        self.buffer = torch.full((2 * GUARD + offset + m * stride,), POISON, dtype=torch.int16, device="cuda")
        body = self.buffer.view(dtype)[GUARD + offset :]
        self.out = body.as_strided((m, n), (stride, 1), body.storage_offset())

    def check(self) -> None:
        """Every element of the output was written, and nothing beside it."""
        bits = self.out.view(torch.int16)
        assert not (bits == POISON).any(), "parts of the output were not written"
        rest = self.buffer.clone()
        rest.as_strided(bits.shape, bits.stride(), bits.storage_offset()).fill_(POISON)
        assert (rest == POISON).all(), "something beside the output was written"


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.int16), y.contiguous().view(torch.int16))
