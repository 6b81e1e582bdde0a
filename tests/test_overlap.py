# SPDX-License-Identifier: Apache-2.0
"""When launches overlap earlier kernels: never the first on a version of the weights, nor where it is switched off."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import machete_aot
from machete_aot import overlap
from machete_aot.overlap import Constants, launch_after_writes, version
from stub.harness import Stub, stubbed

STREAM = 0x5EED0


@pytest.fixture(autouse=True)
def _default_setting() -> Iterator[None]:
    before = overlap.enabled()
    machete_aot.set_overlap(True)
    yield
    machete_aot.set_overlap(before)


def launched(*tensors: torch.Tensor, wish: bool | None = None) -> bool:
    seen: list[bool] = []
    launch_after_writes(tensors, wish, STREAM, seen.append)
    (found,) = seen
    return found


@stubbed
def test_first_launch_on_a_tensor_waits(stub: Stub) -> None:
    b, s = torch.zeros(8), torch.zeros(8)
    assert [launched(b, s) for _ in range(3)] == [False, True, True]
    other = torch.zeros(8)
    assert [launched(b, other) for _ in range(2)] == [False, True]
    assert launched(b, s)


@stubbed
def test_a_write_makes_the_next_launch_wait(stub: Stub) -> None:
    b, s = torch.zeros(8), torch.zeros(8)
    launched(b, s)
    assert launched(b, s)
    s.add_(1)
    assert [launched(b, s) for _ in range(2)] == [False, True]
    b[2:4].fill_(3)  # through a view
    assert [launched(b, s) for _ in range(2)] == [False, True]


@stubbed
def test_memory_that_is_exchanged_makes_the_next_launch_wait(stub: Stub) -> None:
    b = torch.nn.Parameter(torch.zeros(8))
    launched(b)
    assert launched(b)
    new = torch.ones(8)
    b.data = new
    assert [launched(b) for _ in range(2)] == [False, True]


@stubbed
def test_equal_tensors_are_not_the_same_tensor(stub: Stub) -> None:
    b = torch.zeros(8)
    launched(b)
    assert not launched(b.clone())
    assert not launched(b[:])  # same memory, another object


@stubbed
def test_a_write_between_check_and_launch_counts(stub: Stub) -> None:
    """What is remembered is the version from before the launch."""
    b = torch.zeros(8)

    def launch_and_write(early: bool) -> None:
        b.add_(1)

    launch_after_writes([b], None, STREAM, launch_and_write)
    assert [launched(b) for _ in range(2)] == [False, True]


@stubbed
def test_a_failed_launch_does_not_count(stub: Stub) -> None:
    b = torch.zeros(8)

    def fail(early: bool) -> None:
        raise ValueError(early)

    with pytest.raises(ValueError, match="False"):
        launch_after_writes([b], None, STREAM, fail)
    assert [launched(b) for _ in range(2)] == [False, True]


@stubbed
def test_captured_launches_do_not_count(stub: Stub) -> None:
    b = torch.zeros(8)
    stub.set(capturing=1)
    assert [launched(b) for _ in range(2)] == [False, False]
    stub.set(capturing=0)
    assert [launched(b) for _ in range(2)] == [False, True]
    stub.set(capturing=1)
    assert launched(b)


@pytest.mark.parametrize(("version", "overlaps"), [(12020, False), (12030, True)])
def test_graphs_overlap_from_cuda_12_3_up(version: int, overlaps: bool) -> None:
    @stubbed
    def check(stub: Stub) -> None:
        b = torch.zeros(8)
        stub.set(driver=version)
        assert [launched(b) for _ in range(2)] == [False, True]
        stub.set(capturing=1)
        assert launched(b) == launched(b, wish=True) == overlaps
        stub.set(capturing=0)
        assert launched(b)

    check()


@stubbed
def test_switches(stub: Stub) -> None:
    b = torch.zeros(8)
    assert not launched(b, wish=True)  # a wish does not undo the rule
    assert not launched(b, wish=False)
    assert launched(b)
    machete_aot.set_overlap(False)
    assert not launched(b)
    assert launched(b, wish=True)
    machete_aot.set_overlap(True)
    assert launched(b)


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (None, True)])
def test_environment_variable(value: str | None, expected: bool) -> None:
    setting = "" if value is None else f"os.environ['MACHETE_AOT_OVERLAP'] = {value!r};"
    clear = "os.environ.pop('MACHETE_AOT_OVERLAP', None);"
    code = f"import os; {clear} {setting} from machete_aot import overlap; print(overlap.enabled())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(expected)


@stubbed
def test_inference_tensors_go_by_identity(stub: Stub) -> None:
    with torch.inference_mode():
        b = torch.zeros(8)
        assert version(b) == (b.data_ptr(), -1)
        assert [launched(b) for _ in range(2)] == [False, True]
        assert not launched(torch.zeros(8))


def test_entries_go_with_their_tensors() -> None:
    constants = Constants()
    kept = torch.zeros(8)
    for tensor in [kept, *(torch.zeros(1) for _ in range(100))]:
        constants.add(tensor, version(tensor))
        constants.add(tensor, version(tensor))
    del tensor
    gc.collect()
    assert len(constants) == 1
    assert constants.holds(kept)


def test_an_old_entry_does_not_speak_for_a_new_tensor() -> None:
    """Addresses and ids are used again."""
    constants = Constants()
    for _ in range(1000):
        tensor = torch.zeros(1)
        assert not constants.holds(tensor)
        constants.add(tensor, version(tensor))
        assert constants.holds(tensor)


def test_threads() -> None:
    constants, failures = Constants(), []
    shared = [torch.zeros(1) for _ in range(50)]

    def work() -> None:
        try:
            for i in range(2000):
                own, common = torch.zeros(1), shared[i % len(shared)]
                for tensor in (own, common):
                    constants.add(tensor, version(tensor))
                    assert constants.holds(tensor)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert failures == []
    assert len(constants) == len(shared)
