# SPDX-License-Identifier: Apache-2.0
"""The user's cache of downloaded bundles: files named by digest, verified whenever they are read.

Correctness comes from names that say what the content must be, from fresh temporary files and from os.replace. The lock
only saves duplicate work, so it may fail or lie. Nothing is written, not even a folder, before the first ``put``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from .bundle import frame_digests, open_bundle
from .errors import ArgumentError, BundleError, CacheError, CorruptError
from .frames import manifest_text
from .manifest import parse_manifest
from .manifest_rules import MAX_BUNDLE_BYTES

CACHE_VARIABLE = "MACHETE_AOT_CACHE"
LAYOUT = "v1"
LOCK_SECONDS = 120.0

_log = logging.getLogger(__name__)
_NAME = r"(manifest|signature|bundle|frame)-([0-9a-f]{64})\.(json\.zst|sig|zip|zst)"
_ENTRY = re.compile(rf"{_NAME}\Z")
_CORRUPT = re.compile(rf"{_NAME}\.corrupt\Z")
_TEMPORARY = re.compile(rf"\.tmp-[0-9]+-[0-9a-f]{{16}}-{_NAME}\Z")
_LOCK = re.compile(r"fetch-[0-9a-f]{64}\.lock\Z")
_LITTER = (_CORRUPT, _TEMPORARY, _LOCK)


def manifest_name(manifest_sha256: str) -> str:
    """The cache's name of a manifest."""
    return f"manifest-{manifest_sha256}.json.zst"


def signature_name(manifest_sha256: str) -> str:
    """The cache's name of a manifest's detached signature."""
    return f"signature-{manifest_sha256}.sig"


def bundle_name(manifest_sha256: str) -> str:
    """The cache's name of a whole bundle, which its manifest's digest identifies."""
    return f"bundle-{manifest_sha256}.zip"


def frame_name(sha256: str) -> str:
    """The cache's name of one frame of a bundle, or of a dictionary's."""
    return f"frame-{sha256}.zst"


@dataclass(frozen=True)
class CacheEntry:
    """One file of the cache. ``kind``: manifest, signature, bundle, frame, corrupt, temporary or lock.

    ``digest`` is the one in its name, empty for the last three kinds; ``modified`` in seconds since 1970.
    """

    name: str
    kind: str
    digest: str
    size: int
    modified: float


class Cache:
    """Content-addressed files in ``<folder>/v1``. ``reports`` has a line for each file that was corrupt.

    Reports also go to the log "machete_aot.cache" as warnings.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """``folder`` None: $MACHETE_AOT_CACHE, else the user's cache folder; ``explicit`` says which it was."""
        self.explicit = folder is not None
        self._named = folder
        self.reports: list[str] = []
        self._gave_up = False

    @cached_property
    def folder(self) -> Path:
        """Where the files are."""
        return (default_folder() if self._named is None else Path(self._named)) / LAYOUT

    def get(self, name: str, check: str | Callable[[bytes], None]) -> bytes | None:
        """The content of ``name`` if it is there and right; None otherwise.

        ``check``: its sha256 (hex), or what raises a BundleError if the content is wrong. A wrong file is set aside as
        ``<name>.corrupt`` and reported; so is, without being moved, one that cannot be read.
        """
        try:
            data = self._read(name)
            if data is not None:
                _check(name, data, check)
            return data
        except BundleError as error:
            self.set_aside(name, error)
        except OSError as error:
            self._report(f"{self.folder / name} cannot be read: {error.strerror or error}")
        return None

    def put(self, name: str, data: bytes) -> None:
        """Stores verified content under its name, so that nobody ever sees half of it. Raises CacheError."""
        path = self.folder / _checked(name)
        temporary = self.folder / f".tmp-{os.getpid()}-{secrets.token_hex(8)}-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_synced(temporary, data)
            if temporary.read_bytes() != data:
                raise OSError("what was written reads back differently")
            os.replace(temporary, path)
            _sync_folder(self.folder)
        except OSError as error:
            raise CacheError(
                f"{path} cannot be written: {error.strerror or error}; free space or permissions are missing, or name "
                f"another folder with {CACHE_VARIABLE} or cache_dir="
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def keep(self, name: str, data: bytes) -> None:
        """As ``put``, but where the caller named no folder a disk that cannot be written is only reported, once."""
        if self._gave_up:
            return
        try:
            self.put(name, data)
        except CacheError as error:
            if self.explicit:
                raise
            self._gave_up = True
            self._report(f"going on without a cache: {error.message}")

    def set_aside(self, name: str, error: BundleError) -> None:
        """Renames a file that is wrong to ``<name>.corrupt`` and reports it; where that fails, only reports it."""
        path = self.folder / _checked(name)
        try:
            os.replace(path, f"{path}.corrupt")
            self._report(f"{path} was corrupt and set aside: {error.message}")
        except OSError as failure:
            self._report(f"{path} is corrupt and cannot be renamed ({failure.strerror}): {error.message}")

    @contextlib.contextmanager
    def lock(self, key: str, seconds: float = LOCK_SECONDS) -> Iterator[bool]:
        """Holds the lock of ``key``, or goes on without: yields whether it was had within ``seconds``."""
        import filelock  # 40 ms, and most processes never download

        lock = filelock.FileLock(self.folder / f"fetch-{_sha256(key.encode())}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=seconds)
        except (OSError, NotImplementedError):  # a Timeout is an OSError
            yield False
            return
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                lock.release()

    def entries(self) -> list[CacheEntry]:
        """Every file that this package made here, in the order of names. Files of other names are not looked at."""
        found = []
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self.folder)):
                kind, digest = _kind(name)
                with contextlib.suppress(OSError):
                    status = os.lstat(self.folder / name)
                    if kind:
                        found.append(CacheEntry(name, kind, digest, status.st_size, status.st_mtime))
        return found

    def check(self) -> list[tuple[str, BundleError]]:
        """Verifies every entry in full. Sets aside those that are wrong, and returns their names and errors."""
        found: list[tuple[str, BundleError]] = []

        def noting(name: str, check: str | Callable[[bytes], None]) -> Callable[[bytes], None]:
            def run(data: bytes) -> None:
                try:
                    _check(name, data, check)
                except BundleError as error:
                    found.append((name, error))
                    raise

            return run

        for entry in self.entries():
            if entry.kind in ("manifest", "frame"):
                self.get(entry.name, noting(entry.name, entry.digest))
            elif entry.kind == "bundle":
                self.get(entry.name, noting(entry.name, _bundle_check(entry.digest)))
        return found

    def prune(self, keep_newest: int) -> list[str]:
        """Removes all but the ``keep_newest`` bundles that were stored last; returns the names of removed files.

        A bundle is a manifest with its signature, its zip and its frames. Files set aside, temporary files and locks
        go too. A process that is just fetching only has to fetch again.
        """
        entries = self.entries()
        newest: dict[str, float] = {}
        for e in entries:
            if e.kind in ("manifest", "bundle"):
                newest[e.digest] = max(e.modified, newest.get(e.digest, e.modified))
        kept = set(sorted(newest, key=lambda d: (-newest[d], d))[: max(0, keep_newest)])
        frames = {f for digest in kept for f in self._frames(digest)}
        return self._remove(e.name for e in entries if e.digest not in (frames if e.kind == "frame" else kept))

    def clear(self) -> list[str]:
        """Removes every file that this package made here, and the folder if it is empty then; returns their names."""
        removed = self._remove(e.name for e in self.entries())
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        return removed

    def _report(self, line: str) -> None:
        self.reports.append(line)
        _log.warning("%s", line)

    def _frames(self, digest: str) -> list[str]:
        raw = self.get(manifest_name(digest), digest)
        try:
            manifest = parse_manifest(manifest_text(raw)) if raw is not None else None
        except BundleError:  # of another schema: its frames are not known, and are fetched again
            manifest = None
        return list(frame_digests(manifest).values()) if manifest else []

    def _remove(self, names: Iterator[str]) -> list[str]:
        removed = []
        for name in names:
            try:
                os.unlink(self.folder / name)
                removed.append(name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CacheError(f"{self.folder / name} cannot be removed: {error.strerror or error}") from error
        return removed

    def _read(self, name: str) -> bytes | None:
        try:
            with open(self.folder / _checked(name), "rb") as file:
                data = _read_at_most(file, MAX_BUNDLE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(data) > MAX_BUNDLE_BYTES:
            raise CorruptError(name, "a larger file", f"at most {MAX_BUNDLE_BYTES} bytes")
        return data


def _read_at_most(file: BinaryIO, limit: int) -> bytes:
    """The content of a file, up to ``limit`` bytes. A read takes a buffer of what it asks for, so not of the limit."""
    expected = min(os.fstat(file.fileno()).st_size + 1, limit)
    data = file.read(expected)
    return data if len(data) < expected else data + file.read(limit - expected)  # it grows, or is no ordinary file


_LITTER_KINDS = ("corrupt", "temporary", "lock")


def default_folder() -> Path:
    """$MACHETE_AOT_CACHE, else the user's cache folder as the platform has it."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_cache_dir("machete-aot"))


def _kind(name: str) -> tuple[str, str]:
    match = _ENTRY.match(name)
    if match:
        return match[1], match[2]
    for kind, pattern in zip(_LITTER_KINDS, _LITTER, strict=True):
        if pattern.match(name):
            return kind, ""
    return "", ""


def _checked(name: str) -> str:
    if not _ENTRY.match(name):
        raise ArgumentError(f"{name!r} is not a name in the cache")
    return name


def _check(name: str, data: bytes, check: str | Callable[[bytes], None]) -> None:
    if not isinstance(check, str):
        check(data)
    elif _sha256(data) != check:
        raise CorruptError(f"{name} in the cache", _sha256(data), check)


def _bundle_check(digest: str) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        problems = open_bundle(data, manifest_sha256=digest).verify()
        if problems:
            raise problems[0]

    return check


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable. Some file systems refuse to sync a folder; then a crash may only lose the new name."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
