# SPDX-License-Identifier: Apache-2.0
"""Loading kernels: each cubin once per process, each kernel made ready once per device, checked against its manifest.

Libraries do not belong to a context, so one serves all devices. Making a kernel ready on a device loads its code there
at once rather than at its first launch, which may lie inside a CUDA graph capture, where the driver forbids loading.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

from . import abi, driver
from .bundle import Bundle
from .driver import Device, release_text
from .errors import CaptureError, DeviceError, DriverCallError, IncompatibleError
from .manifest import HelperInfo, KernelInfo, Manifest

_FUNCTION_IN_CAPTURE = 900  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: some thread is capturing


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that can be launched on ``device``. ``handle``: what cuLaunchKernelEx takes."""

    info: KernelInfo | HelperInfo
    device: Device
    handle: Any


@dataclass(frozen=True)
class _Library:
    """A loaded cubin. ``code`` is the very buffer that was hashed, kept as long as the library."""

    kernel: Any
    code: bytes


class KernelCache:
    """Loaded kernels by the digest of their cubin, so that bundles which share a kernel share its library."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._libraries: dict[str, _Library] = {}
        self._ready: dict[tuple[str, int], LoadedKernel] = {}

    def load(
        self,
        bundle: Bundle,
        kernel_id: str,
        device_index: int,
        stream: int,
        parameters: tuple[tuple[int, int], ...] = abi.PARAMETERS,
    ) -> LoadedKernel:
        """The kernel or helper on that device, loaded unless it is already. ``stream``: the caller's.

        ``parameters``: (offset, size) of what it will be launched with.

        Raises CaptureError where a load is needed while the stream is capturing, DeviceError (wrong GPU, old driver),
        IncompatibleError, and what ``Bundle.cubin`` raises.
        """
        info = bundle.manifest.named(kernel_id)
        key = (info.cubin.sha256, device_index)
        found = self._ready.get(key)
        if found is None:
            with self._lock:
                found = self._ready.get(key)
                if found is None:
                    found = self._ready[key] = self._load(bundle, info, driver.device(device_index), stream, parameters)
        return found

    def _load(
        self,
        bundle: Bundle,
        info: KernelInfo | HelperInfo,
        device: Device,
        stream: int,
        parameters: tuple[tuple[int, int], ...],
    ) -> LoadedKernel:
        check_device(bundle.manifest, device)
        with driver.current(device):
            if driver.is_capturing(stream):
                raise _capture_error(info.id)
            try:
                library = self._libraries.get(info.cubin.sha256)
                if library is None:
                    library = self._libraries[info.cubin.sha256] = _load_library(bundle, info, parameters)
                handle = _make_ready(library.kernel, info, device)
            except DriverCallError as error:
                if error.code == _FUNCTION_IN_CAPTURE:
                    raise _capture_error(info.id) from error
                raise
        return LoadedKernel(info, device, handle)


_cache = KernelCache()


def _start_over() -> None:
    global _cache
    _cache = KernelCache()


os.register_at_fork(after_in_child=_start_over)


def load_kernel(
    bundle: Bundle,
    kernel_id: str,
    device_index: int,
    stream: int,
    parameters: tuple[tuple[int, int], ...] = abi.PARAMETERS,
) -> LoadedKernel:
    """``KernelCache.load`` of this process's cache, which a forked child starts empty."""
    return _cache.load(bundle, kernel_id, device_index, stream, parameters)


def check_device(manifest: Manifest, device: Device) -> None:
    """Raises DeviceError unless the device and its driver can run the kernels of this manifest."""
    major, minor = manifest.compat.compute_capability
    if device.capability != (major, minor):
        have = "{}.{}".format(*device.capability)
        raise DeviceError(
            f"the kernels of bundle {manifest.bundle.arch} {manifest.bundle.version} need compute capability "
            f"{major}.{minor} (H100, H200, GH200, H20), but device {device.index} ({device.name}) has {have}; use "
            "another device, or machete_aot.reference.gemm, which runs anywhere"
        )
    have_driver, want_driver = driver.driver_version(), manifest.compat.min_driver
    if have_driver < want_driver:
        raise DeviceError(
            f"the kernels of bundle {manifest.bundle.arch} {manifest.bundle.version} need a driver for "
            f"{release_text(want_driver)} or newer, but this one supports {release_text(have_driver)}; upgrade the "
            "driver"
        )


def _capture_error(kernel_id: str) -> CaptureError:
    return CaptureError(
        f"kernel {kernel_id} is not loaded yet, and nothing can be loaded while a CUDA graph is being captured; call "
        "machete_aot.warmup(model), or machete_aot.warmup(a_dtype, b_type, shapes=[(M, N, K), ...]), before the capture"
    )


def _load_library(bundle: Bundle, info: KernelInfo | HelperInfo, parameters: tuple[tuple[int, int], ...]) -> _Library:
    code = bundle.cubin(info.id)
    library = driver.call("cuLibraryLoadData", code, [], [], 0, [], [], 0)
    try:
        kernel = driver.call("cuLibraryGetKernel", library, info.symbol.encode())
        _check_parameters(kernel, info, parameters)
    except Exception:
        driver.call("cuLibraryUnload", library)
        raise
    return _Library(kernel, code)


def _make_ready(kernel: Any, info: KernelInfo | HelperInfo, device: Device) -> Any:
    """Loads the code into the current context and lets launches take all of the shared memory.

    The helpers have the same carveout: an SM that must change it waits until nothing runs there.
    """
    driver.call("cuKernelGetFunction", kernel)
    api = driver.api()
    attribute = api.CUfunction_attribute
    for name, value in (
        ("MAX_DYNAMIC_SHARED_SIZE_BYTES", device.shared_memory - info.static_shared_memory),
        ("PREFERRED_SHARED_MEMORY_CARVEOUT", 100),
    ):
        which = getattr(attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        driver.call("cuKernelSetAttribute", which, value, kernel, device.handle)
    return api.CUfunction(int(kernel))  # cuLaunchKernelEx takes a CUkernel in the place of a CUfunction


def _check_parameters(kernel: Any, info: KernelInfo | HelperInfo, wanted: tuple[tuple[int, int], ...]) -> None:
    """Compares the compiled parameters with what a launch passes. Drivers before CUDA 12.4 (550) cannot tell.

    The driver counts from where its parameter area starts, which is not where the first parameter lies when that one is
    aligned to 128 bytes (an H100's driver 580 reports offsets 112 and 240), so offsets count from the first parameter.
    """
    found: list[tuple[int, int]] = []
    try:
        for index in range(len(wanted) + 1):
            offset, size = driver.call("cuKernelGetParamInfo", kernel, index)
            found.append((offset, size))
    except driver.MissingFunctionError:
        return
    except DriverCallError as error:
        if error.code != 1:  # CUDA_ERROR_INVALID_VALUE: there is no parameter of that index
            raise
    relative = tuple((offset - found[0][0], size) for offset, size in found)
    if relative != wanted:
        raise IncompatibleError(
            f"kernel {info.id} takes parameters (offset, size) {relative}, where this runtime passes "
            f"{wanted}; install the bundle that belongs to this version of machete-aot"
        )
