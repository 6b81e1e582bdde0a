# SPDX-License-Identifier: Apache-2.0
"""Shows that the embedded bundle is what the sources give: compiles kernels anew, elsewhere, and compares digests."""

from __future__ import annotations

import hashlib
import random
import tempfile
from pathlib import Path

from machete_aot.bundle import Bundle

from .catalogue import specializations
from .compile import compile_kernels
from .errors import BuildError
from .helpers import HELPERS, Target
from .release import toolchain
from .sources import source_digest


def choose(ids: list[str], sample: int | None, seed: int) -> list[str]:
    """``sample`` of the ids, chosen by the seed; all of them for None. Sorted."""
    return sorted(ids if sample is None else random.Random(seed).sample(sorted(ids), min(sample, len(ids))))


def reproduce(
    bundle: Bundle, sample: int | None, seed: int = 0, *, jobs: int | None = None, quiet: bool = False
) -> list[str]:
    """Compiles ``sample`` kernels (None: all) in a fresh folder and returns their ids. BuildError on a difference."""
    manifest = bundle.manifest
    targets: tuple[Target, ...] = (*specializations(), *HELPERS)
    catalogue = {k.id: k for k in targets}
    problems = []
    if manifest.toolchain != toolchain():
        problems.append(f"compiled with {manifest.toolchain}, this checkout wants {toolchain()}")
    have = source_digest()
    if have != manifest.provenance.source_digest:
        problems.append(f"source digest {have}, the bundle was built from {manifest.provenance.source_digest}")
    built = {k.id: k.cubin.sha256 for k in manifest.compiled}
    problems += [f"{name}: in the catalogue, not in the bundle" for name in sorted(catalogue.keys() - built.keys())]
    problems += [f"{name}: in the bundle, not in the catalogue" for name in sorted(built.keys() - catalogue.keys())]
    chosen = choose(sorted(catalogue.keys() & built.keys()), sample, seed)
    with tempfile.TemporaryDirectory(prefix="machete-aot-") as folder:
        compile_kernels([catalogue[name] for name in chosen], Path(folder), jobs=jobs, quiet=quiet)
        for name in chosen:
            digest = hashlib.sha256((Path(folder) / f"{name}.cubin").read_bytes()).hexdigest()
            if digest != built[name]:
                problems.append(f"{name}: compiled to {digest}, the bundle has {built[name]}")
    if problems:
        raise BuildError("the bundle does not follow from these sources; run `python -m build_kernels`", problems)
    return chosen
