# SPDX-License-Identifier: Apache-2.0
"""Where a bundle's bytes are: in memory, or in a file of this machine. Whatever they are is checked by who asks."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from .errors import BundleError, MissingError, TruncatedError, UnreachableError
from .manifest_rules import MAX_BUNDLE_BYTES


class BundleData(Protocol):
    """Where a bundle's bytes are. Nothing that it returns is trusted."""

    @property
    def size(self) -> int:
        """Bytes of the whole bundle."""

    def read(self, offset: int, length: int) -> bytes:
        """These bytes of the bundle's file. Raises BundleError; TruncatedError if it ends before."""

    def whole(self) -> bytes | None:
        """The whole file where it is at hand, None where it is not. Raises BundleError."""

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Brings these (offset, length) spans here if they are elsewhere. Raises BundleError."""


class MemoryData:
    """A bundle's file, read once."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @property
    def size(self) -> int:
        return len(self._content)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > len(self._content):
            raise _truncated(offset, length, len(self._content))
        return self._content[offset : offset + length]

    def whole(self) -> bytes:
        return self._content

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Everything is here."""


class FileData:
    """A bundle's file, of which a process reads the little that it needs.

    It stays open, so that it is the same file if an upgrade replaces it. Reads have no common position, so threads and
    forked processes do not meet. One that is written over where it lies is found damaged by its digests.
    """

    _file: FileIO | None = None

    def __init__(self, path: Path) -> None:
        """Raises MissingError, UnreachableError, and BundleError if the file is larger than any bundle."""
        try:
            self._file = FileIO(path, opener=_open_at_once)
        except FileNotFoundError:
            raise MissingError(
                f"no bundle at {path}; build it with `python -m build_kernels`, or name another file"
            ) from None
        except OSError as e:
            raise _unreachable(path, e) from e
        self._path, self._descriptor = path, self._file.fileno()
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreachableError(f"the bundle {path} cannot be read in parts, because it is no regular file")
        if status.st_size > MAX_BUNDLE_BYTES:
            raise BundleError(f"{path} is larger than {MAX_BUNDLE_BYTES} bytes, which no bundle is")
        self._size = status.st_size

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryData, (self.whole(),)  # a copy, in this process or another, has no descriptor to close

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self._size:  # before memory is taken for it
            raise _truncated(offset, length, self._size)
        file = self._descriptor
        try:
            found = os.pread(file, length, offset)
            while len(found) < length and (more := os.pread(file, length - len(found), offset + len(found))):
                found += more  # a read may give less than there is
        except OSError as e:
            raise _unreachable(self._path, e) from e
        if len(found) < length:
            raise _truncated(offset, length, offset + len(found))
        return found

    def whole(self) -> bytes:
        return self.read(0, self._size)

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Everything is here."""


def _open_at_once(name: str, flags: int) -> int:
    """Opens a file, without waiting for the other end if it is a pipe."""
    return os.open(name, flags | os.O_NONBLOCK)


def _truncated(offset: int, length: int, have: int) -> TruncatedError:
    end = offset + length
    return TruncatedError(f"the bundle, of which bytes {offset} to {end} are needed,", have, end)


def _unreachable(path: Path, error: OSError) -> UnreachableError:
    return UnreachableError(f"the bundle {path} cannot be read: {error.strerror or error}")
