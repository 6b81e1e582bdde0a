# SPDX-License-Identifier: Apache-2.0
"""``permute_columns`` without a GPU: its arguments, the operator, the plan, and what the driver is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import machete_aot as machete
from machete_aot import driver, overlap, permute_abi, permute_plan, qualify_permute, record
from machete_aot.bundle import open_bundle
from machete_aot.config import SHARED_PER_SM, SHARED_RESERVED
from machete_aot.permute import load_permute, permute_on
from machete_aot.permute_plan import make_plan
from small_bundle import small_bundle
from stub.bundles import make_bundle
from stub.harness import CARVEOUT, MAX_DYNAMIC_SHARED, Stub, stubbed

OP = torch.ops.machete_aot.permute_columns
OP_OUT = torch.ops.machete_aot.permute_columns_out
BF16, FP16 = torch.bfloat16, torch.float16
STREAM = 0x5EED0
SYMBOL = f"machete_{permute_abi.HELPER_ID}"
THREADS, SMS, SHARED = 1024, 132, 227 * 1024


@pytest.fixture(autouse=True)
def _bundle() -> Iterator[None]:
    machete.use_bundle(make_bundle())
    yield
    machete.use_bundle(None)


def matrix(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def order(k: int) -> torch.Tensor:
    return torch.randperm(k).to(torch.int32)


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(8,), (1, 100), (5, 64), (2, 3, 7), (0, 16), (3, 0), (2, 0, 4)], ids=str)
def test_it_is_a_gather(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, columns = matrix(*shape, dtype=dtype), order(shape[-1])
    expected = a.index_select(-1, columns)
    found = machete.permute_columns(a, columns)
    assert torch.equal(found, expected) and found.is_contiguous()
    out = torch.empty_like(a)
    assert machete.permute_columns(a, columns, out) is out and torch.equal(out, expected)
    assert torch.equal(OP(a, columns), expected)
    out = torch.empty_like(a)
    OP_OUT(out, a, columns)
    assert torch.equal(out, expected)


def test_operands_of_any_strides() -> None:
    a, columns = matrix(64, 6).t(), order(128)[::2] // 2
    out = torch.empty(6, 80, dtype=BF16)[:, 3:67]
    assert torch.equal(machete.permute_columns(a, columns, out), a.index_select(-1, columns))
    wide = matrix(4, 100)[::2, 1:65]
    assert torch.equal(machete.permute_columns(wide, columns), wide.index_select(-1, columns))


K = 16
A, ORDER = matrix(3, K), order(K)
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "no tensor": (([1.0], ORDER), "a must be a torch.Tensor, got list"),
    "no order": ((A, [0]), "order must be a torch.Tensor, got list"),
    "no out": ((A, ORDER, "out"), "out must be a torch.Tensor, got str"),
    "dtype": ((A.float(), ORDER), "a must be bfloat16 or float16, got torch.float32"),
    "scalar": ((A[0, 0], ORDER), "a must be .* got a scalar"),
    "long": ((A, ORDER.long()), "order must be torch.int32, got torch.int64"),
    "too short": ((A, ORDER[1:]), r"order must have a column .*, \(16,\), got shape \(15,\)"),
    "matrix": ((A, ORDER[None]), r"got shape \(1, 16\)"),
    "device": ((A, ORDER.to("meta")), "order is on meta but a is on cpu"),
    "out's dtype": ((A, ORDER, A.half()), "out must have the dtype of a"),
    "out's shape": ((A, ORDER, A[:2]), r"out must have the shape of a, \(3, 16\), got shape \(2, 16\)"),
    "out's rows": ((A, ORDER, matrix(K, 3).t()), "out must be viewable as a matrix"),
    "in place": ((A, ORDER, A), "out shares memory with a"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(machete.ArgumentError, match=message):
        machete.permute_columns(*arguments)


def test_no_gradients() -> None:
    a = A.clone().requires_grad_()
    assert not machete.permute_columns(a, ORDER).requires_grad
    with pytest.raises(machete.UnsupportedError, match=r"no gradients.*torch\.no_grad"):
        OP(a, ORDER).sum().backward()


# ---------------------------------------------------------------- the operator


@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (0, K), (K,)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(OP, (matrix(*shape), ORDER))
    torch.library.opcheck(OP_OUT, (matrix(*shape), matrix(*shape), ORDER))


def test_fake_results_are_as_the_real_ones() -> None:
    reals, wrongs, half = (A, matrix(2, 3, K), matrix(K, 3).t()), (A.float(), A[:, 1:]), A.half()
    with FakeTensorMode() as mode:
        for a in reals:
            for call in (OP, machete.permute_columns):
                fake = call(mode.from_tensor(a), mode.from_tensor(ORDER))
                assert (fake.shape, fake.dtype) == (a.shape, a.dtype) and fake.is_contiguous()
        out = mode.from_tensor(A)
        assert machete.permute_columns(mode.from_tensor(A), mode.from_tensor(ORDER), out) is out
        for wrong in wrongs:
            with pytest.raises(machete.ArgumentError):
                OP(mode.from_tensor(wrong), mode.from_tensor(ORDER))
        with pytest.raises(machete.ArgumentError, match=r"out must be torch\.bfloat16"):
            OP_OUT(mode.from_tensor(half), mode.from_tensor(A), mode.from_tensor(ORDER))


def test_compiled_with_any_number_of_rows() -> None:
    torch._dynamo.reset()

    def run(a: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return machete.permute_columns(a * 2, ORDER, out) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (2, 3, 17):
        a = matrix(m, K)
        assert torch.equal(compiled(a, None), run(a, None))
        out = torch.empty_like(a)
        assert torch.equal(compiled(a, out), run(a, None)) and torch.equal(out + 1, run(a, None))


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("m", [1, 2, 3, 16, 64, 131, 133, 1000, 4096, 100_000])
@pytest.mark.parametrize("k", [1, 7, 8, 100, 4096, 8200, 14336, 28672, 116_225, 300_000])
def test_every_element_has_one_place(m: int, k: int) -> None:
    """By the kernel's own arithmetic: the columns of each CTA and thread, and the rows that the CTAs go through."""
    for sms in (SMS, 78, 1):
        plan = make_plan(m, k, sms, THREADS, SHARED)
        (x, y, z), (block, *rest) = plan.grid, plan.block
        assert (z, *rest) == (1, 1, 1) and y <= permute_plan.MAX_GRID_Y and 0 < x < 2**31
        assert block % 32 == 0 and plan.pieces <= block <= THREADS
        total = -(-k // permute_abi.PIECE)
        assert (x - 1) * plan.pieces < total <= x * plan.pieces  # no CTA without columns
        step = max(plan.stage_rows, 1)
        rows = [row for cta in range(y) for row in range(cta * step, m, y * step)]
        assert len(rows) == -(-m // step) == len(set(rows)) and y <= len(rows)
        row_bytes = -(-2 * k // 16) * 16
        assert plan.shared_memory == plan.stage_rows * row_bytes <= SHARED
        if plan.stage_rows > 1:
            assert plan.shared_memory <= permute_plan.STAGED_BYTES


def test_few_elements_are_not_copied_first() -> None:
    for m, k in ((1, 4096), (1, 14336), (1, 28672), (4, 28672), (16, 4096), (1, 300_000), (64, 300_000)):
        assert make_plan(m, k, SMS, THREADS, SHARED).stage_rows == 0
    for m, k in ((16, 14336), (64, 4096), (1024, 4096), (16, 28672)):
        assert make_plan(m, k, SMS, THREADS, SHARED).stage_rows > 0


def test_many_rows_fill_the_device_evenly() -> None:
    for m, k in itertools.product((64, 256, 1024, 4096), (4096, 14336, 28672)):
        plan = make_plan(m, k, SMS, THREADS, SHARED)
        ctas = plan.grid[0] * plan.grid[1]
        assert 0.9 * SMS < ctas <= 2 * SMS, (m, k, plan)
        resident = SHARED_PER_SM // (plan.shared_memory + SHARED_RESERVED)
        assert resident >= 2


def test_limits() -> None:
    for m, k in ((2**31, 8), (1, 2**30)):
        with pytest.raises(machete.ArgumentError, match="split the matrix"):
            make_plan(m, k, SMS, THREADS, SHARED)


# ---------------------------------------------------------------- the launch


@stubbed
def test_what_is_launched(stub: Stub) -> None:
    a, columns, out = matrix(20, 8200)[::2, 3:8195], order(8192), torch.empty(10, 8200, dtype=BF16)[:, 1:8193]
    for m in (1, 10):
        result = permute_on(0, STREAM, a[:m], columns, out[:m])
        assert result.data_ptr() == out.data_ptr()
        launch = stub.launches[-1]
        plan = make_plan(m, 8192, SMS, THREADS, SHARED)
        assert (launch.symbol, launch.grid, launch.block) == (SYMBOL, plan.grid, plan.block)
        assert (launch.cluster, launch.shared_memory) == ((1, 1, 1), plan.shared_memory)
        assert (launch.device, launch.stream) == (0, STREAM)
        assert permute_abi.unpack_params(launch.parameters) == {
            "a": a.data_ptr(), "order": columns.data_ptr(), "out": out.data_ptr(), "a_stride": 2 * 8200,
            "out_stride": 8200, "rows": m, "columns": 8192, "pieces": plan.pieces, "stage_rows": plan.stage_rows,
        }  # fmt: skip
    assert stub.kernel_attribute(SYMBOL, 0, MAX_DYNAMIC_SHARED) == 227 * 1024
    assert stub.kernel_attribute(SYMBOL, 0, CARVEOUT) == 100
    assert stub.calls("cuLibraryLoadData") == 1


@stubbed
def test_its_own_output_and_operands_that_are_copied(stub: Stub) -> None:
    a, columns = matrix(64, 6).t(), order(128)[::2]
    found = permute_on(0, STREAM, a, columns)
    assert found.shape == (6, 64) and found.is_contiguous() and found.dtype == BF16
    values = permute_abi.unpack_params(stub.launches[0].parameters)
    assert (values["rows"], values["columns"], values["a_stride"], values["out_stride"]) == (6, 64, 64, 64)
    assert values["out"] == found.data_ptr() and values["a"] != a.data_ptr() and values["order"] != columns.data_ptr()
    batch = permute_on(0, STREAM, matrix(2, 3, 8), order(8))
    assert batch.shape == (2, 3, 8) and permute_abi.unpack_params(stub.launches[1].parameters)["rows"] == 6
    assert permute_on(0, STREAM, matrix(8), order(8)).shape == (8,)


@stubbed
def test_nothing_is_launched_for_nothing(stub: Stub) -> None:
    for shape in ((0, 8), (3, 0), (2, 0, 4)):
        assert permute_on(0, STREAM, matrix(*shape), order(shape[-1])).shape == shape
    assert stub.launches == [] and stub.calls("cuLibraryLoadData") == 0


@stubbed
def test_the_order_is_read_early_once_a_launch_has_waited_for_it(stub: Stub) -> None:
    a, columns = matrix(2, 64), order(64)

    def early() -> bool:
        permute_on(0, STREAM, a, columns)
        return stub.launches[-1].programmatic

    assert [early(), early(), early()] == [False, True, True]
    columns.add_(0)  # written: by a kernel that may still run
    assert [early(), early()] == [False, True]
    overlap.set_overlap(False)
    assert not early()
    overlap.set_overlap(True)
    assert early()
    for wish in (False, True):
        permute_on(0, STREAM, a, columns, overlap_wish=wish)
        assert stub.launches[-1].programmatic is wish
    fresh = order(64)
    stub.set(capturing=1)
    columns = fresh
    assert [early(), early()] == [False, False]  # a captured launch does not run


@stubbed
def test_it_works_inside_a_capture_when_it_is_loaded(stub: Stub) -> None:
    stub.set(capturing=1)
    with pytest.raises(machete.CaptureError, match=permute_abi.HELPER_ID):
        permute_on(0, STREAM, A, ORDER)
    stub.set(capturing=0)
    load_permute(0, STREAM)
    stub.set(capturing=1)
    permute_on(0, STREAM, A, ORDER)
    assert len(stub.launches) == 1


@stubbed
def test_devices_and_sizes_of_devices(stub: Stub) -> None:
    stub.set(devices=2, sms=78)
    for index in (1, 0):
        permute_on(index, STREAM, matrix(300, 4096), order(4096))
    assert [launch.device for launch in stub.launches] == [1, 0]
    assert {launch.grid for launch in stub.launches} == {make_plan(300, 4096, 78, THREADS, SHARED).grid}


@stubbed
def test_threads_do_not_mix_their_parameters(stub: Stub) -> None:
    """Nor do they need a context, or leave one behind."""
    operands = [(matrix(m, 64), order(64), torch.empty(m, 64, dtype=BF16)) for m in range(1, 9)]

    def work(a: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
        for _ in range(30):
            permute_on(0, STREAM, a, columns, out)
        assert int(driver.call("cuCtxGetCurrent")) == 0

    with ThreadPoolExecutor(len(operands)) as pool:
        for future in [pool.submit(work, *given) for given in operands]:
            future.result()
    launched = [permute_abi.unpack_params(launch.parameters) for launch in stub.launches]
    for a, columns, out in operands:
        mine = [found for found in launched if found["a"] == a.data_ptr()]
        assert len(mine) == 30
        for found in mine:
            assert (found["order"], found["out"]) == (columns.data_ptr(), out.data_ptr())
            assert found["rows"] == a.shape[0]


@stubbed
def test_bundles_that_cannot_do_it(stub: Stub) -> None:
    data, _, digest = small_bundle()
    machete.use_bundle(open_bundle(data, manifest_sha256=digest))
    with pytest.raises(machete.MissingError, match=f"no kernel '{permute_abi.HELPER_ID}'"):
        permute_on(0, STREAM, A, ORDER)
    machete.use_bundle(make_bundle(cubin=f"stub-cubin\n{SYMBOL} 0:8 8:8\n\0".encode()))
    with pytest.raises(machete.IncompatibleError, match="takes parameters"):
        permute_on(0, STREAM, A, ORDER)
    assert stub.launches == []


# ---------------------------------------------------------------- its qualification


def test_cases_cover_both_ways_and_all_alignments() -> None:
    cases = list(qualify_permute.cases())
    assert len(cases) == len(set(cases)) == 64 >= record.MIN_HELPER_CASES
    ways = {(make_plan(c.m, c.k, SMS, THREADS, SHARED).stage_rows > 0, c.aligned, c.dtype) for c in cases}
    assert len(ways) == 8
    assert any(make_plan(c.m, c.k, SMS, THREADS, SHARED).stage_rows > 1 for c in cases)


SMALL = [qualify_permute.Case(3, 100, "bf16", True), qualify_permute.Case(2, 64, "fp16", False)]


def qualified(monkeypatch: pytest.MonkeyPatch, damage: Any) -> record.HelperResult:
    def damaged(a: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
        machete.permute_columns(a, order, out)
        damage(out)

    monkeypatch.setattr(qualify_permute, "cases", lambda: SMALL)
    monkeypatch.setattr(qualify_permute, "permute_columns", damaged)
    return qualify_permute.qualify_permute(3, "cpu")


def test_a_right_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert qualified(monkeypatch, lambda out: None) == record.HelperResult(2, (), True, True, ())


def test_wrong_and_unwritten_elements_show(monkeypatch: pytest.MonkeyPatch) -> None:
    flip = lambda out: out.view(torch.int16)[1, 9].bitwise_xor_(1)  # noqa: E731
    leave = lambda out: out.view(torch.int16)[-1, -1].fill_(qualify_permute.POISON)  # noqa: E731
    for damage in (flip, leave):
        found = qualified(monkeypatch, damage)
        assert found.wrong == tuple(map(str, SMALL)) and found.deterministic and found.guards_intact


@pytest.mark.parametrize(("row", "column"), [(0, -1), (-1, 0), (1, -2), (3, 5)])
def test_a_store_beside_the_output_shows(monkeypatch: pytest.MonkeyPatch, row: int, column: int) -> None:
    def store(out: torch.Tensor) -> None:
        out.as_strided((1,), (1,), out.storage_offset() + row * out.stride(0) + column).zero_()

    assert not qualified(monkeypatch, store).guards_intact


def test_different_bits_and_errors_show(monkeypatch: pytest.MonkeyPatch) -> None:
    flips = itertools.count()
    found = qualified(monkeypatch, lambda out: out.view(torch.int16)[0, 0].bitwise_xor_(next(flips) % 2))
    assert not found.deterministic

    def fail(out: torch.Tensor) -> None:
        raise ValueError("no\nkernel")

    assert qualified(monkeypatch, fail).failures == tuple(f"{case}: ValueError: no kernel" for case in SMALL)
