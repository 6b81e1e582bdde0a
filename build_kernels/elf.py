# SPDX-License-Identifier: Apache-2.0
"""Reads what the driver will read of a cubin: its ABI, its entries, their registers, parameters and launch bound."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
# The OS ABI byte that goes with an ABI version: what ptxas 12.x (7) and 13.x (8) write. NVIDIA documents neither;
# LLVM's BinaryFormat/ELF.h names 0x33 ELFOSABI_CUDA, and the versions ELFABIVERSION_CUDA_V1 and _V2.
_OSABI_CUDA = {7: 0x33, 8: 0x41}
_STO_ENTRY = 0x10  # in st_other: a kernel, as opposed to a device function
_STT_FUNC = 2
_SHT_NOBITS = 8  # a section without bytes in the file
_EM_CUDA = 190

# attributes of .nv.info sections; EIFMT_SVAL is the one format that carries data after its header
_EIFMT_SVAL = 4
_EIATTR_MAX_THREADS = 0x05
_EIATTR_FRAME_SIZE = 0x11
_EIATTR_KPARAM_INFO = 0x17
_EIATTR_REGCOUNT = 0x2F


@dataclass(frozen=True)
class Cubin:
    """``abi``: the ELF ABI version, which decides what drivers load it. ``parameters``: (offset from the first, size)
    of each; ``frame``: the largest stack frame, in bytes.
    """

    abi: int
    entries: tuple[str, ...]
    registers: int
    frame: int
    max_threads: int
    parameters: tuple[tuple[int, int], ...]


def read_cubin(data: bytes) -> Cubin:
    """Reads a cubin with one entry; with another number of entries, the rest is zero. Raises ValueError if damaged."""
    try:
        return _read(data)
    except (struct.error, IndexError, UnicodeDecodeError) as e:
        raise ValueError(f"damaged ELF: {e}") from e


def _read(data: bytes) -> Cubin:
    ident, _, machine, *_, section_at, _, _, _, _, entry_size, count, names_index = _HEADER.unpack_from(data)
    if ident[:4] != b"\x7fELF" or machine != _EM_CUDA or entry_size != _SECTION.size:
        raise ValueError("not an ELF file for CUDA")
    if _OSABI_CUDA.get(ident[8]) != ident[7]:
        raise ValueError(f"an ELF file for CUDA with OS ABI {ident[7]:#x} and ABI version {ident[8]}: not a known pair")
    headers = [_SECTION.unpack_from(data, section_at + i * _SECTION.size) for i in range(count)]
    names = _body(data, headers[names_index])
    sections = {_text(names, h[0]): _body(data, h) for h in headers if h[1] != _SHT_NOBITS}
    symbols = list(_SYMBOL.iter_unpack(sections.get(".symtab", b"")))
    entries = [i for i, s in enumerate(symbols) if s[1] & 15 == _STT_FUNC and s[2] & _STO_ENTRY]
    entry_names = tuple(_text(sections[".strtab"], symbols[i][0]) for i in entries)
    if len(entries) != 1:
        return Cubin(ident[8], entry_names, 0, 0, 0, ())

    per_symbol = [
        (attribute, *struct.unpack("<II", value))
        for attribute, value in _attributes(sections[".nv.info"])
        if attribute in (_EIATTR_REGCOUNT, _EIATTR_FRAME_SIZE)
    ]
    own = list(_attributes(sections[f".nv.info.{entry_names[0]}"]))
    bounds = [struct.unpack("<III", value) for attribute, value in own if attribute == _EIATTR_MAX_THREADS]
    return Cubin(
        abi=ident[8],
        entries=entry_names,
        registers=max((v for a, s, v in per_symbol if a == _EIATTR_REGCOUNT and s == entries[0]), default=0),
        frame=max((v for a, _, v in per_symbol if a == _EIATTR_FRAME_SIZE), default=0),
        max_threads=bounds[0][0] * bounds[0][1] * bounds[0][2] if bounds else 0,
        parameters=_parameters([value for attribute, value in own if attribute == _EIATTR_KPARAM_INFO]),
    )


def _parameters(records: list[bytes]) -> tuple[tuple[int, int], ...]:
    """(offset, size), offsets counted from the first parameter, which the compiler aligns within the constant bank."""
    found = sorted(
        (ordinal, offset, bits >> 18) for _, ordinal, offset, bits in (struct.unpack("<IHHI", r) for r in records)
    )
    return tuple((offset - found[0][1], size) for _, offset, size in found)


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(section):
        kind, attribute, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if kind == _EIFMT_SVAL:
            yield attribute, section[at : at + value]
            at += value


def _body(data: bytes, header: tuple[int, ...]) -> bytes:
    return data[header[4] : header[4] + header[5]]


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode("ascii")
