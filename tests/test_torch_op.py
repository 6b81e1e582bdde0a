# SPDX-License-Identifier: Apache-2.0
"""The operator for torch: what compilers and modes see of ``gemm``, on the CPU, where the reference is the kernel."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import machete_aot as machete
from quantised import gptq, random_codes

OP = torch.ops.machete_aot.gemm
OP_OUT = torch.ops.machete_aot.gemm_out
N, K = 128, 192


class Layer:
    def __init__(self, b_type: machete.ScalarType = machete.u4b8, dtype: torch.dtype = torch.bfloat16) -> None:
        self.b_type = b_type
        codes = random_codes(K, N, b_type.bits, seed=1)
        self.b = machete.prepack_b(gptq(codes, b_type.bits), b_type, dtype, k=K)
        self.scales = torch.rand(-(-K // 128), N).to(dtype)
        self.dtype = dtype

    def acts(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, K).to(self.dtype)

    def gemm(self, a: torch.Tensor, **options: Any) -> torch.Tensor:
        return machete.gemm(a, self.b, self.b_type, self.scales, **options)

    def op(self, a: torch.Tensor, **options: Any) -> torch.Tensor:
        return OP(a, self.b, self.b_type.name, self.scales, **options)


def everything(layer: Layer, m: int) -> dict[str, Any]:
    """Options of every kind at once."""
    return {
        "bias": torch.randn(N).to(layer.dtype),
        "channel_scales": torch.rand(N),
        "token_scales": torch.rand(m),
        "activation": "swiglu",
        "out_dtype": torch.float32,
    }


def test_compiled_code_overlaps_with_what_it_did_not_compute() -> None:
    """Inductor reuses one object for several tensors, which look like a constant."""
    layer = Layer()
    a, wide, order = layer.acts(5), layer.scales.float(), torch.randperm(K, dtype=torch.int32)
    tensors = layer.b, layer.scales, order
    weights, parameter, kept = (torch.nn.Parameter(x, requires_grad=False) for x in tensors)
    linear = machete.nn.MacheteLinear.from_packed(layer.b, machete.u4b8, layer.scales, None, K, 128)
    cases: list[tuple[Any, bool | None]] = [
        (lambda a: machete.gemm(a, layer.b, machete.u4b8, wide.bfloat16()), False),
        (lambda a: machete.gemm(a, weights, machete.u4b8, parameter), None),
        (lambda a: machete.gemm(a, weights, machete.u4b8, parameter, bias=(wide[0] * 2).bfloat16()), False),
        (lambda a: machete.gemm(a, layer.b, machete.u4b8, layer.scales, overlap=True), True),
        (linear, True),
        (lambda a: machete.permute_columns(a, order), False),
        (lambda a: machete.permute_columns(a, kept), None),
        (lambda a: machete.permute_columns(a, order, overlap=True), True),
    ]
    permute = torch.ops.machete_aot.permute_columns
    ops = (OP, OP.default, permute, permute.default)
    seen: list[object] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> Any:
        seen.extend(n.kwargs.get("overlap") for n in module.graph.nodes if n.target in ops)
        return module

    def compiled(call: Any) -> torch.Tensor:
        result: torch.Tensor = torch.compile(call, fullgraph=True, backend=backend)(a)
        return result

    with torch.no_grad():
        for call, overlap in cases:
            assert torch.equal(compiled(call), call(a))
            assert seen.pop() is overlap and not seen
        machete.set_overlap(False)
        try:
            compiled(linear)
        finally:
            machete.set_overlap(True)
    assert seen == [False]


def test_torch_jit_trace_records_the_product() -> None:
    layer, order = Layer(), torch.randperm(K, dtype=torch.int32)

    def program(a: torch.Tensor) -> torch.Tensor:
        return layer.gemm(machete.permute_columns(a, order)) + 1

    traced = torch.jit.trace(program, (layer.acts(5),))
    assert {"machete_aot::gemm", "machete_aot::permute_columns"} <= {n.kind() for n in traced.graph.nodes()}
    a = layer.acts(5)
    assert torch.equal(traced(a), program(a))


@pytest.mark.parametrize("b_type", [machete.u4b8, machete.u8b128], ids=str)
def test_the_operator_is_gemm(b_type: machete.ScalarType) -> None:
    layer = Layer(b_type)
    a = layer.acts(5)
    assert torch.equal(layer.op(a), layer.gemm(a))
    options = everything(layer, 5)
    assert torch.equal(layer.op(a, **options), layer.gemm(a, **options))
    assert torch.equal(layer.op(a, batch_invariant=True), layer.gemm(a, batch_invariant=True))
    out = torch.empty(5, N).bfloat16()
    OP_OUT(out, a, layer.b, b_type.name, layer.scales)
    assert torch.equal(out, layer.gemm(a))


def test_zeros() -> None:
    layer = Layer(machete.u4)
    a = layer.acts(3)
    for zeros in (torch.rand_like(layer.scales), torch.randint(0, 16, layer.scales.shape, dtype=torch.uint8)):
        assert torch.equal(OP(a, layer.b, "u4", layer.scales, zeros), layer.gemm(a, b_zeros=zeros))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    layer = Layer()
    a = layer.acts(*shape)
    torch.library.opcheck(OP, (a, layer.b, "u4b8", layer.scales))
    m = a.shape[:-1].numel()
    torch.library.opcheck(OP, (a, layer.b, "u4b8", layer.scales), everything(layer, m))


def test_opcheck_of_out() -> None:
    layer = Layer()
    torch.library.opcheck(OP_OUT, (torch.empty(5, N).bfloat16(), layer.acts(5), layer.b, "u4b8", layer.scales))


def test_fake_results_are_as_the_real_ones() -> None:
    layer = Layer()
    with FakeTensorMode() as mode:
        for shape in ((5,), (2, 3), (1, 1, 4)):
            for options in ({}, {"out_dtype": torch.float16}, {"activation": "swiglu"}):
                real = layer.acts(*shape)
                b, scales = mode.from_tensor(layer.b), mode.from_tensor(layer.scales)
                for fake in (
                    OP(mode.from_tensor(real), b, "u4b8", scales, **options),
                    machete.gemm(mode.from_tensor(real), b, machete.u4b8, scales, **options),
                ):
                    assert fake.shape == (*shape, N // 2 if "activation" in options else N)
                    assert fake.dtype == options.get("out_dtype", torch.bfloat16)
                    assert fake.is_contiguous()


def test_checks_are_those_of_gemm() -> None:
    layer = Layer()
    a = layer.acts(2)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((a.float(), layer.b, "u4b8", layer.scales), {}),
        ((a, layer.b, "u4b9", layer.scales), {}),
        ((a, layer.b, "u8", layer.scales), {}),
        ((a, layer.b, "u4b8", layer.scales[:1]), {}),
        ((a, layer.b, "u4b8", layer.scales), {"activation": "relu"}),
    ]
    for arguments, options in wrong:
        with pytest.raises(machete.ArgumentError):
            OP(*arguments, **options)
    with FakeTensorMode() as mode, pytest.raises(machete.ArgumentError, match="bfloat16"):
        OP(mode.from_tensor(a).float(), mode.from_tensor(layer.b), "u4b8", mode.from_tensor(layer.scales))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_one_operator() -> None:
    layer = Layer()
    a = layer.acts(2)
    expected = layer.gemm(a)
    with Seen() as outer, Seen() as inner:
        assert torch.equal(layer.gemm(a), expected)
    for mode in (outer, inner):
        assert mode.names.count("machete_aot.gemm.default") == 1


# ---------------------------------------------------------------- compilers


class Module(torch.nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.register_buffer("b", layer.b)
        self.scales = torch.nn.Parameter(layer.scales, requires_grad=False)
        self.b_type = layer.b_type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return machete.gemm(x * 2, self.b, self.b_type, self.scales, b_group_size=128).relu()


def graphs_of(function: Any, *arguments: Any) -> list[str]:
    """The operators of each graph that torch.compile makes."""
    found = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.append(" ".join(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    return found


def test_a_compiled_gemm_is_one_operator_in_one_graph() -> None:
    module = Module(Layer())
    (graph,) = graphs_of(module, torch.randn(3, K).bfloat16())
    assert "machete_aot.gemm" in graph


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_for_any_number_of_tokens(backend: str) -> None:
    torch._dynamo.reset()
    module = Module(Layer())
    compiles = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, backend=compiles, dynamic=True)
    for m in (2, 3, 17, 64):
        x = torch.randn(m, K).bfloat16()
        assert torch.equal(compiled(x), module(x))
    assert compiles.frame_count == 1


def test_marked_dynamic() -> None:
    torch._dynamo.reset()
    module = Module(Layer())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K).bfloat16()
    torch._dynamo.mark_dynamic(x, 0)
    assert torch.equal(compiled(x), module(x))
    x = torch.randn(2, 3, K).bfloat16()
    assert torch.equal(compiled(x), module(x))


def test_compiled_with_everything_and_out() -> None:
    layer = Layer()
    a, options = layer.acts(4), everything(layer, 4)

    def run(a: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return machete.gemm(a * 1, layer.b, layer.b_type, layer.scales, out=out, **options)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, None), run(a, None))
    out = torch.empty(4, N // 2)
    assert torch.equal(compiled(a, out), run(a, None))
    assert torch.equal(out, run(a, None))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    torch._dynamo.reset()
    module = Module(Layer())
    tokens = torch.export.Dim("tokens", min=2, max=512)
    x = torch.randn(5, K).bfloat16()
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: tokens}}, strict=strict)
    assert "machete_aot.gemm" in str(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for m in (2, 5, 100):
        x = torch.randn(m, K).bfloat16()
        assert torch.equal(loaded(x), module(x))


def test_errors_of_a_compiled_call_say_what_is_wrong() -> None:
    module = Module(Layer())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="b_scales must be"):
        torch.compile(module, fullgraph=True, backend="eager")(torch.randn(3, K + 128).bfloat16())


# ---------------------------------------------------------------- gradients, autocast


def test_a_gradient_is_refused() -> None:
    layer = Layer()
    a = layer.acts(2).requires_grad_()
    result = layer.op(a)
    with pytest.raises(machete.UnsupportedError, match=r"no gradients.*torch\.no_grad"):
        result.sum().backward()
    with torch.no_grad():
        assert not layer.op(a).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer.op(a), layer.op(a))


def test_gemm_ignores_requires_grad() -> None:
    layer = Layer()
    a = layer.acts(2).requires_grad_()
    assert not layer.gemm(a).requires_grad
    torch._dynamo.reset()
    compiled = torch.compile(layer.gemm, fullgraph=True, backend="aot_eager")
    assert not compiled(a).requires_grad
    assert torch.equal(compiled(a), layer.gemm(a))


def test_autocast_changes_nothing() -> None:
    layer = Layer()
    a = layer.acts(2)
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer.gemm(a).dtype == layer.op(a).dtype == torch.bfloat16
        with pytest.raises(machete.ArgumentError, match="float32"):
            layer.op(a.float())
