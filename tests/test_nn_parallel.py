# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism with gloo on the CPU, several processes against the layer that was not sharded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

import parallel_gpu_worker
import parallel_worker
from machete_aot.errors import UnsupportedError
from processes import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_against_layers_that_are_not_sharded(ranks: int, tmp_path: Path) -> None:
    run_ranks(parallel_worker.run, ranks, tmp_path)


def test_what_two_gpus_do_on_the_cpu(tmp_path: Path) -> None:
    """The checks of gpu/test_parallel_gpu.py, smaller and without graphs."""
    run_ranks(parallel_gpu_worker.run, 2, tmp_path, "cpu")


def fails_at_rank_1(rank: int, ranks: int, folder: str) -> None:
    if rank == 1:
        Path(folder, "error-1").write_text("what went wrong")
        raise SystemExit(1)
    time.sleep(60)


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="error-1: what went wrong"):
        run_ranks(fails_at_rank_1, 2, tmp_path, patience=0.1)
    assert time.monotonic() - start < 50


def test_places_to_cut() -> None:
    from machete_aot.nn.parallel import cut

    assert cut(256, 64, 2, False, "N") == [0, 128, 256]
    assert cut(300, 64, 2, True, "N") == [0, 128, 300]
    assert cut(14336, 128, 8, False, "K") == [1792 * i for i in range(9)]
    assert cut(11008, 128, 4, True, "K") == [0, 2688, 5504, 8192, 11008]
    with pytest.raises(UnsupportedError, match="K = 11008 cannot be cut evenly for 4 ranks in units of 128"):
        cut(11008, 128, 4, False, "K")
