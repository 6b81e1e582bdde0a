# SPDX-License-Identifier: Apache-2.0
"""Loading kernels on a driver without a GPU: what is loaded how often, what is checked, and how it fails."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from machete_aot import abi, driver
from machete_aot.errors import CaptureError, DeviceError, DriverCallError, IncompatibleError, MissingError
from machete_aot.kernel import load_kernel
from machete_aot.launch import Operands, Shape, multiply
from machete_aot.manifest import kernel_id
from machete_aot.part import Part
from stub.bundles import BF16, FLAT, FP16, NARROW, WIDE, make_bundle, schedule
from stub.harness import CARVEOUT, MAX_DYNAMIC_SHARED, Stub, in_child, stubbed

BUNDLE = make_bundle()
NARROW_ID, WIDE_ID, FLAT_ID = (kernel_id(BF16, tile.name) for tile in (NARROW, WIDE, FLAT))
STREAM = 0x5EED0


def no_workspace(size: int) -> int:
    pytest.fail(f"{size} bytes of workspace were asked for, where none is needed")


def run(device: int = 0) -> None:
    operands, shape = Operands(1 << 20, 2 << 20, 3 << 20, 0, 4 << 20), Shape(1, 128, 128, 128, 128, 128, 128)
    with driver.current(driver.device(device)):
        multiply(BUNDLE, BF16, shape, schedule(NARROW), operands, device, STREAM, False, no_workspace)


@stubbed
def test_each_kernel_is_loaded_once(stub: Stub) -> None:
    first = load_kernel(BUNDLE, NARROW_ID, 0, STREAM)
    assert load_kernel(BUNDLE, NARROW_ID, 0, STREAM) is first
    assert stub.calls("cuLibraryLoadData") == 1
    load_kernel(BUNDLE, kernel_id(FP16, NARROW.name), 0, STREAM)
    assert stub.calls("cuLibraryLoadData") == 2
    assert first.info == BUNDLE.manifest.kernel(NARROW_ID)


@stubbed
def test_a_bundle_with_the_same_cubins_loads_nothing_again(stub: Stub) -> None:
    load_kernel(BUNDLE, NARROW_ID, 0, STREAM)
    load_kernel(make_bundle(), NARROW_ID, 0, STREAM)
    assert stub.calls("cuLibraryLoadData") == 1


@stubbed
def test_shared_memory_attributes(stub: Stub) -> None:
    load_kernel(make_bundle(static_shared_memory=16), NARROW_ID, 0, STREAM)
    assert stub.kernel_attribute(f"machete_{NARROW_ID}", 0, MAX_DYNAMIC_SHARED) == 227 * 1024 - 16
    assert stub.kernel_attribute(f"machete_{NARROW_ID}", 0, CARVEOUT) == 100


@stubbed
def test_devices_share_a_library_and_have_their_own_attributes(stub: Stub) -> None:
    stub.set(devices=3)
    for device in (2, 0, 2, 1):
        run(device)
    assert [launch.device for launch in stub.launches] == [2, 0, 2, 1]
    assert stub.calls("cuLibraryLoadData") == 1
    assert stub.calls("cuDevicePrimaryCtxRetain") == 3
    symbol = f"machete_{NARROW_ID}"
    assert [stub.kernel_attribute(symbol, d, MAX_DYNAMIC_SHARED) for d in range(3)] == [227 * 1024] * 3
    assert int(driver.call("cuCtxGetCurrent")) == 0  # what was current before is current again


@stubbed
def test_the_current_context_is_left_alone(stub: Stub) -> None:
    stub.set(devices=2)
    other = driver.device(1).context
    driver.call("cuCtxPushCurrent", other)
    run(0)
    assert stub.launches[0].device == 0
    assert int(driver.call("cuCtxGetCurrent")) == int(other)
    pushed = stub.calls("cuCtxPushCurrent_v2")
    run(1)
    run(1)
    assert stub.launches[2].device == 1
    assert stub.calls("cuCtxPushCurrent_v2") == pushed  # it was current already


@stubbed
def test_wrong_compute_capability(stub: Stub) -> None:
    stub.set(major=8, minor=6)
    with pytest.raises(
        DeviceError, match=r"need compute capability 9\.0 .*device 0 \(Stub 0\) has 8\.6; use another"
    ) as e:
        run()
    assert not isinstance(e.value, DriverCallError)
    assert stub.calls("cuLibraryLoadData") == 0


@stubbed
def test_newer_compute_capability_is_also_wrong(stub: Stub) -> None:
    stub.set(major=10)
    with pytest.raises(DeviceError, match=r"has 10\.0"):
        run()


@stubbed
def test_old_driver(stub: Stub) -> None:
    stub.set(driver=11080)
    wanted = r"driver for CUDA 12\.0 \(driver 525\) or newer, but this one supports CUDA 11\.8 \(driver 520\); upgrade"
    with pytest.raises(DeviceError, match=wanted) as e:
        run()
    assert not isinstance(e.value, DriverCallError)
    assert stub.calls("cuKernelSetAttribute") == stub.calls("cuLaunchKernelEx") == 0


@stubbed
def test_the_oldest_driver(stub: Stub) -> None:
    stub.set(driver=12000)
    run()
    assert len(stub.launches) == 1
    assert stub.calls("cuKernelGetParamInfo") == 0  # it came with CUDA 12.4


@stubbed
def test_parameters_are_compared_from_cuda_12_4_up(stub: Stub) -> None:
    stub.set(driver=12040)
    run()
    assert stub.calls("cuKernelGetParamInfo") == len(abi.PARAMETERS) + 1


@stubbed
def test_no_device(stub: Stub) -> None:
    stub.set(devices=0)
    with pytest.raises(
        DriverCallError, match=r"cuInit failed with CUDA_ERROR_NO_DEVICE \(100\): .*CUDA_VISIBLE_DEVICES"
    ):
        run()
    with pytest.raises(DriverCallError, match="cuInit"):  # asked again, not remembered
        run()


@stubbed
def test_no_such_device(stub: Stub) -> None:
    with pytest.raises(DriverCallError, match=r"cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE"):
        run(1)


@stubbed
def test_loading_during_a_capture(stub: Stub) -> None:
    load_kernel(BUNDLE, WIDE_ID, 0, STREAM)
    stub.set(capturing=1)
    with pytest.raises(CaptureError, match=r"call machete_aot\.warmup\(") as caught:
        run()
    assert NARROW_ID in str(caught.value)
    assert stub.calls("cuLibraryLoadData") == 1
    load_kernel(BUNDLE, WIDE_ID, 0, STREAM)  # loaded before
    stub.set(capturing=0)
    run()
    stub.set(capturing=1)
    run()
    assert len(stub.launches) == 2


@stubbed
def test_another_thread_captures(stub: Stub) -> None:
    stub.fail("cuLibraryLoadData", 900)  # what the driver says then; the stream itself is not capturing
    with pytest.raises(CaptureError, match="warmup") as caught:
        run()
    assert isinstance(caught.value.__cause__, DriverCallError)
    stub.fail("cuLibraryLoadData", 0)
    stub.fail("cuStreamIsCapturing", 906)
    with pytest.raises(CaptureError, match="warmup"):
        run()


@stubbed
def test_many_threads_load_once(stub: Stub) -> None:
    stub.set(slow_load_us=20000, devices=2)
    start, failures = threading.Barrier(16), []

    def work(i: int) -> None:
        try:
            start.wait()
            run(i % 2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert stub.calls("cuLibraryLoadData") == 1
    assert stub.calls("cuKernelGetFunction") == 2
    assert sorted(launch.device for launch in stub.launches) == [0] * 8 + [1] * 8


@stubbed
def test_a_forked_child_starts_over(stub: Stub) -> None:
    run()
    inits = stub.calls("cuInit")

    def child() -> None:
        run()
        assert stub.calls("cuInit") == inits + 1
        assert stub.calls("cuLibraryLoadData") == 2  # the parent's one, and the child's own
        assert stub.launches[1].library == 2

    in_child(child)
    assert stub.calls("cuLibraryLoadData") == 1


@stubbed
def test_fork_while_another_thread_loads(stub: Stub) -> None:
    """The child must not wait for a lock that nobody in it will release."""
    stub.set(slow_load_us=300000)
    loader = threading.Thread(target=run)
    loader.start()
    while not stub.calls("cuLibraryLoadData"):
        pass

    def child() -> None:
        stub.set(slow_load_us=0)
        driver.device(0)
        assert driver.device_count() == 1

    in_child(child)
    loader.join()
    assert len(stub.launches) == 1


@stubbed
def test_parameters_that_differ_are_refused(stub: Stub) -> None:
    assert abi.PARAMETERS == ((0, 384), (384, abi.SIZE))
    wrong = [
        ((0, 384), (384, abi.SIZE - 8)),
        ((0, 384), (448, abi.SIZE)),
        ((0, 128), (128, abi.SIZE)),  # one tensor map
        ((0, 384),),
        (*abi.PARAMETERS, (384 + abi.SIZE, 8)),
    ]
    for parameters in wrong:
        with pytest.raises(IncompatibleError, match="takes parameters") as caught:
            load_kernel(make_bundle(parameters), NARROW_ID, 0, STREAM)
        assert str(abi.PARAMETERS) in str(caught.value)
    assert stub.calls("cuLibraryUnload") == stub.calls("cuLibraryLoadData") == len(wrong)


@stubbed
def test_drivers_that_cannot_tell_parameters(stub: Stub) -> None:
    stub.hide("cuKernelGetParamInfo")
    run()
    assert len(stub.launches) == 1


@stubbed
def test_failing_parameter_query_is_not_taken_for_the_end(stub: Stub) -> None:
    stub.fail("cuKernelGetParamInfo", 999)
    with pytest.raises(DriverCallError, match="CUDA_ERROR_UNKNOWN"):
        run()


@stubbed
def test_what_the_driver_refuses(stub: Stub) -> None:
    with pytest.raises(DriverCallError, match="CUDA_ERROR_INVALID_IMAGE"):
        load_kernel(make_bundle(cubin=b"no cubin\0"), NARROW_ID, 0, STREAM)
    with pytest.raises(DriverCallError, match="CUDA_ERROR_NOT_FOUND"):
        load_kernel(make_bundle(cubin=b"stub-cubin\nsomething 0:128 128:64\n\0"), NARROW_ID, 0, STREAM)
    assert stub.calls("cuLibraryUnload") == 1
    for name, code in (("cuKernelGetFunction", 2), ("cuKernelSetAttribute", 1)):
        stub.fail(name, code)
        with pytest.raises(DriverCallError, match=name):
            run()
        stub.fail(name, 0)
    run()  # a failure is not remembered
    assert len(stub.launches) == 1


@stubbed
def test_unknown_kernel(stub: Stub) -> None:
    with pytest.raises(MissingError, match="no kernel 'nothing'"):
        load_kernel(BUNDLE, "nothing", 0, STREAM)


@stubbed
def test_missing_functions_are_named(stub: Stub) -> None:
    stub.hide("cuLibraryLoadData")
    with pytest.raises(DeviceError, match=r"the driver has no cuLibraryLoadData .*upgrade the driver"):
        run()
    with pytest.raises(DeviceError, match="cuda-bindings has no cuNonsense"):
        driver.call("cuNonsense")


@stubbed
def test_versions_and_devices(stub: Stub) -> None:
    stub.set(driver=13020, devices=2)
    assert driver.driver_version() == 13020
    assert driver.version_text(13020) == "13.2"
    assert driver.release_text(13020) == "CUDA 13.2 (driver 595)"
    assert driver.release_text(99090) == "CUDA 99.9"
    assert driver.device_count() == 2
    device = driver.device(1)
    assert (device.name, device.capability, device.sms, device.shared_memory) == ("Stub 1", (9, 0), 132, 227 * 1024)
    assert driver.device(1) is device


@stubbed
def test_clocks_are_asked_for_where_they_are_needed_and_once(stub: Stub) -> None:
    part = driver.device(0).part
    asked = stub.calls("cuDeviceGetAttribute")
    assert (part.name, part.sms) == ("Stub 0", 132)
    assert stub.calls("cuDeviceGetAttribute") == asked
    assert (part.clock_mhz, part.peak_bytes_per_us) == (1980, 2 * 2619e6 * 5120 / 8 / 1e6)
    assert stub.calls("cuDeviceGetAttribute") == asked + 3
    assert replace(part, clocks=Part.known("", 0, 0.0, 0.0).clocks) == part  # two GPUs of one name share what is kept
    assert replace(driver.device(0).part, sms=114).facts() == {**part.facts(), "sms": 114}
    assert stub.calls("cuDeviceGetAttribute") == asked + 3


def test_without_a_driver() -> None:
    if driver_is_here():
        pytest.skip("there is a driver")

    def child() -> None:
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"no usable CUDA driver: .*libcuda"):
                driver.device(0)

    in_child(child)


def driver_is_here() -> bool:
    look = "import ctypes; ctypes.CDLL('libcuda.so.1')"  # in another process, so that nothing is loaded into this one
    return subprocess.run([sys.executable, "-c", look], capture_output=True).returncode == 0
