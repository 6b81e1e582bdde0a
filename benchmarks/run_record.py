# SPDX-License-Identifier: Apache-2.0
"""What the file of every benchmark says of its run."""

from __future__ import annotations

import shlex
import sys
import time

import torch

import machete_aot as machete


def command(benchmark: str) -> str:
    """The command that was given."""
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]])


def run_record(benchmark: str) -> dict[str, str]:
    """The command, the date, the digest of the bundle in use and torch's version."""
    return {
        "command": command(benchmark),
        "date": time.strftime("%Y-%m-%d"),
        "bundle": machete.fetch_bundle().manifest_sha256,
        "torch": torch.__version__,
    }
