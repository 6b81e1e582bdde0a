# SPDX-License-Identifier: Apache-2.0
"""Writes docs/catalogue.md: what the embedded bundle holds, as its manifest says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from machete_aot.bundle import Bundle
from machete_aot.config import UNIT_K, TileConfig
from machete_aot.manifest import KernelInfo, Manifest

from .errors import BuildError
from .paths import ROOT

PAGE = ROOT / "docs" / "catalogue.md"

_HEAD = """\
# The catalogue

What the embedded bundle `{arch}` of version {version} holds, as its manifest says. `python -m build_kernels catalogue`
writes this page: edit `build_kernels/catalogue.py` and build instead. [architecture.md](architecture.md) explains tiles
and schedules.

{kernels} kernels of {types} types and {tiles} tiles; {schedules} schedules. "k a step" is what a ring stage holds,
"shared memory" the bytes that the largest schedule asks for, "registers" those of a thread when the kernel starts.

"""

_BYTES = """\
## Bytes
A frame is what a kernel takes in the bundle, a cubin what it decompresses to. The dictionary is made of a few cubins,
whose own frames only refer to it.

"""


def render_page(bundle: Bundle) -> str:
    """The page of this bundle. It depends on the manifest and the bundle's size alone."""
    manifest = bundle.manifest
    tiles = _tiles(manifest)
    head = _HEAD.format(
        arch=manifest.bundle.arch,
        version=manifest.bundle.version,
        kernels=len(manifest.kernels),
        types=len(manifest.types),
        tiles=len(tiles),
        schedules=len(manifest.schedules),
    )
    parts = [_types(manifest), *(_family(manifest, name) for name in dict.fromkeys(t.family for t in tiles))]
    return head + "\n".join([*parts, _bytes(manifest), _totals(bundle)])


def check_page(bundle: Bundle, path: Path = PAGE) -> None:
    """Raises BuildError if the page on disk is not this bundle's."""
    if not path.is_file() or path.read_text() != render_page(bundle):
        raise BuildError(f"{path} is out of date; run `python -m build_kernels catalogue`")


def write_page(bundle: Bundle, path: Path = PAGE) -> Path:
    """Writes the page and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)  # a container build has no docs
    path.write_text(render_page(bundle))
    return path


def _tiles(manifest: Manifest) -> tuple[TileConfig, ...]:
    """Every tile, in the order of its schedules: fewest tokens first."""
    by_name = {k.tile.name: k.tile for k in manifest.kernels}
    return tuple(by_name[name] for name in dict.fromkeys(s.tile for s in manifest.schedules))


def _kernels(manifest: Manifest, tile: TileConfig) -> tuple[KernelInfo | None, ...]:
    """The tile's kernel of each types, None where there is none."""
    by_types = {k.types: k for k in manifest.kernels if k.tile == tile}
    return tuple(by_types.get(types) for types in manifest.types)


def _types(manifest: Manifest) -> str:
    rows = [
        (f"`{t.name}`", t.a, f"`{t.b}`", t.scale, t.zeros, f"{len(manifest.kernels_for(t))}") for t in manifest.types
    ]
    return "## Types\n" + _table(("types", "activations, output", "weights", "scales", "zero points", "kernels"), rows)


def _family(manifest: Manifest, family: str) -> str:
    """A line a tile. Shared memory is the dynamic one, in bytes, of the schedule that takes most."""
    names = [t.name for t in manifest.types]
    head = ("tile", "rows", "tokens", "k a step", "stages", "CTAs an SM", "threads", "shared memory")
    rows = []
    for tile in (t for t in _tiles(manifest) if t.family == family):
        schedules = [s for s in manifest.schedules if s.tile == tile.name]
        numbers = (tile.rows, tile.tokens, tile.step_units * UNIT_K, tile.stages, tile.ctas_per_sm, tile.threads)
        shared = max(s.shared_memory for s in schedules)
        registers = [str(k.registers) if k else "-" for k in _kernels(manifest, tile)]
        endings = " ".join(f"`{s.name.removeprefix(tile.name)}`" for s in schedules)
        rows.append((f"`{tile.name}`", *map(str, numbers), f"{shared:,}", *registers, endings))
    title = f"## Family `{family}`\nA schedule's name is the tile's with one of the endings.\n\n"
    return title + _table((*head, *(f"registers, `{n}`" for n in names), "schedules"), rows)


def _bytes(manifest: Manifest) -> str:
    """Of each kernel its frame in the bundle, and the cubin that it decompresses to."""
    head = ["tile", *(f"{what}, `{t.name}`" for t in manifest.types for what in ("frame", "cubin"))]
    rows = []
    for tile in _tiles(manifest):
        pairs = [(f"{k.frame.length:,}", f"{k.cubin.size:,}") if k else ("-", "-") for k in _kernels(manifest, tile)]
        rows.append((f"`{tile.name}`", *(text for pair in pairs for text in pair)))
    return "## Bytes\nA frame is what a kernel takes in the bundle, a cubin what it is loaded from.\n\n" + _table(
        head, rows
    )


def _totals(bundle: Bundle) -> str:
    manifest = bundle.manifest
    rows = [
        ("frames", f"{sum(k.frame.length for k in manifest.kernels):,}"),
        ("cubins", f"{sum(k.cubin.size for k in manifest.kernels):,}"),
        ("dictionary", f"{manifest.dictionary.length:,}"),
        ("bundle", f"{bundle.size:,}"),
    ]
    return "## Totals\n" + _table(("", "bytes"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"{line}\n" for line in _lines(head, rows))


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
