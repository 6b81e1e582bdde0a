# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a GPU: a small run of the command, and a small chain of decoder layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import chain
from machete_aot import cli
from machete_aot.bench import OURS
from machete_aot.peers import Cublas

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "group", "tolerance"), [("bf16", 128, 2.5e-3), ("fp16", -1, 3.5e-4)])
def test_a_small_run(dtype: str, group: int, tolerance: float, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    arguments = ["--shapes", "2048x2048", "--tokens", "1,64", "--rounds", "3", "--dtype", dtype, "--group", str(group)]
    assert cli.main(["bench", *arguments, "--peers", "cublas", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["device"]["name"] == torch.cuda.get_device_name()
    assert document["device"]["sms"] == torch.cuda.get_device_properties(0).multi_processor_count
    assert (document["types"], document["group"], document["rounds"]) == (dtype, group, 3)
    assert document["peers"] == {"cublas": {"version": f"torch {torch.__version__}", "problem": None}}
    assert [(r["m"], r["n"], r["k"]) for r in document["rows"]] == [(1, 2048, 2048), (64, 2048, 2048)]
    for row in document["rows"]:
        assert 0 <= row["error"] <= tolerance and row["problem"] is None
        assert 0.5 * row["floor_us"] < row["us"] < 200  # a floor is what a card sustains, not what it cannot pass
        assert row["best_peer"] == "cublas" and 0 < row["cublas_us"] < 200
        assert 0 <= row["peers"]["cublas"]["error"] <= 4 * tolerance
        if row["sm_mhz"] is not None:  # NVML is there
            assert 300 < row["sm_mhz"] < 3000 and row["memory_mhz"] > 1000 and document["device"]["power_limit_w"] > 100


def test_a_small_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "COLD_BYTES", 1.0)  # two layers
    model = chain.Model("small", 1024, 2048, 8, 2)
    (row,) = chain.chain(model, (16,), torch.bfloat16, 128, 3, [Cublas()])
    assert row["problems"] == {}
    assert list(row["us"]) == [OURS, chain.WAITING, "cublas", chain.ALONE]
    assert all(us > 0 for us in row["us"].values())
    assert row["us"][chain.ALONE] < row["us"][OURS]
    assert row["distance_from_ours"][chain.WAITING] == 0  # overlap changes no bit
    assert row["distance_from_ours"]["cublas"] < 0.05
