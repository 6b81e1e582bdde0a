# SPDX-License-Identifier: Apache-2.0
"""A mirror on an http or https server: its bundles, downloaded into the user's cache and opened from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from urllib.parse import urlsplit, urlunsplit

from .bundle import Bundle, manifest_in
from .bundle_data import MemoryData
from .cache import manifest_name, signature_name
from .cached import cached, open_stored, ready
from .download import Remote
from .errors import MissingError
from .index import INDEX_NAME, MAX_INDEX_BYTES, IndexEntry, conventional_entry, manifest_beside
from .manifest import Manifest
from .manifest_rules import MAX_BUNDLE_BYTES, MAX_MANIFEST_BYTES
from .request import Request, first_good
from .sources import candidates
from .stored import StoredData
from .trust import MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX


def open_url(url: str, request: Request) -> Bundle:
    """Opens the wanted bundle of a mirror, or the one file that the URL names if that ends in .zip.

    What is in the cache is not asked for again. N processes that start together make one download: the others wait.
    Raises BundleError; offline, MissingError if the cache lacks it.
    """
    site = Site(url, request)
    bundle = site.ready()
    if bundle is None and request.offline:
        raise MissingError(
            f"{site.origin} is not asked, because this is offline, and the cache {request.cache.folder} has no trusted "
            f"bundle {request.wanted} with the kernels that are wanted"
        )
    if bundle is None:
        with request.cache.lock(f"{url} {request.wanted}"):
            bundle = site.ready() or site.download()
    return bundle


class Site:
    """One mirror, as one request sees it."""

    def __init__(self, url: str, request: Request) -> None:
        parts = urlsplit(url)
        self._file = ""
        if parts.path.endswith(".zip"):
            folder, _, self._file = parts.path.rpartition("/")
            parts = parts._replace(path=folder)
        self._request = request
        self._remote = Remote(urlunsplit(parts))
        self._bundles = Remote(urlunsplit(parts), progress=request.progress)
        self._entries: list[IndexEntry] | None = None
        self.origin = self._remote.shown(self._file)

    def ready(self) -> Bundle | None:
        """The wanted bundle, if it is in the cache. A newer signed one may be there if no version is wanted."""
        offline = self._request.offline
        signed = offline or self._request.version is not None
        return ready(self._request, self.origin, self._server, signed=signed, partly=offline)

    def download(self) -> Bundle:
        """Brings what is wanted into the cache and opens it. Raises BundleError."""
        return first_good(self._openers(), f"{self.origin} has no bundle {self._request.wanted}")

    def _openers(self) -> Iterator[Callable[[], Bundle]]:
        for bundle, data in cached(self._request, self.origin, self._server, signed=self._request.version is not None):
            yield partial(self._complete, bundle, data)
        for entry in self._candidates():
            yield partial(self._open, entry)

    def _open(self, entry: IndexEntry) -> Bundle:
        """Trusts the manifest first, and fetches nothing else if it is not trusted."""
        request, content = self._request, None
        trusted = request.trust.digests
        digest = entry.manifest_sha256 if entry.manifest_sha256 in trusted else None
        manifest = self._small(entry.manifest, MAX_MANIFEST_BYTES, digest)
        if manifest is None:
            content = self._bundles.fetch(entry.file, limit=MAX_BUNDLE_BYTES)
            manifest = manifest_in(MemoryData(content), self.origin, trusted)
        signature_file = entry.manifest + SIGNATURE_SUFFIX
        digests, signature = request.trust.digests_with(
            manifest, lambda: self._small(signature_file, MAX_SIGNATURE_BYTES)
        )
        file = _File(self._bundles, lambda: entry.file)
        bundle, data = open_stored(manifest, digests, request, self.origin, lambda *_: file)
        request.checked(bundle)
        bundle.signature = signature
        if content is not None:
            data.accept(content)
        request.cache.keep(manifest_name(bundle.manifest_sha256), manifest)
        if signature is not None:
            request.cache.keep(signature_name(bundle.manifest_sha256), signature)
        return self._complete(bundle, data)

    def _complete(self, bundle: Bundle, data: StoredData) -> Bundle:
        if self._request.only is None or data.can_heal:
            data.fetch_file()
        else:
            data.fetch(self._request.spans(bundle.manifest))
        return bundle

    def _server(self, manifest: Manifest, digest: str) -> _File | None:
        """Where a bundle's file is whose manifest was in the cache."""
        if self._request.offline:
            return None

        def name() -> str:
            listed = (e.file for e in self._candidates() if digest == e.manifest_sha256)
            info = manifest.bundle
            return self._file or next(listed, conventional_entry(info.arch, info.version).file)

        return _File(self._bundles, name)

    def _candidates(self) -> list[IndexEntry]:
        if self._file:
            return [IndexEntry("", "", self._file, 0, manifest_beside(self._file), "")]
        if self._entries is None:
            self._entries = candidates(lambda: self._small(INDEX_NAME, MAX_INDEX_BYTES), self._request)
        return self._entries

    def _small(self, name: str, limit: int, sha256: str | None = None) -> bytes | None:
        """A file beside the bundles; None if there is none."""
        try:
            return self._remote.fetch(name, limit=limit, want_sha256=sha256)
        except MissingError:
            return None


class _File:
    """A bundle's file on the server. Its name may have to be looked up, so only when it is needed."""

    def __init__(self, remote: Remote, name: Callable[[], str]) -> None:
        self._remote, self._name = remote, name

    def range(self, offset: int, length: int) -> bytes | None:
        return self._remote.fetch_range(self._name(), offset, length)

    def file(self, size: int) -> bytes:
        return self._remote.fetch(self._name(), limit=MAX_BUNDLE_BYTES, want_size=size)
