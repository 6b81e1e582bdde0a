# SPDX-License-Identifier: Apache-2.0
"""Writes docs/catalogue.md: what the embedded bundle holds, as its manifest says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from machete_aot.bundle import Bundle
from machete_aot.config import BLOCK_K, UNIT_K, TileConfig, TypeConfig
from machete_aot.manifest import KernelInfo, Manifest

from .errors import BuildError
from .paths import ROOT

PAGE = ROOT / "docs" / "catalogue.md"

_HEAD = """\
# The catalogue

What the embedded bundle `{arch}` of version {version} holds, as its manifest says. `python -m build_kernels catalogue`
writes this page: edit `build_kernels/catalogue.py` and build instead. [architecture.md](architecture.md) explains tiles
and schedules.

{kernels} kernels of {types} types and {tiles} tiles; {schedules} schedules; helpers: {helpers}. "k a step" is what a
ring stage holds, "shared memory" the bytes that the largest schedule asks for, "registers" those of a thread when the
kernel starts.

"""

_BYTES = """\
## Bytes
A frame is what a kernel takes in the bundle, a cubin what it is loaded from.
"""


def render_page(bundle: Bundle) -> str:
    """The page of this bundle. It depends on the manifest and the bundle's size alone."""
    manifest = bundle.manifest
    head = _HEAD.format(
        arch=manifest.bundle.arch,
        version=manifest.bundle.version,
        kernels=len(manifest.kernels),
        types=len(manifest.types),
        tiles=len({k.tile for k in manifest.kernels}),
        schedules=len(manifest.schedules),
        helpers=len(manifest.helpers),
    )
    groups = _groups(manifest)
    parts = [_types(manifest)]
    for name in dict.fromkeys(t.family for group in groups for t in _tiles(manifest, group)):
        parts.append(f"## Family `{name}`\nA schedule's name is the tile's with one of the endings.\n")
        parts += [_family(manifest, name, group) for group in groups]
    parts += [_helpers(manifest), _BYTES]
    parts += [_bytes(manifest, group) for group in groups]
    return head + "\n".join([*parts, _totals(bundle)])


def check_page(bundle: Bundle, path: Path = PAGE) -> None:
    """Raises BuildError if the page on disk is not this bundle's."""
    if not path.is_file() or path.read_text() != render_page(bundle):
        raise BuildError(f"{path} is out of date; run `python -m build_kernels catalogue`")


def write_page(bundle: Bundle, path: Path = PAGE) -> Path:
    """Writes the page and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)  # a container build has no docs
    path.write_text(render_page(bundle))
    return path


def _groups(manifest: Manifest) -> tuple[tuple[TypeConfig, ...], ...]:
    """The types, those together that keep the same things in shared memory: their kernels have the same tiles."""
    found: dict[tuple[int, int], list[TypeConfig]] = {}
    for types in manifest.types:
        found.setdefault((types.aux_rows, types.weight_bits), []).append(types)
    return tuple(tuple(found[key]) for key in sorted(found))


def _tiles(manifest: Manifest, group: Sequence[TypeConfig]) -> tuple[TileConfig, ...]:
    """Every tile of these types, in the order of its schedules: fewest tokens first."""
    by_name = {k.tile.name: k.tile for types in group for k in manifest.kernels_for(types)}
    schedules = [s for s in manifest.schedules if any(types.name in s.types for types in group)]
    return tuple(by_name[name] for name in dict.fromkeys(s.tile for s in schedules))


def _kernels(manifest: Manifest, tile: TileConfig, group: Sequence[TypeConfig]) -> tuple[KernelInfo | None, ...]:
    """The tile's kernel of each of the types, None where there is none."""
    by_types = {k.types: k for k in manifest.kernels if k.tile == tile}
    return tuple(by_types.get(types) for types in group)


def _types(manifest: Manifest) -> str:
    rows = [
        (f"`{t.name}`", t.a, f"`{t.b}`", t.scale, t.zeros, _group_sizes(t), f"{len(manifest.kernels_for(t))}")
        for t in manifest.types
    ]
    return "## Types\n" + _table(
        ("types", "activations, output", "weights", "scales", "zero points", "group sizes", "kernels"), rows
    )


def _group_sizes(types: TypeConfig) -> str:
    return f"others of {BLOCK_K}" if types.fine else f"multiples of {UNIT_K}, one group"


def _family(manifest: Manifest, family: str, group: Sequence[TypeConfig]) -> str:
    """A line a tile. Shared memory is the dynamic one, in bytes, of the schedule that takes most."""
    head = ("tile", "rows", "tokens", "k a step", "stages", "CTAs an SM", "threads", "shared memory")
    rows = []
    for tile in (t for t in _tiles(manifest, group) if t.family == family):
        kernels = _kernels(manifest, tile, group)
        schedules = list(dict.fromkeys(s for k in kernels if k for s in manifest.schedules_of(k)))
        numbers = (tile.rows, tile.tokens, tile.step_units * UNIT_K, tile.stages, tile.ctas_per_sm, tile.threads)
        shared = max(tile.shared_memory(s.split, group[0]) for s in schedules)
        registers = [str(k.registers) if k else "-" for k in kernels]
        endings = " ".join(f"`{s.name.removeprefix(tile.name)}`" for s in schedules)
        rows.append((f"`{tile.name}`", *map(str, numbers), f"{shared:,}", *registers, endings))
    return _table((*head, *(f"registers, `{t.name}`" for t in group), "schedules"), rows)


def _helpers(manifest: Manifest) -> str:
    head = ("kernel", "threads", "registers", "frame", "cubin")
    rows = [
        (f"`{h.id}`", f"{h.threads}", f"{h.registers}", f"{h.frame.length:,}", f"{h.cubin.size:,}")
        for h in manifest.helpers
    ]
    return "## Helpers\nKernels that compute no product. Threads: the most of a CTA.\n" + _table(head, rows)


def _bytes(manifest: Manifest, group: Sequence[TypeConfig]) -> str:
    """Of each kernel its frame in the bundle, and the cubin that it decompresses to."""
    head = ["tile", *(f"{what}, `{t.name}`" for t in group for what in ("frame", "cubin"))]
    rows = []
    for tile in _tiles(manifest, group):
        kernels = _kernels(manifest, tile, group)
        pairs = [(f"{k.frame.length:,}", f"{k.cubin.size:,}") if k else ("-", "-") for k in kernels]
        rows.append((f"`{tile.name}`", *(text for pair in pairs for text in pair)))
    return _table(head, rows)


def _totals(bundle: Bundle) -> str:
    manifest = bundle.manifest
    rows = [
        ("frames", f"{sum(k.frame.length for k in manifest.compiled):,}"),
        ("cubins", f"{sum(k.cubin.size for k in manifest.compiled):,}"),
        ("dictionaries", f"{sum(d.length for d in manifest.dictionaries):,}"),
        ("bundle", f"{bundle.size:,}"),
    ]
    return "## Totals\n" + _table(("", "bytes"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"{line}\n" for line in _lines(head, rows))


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
