# SPDX-License-Identifier: Apache-2.0
"""Builds on several machines: which kernels a shard has, what its folder says of itself, and putting all together.

Beside the cubins and logs of its kernels a shard's folder holds ``shard-I-of-N.json``: their digests, and the sources
and the toolchain that they were made from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from machete_aot.decode import decode, parse_json
from machete_aot.manifest import Toolchain
from machete_aot.manifest_rules import MAX_MANIFEST_BYTES
from machete_aot.publish import publish

from .errors import BuildError
from .helpers import Target
from .release import toolchain
from .sources import source_digest

SCHEMA = 1
_SUFFIXES = (".cubin", ".log")  # what check and pack read of a kernel


@dataclass(frozen=True)
class Shard:
    """Shard ``number`` of ``count``; numbers begin with 1."""

    number: int
    count: int

    @property
    def file(self) -> str:
        return f"shard-{self.number}-of-{self.count}.json"

    def choose(self, kernels: Sequence[Target]) -> tuple[Target, ...]:
        """Every ``count``-th kernel in the order of ids. Raises BuildError if there are fewer kernels than shards."""
        if self.count > len(kernels):
            raise BuildError(f"{self.count} shards of {len(kernels)} kernels; give at most {len(kernels)}")
        return tuple(sorted(kernels, key=lambda k: k.id)[self.number - 1 :: self.count])


@dataclass(frozen=True)
class Listing:
    """A shard's file. ``files``: sha256 by file name, ``<id>.cubin`` and ``<id>.log`` of each of its kernels."""

    schema: int
    shard: Shard
    source_digest: str
    toolchain: Toolchain
    files: Mapping[str, str]


def parse_shard(text: str) -> Shard:
    """Reads "I/N", 1 <= I <= N. Raises ValueError."""
    found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", text)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError(f"{text!r} is not I/N with I from 1 to N")
    return Shard(int(found[1]), int(found[2]))


def forget_shard(shard: Shard, folder: Path) -> None:
    """Removes the shard's file, and those of another number of shards: what they list is about to be replaced."""
    for path in folder.glob("shard-*-of-*.json"):
        if path.name == shard.file or not path.name.endswith(f"-of-{shard.count}.json"):
            path.unlink()


def write_shard(shard: Shard, kernels: Sequence[Target], folder: Path) -> Path:
    """Writes the shard's file beside its compiled and checked ``kernels`` and returns its path."""
    names = [f"{k.id}{suffix}" for k in kernels for suffix in _SUFFIXES]
    files = {name: _sha256((folder / name).read_bytes()) for name in names}
    listing = Listing(SCHEMA, shard, source_digest(), toolchain(), files)
    publish(folder / shard.file, json.dumps(asdict(listing), indent=2, sort_keys=True).encode() + b"\n")
    return folder / shard.file


def merge_shards(folders: Sequence[Path], kernels: Sequence[Target], target: Path) -> None:
    """Copies the compiled ``kernels`` out of the shards' folders into ``target``.

    A folder may hold several shards, and a shard may be there twice. Raises BuildError that lists what is wrong: a
    folder without a shard, a missing shard, sources or a toolchain other than this checkout's, a file that is not
    what its shard lists, a kernel with two digests, one that is missing or that the catalogue lacks.
    """
    listings = [found for folder in folders for found in _listings(folder)]
    _refuse("these shards cannot be merged", _shard_problems(listings))
    contents: dict[str, bytes] = {}
    _refuse("these shards do not make a bundle", _file_problems(listings, kernels, contents))
    for name, content in contents.items():
        (target / name).write_bytes(content)


def _listings(folder: Path) -> list[tuple[Path, Listing]]:
    paths = sorted(folder.glob("shard-*-of-*.json"))
    if not paths:
        raise BuildError(f"no shard-I-of-N.json in {folder}; copy there what `python -m build_kernels --shard` left")
    return [(path, _read(path)) for path in paths]


def _read(path: Path) -> Listing:
    problems: list[str] = []
    document = parse_json(path.read_bytes(), MAX_MANIFEST_BYTES, problems)
    listing = decode(Listing, document, "shard", problems) if not problems else None
    if isinstance(listing, Listing) and not problems:
        if listing.schema == SCHEMA and listing.shard.file == path.name:
            return listing
        problems.append(f"schema {listing.schema} and {listing.shard}, wanted schema {SCHEMA} and what its name says")
    raise BuildError(f"{path} is damaged; build the shard again", problems)


def _refuse(message: str, problems: Sequence[str] | Iterator[str]) -> None:
    if found := list(problems):
        raise BuildError(message, found)


def _shard_problems(listings: Sequence[tuple[Path, Listing]]) -> Iterator[str]:
    counts = sorted({listing.shard.count for _, listing in listings})
    if len(counts) > 1:
        yield f"shards of {' and of '.join(map(str, counts))} are mixed; remove the files of one division"
    else:
        have = {listing.shard.number for _, listing in listings}
        yield from (f"shard {i} of {counts[0]} is missing" for i in range(1, counts[0] + 1) if i not in have)
    sources, tools = source_digest(), toolchain()
    for path, listing in listings:
        if listing.source_digest != sources:
            yield f"{path}: made from other sources, {listing.source_digest}; those of this checkout are {sources}"
        if listing.toolchain != tools:
            yield f"{path}: made with another toolchain, {listing.toolchain}; this checkout wants {tools}"


def _file_problems(
    listings: Sequence[tuple[Path, Listing]], kernels: Sequence[Target], contents: dict[str, bytes]
) -> Iterator[str]:
    """``contents`` receives the files that are what their shard lists, by name."""
    digests: dict[str, set[str]] = {}
    for path, listing in listings:
        for name, digest in listing.files.items():
            digests.setdefault(name, set()).add(digest)
            file = path.parent / name
            content = file.read_bytes() if file.is_file() else None
            if content is None:
                yield f"{file}: missing, though {path.name} lists it"
            elif _sha256(content) != digest:
                yield f"{file}: not the file that {path.name} lists"
            else:
                contents[name] = content
    for name, found in sorted(digests.items()):
        if len(found) > 1 and name.endswith(".cubin"):  # logs tell how long ptxas took, so they differ
            yield f"{name}: there are different ones, {' and '.join(sorted(found))}"
    wanted = {f"{k.id}{suffix}" for k in kernels for suffix in _SUFFIXES}
    yield from (f"{name}: in no shard" for name in sorted(wanted - digests.keys()))
    yield from (f"{name}: not of the catalogue" for name in sorted(digests.keys() - wanted))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
