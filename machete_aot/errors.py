# SPDX-License-Identifier: Apache-2.0
"""Every error that the package raises on purpose.

Each message says what was wanted, what was found and what to do. ``MacheteError`` is the common base, so that
``except machete_aot.MacheteError`` catches all of them and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class MacheteError(Exception):
    """Base class of all errors of this package."""


class ArgumentError(MacheteError, ValueError):
    """A tensor or an option does not fit: shape, dtype, device, layout or value."""


class UnsupportedError(MacheteError, NotImplementedError):
    """Valid arguments for which the bundle in use holds no kernel; the message lists what it does hold."""


class DeviceError(MacheteError, RuntimeError):
    """The GPU or its driver cannot run these kernels: wrong compute capability, driver too old, no driver."""


class DriverCallError(DeviceError):
    """A CUDA driver call failed. ``code`` is the CUresult, ``name`` its symbolic name, ``call`` the function."""

    def __init__(self, call: str, code: int, name: str, hint: str = "") -> None:
        self.call, self.code, self.name = call, code, name
        super().__init__(f"{call} failed with {name} ({code})" + (f": {hint}" if hint else ""))


class CaptureError(MacheteError, RuntimeError):
    """A kernel would have to be loaded while a CUDA graph is being captured, which the driver forbids."""


class BundleError(MacheteError, RuntimeError):
    """A bundle cannot be used. ``problems`` lists every violation found, not just the first."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.message, self.problems = message, tuple(problems)
        super().__init__(message)

    def __str__(self) -> str:
        return self.message + "".join(f"\n  - {p}" for p in self.problems)

    def add_problems(self, lines: Iterable[str]) -> None:
        """Appends to ``problems``: what else was tried before this error was given up on."""
        self.problems += tuple(lines)


class MissingError(BundleError):
    """The bundle, or a kernel that its manifest promises, is not there."""


class TruncatedError(BundleError):
    """Fewer bytes than announced. ``have`` and ``want`` are byte counts."""

    def __init__(self, what: str, have: int, want: int) -> None:
        self.have, self.want = have, want
        super().__init__(f"{what} is truncated: {have} bytes where {want} are wanted; fetch or build the bundle again")


class CorruptError(BundleError):
    """Bytes differ from their digest. ``have`` and ``want`` are sha256 hex digests, or short descriptions."""

    def __init__(self, what: str, have: str, want: str) -> None:
        self.have, self.want = have, want
        super().__init__(f"{what} is corrupt: found {have}, wanted {want}; fetch or build the bundle again")


class SchemaTooNewError(BundleError):
    """The manifest was written for a newer runtime. ``have`` and ``want`` are schema numbers."""

    def __init__(self, have: int, want: int) -> None:
        self.have, self.want = have, want
        super().__init__(f"manifest schema {have} is newer than this runtime reads ({want}); upgrade machete-aot")


class UntrustedError(BundleError):
    """The manifest matches no digest that this package or the caller pins."""


class UnreachableError(BundleError):
    """A bundle may be there but cannot be read: no permission, a device that fails, a server that does not answer."""


class CacheError(UnreachableError):
    """The cache's folder cannot be written: read-only, full, not a folder. The bundle itself may be fine."""


class IncompatibleError(BundleError):
    """The bundle is intact but not for this runtime: architecture, ABI or layout differ."""


class CheckpointError(MacheteError, RuntimeError):
    """A checkpoint or saved weights cannot be loaded. ``problems`` lists everything that is wrong, not just the first.

    ``missing``: names of tensors that the model needs and the checkpoint lacks; ``unexpected``: the other way round.
    """

    def __init__(
        self,
        message: str,
        problems: Sequence[str] = (),
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
    ) -> None:
        self.message, self.problems = message, tuple(problems)
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        super().__init__(message)

    def __str__(self) -> str:
        lines = [*self.problems, *(f"missing: {name}" for name in self.missing)]
        lines += [f"unexpected: {name}" for name in self.unexpected]
        return self.message + "".join(f"\n  - {line}" for line in lines)
