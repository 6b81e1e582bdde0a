# SPDX-License-Identifier: Apache-2.0
"""The public calls: what they pass to the driver for tensors as they come, what they refuse, and the CPU's answer."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import machete_aot as machete
from machete_aot import abi, driver, product
from machete_aot.part import H100
from machete_aot.product import aligned_rows, row_stride, run_kernel
from machete_aot.validate import check_gemm
from quantised import gptq, random_codes
from stub.bundles import BF16, FLAT, NARROW, SCHEDULES, WIDE, make_bundle, schedule
from stub.harness import Launch, Stub, stubbed

STREAM = 0x5EED0
BUNDLE = make_bundle()


@pytest.fixture(autouse=True)
def _bundle() -> Iterator[None]:
    machete.use_bundle(BUNDLE)
    yield
    machete.use_bundle(None)


class Layer:
    """Weights and scales of a layer on the CPU; the stub driver takes any address."""

    def __init__(self, n: int, k: int, group: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
        self.n, self.k, self.group, self.dtype = n, k, group, dtype
        self.b = machete.prepack_b(gptq(random_codes(k, n, 4, seed=1), 4), machete.u4b8, dtype, k=k)
        self.scales = torch.rand(-(-k // group), n).to(dtype)

    def acts(self, m: int) -> torch.Tensor:
        return torch.randn(m, self.k).to(self.dtype)

    def run(self, stub: Stub, a: torch.Tensor, name: str | None = None, **options: torch.Tensor) -> Launch:
        """What ``gemm`` does on a GPU after its checks."""
        scales = options.pop("scales", self.scales)
        bias, out = options.get("bias"), options.get("out")
        problem = check_gemm(a, self.b, machete.u4b8, scales, None, self.group, bias, out)
        result = torch.empty(problem.m, problem.n, dtype=a.dtype) if problem.out2d is None else problem.out2d
        run_kernel(BUNDLE, BF16, problem, self.b, result, name or schedule(NARROW), None, 0, STREAM)
        launch = stub.launches[-1]
        params = abi.unpack_params(launch.parameters[128:])
        assert params["out"] == result.data_ptr()
        assert params["out_stride"] == (result.stride(0) if problem.m > 1 else problem.n)
        return launch


@stubbed
def test_contiguous_operands_are_passed_as_they_are(stub: Stub) -> None:
    layer, bias = Layer(256, 512), torch.randn(256).bfloat16()
    a = layer.acts(4)
    launch = layer.run(stub, a, bias=bias)
    assert (launch.tensor_map.address, launch.tensor_map.dims, launch.tensor_map.strides) == (
        a.data_ptr(), (64, 4, 8), (1024, 128)
    )  # fmt: skip
    params = abi.unpack_params(launch.parameters[128:])
    assert params["weights"] == layer.b.data_ptr()
    assert (params["scales"], params["scale_stride"]) == (layer.scales.data_ptr(), 256)
    assert params["bias"] == bias.data_ptr()


@stubbed
def test_row_strides_are_kept(stub: Stub) -> None:
    layer = Layer(256, 512)
    a, out = torch.randn(4, 520).bfloat16()[:, :512], torch.empty(4, 300).bfloat16()[:, 10:266]
    scales = torch.rand(4, 264).bfloat16()[:, :256]
    launch = layer.run(stub, a, out=out, scales=scales)
    assert (launch.tensor_map.address, launch.tensor_map.strides) == (a.data_ptr(), (1040, 128))
    params = abi.unpack_params(launch.parameters[128:])
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
    layer, a = Layer(256, 512), misaligned(4, 512)[kind]
    launch = layer.run(stub, a)
    memory = a.untyped_storage()
    assert launch.tensor_map.address not in range(memory.data_ptr(), memory.data_ptr() + memory.nbytes())
    assert (launch.tensor_map.dims, launch.tensor_map.strides) == ((64, 4, 8), (1024, 128))


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
    assert row_stride(torch.randn(1, 50)) == 56
    assert row_stride(torch.randn(3, 72)[:1, :50]) == 56  # the stride of a single row means nothing


@stubbed
def test_ragged_n_and_k(stub: Stub) -> None:
    layer = Layer(100, 200, group=64)
    launch = layer.run(stub, layer.acts(3))
    assert (launch.tensor_map.dims, launch.tensor_map.strides) == ((200, 3), (400,))
    params = abi.unpack_params(launch.parameters[128:])
    assert params["scale_stride"] == 104
    assert params["scales"] != layer.scales.data_ptr()
    assert params["group_units"] == 1
    assert params["flags"] == abi.FLAG_ACTS_2D


@stubbed
def test_one_row_takes_any_stride(stub: Stub) -> None:
    layer = Layer(256, 512)
    a = torch.randn(4, 515).bfloat16()[:1, :512]
    launch = layer.run(stub, a)
    assert (launch.tensor_map.address, launch.tensor_map.strides) == (a.data_ptr(), (1024, 128))


@stubbed
def test_batches_are_rows(stub: Stub) -> None:
    layer = Layer(256, 512)
    a = torch.randn(2, 3, 5, 512).bfloat16()
    launch = layer.run(stub, a, name=schedule(WIDE))
    assert launch.tensor_map.dims == (64, 30, 8)
    assert launch.tensor_map.address == a.data_ptr()


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
        run_kernel(BUNDLE, BF16, problem, layer.b, torch.empty(1, 256).bfloat16(), None, None, 0, STREAM)
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
    assert abi.unpack_params(launch.parameters[128:])["workspace"] == address
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
    with pytest.raises(machete.UnsupportedError, match="bf16_u8b128"):
        machete.warmup(torch.bfloat16, machete.u8b128, device=0)
    with pytest.raises(machete.ArgumentError, match="cpu"):
        machete.warmup(torch.bfloat16, machete.u4b8, device="cpu")


def test_supported_schedules() -> None:
    names = [s.name for s in SCHEDULES]
    for group in (-1, None, 64, 128, 256):
        assert machete.supported_schedules(torch.bfloat16, machete.u4b8, group) == names
    assert machete.supported_schedules(torch.float16, machete.u4b8) == names
    assert machete.supported_schedules(torch.bfloat16, machete.u4b8, 32) == []
    assert machete.supported_schedules(torch.bfloat16, machete.u4b8, 0) == []
    assert machete.supported_schedules(torch.bfloat16, machete.u4b8, 128, with_zeros=True) == []
    assert machete.supported_schedules(torch.bfloat16, machete.u8b128) == []
    with pytest.raises(machete.ArgumentError, match=r"float32"):
        machete.supported_schedules(torch.float32, machete.u4b8)
    with pytest.raises(machete.ArgumentError, match="ScalarType"):
        machete.supported_schedules(torch.float16, "u4b8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("types", "group", "groups", "zeros", "message"),
    [
        (BF16, 128, 4, True, "no kernels that take zero points"),
        (BF16, 96, 4, False, "multiples of 64, or one group, got 96"),
        (product._types(torch.bfloat16, machete.u8), 128, 4, False, "no kernels for bf16_u8"),
    ],
)
def test_what_the_gpu_refuses(types, group: int, groups: int, zeros: bool, message: str) -> None:
    with pytest.raises(machete.UnsupportedError, match=message) as caught:
        product._check_supported(BUNDLE, types, group, groups, zeros)
    assert "sm90a" in str(caught.value)
    assert re.search("bf16_u4b8, fp16_u4b8|multiples", str(caught.value))


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
