# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on two GPUs through NCCL: layers and a decoder against those that are not cut, in graphs too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import parallel_gpu_worker
from processes import run_ranks

pytestmark = pytest.mark.gpu


def test_two_gpus_against_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    if not dist.is_available() or not dist.is_nccl_available():
        pytest.skip("torch was built without NCCL")
    run_ranks(parallel_gpu_worker.run, 2, tmp_path, "cuda", seconds=90)
