# SPDX-License-Identifier: Apache-2.0
"""Packs compiled kernels into the embedded bundle, and writes its manifest and its pin beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from machete_aot.fetch import PINS_SCHEMA
from machete_aot.frames import manifest_text
from machete_aot.manifest import Toolchain
from machete_aot.publish import publish
from machete_aot.version import __version__

from .catalogue import ARCH, specializations, typed_schedules
from .check import Report
from .helpers import HELPERS
from .heuristic import fitted_to, read_heuristic
from .pack import NAME, HelperProduct, Product, Release, served, write_bundle
from .paths import BUILD, DATA, MANIFESTS
from .sources import source_digest
from .toolchain import CUDA_VERSION, CUTLASS_VERSION, FLAGS, PTXAS_VERSION

BUNDLE_FILE = f"{NAME}-{ARCH}.zip"


def manifest_path(folder: Path = MANIFESTS) -> Path:
    """Where the readable copy of the embedded bundle's manifest lies."""
    return folder / f"{NAME}-{ARCH}-{__version__}.json"


def toolchain() -> Toolchain:
    """What the kernels of this checkout are compiled with, as the manifest records it."""
    return Toolchain(CUDA_VERSION, PTXAS_VERSION, CUTLASS_VERSION, FLAGS)


def release(
    reports: Mapping[str, Report],
    folder: Path = BUILD,
    *,
    allow_unfitted: bool = False,
    data: Path = DATA,
    manifests: Path = MANIFESTS,
) -> Path:
    """Writes bundle, pins.json and manifest from the checked cubins in ``folder``, and returns the bundle's path.

    Raises BuildError where a schedule has no coefficients, unless ``allow_unfitted``.
    """
    products = [Product(k, reports[k.id], (folder / f"{k.id}.cubin").read_bytes()) for k in specializations()]
    heuristic = fitted_to(read_heuristic(), served(products, typed_schedules()), allow_unfitted=allow_unfitted)
    helpers = [HelperProduct(h, reports[h.id], (folder / f"{h.id}.cubin").read_bytes()) for h in HELPERS]
    bundle, manifest = write_bundle(
        products, Release(__version__, ARCH, toolchain(), source_digest(), typed_schedules(), heuristic), helpers
    )
    data.mkdir(parents=True, exist_ok=True)
    manifests.mkdir(parents=True, exist_ok=True)
    publish(data / BUNDLE_FILE, bundle)
    publish(manifest_path(manifests), manifest_text(manifest))
    publish(data / "pins.json", _pins(manifest))
    return data / BUNDLE_FILE


def _pins(manifest: bytes) -> bytes:
    pin = {
        "arch": ARCH,
        "version": __version__,
        "file": BUNDLE_FILE,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
    return json.dumps({"schema": PINS_SCHEMA, "bundles": [pin]}, indent=2).encode() + b"\n"
