# SPDX-License-Identifier: Apache-2.0
"""The zip that a bundle is: stored entries, zeroed timestamps, no extras. Writer and strict reader side by side.

The bytes of such an archive follow from its entries' names and contents alone, so the reader compares instead of
interpreting: whatever is not what ``write_archive`` would have written is an error.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .bundle_data import BundleData
from .errors import BundleError, CorruptError, TruncatedError

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_VERSION = 20  # zip 2.0
_UNIX = 3 << 8
_DATE = 1 << 5 | 1  # 1980-01-01, the epoch of zip
_MODE = 0o100644 << 16


@dataclass(frozen=True)
class Entry:
    """One stored file: ``offset`` and ``size`` in bytes of its data, not of its header."""

    name: str
    offset: int
    size: int
    crc: int

    @property
    def local_header(self) -> bytes:
        name = self.name.encode("ascii")
        return _LOCAL.pack(_LOCAL_MAGIC, _VERSION, 0, 0, 0, _DATE, self.crc, self.size, self.size, len(name), 0) + name

    @property
    def central_header(self) -> bytes:
        name = self.name.encode("ascii")
        header = self.offset - _LOCAL.size - len(name)
        fixed = (_CENTRAL_MAGIC, _UNIX | _VERSION, _VERSION, 0, 0, 0, _DATE, self.crc, self.size, self.size, len(name))
        return _CENTRAL.pack(*fixed, 0, 0, 0, 0, _MODE, header) + name


def _tail(entries: Sequence[Entry]) -> bytes:
    """Central directory and end record of an archive of these entries."""
    directory = b"".join(e.central_header for e in entries)
    start = entries[-1].offset + entries[-1].size
    return directory + _END.pack(_END_MAGIC, 0, 0, len(entries), len(entries), len(directory), start, 0)


def write_archive(files: Iterable[tuple[str, bytes]]) -> bytes:
    """The archive of these (name, content) pairs in this order; at least one."""
    data, entries = bytearray(), []
    for name, content in files:
        entry = Entry(name, data_offset(len(data), name), len(content), zlib.crc32(content))
        data += entry.local_header + content
        entries.append(entry)
    return bytes(data) + _tail(entries)


def archive_size(files: Iterable[tuple[str, int]]) -> int:
    """Bytes of the archive of entries of these names and sizes."""
    each = _LOCAL.size + _CENTRAL.size
    return _END.size + sum(each + 2 * len(name) + size for name, size in files)


def data_offset(header_offset: int, name: str) -> int:
    """Where the data of an entry begin whose header is at ``header_offset``."""
    return header_offset + _LOCAL.size + len(name)


def last_entry(data: BundleData, name: str) -> Entry:
    """Finds the last entry, which must have this name. Reads only the end of the archive and the entry's own header.

    Raises TruncatedError if the archive ends early, CorruptError if it is anything else than ``write_archive`` writes.
    """
    row_size = _CENTRAL.size + len(name)
    row_at = data.size - row_size - _END.size
    tail = data.read(max(0, row_at), data.size - max(0, row_at))
    directory_start = _directory_start(tail, data.size)
    if directory_start is None:
        raise _damaged_end(data.read(0, data.size))
    if row_at < directory_start:
        raise CorruptError("the bundle's zip directory", "no room for an entry", f"an entry {name}")
    _, _, _, _, _, _, _, crc, _, size, *_ = _CENTRAL.unpack_from(tail)
    entry = Entry(name, directory_start - size, size, crc)
    header = entry.local_header
    if entry.offset < len(header) or tail[:row_size] != entry.central_header:
        raise CorruptError("the bundle's zip directory", "another last entry", f"{name} as the last entry, stored")
    if data.read(entry.offset - len(header), len(header)) != header:
        raise CorruptError(f"the bundle's zip header of {name}", "another header", "what its zip directory says")
    return entry


def check_archive(data: bytes, contents: Sequence[tuple[str, int, int]]) -> Iterator[BundleError]:
    """Every way in which ``data`` differs from an archive of exactly these (name, data offset, size) entries.

    Compares every byte of headers and directory, and the contents by CRC.
    """
    position, entries = 0, []
    for name, offset, size in contents:
        want = f"a stored entry {name!r} of {size} bytes at {offset}"
        entry = _entry_at(data, position)
        if entry is None:
            yield CorruptError(f"the bundle's zip header at byte {position}", "no such header", want)
            return
        if (entry.name, entry.offset, entry.size) != (name, offset, size):
            yield CorruptError(f"the bundle's zip header at byte {position}", f"another entry ({entry})", want)
            return
        position = offset + size
        crc = zlib.crc32(data[offset:position])
        if crc != entry.crc:
            yield CorruptError(f"{name} in the bundle", f"crc32 {crc:08x}", f"crc32 {entry.crc:08x}")
        entries.append(entry)
    if data[position:] != _tail(entries):
        yield CorruptError(f"the bundle's zip directory at byte {position}", "other bytes", "what the entries make")


def _directory_start(tail: bytes, archive: int) -> int | None:
    """Offset of the central directory, or None where an archive of so many bytes has no plausible end record."""
    if len(tail) < _END.size:
        return None
    magic, disk, first_disk, here, count, size, start, comment = _END.unpack(tail[-_END.size :])
    plain = (magic, disk, first_disk, comment) == (_END_MAGIC, 0, 0, 0) and here == count > 0
    return start if plain and start + size == archive - _END.size else None


def _entry_at(data: bytes, position: int) -> Entry | None:
    """The entry whose local header is at ``position``, if that is a header as ``write_archive`` makes them."""
    if position + _LOCAL.size > len(data):
        return None
    *_, crc, size, _, name_length, _ = _LOCAL.unpack_from(data, position)
    raw = data[position + _LOCAL.size : position + _LOCAL.size + name_length]
    if not raw.isascii():
        return None
    entry = Entry(raw.decode("ascii"), position + _LOCAL.size + name_length, size, crc)
    return entry if data[position : entry.offset] == entry.local_header else None


def _damaged_end(data: bytes) -> BundleError:
    """Why there is no end record: cut off, or overwritten? Walks the entries from the start to tell."""
    position, entries = 0, []
    while entry := _entry_at(data, position):
        entries.append(entry)
        position = entry.offset + entry.size
    want = position + (len(_tail(entries)) if entries else _LOCAL.size)
    rest = data[position:]
    cut_directory = _CENTRAL_MAGIC.startswith(rest[:4]) and want > len(data)
    if position > len(data) or cut_directory or _is_cut_header(rest):
        return TruncatedError("the bundle", len(data), max(want, len(data) + 1))
    return CorruptError("the end of the bundle", "no zip end record", "a bundle as build_kernels writes it")


def _is_cut_header(rest: bytes) -> bool:
    """Whether these last bytes of an archive are the beginning of a local header, and not all of it."""
    if len(rest) < _LOCAL.size:
        return rest[:4] == _LOCAL_MAGIC[: len(rest)]
    return rest[:4] == _LOCAL_MAGIC and len(rest) < _LOCAL.size + _LOCAL.unpack_from(rest)[9]
