# SPDX-License-Identifier: Apache-2.0
"""Starts ``children.py``, with the unreliable C library in front if asked to, and in a mount namespace if asked to."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TIMEOUT_S = 150


def environment(*, torch: bool = False, **variables: str) -> dict[str, str]:
    """This process's environment with the tests' folders on Python's path; by default one without torch."""
    path = os.pathsep.join(map(str, (*([] if torch else [HERE / "without_torch"]), ROOT, HERE.parent, HERE)))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **variables}


@functools.cache
def unreliable_library() -> str:
    """Compiled once; "" without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    if compiler is None:
        return ""
    out = Path(tempfile.mkdtemp(prefix="unreliable-")) / "unreliable.so"
    source = str(HERE / "unreliable.c")
    subprocess.run([compiler, "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(out), source, "-ldl"], check=True)
    return str(out)


def children(task: str, /, *, before: str = "", variables: dict[str, str] | None = None, **job: Any) -> Any:
    """The findings of ``children.py``. ``before`` is shell that runs first, as root of a mount namespace of its own."""
    command = [sys.executable, str(HERE / "children.py"), json.dumps({"task": task, **job}, default=str)]
    if before:
        command = ["unshare", "--mount", "sh", "-ec", before + '\nexec "$@"', "sh", *command]
    done = subprocess.run(
        command, env=environment(**(variables or {})), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def no_mounts() -> str:
    """Why a mount namespace with a tmpfs cannot be had here, or ''."""
    if shutil.which("unshare") is None:
        return "there is no unshare command"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"], capture_output=True, text=True
    )
    return f"mounting is not permitted: {done.stderr.strip()}" if done.returncode else ""
