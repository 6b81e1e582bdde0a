# SPDX-License-Identifier: Apache-2.0
"""Decoding on a GPU: layers compiled by inductor and captured, and MLPs that have taken over an act-order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from checkpoints import BF16, Case, Mlp, make
from machete_aot.nn import MacheteLinear, fuse

pytestmark = pytest.mark.gpu

NEW = 12


@pytest.fixture(scope="module")
def model() -> Any:
    """Four layers, quantised and fused; heads share keys."""
    pytest.importorskip("transformers")
    from examples.generate import make_model

    found = make_model(512, 4)
    for name, module in list(found.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(found.get_submodule(parent), leaf, MacheteLinear.from_float(module))
    found = found.cuda()
    assert len(fuse(found).merged) == 8
    return found


@pytest.mark.parametrize(
    ("way", "attention"),
    [("graph", None), ("graph", "packed"), ("graph", "products"), ("layers", None), ("layers", "packed"),
     ("layers", "products"), ("layers", "flex")],
)  # fmt: skip
def test_every_way_makes_the_model_s_own_choices(way: str, attention: str | None, model: Any) -> None:
    from examples.generate import regret
    from examples.greedy import Greedy

    prompt = torch.randint(512, (2, 5), generator=torch.Generator().manual_seed(1)).cuda()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    greedy = Greedy(model, 2, 5 + NEW, way, attention=attention, per=2)
    greedy.prepare(prompt)
    found = greedy.generate(prompt, NEW)
    assert regret(model, found, 5) < 0.02
    if way == "layers":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    other = greedy.generate(prompt.flip(0), NEW)  # the same graph, another prompt
    assert regret(model, other, 5) < 0.02 and torch.equal(other[:, :5], prompt.flip(0))


@torch.inference_mode()
def test_an_order_that_the_outputs_before_have() -> None:
    case, hidden, inner = Case("GPTQ", 4, 128, True, "symmetric"), 1024, 2048
    mlp = Mlp(hidden, inner)
    for name, n, k, seed in (
        ("gate_proj", inner, hidden, 5),
        ("up_proj", inner, hidden, 5),
        ("down_proj", hidden, inner, 6),
    ):
        stored = make(case, n, k, seed)
        setattr(mlp, name, MacheteLinear.from_gptq(**stored.tensors, **stored.options, dtype=BF16).cuda())
    mlp.up_proj.scales = mlp.up_proj.scales.flip(1).contiguous()
    holder = torch.nn.ModuleDict({"mlp": copy.deepcopy(mlp)})
    assert fuse(holder).reordered == ["mlp.gate_up_proj"]
    for m in (1, 16, 200):
        x = torch.randn(m, hidden, device="cuda").to(BF16)
        found, wanted = holder["mlp"](x).double(), mlp(x).double()
        assert float((found - wanted).norm()) < 6e-3 * float(wanted.norm())
