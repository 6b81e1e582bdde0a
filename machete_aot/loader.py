# SPDX-License-Identifier: Apache-2.0
"""Launching through the native loader (csrc/loader): one call of a C function with one packed struct.

The library is optional. Without it ``launch.py`` does the same through cuda-bindings, call by call.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import abi, driver
from .errors import DeviceError, DriverCallError

if TYPE_CHECKING:
    from .launch import LaunchPlan, Operands
    from .tensor_map import TensorMapArgs

VARIABLE = "MACHETE_AOT_LOADER"
VERSION = 3  # MACHETE_LOADER_VERSION
IN_PACKAGE = Path(__file__).parent / "native" / "libmachete_loader.so"
MAPPED = ("acts", "scales", "zeros")  # what the maps of a plan are of
PAIRS, ONE_PER_SM, EVERY_SM = 1, 2, 4  # options of a plan
OVERLAP = 1  # and of a call

_PLAN = struct.Struct("<14I" + abi.MAPS * "4I5Q" + "Q")  # machete_loader_plan up to its GemmParams
_CALL = struct.Struct("<4I13Q")  # machete_loader_call
PLAN_BYTES = _PLAN.size + abi.SIZE
_PLAN_MAGIC, _CALL_MAGIC = 0x4E4C504D, 0x4C4C434D
_log = logging.getLogger(__name__)


class LoaderError(Exception):
    """The library is missing, disabled, or not the one that belongs to this package."""


def pack_plan(plan: LaunchPlan) -> bytes:
    """The machete_loader_plan of a plan."""
    options = PAIRS * plan.pairs | ONE_PER_SM * plan.one_per_sm | EVERY_SM * plan.every_sm
    head = _PLAN.pack(
        *(_PLAN_MAGIC, PLAN_BYTES, abi.ABI_VERSION, options),
        *(*plan.grid, *plan.block, *plan.cluster, plan.shared_memory),
        *(number for args in plan.maps for number in _map(args)),
        plan.workspace,
    )
    return head + abi.pack_params(**dict.fromkeys(abi.OFFSETS, 0) | plan.params)


def _map(args: TensorMapArgs | None) -> tuple[int, ...]:
    """The numbers of a machete_loader_map. Which of the maps is swizzled, the library knows."""
    if args is None:
        return _padded((), 9)
    return len(args.dims), *_padded(args.box, 3), *_padded(args.dims, 3), *_padded(args.strides, 2)


def _padded(values: tuple[int, ...], length: int) -> tuple[int, ...]:
    return values + (0,) * (length - len(values))


class NativePlan:
    """A plan as the library reads it, at ``address``, which is valid as long as this object."""

    def __init__(self, plan: LaunchPlan) -> None:
        self.storage = (ctypes.c_char * PLAN_BYTES).from_buffer_copy(pack_plan(plan))
        self.address = ctypes.addressof(self.storage)


class Loader:
    """The opened library. ``launch(call)`` takes what ``pack_call`` packs and returns 0 or what ``fail`` explains."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            library = ctypes.CDLL(os.fspath(self.path))  # which releases the GIL: a full queue makes a launch wait
            versions = library.machete_loader_version(), library.machete_loader_abi()
        except (OSError, AttributeError) as error:
            raise LoaderError(f"{self.path} cannot be used ({error})") from error
        if versions != (VERSION, abi.ABI_VERSION):
            raise LoaderError(
                f"{self.path} has version {versions[0]} and ABI {versions[1]}, where this package has {VERSION} and "
                f"{abi.ABI_VERSION}; compile it again with python tools/build_loader.py"
            )
        self._library = library
        for name in ("machete_loader_function", "machete_loader_status_name"):
            getattr(library, name).restype = ctypes.c_char_p
        library.machete_loader_seed.argtypes = [ctypes.c_uint64]
        library.machete_loader_seed.restype = None
        library.machete_loader_check.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self.launch: Any = library.machete_loader_launch
        self.launch.argtypes = [ctypes.c_char_p]

    def connect(self) -> None:
        """Finds the driver's functions, and seeds the tokens. Raises LoaderError; DeviceError without a driver."""
        driver.api()  # initialises it
        code = self._library.machete_loader_init(None)
        if code:
            raise LoaderError(f"{self.path} finds no functions to call: {self.name(code)}")
        self.seed(secrets.randbits(64))  # as in launch.py

    def seed(self, token: int) -> None:
        """Sets the token of the next launch."""
        self._library.machete_loader_seed(token)

    def check(self, plan: bytes) -> int:
        """0 if these bytes are a plan that can be launched."""
        return int(self._library.machete_loader_check(plan, len(plan)))

    def name(self, code: int) -> str:
        """What the library calls a status."""
        return str(self._library.machete_loader_status_name(code).decode())

    def fail(self, code: int, plan: LaunchPlan, addresses: tuple[int, int, int]) -> None:
        """Raises what a launch of ``plan`` that returned ``code`` means: DriverCallError, or DeviceError.

        ``addresses``: those of its maps.
        """
        result = self._library.machete_loader_result(code)
        if not result:
            raise DeviceError(f"the loader {self.path} refused a launch of {plan.kernel_id}: {self.name(code)}")
        function = self._library.machete_loader_function(code).decode()
        if function == "cuTensorMapEncodeTiled":
            maps = zip(MAPPED, plan.maps, addresses, strict=True)  # which of them the driver refused is not known
            text = "; ".join(f"{name}: {args} at address {at:#x}" for name, args, at in maps if args is not None)
            raise DriverCallError(function, result, "an error", f"for one of {text}")
        driver.check(function, result)


def pack_call(
    plan: int, kernel: int, operands: Operands, workspace: int, stream: int, context: int, overlap: bool
) -> bytes:
    """A machete_loader_call; ``calls.py`` packs the same without the function call."""
    o = operands
    return pack(
        *(_CALL_MAGIC, _CALL.size, OVERLAP if overlap else 0, 0, plan, kernel, stream, context),
        *(o.acts, o.weights, o.scales, o.zeros, o.bias, o.channel_scales, o.token_scales, o.out, workspace),
    )


pack = _CALL.pack
CALL_MAGIC, CALL_BYTES = _CALL_MAGIC, _CALL.size

# ---------------------------------------------------------------- the loader of this process

_lock = threading.Lock()
_found: tuple[Loader | None] | None = None


def active() -> Loader | None:
    """The loader of this process, ready to launch, or None where launches go through cuda-bindings."""
    found = _found
    return found[0] if found is not None else _find()


def status() -> tuple[bool, str]:
    """Whether launches go through the library, and which one, or why not; without a driver, what would be done."""
    try:
        return True, f"launches go through {_chosen().path}"
    except LoaderError as error:
        return False, f"launches go through cuda-bindings: {error}"


def _find() -> Loader | None:
    global _found
    with _lock:
        if _found is None:
            try:
                loader = _chosen()
                loader.connect()
            except LoaderError as error:
                level = logging.WARNING if os.environ.get(VARIABLE, "0") != "0" else logging.INFO
                _log.log(level, "launches go through cuda-bindings: %s", error)
                loader = None
            _found = (loader,)
        return _found[0]


def _chosen() -> Loader:
    setting = os.environ.get(VARIABLE, "")
    if setting == "0":
        raise LoaderError(f"{VARIABLE}=0")
    path = Path(setting) if setting not in ("", "1") else IN_PACKAGE
    if not path.exists():
        raise LoaderError(f"there is no {path}; python tools/build_loader.py compiles it")
    return Loader(path)


def _start_over() -> None:
    """A forked child counts its own tokens, and may find another driver."""
    global _found, _lock
    _found, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_start_over)
