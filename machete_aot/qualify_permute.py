# SPDX-License-Identifier: Apache-2.0
"""Qualification of the kernel that permutes columns: every case against torch's gather, bit for bit.

The elements are random bits, NaNs of all kinds among them; the output lies in a poisoned buffer larger than itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .permute import permute_columns
from .prepack import A_DTYPES
from .record import HelperResult

ROWS = (1, 3, 64, 1000)
COLUMNS = (8, 100, 4096, 28672)
POISON = 0x7FFF  # what no element is
LONGEST = 500  # characters of a failure in a record
MARGIN_ROWS = 1
MARGINS = {True: (8, 8), False: (3, 4)}  # columns left and right; the latter gives odd addresses and an odd row stride


class Case(NamedTuple):
    """``aligned``: rows of input and output, and the order, begin on 16 bytes, if K is a multiple of 8."""

    m: int
    k: int
    dtype: str
    aligned: bool

    def __str__(self) -> str:
        return f"M={self.m} K={self.k} {self.dtype}{'' if self.aligned else ' unaligned'}"


def cases() -> Iterator[Case]:
    """All of them: those of few elements gather from global memory, the others from shared memory."""
    yield from itertools.starmap(Case, itertools.product(ROWS, COLUMNS, A_DTYPES, (True, False)))


def describe(case: object, error: Exception) -> str:
    """A failure in one line of ASCII, for a record."""
    return re.sub(r"[^ -~]+", " ", f"{case}: {type(error).__name__}: {error}")[:LONGEST]


def qualify_permute(seed: int, device: str = "cuda") -> HelperResult:
    """Runs all cases on torch's current device, each twice."""
    generator = torch.Generator(device).manual_seed(seed)
    wrong, failures, count = [], [], 0
    deterministic = guards_intact = True
    for case in cases():
        count += 1
        try:
            right, repeats, inside = run_case(case, generator)
        except Exception as error:  # collected, so that one failure hides no other
            failures.append(describe(case, error))
            continue
        deterministic &= repeats
        guards_intact &= inside
        wrong += [] if right else [str(case)]
    return HelperResult(count, tuple(wrong), deterministic, guards_intact, tuple(failures))


def run_case(case: Case, generator: torch.Generator) -> tuple[bool, bool, bool]:
    """Whether all bits are right, a second run gave the same ones, and nothing beside the output was written."""
    device, (left, right) = generator.device, MARGINS[case.aligned]
    shape = case.m + 2 * MARGIN_ROWS, left + case.k + right
    inner = slice(MARGIN_ROWS, -MARGIN_ROWS), slice(left, -right)
    bits = torch.randint(-(2**15), POISON, shape, dtype=torch.int16, device=device, generator=generator)
    order = torch.empty(left + case.k, dtype=torch.int32, device=device)[left:]
    order.copy_(torch.randperm(case.k, device=device, generator=generator))
    found = []
    for _ in range(2):
        buffer = torch.full(shape, POISON, dtype=torch.int16, device=device)
        permute_columns(bits.view(A_DTYPES[case.dtype])[inner], order, out=buffer.view(A_DTYPES[case.dtype])[inner])
        found.append(buffer)
    first, second = found
    margins = first.clone()
    margins[inner] = POISON
    expected = bits[inner].index_select(-1, order)
    return torch.equal(first[inner], expected), torch.equal(first, second), bool((margins == POISON).all())
