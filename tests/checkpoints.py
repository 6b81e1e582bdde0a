# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints for tests: each format's tensors and what they mean, from the formats' definitions, in numpy.

``CASES`` is what the tests of formats cover and what the table in docs/models.md says:

    python tests/checkpoints.py    # prints that table
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

AWQ_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where a word's column c % 8 lies, in nibbles from the lowest
BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One way in which a linear layer can be stored. ``zeros``: "symmetric", "integer" or "floating"."""

    format: str
    bits: int
    group: int
    act_order: bool
    zeros: str
    loads: bool = True  # load_quantized reads it, not only MacheteLinear

    def __str__(self) -> str:
        order = "-act_order" if self.act_order else ""
        return f"{self.format.replace(' ', '_')}-{self.bits}-g{self.group}-{self.zeros}{order}"


def _cases() -> list[Case]:
    found = []
    for bits in (4, 8):
        for zeros in ("symmetric", "integer"):
            for group in (32, 64, 128, -1):
                found += [Case(f, bits, group, False, zeros) for f in ("GPTQ", "GPTQ v2", "compressed-tensors")]
                if bits == 4:
                    found.append(Case("AWQ", bits, group, False, zeros))
            for group in (32, 128):
                found += [Case(f, bits, group, True, zeros) for f in ("GPTQ", "GPTQ v2", "compressed-tensors")]
        for zeros in ("integer", "floating"):
            found += [Case("HQQ", bits, group, False, zeros, loads=False) for group in (32, 64, 128, -1)]
    return found


CASES = _cases()


@dataclass
class Layer:
    """A stored layer: its tensors by the last part of their names, what else its format needs, and its weights.

    ``codes`` [K, N], ``points`` [groups, N] (zero points), ``scales`` float64 [groups, N], ``groups`` [K]: the value of
    (k, n) is (codes[k, n] - points[groups[k], n]) * scales[groups[k], n].
    """

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    codes: np.ndarray
    points: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    def weights(self, dtype: torch.dtype) -> torch.Tensor:
        """[K, N] in ``dtype``: scales rounded to it, then the value."""
        scales = torch.from_numpy(self.scales).to(dtype).double().numpy()
        exact = (self.codes.astype(np.float64) - self.points[self.groups]) * scales[self.groups]
        return torch.from_numpy(exact).to(dtype)


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 1 << 32, shape, dtype=np.uint32)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.view(np.int32) if array.dtype == np.uint32 else array))


def make(case: Case, n: int, k: int, seed: int = 0, dtype: torch.dtype = FP16) -> Layer:
    """A random layer of N outputs and K inputs; ``dtype``: of the stored scales."""
    rng = np.random.default_rng(seed)
    size = k if case.group == -1 else min(case.group, k)
    count = -(-k // size)
    groups = np.arange(k) // size
    if case.act_order:
        groups = rng.permutation(groups)
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, (count, n)) * 0.1 / 2**case.bits).to(dtype)
    build: Callable[..., Layer] = {
        "GPTQ": _gptq, "GPTQ v2": _gptq, "AWQ": _awq, "compressed-tensors": _compressed, "HQQ": _hqq,
    }[case.format]  # fmt: skip
    return build(case, rng, n, k, groups, scales)


def _shifted(array: np.ndarray, places: np.ndarray, bits: int) -> np.ndarray:
    return (array >> (places * bits).astype(np.uint32)) & np.uint32((1 << bits) - 1)


def _gptq(case: Case, rng: np.random.Generator, n: int, k: int, groups: np.ndarray, scales: torch.Tensor) -> Layer:
    bits, per, count = case.bits, 32 // case.bits, len(scales)
    middle, first = 1 << (bits - 1), case.format == "GPTQ"
    qweight = words(rng, k // per, n)
    rows, columns = np.arange(k), np.arange(n)
    codes = _shifted(qweight[rows // per], (rows % per)[:, None], bits)
    if case.zeros == "symmetric":
        word = sum((middle - first) << (bits * i) for i in range(per))
        qzeros = np.full((count, -(-n // per)), word, dtype=np.uint32)
    else:
        qzeros = words(rng, count, -(-n // per))
        if bits == 8:
            qzeros &= np.uint32(0x7F7F7F7F)  # 255 + 1 has no place in uint8
        else:
            qzeros[0] |= np.uint32(0xF)  # a stored 15: of version 1 the zero point is 16
    points = _shifted(qzeros[:, columns // per], columns % per, bits) + np.uint32(first)
    tensors = {"qweight": tensor(qweight), "qzeros": tensor(qzeros), "scales": scales}
    tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    options = {"bits": bits, "group_size": case.group, "version": 1 if first else 2}
    return Layer(tensors, options, codes, points, scales.double().numpy(), groups)


def _awq(case: Case, rng: np.random.Generator, n: int, k: int, groups: np.ndarray, scales: torch.Tensor) -> Layer:
    qweight, qzeros = words(rng, k, n // 8), words(rng, len(scales), n // 8)
    if case.zeros == "symmetric":
        qzeros[:] = 0x88888888
    columns = np.arange(n)
    places = AWQ_PLACE[columns % 8]
    codes, points = (_shifted(array[:, columns // 8], places, 4) for array in (qweight, qzeros))
    tensors = {"qweight": tensor(qweight), "qzeros": tensor(qzeros), "scales": scales}
    return Layer(tensors, {"group_size": case.group}, codes, points, scales.double().numpy(), groups)


def _compressed(
    case: Case, rng: np.random.Generator, n: int, k: int, groups: np.ndarray, scales: torch.Tensor
) -> Layer:
    bits, per, count = case.bits, 32 // case.bits, len(scales)
    packed = words(rng, n, -(-k // per))
    rows, columns = np.arange(k), np.arange(n)
    codes = _shifted(packed[:, rows // per], rows % per, bits).T
    tensors = {"weight_packed": tensor(packed), "weight_scale": scales.t().contiguous()}
    tensors["weight_shape"] = torch.tensor([n, k])
    points = np.full((count, n), 1 << (bits - 1), dtype=np.uint32)
    if case.zeros == "integer":
        zeros = words(rng, -(-n // per), count)
        points = _shifted(zeros[columns // per], (columns % per)[:, None], bits).T
        tensors["weight_zero_point"] = tensor(zeros)
    if case.act_order:
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    options = {"bits": bits, "group_size": case.group}
    return Layer(tensors, options, codes, points, scales.double().numpy(), groups)


def _hqq(case: Case, rng: np.random.Generator, n: int, k: int, groups: np.ndarray, scales: torch.Tensor) -> Layer:
    size = k // len(scales)
    codes = rng.integers(0, 1 << case.bits, (n * len(scales), size), dtype=np.uint8)
    if case.bits == 4:
        half = len(codes) // 2
        stored = codes[:half] * np.uint8(16) + codes[half:]
    else:
        stored = codes
    points = rng.uniform(0, (1 << case.bits) - 1, scales.shape)
    if case.zeros == "integer":
        points = points.round()
    points = points.astype(np.float32)
    meta = {
        "nbits": case.bits, "axis": 1, "group_size": None if case.group == -1 else case.group, "shape": (n, k),
        "packing": f"{case.bits}bit_u8", "scale": scales.float().t().reshape(-1, 1),
        "zero": torch.from_numpy(points.T.reshape(-1, 1)),
    }  # fmt: skip
    tensors = {"W_q": torch.from_numpy(stored)}
    return Layer(tensors, {"meta": meta}, codes.reshape(n, k).T, points, scales.double().numpy(), groups)


CONFIGS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "GPTQ": lambda case: {
        "quant_method": "gptq", "bits": case.bits, "group_size": case.group, "desc_act": case.act_order,
        "sym": case.zeros == "symmetric", "lm_head": False, "checkpoint_format": "gptq",
    },
    "GPTQ v2": lambda case: {**CONFIGS["GPTQ"](case), "checkpoint_format": "gptq_v2"},
    "AWQ": lambda case: {
        "quant_method": "awq", "bits": 4, "group_size": case.group, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    },
    "compressed-tensors": lambda case: {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": {
            "num_bits": case.bits, "type": "int", "symmetric": case.zeros == "symmetric",
            "strategy": "channel" if case.group == -1 else "group",
            "group_size": None if case.group == -1 else case.group, "actorder": "group" if case.act_order else None,
        }}},
    },
}  # fmt: skip


def write(
    folder: Path,
    model: torch.nn.Module,
    case: Case,
    *,
    files: int = 1,
    in_turn: bool = True,
    keep: tuple[str, ...] = ("lm_head",),
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> None:
    """Writes a checkpoint of the model in which all linear layers but ``keep`` are random ones of this case.

    The model's own layers get the same weights, dequantised. ``files``: over how many the tensors are dealt, in turn,
    so that a layer's are not together, or else in blocks. ``change``: alters the tensors before they are written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name not in keep:
            layer = make(case, module.out_features, module.in_features, seed)
            module.weight.data = layer.weights(module.weight.dtype).t().contiguous()
            tensors |= {f"{name}.{part}": value for part, value in layer.tensors.items()}
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.detach().clone()
    quantised = {name.rpartition(".")[0] for name in tensors}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] not in quantised and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            tensors[name] = value.clone()
    if change is not None:
        change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIGS[case.format](case)}))
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    if files == 1:
        names = ["model.safetensors"]
    place = {name: names[i % files if in_turn else i * files // len(tensors)] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: tensors[n] for n in tensors if place[n] == file}, str(folder / file), metadata={"format": "pt"})
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


class Block(torch.nn.Module):
    """Attention without positions, and a gated MLP, named as Hugging Face's Llama names them."""

    def __init__(self, hidden: int, inner: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(hidden, heads, bias), Mlp(hidden, inner)
        self.norm = torch.nn.RMSNorm(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.mlp(x)


class Attention(torch.nn.Module):
    def __init__(self, hidden: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.size = hidden // heads
        self.q_proj = torch.nn.Linear(hidden, hidden, bias=bias)
        self.k_proj, self.v_proj = (torch.nn.Linear(hidden, hidden, bias=bias) for _ in range(2))
        self.o_proj = torch.nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.size)).transpose(-2, -3) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(-2, -3).flatten(-2))


class Mlp(torch.nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = torch.nn.Linear(inner, hidden, bias=False)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Toy(torch.nn.Module):
    """A small decoder with a tied head: what there is to load in a real one, and no more."""

    def __init__(
        self, hidden: int = 128, inner: int = 256, heads: int = 2, layers: int = 2, bias: bool = False
    ) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(96, hidden)
        self.layers = torch.nn.ModuleList(Block(hidden, inner, heads, bias) for _ in range(layers))
        self.lm_head = torch.nn.Linear(hidden, 96, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def toy(dtype: torch.dtype = FP16, **sizes: Any) -> Toy:
    """A toy of random weights."""
    torch.manual_seed(0)
    return Toy(**sizes).to(dtype)


def support_table(cases: list[Case] = CASES) -> str:
    """What the cases cover, a line for each format and number of bits."""
    lines = [
        "| format | bits | group sizes | zero points | act-order | read by |",
        "|---|---|---|---|---|---|",
    ]
    kinds: Mapping[tuple[str, int], list[Case]] = {}
    for case in cases:
        kinds.setdefault((case.format, case.bits), []).append(case)  # type: ignore[attr-defined]
    order = ["GPTQ", "GPTQ v2", "AWQ", "compressed-tensors", "HQQ"]
    for (name, bits), some in sorted(kinds.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        sizes = sorted({case.group for case in some}, key=lambda size: (size == -1, size))
        groups = ", ".join("one" if size == -1 else str(size) for size in sizes)
        zeros = ", ".join(dict.fromkeys(case.zeros for case in some))
        acts = sorted({case.group for case in some if case.act_order})
        act_order = f"groups {', '.join(map(str, acts))}" if acts else "no"
        reader = "`load_quantized`" if all(case.loads for case in some) else "`replace_hqq`, `from_hqq`"
        lines.append(f"| {name} | {bits} | {groups} | {zeros} | {act_order} | {reader} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(support_table())
