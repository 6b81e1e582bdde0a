# SPDX-License-Identifier: Apache-2.0
"""fuse: what is merged gives the same, what cannot be merged is said, and a fused model can be saved and compiled."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import BF16, FP16, Attention, Case, Mlp, Toy, make, toy
from machete_aot import product
from machete_aot.nn import MacheteLinear, fuse, load_prepacked, save_prepacked
from machete_aot.nn import linear as linear_module
from machete_aot.nn.fuse import GateUpMLP, MergedPart, merge_gate_up

PLAIN = Case("GPTQ", 4, 64, False, "symmetric")
INTEGER = Case("GPTQ", 4, 32, False, "integer")
IDS = torch.arange(12).view(2, 6) * 7


def quantised(case: Case = PLAIN, seeds: Callable[[int], int] = lambda i: i, **sizes: int) -> Toy:
    """A toy whose layers are random ones of a case."""
    model = toy(**sizes)
    for i, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            stored = make(case, module.out_features, module.in_features, seeds(i))
            bias = None if module.bias is None else module.bias.detach()
            layer = MacheteLinear.from_gptq(**stored.tensors, **stored.options, bias=bias, dtype=FP16)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    return model


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The N of each product from now on."""
    seen: list[int] = []

    def gemm(a: torch.Tensor, b: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        result = product.gemm(a, b, *rest, **options)  # type: ignore[arg-type]
        seen.append(result.shape[-1])
        return result

    monkeypatch.setattr(linear_module, "gemm", gemm)
    return seen


@pytest.mark.parametrize("hidden", [128, 160])  # 160: the parts are not whole units
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", [PLAIN, INTEGER], ids=str)
def test_the_same_logits_from_fewer_products(
    case: Case, bias: bool, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised(case, hidden=hidden, bias=bias)
    with torch.no_grad():
        expected = model(IDS)
    report = fuse(model)
    assert report.skipped == {} and len(report.merged) == 4
    assert report.merged[:2] == ["layers.0.self_attn.qkv_proj", "layers.0.mlp.gate_up_proj"]
    assert str(report) == "4 merged, 0 not"
    products = count_products(monkeypatch)
    with torch.no_grad():
        found = model(IDS)
    assert products == 2 * [3 * hidden, hidden, 256, hidden]
    assert isinstance(model.layers[0].mlp, GateUpMLP)
    assert float((found - expected).float().norm()) < 4e-3 * float(expected.float().norm())
    again = fuse(model)
    assert not again.merged and not again.skipped
    with torch.inference_mode():  # tensors that count no versions
        assert torch.equal(model(IDS), found)
    assert torch.equal(copy.deepcopy(model)(IDS), found)


def test_qkv_alone_gives_the_same_bits() -> None:
    attention = quantised().layers[0].self_attn
    x = torch.randn(2, 5, 128).to(FP16)
    expected = [getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    fuse(attention)
    for found, wanted in zip((attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)), expected, strict=True):
        assert torch.equal(found, wanted)
    assert (attention.k_proj.in_features, attention.k_proj.out_features) == (128, 128)
    assert "part 1 of a merged layer" in repr(attention.k_proj)


def test_parts_in_any_order_with_any_inputs() -> None:
    attention = quantised().layers[0].self_attn
    alone = copy.deepcopy(attention)
    fuse(attention)
    x, y = (torch.randn(3, 128).to(FP16) for _ in range(2))
    for name, value in (("k_proj", x), ("q_proj", y), ("q_proj", x), ("v_proj", x), ("v_proj", y), ("k_proj", y)):
        assert torch.equal(getattr(attention, name)(value), getattr(alone, name)(value)), name
    assert torch.equal(attention.q_proj(x), alone.q_proj(x))
    x.mul_(2)  # the same tensor, another value
    assert torch.equal(attention.k_proj(x), alone.k_proj(x))
    shared = attention.q_proj.shared
    attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)
    assert shared._last is None  # nothing is kept


def test_threads_get_their_own_parts() -> None:
    """Each thread has inputs of its own, and what one asks for may come between the calls of another."""
    attention = quantised().layers[0].self_attn
    alone = copy.deepcopy(attention)
    fuse(attention)
    names = ("q_proj", "k_proj", "v_proj")
    inputs = [torch.randn(2, 128).to(FP16) for _ in range(4)]
    expected = [[getattr(alone, name)(x) for name in names] for x in inputs]
    shared = attention.q_proj.shared
    product_of = shared.linear.forward

    def slow(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0)  # lets another thread in
        return product_of(x)

    shared.linear.forward = slow
    wrong: list[str] = []

    def work(index: int) -> None:
        for _ in range(200):
            found = [getattr(attention, name)(inputs[index]) for name in names]
            if not all(map(torch.equal, found, expected[index])):
                wrong.append(f"thread {index}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_the_state_has_the_merged_layer_alone() -> None:
    model = quantised(layers=1)
    fuse(model)
    names = {name.rpartition(".")[0] for name in model.state_dict() if name.startswith("layers.0.self_attn")}
    assert names == {"layers.0.self_attn.qkv_proj", "layers.0.self_attn.o_proj"}


def test_act_orders_that_agree_are_merged() -> None:
    case = Case("GPTQ", 4, 64, True, "integer")
    model = quantised(case, seeds=lambda i: 0)  # layers of one K get one order
    expected = model(IDS).detach()
    report = fuse(model)
    assert not report.skipped and report.reordered == [f"layers.{i}.mlp.gate_up_proj" for i in range(2)]
    assert "2 have taken over the act-order of the layer after them" in str(report)
    assert model.layers[0].self_attn.qkv_proj.perm is not None and model.layers[0].mlp.gate_up_proj.perm is not None
    assert float((model(IDS).detach() - expected).float().norm()) < 4e-3 * float(expected.float().norm())


@pytest.mark.parametrize("zeros", ["symmetric", "integer"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_order_of_down_is_that_of_the_outputs_before_it(bias: bool, zeros: str, tmp_path: Path) -> None:
    """Against weights that numpy dequantised in their original order; and bit for bit against gathering."""
    case, hidden, inner = Case("GPTQ", 4, 32, True, zeros), 128, 256
    holder = torch.nn.ModuleDict({"mlp": Mlp(hidden, inner)})
    stored = {name: make(case, inner, hidden, 5) for name in ("gate_proj", "up_proj")}
    stored["down_proj"] = make(case, hidden, inner, 6)
    stored["up_proj"].tensors["qweight"].bitwise_xor_(0x35353535)
    stored["up_proj"].codes = stored["up_proj"].codes ^ np.where(np.arange(hidden) % 2, 3, 5)[:, None].astype(np.uint32)
    biases = {name: torch.randn(each.scales.shape[1]).to(FP16) for name, each in stored.items()}
    for name, each in stored.items():
        extra = biases[name] if bias else None
        setattr(holder["mlp"], name, MacheteLinear.from_gptq(**each.tensors, **each.options, bias=extra, dtype=FP16))
    plain = holder["mlp"]
    x = torch.randn(7, hidden).to(FP16)

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.double() @ stored[name].weights(FP16).double() + (biases[name].double() if bias else 0)

    wanted = linear("down_proj", torch.nn.functional.silu(linear("gate_proj", x)) * linear("up_proj", x))
    gathering = GateUpMLP(merge_gate_up(plain.gate_proj, plain.up_proj), plain.down_proj)
    assert fuse(holder).reordered == ["mlp.gate_up_proj"]
    fused = holder["mlp"]
    assert fused.down_proj.perm is None and plain.down_proj.perm is not None
    assert fused.down_proj.qweight.data_ptr() == plain.down_proj.qweight.data_ptr()  # no copy
    found = fused(x)
    assert torch.equal(found, gathering(x))
    assert float((found.double() - wanted).norm()) < 2e-3 * float(wanted.norm())

    save_prepacked(holder, tmp_path)
    other = torch.nn.ModuleDict({"mlp": Mlp(hidden, inner)})
    assert torch.equal(load_prepacked(other, tmp_path, device="cpu", progress=False)["mlp"](x), found)


@pytest.mark.parametrize("why", ["hooks", "another MLP"])
def test_orders_stay_where_others_may_see_them(why: str) -> None:
    model = quantised(ACT_ORDER, seeds=lambda i: 0, layers=1)
    mlp = model.layers[0].mlp
    if why == "hooks":
        mlp.down_proj.register_forward_pre_hook(lambda *_: None)
    else:
        mlp.act_fn = torch.nn.GELU()
    expected = model(IDS).detach()
    report = fuse(model)
    assert report.reordered == [] and model.layers[0].mlp.down_proj.perm is not None
    assert float((model(IDS).detach() - expected).float().norm()) < 4e-3 * float(expected.float().norm())


def test_batch_invariance_is_kept() -> None:
    model = quantised(ACT_ORDER, seeds=lambda i: 0, layers=1)
    for module in model.modules():
        if isinstance(module, MacheteLinear):
            module.batch_invariant = True
    fuse(model)
    assert [m.batch_invariant for m in model.modules() if isinstance(m, MacheteLinear)] == 4 * [True]


def layer(case: Case = PLAIN, n: int = 128, k: int = 128, dtype: torch.dtype = FP16) -> MacheteLinear:
    stored = make(case, n, k, 99)
    return MacheteLinear.from_gptq(**stored.tensors, **stored.options, dtype=dtype)


ACT_ORDER = Case("GPTQ", 4, 64, True, "symmetric")
EIGHT, SMALL = Case("GPTQ", 8, 64, False, "symmetric"), Case("GPTQ", 4, 32, False, "symmetric")
DIFFERENT: dict[str, tuple[Callable[[Attention], object], str]] = {
    "types": (lambda a: setattr(a, "k_proj", layer(EIGHT)), "different types: u4b8, u8b"),
    "groups": (lambda a: setattr(a, "k_proj", layer(SMALL)), "group sizes: 64, 32, 64"),
    "dtypes": (lambda a: setattr(a, "k_proj", layer(dtype=BF16)), "different dtypes"),
    "devices": (lambda a: a.k_proj.to("meta"), "different devices: cpu, meta, cpu"),
    "inputs": (lambda a: setattr(a, "v_proj", layer(k=256)), "different inputs: 128, 128, 256"),
    "order": (lambda a: setattr(a, "v_proj", layer(ACT_ORDER)), "only some of them have an act-order"),
    "hooks": (lambda a: a.q_proj.register_forward_hook(lambda *_: None), "one of them has forward hooks"),
    "invariance": (lambda a: setattr(a.q_proj, "batch_invariant", True), "settings of batch_invariant"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_not_merged_and_said(name: str) -> None:
    change, reason = DIFFERENT[name]
    model = quantised(layers=1)
    change(model.layers[0].self_attn)
    report = fuse(model)
    assert report.merged == ["layers.0.mlp.gate_up_proj"]
    assert reason in report.skipped["layers.0.self_attn"]
    assert f"layers.0.self_attn: q_proj, k_proj, v_proj: they have {reason}"[:40] in str(report) or reason in str(
        report
    )
    assert isinstance(model.layers[0].self_attn.q_proj, MacheteLinear)


def test_different_act_orders_are_not_merged() -> None:
    report = fuse(quantised(ACT_ORDER, layers=1))
    assert not report.merged
    assert report.skipped["layers.0.self_attn"] == "q_proj, k_proj, v_proj: their act-orders (g_idx) are different"
    assert report.skipped["layers.0.mlp"] == "gate_proj, up_proj: their act-orders (g_idx) are different"


class Scaled(Mlp):
    """Looks like a gated MLP and is another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(2 * self.gate_proj(x)) * self.up_proj(x))


class OfSequences(Mlp):
    """Takes [batch, length, features] alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, _, features = x.shape
        assert features == 128
        return super().forward(x)


@pytest.mark.parametrize("change", ["activation", "forward", "arguments", "dimensions"])
def test_other_mlps_keep_their_code_and_merge_the_projections(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(layers=1)
    mlp = model.layers[0].mlp
    if change == "activation":
        mlp.act_fn = torch.nn.GELU()
        mlp.gate_proj.scales /= 256  # so small that for most inputs all activations are x / 2
    elif change == "forward":
        mlp.__class__ = Scaled
    elif change == "dimensions":
        mlp.__class__ = OfSequences
    else:
        mlp.forward = lambda x, more=None, *, needed=1: Mlp.forward(mlp, x)
        mlp.register_buffer("factor", torch.ones(1))
    x = torch.randn(1, 3, 128).to(FP16)
    expected = mlp(x)
    report = fuse(model)
    assert report.without_activation == ["layers.0.mlp.gate_up_proj"] and report.without_activation[0] in report.merged
    assert "mlp.gate_up_proj: merged without its activation" in str(report)
    mlp = model.layers[0].mlp
    assert isinstance(mlp, Mlp) and isinstance(mlp.gate_proj, MergedPart)
    products = count_products(monkeypatch)
    assert torch.equal(mlp(x), expected)
    assert products == [512, 128]


def test_compiled_as_one_graph() -> None:
    model = quantised(layers=1)
    fuse(model)
    expected = model(IDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(IDS), expected)


def test_fused_and_saved(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = quantised(bias=True)
    model.layers[1].mlp.act_fn = torch.nn.GELU()  # merged without its activation
    fuse(model)
    save_prepacked(model, tmp_path)
    with torch.device("meta"):
        other = Toy(bias=True).to(FP16)
    other.layers[1].mlp.act_fn = torch.nn.GELU()
    load_prepacked(other, tmp_path, device="cpu", progress=False)
    assert torch.equal(other(IDS), model(IDS))
    assert repr(other) == repr(model)
