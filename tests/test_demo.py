# SPDX-License-Identifier: Apache-2.0
"""The demonstration on the CPU: its helpers against definitions, its table, and that it notices wrong results."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from machete_aot import demo
from machete_aot.scalar_type import u4b8

SMALL = demo.Layer("small", 200, 320, group=128)  # a partial last group, ragged N


@pytest.mark.parametrize("group", [-1, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantise_is_within_half_a_step(group: int, dtype: torch.dtype) -> None:
    weights = torch.randn(320, 24, generator=torch.Generator().manual_seed(1))
    codes, scales = demo.quantise(weights, group, dtype)
    size = 320 if group == -1 else group
    assert scales.shape == (-(-320 // size), 24)
    assert int(codes.min()) >= 0 and int(codes.max()) <= 15
    steps = scales.float().repeat_interleave(size, dim=0)[:320]
    assert bool(((codes - 8) * steps - weights).abs().le(0.52 * steps).all())


def test_pack_gptq_puts_the_lowest_k_in_the_lowest_bits() -> None:
    codes = torch.randint(0, 16, (32, 5), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    packed = demo.pack_gptq(codes)
    assert packed.shape == (4, 5)
    for k in range(32):
        assert torch.equal(packed[k // u4b8.per_int32] >> (4 * (k % 8)) & 15, codes[k])


def test_results_are_accurate_and_show_in_the_table() -> None:
    results = list(demo.run_demo((SMALL,), (1, 5)))
    assert [r.m for r in results] == [1, 5]
    for result in results:
        assert result.error > 0 and demo.is_accurate(result)
        assert result.schedule in demo.line(result)
        if not torch.cuda.is_available():
            assert result.seconds is None


def test_a_wrong_result_is_not_accurate() -> None:
    result = next(demo.run_demo((SMALL,), (1,)))
    assert not demo.is_accurate(dataclasses.replace(result, error=demo.TOLERANCE["bf16"] * 1.01))
    assert not demo.is_accurate(dataclasses.replace(result, error=float("nan")))


def test_head_and_lines_are_aligned() -> None:
    result = next(demo.run_demo((SMALL,), (1,)))
    assert len(demo.header()) == len(demo.line(result))
