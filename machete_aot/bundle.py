# SPDX-License-Identifier: Apache-2.0
"""Reading a bundle: each digest is checked before what it protects is parsed.

The chain: the trusted sha256 of the manifest as it is stored, compressed; it pins dictionaries, frames and cubins.
Where the bytes come from is another object's job (``BundleData``); whatever it returns is hashed, and what was hashed
is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from os import PathLike
from pathlib import Path

import zstandard

from . import abi
from .archive import archive_size, check_archive, last_entry, write_archive
from .bundle_data import BundleData, FileData, MemoryData
from .errors import BundleError, CorruptError, IncompatibleError, UntrustedError
from .frames import decompress, manifest_text, older_manifest, raw_dictionary
from .layout import LAYOUTS
from .manifest import DictionaryInfo, FrameInfo, HelperInfo, KernelInfo, Manifest, parse_manifest
from .manifest_rules import MAX_MANIFEST_BYTES
from .pinned import parse_pinned

MANIFEST_NAME = "manifest.json.zst"
_OLDER_NAME = "manifest.json"  # of the last entry when manifests were not compressed
_PARSED_MANIFESTS = 8


def dictionary_name(family: str) -> str:
    """The name of the dictionary of a family in the bundle."""
    return f"dictionaries/{family}"


def frame_name(kernel_id: str) -> str:
    """The name of the frame of a kernel, or of a helper, in the bundle."""
    return f"frames/{kernel_id}"


class Bundle:
    """An opened bundle: its manifest is trusted, its kernels are checked as they are read.

    ``origin`` says where it came from, ``manifest_sha256`` identifies it, ``manifest_bytes`` is the manifest as
    it is stored and was hashed, compressed, and ``signature`` its detached signature if that is why it is trusted.
    ``trace`` has a line for each source that was considered before this one, and for this one: which, and why. Safe to
    use from threads.
    """

    def __init__(
        self, data: BundleData, manifest: Manifest, manifest_bytes: bytes, origin: str, digest: str | None = None
    ) -> None:
        """``digest``: the sha256 of ``manifest_bytes``, where it has been computed."""
        self._data = data
        self.manifest = manifest
        self.manifest_bytes = manifest_bytes
        self.manifest_sha256 = digest or hashlib.sha256(manifest_bytes).hexdigest()
        self.origin = origin
        self.signature: bytes | None = None
        self.trace: tuple[str, ...] = ()
        self._dictionaries: dict[str, zstandard.ZstdCompressionDict] = {}

    def __repr__(self) -> str:
        info = self.manifest.bundle
        return (
            f"<Bundle {info.name} {info.version} {info.arch}, {len(self.manifest.kernels)} kernels, from {self.origin}>"
        )

    @property
    def size(self) -> int:
        """Bytes of the whole bundle."""
        return self._data.size

    def fetch(self, kernel_ids: Sequence[str] | None = None) -> None:
        """Brings these kernels and helpers (None: all) to this machine, where they are not. Raises BundleError."""
        self._data.fetch(list(frame_digests(self.manifest, kernel_ids)))

    def to_bytes(self) -> bytes:
        """The bundle's file, verified; parts that are not here are fetched. Raises BundleError."""
        content = self._data.whole()
        if content is None:
            self.fetch()
            dictionaries = [(dictionary_name(d.family), self._dictionary_frame(d)) for d in self.manifest.dictionaries]
            frames = [(frame_name(k.id), self._frame(k)) for k in self.manifest.compiled]
            content = write_archive([*dictionaries, *frames, (MANIFEST_NAME, self.manifest_bytes)])
        for problem in Bundle(MemoryData(content), self.manifest, self.manifest_bytes, self.origin).verify():
            raise problem
        return content

    def cubin(self, kernel_id: str) -> bytes:
        """The cubin of a kernel or helper, checked: frame digest, decompression to the announced size, cubin digest.

        Raises MissingError, TruncatedError or CorruptError.
        """
        kernel = self.manifest.named(kernel_id)
        frame = self._frame(kernel)
        shared = self.manifest.dictionary_of(kernel)
        dictionary = None if shared is None else self.dictionary(shared)
        cubin = decompress(frame, kernel.cubin.size, f"the frame of kernel {kernel_id}", dictionary)
        _check_digest(cubin, kernel.cubin.sha256, f"the cubin of kernel {kernel_id}")
        return cubin

    def verify(self) -> list[BundleError]:
        """Checks every byte of the bundle and returns all problems; an empty list means that it is intact.

        Of a bundle that is not all here it fetches and checks every frame.
        """
        problems: list[BundleError] = []
        damaged = set()
        for shared in self.manifest.dictionaries:
            try:
                _check_digest(self._raw_dictionary(shared), shared.raw_sha256, f"the dictionary {shared.family!r}")
            except BundleError as e:
                problems.append(e)
                damaged.add(shared)
        for kernel in self.manifest.compiled:
            try:
                if self.manifest.dictionary_of(kernel) in damaged:
                    self._frame(kernel)
                else:
                    self.cubin(kernel.id)
            except BundleError as e:
                problems.append(e)
        try:
            whole = self._data.whole()
        except BundleError as e:
            return [*problems, e]
        return problems if whole is None else problems + structure_problems(self.manifest, whole)

    def dictionary(self, info: DictionaryInfo) -> zstandard.ZstdCompressionDict:
        """What the cubins of a family are compressed with, from its checked frame. Raises as ``cubin`` does.

        The digest of its content is left to ``verify``: the frame's fixes these bytes, whatever is decompressed with
        them has its own, and hashing them would take a good part of a process's first product.
        """
        found = self._dictionaries.get(info.family)
        if found is None:
            found = self._dictionaries[info.family] = raw_dictionary(self._raw_dictionary(info))
        return found

    def _raw_dictionary(self, info: DictionaryInfo) -> bytes:
        return decompress(self._dictionary_frame(info), info.raw_size, f"the dictionary {info.family!r}")

    def _dictionary_frame(self, info: DictionaryInfo) -> bytes:
        frame = self._data.read(info.offset, info.length)
        _check_digest(frame, info.sha256, f"the frame of the dictionary {info.family!r}")
        return frame

    def _frame(self, kernel: KernelInfo | HelperInfo) -> bytes:
        frame = self._data.read(kernel.frame.offset, kernel.frame.length)
        _check_digest(frame, kernel.frame.sha256, f"the frame of kernel {kernel.id}")
        return frame


def frame_digests(manifest: Manifest, kernel_ids: Iterable[str] | None = None) -> dict[tuple[int, int], str]:
    """The (offset, length) and sha256 of the frames of these kernels and helpers (None: all) and their dictionaries.

    Raises MissingError for an id that the manifest lacks.
    """
    kernels = manifest.compiled if kernel_ids is None else [manifest.named(i) for i in kernel_ids]
    needed = {manifest.dictionary_of(k) for k in kernels}
    frames: list[DictionaryInfo | FrameInfo] = [d for d in manifest.dictionaries if d in needed]
    frames += [k.frame for k in kernels]
    return {(frame.offset, frame.length): frame.sha256 for frame in frames}


def structure_problems(manifest: Manifest, content: bytes) -> list[BundleError]:
    """Every way in which a bundle's file differs from the archive that its manifest describes."""
    try:
        last = last_entry(MemoryData(content), MANIFEST_NAME)
    except BundleError as e:
        return [e]
    return list(check_archive(content, [*_frames(manifest), (MANIFEST_NAME, last.offset, last.size)]))


def bundle_size(manifest: Manifest, manifest_size: int) -> int:
    """Bytes of the whole file, as they follow from its manifest and the bytes of that."""
    return archive_size([*((name, size) for name, _, size in _frames(manifest)), (MANIFEST_NAME, manifest_size)])


def _frames(manifest: Manifest) -> list[tuple[str, int, int]]:
    """Name, offset and size of all that precedes the manifest in the file."""
    dictionaries = [(dictionary_name(d.family), d.offset, d.length) for d in manifest.dictionaries]
    return [*dictionaries, *((frame_name(k.id), k.frame.offset, k.frame.length) for k in manifest.compiled)]


def open_bundle(source: str | PathLike[str] | bytes, *, manifest_sha256: str | Collection[str]) -> Bundle:
    """Opens a bundle, given its path or its bytes, whose manifest has this sha256 (hex), or one of these.

    Raises, in this order: MissingError or UnreachableError (the file), TruncatedError or CorruptError (no intact
    manifest in it) or IncompatibleError (one of the older form), UntrustedError (an intact one, but with another
    digest), SchemaTooNewError, BundleError (not valid), IncompatibleError (schema, ABI or layouts that this runtime
    lacks). Kernels are checked when they are read.
    """
    data = MemoryData(source) if isinstance(source, bytes) else FileData(Path(source))
    origin = "memory" if isinstance(source, bytes) else str(source)
    pins = {manifest_sha256} if isinstance(manifest_sha256, str) else set(manifest_sha256)
    raw = manifest_in(data, origin, pins)
    return open_manifest(raw, lambda _: data, origin, pins)


def open_manifest(
    manifest_bytes: bytes,
    data: Callable[[Manifest], BundleData],
    origin: str,
    trusted: Collection[str],
    pinned: Collection[str] = (),
) -> Bundle:
    """The bundle of a manifest, which must have one of the ``trusted`` sha256 digests; ``data`` gives its frames.

    ``pinned``: digests of manifests that this package was built with. What they are decoded to is not checked again.
    Raises UntrustedError and what follows it in ``open_bundle``.
    """
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    if digest not in trusted:
        wanted = ", ".join(sorted(trusted)) or "none"
        raise UntrustedError(
            f"the manifest of {origin} has sha256 {digest}, trusted: {wanted}; "
            "give expected_sha256= if you trust this bundle, or use the embedded one"
        )
    manifest = _parsed_manifests.get(digest)
    if manifest is None:
        text = manifest_text(manifest_bytes)
        manifest = parse_pinned(text) if digest in pinned else parse_manifest(text)
        if len(_parsed_manifests) >= _PARSED_MANIFESTS:
            _parsed_manifests.clear()
        _parsed_manifests[digest] = manifest
    _check_compatible(manifest, origin)
    return Bundle(data(manifest), manifest, manifest_bytes, origin, digest)


# Parsing takes most of the time of opening. What the same bytes parsed to is kept by their sha256, which every opening
# computes from the bytes that it was given: no time stamp and no path decides.
_parsed_manifests: dict[str, Manifest] = {}


def manifest_in(data: BundleData, origin: str, trusted: Collection[str] = ()) -> bytes:
    """The stored manifest in a bundle, of which nothing is trusted.

    Raises TruncatedError or CorruptError, IncompatibleError if it is not compressed, UnreachableError.

    Damage is not distrust: a wrong crc32 counts only if its sha256 is not one of ``trusted``.
    """
    try:
        entry = last_entry(data, MANIFEST_NAME)
    except CorruptError:
        with contextlib.suppress(CorruptError):
            last_entry(data, _OLDER_NAME)
            raise older_manifest() from None
        raise
    if entry.size > MAX_MANIFEST_BYTES:
        raise CorruptError(f"the manifest of {origin}", f"{entry.size} bytes", f"at most {MAX_MANIFEST_BYTES} bytes")
    raw = data.read(entry.offset, entry.size)
    if zlib.crc32(raw) != entry.crc:
        digest = hashlib.sha256(raw).hexdigest()
        if digest not in trusted:
            raise CorruptError(f"the manifest of {origin}", digest, "a manifest that fits its crc32")
    return raw


def _check_compatible(manifest: Manifest, origin: str) -> None:
    problems = []
    have, want = manifest.abi, (abi.ABI_VERSION, abi.PARAMETERS)
    if (have.version, have.parameters) != want:
        problems.append(
            f"ABI {have.version} with parameters {have.parameters}, where this runtime has {want[0]} with {want[1]}"
        )
    for layout in manifest.layouts:
        known = LAYOUTS.get(layout.name)
        if known is None or known.version != layout.version:
            ours = ", ".join(f"{own.name} version {own.version}" for own in LAYOUTS.values())
            problems.append(f"layout {layout.name} version {layout.version}, where this runtime has {ours}")
    if problems:
        raise IncompatibleError(
            f"{origin} is intact, but not for this version of machete-aot; install the one it names", problems
        )


def _check_digest(data: bytes, want: str, what: str) -> None:
    have = hashlib.sha256(data).hexdigest()
    if have != want:
        raise CorruptError(what, have, want)
