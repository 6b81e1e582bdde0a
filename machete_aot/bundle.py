# SPDX-License-Identifier: Apache-2.0
"""Reading a bundle: each digest is checked before what it protects is parsed.

The chain: the pinned sha256 of manifest.json, which pins the dictionary and every frame, and each cubin. The file is
read once; what was hashed is what is used.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection
from functools import cached_property
from os import PathLike
from pathlib import Path

import zstandard

from . import abi
from .archive import check_archive, last_entry
from .errors import (
    BundleError,
    CorruptError,
    IncompatibleError,
    MissingError,
    TruncatedError,
    UnreachableError,
    UntrustedError,
)
from .layout import LAYOUTS
from .manifest import KernelInfo, Manifest, parse_manifest
from .manifest_rules import MAX_BUNDLE_BYTES

MANIFEST_NAME = "manifest.json"
DICTIONARY_NAME = "dictionary"


def frame_name(kernel_id: str) -> str:
    """The name of a kernel's frame in the bundle."""
    return f"frames/{kernel_id}"


class Bundle:
    """An opened bundle: its manifest is trusted, its kernels are checked as they are read.

    ``origin`` says where it came from, ``manifest_sha256`` identifies it. Immutable, hence safe to use from threads.
    """

    def __init__(self, data: bytes, manifest: Manifest, manifest_sha256: str, origin: str) -> None:
        self._data = data
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256
        self.origin = origin

    def __repr__(self) -> str:
        info = self.manifest.bundle
        return (
            f"<Bundle {info.name} {info.version} {info.arch}, {len(self.manifest.kernels)} kernels, from {self.origin}>"
        )

    @property
    def size(self) -> int:
        """Bytes of the whole bundle."""
        return len(self._data)

    def cubin(self, kernel_id: str) -> bytes:
        """The cubin of a kernel, checked: frame digest, then decompression to the announced size, then cubin digest.

        Raises MissingError, TruncatedError or CorruptError.
        """
        kernel = self.manifest.kernel(kernel_id)
        frame = self._frame(kernel)
        dictionary = zstandard.ZstdCompressionDict(self._dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        cubin = _decompress(frame, kernel.cubin.size, f"the frame of kernel {kernel_id}", dictionary)
        _check_digest(cubin, kernel.cubin.sha256, f"the cubin of kernel {kernel_id}")
        return cubin

    def verify(self) -> list[BundleError]:
        """Checks every byte of the bundle and returns all problems; an empty list means that it is intact."""
        problems: list[BundleError] = []
        try:
            _ = self._dictionary
        except BundleError as e:
            problems.append(e)
        dictionary_ok = not problems
        for kernel in self.manifest.kernels:
            try:
                if dictionary_ok:
                    self.cubin(kernel.id)
                else:
                    self._frame(kernel)
            except BundleError as e:
                problems.append(e)
        return problems + self._structure_problems()

    def _structure_problems(self) -> list[BundleError]:
        m = self.manifest
        contents = [(DICTIONARY_NAME, m.dictionary.offset, m.dictionary.length)]
        contents += [(frame_name(k.id), k.frame.offset, k.frame.length) for k in m.kernels]
        last = last_entry(self._data, MANIFEST_NAME)
        return list(check_archive(self._data, [*contents, (MANIFEST_NAME, last.offset, last.size)]))

    @cached_property
    def _dictionary(self) -> bytes:
        info = self.manifest.dictionary
        frame = self._span(info.offset, info.length, "the dictionary")
        _check_digest(frame, info.sha256, "the dictionary's frame")
        raw = _decompress(frame, info.raw_size, "the dictionary's frame", None)
        _check_digest(raw, info.raw_sha256, "the dictionary")
        return raw

    def _frame(self, kernel: KernelInfo) -> bytes:
        what = f"the frame of kernel {kernel.id}"
        frame = self._span(kernel.frame.offset, kernel.frame.length, what)
        _check_digest(frame, kernel.frame.sha256, what)
        return frame

    def _span(self, offset: int, length: int, what: str) -> bytes:
        if offset + length > len(self._data):
            raise TruncatedError(
                f"{what} (bytes {offset} to {offset + length} of the bundle)", len(self._data), offset + length
            )
        return self._data[offset : offset + length]


def open_bundle(source: str | PathLike[str] | bytes, *, manifest_sha256: str | Collection[str]) -> Bundle:
    """Opens a bundle, given its path or its bytes, whose manifest has this sha256 (hex), or one of these.

    Raises, in this order: MissingError or UnreachableError (the file), TruncatedError or CorruptError (no intact
    manifest in it), UntrustedError (an intact one, but with another digest), SchemaTooNewError, BundleError (not
    valid), IncompatibleError (ABI or layouts that this runtime lacks). Kernels are checked when they are read.
    """
    data, origin = (source, "memory") if isinstance(source, bytes) else (_read(Path(source)), str(source))
    pins = {manifest_sha256} if isinstance(manifest_sha256, str) else set(manifest_sha256)
    entry = last_entry(data, MANIFEST_NAME)
    raw = data[entry.offset : entry.offset + entry.size]
    digest = hashlib.sha256(raw).hexdigest()
    if digest not in pins:
        if zlib.crc32(raw) != entry.crc:  # damage is not distrust
            raise CorruptError(f"the manifest of {origin}", digest, "a manifest that fits its crc32")
        wanted = ", ".join(sorted(pins)) or "none"
        raise UntrustedError(
            f"the manifest of {origin} has sha256 {digest}, trusted: {wanted}; "
            "give expected_sha256= if you trust this bundle, or use the embedded one"
        )
    manifest = parse_manifest(raw)
    _check_compatible(manifest, origin)
    return Bundle(data, manifest, digest, origin)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BUNDLE_BYTES + 1)
    except FileNotFoundError:
        raise MissingError(
            f"no bundle at {path}; build it with `python -m build_kernels`, or name another file"
        ) from None
    except OSError as e:
        raise UnreachableError(f"the bundle {path} cannot be read: {e.strerror or e}") from e
    if len(data) > MAX_BUNDLE_BYTES:
        raise BundleError(f"{path} is larger than {MAX_BUNDLE_BYTES} bytes, which no bundle is")
    return data


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


def _decompress(frame: bytes, size: int, what: str, dictionary: zstandard.ZstdCompressionDict | None) -> bytes:
    """What ``frame`` holds, which must be exactly ``size`` bytes: nothing larger is ever allocated."""
    try:
        announced = zstandard.frame_content_size(frame)
        if announced != size:
            raise CorruptError(what, f"a frame of {announced} bytes", f"one of {size} bytes")
        decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)
        return decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise CorruptError(what, str(e), "a zstd frame") from e


def _check_digest(data: bytes, want: str, what: str) -> None:
    have = hashlib.sha256(data).hexdigest()
    if have != want:
        raise CorruptError(what, have, want)
