# SPDX-License-Identifier: Apache-2.0
"""Checks that source files carry their licence header: ``python tools/check_spdx.py [FILE ...]``, by default all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HEADER = "SPDX-License-Identifier: Apache-2.0"
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".c", ".cpp", ".hpp", ".j2", ".sh", ".toml"}
NAMES = {"Makefile", "Dockerfile"}


def is_source(path: Path) -> bool:
    return path.suffix in SUFFIXES or path.name in NAMES or path.as_posix().endswith(".ci/run")


def has_header(path: Path) -> bool:
    """Whether the header is in the first line, or in the second below a ``#!`` line."""
    lines = path.read_text(encoding="utf-8").splitlines()[:2]
    if lines and lines[0].startswith("#!"):
        lines = lines[1:]
    return bool(lines) and HEADER in lines[0]


def missing_headers(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if is_source(path) and not has_header(path)]


def repository_files(root: Path) -> list[Path]:
    """Files that git tracks or would track; generated and ignored ones are not ours to check."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in listing.split("\0") if name and (path := root / name).is_file()]


def main(arguments: list[str]) -> int:
    paths = [Path(a) for a in arguments] or repository_files(Path(__file__).resolve().parent.parent)
    missing = missing_headers(paths)
    for path in missing:
        print(f"{path}: the first line must carry '{HEADER}'", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
