# SPDX-License-Identifier: Apache-2.0
"""Where a bundle comes from: the one embedded in the package, or a file; and the one that this process uses.

pins.json, written by build_kernels, lists the manifest digests that this package trusts.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from .bundle import Bundle, open_bundle
from .decode import decode, parse_json
from .errors import BundleError, IncompatibleError, MissingError, UnsupportedError
from .manifest_rules import MAX_MANIFEST_BYTES
from .version import __version__

SOURCE_VARIABLE = "MACHETE_AOT_SOURCE"
DEFAULT_ARCH = "sm90a"
PINS_SCHEMA = 1


@dataclass(frozen=True)
class Pin:
    """A bundle that this package trusts. ``file`` is its name, in the package's data if it is embedded."""

    arch: str
    version: str
    file: str
    manifest_sha256: str


@dataclass(frozen=True)
class _PinFile:
    schema: int
    bundles: tuple[Pin, ...]


@cache
def pins() -> tuple[Pin, ...]:
    """Every pinned bundle. Raises MissingError if the package holds no pins.json, BundleError if that is damaged."""
    path = _data() / "pins.json"
    problems: list[str] = []
    try:
        document = parse_json(path.read_bytes(), MAX_MANIFEST_BYTES, problems)
    except FileNotFoundError:
        raise MissingError(f"no {path}; build the bundle with `python -m build_kernels`, or install again") from None
    found = None if problems else decode(_PinFile, document, "pins", problems)
    if not isinstance(found, _PinFile) or found.schema != PINS_SCHEMA:
        raise BundleError(f"{path} is damaged; build the bundle or install again", problems)
    return found.bundles


def fetch_bundle(
    arch: str = DEFAULT_ARCH,
    version: str | None = None,
    source: str | os.PathLike[str] | None = None,
    *,
    expected_sha256: str | None = None,
) -> Bundle:
    """The bundle of an architecture: the embedded one, or the file ``source`` (or MACHETE_AOT_SOURCE).

    A file is trusted if its manifest is pinned by this package or has ``expected_sha256`` (hex, of manifest.json).
    ``version`` None is the package's own for the embedded bundle, and any pinned one for a file.
    Raises the errors of ``open_bundle``, IncompatibleError for another architecture or version than asked for, and
    UnsupportedError for a source that is not a file.
    """
    source = source if source is not None else os.environ.get(SOURCE_VARIABLE) or None
    if source is None:
        pin = _embedded_pin(arch, version or __version__)
        bundle = open_bundle(str(_data() / pin.file), manifest_sha256=expected_sha256 or pin.manifest_sha256)
    else:
        bundle = open_bundle(
            _local_path(source), manifest_sha256=expected_sha256 or [p.manifest_sha256 for p in pins()]
        )
    info = bundle.manifest.bundle
    if info.arch != arch or version not in (None, info.version):
        wanted = arch if version is None else f"{arch} {version}"
        raise IncompatibleError(
            f"{bundle.origin} is for {info.arch} {info.version}, wanted {wanted}; name another source"
        )
    return bundle


def _data() -> Path:
    return Path(str(resources.files(__package__))) / "data"


def _embedded_pin(arch: str, version: str) -> Pin:
    for pin in pins():
        if (pin.arch, pin.version) == (arch, version):
            return pin
    have = ", ".join(f"{p.arch} {p.version}" for p in pins()) or "none"
    raise MissingError(f"no bundle {arch} {version} is embedded, there are: {have}; name a file with source=")


def _local_path(source: str | os.PathLike[str]) -> Path:
    text = os.fspath(source)
    if "://" in text:
        raise UnsupportedError(f"{text}: a bundle's source is a file; download it and name the file")
    return Path(text)


# ---------------------------------------------------------------- the bundle of this process

_lock = threading.Lock()
_current: Bundle | None = None


def default_bundle() -> Bundle:
    """The bundle that this process uses: the one given to ``use_bundle``, else ``fetch_bundle()``, opened once."""
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                _current = fetch_bundle()
    return _current


def use_bundle(bundle: Bundle | None) -> None:
    """Makes this the process's bundle; None goes back to the default. Kernels that are already loaded stay loaded."""
    global _current
    with _lock:
        _current = bundle
