# SPDX-License-Identifier: Apache-2.0
"""What prepacking on a GPU makes ready for the first product: what, when, and that it never gets in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import machete_aot as machete
from machete_aot import ahead, driver, fetch
from machete_aot.errors import BundleError, DeviceError
from stub.harness import Stub, stubbed

W_Q = torch.zeros(512, 64, dtype=torch.int32)


def on_a_gpu() -> None:
    """As if tensors were on a GPU. For a process that ends with the test."""
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    torch.Tensor.get_device = lambda tensor: 0  # type: ignore[assignment]


@stubbed
def test_prepacking_on_a_gpu_opens_the_bundle(stub: Stub) -> None:
    on_a_gpu()
    machete.prepack_b(W_Q, machete.u4b8)
    bundle = fetch._current
    assert bundle is not None
    assert set(bundle._dictionaries) == {"flat", "stream"}
    assert set(driver._state.devices) == {0}
    assert set(vars(bundle.manifest._parts)["_kernels"]) == {"bf16_u4b8"}
    assert stub.calls("cuLibraryLoadData") == 0  # which kernel follows from the size of the product


@stubbed
def test_it_is_done_once_for_each_kind(stub: Stub) -> None:
    on_a_gpu()
    done = []
    ahead._prepare = lambda *key: done.append(key)
    for _ in range(2):
        machete.prepack_b(W_Q, machete.u4b8)
        machete.prepack_gate_up(W_Q, W_Q, machete.u8, torch.float16)
    assert done == [(0, "u4b8", "bf16"), (0, "u8", "fp16")]


@stubbed
def test_a_failure_is_the_products(stub: Stub) -> None:
    on_a_gpu()
    expected = machete.prepack_b(W_Q, machete.u4b8)
    ahead._done.clear()
    stub.fail("cuDeviceGet", 101)
    driver._start_over()
    assert torch.equal(machete.prepack_b(W_Q, machete.u4b8), expected)
    with pytest.raises(DeviceError):
        driver.device(0)

    def refuse() -> None:
        raise BundleError("damaged")

    fetch.use_bundle(None)
    fetch.fetch_bundle = refuse  # type: ignore[assignment]
    ahead._done.clear()
    assert torch.equal(machete.prepack_b(W_Q, machete.u4b8), expected)
    scales = torch.ones(32, 64).bfloat16()
    from machete_aot import product

    product._current_stream = lambda index: 1
    with pytest.raises(BundleError, match="damaged"):
        machete.gemm(torch.zeros(1, 4096).bfloat16(), expected, machete.u4b8, scales)


@stubbed
def test_nothing_is_downloaded(stub: Stub) -> None:
    on_a_gpu()
    os.environ[fetch.SOURCE_VARIABLE] = "http://127.0.0.1:9/none"
    machete.prepack_b(W_Q, machete.u4b8)
    assert fetch._current is None


@stubbed
def test_on_the_cpu_nothing_is_opened(stub: Stub) -> None:
    machete.prepack_b(W_Q, machete.u4b8)
    assert fetch._current is None
    assert stub.calls("cuInit") == 0


def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "first.json"
    command = [sys.executable, "-m", "benchmarks.first", "--processes", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    alone, prepacked = record["alone"], record["prepacked"]
    assert prepacked["median_ms"]["open the bundle"] < alone["median_ms"]["open the bundle"]
    assert alone["median_ms"]["read and check the cubin"] < alone["median_ms"]["first product"]
    assert alone["imported"] == prepacked["imported"] == []  # all that a product needs comes with the package
