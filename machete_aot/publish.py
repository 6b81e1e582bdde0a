# SPDX-License-Identifier: Apache-2.0
"""Writing a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def publish(path: Path, content: bytes) -> None:
    """Writes a file so that nobody ever sees half of it. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
