# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of the examples: every way and kind of attention gives the same, and layers are compiled once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import StaticCache

from examples.generate import make_model, regret
from examples.greedy import Greedy
from examples.layers import ATTENTIONS, CompiledLayers
from machete_aot.nn import MacheteLinear, fuse

NEW = 8


@pytest.fixture(scope="module")
def model() -> Any:
    """Four layers, quantised and fused; heads share keys."""
    found = make_model(128, 4)
    for name, module in list(found.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(found.get_submodule(parent), leaf, MacheteLinear.from_float(module))
    assert len(fuse(found).merged) == 8
    return found


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(512, (2, 5), generator=torch.Generator().manual_seed(1))


def generated(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    greedy = Greedy(model, prompt.shape[0], prompt.shape[1] + NEW, backend="aot_eager", **options)
    greedy.prepare(prompt)
    return greedy.generate(prompt, NEW)


@pytest.mark.parametrize("attention", [None, *ATTENTIONS])
def test_layers_are_compiled_once_and_choose_the_same(attention: str | None, model: Any, prompt: torch.Tensor) -> None:
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    before = (model.model.layers, [layer.self_attn.layer_idx for layer in model.model.layers])
    found = generated(model, prompt, way="layers", per=2, attention=attention)
    assert regret(model, found, prompt.shape[1]) < 0.01
    assert torch.equal(found[:, : prompt.shape[1]], prompt)
    # One graph for all layers and all tokens, one for the rotary embedding, one for the last norm.
    assert counters["stats"]["unique_graphs"] == 3 and not counters["recompiles"]
    assert (model.model.layers, [layer.self_attn.layer_idx for layer in model.model.layers]) == before
    assert "forward" not in vars(model.model.norm) and model.config._attn_implementation == "sdpa"
    wrong = found.clone()
    wrong[:, -1] = (found[:, -1] + 1) % 512
    assert regret(model, wrong, prompt.shape[1]) > 0.02  # it is a measure


@pytest.mark.parametrize("attention", ["packed", "products"])
def test_attention_of_one_token_without_compiling(attention: str, model: Any, prompt: torch.Tensor) -> None:
    assert torch.equal(generated(model, prompt), generated(model, prompt, way="eager", attention=attention))


def test_other_models_are_refused(model: Any) -> None:
    cache = StaticCache(config=make_model(128, 1).config, max_cache_len=16)
    with pytest.raises(ValueError, match="no list of decoder layers, one for each layer of the cache"):
        CompiledLayers(model, cache, torch.zeros(1, dtype=torch.long), 2)
