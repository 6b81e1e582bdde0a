# SPDX-License-Identifier: Apache-2.0
"""Quantised weights for tests, made with numpy alone: random codes and their GPTQ packing."""

from __future__ import annotations

import numpy as np
import torch


def random_codes(k: int, n: int, bits: int, seed: int) -> np.ndarray:
    """uint8 [k, n] of codes of so many bits."""
    return np.random.default_rng(seed).integers(0, 1 << bits, (k, n), dtype=np.uint8)


def gptq(codes: np.ndarray, bits: int, fill: int = 0) -> torch.Tensor:
    """int32 [ceil(k / per), n]: the lowest bits of a word hold the lowest k. ``fill`` completes the last row."""
    per = 32 // bits
    k, n = codes.shape
    padded = np.full((-(-k // per) * per, n), fill, dtype=np.uint32)
    padded[:k] = codes
    words = np.zeros((padded.shape[0] // per, n), dtype=np.uint32)
    for i in range(per):
        words |= padded[i::per] << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32))
