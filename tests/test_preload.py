# SPDX-License-Identifier: Apache-2.0
"""``warmup`` of a model: after it the products of its layers load nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import machete_aot as machete
from checkpoints import Case, make
from machete_aot import product
from machete_aot.nn import MacheteLinear
from machete_aot.nn import linear as linear_module
from machete_aot.nn.fuse import attach_merged, merge, merge_gate_up
from machete_aot.permute import permute_on
from machete_aot.permute_abi import HELPER_ID, unpack_params
from machete_aot.scalar_type import u4, u4b8
from stub.bundles import BF16, FP16, GENERAL, NARROW, make_bundle
from stub.harness import Stub, stubbed

STREAM = 0x5EED0
BUNDLE = make_bundle(general=GENERAL)
K = 512
EVERY_M = (*range(1, 70), 100, 128, 255, 256, 257, 1000, 4096, 8191)


@pytest.fixture(autouse=True)
def _bundle() -> Iterator[None]:
    machete.use_bundle(BUNDLE)
    yield
    machete.use_bundle(None)


def on_stub(stub: Stub) -> None:
    """Layers on the CPU multiply through the stub driver, as they would on a GPU, in this test's own process."""

    def gemm(a: torch.Tensor, b: torch.Tensor, b_type: Any, scales: Any, zeros: Any, group: Any, bias: Any, **o: Any):
        return product.gemm_on(
            0, STREAM, a, b, b_type, scales, zeros, group, bias, None, None, None, o["batch_invariant"], None, None,
            o["activation"], o["out_dtype"],
        )  # fmt: skip

    linear_module.gemm = gemm
    linear_module.permute_columns = lambda a, order: permute_on(0, STREAM, a, order)
    product._current_stream = lambda index: STREAM  # torch for the CPU has no streams
    stub.set(record=0)


def layer(
    n: int, group: int = 128, zeros: str = "symmetric", dtype: torch.dtype = torch.bfloat16, act_order: bool = False
) -> MacheteLinear:
    stored = make(Case("GPTQ", 4, group, act_order, zeros), n, K)
    return MacheteLinear.from_gptq(**stored.tensors, **stored.options, dtype=dtype)


class Model(torch.nn.Module):
    """Layers of three types, merged and with an activation, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = layer(320), layer(64)
        attach_merged(self, "qk_proj", ["q_proj", "k_proj"], merge([self.q_proj, self.k_proj]))
        self.gate_up = merge_gate_up(layer(K), layer(K))
        self.fine = layer(256, 32, "integer")
        self.inner = torch.nn.Sequential(layer(96, dtype=torch.float16), torch.nn.ReLU())
        self.same = self.fine

    def forward(self, x: torch.Tensor) -> None:
        for module in (self.q_proj, self.k_proj, self.gate_up, self.fine, self.same):
            module(x)
        self.inner(x.half())


def kinds(kernels: list[str]) -> set[str]:
    return {kernel.split("__")[0] for kernel in kernels}


@stubbed
def test_products_of_these_tokens_load_nothing(stub: Stub) -> None:
    on_stub(stub)
    model, tokens = Model(), (1, 7, 64, 300)
    loaded = machete.warmup(model, tokens=iter(tokens), device=0)
    assert kinds(loaded) == {"bf16_u4b8", "fp16_u4b8", "bf16_u4_int_fine"}
    assert len(set(loaded)) == len(loaded) == stub.calls("cuLibraryLoadData") == stub.calls("cuKernelGetFunction")
    stub.set(capturing=1)  # where loading is an error
    for m in tokens:
        model(torch.randn(m, K).bfloat16())
    assert stub.calls("cuLibraryLoadData") == len(loaded)
    assert stub.calls("cuLaunchKernelEx") == 5 * len(tokens)


@stubbed
def test_only_what_these_tokens_need_is_loaded(stub: Stub) -> None:
    """And other numbers of tokens may need more."""
    on_stub(stub)
    few, many = (machete.explain(m, 384, K, torch.bfloat16, u4b8).chosen.rsplit("_", 1)[0] for m in (1, 4096))
    assert few != many
    model = torch.nn.Sequential(layer(384))
    assert machete.warmup(model, tokens=[1, 1], device=0) == [f"bf16_u4b8__{few}"]
    stub.set(capturing=1)
    with pytest.raises(machete.CaptureError, match=r"bf16_u4b8__.*call machete_aot\.warmup\(model\)"):
        model(torch.randn(4096, K).bfloat16())
    stub.set(capturing=0)
    assert machete.warmup(model, tokens=[4096], device="cuda:0") == [f"bf16_u4b8__{many}"]
    stub.set(capturing=1)
    model(torch.randn(4096, K).bfloat16())


@stubbed
def test_without_tokens_no_product_of_any_size_loads_anything(stub: Stub) -> None:
    on_stub(stub)
    model = Model()
    loaded = machete.warmup(model, device=0)
    wanted = {
        BUNDLE.manifest.kernel_for(t, s.name).id
        for t in (BF16, FP16, next(t for t in GENERAL if t.name == "bf16_u4_int_fine"))
        for s in BUNDLE.manifest.schedules_for(t)
    }
    assert set(loaded) == wanted and len(loaded) == len(wanted) == stub.calls("cuLibraryLoadData")
    stub.set(capturing=1)
    for m in EVERY_M:
        model(torch.randn(m, K).bfloat16())
    for module in model.modules():
        if isinstance(module, MacheteLinear):
            module.batch_invariant = True
    for m in EVERY_M:
        model(torch.randn(m, K).bfloat16())
    assert stub.calls("cuLibraryLoadData") == len(loaded)


@stubbed
def test_layers_with_act_order(stub: Stub) -> None:
    """They gather their activations by a kernel of the bundle, which is loaded with the others."""
    on_stub(stub)
    model = torch.nn.Sequential(layer(K, act_order=True), layer(96, act_order=True), layer(64))
    loaded = machete.warmup(model, tokens=[3], device=0)
    assert loaded.count(HELPER_ID) == 1 and len(loaded) == stub.calls("cuLibraryLoadData")
    assert HELPER_ID not in machete.warmup(model[2:], tokens=[3], device=0)
    stub.set(capturing=1, record=1)
    model[1](torch.randn(3, K).bfloat16())
    gather, product_ = stub.launches
    assert gather.symbol == f"machete_{HELPER_ID}" and product_.symbol != gather.symbol
    assert unpack_params(gather.parameters)["order"] == model[1].perm.data_ptr()
    assert product_.tensor_map.address == unpack_params(gather.parameters)["out"]


@stubbed
def test_batch_invariant_layers(stub: Stub) -> None:
    on_stub(stub)
    single = layer(384)
    single.batch_invariant = True
    loaded = machete.warmup(single, tokens=EVERY_M, device=0)
    shapes = [(m, 384, K) for m in EVERY_M]
    assert loaded == machete.warmup(torch.bfloat16, u4b8, shapes, 0, batch_invariant=True)
    stub.set(capturing=1)
    for m in EVERY_M:
        single(torch.randn(m, K).bfloat16())


@stubbed
def test_layers_of_one_group_that_is_no_multiple_of_64(stub: Stub) -> None:
    """One group needs none of the kernels for fine groups, several do."""
    on_stub(stub)
    for group, types in ((96, "bf16_u4_float_fine"), (-1, "bf16_u4b8")):
        made = MacheteLinear(96 * 5, 256, u4b8, group)
        assert kinds(machete.warmup(made, tokens=[3], device=0)) == kinds(machete.warmup(made, device=0)) == {types}
    assert machete.warmup(MacheteLinear(96, 256, u4b8, 96), tokens=[1], device=0)[0].startswith("bf16_u4b8__")
    floating = MacheteLinear(K, 256, u4, 128, zeros="float", device="meta")  # before its weights are there
    assert machete.warmup(floating, tokens=[1], device=0) == [f"bf16_u4_float__{NARROW.name}"]


def test_mistakes() -> None:
    model = torch.nn.Sequential(MacheteLinear(K, 256))
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((torch.nn.Linear(4, 4),), {"tokens": [1], "device": 0}, "Linear has no MacheteLinear layers"),
        ((torch.nn.Sequential(),), {}, "Sequential has no MacheteLinear layers"),
        ((model,), {"tokens": [1]}, "got cpu; name one as device"),
        ((model,), {"tokens": [1, 0], "device": 0}, "tokens are the numbers of rows"),
        ((model,), {"tokens": [2.0], "device": 0}, "tokens are the numbers of rows"),
        ((model, u4b8), {}, "tokens and device alone"),
        ((model,), {"shapes": [(1, 256, K)]}, "tokens and device alone"),
        ((model,), {"schedules": []}, "tokens and device alone"),
        ((torch.bfloat16,), {}, r"warmup\(a_dtype, b_type, shapes\), or"),
        ((torch.bfloat16, u4b8), {"tokens": [1]}, r"or warmup\(module, tokens=\.\.\.\)"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(machete.ArgumentError, match=message):
            machete.warmup(*arguments, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    for device in (None, "cuda"):
        with pytest.raises(machete.DeviceError, match="torch sees none; run `machete-aot doctor`"):
            machete.warmup(torch.bfloat16, u4b8, device=device)
