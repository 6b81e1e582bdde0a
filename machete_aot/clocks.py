# SPDX-License-Identifier: Apache-2.0
"""What NVML tells about a GPU while it works: clocks, power limit, driver. None where it does not tell.

NVML is the library beneath nvidia-smi and comes with the driver, so neither that program nor a binding is needed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"
SM_CLOCK, MEMORY_CLOCK = 1, 2  # nvmlClockType_t
VERSION_BYTES = 80


class Monitor:
    """One GPU as NVML sees it. Every reading is None where NVML, the device in it, or the reading is not to be had."""

    def __init__(self, device: int) -> None:
        """``device``: torch's index. Never raises."""
        self._nvml: Any = None
        self._handle = ctypes.c_void_p()
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        try:
            nvml = ctypes.CDLL(LIBRARY)
        except OSError:
            return
        if uuid is None or nvml.nvmlInit_v2():
            return
        # By UUID: NVML numbers devices in its own order, and does not know CUDA_VISIBLE_DEVICES.
        if nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(self._handle)) == 0:
            self._nvml = nvml

    def sm_mhz(self) -> int | None:
        return self._clock(SM_CLOCK)

    def memory_mhz(self) -> int | None:
        return self._clock(MEMORY_CLOCK)

    def power_limit_w(self) -> float | None:
        """The limit in force, watts."""
        milliwatts = self._number("nvmlDeviceGetEnforcedPowerLimit")
        return None if milliwatts is None else milliwatts / 1000

    def driver(self) -> str | None:
        """The kernel driver's version."""
        if self._nvml is None:
            return None
        text = ctypes.create_string_buffer(VERSION_BYTES)
        return None if self._nvml.nvmlSystemGetDriverVersion(text, VERSION_BYTES) else text.value.decode()

    def _clock(self, kind: int) -> int | None:
        return self._number("nvmlDeviceGetClockInfo", kind)

    def _number(self, function: str, *arguments: int) -> int | None:
        if self._nvml is None:
            return None
        value = ctypes.c_uint()
        return None if getattr(self._nvml, function)(self._handle, *arguments, ctypes.byref(value)) else value.value
