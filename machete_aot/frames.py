# SPDX-License-Identifier: Apache-2.0
"""The zstd frames of a bundle: their form, and decompression into no more bytes than were announced.

The manifest is such a frame too. Its digest is the frame's: what is hashed, signed and pinned is what is stored.
"""

from __future__ import annotations

import zstandard

from .errors import BundleError, CorruptError, IncompatibleError
from .manifest_rules import MAX_MANIFEST_BYTES, SCHEMA

LEVEL = 22


def compressor(dictionary: bytes | None = None) -> zstandard.ZstdCompressor:
    """Makes frames that announce their content's size, without checksum. ``dictionary``: raw content to refer to."""
    return zstandard.ZstdCompressor(
        level=LEVEL,
        dict_data=None if dictionary is None else raw_dictionary(dictionary),
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
    )


def raw_dictionary(content: bytes) -> zstandard.ZstdCompressionDict:
    """A dictionary of any bytes, as if they came before; not what zstd trains."""
    return zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def decompress(frame: bytes, size: int, what: str, dictionary: zstandard.ZstdCompressionDict | None = None) -> bytes:
    """What ``frame`` holds, which must be exactly ``size`` bytes: nothing larger is ever allocated.

    Raises CorruptError, which calls it ``what``.
    """
    try:
        announced = zstandard.frame_content_size(frame)
        if announced != size:
            raise CorruptError(what, f"a frame of {announced} bytes", f"one of {size} bytes")
        decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)
        return decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise CorruptError(what, str(e), "a zstd frame") from e


def manifest_frame(text: bytes) -> bytes:
    """A manifest as a bundle stores it."""
    return compressor().compress(text)


def manifest_text(frame: bytes) -> bytes:
    """The JSON of a stored manifest, whose digest was compared before.

    Raises BundleError if it is none, IncompatibleError if it is not compressed, as manifests were once.
    """
    if frame.startswith(b"{"):
        raise older_manifest()
    try:
        size = zstandard.frame_content_size(frame)
        if 0 <= size <= MAX_MANIFEST_BYTES:
            return decompress(frame, size, "the frame")
        problem = f"a frame of {size} bytes (-1: of any number), where {MAX_MANIFEST_BYTES} is the limit"
    except (zstandard.ZstdError, CorruptError) as e:
        problem = f"not a zstd frame: {e}"
    raise BundleError("the manifest is not valid; fetch or build the bundle again", [problem])


def older_manifest() -> IncompatibleError:
    """The error for a manifest that is not compressed."""
    return IncompatibleError(
        "the manifest is not compressed, so from an older version of machete-aot; fetch or build the bundle of this "
        f"version (schema {SCHEMA}), or install the older one"
    )
