# SPDX-License-Identifier: Apache-2.0
"""Where a bundle comes from: which sources are tried, in which order; and the bundle that this process uses.

pins.json, written by build_kernels, lists the manifest digests that this package trusts.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from .bundle import Bundle
from .cache import Cache
from .cached import open_cached
from .decode import decode, parse_json, prepare
from .errors import ArgumentError, BundleError, MissingError
from .manifest_rules import MAX_MANIFEST_BYTES
from .request import Progress, Request, Trust, first_line, most_telling
from .sources import open_file, open_folder, open_source
from .subset import Only
from .trust import configured_keys
from .version import __version__

SOURCE_VARIABLE = "MACHETE_AOT_SOURCE"
PATH_VARIABLE = "MACHETE_AOT_PATH"
OFFLINE_VARIABLE = "MACHETE_AOT_OFFLINE"
DEFAULT_ARCH = "sm90a"
PINS_SCHEMA = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z")
_log = logging.getLogger(__name__)
Source = str | os.PathLike[str]
_Opener = Callable[[Request], Bundle]


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


prepare(_PinFile)


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
    source: Source | Sequence[Source] | None = None,
    only: Only | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
    *,
    expected_sha256: str | None = None,
    keys: Sequence[str | os.PathLike[str]] | None = None,
) -> Bundle:
    """The bundle of an architecture, from the first source that has one that can be trusted and used.

    ``source``: an http(s) URL of a mirror's folder or of a .zip in it, a folder, a file, or several of them. None:
    those of MACHETE_AOT_SOURCE (separated by commas), the bundle embedded in this package, the folders in
    MACHETE_AOT_PATH, the user's cache. ``version`` None is the package's own for the embedded bundle, and any trusted
    one elsewhere.
    A manifest is trusted if its sha256 (hex) is ``expected_sha256``. Where that is None, if it is pinned by this
    package, or if one of the Ed25519 public ``keys`` (PEM files; None: MACHETE_AOT_KEYS) signs it.

    ``only``: types, schedules and (M, N, K) shapes; a URL then gives just their kernels, and others when they are
    needed. Downloads are kept in ``cache_dir`` (None: MACHETE_AOT_CACHE, or the user's cache folder, or nowhere if that
    cannot be written). ``offline`` (None: MACHETE_AOT_OFFLINE=1): URLs are answered from the cache alone.
    ``progress`` is called with the bytes so far and in all, or None.

    Sources are tried in order; ``trace`` of the result tells what became of each. If all fail, the most telling error
    is raised, with the same lines in ``problems``: MissingError, UnreachableError, TruncatedError, CorruptError,
    UntrustedError, SchemaTooNewError, IncompatibleError, CacheError or BundleError. Raises ArgumentError for wrong
    arguments.
    """
    if expected_sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", expected_sha256):
        raise ArgumentError(f"expected_sha256 is the 64 hex digits of a manifest's sha256, got {expected_sha256!r}")
    for name in filter(None, (arch, version)):
        if not _NAME.match(name):
            raise ArgumentError(f"{name!r} is not the name of an architecture or a version, such as {DEFAULT_ARCH!r}")
    own = [p for p in pins() if p.arch == arch] if expected_sha256 is None else []
    own.sort(key=lambda p: p.version != __version__)
    digests = tuple(p.manifest_sha256 for p in own) if expected_sha256 is None else (expected_sha256.lower(),)
    request = Request(
        arch=arch,
        version=version,
        versions=(version,) if version else tuple(dict.fromkeys([__version__, *(p.version for p in own)])),
        trust=Trust(digests, configured_keys(keys), digests) if expected_sha256 is None else Trust(digests),
        cache=Cache(cache_dir),
        only=only,
        offline=os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0") if offline is None else offline,
        progress=progress,
    )
    return _first(_openers(source), request)


def _openers(source: Source | Sequence[Source] | None) -> Iterator[tuple[str, _Opener]]:
    """What to try, in order: a name for the trace, and what opens it."""
    if source is not None:
        several = [source] if isinstance(source, str | os.PathLike) else source
        if not several or not all(map(os.fspath, several)):
            raise ArgumentError(f"source= names a URL, a folder, a file or several of them, got {source!r}")
        yield from (_named(one) for one in several)
        return
    named = os.environ.get(SOURCE_VARIABLE, "").split(",")
    yield from (_named(text.strip(), SOURCE_VARIABLE) for text in named if text.strip())
    yield "embedded in the package", _open_embedded
    folders = filter(None, os.environ.get(PATH_VARIABLE, "").split(os.pathsep))
    yield from ((f"{PATH_VARIABLE} {folder}", partial(open_folder, Path(folder))) for folder in folders)
    yield "the user's cache", open_cached


def _named(source: Source, variable: str = "source") -> tuple[str, _Opener]:
    text = os.fspath(source)
    if "://" not in text:
        return f"{variable} {text}", partial(open_source, source)
    from .http_client import shown_url

    return f"{variable} {shown_url(text)}", partial(open_source, source)


def _first(openers: Iterator[tuple[str, _Opener]], request: Request) -> Bundle:
    """The bundle of the first opener that has one, with its trace."""
    trace: list[str] = []
    errors: list[BundleError] = []
    for name, opener in openers:
        try:
            bundle = opener(request)
        except BundleError as error:
            errors.append(error)
            trace += [f"{name}: {note}" for note in _taken(request)]
            trace.append(f"{name}: {first_line(error)}")
        else:
            trace += [f"{name}: {note}" for note in _taken(request)]
            bundle.trace = (*trace, f"{name}: in use, {bundle.origin}")
            for failure in errors:
                if not isinstance(failure, MissingError):
                    _log.warning("%s is used instead of a source that failed: %s", bundle.origin, first_line(failure))
            return bundle
    chosen = most_telling(errors)
    chosen.add_problems(trace)
    raise chosen


def _taken(request: Request) -> list[str]:
    """The notes since the last source, and what the cache has to report; each of them once."""
    lines = [*request.notes, *request.cache.reports]
    request.notes.clear()
    request.cache.reports.clear()
    return lines


def _open_embedded(request: Request) -> Bundle:
    version = request.version or __version__
    for pin in pins():
        if (pin.arch, pin.version) == (request.arch, version):
            return open_file(_data() / pin.file, request)
    have = ", ".join(f"{p.arch} {p.version}" for p in pins()) or "none"
    raise MissingError(f"no bundle {request.arch} {version} is embedded, there are: {have}; name a file with source=")


def _data() -> Path:
    return Path(__file__).parent / "data"


# ---------------------------------------------------------------- the bundle of this process

_lock = threading.Lock()
_current: Bundle | None = None


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_renew_lock)


def default_bundle() -> Bundle:
    """The bundle that this process uses: the one given to ``use_bundle``, else ``fetch_bundle()``, opened once."""
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                _current = fetch_bundle()
    return _current


def default_is_at_hand() -> bool:
    """Whether ``default_bundle`` needs no network: no source is configured that might."""
    return _current is not None or not os.environ.get(SOURCE_VARIABLE)


def use_bundle(bundle: Bundle | None) -> None:
    """Makes this the process's bundle; None goes back to the default. Kernels that are already loaded stay loaded."""
    global _current
    if bundle is not None and not isinstance(bundle, Bundle):
        raise ArgumentError(
            f"use_bundle takes a Bundle or None, got {bundle!r}; open one with fetch_bundle(source=...)"
        )
    with _lock:
        _current = bundle
