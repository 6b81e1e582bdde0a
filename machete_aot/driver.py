# SPDX-License-Identifier: Apache-2.0
"""``cuda.bindings.driver`` behind a thin layer: initialised at first use, every call checked.

``call("cuDeviceGet", 0)`` makes one driver call and returns its results without the status. What is asked of a device
again and again (its number of SMs, its primary context) is asked once and kept in ``Device``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

from .errors import DeviceError, DriverCallError
from .part import Clocks, Part

_bindings: Any = None
_import_error: Exception | None = None
try:  # at import, because it takes 25 ms that a first product should not pay; it loads no driver
    import cuda.bindings.driver

    _bindings = cuda.bindings.driver
except (ImportError, OSError, RuntimeError) as error:  # reported when a driver is asked for: importing never fails
    _import_error = error

_HINTS = {
    2: "the GPU is out of memory; free some and call again",
    3: "if CUDA was initialised before this process was forked, start it with the 'spawn' method instead",
    100: "no CUDA device is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    101: "there is no device of that index; look at CUDA_VISIBLE_DEVICES",
    209: "the kernel was compiled for another GPU than this one",
    222: "the driver is older than the compiler that made the kernel; upgrade the driver",
    803: "the driver's user and kernel parts differ; reboot, or reinstall one of them",
    804: "this GPU does not support the compatibility driver in use; upgrade the driver",
    912: "the device refuses clusters of that size; choose a schedule whose name ends in _x1 and has no m2",
}
# The driver branch that came with each CUDA version, the lowest that supports it: from the toolkit's release notes,
# because cuDriverGetVersion tells the CUDA version alone.
_BRANCHES = {
    **{11040: 470, 11050: 495, 11060: 510, 11070: 515, 11080: 520},
    **{12000: 525, 12010: 530, 12020: 535, 12030: 545, 12040: 550, 12050: 555, 12060: 560, 12080: 570, 12090: 575},
    **{13000: 580, 13010: 590, 13020: 595, 13030: 610},
}
_CAPTURED_OVERLAP = 12030  # the first CUDA version whose graphs know programmatic dependent launch
CAPTURE_IMPLICIT = 906  # the legacy stream was asked about while another stream is being captured
_DEFAULT_HINT = "CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer finds an earlier failure that may be behind it"


class MissingFunctionError(DeviceError):
    """The driver, or the installed cuda-bindings, does not have a function."""


@dataclass(frozen=True)
class Device:
    """What a device is. ``shared_memory``: bytes that one CTA may ask for."""

    index: int
    handle: Any
    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory: int
    part: Part

    @cached_property
    def context(self) -> Any:
        """The primary context, which is also torch's; kept for the process's life. Making it takes memory there."""
        return call("cuDevicePrimaryCtxRetain", self.handle)


class _State:
    """What must not survive a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.api: Any = None
        self.devices: dict[int, Device] = {}
        self.overlap_in_graphs: bool | None = None


_state = _State()


def _start_over() -> None:
    global _state
    _state = _State()


os.register_at_fork(after_in_child=_start_over)


def api() -> Any:
    """The module cuda.bindings.driver, after cuInit. Raises DeviceError where there is no driver."""
    state = _state
    if state.api is None:
        with state.lock:
            if state.api is None:
                state.api = _initialised()
    return state.api


def call(name: str, *arguments: Any) -> Any:
    """Calls the driver; returns None, the result, or a tuple of results. Raises DriverCallError unless it succeeded."""
    return _call(api(), name, *arguments)


def driver_version() -> int:
    """The newest CUDA version that the driver supports, as in 13000."""
    return int(call("cuDriverGetVersion"))


def device_count() -> int:
    """How many devices this process sees."""
    return int(call("cuDeviceGetCount"))


def device(index: int) -> Device:
    """The device of that index; torch and the driver count alike."""
    state = _state
    found = state.devices.get(index)
    if found is None:
        made = _describe(index)
        with state.lock:
            found = state.devices.setdefault(index, made)
    return found


def is_current(device: Device) -> bool:
    """Whether the device's primary context is current in this thread."""
    return int(call("cuCtxGetCurrent")) == int(device.context)


@contextmanager
def current(device: Device) -> Iterator[None]:
    """Makes the device's primary context current in this thread, where it is not already, and restores what was."""
    if is_current(device):
        yield
        return
    call("cuCtxPushCurrent", device.context)
    try:
        yield
    finally:
        call("cuCtxPopCurrent")


def is_capturing(stream: int) -> bool:
    """Whether the stream (a CUstream's address) is recording a CUDA graph."""
    driver = api()
    status, capture = driver.cuStreamIsCapturing(driver.CUstream(stream))
    if status == CAPTURE_IMPLICIT:
        return True
    _check("cuStreamIsCapturing", status)
    return int(capture) != 0


def version_text(version: int) -> str:
    """A version as people write it: 13000 is "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def release_text(version: int) -> str:
    """A version with the driver branch that came with it: 12000 is "CUDA 12.0 (driver 525)"."""
    branch = _BRANCHES.get(version // 10 * 10)
    return f"CUDA {version_text(version)}" + (f" (driver {branch})" if branch else "")


def overlap_in_graphs() -> bool:
    """Whether launches that a CUDA graph captures may have the programmatic attribute: from CUDA 12.3 on."""
    state = _state
    if state.overlap_in_graphs is None:
        state.overlap_in_graphs = driver_version() >= _CAPTURED_OVERLAP
    return state.overlap_in_graphs


def can_overlap(stream: int) -> bool:
    """Whether a launch on the stream may have the programmatic attribute: before CUDA 12.3 not while it captures."""
    return overlap_in_graphs() or not is_capturing(stream)


def _initialised() -> Any:
    if _bindings is None:
        raise DeviceError(
            f"cuda-bindings cannot be imported ({_import_error}); pip install 'cuda-bindings>=12.9'"
        ) from _import_error
    try:
        _call(_bindings, "cuInit", 0)
    except MissingFunctionError as error:
        raise DeviceError(
            f"no usable CUDA driver: {error.__cause__}; install NVIDIA's driver, 525 or newer, so that libcuda.so.1 "
            "can be loaded (in a container: start it with the GPU's driver mounted), or keep the tensors on the CPU"
        ) from error.__cause__
    return _bindings


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    try:
        status, *results = getattr(driver, name)(*arguments)
    except AttributeError as error:
        raise MissingFunctionError(f"the installed cuda-bindings has no {name}; upgrade it") from error
    except RuntimeError as error:  # what cuda.bindings raises for a function that libcuda does not export
        raise MissingFunctionError(f"the driver has no {name} ({error}); upgrade the driver") from error
    if status:
        _check(name, status)
    return results[0] if len(results) == 1 else tuple(results) or None


def check(name: str, code: int) -> None:
    """Raises DriverCallError unless this CUresult of a driver function, called by other means than ``call``, is 0."""
    try:
        status = api().CUresult(code)
    except ValueError:  # of a newer driver
        status = code
    _check(name, status)


def _check(name: str, status: Any) -> None:
    code = int(status)
    if code:
        raise DriverCallError(name, code, getattr(status, "name", "an unknown error"), _HINTS.get(code, _DEFAULT_HINT))


def _describe(index: int) -> Device:
    handle = call("cuDeviceGet", index)
    ask = partial(_attribute, handle)
    name = call("cuDeviceGetName", 256, handle).split(b"\0")[0].decode("utf-8", "replace")
    sms = ask("MULTIPROCESSOR_COUNT")
    return Device(
        index=index,
        handle=handle,
        name=name,
        capability=(ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR")),
        sms=sms,
        shared_memory=ask("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        part=Part(name, sms, cache(partial(_clocks, handle))),
    )


def _clocks(handle: Any) -> Clocks:
    transfers = 2e-3 * _attribute(handle, "MEMORY_CLOCK_RATE")  # a microsecond: double data rate, from kHz
    width = _attribute(handle, "GLOBAL_MEMORY_BUS_WIDTH") / 8
    return Clocks(_attribute(handle, "CLOCK_RATE") / 1e3, transfers * width)


def _attribute(handle: Any, name: str) -> int:
    return int(call("cuDeviceGetAttribute", getattr(api().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), handle))
