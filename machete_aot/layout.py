# SPDX-License-Identifier: Apache-2.0
"""Prepacked layouts: their names, versions and shapes, and where each code lies in a unit.

A unit is 64 rows of N x 64 k, in the register order of four wgmma m64k16 A fragments. The packed tensor is
int32 [ceil(N/64), ceil(K/64), words of a unit]. A layout that has been released never changes: weights prepacked and
saved under its name and version stay valid. docs/architecture.md has the same definition in words.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import UNIT_K, UNIT_ROWS
from .errors import UnsupportedError
from .scalar_type import ScalarType


@dataclass(frozen=True)
class Layout:
    """One prepacked layout for codes of ``bits`` bits and 16-bit activations."""

    name: str
    version: int
    bits: int

    @property
    def unit_words(self) -> int:
        """int32 words of one unit of 64 x 64 codes."""
        return UNIT_ROWS * UNIT_K * self.bits // 32

    def position(self, row: int, k: int) -> tuple[int, int]:
        """Where the code at (row, k) of a unit lies: (word in the unit, lowest bit in that word); 0 <= row, k < 64.

        In the A fragment of a k16 block, thread t of the warpgroup holds rows g and g + 8 of its warp's 16 rows and,
        of each half of the block, the two k of its quarter of a row. A code is thus named by the block, the thread,
        whether it is in row g + 8 (``lower``), in the half of k + 8 (``half``), and the odd one of two (``odd``).
        """
        block, half, pair, odd = k // 16, k // 8 % 2, k // 2 % 4, k % 2
        warp, lower, g = row // 16, row // 8 % 2, row % 8
        thread = 32 * warp + 4 * g + pair
        if self.bits == 4:
            return 4 * thread + block, 4 * (4 * odd + 2 * lower + half)
        return 512 * (block // 2) + 4 * thread + 2 * (block % 2) + half, 8 * (2 * odd + lower)


N64K64_U4 = Layout("n64k64-u4", 1, 4)
N64K64_U8 = Layout("n64k64-u8", 1, 8)

LAYOUTS = {layout.name: layout for layout in (N64K64_U4, N64K64_U8)}
_BY_BITS = {layout.bits: layout for layout in LAYOUTS.values()}


def layout_for(b_type: ScalarType) -> Layout:
    """The layout that weights of this type are prepacked in. Raises UnsupportedError if there is none."""
    try:
        return _BY_BITS[b_type.bits]
    except KeyError:
        raise UnsupportedError(
            f"no prepacked layout for {b_type.bits}-bit type {b_type}; there are "
            + ", ".join(f"{layout.name} ({bits} bits)" for bits, layout in _BY_BITS.items())
        ) from None


def packed_shape(n: int, k: int, b_type: ScalarType) -> tuple[int, int, int]:
    """Shape of the int32 tensor that holds prepacked weights of N = ``n`` rows and K = ``k``."""
    return -(-n // UNIT_ROWS), -(-k // UNIT_K), layout_for(b_type).unit_words
