# SPDX-License-Identifier: Apache-2.0
"""Sources on this machine: a bundle's file, a mirror's folder. And what to look for in a mirror, here or elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .bundle import Bundle, manifest_in, open_manifest
from .bundle_data import FileData
from .errors import ArgumentError, BundleError, CorruptError, UnreachableError
from .index import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    IndexEntry,
    conventional_entry,
    manifest_beside,
    parse_index,
    version_key,
)
from .request import Request, first_good, first_line
from .trust import MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX


def open_source(source: str | os.PathLike[str], request: Request) -> Bundle:
    """Opens a bundle from an http(s) URL, a folder or a file. Raises ArgumentError for another kind of URL."""
    text = os.fspath(source)
    if "://" not in text:
        path = Path(text)
        return open_folder(path, request) if path.is_dir() else open_file(path, request)
    if not text.lower().startswith(("http://", "https://")):
        kind = text.partition("://")[0]
        raise ArgumentError(f"a bundle's source is a file, a folder or an http(s) URL, got one that starts {kind}://")
    from .remote_mirror import open_url

    return open_url(text, request)


def open_file(path: Path, request: Request) -> Bundle:
    """Opens a bundle's file; its signature may lie beside it."""
    data, origin, trust = FileData(path), str(path), request.trust
    beside = path.with_name(manifest_beside(path.name) + SIGNATURE_SUFFIX)
    manifest = manifest_in(data, origin, trust.digests)
    digests, signature = trust.digests_with(manifest, lambda: _read_small(beside, MAX_SIGNATURE_BYTES))
    bundle = open_manifest(manifest, lambda _: data, origin, digests, trust.pinned)
    bundle.signature = signature
    return request.checked(bundle)


def open_folder(folder: Path, request: Request) -> Bundle:
    """Opens the bundle of a mirror's folder that is wanted. Writes nothing."""
    entries = candidates(lambda: _read_small(folder / INDEX_NAME, MAX_INDEX_BYTES), request)
    return first_good(
        (partial(open_file, folder / entry.file, request) for entry in entries),
        f"{folder} holds no bundle {request.wanted}; `machete-aot export --to` fills a folder",
    )


def candidates(read_index: Callable[[], bytes | None], request: Request) -> list[IndexEntry]:
    """What to look for in a mirror: what its index lists, trusted digests first, then newest first; then guesses."""
    listed: list[IndexEntry] = []
    try:
        index = read_index()
        listed = list(parse_index(index)) if index is not None else []
    except UnreachableError:
        raise
    except BundleError as error:
        request.notes.append(f"{INDEX_NAME} is of no use, so the usual names are tried: {first_line(error)}")
    trusted = request.trust.digests
    listed = [e for e in listed if request.arch == e.arch and request.version in (None, e.version)]
    listed.sort(key=lambda e: version_key(e.version), reverse=True)
    listed.sort(key=lambda e: trusted.index(e.manifest_sha256) if e.manifest_sha256 in trusted else len(trusted))
    guesses = [conventional_entry(request.arch, version) for version in request.versions]
    files = {e.file for e in listed}
    return listed + [e for e in guesses if e.file not in files]


def _read_small(path: Path, limit: int) -> bytes | None:
    """A file's content, or None if there is no such file. Raises UnreachableError, CorruptError if it is too large."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreachableError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise CorruptError(str(path), "a larger file", f"at most {limit} bytes")
    return data
