# SPDX-License-Identifier: Apache-2.0
"""Makes PTX independent of where it was compiled: drops global variables that nothing refers to.

Headers define constants whose mangled names hold a hash of the source's path. No kernel uses them, but they would be in
the cubin, and slow its loading down. Run by ninja: ``python prune.py IN OUT``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

_GLOBAL = re.compile(
    r"^(?:\.visible |\.weak |\.extern )?\.(?:global|const)\b[^;=\[]*?([\w$]+)(?:\[\d*\])*\s*(?:=[^;]*)?;\n", re.M
)
_WORD = re.compile(r"[\w$]+")


def prune(ptx: str) -> str:
    """``ptx`` without module-level variables that are named nowhere else.

    Raises ValueError if one stays whose name depends on the source's path: the cubin would not be reproducible.
    """
    while (pruned := _drop_unreferenced(ptx)) != ptx:  # again, since what is dropped may have referred to others
        ptx = pruned
    if found := re.search(r"[\w$]*_INTERNAL_[\w$]*", ptx):
        raise ValueError(
            f"the kernel uses {found[0]}, whose name depends on the source's path: give it external linkage"
        )
    if found := re.search(r"^\.file\b.*", ptx, re.M):
        raise ValueError(f"the PTX names a source file ({found[0]}): compile without line information")
    return ptx


def _drop_unreferenced(ptx: str) -> str:
    counts = Counter(_WORD.findall(ptx))
    return _GLOBAL.sub(lambda m: "" if counts[m[1]] == 1 else m[0], ptx)


def main() -> int:
    source, target = map(Path, sys.argv[1:])
    try:
        target.write_text(prune(source.read_text()))
    except ValueError as e:
        print(f"{source}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
