# SPDX-License-Identifier: Apache-2.0
"""Runs a test against the stub driver, and reads what would have been launched.

A process can hold one libcuda.so.1, and cuda.bindings binds to it once. So each test of ``stubbed`` runs in a fork of
the test process, with a driver of its own and a package that has not seen another.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import inspect
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from machete_aot import abi

SOURCE = Path(__file__).with_name("libcuda.c")
TIMEOUT_S = 60
MAX_DYNAMIC_SHARED, CARVEOUT = 8, 9  # CUfunction_attribute


class TensorMapArguments(NamedTuple):
    """What a tensor map was encoded from."""

    type: int
    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: int
    swizzle: int
    promotion: int
    fill: int


class Launch(NamedTuple):
    """One recorded launch. ``parameters``: the bytes of all parameters, in a product's the tensor maps first."""

    symbol: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: tuple[int, ...]
    shared_memory: int
    programmatic: bool
    attributes: int
    device: int
    library: int
    stream: int
    parameters: bytes

    @property
    def params(self) -> dict[str, int]:
        """A product's GemmParams."""
        _, (at, size) = abi.PARAMETERS
        assert len(self.parameters) == at + size
        return abi.unpack_params(self.parameters[at:])

    @property
    def tensor_map(self) -> TensorMapArguments:
        """That of a product's activations."""
        found = self.tensor_maps[0]
        assert found is not None, "a product without a tensor map of its activations"
        return found

    @property
    def tensor_maps(self) -> tuple[TensorMapArguments | None, ...]:
        """Those of a product's activations, scales and zeros; None: one that is all zeros."""
        return tuple(self._tensor_map(abi.TENSOR_MAP_BYTES * i) for i in range(abi.MAPS))

    def _tensor_map(self, at: int) -> TensorMapArguments | None:
        data = self.parameters[at : at + abi.TENSOR_MAP_BYTES]
        if data == bytes(abi.TENSOR_MAP_BYTES):
            return None
        words = struct.unpack_from("<8I6Q6I", data)
        magic, kind, rank, interleave, swizzle, promotion, fill, _ = words[:8]
        assert magic == 0x7E5709A9, f"no tensor map that the stub encoded at {at}"
        dims, strides, box, steps = words[9:12], words[12:14], words[14:17], words[17:20]
        sizes = (dims[:rank], strides[: rank - 1], box[:rank], steps[:rank])
        return TensorMapArguments(kind, words[8], *sizes, interleave, swizzle, promotion, fill)


class _LaunchRecord(ctypes.Structure):
    _fields_ = (
        ("symbol", ctypes.c_char * 128),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("shared_memory", ctypes.c_uint32),
        ("programmatic", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("library", ctypes.c_uint32),
        ("parameter_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_uint8 * 520),
    )


class Stub:
    """The stub driver of this process: its knobs and its records."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_launch.restype = ctypes.POINTER(_LaunchRecord)

    def set(self, **knobs: int) -> None:
        """Knobs: major, minor (compute capability), driver (a CUDA version, which functions it has follows from that;
        set it before the first call), devices, sms, clock_khz, memory_khz, memory_bits (an H100's at first),
        capturing, slow_load_us, h100 (1: devices have its name), record (0: launches are counted, not kept)."""
        for name, value in knobs.items():
            assert self._library.stub_set(name.encode(), value) == 0, f"no knob {name}"

    def fail(self, function: str, code: int) -> None:
        """Makes every further call of a driver function return this CUresult."""
        self._library.stub_fail(function.encode(), code)

    def hide(self, function: str) -> None:
        """As if the driver did not export the function. Only before its first use."""
        self._library.stub_hide(function.encode())

    def calls(self, function: str) -> int:
        """How often a driver function was called."""
        return int(self._library.stub_calls(function.encode()))

    def kernel_attribute(self, symbol: str, device: int, attribute: int) -> int:
        """What cuKernelSetAttribute set last."""
        return int(self._library.stub_kernel_attribute(symbol.encode(), device, attribute))

    @property
    def launches(self) -> list[Launch]:
        return [self._launch(i) for i in range(self._library.stub_launch_count())]

    def _launch(self, index: int) -> Launch:
        r = self._library.stub_launch(index).contents
        return Launch(
            symbol=r.symbol.decode(),
            grid=tuple(r.grid),
            block=tuple(r.block),
            cluster=tuple(r.cluster),
            shared_memory=r.shared_memory,
            programmatic=bool(r.programmatic),
            attributes=r.attributes,
            device=r.device,
            library=r.library,
            stream=r.stream,
            parameters=bytes(r.parameters)[: r.parameter_bytes],
        )


@functools.cache
def build() -> Path:
    """Compiles the stub, once per test process."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("the stub driver needs a C compiler; install gcc")
    folder = tempfile.mkdtemp(prefix="machete-stub-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / "libcuda.so.1"
    options = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run(
        [compiler, *options, "-Wl,-soname,libcuda.so.1", "-o", str(target), str(SOURCE), "-lpthread"], check=True
    )
    return target


def stubbed(test: Callable[..., None]) -> Callable[..., None]:
    """Decorates a test whose first argument is the ``Stub``; the others are fixtures and parameters as usual."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        if "libcuda.so" in Path("/proc/self/maps").read_text():
            pytest.skip("this process has loaded a driver")
        build()

        def body() -> None:
            # Through cuda-bindings, not through a loader that happens to be compiled: test_loader.py compares the two.
            os.environ.setdefault("MACHETE_AOT_LOADER", "0")
            test(Stub(), **arguments)

        in_child(body)

    signature = inspect.signature(test)
    run.on_stub_driver = True  # type: ignore[attr-defined]
    run.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return run


def in_child(body: Callable[[], None]) -> None:
    """Runs ``body`` in a fork and fails with its traceback if it raised, died, or took longer than a minute."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads exist. The child uses none
        pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.close(reader)
            signal.alarm(TIMEOUT_S)
            try:
                body()
                status = 0
            except BaseException:
                os.write(writer, traceback.format_exc().encode()[-60000:])
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        report = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        pytest.fail(f"the test's process died of signal {os.WTERMSIG(status)}\n{report}", pytrace=False)
    if os.WEXITSTATUS(status):
        pytest.fail(report, pytrace=False)
