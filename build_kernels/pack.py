# SPDX-License-Identifier: Apache-2.0
"""Writes a bundle: compresses the cubins, lays out the zip, and derives the manifest from what was compiled.

The same cubins, toolchain and zstandard give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from machete_aot import abi
from machete_aot.archive import data_offset, write_archive
from machete_aot.bundle import MANIFEST_NAME, dictionary_name, frame_name
from machete_aot.config import ScheduleConfig, TypeConfig
from machete_aot.frames import compressor, manifest_frame
from machete_aot.manifest import (
    AbiInfo,
    BundleInfo,
    Compat,
    CubinInfo,
    DictionaryInfo,
    FrameInfo,
    HelperInfo,
    Heuristic,
    KernelInfo,
    LayoutInfo,
    Manifest,
    Provenance,
    ScheduleInfo,
    Toolchain,
    dump_manifest,
)
from machete_aot.manifest_rules import SCHEMA

from .check import ELF_ABI, Report
from .configs import Specialization
from .dictionary import build_dictionary
from .helpers import Helper

NAME = "machete-aot"
COMPUTE_CAPABILITY = (9, 0)
MIN_DRIVER = 12000  # driver 525: the first that loads any cubin of ptxas 12.x, and that has cuLibraryLoadData


@dataclass(frozen=True)
class Product:
    """A kernel as it goes into the bundle."""

    kernel: Specialization
    report: Report
    cubin: bytes


@dataclass(frozen=True)
class HelperProduct:
    """A helper as it goes into the bundle."""

    helper: Helper
    report: Report
    cubin: bytes


@dataclass(frozen=True)
class Release:
    """Everything of the manifest that does not follow from the cubins. ``served``: schedules and their types."""

    version: str
    arch: str
    toolchain: Toolchain
    source_digest: str
    served: tuple[tuple[TypeConfig, ScheduleConfig], ...]
    heuristic: Heuristic


def write_bundle(
    products: Sequence[Product], release: Release, helpers: Sequence[HelperProduct] = ()
) -> tuple[bytes, bytes]:
    """The bundle's bytes and those of its last entry, the compressed manifest."""
    products = sorted(products, key=lambda p: p.kernel.id)
    helpers = sorted(helpers, key=lambda h: h.helper.id)
    raw = {family: build_dictionary(family, cubins) for family, cubins in _by_family(products).items()}
    # one for all frames of a family: it takes a second to index a dictionary, and a frame 40 ms
    compressors = {family: compressor(content) for family, content in raw.items()}
    alone = compressor()
    files = [(dictionary_name(family), alone.compress(content)) for family, content in raw.items()]
    files += [(frame_name(p.kernel.id), compressors[p.kernel.tile.family].compress(p.cubin)) for p in products]
    files += [(frame_name(h.helper.id), alone.compress(h.cubin)) for h in helpers]
    spans = dict(zip((name for name, _ in files), _spans(files), strict=True))
    manifest = Manifest(
        schema=SCHEMA,
        bundle=BundleInfo(NAME, release.version, release.arch),
        abi=AbiInfo(abi.ABI_VERSION, abi.PARAMETERS),
        layouts=_layouts(products),
        toolchain=release.toolchain,
        provenance=Provenance(release.source_digest),
        compat=Compat(COMPUTE_CAPABILITY, MIN_DRIVER, ELF_ABI),
        dictionaries=tuple(
            _dictionary(family, content, spans[dictionary_name(family)]) for family, content in raw.items()
        ),
        kernels=tuple(_kernel(p, spans[frame_name(p.kernel.id)]) for p in products),
        helpers=tuple(_helper(h, spans[frame_name(h.helper.id)]) for h in helpers),
        schedules=_schedules(served(products, release.served)),
        heuristic=release.heuristic,
    )
    frame = manifest_frame(dump_manifest(manifest))
    return write_archive([*files, (MANIFEST_NAME, frame)]), frame


def _by_family(products: Sequence[Product]) -> dict[str, dict[str, bytes]]:
    """The cubins of each family by their kernels' ids, families in the order of their names."""
    found: dict[str, dict[str, bytes]] = {}
    for p in sorted(products, key=lambda p: p.kernel.tile.family):
        found.setdefault(p.kernel.tile.family, {})[p.kernel.id] = p.cubin
    return found


def served(
    products: Sequence[Product], schedules: Sequence[tuple[TypeConfig, ScheduleConfig]]
) -> list[tuple[TypeConfig, ScheduleConfig]]:
    """Those of the (types, schedule) that a bundle of these kernels can run."""
    kernels = {(p.kernel.types, p.kernel.tile) for p in products}
    return [(types, schedule) for types, schedule in schedules if (types, schedule.tile) in kernels]


def _schedules(served: Sequence[tuple[TypeConfig, ScheduleConfig]]) -> tuple[ScheduleInfo, ...]:
    names: dict[ScheduleConfig, list[str]] = {}
    for types, schedule in served:
        names.setdefault(schedule, []).append(types.name)
    return tuple(ScheduleInfo(s.name, s.tile.name, s.split, s.even_ctas, tuple(found)) for s, found in names.items())


def _dictionary(family: str, raw: bytes, frame: FrameInfo) -> DictionaryInfo:
    return DictionaryInfo(family, frame.offset, frame.length, frame.sha256, len(raw), _sha256(raw))


def _kernel(product: Product, frame: FrameInfo) -> KernelInfo:
    kernel, report = product.kernel, product.report
    return KernelInfo(
        id=kernel.id,
        symbol=kernel.symbol,
        layout=kernel.layout.name,
        types=kernel.types,
        tile=kernel.tile,
        threads=kernel.tile.threads,
        registers=report.registers,
        spills=report.spills,
        static_shared_memory=report.static_shared_memory,
        frame=frame,
        cubin=CubinInfo(len(product.cubin), _sha256(product.cubin)),
    )


def _helper(product: HelperProduct, frame: FrameInfo) -> HelperInfo:
    helper, report = product.helper, product.report
    return HelperInfo(
        id=helper.id,
        symbol=helper.symbol,
        threads=helper.threads,
        registers=report.registers,
        spills=report.spills,
        static_shared_memory=report.static_shared_memory,
        frame=frame,
        cubin=CubinInfo(len(product.cubin), _sha256(product.cubin)),
    )


def _layouts(products: Sequence[Product]) -> tuple[LayoutInfo, ...]:
    found = {p.kernel.layout for p in products}
    return tuple(LayoutInfo(layout.name, layout.version) for layout in sorted(found, key=lambda x: x.name))


def _spans(files: Sequence[tuple[str, bytes]]) -> list[FrameInfo]:
    """Where the archive will hold the content of each file."""
    spans, position = [], 0
    for name, content in files:
        offset = data_offset(position, name)
        spans.append(FrameInfo(offset, len(content), _sha256(content)))
        position = offset + len(content)
    return spans


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
