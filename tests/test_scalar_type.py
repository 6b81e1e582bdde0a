# SPDX-License-Identifier: Apache-2.0
"""ScalarType: ranges, packing density, lookup."""

from __future__ import annotations

import dataclasses

import pytest

from machete_aot.errors import ArgumentError
from machete_aot.scalar_type import SCALAR_TYPES, ScalarType, scalar_type, u4, u4b8, u8, u8b128


@pytest.mark.parametrize(
    ("type_", "name", "low", "high", "per_int32"),
    [
        (u4b8, "u4b8", -8, 7, 8),
        (u8b128, "u8b128", -128, 127, 4),
        (u4, "u4", 0, 15, 8),
        (u8, "u8", 0, 255, 4),
    ],
)
def test_what_the_codes_stand_for(type_: ScalarType, name: str, low: int, high: int, per_int32: int) -> None:
    assert (type_.name, str(type_)) == (name, name)
    assert (type_.min, type_.max) == (low, high)
    assert type_.per_int32 == per_int32
    decoded = [code - type_.bias for code in range(1 << type_.bits)]
    assert (decoded[0], decoded[-1]) == (type_.min, type_.max)


@pytest.mark.parametrize("type_", SCALAR_TYPES.values(), ids=str)
def test_every_code_of_the_zero_word_stands_for_zero(type_: ScalarType) -> None:
    assert -(2**31) <= type_.zero_word < 2**31
    for i in range(type_.per_int32):
        code = type_.zero_word >> (type_.bits * i) & ((1 << type_.bits) - 1)
        assert code - type_.bias == 0


def test_lookup_by_name() -> None:
    for type_ in (u4b8, u8b128, u4, u8):
        assert scalar_type(type_.name) is type_
    with pytest.raises(ArgumentError, match=r"'u5'; there are u4b8, u8b128, u4, u8"):
        scalar_type("u5")


def test_types_are_frozen_values() -> None:
    assert ScalarType("u4b8", 4, 8) == u4b8 and hash(ScalarType("u4b8", 4, 8)) == hash(u4b8)
    assert u4 != u4b8
    with pytest.raises(dataclasses.FrozenInstanceError):
        u4b8.bias = 0  # type: ignore[misc]
