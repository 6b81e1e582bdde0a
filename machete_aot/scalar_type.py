# SPDX-License-Identifier: Apache-2.0
"""The integer types of quantised weights: how wide a code is and which integer it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ArgumentError


@dataclass(frozen=True)
class ScalarType:
    """An unsigned code of ``bits`` bits that stands for the integer ``code - bias``.

    ``u4b8`` is the symmetric 4-bit type of GPTQ: codes 0..15 stand for -8..7. Types compare by value.
    """

    name: str
    bits: int
    bias: int

    @property
    def min(self) -> int:
        """The smallest decoded integer."""
        return -self.bias

    @property
    def max(self) -> int:
        """The largest decoded integer."""
        return (1 << self.bits) - 1 - self.bias

    @property
    def per_int32(self) -> int:
        """Codes in one int32 of GPTQ-packed weights."""
        return 32 // self.bits

    @property
    def zero_word(self) -> int:
        """An int32 (as Python's signed int) all of whose codes stand for zero: what padding is made of."""
        word = sum(self.bias << (self.bits * i) for i in range(self.per_int32))
        return word - (1 << 32) if word >> 31 else word

    def __str__(self) -> str:
        return self.name


u4b8 = ScalarType("u4b8", 4, 8)
u8b128 = ScalarType("u8b128", 8, 128)
u4 = ScalarType("u4", 4, 0)
u8 = ScalarType("u8", 8, 0)

SCALAR_TYPES = {t.name: t for t in (u4b8, u8b128, u4, u8)}


def scalar_type(name: str) -> ScalarType:
    """The type of that name. Raises ArgumentError for a name that is none of ``SCALAR_TYPES``."""
    try:
        return SCALAR_TYPES[name]
    except KeyError:
        raise ArgumentError(f"no weight type is named {name!r}; there are {', '.join(SCALAR_TYPES)}") from None
