# SPDX-License-Identifier: Apache-2.0
"""The native loader: the same launches as through cuda-bindings, what it refuses, threads, growth, where it is."""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import machete_aot as machete
from machete_aot import abi, calls, doctor, driver, launch, loader, placement, product
from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig
from machete_aot.errors import DeviceError, DriverCallError
from machete_aot.launch import LaunchPlan, Operands, Shape, make_plan, multiply
from quantised import gptq, random_codes
from stub.bundles import BF16, FLAT, GENERAL, NARROW, WIDE, make_bundle, schedule
from stub.harness import Launch, Stub, build, stubbed
from test_repository import ROOT, load_tool

STREAM = 0x5EED0
CALLS = int(os.environ.get("MACHETE_AOT_SOAK_CALLS", "100000"))
BUNDLE = make_bundle(general=GENERAL)
OPERANDS = Operands(acts=0x7F0000000000, weights=0x7F1000000000, scales=0x7F2000000000, bias=0, out=0x7F4000000000)
FULL = OPERANDS._replace(
    bias=0x7F3000000002, zeros=0x7F6000000000, channel_scales=0x7F7000000004, token_scales=0x7F8000000004
)
WORKSPACE = 0x7F5000000000


@functools.cache
def library() -> Path:
    """The library, compiled once."""
    folder = build().parent  # which is removed at the end
    try:
        return load_tool("build_loader").build(folder / "libmachete_loader.so")
    except Exception as error:
        pytest.fail(f"the loader must compile: {error}")


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library before a test forks; and each test begins without one."""
    library()
    monkeypatch.setenv(loader.VARIABLE, "0")
    machete.use_bundle(BUNDLE)
    yield
    machete.use_bundle(None)


def use(native: bool) -> loader.Loader | None:
    """Chooses how this process launches."""
    os.environ[loader.VARIABLE] = str(library()) if native else "0"
    loader._start_over()
    calls._start_over()
    found = loader.active()
    assert (found is not None) == native, loader.status()
    return found


def shape(m: int, n: int, k: int, group: int = 128, **more: int) -> Shape:
    full = {"row_stride": -(-k // 8) * 8, "scale_stride": -(-n // 8) * 8, "out_stride": n, **more}
    return Shape(m, n, k, group, **full)


ANY = abi.FLAG_OUT_FP32 | abi.FLAG_INTEGER_ZEROS
GATED = abi.FLAG_SWIGLU | abi.FLAG_OUT_FP16
LAUNCHES: dict[str, tuple[TypeConfig, str, Shape, Operands, bool]] = {
    "stream": (BF16, schedule(NARROW), shape(5, 8192, 4096), OPERANDS, False),
    "overlap": (BF16, schedule(NARROW), shape(5, 8192, 4096), OPERANDS, True),
    "clusters": (BF16, schedule(NARROW, 4), shape(5, 8192, 4096, row_stride=4104), OPERANDS, False),
    "clusters and overlap": (BF16, schedule(WIDE, 2), shape(100, 8192, 4096), FULL._replace(zeros=0), True),
    "two dimensions": (BF16, schedule(WIDE, 2), shape(100, 4304, 1160, group=1216), OPERANDS, False),
    "whole tiles": (BF16, schedule(FLAT), shape(4096, 8192, 4096), OPERANDS, False),
    "even shares": (BF16, schedule(FLAT, 0, 1), shape(4096, 8192, 4096), OPERANDS, True),
    "nothing to hand over": (BF16, schedule(FLAT, 0, 1), shape(256, 128 * 132, 4096), OPERANDS, True),
    "unaligned groups": (BF16, schedule(NARROW), shape(5, 8192, 4096, group=192), OPERANDS, False),
    "one group": (BF16, schedule(NARROW), shape(5, 8192, 4096, group=4096), OPERANDS, False),
    "floating zeros": (GENERAL[0], schedule(NARROW), shape(3, 256, 512, zero_stride=256), FULL, False),
    "unaligned zeros": (GENERAL[0], schedule(NARROW), shape(3, 256, 512, group=192, zero_stride=256), FULL, False),
    "integer zeros": (GENERAL[4], schedule(NARROW, 4), shape(3, 256, 4096, zero_stride=256, flags=ANY), FULL, True),
    "code of zero": (GENERAL[3], schedule(NARROW), shape(3, 256, 512, code_zero=128), OPERANDS, False),
    "swiglu": (
        GENERAL[2],
        schedule(NARROW),
        shape(3, 256, 512, zero_stride=256, flags=GATED),
        FULL,
        False,
    ),
    "no pairs": (BF16, schedule(NARROW), shape(5, 8192, 4096), OPERANDS._replace(out=OPERANDS.out + 2), False),
    "odd stride": (BF16, schedule(NARROW), shape(5, 8192, 4096, out_stride=8193), OPERANDS, False),
}


def launched(native: bool, names: list[str], stub: Stub) -> list[Launch]:
    """What the driver gets of these launches. Both ways count their tokens from the same number."""
    found = use(native)
    before = len(stub.launches)
    first = 2**64 - 3  # so that the counter starts again
    launch._tokens = itertools.count(first)
    if found is not None:
        found.seed(first)
    for name in names:
        types, chosen, sizes, operands, overlap = LAUNCHES[name]
        with driver.current(driver.device(0)):
            multiply(BUNDLE, types, sizes, chosen, operands, 0, STREAM, overlap, lambda size: WORKSPACE)
    return stub.launches[before:]


@stubbed
def test_both_ways_launch_the_same(stub: Stub) -> None:
    names = list(LAUNCHES)
    slow, fast = launched(False, names, stub), launched(True, names, stub)
    for name, one, other in zip(names, slow, fast, strict=True):
        assert one == other, name
    assert len({x.parameters for x in fast}) == len(names)


@stubbed
def test_what_both_ways_launch_is_what_is_meant(stub: Stub) -> None:
    found = dict(zip(LAUNCHES, launched(True, list(LAUNCHES), stub), strict=True))
    params = {name: x.params for name, x in found.items()}
    assert (found["overlap"].programmatic, found["stream"].programmatic) == (True, False)
    assert [found[name].attributes for name in ("stream", "overlap", "clusters", "clusters and overlap")] == [
        0,
        1,
        1,
        2,
    ]
    assert found["clusters"].cluster == (4, 1, 1)
    assert found["two dimensions"].tensor_map.dims == (1160, 100)
    mapped = {name: [bool(x) for x in of.tensor_maps] for name, of in found.items()}
    assert mapped["stream"] == mapped["one group"] == [True, True, False]
    assert mapped["unaligned groups"] == mapped["unaligned zeros"] == [True, False, False]
    assert mapped["floating zeros"] == mapped["integer zeros"] == [True, True, True]
    for name, of in found.items():
        assert bool(params[name]["flags"] & abi.FLAG_SCALE_MAPS) == mapped[name][1]
        for x, operand, swizzle in zip(of.tensor_maps, ("acts", "scales", "zeros"), (3, 0, 0), strict=True):
            assert x is None or (x.address, x.swizzle) == (getattr(FULL, operand), swizzle)
    assert params["even shares"]["workspace"] == WORKSPACE
    assert params["nothing to hand over"]["workspace"] == 0
    assert params["integer zeros"]["zeros"] == FULL.zeros
    pairs = {name: bool(p["flags"] & abi.FLAG_STORE_PAIRS) for name, p in params.items()}
    assert pairs["swiglu"] and not (pairs["integer zeros"] or pairs["no pairs"] or pairs["odd stride"])
    assert [p["token"] for p in params.values()][:5] == [2**64 - 3, 2**64 - 2, 2**64 - 1, 0, 1]


@stubbed
def test_both_ways_ask_for_the_same_shared_memory(stub: Stub) -> None:
    """Of launches in a row on two streams, two devices and two threads, at random."""
    stub.set(devices=2)
    known = LAUNCHES | {"every SM": (BF16, schedule(NARROW, 2), shape(5, 8192, 4096), OPERANDS, True)}
    chosen = random.Random(5).choices([*known], weights=[1] * len(LAUNCHES) + [len(known)], k=400)

    def asked(native: bool) -> list[int]:
        use(native)
        placement._last.__dict__.clear()
        before = len(stub.launches)

        def run(part: list[str]) -> None:
            places = random.Random(6)
            for name in part:
                types, its, sizes, operands, overlap = known[name]
                index, stream = places.randrange(8) // 7, STREAM + places.randrange(4) // 3
                with driver.current(driver.device(index)):
                    multiply(BUNDLE, types, sizes, its, operands, index, stream, overlap, lambda size: WORKSPACE)

        for part in (chosen[:200], chosen[200:]):
            thread = threading.Thread(target=run, args=(part,))
            thread.start()
            thread.join()
        return [x.shared_memory for x in stub.launches[before:]]

    slow = asked(False)
    assert slow == asked(True)
    assert {placement.OVER_HALF, NARROW.shared_memory(2, BF16)} < set(slow)


@stubbed
def test_tensor_maps_are_encoded_once(stub: Stub) -> None:
    launched(True, ["stream", "overlap", "stream", "no pairs"] * 5, stub)
    assert stub.calls("cuTensorMapEncodeTiled") == 2  # of activations and of scales
    launched(True, ["two dimensions", "even shares", "stream"], stub)
    assert stub.calls("cuTensorMapEncodeTiled") == 6
    launched(True, ["unaligned groups", "integer zeros"], stub)  # activations as before; all three
    assert stub.calls("cuTensorMapEncodeTiled") == 9


@stubbed
def test_the_maps_of_each_layer_are_encoded_once(stub: Stub) -> None:
    """The activations of all layers of a shape have one map, the scales and zeros of each layer their own."""
    use(True)
    layers = [
        FULL._replace(scales=FULL.scales + i * 0x8A0000, zeros=FULL.zeros + i * 0x8A0000)  # somewhere among the weights
        for i in range(64)
    ]
    types, name, sizes, _, _ = LAUNCHES["integer zeros"]
    for operands in layers * 3:
        with driver.current(driver.device(0)):
            multiply(BUNDLE, types, sizes, name, operands, 0, STREAM, True, lambda size: 0)
    assert stub.calls("cuTensorMapEncodeTiled") == 1 + 2 * 64
    found = [tuple(args and args.address for args in x.tensor_maps) for x in stub.launches]
    assert found == [launch.mapped(operands) for operands in layers] * 3


@stubbed
def test_maps_that_differ_in_their_swizzle_alone(stub: Stub) -> None:
    use(True)
    operands = OPERANDS._replace(scales=OPERANDS.acts)  # 2 rows of 256, of which 2 x 64 are copied
    for _ in range(2):
        with driver.current(driver.device(0)):
            multiply(BUNDLE, BF16, shape(2, 256, 256), schedule(WIDE), operands, 0, STREAM, False, lambda size: 0)
    for x in stub.launches:
        acts, scales, _ = x.tensor_maps
        assert acts and scales and scales == acts._replace(swizzle=0) != acts
    assert stub.calls("cuTensorMapEncodeTiled") == 2


@stubbed
def test_encoded_tensor_maps_are_bounded_and_right(stub: Stub) -> None:
    use(True)
    addresses = [*range(0, 1 << 22, 1 << 12)] * 2
    for address in addresses:
        with driver.current(driver.device(0)):
            operands = OPERANDS._replace(acts=OPERANDS.acts + address, scales=OPERANDS.scales + address)
            multiply(BUNDLE, BF16, shape(5, 256, 4096), None, operands, 0, STREAM, False, lambda size: 0)
    found = [tuple(args and args.address for args in x.tensor_maps) for x in stub.launches]
    assert found == [(OPERANDS.acts + address, OPERANDS.scales + address, None) for address in addresses]
    # 2,048 maps, of which at most 512 are still there when they are needed again.
    assert 4096 - 512 <= stub.calls("cuTensorMapEncodeTiled") <= 4096


@pytest.mark.parametrize("native", [False, True])
def test_failures_are_the_same(native: bool) -> None:
    @stubbed
    def check(stub: Stub) -> None:
        use(native)

        def run(operands: Operands = OPERANDS) -> None:
            with driver.current(driver.device(0)):
                multiply(BUNDLE, BF16, shape(5, 256, 4096), None, operands, 0, STREAM, False, lambda size: 0)

        wanted = rf"cuTensorMapEncodeTiled failed with an error \(1\): for .* address {OPERANDS.acts + 2:#x}"
        with pytest.raises(DriverCallError, match=wanted):
            run(OPERANDS._replace(acts=OPERANDS.acts + 2))
        run()
        for code, name in ((701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"), (912, "CUDA_ERROR_INVALID_CLUSTER_SIZE")):
            stub.fail("cuLaunchKernelEx", code)
            with pytest.raises(DriverCallError, match=rf"{name} \({code}\)") as caught:
                run()
            assert (caught.value.call, caught.value.code) == ("cuLaunchKernelEx", code)
        assert "_x1" in str(caught.value)
        stub.fail("cuLaunchKernelEx", 0)
        run()
        assert len(stub.launches) == 2

    check()


@pytest.mark.parametrize("native", [False, True])
def test_failures_of_repeated_calls(native: bool) -> None:
    @stubbed
    def check(stub: Stub) -> None:
        use(native)
        layer = Layer()
        a, other = layer.acts(5), layer.acts(5)
        layer.gemm(a)
        layer.gemm(a)
        stub.fail("cuTensorMapEncodeTiled", 1)
        with pytest.raises(DriverCallError, match=f"address.* {other.data_ptr():#x}"):
            layer.gemm(other)
        layer.gemm(a)  # whose tensor map is known
        assert len(stub.launches) == 3

    check()


@pytest.mark.parametrize("native", [False, True])
def test_failures_of_the_maps_of_scales_and_zeros(native: bool) -> None:
    @stubbed
    def check(stub: Stub) -> None:
        use(native)
        layer = Layer(b_type=machete.u4)
        a, zeros = layer.acts(5), torch.ones(layer.scales.shape).bfloat16()
        for options in ({}, {"b_zeros": zeros}):
            layer.gemm(a, **options)
        other, others = layer.scales.clone(), zeros.clone()
        failing: tuple[tuple[str, torch.Tensor, dict[str, torch.Tensor]], ...] = (
            ("scales", other, {"scales": other}),
            ("zeros", others, {"b_zeros": others}),
        )
        for name, tensor, options in failing:
            stub.fail("cuTensorMapEncodeTiled", 1)
            for _ in range(2):  # a failure leaves nothing behind
                first = tensor if native else a  # cuda-bindings has all three encoded again
                with pytest.raises(DriverCallError, match=f"address {first.data_ptr():#x}") as caught:
                    layer.gemm(a, **options)
            assert caught.value.call == "cuTensorMapEncodeTiled"
            assert not native or f"{name}: TensorMapArgs(" in str(caught.value)
            stub.fail("cuTensorMapEncodeTiled", 0)
            layer.gemm(a, **options)
        assert [[args and args.address for args in x.tensor_maps[1:]] for x in stub.launches] == [
            *([layer.scales.data_ptr(), None], [layer.scales.data_ptr(), zeros.data_ptr()]),
            *([other.data_ptr(), None], [layer.scales.data_ptr(), others.data_ptr()]),
        ]

    check()


@stubbed
def test_refusals_are_typed(stub: Stub) -> None:
    use(True)
    with pytest.raises(DeviceError, match="MACHETE_LOADER_MISALIGNED"), driver.current(driver.device(0)):
        operands = OPERANDS._replace(weights=OPERANDS.weights + 8)
        multiply(BUNDLE, BF16, shape(5, 256, 4096), None, operands, 0, STREAM, False, lambda size: 0)
    general = GENERAL[0], schedule(NARROW)
    for stride, operands, status in (
        (256, OPERANDS, "NO_ADDRESS"),  # a map of zeros, and no zeros
        (0, OPERANDS._replace(zeros=0x7F6000000000), "BAD_CALL"),  # zeros, and no map of them
    ):
        with pytest.raises(DeviceError, match=f"MACHETE_LOADER_{status}"), driver.current(driver.device(0)):
            sizes = shape(5, 256, 4096, zero_stride=stride)
            multiply(BUNDLE, general[0], sizes, general[1], operands, 0, STREAM, False, lambda size: 0)
    with pytest.raises(DriverCallError, match="9999"):
        driver.check("cuLaunchKernelEx", 9999)
    assert not stub.launches


# ---------------------------------------------------------------- gemm, again and again


class Layer:
    """Tensors on the CPU, whose addresses the stub driver takes."""

    def __init__(self, n: int = 256, k: int = 512, b_type: machete.ScalarType = machete.u4b8) -> None:
        self.n, self.k, self.b_type = n, k, b_type
        self.b = machete.prepack_b(gptq(random_codes(k, n, b_type.bits, seed=1), b_type.bits), b_type, k=k)
        self.scales = torch.rand(-(-k // 128), n).bfloat16()

    def acts(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, self.k).bfloat16()

    def gemm(self, a: torch.Tensor, **options: Any) -> torch.Tensor:
        """``machete.gemm``, as if these tensors were on a GPU."""
        names = ("b_zeros", "bias", "out", "schedule", "overlap", "channel_scales", "token_scales", "activation")
        zeros, bias, out, name, overlap, channels, tokens, activation = (options.pop(n, None) for n in names)
        scales, group = options.pop("scales", self.scales), options.pop("group", 128)
        invariant, out_dtype = options.pop("batch_invariant", False), options.pop("out_dtype", None)
        assert not options
        return product.gemm_on(
            0, STREAM, a, self.b, self.b_type, scales, zeros, group, bias, out, name, overlap, invariant, channels,
            tokens, activation, out_dtype,
        )  # fmt: skip


def in_full(stub: Stub) -> list[int]:
    """Counts calls that are checked in full, in a list of one."""
    count, check = [0], product.check_gemm

    def counting(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return check(*arguments, **options)

    product.check_gemm = counting  # in the test's own process
    return count


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "named": {"schedule": schedule(FLAT, 0, 1)},
    "epilogue": {"bias": True, "channel_scales": True, "token_scales": True, "out_dtype": torch.float32},
    "swiglu": {"activation": "swiglu", "bias": True},
    "zeros": {"b_zeros": torch.uint8, "schedule": schedule(NARROW, 4)},
    "floating zeros": {"b_zeros": torch.bfloat16},
    "out": {"out": True},
    "invariant": {"batch_invariant": True},
}


def options_of(layer: Layer, name: str, m: int) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    made = {
        "bias": lambda: torch.randn(layer.n).bfloat16(),
        "channel_scales": lambda: torch.rand(layer.n),
        "token_scales": lambda: torch.rand(m),
        "b_zeros": lambda: torch.ones(layer.scales.shape, dtype=OPTIONS[name]["b_zeros"]),
        "out": lambda: torch.empty(m, layer.n + 8).bfloat16()[:, : layer.n],
    }
    return {**options, **{key: make() for key, make in made.items() if key in options}}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_repeated_calls_launch_the_same(name: str, native: bool) -> None:
    @stubbed
    def check(stub: Stub) -> None:
        use(native)
        layer = Layer(b_type=machete.u4 if "zeros" in name else machete.u4b8)
        a, full = layer.acts(5), in_full(stub)
        options = options_of(layer, name, 5)
        results = [layer.gemm(a, **options) for _ in range(4)]
        assert full == [1]
        assert {(x.shape, x.stride(), x.dtype) for x in results} == {
            (results[0].shape, results[0].stride(), results[0].dtype)
        }
        params = [x.params for x in stub.launches]
        assert [p["out"] for p in params] == [x.data_ptr() for x in results]
        for p in params:
            del p["token"], p["out"]
            assert bool(p.pop("workspace")) == (name == "named")
        assert all(p == params[0] for p in params)
        first, *others = (x._replace(parameters=b"", attributes=0) for x in stub.launches)
        assert not first.programmatic and all(x.programmatic for x in others)  # the first one waited
        assert {x._replace(programmatic=False) for x in others} == {first}
        assert len({x.tensor_maps for x in stub.launches}) == 1
        layer.gemm(a.clone(), **options)
        assert full == [1]

    check()


@pytest.mark.parametrize("native", [False, True])
def test_what_is_written_into_out_is_no_constant(native: bool) -> None:
    """The next product may read ``out`` as its bias: not before this one has ended."""

    @stubbed
    def check(stub: Stub) -> None:
        use(native)
        layer, out = Layer(), torch.zeros(5, 256).bfloat16()
        a, bias = layer.acts(5), out[0]
        seen = []
        for write in (False, False, True, False, True):
            if write:
                before = out._version
                layer.gemm(a, out=out)
                assert out._version == before + 1
            layer.gemm(a, bias=bias)
            seen.append(stub.launches[-1].programmatic)
        assert seen == [False, True, False, True, False]
        with torch.inference_mode():
            out = torch.zeros(5, 256).bfloat16()
            assert layer.gemm(a, out=out) is out  # it has no counter

    check()


class Wrapper(torch.Tensor):
    """Stands for another tensor, as DTensor does: its own address is 0."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        raise AssertionError(f"{function} computes with a tensor that has no memory")


@pytest.mark.parametrize("native", [False, True])
def test_tensors_that_stand_for_others_are_refused(native: bool) -> None:
    """Also after a call of the same kind with plain ones: the kernels read the address 0 as none given."""

    @stubbed
    def check(stub: Stub) -> None:
        use(native)
        layer = Layer(b_type=machete.u4)
        a = layer.acts(5)
        operands = {
            "bias": torch.randn(256).bfloat16(),
            "channel_scales": torch.rand(256),
            "token_scales": torch.rand(5),
            "b_zeros": torch.ones(4, 256, dtype=torch.uint8),
            "scales": layer.scales,
        }
        layer.gemm(a, **operands)
        for name, tensor in operands.items():
            with pytest.raises(machete.ArgumentError, match="is a Wrapper, which stands for other tensors"):
                layer.gemm(a, **{**operands, name: Wrapper(tensor)})
        plain, layer.b = layer.b, Wrapper(layer.b)
        with pytest.raises(machete.ArgumentError, match="b is a Wrapper"):
            layer.gemm(a, **operands)
        layer.b = plain
        layer.gemm(a, **operands)
        assert len(stub.launches) == 2

    check()


@stubbed
def test_a_schedule_that_is_no_name_is_refused(stub: Stub) -> None:
    layer = Layer()
    for wrong in (["x"], 3):
        with pytest.raises(machete.ArgumentError, match="schedule must be a name"):
            layer.gemm(layer.acts(5), schedule=wrong)


@stubbed
def test_a_new_shape_or_option_is_looked_at_in_full(stub: Stub) -> None:
    use(True)
    layer, full = Layer(), in_full(stub)
    other = Layer(n=512)
    a = layer.acts(5)
    variants: list[tuple[Layer, torch.Tensor, dict[str, Any]]] = [
        (layer, a, {}),
        (layer, layer.acts(6), {}),
        (layer, a.view(1, 5, 512), {}),
        (layer, torch.randn(5, 520).bfloat16()[:, :512], {}),
        (other, a, {}),
        (layer, a, {"batch_invariant": True}),
        (layer, a, {"out_dtype": torch.float16}),
        (layer, a, {"activation": "swiglu"}),
        (layer, a, {"schedule": schedule(WIDE)}),
        (layer, a, {"bias": torch.zeros(256).bfloat16()}),
        (layer, a, {"scales": torch.rand(4, 264).bfloat16()[:, :256]}),
        (layer, a, {"out": torch.empty(5, 256).bfloat16()}),
        (layer, a, {"token_scales": torch.rand(5)}),
        (layer, a, {"channel_scales": torch.rand(256)}),
    ]
    for i, (its, acts, options) in enumerate(variants):
        for _ in range(2):
            assert its.gemm(acts, **options).shape[:-1] == acts.shape[:-1]
            assert full == [i + 1]
    layer.gemm(a, group=512, scales=layer.scales[:1])
    assert full == [len(variants) + 1]


@stubbed
def test_nothing_that_is_refused_passes_after_a_call_like_it(stub: Stub) -> None:
    use(True)
    layer = Layer()
    a = layer.acts(5)
    layer.gemm(a)
    out = torch.empty(5, 256).bfloat16()
    layer.gemm(a, out=out)
    nearly_u4b8 = machete.ScalarType("u4b8", 4, 7)
    mine = layer.b_type
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"group": 128.0}, "b_group_size must be"),
        ({"group": True}, "b_group_size must be"),
        ({"schedule": "nonsense"}, "no schedule"),
        ({"activation": ["swiglu"]}, "activation must be"),
        ({"scales": layer.scales.half()}, "dtype of a"),
        ({"scales": layer.scales.to("meta")}, "is on meta"),
        ({"scales": layer.scales.tolist()}, "must be a torch.Tensor"),
        ({"out": out.float()}, "out must be"),
        ({"out": a[:, :256]}, "shares memory"),
        ({"bias": torch.zeros(255).bfloat16()}, "bias must have"),
    ]
    for options, message in wrong:
        with pytest.raises(machete.ArgumentError, match=message):
            layer.gemm(a, **options)
    layer.b_type = nearly_u4b8
    with pytest.raises(machete.UnsupportedError, match="u4b8"):
        layer.gemm(a)
    layer.b_type = mine
    layer.b = torch.cat([layer.b.flatten(), layer.b.flatten()])[1 : 1 + layer.b.numel()].view(layer.b.shape)
    with pytest.raises(machete.ArgumentError, match="16-byte boundary"):
        layer.gemm(a)
    layer.b = layer.b.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(machete.ArgumentError, match="contiguous"):
        layer.gemm(a)
    assert len(stub.launches) == 2


@stubbed
def test_calls_with_copies_are_looked_at_in_full(stub: Stub) -> None:
    use(True)
    layer, full = Layer(), in_full(stub)
    a, flat = layer.acts(4), torch.randn(4 * 512 + 8).bfloat16()
    layer.gemm(a)
    off = flat[1 : 1 + 4 * 512].view(4, 512)  # of the same shape and strides
    for i in range(3):
        layer.gemm(off)
        assert stub.launches[-1].tensor_map.address not in (off.data_ptr(), a.data_ptr())
        assert full == [2 + i]
    layer.gemm(a)
    assert (stub.launches[-1].tensor_map.address, full) == (a.data_ptr(), [4])


@stubbed
def test_out_beside_the_activations(stub: Stub) -> None:
    """Columns of one buffer: the ranges meet, the elements do not."""
    use(True)
    layer, both = Layer(), torch.randn(4, 768).bfloat16()
    a, out = both[:, :512], both[:, 512:]
    for _ in range(3):
        assert layer.gemm(a, out=out) is out
    assert [x.params["out"] for x in stub.launches] == [out.data_ptr()] * 3


@stubbed
def test_another_bundle(stub: Stub) -> None:
    use(True)
    layer, full = Layer(), in_full(stub)
    a = layer.acts(5)
    layer.gemm(a)
    machete.use_bundle(make_bundle())
    for _ in range(2):
        layer.gemm(a)
    assert full == [2]
    machete.use_bundle(BUNDLE)
    layer.gemm(a)
    assert full == [3]


@pytest.mark.parametrize("native", [False, True])
def test_overlap_of_repeated_calls(native: bool) -> None:
    @stubbed
    def check(stub: Stub) -> None:
        use(native)
        layer, bias = Layer(), torch.randn(256).bfloat16()
        a, seen = layer.acts(1), []
        for write in (None, None, layer.b, None, layer.scales, None, bias, None, a):
            if write is not None:
                write.add_(1)
            layer.gemm(a, bias=bias)
            seen.append(stub.launches[-1].programmatic)
        assert seen == [False, True, False, True, False, True, False, True, True]
        layer.gemm(a, bias=bias, overlap=False)
        machete.set_overlap(False)
        layer.gemm(a, bias=bias)
        layer.gemm(a, bias=bias, overlap=True)
        machete.set_overlap(True)
        assert [x.programmatic for x in stub.launches[-3:]] == [False, False, True]
        stub.set(capturing=1)
        layer.scales.add_(1)
        for _ in range(2):  # a captured launch has not waited
            layer.gemm(a, bias=bias)
        assert [x.programmatic for x in stub.launches[-2:]] == [False, False]

    check()


@stubbed
def test_old_drivers_do_not_overlap_in_graphs(stub: Stub) -> None:
    stub.set(driver=12020)
    use(True)
    layer = Layer()
    a = layer.acts(1)
    seen = []
    for capturing in (0, 0, 0, 1, 1, 0):
        stub.set(capturing=capturing)
        layer.gemm(a)
        seen.append(stub.launches[-1].programmatic)
    assert seen == [False, True, True, False, False, True]


@pytest.mark.parametrize("native", [False, True])
def test_the_context_is_made_current_and_restored(native: bool) -> None:
    @stubbed
    def check(stub: Stub) -> None:
        stub.set(devices=2)
        use(native)
        layer, seen = Layer(), []
        a, other = layer.acts(1), driver.device(1).context

        def work() -> None:
            for _ in range(3):
                layer.gemm(a)
                seen.append((stub.launches[-1].device, int(driver.call("cuCtxGetCurrent"))))
            driver.call("cuCtxPushCurrent", other)
            for _ in range(2):
                layer.gemm(a)
                seen.append((stub.launches[-1].device, int(driver.call("cuCtxGetCurrent"))))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [(0, 0)] * 3 + [(0, int(other))] * 2

    check()


@stubbed
def test_threads(stub: Stub) -> None:
    """Every launch has a token and operands of its own, whichever thread makes it."""
    use(True)
    layers = [Layer(), Layer(n=512)]
    results: dict[int, int] = {}

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(400):
            layer, m = choose.choice(layers), choose.randrange(1, 20)
            name = choose.choice([None, schedule(FLAT, 0, 1)])
            a = layer.acts(m)
            out = torch.empty(m, layer.n).bfloat16()
            layer.gemm(a, out=out, schedule=name)
            kept.append((a, out))
            results[out.data_ptr()] = a.data_ptr()

    kept: list[Any] = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    params = [x.params for x in stub.launches]
    assert len(params) == len({p["token"] for p in params}) == len(results) == 1600
    for x, p in zip(stub.launches, params, strict=True):
        assert results[p["out"]] == x.tensor_map.address


@stubbed
def test_soak(stub: Stub) -> None:
    """Many calls of shapes that come, go and come again take no memory that they do not give back."""
    use(True)
    stub.set(record=0)
    layers = [Layer(), Layer(n=512), Layer(n=64, k=1024)]
    most = 3 * calls.MOST
    acts = [torch.zeros(most, layer.k).bfloat16() for layer in layers]
    choose = random.Random(0)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    calls.MOST = 200  # in this process; so that they go
    figures = []
    for i in range(CALLS):
        which = choose.randrange(len(layers))
        m = choose.randrange(1, 60) if i % 50 else choose.randrange(60, most)
        layers[which].gemm(acts[which][:m])
        if i % (CALLS // 10) == 0:
            figures.append(resident())
    assert len(calls.known) <= 200
    assert figures[-1] - figures[3] < 16 << 20, figures  # torch's and malloc's own ups and downs
    assert stub.calls("cuLaunchKernelEx") == CALLS


# ---------------------------------------------------------------- plans as bytes


def plan_of(tile: TileConfig, split: int, sizes: Shape, even_ctas: int = 0, types: TypeConfig = BF16) -> LaunchPlan:
    kernel = BUNDLE.manifest.kernel_for(types, schedule(tile))
    return make_plan(kernel, ScheduleConfig(tile, split, even_ctas), sizes, sms=132)


PLANS = [
    plan_of(NARROW, 4, shape(5, 8192, 4096)),
    plan_of(WIDE, 1, shape(100, 4304, 1160)),
    plan_of(FLAT, 0, shape(4096, 8192, 4096, group=192), 1),
    plan_of(NARROW, 1, shape(5, 8191, 4096, zero_stride=8192, flags=ANY), types=GENERAL[1]),
]


def test_plans_are_accepted() -> None:
    native = loader.Loader(library())
    for plan in PLANS:
        data = loader.pack_plan(plan)
        assert len(data) == loader.PLAN_BYTES == 368
        assert native.check(data) == 0
        assert native.check(data[:-1]) == native.check(data + b"\0") == -5
        assert native.name(native.check(bytes(len(data)))) == "MACHETE_LOADER_BAD_PLAN"
        newer = data[:8] + (abi.ABI_VERSION + 1).to_bytes(4, "little") + data[12:]
        assert native.name(native.check(newer)) == "MACHETE_LOADER_WRONG_ABI"


@given(
    st.sampled_from(PLANS),
    st.lists(st.tuples(st.integers(0, loader.PLAN_BYTES // 4 - 1), st.integers(0, 2**32 - 1)), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_no_words_of_a_plan_do_harm(plan: LaunchPlan, words: list[tuple[int, int]]) -> None:
    native, data = loader.Loader(library()), bytearray(loader.pack_plan(plan))
    for place, value in words:
        data[4 * place : 4 * place + 4] = value.to_bytes(4, "little")
    assert native.check(bytes(data)) in (0, -5, -6)


@stubbed
def test_no_bytes_of_a_plan_do_harm(stub: Stub) -> None:
    """Whatever a plan says, a launch ends in a status, the driver's refusal, or a launch."""
    native, choose = use(True), random.Random(0)
    assert native is not None
    stub.set(record=0)
    kernel = launch.load_kernel(BUNDLE, PLANS[0].kernel_id, 0, STREAM)
    found = set()
    for i in range(20000):
        plan = choose.choice(PLANS)
        data = bytearray(loader.pack_plan(plan))
        for _ in range(choose.randrange(1, 4)):
            data[choose.randrange(len(data))] = choose.choice([0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)])
        if i % 10 == 0:
            data = bytearray(choose.randbytes(len(data)))
        holder = loader.NativePlan(plan)
        holder.storage.raw = bytes(data)
        context = int(driver.device(0).context)
        operands = OPERANDS._replace(zeros=FULL.zeros if plan.maps[2] else 0)
        code = native.launch(
            loader.pack_call(holder.address, int(kernel.handle), operands, WORKSPACE, STREAM, context, False)
        )
        assert -8 <= code < 6 << 16
        found.add(code if code <= 0 else native._library.machete_loader_function(code))
    assert found >= {0, -5, -6, b"cuTensorMapEncodeTiled"}
    assert int(driver.call("cuCtxGetCurrent")) == 0


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    """Threads that launch good and random plans, from C."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler
    flags = ["-O1", "-g", "-D_GNU_SOURCE", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    works = subprocess.run([compiler, *flags, "-o", str(tmp_path / "probe"), str(probe)], capture_output=True)
    if works.returncode or subprocess.run([tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip(f"programs with -fsanitize={sanitizer} do not run here")
    driven, stub = tmp_path / "drive", tmp_path / "libcuda.so.1"
    tests, sources = ROOT / "tests", ROOT / "csrc"
    shared = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(
        [compiler, "-std=gnu11", *flags, *shared, "-o", str(stub), str(tests / "stub" / "libcuda.c"), "-lpthread"],
        check=True,
    )
    subprocess.run(
        [
            *(compiler, "-std=c11", *flags, f"-I{sources / 'loader'}", f"-I{sources / 'kernels'}", "-o", str(driven)),
            *(str(tests / "loader" / "drive.c"), str(sources / "loader" / "machete_loader.c"), "-ldl", "-lpthread"),
        ],
        check=True,
    )
    done = subprocess.run([driven, stub, "4", str(CALLS // 10)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 4 * CALLS // 10


# ---------------------------------------------------------------- how it is found


def test_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(loader.VARIABLE, str(library()))
    assert loader.status() == (True, f"launches go through {library()}")
    monkeypatch.setenv(loader.VARIABLE, "0")
    assert loader.status() == (False, "launches go through cuda-bindings: MACHETE_AOT_LOADER=0")
    monkeypatch.setenv(loader.VARIABLE, str(tmp_path / "nothing.so"))
    assert not loader.status()[0] and "there is no" in loader.status()[1]
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setenv(loader.VARIABLE, str(tmp_path / "text.so"))
    assert not loader.status()[0] and "cannot be used" in loader.status()[1]
    monkeypatch.delenv(loader.VARIABLE)
    monkeypatch.setattr(loader, "IN_PACKAGE", library())
    assert loader.status()[0]
    report = doctor.diagnose(lambda: BUNDLE)
    (finding,) = (f for f in report["findings"] if f["check"] == "loader")
    assert (finding["status"], str(library()) in finding["detail"]) == ("ok", True)
    monkeypatch.setenv(loader.VARIABLE, "0")
    (finding,) = (f for f in doctor.diagnose(lambda: BUNDLE)["findings"] if f["check"] == "loader")
    assert (finding["status"], finding["detail"]) == ("ok", loader.status()[1])


@stubbed
def test_a_library_of_another_version_is_not_used(stub: Stub) -> None:
    source, other = library().parent / "other.c", library().parent / "other.so"
    source.write_text(
        f"int machete_loader_version(void) {{ return {loader.VERSION}; }}\n"
        f"int machete_loader_abi(void) {{ return {abi.ABI_VERSION + 1}; }}\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    os.environ[loader.VARIABLE] = str(other)
    loader._start_over()
    assert f"ABI {abi.ABI_VERSION + 1}, where this package has" in loader.status()[1]
    assert loader.active() is None
    layer = Layer()
    layer.gemm(layer.acts(3))
    assert len(stub.launches) == 1


@stubbed
def test_a_fork_starts_over(stub: Stub) -> None:
    first = use(True)
    layer = Layer()
    layer.gemm(layer.acts(3))
    pid = os.fork()
    if pid == 0:
        different = loader.active() is not first and len(calls.known) == 0
        layer.gemm(layer.acts(3))
        os._exit(0 if different and len(stub.launches) == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert loader.active() is first and len(calls.known) == 1


def test_the_header_and_python_agree() -> None:
    text = (ROOT / "csrc" / "loader" / "machete_loader.h").read_text()
    assert f"MACHETE_LOADER_VERSION = {loader.VERSION} " in text
    assert f"MACHETE_LOADER_PLAN = {loader._PLAN_MAGIC:#x}" in text
    assert f"MACHETE_LOADER_CALL = {loader.CALL_MAGIC:#x}" in text
    assert (loader.PLAN_BYTES, loader.CALL_BYTES) == (368, 120)


def test_the_benchmark_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.launch", "--calls", "50"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "native call beyond the stub" in done.stdout
