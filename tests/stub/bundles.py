# SPDX-License-Identifier: Apache-2.0
"""Real bundles, by the real writer, whose cubins are what the stub driver reads."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from build_kernels.check import Report
from build_kernels.configs import ImplConfig
from build_kernels.helpers import HELPERS
from build_kernels.pack import HelperProduct, Product, write_bundle
from machete_aot import abi
from machete_aot.bundle import Bundle, open_bundle
from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig
from small_bundle import TYPES, release
from stub.cubin import stub_cubin

BF16, FP16 = TYPES
GENERAL = tuple(
    TypeConfig(a, b, a, zeros, fine)
    for fine in (False, True)
    for b in ("u4", "u8")
    for a, zeros in (("bf16", "float"), ("bf16", "int"), ("fp16", "any"))
)

NARROW = TileConfig("stream", 2, 1, 1, 4, 8, 5, 2)  # 128 rows, 8 tokens, steps of 256 k
WIDE = TileConfig("stream", 1, 2, 1, 2, 64, 5, 1)  # 64 rows, 64 tokens, steps of 256 k
FLAT = TileConfig("flat", 2, 1, 1, 2, 256, 3, 1)  # 128 rows, 256 tokens, steps of 128 k
SCHEDULES = (
    *(ScheduleConfig(NARROW, split) for split in (1, 2, 4)),
    *(ScheduleConfig(WIDE, split) for split in (1, 2)),
    *(ScheduleConfig(FLAT, 1), ScheduleConfig(FLAT, 0, 1)),
)


def schedule(tile: TileConfig, split: int = 1, even_ctas: int = 0) -> str:
    return ScheduleConfig(tile, split, even_ctas).name


def make_bundle(
    parameters: Sequence[tuple[int, int]] = abi.PARAMETERS,
    static_shared_memory: int = 0,
    cubin: bytes | None = None,
    general: Sequence[TypeConfig] = (),
) -> Bundle:
    """A bundle of TYPES with every tile above, and of ``general`` types, unmeasured ones, with NARROW, split 1 and 4.

    And with all helpers.

    ``cubin`` replaces all cubins.
    """
    report = Report(80, 0, static_shared_memory)
    more = ImplConfig(tuple(general), tuple(ScheduleConfig(NARROW, split) for split in (1, 4)))
    products = [
        Product(kernel, report, cubin or stub_cubin(kernel.symbol, parameters))
        for kernel in (*ImplConfig(TYPES, SCHEDULES).specializations, *more.specializations)
    ]
    helpers = [HelperProduct(h, Report(32, 0, 0), cubin or stub_cubin(h.symbol, h.parameters)) for h in HELPERS]
    plain = release(SCHEDULES)
    made = dataclasses.replace(plain, served=(*plain.served, *more.typed_schedules))
    data, manifest = write_bundle(products, made, helpers)
    return open_bundle(data, manifest_sha256=hashlib.sha256(manifest).hexdigest())
