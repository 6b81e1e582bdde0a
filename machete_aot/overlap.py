# SPDX-License-Identifier: Apache-2.0
"""When programmatic dependent launch is safe: weights and scales that a kernel may still write must not be read early.

A kernel launched with overlap reads its weights and scales before earlier kernels of the stream have ended. That is
safe once a product has been launched on the same tensors, at the same version, without overlap: it ran after whatever
wrote them. A version is the address and torch's counter of in-place writes, so an update makes the next call wait
again. Writes that torch does not count (through ``.data``, through DLPack, by foreign kernels, by graph replays, and
any to inference tensors, which have no counter) need ``set_overlap(False)`` or ``gemm(..., overlap=False)`` for the
first call after.

A launch that is captured into a CUDA graph does not run, so it does not count as one that waited: call a product once
before the capture, as one does to warm up, and the graph's launches overlap. With drivers before CUDA 12.3 they never
do: such a dependency came to graphs with that version.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from . import driver

_Ref: TypeAlias = "weakref.ref[torch.Tensor]"
Version: TypeAlias = tuple[int, int]
_enabled = os.environ.get("MACHETE_AOT_OVERLAP", "1") != "0"


def set_overlap(enabled: bool) -> None:
    """Switches overlap with earlier kernels on (the default, unless MACHETE_AOT_OVERLAP=0) or off, for this process."""
    global _enabled
    _enabled = bool(enabled)


def enabled(override: bool | None = None) -> bool:
    """What a call does: its own wish where it has one, else the process's setting."""
    return _enabled if override is None else override


class Constants:
    """Tensors that some launch has waited for, by object identity, each with the version that it had then.

    Entries go when their tensor does. A method never sees half of an update: the dict's operations are atomic.
    """

    def __init__(self) -> None:
        self._versions: dict[int, tuple[_Ref, Version]] = {}
        self._lock = threading.RLock()  # reentrant: a collection inside ``add`` may call ``_forget``

    def __len__(self) -> int:
        return len(self._versions)

    def holds(self, tensor: torch.Tensor, address: int | None = None) -> bool:
        """Whether this very object was added and has not been written since. ``address``: its own, if it is known."""
        entry = self._versions.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return False
        at, count = entry[1]
        if at != (tensor.data_ptr() if address is None else address):
            return False
        if count < 0:
            return tensor.is_inference()
        try:
            return count == tensor._version
        except RuntimeError:  # it has become one without a count
            return False

    def add(self, tensor: torch.Tensor, at: Version) -> None:
        """Adds a tensor at the version that it had before the launch that waited."""
        key = id(tensor)
        with self._lock:
            self._versions[key] = (weakref.ref(tensor, lambda ref: self._forget(key, ref)), at)

    def _forget(self, key: int, ref: _Ref) -> None:
        with self._lock:
            entry = self._versions.get(key)
            if entry is not None and entry[0] is ref:
                del self._versions[key]


def count_write(out: torch.Tensor) -> None:
    """Counts that a kernel of ours wrote into a caller's tensor, as torch counts its own writes."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def version(tensor: torch.Tensor) -> Version:
    """The tensor's address and count of in-place writes; -1 for an inference tensor, which has no count."""
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:
        return tensor.data_ptr(), -1


def launch_after_writes(
    tensors: Sequence[torch.Tensor], override: bool | None, stream: int, launch: Callable[[bool], None]
) -> None:
    """Calls ``launch(overlap)`` for a kernel that reads these tensors early, and remembers that it waited for them."""
    held = constants
    if all(map(held.holds, tensors)):
        launch(enabled(override) and driver.can_overlap(stream))
        return
    versions = [version(t) for t in tensors]  # before the launch: a write after it must not count as waited for
    launch(False)
    if not driver.is_capturing(stream):
        for tensor, at in zip(tensors, versions, strict=True):
            held.add(tensor, at)


constants = Constants()


def _start_over() -> None:
    global constants
    constants = Constants()


os.register_at_fork(after_in_child=_start_over)
