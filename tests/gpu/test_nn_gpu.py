# SPDX-License-Identifier: Apache-2.0
"""Layers and models of quantised checkpoints on a GPU: against the CPU, fused, in a CUDA graph, loaded there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import machete_aot as machete
from checkpoints import BF16, FP16, Case, make, toy, write
from machete_aot.nn import MacheteLinear, fuse, load_prepacked, load_quantized, parameters_on_meta, save_prepacked
from machete_aot.scalar_type import SCALAR_TYPES

pytestmark = pytest.mark.gpu

CASES = [
    Case("GPTQ", 4, 128, False, "symmetric"),
    Case("GPTQ", 4, 64, True, "integer"),
    Case("GPTQ", 8, 128, True, "symmetric"),
    Case("compressed-tensors", 8, -1, False, "integer"),
    Case("AWQ", 4, 32, False, "integer"),
]
IDS = torch.arange(12).view(2, 6) * 7


def need_kernels(case: Case, dtype: torch.dtype) -> None:
    symmetric = case.zeros == "symmetric"
    b_type = SCALAR_TYPES[f"u{case.bits}" + (f"b{1 << case.bits - 1}" if symmetric else "")]
    if not machete.supported_schedules(dtype, b_type, case.group, False if symmetric else "int"):
        pytest.skip(f"the bundle has no kernels for {case}")


def close(found: torch.Tensor, wanted: torch.Tensor, limit: float) -> bool:
    return float((found.cpu().double() - wanted.double()).norm()) <= limit * float(wanted.double().norm())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_prepacked_and_multiplied_there(case: Case, dtype: torch.dtype) -> None:
    need_kernels(case, dtype)
    stored = make(case, 320, 512)
    build = {"AWQ": MacheteLinear.from_awq, "compressed-tensors": MacheteLinear.from_compressed_tensors}
    build_ = build.get(case.format, MacheteLinear.from_gptq)
    here = build_(**stored.tensors, **stored.options, dtype=dtype)
    there = build_(**{name: tensor.cuda() for name, tensor in stored.tensors.items()}, **stored.options, dtype=dtype)
    for (name, mine), theirs in zip(here.named_buffers(), there.buffers(), strict=True):
        assert theirs.is_cuda and torch.equal(theirs.cpu(), mine), name
    for m in (1, 17, 200):
        x = torch.randn(m, 512).to(dtype)
        assert close(there(x.cuda()), here(x), {BF16: 2.5e-3, FP16: 3.5e-4}[dtype])


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_model_loaded_fused_saved_and_captured(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    need_kernels(case, FP16)
    floating = toy(inner=512)
    write(tmp_path / "checkpoint", floating, case)
    with torch.no_grad():
        expected = copy.deepcopy(floating).double()(IDS)
    with parameters_on_meta():
        model, again = (type(floating)(inner=512).to(FP16) for _ in range(2))
    load_quantized(model, tmp_path / "checkpoint", device="cuda", progress=False)
    ids = IDS.cuda()
    with torch.inference_mode():
        assert close(model(ids), expected, 4e-3)
        report = fuse(model)
        # Act-orders of random layers differ, so nothing is merged.
        assert len(report.merged) == (0 if case.act_order else 4)
        found = model(ids)
        assert close(found, expected, 4e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(ids)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, found)
    save_prepacked(model, tmp_path / "prepacked")
    load_prepacked(again, tmp_path / "prepacked", device="cuda", progress=False)
    with torch.inference_mode():
        assert torch.equal(again(ids), found)
