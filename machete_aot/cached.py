# SPDX-License-Identifier: Apache-2.0
"""Bundles in the user's cache: which of them are trusted and wanted, and what of them is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from .bundle import Bundle, manifest_in, open_manifest
from .bundle_data import MemoryData
from .cache import bundle_name, manifest_name, signature_name
from .errors import BundleError, CorruptError, MissingError
from .frames import manifest_text
from .index import version_key
from .manifest import Manifest, parse_manifest
from .request import Request, first_line
from .stored import Server, StoredData
from .trust import signed_by

MakeServer = Callable[[Manifest, str], "Server | None"]  # of a manifest and its digest


def open_cached(request: Request) -> Bundle:
    """Opens what the user's cache holds of a wanted bundle. Raises MissingError if that is nothing."""
    bundle = ready(request, f"the cache {request.cache.folder}", lambda *_: None, signed=True, partly=True)
    if bundle is None:
        raise MissingError(f"the cache {request.cache.folder} holds no trusted bundle {request.wanted}")
    return bundle


def ready(request: Request, origin: str, server: MakeServer, *, signed: bool, partly: bool) -> Bundle | None:
    """A bundle whose wanted kernels are in the cache.

    ``signed``: also one that is trusted for its signature. ``partly``: if all kernels are wanted, some will do.
    """
    for bundle, data in cached(request, origin, server, signed=signed):
        spans = request.spans(bundle.manifest)
        held = data.holds(spans)
        some = held and partly and request.only is None
        if (held == len(spans) and not data.can_heal) or some:
            return bundle
    return None


def cached(request: Request, origin: str, server: MakeServer, *, signed: bool) -> Iterator[tuple[Bundle, StoredData]]:
    """The wanted bundles whose trusted manifest is in the cache, whatever else is there. Arguments as in ``ready``."""
    for manifest, digest, signature in _trusted_manifests(request, signed):
        try:
            bundle, data = open_stored(manifest, (digest,), request, origin, server)
        except BundleError as error:
            request.notes.append(f"{manifest_name(digest)} in the cache: {first_line(error)}")
            continue
        if request.suits(bundle.manifest):
            bundle.signature = signature
            yield bundle, data


def open_stored(
    manifest: bytes, digests: tuple[str, ...], request: Request, origin: str, server: MakeServer
) -> tuple[Bundle, StoredData]:
    """The bundle of a manifest whose frames are in the cache, or else come from the server if there is one."""
    digest = hashlib.sha256(manifest).hexdigest()
    made: list[StoredData] = []

    def data(parsed: Manifest) -> StoredData:
        made.append(StoredData(parsed, manifest, request.cache, server(parsed, digest)))
        return made[0]

    return open_manifest(manifest, data, origin, digests), made[0]


def _trusted_manifests(request: Request, signed: bool) -> Iterator[tuple[bytes, str, bytes | None]]:
    """Manifest, digest and signature: first those whose digest is trusted, then those signed, newest first."""
    for digest in request.trust.digests:
        manifest = request.cache.get(manifest_name(digest), digest) or _from_whole(request, digest)
        if manifest is not None:
            yield manifest, digest, None
    if signed and request.trust.keys:
        yield from sorted(_signed(request), key=lambda found: _version_key(found[0]), reverse=True)


def _from_whole(request: Request, digest: str) -> bytes | None:
    def check(data: bytes) -> None:
        have = hashlib.sha256(manifest_in(MemoryData(data), "the cached bundle")).hexdigest()
        if have != digest:
            raise CorruptError("the manifest of the cached bundle", have, digest)

    data = request.cache.get(bundle_name(digest), check)
    return None if data is None else manifest_in(MemoryData(data), "the cached bundle")


def _signed(request: Request) -> Iterator[tuple[bytes, str, bytes | None]]:
    for entry in request.cache.entries():
        if entry.kind != "signature" or entry.digest in request.trust.digests:
            continue
        manifest = request.cache.get(manifest_name(entry.digest), entry.digest)
        if manifest is None:
            continue
        try:
            signature = request.cache.get(signature_name(entry.digest), lambda _: None)
            trusted = signature is not None and signed_by(manifest, signature, request.trust.keys) is not None
        except CorruptError as error:
            request.cache.set_aside(entry.name, error)
            continue
        if trusted:
            yield manifest, entry.digest, signature


def _version_key(manifest: bytes) -> tuple[int, ...]:
    try:
        return version_key(parse_manifest(manifest_text(manifest)).bundle.version)
    except BundleError:
        return ()
