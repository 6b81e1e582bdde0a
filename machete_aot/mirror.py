# SPDX-License-Identifier: Apache-2.0
"""Writing the folder that a mirror is: bundles, their manifests and signatures, and index.json.

A web server that serves such a folder, or a copy of it, is a complete mirror.
"""

from __future__ import annotations

import os
from pathlib import Path

from .bundle import Bundle
from .errors import BundleError, UnreachableError
from .index import INDEX_NAME, MAX_INDEX_BYTES, IndexEntry, conventional_entry, dump_index, parse_index
from .publish import publish
from .trust import SIGNATURE_SUFFIX


def export_bundle(bundle: Bundle, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes a bundle into a mirror's folder, which may hold others, and returns the paths of the files.

    The bundle is verified as a whole before. The index is written last, so that it names nothing that is not there.
    Raises what is wrong with the bundle, BundleError if the folder's index is damaged, UnreachableError if the folder
    cannot be written.
    """
    folder = Path(folder)
    content = bundle.to_bytes()
    info = bundle.manifest.bundle
    entry = conventional_entry(info.arch, info.version, len(content), bundle.manifest_sha256)
    files = {entry.file: content, entry.manifest: bundle.manifest_bytes}
    if bundle.signature is not None:
        files[entry.manifest + SIGNATURE_SUFFIX] = bundle.signature
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [e for e in _entries(folder) if (e.arch, e.version) != (entry.arch, entry.version)]
        files[INDEX_NAME] = dump_index([*others, entry])
        if bundle.signature is None:  # one that is there signs another manifest
            (folder / (entry.manifest + SIGNATURE_SUFFIX)).unlink(missing_ok=True)
        for name, data in files.items():
            publish(folder / name, data)
    except OSError as error:
        raise UnreachableError(f"the folder {folder} cannot be written: {error.strerror or error}") from error
    return [folder / name for name in files]


def _entries(folder: Path) -> tuple[IndexEntry, ...]:
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_INDEX_BYTES + 1)
    except FileNotFoundError:
        return ()
    try:
        return parse_index(data)
    except BundleError as error:
        raise BundleError(f"{path} is damaged; remove it and export every bundle again", error.problems) from None
