# SPDX-License-Identifier: Apache-2.0
"""Where the pipeline reads and writes."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
TEMPLATES = ROOT / "build_kernels" / "templates"
HEURISTIC = ROOT / "build_kernels" / "heuristic.json"
BUILD = ROOT / "build" / "kernels"
RACECHECK = ROOT / "build" / "racecheck"
DATA = ROOT / "machete_aot" / "data"
MANIFESTS = ROOT / "manifests"
