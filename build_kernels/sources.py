# SPDX-License-Identifier: Apache-2.0
"""The digest of everything that the kernels' bytes follow from, but for the toolchain."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .paths import ROOT

_FOLDERS = {"csrc/kernels": "*.*", "build_kernels/templates": "*.j2"}
_FILES = (
    *("build_kernels/catalogue.py", "build_kernels/configs.py", "build_kernels/helpers.py"),
    *("machete_aot/abi.py", "machete_aot/config.py", "machete_aot/permute_abi.py", "machete_aot/scalar_type.py"),
)


def source_files(root: Path = ROOT) -> list[str]:
    """The sources' paths relative to ``root``, sorted."""
    found = [p for folder, pattern in _FOLDERS.items() for p in (root / folder).rglob(pattern) if p.is_file()]
    return sorted([*_FILES, *(p.relative_to(root).as_posix() for p in found)])


def source_digest(root: Path = ROOT) -> str:
    """sha256 over path, length and content of every source, in order of their paths."""
    digest = hashlib.sha256()
    for name in source_files(root):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
