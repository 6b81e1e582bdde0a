# SPDX-License-Identifier: Apache-2.0
"""The public calls: what they pass to the driver for tensors as they come, what they refuse, and the CPU's answer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import machete_aot as machete
from machete_aot import abi, driver, product
from machete_aot.config import PRODUCTS, ProductTypes
from machete_aot.operands import aligned_rows, row_stride, run_kernel
from machete_aot.part import H100
from machete_aot.placement import OVER_HALF
from machete_aot.product import kernel_types
from machete_aot.validate import check_gemm
from quantised import gptq, random_codes
from stub.bundles import BF16, FLAT, FP16, GENERAL, NARROW, SCHEDULES, WIDE, make_bundle, schedule
from stub.harness import Launch, Stub, stubbed

STREAM = 0x5EED0
BUNDLE = make_bundle(general=GENERAL)
SYMMETRIC = make_bundle()


@pytest.fixture(autouse=True)
def _bundle() -> Iterator[None]:
    machete.use_bundle(BUNDLE)
    yield
    machete.use_bundle(None)


class Layer:
    """Weights and scales of a layer on the CPU; the stub driver takes any address."""

    def __init__(
        self,
        n: int,
        k: int,
        group: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        b_type: machete.ScalarType = machete.u4b8,
    ) -> None:
        self.n, self.k, self.group, self.dtype, self.b_type = n, k, group, dtype, b_type
        bits = b_type.bits
        self.b = machete.prepack_b(gptq(random_codes(k, n, bits, seed=1), bits), b_type, dtype, k=k)
        self.scales = torch.rand(-(-k // group), n).to(dtype)

    def acts(self, m: int) -> torch.Tensor:
        return torch.randn(m, self.k).to(self.dtype)

    def run(self, stub: Stub, a: torch.Tensor, name: str | None = None, **options: Any) -> Launch:
        """What ``gemm`` does on a GPU after its checks."""
        scales, zeros = options.pop("scales", self.scales), options.pop("zeros", None)
        bias, out = options.pop("bias", None), options.pop("out", None)
        problem = check_gemm(a, self.b, self.b_type, scales, zeros, self.group, bias, out, **options)
        result = problem.out2d
        if result is None:
            result = torch.empty(problem.m, problem.out_columns, dtype=problem.out_dtype)
        wanted = product._product_types(a.dtype, self.b_type, problem.zeros_kind, problem.fine)
        types = kernel_types(BUNDLE, wanted)
        run_kernel(BUNDLE, types, problem, self.b, self.b_type, result, name or schedule(NARROW), None, 0, STREAM)
        launch = stub.launches[-1]
        params = launch.params
        assert params["out"] == result.data_ptr()
        assert params["out_stride"] == (result.stride(0) if problem.m > 1 else problem.out_columns)
        return launch

    def params(self, stub: Stub, a: torch.Tensor, **options: Any) -> dict[str, int]:
        return self.run(stub, a, **options).params


@stubbed
def test_contiguous_operands_are_passed_as_they_are(stub: Stub) -> None:
    layer, bias = Layer(256, 512), torch.randn(256).bfloat16()
    a = layer.acts(8)
    launch = layer.run(stub, a, bias=bias)
    assert (launch.tensor_map.address, launch.tensor_map.dims, launch.tensor_map.strides) == (
        a.data_ptr(), (64, 8, 8), (1024, 128)
    )  # fmt: skip
    params = launch.params
    assert params["weights"] == layer.b.data_ptr()
    assert (params["scales"], params["scale_stride"]) == (layer.scales.data_ptr(), 256)
    assert params["bias"] == bias.data_ptr()


@stubbed
def test_row_strides_are_kept(stub: Stub) -> None:
    layer = Layer(256, 512)
    a, out = torch.randn(8, 520).bfloat16()[:, :512], torch.empty(8, 300).bfloat16()[:, 10:266]
    scales = torch.rand(4, 264).bfloat16()[:, :256]
    launch = layer.run(stub, a, out=out, scales=scales)
    assert (launch.tensor_map.address, launch.tensor_map.strides) == (a.data_ptr(), (1040, 128))
    params = launch.params
    assert (params["out"], params["out_stride"]) == (out.data_ptr(), 300)
    assert (params["scales"], params["scale_stride"]) == (scales.data_ptr(), 264)


def misaligned(m: int, k: int) -> dict[str, torch.Tensor]:
    flat = torch.randn(m * k + 8).bfloat16()
    return {
        "base": flat[1 : 1 + m * k].view(m, k),
        "stride": torch.randn(m, k + 4).bfloat16()[:, :k],
        "columns": torch.randn(k, m).bfloat16().t(),
        "every other": torch.randn(m, 2 * k).bfloat16()[:, ::2],
        "expanded": torch.randn(1, k).bfloat16().expand(m, k),
    }


@pytest.mark.parametrize("kind", list(misaligned(2, 64)))
@stubbed
def test_misaligned_activations_are_copied(stub: Stub, kind: str) -> None:
    layer, a = Layer(256, 512), misaligned(8, 512)[kind]
    launch = layer.run(stub, a)
    memory = a.untyped_storage()
    assert launch.tensor_map.address not in range(memory.data_ptr(), memory.data_ptr() + memory.nbytes())
    assert (launch.tensor_map.dims, launch.tensor_map.strides) == ((64, 8, 8), (1024, 128))


@pytest.mark.parametrize("k", [1, 7, 8, 63, 100])
@pytest.mark.parametrize("kind", ["contiguous", *misaligned(2, 64)])
def test_copies_hold_the_same_values(k: int, kind: str) -> None:
    matrix = {"contiguous": torch.randn(3, k).bfloat16(), **misaligned(3, k)}[kind]
    found = aligned_rows(matrix)
    assert torch.equal(found, matrix)
    assert found.data_ptr() % 16 == row_stride(found) % 8 == 0
    assert row_stride(found) >= k
    assert k == 1 or found.stride(1) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_read_in_whole_pieces_have_room_after_the_last(rows: int) -> None:
    """Scales: the kernels read 16 bytes at a time, and the caller's memory may end with the last element."""
    for columns, copied in ((48, False), (50, True)):
        matrix = torch.randn(rows, 56).half()[:, :columns].clone(memory_format=torch.contiguous_format)
        found = aligned_rows(matrix, whole=True)
        assert (found is not matrix) == copied
        assert torch.equal(found, matrix)
        used = (found.storage_offset() + (rows - 1) * row_stride(found) + -(-columns // 8) * 8) * 2
        assert used <= found.untyped_storage().nbytes()


def test_aligned_rows_are_not_copied() -> None:
    for matrix in (torch.randn(3, 64).bfloat16(), torch.randn(3, 72).bfloat16()[:, :50], torch.randn(1, 50).bfloat16()):
        assert aligned_rows(matrix) is matrix
    assert row_stride(torch.randn(1, 50).half()) == 56
    assert row_stride(torch.randn(3, 72).half()[:1, :50]) == 56  # the stride of a single row means nothing
    assert row_stride(torch.ones(1, 50, dtype=torch.uint8)) == 64


@stubbed
def test_ragged_n_and_k(stub: Stub) -> None:
    layer = Layer(100, 200, group=64)
    launch = layer.run(stub, layer.acts(3))
    assert (launch.tensor_map.dims, launch.tensor_map.strides) == ((200, 3), (400,))
    params = launch.params
    assert params["scale_stride"] == 104
    assert params["scales"] != layer.scales.data_ptr()
    assert params["group_blocks"] == 2
    assert params["flags"] == abi.FLAG_ACTS_2D | abi.FLAG_SCALE_MAPS | abi.FLAG_ONE_PER_SM
    scales = launch.tensor_maps[1]  # of the copy, without what pads its rows
    assert scales and (scales.address, scales.dims, scales.strides) == (params["scales"], (100, 4), (208,))


@stubbed
def test_one_row_takes_any_stride(stub: Stub) -> None:
    layer = Layer(256, 512)
    a = torch.randn(4, 515).bfloat16()[:1, :512]
    launch = layer.run(stub, a)
    assert (launch.tensor_map.address, launch.tensor_map.strides) == (a.data_ptr(), (1024,))


@stubbed
def test_batches_are_rows(stub: Stub) -> None:
    layer = Layer(256, 512)
    a = torch.randn(2, 4, 8, 512).bfloat16()
    launch = layer.run(stub, a, name=schedule(WIDE))
    assert launch.tensor_map.dims == (64, 64, 8)
    assert launch.tensor_map.address == a.data_ptr()


@pytest.mark.parametrize("shape", [(0, 256, 256), (-1, 256, 256), (1, 0, 256), (1, 256, 2.5)])
def test_explain_refuses_what_is_no_product(shape: tuple[Any, Any, Any]) -> None:
    with pytest.raises(machete.ArgumentError, match="M, N and K must be positive integers"):
        machete.explain(*shape)


def test_meta_tensors_share_no_memory() -> None:
    a = torch.empty(4, 512, dtype=torch.bfloat16, device="meta")
    scales = torch.empty(4, 256, dtype=torch.bfloat16, device="meta")
    b, out = Layer(256, 512).b.to("meta"), torch.empty(4, 256, dtype=torch.bfloat16, device="meta")
    assert check_gemm(a, b, machete.u4b8, scales, None, 128, None, out).m == 4


@stubbed
def test_overlap_of_real_calls(stub: Stub) -> None:
    layer, bias = Layer(256, 512), torch.randn(256).bfloat16()
    a = layer.acts(1)
    seen = []
    for write in (None, None, layer.b, None, layer.scales, None, bias, None, a):
        if write is not None:
            write.add_(1)
        seen.append(layer.run(stub, a, bias=bias).programmatic)
    assert seen == [False, True, False, True, False, True, False, True, True]


@stubbed
def test_copied_scales_never_overlap(stub: Stub) -> None:
    """The copy is a kernel that has just been launched."""
    layer = Layer(100, 256)
    assert [layer.run(stub, layer.acts(1)).programmatic for _ in range(3)] == [False, False, False]


@stubbed
def test_any_thread_and_any_current_context_will_do(stub: Stub) -> None:
    stub.set(devices=2)
    layer = Layer(256, 512)
    a, seen = layer.acts(1), []

    def work() -> None:
        seen.append(layer.run(stub, a).device)
        seen.append(int(driver.call("cuCtxGetCurrent")))
        driver.call("cuCtxPushCurrent", other)
        seen.append(layer.run(stub, a).device)
        seen.append(int(driver.call("cuCtxGetCurrent")))

    other = driver.device(1).context
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0, 0, 0, int(other)]  # a new thread has no current context; what was current is current again


@stubbed
def test_misaligned_weights(stub: Stub) -> None:
    layer = Layer(256, 512)
    layer.b = torch.empty(layer.b.numel() + 1, dtype=torch.int32)[1:].view(layer.b.shape)
    with pytest.raises(machete.ArgumentError, match="16-byte boundary"):
        layer.run(stub, layer.acts(1))


@stubbed
def test_the_chosen_schedule_is_launched(stub: Stub) -> None:
    layer = Layer(256, 512)
    problem = check_gemm(layer.acts(1), layer.b, machete.u4b8, layer.scales, None, 128, None, None)
    for _ in range(2):
        out = torch.empty(1, 256).bfloat16()
        run_kernel(BUNDLE, BF16, problem, layer.b, machete.u4b8, out, None, None, 0, STREAM)
    chosen = product.selection.select(BUNDLE.manifest, BF16.name, 1, 256, 512, H100)
    assert {launch.symbol for launch in stub.launches} == {f"machete_bf16_u4b8__{chosen.tile}"}


@stubbed
def test_the_workspace_lives_until_the_launch(stub: Stub) -> None:
    layer, made, alive = Layer(256, 512), [], []
    plain_empty, plain_call = torch.empty, driver.call

    def empty(*size: int, **options: Any) -> torch.Tensor:
        found = plain_empty(*size, **options)
        if options.get("dtype") == torch.uint8:
            made.append((weakref.ref(found), found.data_ptr(), found.numel()))
        return found

    def call(name: str, *arguments: Any) -> Any:
        if name == "cuLaunchKernelEx":
            alive.append([reference() is not None for reference, _, _ in made])
        return plain_call(name, *arguments)

    torch.empty, driver.call = empty, call  # in this test's own process
    layer.run(stub, layer.acts(300), name=schedule(FLAT))
    assert (made, alive) == ([], [[]])
    launch = layer.run(stub, layer.acts(300), name=schedule(FLAT, 0, 1))
    ((reference, address, size),) = made
    assert launch.params["workspace"] == address
    assert address % 16 == 0
    assert (launch.grid, size) == ((16, 1, 1), FLAT.workspace(16))  # four tiles of four steps
    assert alive[1] == [True]
    assert reference() is None  # and no longer


@stubbed
def test_warmup(stub: Stub) -> None:
    product._current_stream = lambda index: STREAM  # torch for the CPU has no streams
    loaded = machete.warmup(torch.bfloat16, machete.u4b8, device=0, schedules=[schedule(WIDE, 2), schedule(WIDE)])
    assert loaded == [f"bf16_u4b8__{WIDE.name}"]
    assert stub.calls("cuLibraryLoadData") == 1
    assert len(machete.warmup(torch.float16, machete.u4b8, device="cuda:0")) == 3  # kernels, not schedules
    assert stub.calls("cuLibraryLoadData") == 4
    (one,) = machete.warmup(torch.float16, machete.u4b8, shapes=[(1, 256, 512)] * 3, device=0)
    assert one.startswith("fp16_u4b8__")
    assert stub.calls("cuLibraryLoadData") == 4
    assert machete.warmup(torch.bfloat16, machete.u4b8, shapes=[], device=0) == []
    stub.set(capturing=1)
    with pytest.raises(machete.CaptureError):
        machete.warmup(torch.bfloat16, machete.u4b8, device=0, schedules=[schedule(FLAT)])
    with pytest.raises(machete.ArgumentError, match="no schedule"):
        machete.warmup(torch.bfloat16, machete.u4b8, device=0, schedules=["nonsense"])
    machete.use_bundle(SYMMETRIC)
    with pytest.raises(machete.UnsupportedError, match="no kernels for bf16 x u8b128"):
        machete.warmup(torch.bfloat16, machete.u8b128, device=0)
    with pytest.raises(machete.ArgumentError, match="cpu"):
        machete.warmup(torch.bfloat16, machete.u4b8, device="cpu")


@stubbed
def test_warmup_loads_what_the_product_will_need(stub: Stub) -> None:
    product._current_stream = lambda index: STREAM

    def loaded(b_type: machete.ScalarType, k: int, **options: Any) -> set[str]:
        names = machete.warmup(torch.bfloat16, b_type, shapes=[(1, 256, k)], device=0, **options)
        return {name.split("__")[0] for name in names}

    assert loaded(machete.u4b8, 512) == {"bf16_u4b8"}
    assert loaded(machete.u4b8, 512, b_group_size=96) == {"bf16_u4_float_fine"}
    assert loaded(machete.u4b8, 64, b_group_size=96) == {"bf16_u4b8"}  # one group
    assert loaded(machete.u4, 512, with_zeros="int") == {"bf16_u4_int"}
    assert loaded(machete.u8, 512, with_zeros=True) == loaded(machete.u8b128, 512) == {"bf16_u8_float"}
    assert loaded(machete.u4b8, 512, batch_invariant=True) == {"bf16_u4b8"}
    assert loaded(machete.u8, 512, batch_invariant=True, with_zeros="int") == {"bf16_u8_int"}


def test_supported_schedules() -> None:
    names, general = [s.name for s in SCHEDULES], [schedule(NARROW, split) for split in (1, 4)]
    for group in (-1, None, 64, 128, 256):
        assert machete.supported_schedules(torch.bfloat16, machete.u4b8, group) == names
    assert machete.supported_schedules(torch.float16, machete.u4b8) == names
    assert machete.supported_schedules(torch.bfloat16, machete.u4b8, 32) == general
    for b_type in (machete.u4, machete.u8):
        for with_zeros in (False, True, "float", "int"):
            assert machete.supported_schedules(torch.bfloat16, b_type, 128, with_zeros) == general
    assert machete.supported_schedules(torch.float16, machete.u8b128, 96) == general
    for with_zeros in (True, "float", "int"):
        assert machete.supported_schedules(torch.bfloat16, machete.u4b8, 128, with_zeros=with_zeros) == []
    for group in (0, -2, 33):
        assert machete.supported_schedules(torch.bfloat16, machete.u4b8, group) == []
    machete.use_bundle(SYMMETRIC)
    assert machete.supported_schedules(torch.bfloat16, machete.u4b8, 32) == []
    assert machete.supported_schedules(torch.bfloat16, machete.u8b128) == []
    with pytest.raises(machete.ArgumentError, match=r"float32"):
        machete.supported_schedules(torch.float32, machete.u4b8)
    with pytest.raises(machete.ArgumentError, match="ScalarType"):
        machete.supported_schedules(torch.float16, "u4b8")  # type: ignore[arg-type]
    with pytest.raises(machete.ArgumentError, match="with_zeros"):
        machete.supported_schedules(torch.float16, machete.u4, 128, "maybe")


# (activations, weights, zeros, fine groups) -> the kernels' types, best first
@pytest.mark.parametrize(
    ("b", "zeros", "fine", "bf16", "fp16"),
    [
        ("u4b8", "none", False, "u4b8 u4_float", "u4b8 u4_any"),
        ("u4b8", "none", True, "u4_float_fine", "u4_any_fine"),
        ("u4b8", "float", False, "", ""),
        ("u4b8", "float", True, "", ""),
        ("u4b8", "int", False, "", ""),
        ("u4b8", "int", True, "", ""),
        ("u8b128", "none", False, "u8_float", "u8_any"),
        ("u8b128", "none", True, "u8_float_fine", "u8_any_fine"),
        ("u8b128", "float", False, "", ""),
        ("u8b128", "float", True, "", ""),
        ("u8b128", "int", False, "", ""),
        ("u8b128", "int", True, "", ""),
        ("u4", "none", False, "u4_float", "u4_any"),
        ("u4", "none", True, "u4_float_fine", "u4_any_fine"),
        ("u4", "float", False, "u4_float", "u4_any"),
        ("u4", "float", True, "u4_float_fine", "u4_any_fine"),
        ("u4", "int", False, "u4_int", "u4_any"),
        ("u4", "int", True, "u4_int_fine", "u4_any_fine"),
        ("u8", "none", False, "u8_float", "u8_any"),
        ("u8", "none", True, "u8_float_fine", "u8_any_fine"),
        ("u8", "float", False, "u8_float", "u8_any"),
        ("u8", "float", True, "u8_float_fine", "u8_any_fine"),
        ("u8", "int", False, "u8_int", "u8_any"),
        ("u8", "int", True, "u8_int_fine", "u8_any_fine"),
    ],
)
def test_which_kernels_serve_a_product(b: str, zeros: str, fine: bool, bf16: str, fp16: str) -> None:
    for a, wanted in (("bf16", bf16), ("fp16", fp16)):
        asked = ProductTypes(a, b, zeros, fine)
        assert asked in PRODUCTS
        names = [f"{a}_{name}" for name in wanted.split()]
        assert [t.name for t in asked.kernel_types()] == names
        assert all((t.scale, t.weight_bits, t.general) == (a, int(b[1]), t.b != "u4b8") for t in asked.kernel_types())
        assert all(t.fine == fine for t in asked.kernel_types())
        best = BUNDLE.manifest.types_for(asked)
        assert (best and best.name) == (names[0] if names else None)
        only = SYMMETRIC.manifest.types_for(asked)
        assert (only and only.name) == (names[0] if names and names[0].endswith("u4b8") else None)


def test_every_product_is_in_the_table_above() -> None:
    assert len(PRODUCTS) == len(set(PRODUCTS)) == 2 * 24


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (ProductTypes("bf16", "u4", "int", False), "no kernels for bf16 x u4 with integer zeros; it has"),
        (ProductTypes("fp16", "u8b128", "none", False), "no kernels for fp16 x u8b128; it has"),
        (ProductTypes("bf16", "u4b8", "none", True), "bf16 x u4b8, groups of a size that is no multiple of 64; it has"),
    ],
)
def test_a_missing_combination_lists_what_there_is(wanted: ProductTypes, text: str) -> None:
    with pytest.raises(machete.UnsupportedError) as caught:
        kernel_types(SYMMETRIC, wanted)
    message = str(caught.value)
    assert text in message and "sm90a" in message and "reference.gemm" in message
    for types in (BF16, FP16):
        held = f"{types.name} for {types.a} x u4b8 (groups: multiples of 64, or one)"
        assert message.count(held) == 1


def test_general_kernels_are_listed_with_all_that_they_serve() -> None:
    with pytest.raises(machete.UnsupportedError) as caught:
        kernel_types(BUNDLE, ProductTypes("bf16", "u4b8", "float", False))
    message = str(caught.value)
    assert "no multiple of 64" not in message
    for held in (
        "bf16_u4_float for bf16 x u4, bf16 x u4 with floating zeros (groups: multiples of 64, or one)",
        "bf16_u4_int for bf16 x u4 with integer zeros (groups: multiples of 64, or one)",
        "fp16_u8_any for fp16 x u8b128, fp16 x u8, fp16 x u8 with floating zeros, fp16 x u8 with integer zeros (",
        "bf16_u4_float_fine for bf16 x u4b8, bf16 x u4, bf16 x u4 with floating zeros (groups: other multiples of 32)",
        "bf16_u8_int_fine for bf16 x u8 with integer zeros (groups: other multiples of 32)",
        "fp16_u8_any_fine for fp16 x u8b128, fp16 x u8, fp16 x u8 with floating zeros, fp16 x u8 with integer zeros (",
    ):
        assert held in message


def test_a_type_of_the_caller_s_own_has_no_kernels() -> None:
    for own in (machete.ScalarType("u4b7", 4, 7), machete.ScalarType("u4b8", 4, 7)):
        with pytest.raises(machete.UnsupportedError, match="u4b8, u8b128, u4, u8 alone"):
            machete.supported_schedules(torch.bfloat16, own)


@stubbed
def test_zeros_and_codes_of_zero(stub: Stub) -> None:
    u4 = Layer(256, 512, b_type=machete.u4)
    a, zeros = u4.acts(2), torch.rand(4, 256).bfloat16()
    launch = u4.run(stub, a, zeros=zeros)
    assert launch.symbol == f"machete_bf16_u4_float__{NARROW.name}"
    assert launch.shared_memory == OVER_HALF > NARROW.shared_memory(1, GENERAL[0]) > NARROW.shared_memory(1, BF16)
    params = launch.params
    assert (params["zeros"], params["zero_stride"], params["code_zero"]) == (zeros.data_ptr(), 256, 0)
    assert not params["flags"] & abi.FLAG_INTEGER_ZEROS
    mapped = launch.tensor_maps[2]
    assert mapped and (mapped.address, mapped.dims) == (zeros.data_ptr(), (256, 4))
    integers = torch.randint(0, 16, (4, 256), dtype=torch.uint8)
    launch = u4.run(stub, a, zeros=integers)
    assert launch.symbol == f"machete_bf16_u4_int__{NARROW.name}"
    params = launch.params
    assert (params["zeros"], params["zero_stride"]) == (integers.data_ptr(), 256)
    assert params["flags"] & abi.FLAG_INTEGER_ZEROS
    mapped = launch.tensor_maps[2]
    assert mapped and (mapped.address, mapped.dims) == (integers.data_ptr(), (128, 4))  # of pairs
    assert (params["channel_scales"], params["token_scales"]) == (0, 0)
    for b_type, symbol, code_zero in (
        (machete.u4, "u4_float", 0),
        (machete.u8, "u8_float", 0),
        (machete.u8b128, "u8_float", 128),
        (machete.u4b8, "u4b8", 8),
    ):
        launch = Layer(256, 512, b_type=b_type).run(stub, a)
        assert launch.symbol == f"machete_bf16_{symbol}__{NARROW.name}"
        params = launch.params
        assert (params["zeros"], params["zero_stride"], params["code_zero"]) == (0, 0, code_zero)
    half = Layer(256, 512, dtype=torch.float16, b_type=machete.u8)
    for kind in (torch.rand(4, 256).half(), integers):
        launch = half.run(stub, half.acts(2), zeros=kind)
        assert launch.symbol == f"machete_fp16_u8_any__{NARROW.name}"
        flags = launch.params["flags"]
        assert bool(flags & abi.FLAG_INTEGER_ZEROS) == (kind is integers)


@stubbed
def test_fine_groups_go_to_kernels_of_their_own(stub: Stub) -> None:
    for group, k, symbol, blocks in (
        (128, 512, "u4b8", 4),
        (96, 512, "u4_float_fine", 3),
        (32, 512, "u4_float_fine", 1),
        (96, 96, "u4b8", abi.ONE_GROUP),
        (96, 90, "u4b8", abi.ONE_GROUP),
    ):
        launch = Layer(256, k, group).run(stub, torch.randn(1, k).bfloat16())
        assert launch.symbol == f"machete_bf16_{symbol}__{NARROW.name}"
        params = launch.params
        assert (params["group_blocks"], params["code_zero"]) == (blocks, 8)
        needed = NARROW.shared_memory(1, GENERAL[6] if symbol.endswith("_fine") else BF16)
        assert launch.shared_memory == max(needed, OVER_HALF)
    assert GENERAL[6].name == "bf16_u4_float_fine" and NARROW.shared_memory(1, GENERAL[6]) > OVER_HALF


@pytest.mark.parametrize("kind", ["float", "uint8", "int32"])
@stubbed
def test_misaligned_zeros_are_copied_in_whole_pieces(stub: Stub, kind: str) -> None:
    """Integer zeros are bytes: 16 of them are a piece, where 8 scales are."""
    layer = Layer(104, 512, b_type=machete.u4)
    a = layer.acts(1)
    zeros = (
        torch.rand(4, 104).bfloat16() if kind == "float" else torch.randint(0, 16, (4, 104)).to(getattr(torch, kind))
    )
    launch = layer.run(stub, a, zeros=zeros)
    params, mapped = launch.params, launch.tensor_maps[2]
    assert mapped and (mapped.address, mapped.strides) == (params["zeros"], (208 if kind == "float" else 112,))
    assert params["scale_stride"] == 104  # whole pieces already
    assert params["zero_stride"] == (104 if kind == "float" else 112)
    assert (params["zeros"] == zeros.data_ptr()) == (kind == "float")
    assert params["zeros"] % 16 == 0


@stubbed
def test_zeros_and_channel_scales_are_constants_and_token_scales_are_not(stub: Stub) -> None:
    layer = Layer(256, 512, b_type=machete.u4)
    a, zeros = layer.acts(3), torch.rand(4, 256).bfloat16()
    channel, token = torch.rand(256), torch.rand(3)
    seen = []
    for write in (None, None, zeros, None, channel, None, token, a, None):
        if write is not None:
            write.add_(1)
        seen.append(layer.run(stub, a, zeros=zeros, channel_scales=channel, token_scales=token).programmatic)
    assert seen == [False, True, False, True, False, True, True, True, True]


BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, 0),
        ({"out_dtype": BF}, 0),
        ({"out_dtype": FULL}, abi.FLAG_OUT_FP32),
        ({"out_dtype": HALF}, abi.FLAG_OUT_FP16),
        ({"channel": True}, abi.FLAG_OUT_BF16),
        ({"token": True}, abi.FLAG_OUT_BF16),
        ({"token": True, "channel": True, "out_dtype": FULL}, abi.FLAG_OUT_FP32),
        ({"activation": "swiglu"}, abi.FLAG_OUT_BF16 | abi.FLAG_SWIGLU),
        ({"activation": "swiglu", "out_dtype": HALF, "channel": True}, abi.FLAG_OUT_FP16 | abi.FLAG_SWIGLU),
        ({"activation": "swiglu", "out_dtype": FULL}, abi.FLAG_OUT_FP32 | abi.FLAG_SWIGLU),
    ],
)
@stubbed
def test_flags_of_the_epilogue(stub: Stub, options: dict[str, Any], flags: int) -> None:
    layer, options = Layer(256, 512), dict(options)
    channel = torch.rand(256) if options.pop("channel", False) else None
    token = torch.rand(8) if options.pop("token", False) else None
    params = layer.params(stub, layer.acts(8), channel_scales=channel, token_scales=token, **options)
    assert params["channel_scales"] == (0 if channel is None else channel.data_ptr())
    assert params["token_scales"] == (0 if token is None else token.data_ptr())
    pairs = 0 if flags & abi.FLAG_OUT_FP32 else abi.FLAG_STORE_PAIRS
    assert params["flags"] == flags | pairs | abi.FLAG_SCALE_MAPS | abi.FLAG_ONE_PER_SM
    assert params["out_stride"] == (128 if "activation" in options else 256)
    assert params["n"] == 256


@stubbed
def test_pairs_are_those_of_the_output_s_columns(stub: Stub) -> None:
    layer = Layer(48, 128)
    for stride, aligned in ((24, True), (26, True), (25, False)):
        out = torch.empty(3, stride).bfloat16()[:, :24]
        params = layer.params(stub, layer.acts(3), activation="swiglu", out=out)
        assert bool(params["flags"] & abi.FLAG_STORE_PAIRS) == aligned
        assert params["out_stride"] == stride


def test_explain_follows_the_types() -> None:
    def types(**options: Any) -> str:
        return machete.explain(4, 256, 512, torch.bfloat16, **options).types

    assert types(b_type=machete.u4b8) == "bf16_u4b8"
    assert types(b_type=machete.u4b8, b_group_size=96) == "bf16_u4_float_fine"
    assert types(b_type=machete.u4b8, b_group_size=512) == types(b_type=machete.u4b8, b_group_size=None) == "bf16_u4b8"
    assert types(b_type=machete.u8, with_zeros="int") == "bf16_u8_int"
    found = machete.explain(4, 256, 512, torch.bfloat16, machete.u8, batch_invariant=True)
    assert "bf16_u8_float was not measured, coefficients of bf16_u4b8 stand in for its own" in found.text()
    with pytest.raises(machete.ArgumentError, match="multiple of 32"):
        types(b_type=machete.u4b8, b_group_size=48)
    with pytest.raises(machete.UnsupportedError, match="no kernels for bf16 x u4b8 with floating zeros"):
        types(b_type=machete.u4b8, with_zeros=True)


def test_what_is_no_tensor_is_an_argument_error() -> None:
    layer = Layer(96, 128)
    with pytest.raises(machete.ArgumentError, match=r"a must be a torch\.Tensor"):
        machete.gemm([1.0], layer.b, machete.u4b8, layer.scales)  # type: ignore[arg-type]


@pytest.mark.parametrize("b_type", [machete.u4b8, machete.u8b128, machete.u4, machete.u8])
def test_the_cpu_runs_the_reference(b_type: machete.ScalarType) -> None:
    k, n = 192, 96
    codes = random_codes(k, n, b_type.bits, seed=3)
    b = machete.prepack_b(gptq(codes, b_type.bits), b_type)
    scales, a = torch.rand(2, n).bfloat16() / 16, torch.randn(2, 3, k).bfloat16()
    weights = (torch.from_numpy(codes).to(torch.bfloat16) - b_type.bias) * scales.repeat_interleave(128, 0)[:k]
    expected = (a.double() @ weights.double()).bfloat16()
    out = torch.empty(2, 3, n).bfloat16()
    found = machete.gemm(a, b, b_type, scales, out=out)
    assert found is out
    assert found.shape == (2, 3, n)
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < 1e-3
    assert torch.equal(machete.gemm(a, b, b_type, scales), found)


def test_no_rows_on_the_cpu() -> None:
    layer = Layer(96, 128)
    assert machete.gemm(torch.empty(4, 0, 128).bfloat16(), layer.b, machete.u4b8, layer.scales).shape == (4, 0, 96)
