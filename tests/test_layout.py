# SPDX-License-Identifier: Apache-2.0
"""Prepacked layouts against a model of the registers that a kernel takes out of them.

The model follows the PTX ISA's definition of the A operand of wgmma.mma_async .m64k16 with 16-bit elements: which
elements a0..a7 a thread holds, two to a register. It shares nothing with layout.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from machete_aot import layout
from machete_aot.errors import UnsupportedError
from machete_aot.prepack import prepack_b
from machete_aot.scalar_type import SCALAR_TYPES, ScalarType, u4b8, u8b128
from quantised import gptq, random_codes


def fragment_element(thread: int, i: int) -> tuple[int, int]:
    """(row, column) of element a_i of a thread's A fragment, for 0 <= thread < 128 and 0 <= i < 8."""
    warp, lane = divmod(thread, 32)
    group_id, thread_in_group = divmod(lane, 4)
    row = 16 * warp + group_id + (8 if i in (2, 3, 6, 7) else 0)
    column = 2 * thread_in_group + (i & 1) + (8 if i >= 4 else 0)
    return row, column


def registers_u4(unit: np.ndarray, thread: int, block: int) -> list[int]:
    """R0..R3 as a kernel gets them from a unit of n64k64-u4: one 16-byte load, then masks and a shift."""
    word = int(unit[4 * thread + block])
    shifted = word >> 8
    return [word & 0x000F000F, shifted & 0x000F000F, (word & 0x00F000F0) >> 4, (shifted & 0x00F000F0) >> 4]


def registers_u8(unit: np.ndarray, thread: int, block: int) -> list[int]:
    """R0..R3 from a unit of n64k64-u8: one 16-byte load for each half of the unit."""
    load = 512 * (block // 2) + 4 * thread
    first, second = (int(unit[load + 2 * (block % 2) + h]) for h in (0, 1))
    return [first & 0x00FF00FF, first >> 8 & 0x00FF00FF, second & 0x00FF00FF, second >> 8 & 0x00FF00FF]


def elements(unit: np.ndarray, bits: int) -> Iterator[tuple[int, int, int]]:
    """(row, k, code) of every element that the 128 threads take out of a unit."""
    for thread in range(128):
        for block in range(4):
            registers = (registers_u4 if bits == 4 else registers_u8)(unit, thread, block)
            for i in range(8):
                row, column = fragment_element(thread, i)
                yield row, 16 * block + column, registers[i // 2] >> (16 * (i % 2)) & 0xFFFF


@pytest.mark.parametrize("type_", [u4b8, u8b128], ids=str)
def test_fragments_hold_the_right_codes(type_: ScalarType) -> None:
    n, k = 100, 140  # two units along N, three along K, both with padding
    codes = random_codes(k, n, type_.bits, seed=5)
    padded = np.full((192, 128), type_.bias, dtype=np.uint8)
    padded[:k, :n] = codes
    packed = prepack_b(gptq(codes, type_.bits), type_, k=k).numpy().view(np.uint32)
    assert packed.shape == (2, 3, 1024 * type_.bits // 8)
    for tile_n in range(2):
        for tile_k in range(3):
            unit = np.full((64, 64), -1)
            for row, column, code in elements(packed[tile_n, tile_k], type_.bits):
                unit[column, row] = code
            expected = padded[64 * tile_k : 64 * tile_k + 64, 64 * tile_n : 64 * tile_n + 64]
            np.testing.assert_array_equal(unit, expected)


@pytest.mark.parametrize("type_", [u4b8, u8b128], ids=str)
def test_position_names_every_code_of_a_unit_once(type_: ScalarType) -> None:
    unit_layout = layout.layout_for(type_)
    codes = random_codes(64, 64, type_.bits, seed=6)
    unit = prepack_b(gptq(codes, type_.bits), type_).numpy().view(np.uint32)[0, 0]
    seen = set()
    for row in range(64):
        for k in range(64):
            word, bit = unit_layout.position(row, k)
            seen.add((word, bit))
            assert int(unit[word]) >> bit & ((1 << type_.bits) - 1) == codes[k, row]
    assert len(seen) == 64 * 64
    assert {word for word, _ in seen} == set(range(unit_layout.unit_words))


def test_names_versions_and_sizes() -> None:
    assert {(x.name, x.version, x.unit_words) for x in layout.LAYOUTS.values()} == {
        ("n64k64-u4", 1, 512),
        ("n64k64-u8", 1, 1024),
    }
    for name, type_ in SCALAR_TYPES.items():
        assert layout.layout_for(type_).name == ("n64k64-u4" if name.startswith("u4") else "n64k64-u8")
        assert layout.LAYOUTS[layout.layout_for(type_).name] is layout.layout_for(type_)


@pytest.mark.parametrize(
    ("n", "k", "shape"), [(1, 1, (1, 1)), (64, 64, (1, 1)), (65, 64, (2, 1)), (64, 65, (1, 2)), (4304, 1152, (68, 18))]
)
def test_packed_shape(n: int, k: int, shape: tuple[int, int]) -> None:
    assert layout.packed_shape(n, k, u4b8) == (*shape, 512)
    assert layout.packed_shape(n, k, u8b128) == (*shape, 1024)


def test_a_type_without_a_layout() -> None:
    with pytest.raises(UnsupportedError, match=r"2-bit type u2.*n64k64-u4 \(4 bits\), n64k64-u8 \(8 bits\)"):
        layout.layout_for(ScalarType("u2", 2, 0))
