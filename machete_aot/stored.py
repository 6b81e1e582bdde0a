# SPDX-License-Identifier: Apache-2.0
"""A bundle's bytes in the user's cache, whole or in frames, and from its server what is missing or damaged there."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from .bundle import Bundle, bundle_size, frame_digests, manifest_in, structure_problems
from .bundle_data import MemoryData
from .cache import Cache, bundle_name, frame_name
from .errors import BundleError, CorruptError, MissingError, TruncatedError
from .manifest import Manifest

_GAP = 4096  # bytes between two spans that are fetched rather than asked around
Span = tuple[int, int]  # offset, length


class Server(Protocol):
    """Where a bundle's file can be downloaded from."""

    def range(self, offset: int, length: int) -> bytes | None:
        """These bytes of the file, or None if the server does not give parts of it. Raises BundleError."""

    def file(self, size: int) -> bytes:
        """The whole file, which should have this size. Raises BundleError."""


class StoredData:
    """``BundleData`` of a trusted manifest. Every frame is checked against it before it is kept or returned."""

    def __init__(self, manifest: Manifest, manifest_bytes: bytes, cache: Cache, server: Server | None) -> None:
        self._manifest, self._manifest_bytes = manifest, manifest_bytes
        self._cache, self._server = cache, server
        self._lock = threading.RLock()
        self._file_name = bundle_name(hashlib.sha256(manifest_bytes).hexdigest())
        self._digests = frame_digests(manifest)
        self._held: dict[Span, bytes] = {}
        self._damage: BundleError | None = None
        self._whole: bytes | None = None
        content = cache.get(self._file_name, lambda _: None)
        if content is not None:
            self._take(content)

    @property
    def size(self) -> int:
        return bundle_size(self._manifest, len(self._manifest_bytes))

    def whole(self) -> bytes | None:
        return self._whole

    @property
    def can_heal(self) -> bool:
        """Whether the cached file was damaged and there is a server that may have a good one."""
        return self._damage is not None and self._server is not None

    def read(self, offset: int, length: int) -> bytes:
        """One frame, from memory, the cache or the server, in this order."""
        with self._lock:
            self.fetch([(offset, length)])
            return self._held[offset, length]

    def holds(self, spans: Sequence[Span] | None = None) -> int:
        """How many of these frames (None: all) are here."""
        with self._lock:
            return sum(self._local(span) is not None for span in (self._digests if spans is None else spans))

    def fetch(self, spans: Sequence[Span]) -> None:
        """Brings frames here: those that lie close together in one request."""
        with self._lock:
            missing = sorted({span for span in spans if self._local(span) is None})
            if not missing:
                return
            if self._server is None:
                raise self._damage or MissingError(
                    f"{len(missing)} of {len(self._digests)} parts of the bundle are not in the cache "
                    f"{self._cache.folder}, and nothing may be downloaded (offline, or opened from the cache alone)"
                )
            if self._damage or not all(self._fetch_run(self._server, run) for run in _runs(missing)):
                self.fetch_file()

    def fetch_file(self) -> None:
        """Downloads the whole file, unless it is here, and verifies all of it."""
        with self._lock:
            if self._whole is None:
                if self._server is None:
                    raise MissingError(f"the bundle is not in the cache {self._cache.folder}, and this is offline")
                self.accept(self._server.file(self.size))

    def accept(self, content: bytes) -> None:
        """Verifies a file that was downloaded and keeps it. Raises BundleError if anything in it is wrong."""
        self._check_file(content)
        for problem in Bundle(MemoryData(content), self._manifest, self._manifest_bytes, "the download").verify():
            raise problem
        self._cache.keep(self._file_name, content)
        self._whole, self._damage = content, None
        self._held.update({(offset, length): content[offset : offset + length] for offset, length in self._digests})

    def _take(self, content: bytes) -> None:
        """Keeps the frames of a cached file that are right; sets the file aside if any byte of it is wrong."""
        for (offset, length), digest in self._digests.items():
            frame = content[offset : offset + length]
            if hashlib.sha256(frame).hexdigest() == digest:
                self._held[offset, length] = frame
        try:
            self._check_file(content)
        except BundleError as error:
            self._damage = error
            self._cache.set_aside(self._file_name, error)
        else:
            self._whole = content

    def _check_file(self, content: bytes) -> None:
        """Compares all that a file holds besides the frames, and these by their crc32."""
        if len(content) < self.size:
            raise TruncatedError("the bundle", len(content), self.size)
        if len(content) > self.size or manifest_in(MemoryData(content), "the bundle") != self._manifest_bytes:
            raise CorruptError("the bundle", f"{len(content)} bytes, or another manifest", f"{self.size} bytes")
        for problem in structure_problems(self._manifest, content):
            raise problem

    def _local(self, span: Span) -> bytes | None:
        """The frame if it is here and right."""
        if span not in self._held:
            found = self._cache.get(frame_name(self._digests[span]), self._digests[span])
            if found is None:
                return None
            self._held[span] = found
        return self._held[span]

    def _fetch_run(self, server: Server, run: Sequence[Span]) -> bool:
        """Downloads neighbours in one request; False if the server gives no parts, or wrong ones."""
        start, end = run[0][0], sum(run[-1])
        content = server.range(start, end - start)
        if content is None:
            return False
        frames = {span: content[span[0] - start : sum(span) - start] for span in run}
        if any(hashlib.sha256(frame).hexdigest() != self._digests[span] for span, frame in frames.items()):
            return False
        for span, frame in frames.items():
            self._cache.keep(frame_name(self._digests[span]), frame)
            self._held[span] = frame
        return True


def _runs(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Sorted spans in groups whose members are close together."""
    run: list[Span] = []
    for span in spans:
        if run and span[0] - sum(run[-1]) > _GAP:
            yield run
            run = []
        run.append(span)
    if run:
        yield run
