# SPDX-License-Identifier: Apache-2.0
"""Other implementations of the same product, for the benchmark: one adapter each, imported only when asked for.

An adapter's constructor imports what it needs and raises where that is not installed; ``prepare`` rearranges weights
that have been quantised already. Both may raise anything: whoever times peers reports it and goes on.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from .timing import Multiply, Weights, cublas

REASON_LENGTH = 160  # characters


class Peer(Protocol):
    """An implementation to compare with. ``version``: of the package that holds it."""

    name: str
    version: str

    def prepare(self, weights: Weights, tokens: Sequence[int]) -> Multiply:
        """Makes products by ``weights`` ready, for the numbers of tokens that will come.

        The result takes a copy's number, activations [M, K] contiguous and an output [M, N], and returns the product,
        in the output where the implementation can write to one.
        """
        ...


class Cublas:
    """torch.mm with the same weights dequantised to 16 bits."""

    name = "cublas"

    def __init__(self) -> None:
        self.version = f"torch {torch.__version__}"

    def prepare(self, weights: Weights, tokens: Sequence[int]) -> Multiply:
        return cublas(weights)


class VllmMachete:
    """The Machete kernels of vLLM."""

    name = "machete"

    def __init__(self) -> None:
        self._ops, self._types, self.version = _vllm()

    def prepare(self, weights: Weights, tokens: Sequence[int]) -> Multiply:
        ops, b_type, dtype = self._ops, _vllm_type(self._types, weights), weights.dtype
        packed = [
            # It takes the words of a column one after another, and adds zeros to scaled codes.
            (ops.machete_prepack_B(words.t().contiguous().t(), dtype, b_type, dtype), scales, _added(scales, zeros))
            for words, scales, zeros in weights.copies
        ]

        def multiply(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            b, scales, zeros = packed[i % len(packed)]
            more = {} if zeros is None else {"b_group_zeros": zeros}
            product: torch.Tensor = ops.machete_mm(
                a=a, b_q=b, b_type=b_type, b_group_scales=scales, b_group_size=weights.group, **more
            )
            return product

        return multiply


class VllmMarlin:
    """The Marlin kernels of vLLM, through the function that its linear layers call."""

    name = "marlin"

    def __init__(self) -> None:
        self._ops, self._types, self.version = _vllm()
        self._marlin: Any = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")

    def prepare(self, weights: Weights, tokens: Sequence[int]) -> Multiply:
        _require(weights, "u4b8", "u8b128")
        marlin, b_type, n, k = self._marlin, _vllm_type(self._types, weights), weights.n, weights.k
        device, bits = weights.copies[0].codes.device, weights.kind.b_type.bits
        none = torch.empty(0, dtype=torch.int32, device=device)
        workspace = marlin.marlin_make_workspace_new(device)
        packed = [
            (
                self._ops.gptq_marlin_repack(words, none, k, n, bits),
                marlin.marlin_permute_scales(scales, size_k=k, size_n=n, group_size=weights.group),
            )
            for words, scales, _ in weights.copies
        ]

        def multiply(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            b, scales = packed[i % len(packed)]
            product: torch.Tensor = marlin.apply_gptq_marlin_linear(
                input=a,
                weight=b,
                weight_scale=scales,
                weight_zp=none,
                g_idx=none,
                g_idx_sort_indices=none,
                workspace=workspace,
                wtype=b_type,
                output_size_per_partition=n,
                input_size_per_partition=k,
                is_k_full=True,
            )
            return product

        return multiply


class Humming:
    """Humming's layer with the configurations that its own heuristic chooses."""

    name = "humming"

    def __init__(self) -> None:
        self._layer: Any = importlib.import_module("humming.layer").HummingLayer
        self._tune: Any = importlib.import_module("humming.tune")
        self.version = str(importlib.import_module("humming").__version__)

    def prepare(self, weights: Weights, tokens: Sequence[int]) -> Multiply:
        _require(weights, "u4b8")
        layers = [self._make(weights, words, scales) for words, scales, _ in weights.copies]
        config = self._needed(layers[0], tokens)

        def multiply(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            product: torch.Tensor = layers[i % len(layers)](a, outputs=out, tuning_config=config)
            return product

        return multiply

    def _make(self, weights: Weights, words: torch.Tensor, scales: torch.Tensor) -> Any:
        with words.device:  # a layer allocates its parameters where torch does
            layer = self._layer(
                shape_n=weights.n,
                shape_k=weights.k,
                weight_config={"dtype": "uint4", "group_size": max(weights.group, 0)},  # 0: one group
                torch_dtype=weights.dtype,
            )
        layer.load_from_tensors({"weight": words.t().contiguous(), "weight_scale": scales.t().contiguous()})
        layer.transform()
        return layer

    def _needed(self, layer: Any, tokens: Sequence[int]) -> str:
        """The heuristic's table [[above M, up to M, configuration], ...], without the rows that nobody asks for.

        Every row is a kernel that is compiled at the first call: the whole table would be three times as many. The
        row of one token is always needed: the launcher looks it up first.
        """
        table = self._tune.get_heuristics_config(layer.humming_config, device=layer.weight.device)
        return json.dumps([row for row in table if any(row[0] < m <= row[1] for m in (1, *tokens))])


def _vllm() -> tuple[Any, Any, str]:
    """vLLM's operations, its scalar types, and its version."""
    ops = importlib.import_module("vllm._custom_ops")
    types = importlib.import_module("vllm.scalar_type")
    return ops, types.scalar_types, f"vllm {importlib.import_module('vllm').__version__}"


def _vllm_type(types: Any, weights: Weights) -> Any:
    """vLLM's name for the weights' type: uint4b8 is u4b8."""
    return getattr(types, f"uint{weights.kind.b_type.name[1:]}")


def _added(scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor | None:
    """Zeros in the scales' dtype that give the weights when they are added to code * scale."""
    if zeros is None:
        return None
    return -zeros if zeros.dtype == scales.dtype else -(zeros.to(scales.dtype) * scales)


def _require(weights: Weights, *names: str) -> None:
    """Raises ValueError for weights that an adapter does not know how to rearrange."""
    if weights.kind.name not in names:
        raise ValueError(f"its adapter takes {' or '.join(names)}, not {weights.kind.name}")


PEERS: dict[str, Callable[[], Peer]] = {p.name: p for p in (Cublas, VllmMachete, VllmMarlin, Humming)}


def find_peers(names: Iterable[str] = tuple(PEERS)) -> tuple[list[Peer], dict[str, str]]:
    """The peers of these names that can be used here, and for each of the others why it cannot, in one line."""
    found, problems = [], {}
    for name in names:
        try:
            found.append(PEERS[name]())
        except Exception as error:
            problems[name] = reason(error)
    return found, problems


def reason(error: Exception) -> str:
    """An exception in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.split('.')[0]} is not installed"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:REASON_LENGTH] if text else type(error).__name__
