# SPDX-License-Identifier: Apache-2.0
"""The files of a mirror's folder: their names, and index.json, which lists them.

The index is a hint. Whatever it says, a bundle is trusted for its manifest alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .decode import decode, parse_json
from .errors import BundleError

INDEX_NAME = "index.json"
INDEX_SCHEMA = 1
MAX_INDEX_BYTES = 1 << 20

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\Z")


@dataclass(frozen=True)
class IndexEntry:
    """A bundle in a mirror: ``file`` and ``manifest`` are names in its folder, ``size`` is in bytes.

    Of an entry that was not read from an index but guessed, size is 0 and manifest_sha256 empty.
    """

    arch: str
    version: str
    file: str
    size: int
    manifest: str
    manifest_sha256: str


@dataclass(frozen=True)
class _Index:
    schema: int
    bundles: tuple[IndexEntry, ...]


def conventional_entry(arch: str, version: str, size: int = 0, manifest_sha256: str = "") -> IndexEntry:
    """The entry of a bundle under the names that ``export_bundle`` gives."""
    stem = f"machete-aot-{arch}-{version}"
    return IndexEntry(arch, version, f"{stem}.zip", size, manifest_beside(f"{stem}.zip"), manifest_sha256)


def manifest_beside(file: str) -> str:
    """The name of the manifest that belongs to a bundle's file."""
    return file.removesuffix(".zip") + ".json.zst"


def parse_index(data: bytes) -> tuple[IndexEntry, ...]:
    """The entries of an index.json. Raises BundleError with every problem; file names are plain names."""
    problems: list[str] = []
    document = parse_json(data, MAX_INDEX_BYTES, problems)
    index = decode(_Index, document, "index", problems) if not problems else None
    if isinstance(index, _Index):
        if index.schema != INDEX_SCHEMA:
            problems.append(f"schema {index.schema} is not {INDEX_SCHEMA}")
        names = [n for e in index.bundles for n in (e.file, e.manifest)]
        problems += [f"{name[:80]!r} is not a file name" for name in names if not _FILE_NAME.match(name)]
        if not problems:
            return index.bundles
    raise BundleError(f"{INDEX_NAME} is not valid; export the mirror again", problems)


def dump_index(entries: Iterable[IndexEntry]) -> bytes:
    """index.json of these entries, sorted by architecture and version."""
    ordered = sorted(entries, key=lambda e: (e.arch, version_key(e.version), e.version))
    document = {"schema": INDEX_SCHEMA, "bundles": [asdict(e) for e in ordered]}
    return json.dumps(document, indent=2, sort_keys=True).encode("ascii") + b"\n"


def version_key(version: str) -> tuple[int, ...]:
    """Orders versions by the numbers in them."""
    return tuple(int(n[:18]) for n in re.findall(r"[0-9]+", version))
