# SPDX-License-Identifier: Apache-2.0
"""What happens to nvcc's PTX before ptxas assembles it. Run by ninja: ``python ptx.py IN OUT``.

* Global variables that nothing refers to are dropped. Headers define constants whose mangled names hold a hash of the
  source's path. No kernel uses them, but they would be in the cubin, and slow its loading down.
* The version of the PTX language is lowered to the newest that the older ptxas reads; it refuses newer ones. nvcc
  states the newest that it knows, whatever the code uses. Version 9.0 adds to 8.8 targets, pragmas and directives, none
  of which the kernels use, and changes no meaning; anything that ptxas does not know it refuses.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

NVCC_PTX_VERSION = "9.0"  # what nvcc 13.0 states
PTXAS_PTX_VERSION = "8.8"  # the newest that ptxas 12.9 reads

_VERSION = re.compile(r"^\.version[ \t]+(\S+)[ \t]*$", re.M)
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


def lower_version(ptx: str) -> str:
    """``ptx`` with the version that ptxas reads in the place of nvcc's. Raises ValueError where it has another."""
    found = _VERSION.findall(ptx)
    if found != [NVCC_PTX_VERSION]:
        raise ValueError(
            f"the PTX states version {' and '.join(found) or 'none'}, wanted {NVCC_PTX_VERSION} from nvcc, to be "
            f"lowered to {PTXAS_PTX_VERSION} for ptxas: with other tools, change both in build_kernels/ptx.py"
        )
    return _VERSION.sub(f".version {PTXAS_PTX_VERSION}", ptx)


def _drop_unreferenced(ptx: str) -> str:
    counts = Counter(_WORD.findall(ptx))
    return _GLOBAL.sub(lambda m: "" if counts[m[1]] == 1 else m[0], ptx)


def main() -> int:
    source, target = map(Path, sys.argv[1:])
    try:
        target.write_text(lower_version(prune(source.read_text())))
    except ValueError as e:
        print(f"{source}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
