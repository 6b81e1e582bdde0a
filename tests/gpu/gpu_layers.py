# SPDX-License-Identifier: Apache-2.0
"""Layers for the tests on a GPU: random weights, the product in fp64 from the codes, and outputs between guards."""

from __future__ import annotations

import torch

import machete_aot as machete

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}
DTYPES = tuple(TOLERANCE)
POISON = {2: 0x7FC1, 4: 0x7FC00001}  # a NaN in all types of so many bytes, of a payload that no product makes
BITS = {2: torch.int16, 4: torch.int32}
GUARD = 64  # elements, keeps the alignment


class Layer:
    """Weights of [K, N] with scales of ``group`` (-1: one group), on the current device.

    ``zeros``: "none", "float" or "int". ``weights`` are what the kernels multiply by: ``exact``, rounded once.
    """

    def __init__(
        self,
        n: int,
        k: int,
        group: int,
        dtype: torch.dtype,
        seed: int = 0,
        *,
        b_type: machete.ScalarType = machete.u4b8,
        zeros: str = "none",
    ) -> None:
        self.n, self.k, self.group, self.dtype, self.b_type = n, k, group, dtype, b_type
        self.generator = torch.Generator("cuda").manual_seed(seed)
        per_group = k if group == -1 else group
        groups, codes_of = -(-k // per_group), 1 << b_type.bits
        self.codes = torch.randint(codes_of, (k, n), device="cuda", dtype=torch.uint8, generator=self.generator)
        # 8-bit codes are 16 times larger; outputs are then of the same size, and gate * up is in the range of fp16.
        largest = 0.02 * 16 / codes_of
        self.scales = (self.uniform(groups, n) * largest + largest / 20).to(dtype)
        self.b = machete.prepack_b(pack(self.codes, b_type.bits), b_type, dtype, k=k)
        self.rows = torch.arange(k, device="cuda") // per_group
        steps = (self.uniform(groups, n) * codes_of).floor()
        if zeros == "none":
            self.zeros = None
            self.exact = (self.codes.double() - b_type.bias) * self.scales.double()[self.rows]
        elif zeros == "int":
            self.zeros = steps.to(torch.uint8)
            self.exact = (self.codes.double() - steps.double()[self.rows]) * self.scales.double()[self.rows]
        else:
            self.zeros = (self.scales.float() * steps).to(dtype)
            self.exact = self.codes.double() * self.scales.double()[self.rows] - self.zeros.double()[self.rows]
        self.weights = self.exact.to(dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, device="cuda", generator=self.generator)

    def acts(self, *shape: int) -> torch.Tensor:
        """Random activations [*shape, K]."""
        return torch.randn(*shape, self.k, device="cuda", generator=self.generator).to(self.dtype)

    def bias(self) -> torch.Tensor:
        return torch.randn(self.n, device="cuda", generator=self.generator).to(self.dtype)

    def channel_scales(self) -> torch.Tensor:
        return self.uniform(self.n) * 1.5 - 0.5

    def token_scales(self, m: int) -> torch.Tensor:
        return self.uniform(m) + 0.5

    def expected(
        self,
        a: torch.Tensor,
        bias: torch.Tensor | None = None,
        channel_scales: torch.Tensor | None = None,
        token_scales: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """The product in fp64."""
        return after(a.double() @ self.weights.double(), bias, channel_scales, token_scales, activation)

    def gemm(self, a: torch.Tensor, **options: object) -> torch.Tensor:
        options = {"b_zeros": self.zeros, "b_group_size": self.group, **options}
        return machete.gemm(a, self.b, self.b_type, self.scales, **options)  # type: ignore[arg-type]

    def error(self, out: torch.Tensor, expected: torch.Tensor) -> float:
        """The relative error over the tolerance: at most 1 is good. Infinite where something is not finite.

        The tolerance is that of the coarser one of the activations' and the output's dtypes. ``expected`` is rounded to
        the output's dtype first: where few large elements make up the norm, their rounding alone may exceed it.
        """
        if not torch.isfinite(out).all():
            return float("inf")
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE.get(out.dtype, 0))
        expected = expected.to(out.dtype).double()
        return float((out.double() - expected).norm() / expected.norm()) / tolerance


def after(
    sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    channel_scales: torch.Tensor | None = None,
    token_scales: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """What becomes of the sums [..., M, N], in fp64."""
    if channel_scales is not None:
        sums = sums * channel_scales.double()
    if token_scales is not None:
        sums = sums * token_scales.double()[..., None]
    if bias is not None:
        sums = sums + bias.double()
    if activation is not None:
        gate, up = sums.unflatten(-1, (-1, 2, 8)).unbind(-2)
        sums = (torch.nn.functional.silu(gate) * up).flatten(-2)
    return sums


def pack(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """GPTQ: int32 [ceil(K * bits / 32), N], the lowest bits hold the lowest k."""
    per, (k, n) = 32 // bits, codes.shape
    padded = torch.full((-(-k // per) * per, n), 1 << bits - 1, dtype=torch.int64, device=codes.device)
    padded[:k] = codes
    shifts = torch.arange(per, device=codes.device) * bits
    words = (padded.view(-1, per, n) << shifts[None, :, None]).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Guarded:
    """An output [m, n], rows ``stride`` apart and ``offset`` elements past 16 bytes, in a poisoned buffer."""

    def __init__(self, m: int, n: int, dtype: torch.dtype, stride: int | None = None, offset: int = 0) -> None:
        stride = stride or n
        self.poison, bits = POISON[dtype.itemsize], BITS[dtype.itemsize]
        self.buffer = torch.full((2 * GUARD + offset + m * stride,), self.poison, dtype=bits, device="cuda")
        body = self.buffer.view(dtype)[GUARD + offset :]
        self.out = body.as_strided((m, n), (stride, 1), body.storage_offset())

    def check(self) -> None:
        """Every element of the output was written, and nothing beside it."""
        bits = self.out.view(self.buffer.dtype)
        assert not (bits == self.poison).any(), "parts of the output were not written"
        rest = self.buffer.clone()
        rest.as_strided(bits.shape, bits.stride(), bits.storage_offset()).fill_(self.poison)
        assert (rest == self.poison).all(), "something beside the output was written"


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    bits = BITS[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))
