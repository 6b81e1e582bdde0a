# SPDX-License-Identifier: Apache-2.0
"""Codes of 4 and 8 bits to and from int32 words, on any device. Scratch is one byte a code and one word in passing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ArgumentError, UnsupportedError
from ..scalar_type import u4, u4b8, u8, u8b128

BITS = (4, 8)
SYMMETRIC = {4: u4b8, 8: u8b128}  # the types whose zero point is in their name, by their bits
PLAIN = {4: u4, 8: u8}


def check_bits(bits: int, what: str) -> None:
    """Raises UnsupportedError unless weights of so many bits can be multiplied."""
    if bits not in BITS:
        raise UnsupportedError(f"{what} of {bits} bits; weights of 4 and 8 bits are supported")


def unpack_words(words: torch.Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """uint8 codes of int32 words [R, C]: [R * per, C] for ``dim`` 0, [R, C * per] for 1; per = 32 / bits.

    The lowest bits of a word hold its first code. ``order``: the i-th lowest bits hold code ``order[i]`` instead.
    """
    if words.dim() != 2 or words.dtype != torch.int32:
        raise ArgumentError(f"packed codes must be an int32 matrix, got {words.dtype} of shape {tuple(words.shape)}")
    per, mask = 32 // bits, (1 << bits) - 1
    rows, columns = words.shape
    shape = (rows, per, columns) if dim == 0 else (rows, columns, per)
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for i, code in enumerate(order or range(per)):
        codes.select(1 if dim == 0 else 2, code).copy_((words >> (bits * i)).bitwise_and_(mask))
    return codes.flatten(0, 1) if dim == 0 else codes.flatten(1)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ order: int32 [ceil(K / per), N] of uint8 codes [K, N]; the last word's missing codes are 0."""
    k, n = codes.shape
    per = 32 // bits
    words = torch.zeros(-(-k // per), n, dtype=torch.int32, device=codes.device)
    for i in range(per):
        some = codes[i::per]
        words[: some.shape[0]] |= some.to(torch.int32) << (bits * i)
    return words
