# SPDX-License-Identifier: Apache-2.0
"""MacheteLinear: shapes, state, compilation."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch

import machete_aot as machete
from checkpoints import BF16, FP16, Case, make
from machete_aot.errors import ArgumentError, CheckpointError, UnsupportedError
from machete_aot.nn import MacheteLinear
from machete_aot.nn import linear as linear_module
from machete_aot.scalar_type import u4, u4b8, u8

CASES = {
    "plain": Case("GPTQ", 4, 64, False, "symmetric"),
    "everything": Case("GPTQ", 4, 64, True, "integer"),
    "floating": Case("HQQ", 8, 64, False, "floating"),
}


def build(name: str, dtype: torch.dtype = BF16, n: int = 80, k: int = 128) -> MacheteLinear:
    case = CASES[name]
    stored = make(case, n, k)
    if case.format == "HQQ":
        return MacheteLinear.from_hqq(stored.tensors["W_q"], stored.options["meta"], dtype=dtype)
    bias = torch.randn(n) if case.act_order else None
    return MacheteLinear.from_gptq(**stored.tensors, **stored.options, bias=bias, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (2, 3), (2, 0, 4)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = build("everything")
    x = torch.randn(*shape, 128).to(BF16)
    y = layer(x)
    assert y.shape == (*shape, 80) and y.dtype == BF16
    assert torch.equal(y.reshape(-1, 80), layer(x.reshape(-1, 128)))


def test_it_is_gemm() -> None:
    layer = build("everything")
    x = torch.randn(4, 128).to(BF16)
    assert layer.perm is not None
    expected = machete.gemm(x[:, layer.perm.long()], layer.qweight, u4, layer.scales, layer.zeros, 64, layer.bias)
    assert torch.equal(layer(x), expected)
    layer.batch_invariant = True
    assert torch.equal(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_state_round_trip(name: str, dtype: torch.dtype) -> None:
    layer = build(name, dtype)
    x = torch.randn(3, 128).to(dtype)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    description = layer.description()
    other = MacheteLinear.from_description(description, dtype)
    assert other.description() == description
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    assert repr(other) == repr(layer)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.qweight is not layer.qweight


def test_the_state_is_made_of_tensors_alone() -> None:
    """So that safetensors can hold it."""
    state = build("plain").state_dict()
    assert set(state) == {"qweight", "scales", "_extra_state"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    described = json.loads(bytes(state["_extra_state"].tolist()))
    assert (described["layout"], described["layout_version"]) == ("n64k64-u4", 1)


def _state(layer: MacheteLinear, **changes: Any) -> dict[str, torch.Tensor]:
    state = layer.state_dict()
    described = {**json.loads(bytes(state["_extra_state"].tolist())), **changes}
    state["_extra_state"] = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layout": "n64k64-u5"},
            "prepacked in layout n64k64-u5 version 1, and this machete-aot has n64k64-u4 version 1",
        ),
        ({"layout_version": 2}, "layout n64k64-u4 version 2.*prepack the original checkpoint again"),
        ({"format": 9}, "saved in format 9; this machete-aot reads format 1"),
        ({"group_size": 128}, "group_size: 128, not 64"),
        ({"b_type": "u4"}, "b_type: 'u4', not 'u4b8'"),
    ],
)
def test_states_of_something_else_are_refused_before_anything_is_overwritten(
    changes: dict[str, Any], message: str
) -> None:
    layer = build("plain")
    target = MacheteLinear.from_description(layer.description(), BF16)
    target.qweight.zero_()
    with pytest.raises(CheckpointError, match=message):
        target.load_state_dict(_state(layer, **changes))
    assert not target.qweight.any()


def test_missing_and_further_buffers_are_torchs_to_report() -> None:
    layer = build("everything")
    with pytest.raises(RuntimeError, match=r"Missing key.*perm"):
        state = layer.state_dict()
        del state["perm"]
        MacheteLinear.from_description(layer.description(), BF16).load_state_dict(state)


def test_moving_and_casting() -> None:
    layer = build("everything").half()
    assert layer.scales.dtype == layer.bias.dtype == FP16
    assert (layer.qweight.dtype, layer.perm.dtype, layer.zeros.dtype) == (torch.int32, torch.int32, torch.uint8)
    layer(torch.randn(2, 128).to(FP16))
    with pytest.raises(ArgumentError, match="b_scales must have the dtype of a"):
        layer(torch.randn(2, 128).to(BF16))
    assert all(buffer.is_meta for buffer in layer.to("meta").buffers())


@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str) -> None:
    """The whole layer is one graph."""
    layer = build(name)
    x = torch.randn(2, 3, 128).to(BF16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_compiled_swiglu() -> None:
    gate, up = (build("plain", n=64) for _ in range(2))
    from machete_aot.nn.fuse import merge_gate_up

    layer = merge_gate_up(gate, up)
    assert (layer.out_features, layer.columns) == (64, 128)
    x = torch.randn(3, 128).to(BF16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(x).shape == (3, 64) and torch.equal(compiled(x), layer(x))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"dtype": torch.float32}, ArgumentError, "dtype must be torch.bfloat16 or torch.float16"),
    "zeros": ({"zeros": "yes"}, ArgumentError, "zeros must be"),
    "activation": ({"activation": "gelu"}, ArgumentError, "activation must be None or 'swiglu'"),
    "group": ({"group_size": 48}, UnsupportedError, "groups of 48"),
    "bits": ({"b_type": machete.ScalarType("u3", 3, 0)}, UnsupportedError, "no prepacked layout for 3-bit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name: str) -> None:
    options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        MacheteLinear(128, 64, **options)


def test_activations_are_gathered_by_the_package_s_kernel_or_by_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build("everything")
    x = torch.randn(2, 3, 128).to(BF16)
    seen, graphs = [], []

    def permute(a: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        seen.append(order)
        return machete.permute_columns(a, order)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    monkeypatch.setattr(linear_module, "permute_columns", permute)
    expected = layer(x)
    assert len(seen) == 1 and seen[0] is layer.perm
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), expected)
    assert len(seen) == 1 and "index_select" in graphs[0]
    assert build("plain")(x).shape == (2, 3, 80) and len(seen) == 1


@pytest.mark.parametrize("damage", [-1, 128, 0], ids=str)
def test_an_order_that_is_no_permutation_is_refused_where_it_comes_from(damage: int) -> None:
    """The kernel reads wherever it says."""
    layer = build("everything")
    assert layer.perm is not None
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["perm"][state["perm"] == 5] = damage
    target = MacheteLinear.from_description(layer.description(), BF16)
    target.qweight.zero_()
    with pytest.raises(CheckpointError, match="perm is not a permutation"):
        target.load_state_dict(state)
    assert not target.qweight.any()
    with pytest.raises(ArgumentError, match="perm must hold each number from 0 to 127 once"):
        MacheteLinear.from_packed(
            layer.qweight, layer.b_type, layer.scales, layer.zeros, 128, 64, layer.bias, state["perm"]
        )


def test_packed_buffers_must_fit() -> None:
    layer = build("plain")
    with pytest.raises(ArgumentError, match=r"scales must have shape \(2, 72\), got \(3, 72\)"):
        MacheteLinear.from_packed(layer.qweight, u4b8, torch.ones(3, 72).to(BF16), None, 128, 64)
    assert MacheteLinear(128, 64, u8, 256).group_size == -1
    assert linear_module.STATE_FORMAT == 1
