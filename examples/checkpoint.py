# SPDX-License-Identifier: Apache-2.0
"""Writes small GPTQ and AWQ checkpoints of a Hugging Face model, rounded to nearest, for ``examples.generate``.

Real checkpoints come from tools that calibrate. What is written here has their tensors, names and config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from machete_aot.nn import round_to_nearest
from machete_aot.nn.awq import COLUMNS
from machete_aot.nn.bits import pack_rows, unpack_words
from machete_aot.scalar_type import u4

CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"},
}


def write_checkpoint(model: Any, folder: Path, form: str, group_size: int) -> None:
    """Writes ``model``, a Hugging Face model, with all linear layers but ``lm_head`` in 4 bits.

    ``form``: "gptq" or "awq". The model's own layers get the same weights, dequantised.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            quantised = round_to_nearest(module.weight, u4, group_size)
            codes, scales, points = unpack_words(quantised.w_q, 4, 0), quantised.scales, quantised.zeros
            assert points is not None
            values = (codes.to(scales.dtype) - points.to(scales.dtype).repeat_interleave(group_size, 0)) * (
                scales.repeat_interleave(group_size, 0)
            )
            module.weight.data = values.t().contiguous()
            found = _gptq(codes, points) if form == "gptq" else _awq(codes, points)
            tensors |= {f"{name}.{part}": value for part, value in (found | {"scales": scales}).items()}
    layers = {name.rpartition(".")[0] for name in tensors}
    tensors |= {n: v.clone() for n, v in model.state_dict().items() if n.rpartition(".")[0] not in layers}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": CONFIGS[form] | {"group_size": group_size}}
    (folder / "config.json").write_text(json.dumps(config, default=str))


def _gptq(codes: torch.Tensor, points: torch.Tensor) -> dict[str, torch.Tensor]:
    """Words along K, zero points along N."""
    k, groups = codes.shape[0], points.shape[0]
    g_idx = (torch.arange(k) // (k // groups)).to(torch.int32)
    return {"qweight": pack_rows(codes, 4), "qzeros": pack_rows(points.t(), 4).t().contiguous(), "g_idx": g_idx}


def _awq(codes: torch.Tensor, points: torch.Tensor) -> dict[str, torch.Tensor]:
    """Words along N, columns interleaved."""

    def pack(values: torch.Tensor) -> torch.Tensor:
        interleaved = values.unflatten(1, (-1, 8))[..., list(COLUMNS)].flatten(1)
        return pack_rows(interleaved.t(), 4).t().contiguous()

    return {"qweight": pack(codes), "qzeros": pack(points)}
