# SPDX-License-Identifier: Apache-2.0
"""What the stub driver loads in the place of a cubin."""

from __future__ import annotations

import re
from collections.abc import Sequence

from machete_aot import abi

_SECTION = re.compile(rb"\0\.text\.(machete_\w+)\0")


def stub_cubin(symbol: str, parameters: Sequence[tuple[int, int]] = abi.PARAMETERS) -> bytes:
    """A kernel with these parameters. It must end in a zero byte."""
    return f"stub-cubin\n{symbol} {' '.join(f'{offset}:{size}' for offset, size in parameters)}\n\0".encode()


def symbol_in(cubin: bytes) -> str:
    """The name of the kernel in a real cubin, from that of its section of code."""
    found = _SECTION.search(cubin)
    assert found, "no kernel of this package in the cubin"
    return found[1].decode()
