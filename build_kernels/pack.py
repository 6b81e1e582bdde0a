# SPDX-License-Identifier: Apache-2.0
"""Writes a bundle: compresses the cubins, lays out the zip, and derives the manifest from what was compiled.

The same cubins, toolchain and zstandard give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import zstandard

from machete_aot import abi
from machete_aot.archive import data_offset, write_archive
from machete_aot.bundle import DICTIONARY_NAME, MANIFEST_NAME, frame_name
from machete_aot.config import ScheduleConfig, TypeConfig
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
from .helpers import Helper

NAME = "machete-aot"
COMPUTE_CAPABILITY = (9, 0)
MIN_DRIVER = 12000  # driver 525: the first that loads any cubin of ptxas 12.x, and that has cuLibraryLoadData
LEVEL = 19
DICTIONARY_CUBINS = 48  # the more, the smaller the bundle, and the longer the first kernel takes to load


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
    """The bundle's bytes and its manifest's, which are the last entry of the bundle."""
    products = sorted(products, key=lambda p: p.kernel.id)
    helpers = sorted(helpers, key=lambda h: h.helper.id)
    raw = build_dictionary({p.kernel.id: p.cubin for p in products})
    files = [(DICTIONARY_NAME, _compressor(None).compress(raw))]
    # one for all frames: it takes a second to index the dictionary, and a frame 40 ms
    compressor = _compressor(zstandard.ZstdCompressionDict(raw, dict_type=zstandard.DICT_TYPE_RAWCONTENT))
    files += [(frame_name(p.kernel.id), compressor.compress(p.cubin)) for p in products]
    files += [(frame_name(h.helper.id), compressor.compress(h.cubin)) for h in helpers]
    spans = _spans(files)
    manifest = Manifest(
        schema=SCHEMA,
        bundle=BundleInfo(NAME, release.version, release.arch),
        abi=AbiInfo(abi.ABI_VERSION, abi.PARAMETERS),
        layouts=_layouts(products),
        toolchain=release.toolchain,
        provenance=Provenance(release.source_digest),
        compat=Compat(COMPUTE_CAPABILITY, MIN_DRIVER, ELF_ABI),
        dictionary=DictionaryInfo(
            spans[0].offset, spans[0].length, spans[0].sha256, raw_size=len(raw), raw_sha256=_sha256(raw)
        ),
        kernels=tuple(_kernel(p, span) for p, span in zip(products, spans[1 : 1 + len(products)], strict=True)),
        helpers=tuple(_helper(h, span) for h, span in zip(helpers, spans[1 + len(products) :], strict=True)),
        schedules=_schedules(served(products, release.served)),
        heuristic=release.heuristic,
    )
    text = dump_manifest(manifest)
    return write_archive([*files, (MANIFEST_NAME, text)]), text


def build_dictionary(cubins: Mapping[str, bytes]) -> bytes:
    """Raw content of a few cubins for all others to refer to: evenly spaced by id, so that all families take part."""
    ids = sorted(cubins)
    count = min(DICTIONARY_CUBINS, len(ids))
    return b"".join(cubins[ids[(2 * i + 1) * len(ids) // (2 * count)]] for i in range(count))


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


def _compressor(dictionary: zstandard.ZstdCompressionDict | None) -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(
        level=LEVEL, dict_data=dictionary, write_content_size=True, write_checksum=False, write_dict_id=False
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
