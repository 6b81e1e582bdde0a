# SPDX-License-Identifier: Apache-2.0
"""Small real bundles for tests: the pipeline's writer, on bytes that look like cubins to it."""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from collections.abc import Sequence
from functools import cache

from build_kernels.check import Report
from build_kernels.configs import ImplConfig
from build_kernels.pack import Product, Release, write_bundle
from machete_aot.archive import write_archive
from machete_aot.bundle import MANIFEST_NAME
from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig
from machete_aot.frames import manifest_frame
from machete_aot.manifest import Heuristic, HeuristicTable, Manifest, Toolchain, dump_manifest
from machete_aot.part import H100
from machete_aot.selection import COEFFICIENTS

TYPES = (TypeConfig("bf16", "u4b8", "bf16"), TypeConfig("fp16", "u4b8", "fp16"))
TILES = (TileConfig("stream", 1, 2, 1, 2, 8, 8, 2), TileConfig("flat", 2, 1, 2, 1, 128, 7, 1))
SCHEDULES = (
    *(ScheduleConfig(TILES[0], 1), ScheduleConfig(TILES[0], 2)),
    *(ScheduleConfig(TILES[1], 1), ScheduleConfig(TILES[1], 0, 1)),
)


def cubin_like(seed: int, size: int = 700) -> bytes:
    """Bytes that repeat between seeds, as cubins do, and differ in places."""
    common, own = random.Random(0), random.Random(seed)
    return bytes(own.randrange(256) if i % 16 == 0 else common.randrange(16) for i in range(size))


def products() -> list[Product]:
    kernels = ImplConfig(TYPES, SCHEDULES).specializations
    return [Product(k, Report(90, 0, 0), cubin_like(i)) for i, k in enumerate(kernels)]


def heuristic_table(coefficients: dict[str, dict[str, dict[str, float]]]) -> HeuristicTable:
    """An H100's table with these coefficients, by types and schedule, and without measured products."""
    return HeuristicTable("a test", H100.name, H100.sms, *H100.clocks(), 3e6, coefficients, measured={})


def release(schedules: Sequence[ScheduleConfig] = SCHEDULES) -> Release:
    """What a bundle of TYPES and these schedules says beside its kernels. The coefficients are measured nowhere."""
    made_up = {name: 1.5 for name in COEFFICIENTS}
    table = heuristic_table({t.name: {s.name: made_up for s in schedules} for t in TYPES})
    return Release(
        version="0.1.0",
        arch="sm90a",
        toolchain=Toolchain("13.0.88", "12.9.86", "4.2.0", ("-O3",)),
        source_digest=hashlib.sha256(b"sources").hexdigest(),
        served=tuple((types, schedule) for schedule in schedules for types in TYPES),
        heuristic=Heuristic(2, (table,)),
    )


@cache
def small_bundle() -> tuple[bytes, bytes, str]:
    """The bundle, its manifest as it is stored, and the sha256 of that."""
    data, manifest = write_bundle(products(), release())
    return data, manifest, hashlib.sha256(manifest).hexdigest()


def rewritten(manifest: Manifest | bytes, **replace: bytes) -> tuple[bytes, str]:
    """The small bundle with another manifest (bytes: its JSON) and other entries, and the new manifest's digest."""
    return with_stored(manifest_frame(manifest if isinstance(manifest, bytes) else dump_manifest(manifest)), **replace)


def with_stored(manifest: bytes, **replace: bytes) -> tuple[bytes, str]:
    """The same of a manifest as it is stored, compressed or not."""
    with zipfile.ZipFile(io.BytesIO(small_bundle()[0])) as archive:
        files = [(name, replace.get(name, archive.read(name))) for name in archive.namelist()[:-1]]
    return write_archive([*files, (MANIFEST_NAME, manifest)]), hashlib.sha256(manifest).hexdigest()
