# SPDX-License-Identifier: Apache-2.0
"""Runs every schedule once on a small ragged product, for compute-sanitizer:

    compute-sanitizer --tool memcheck --report-api-errors no --kernel-name kns=machete python tests/gpu/sanitize.py

K is long enough that every ring stage is used again. docs/sanitizer.md has the commands and what they report.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from gpu_layers import Layer

import machete_aot as machete
from machete_aot.bundle import open_bundle
from machete_aot.config import TileConfig
from machete_aot.fetch import default_bundle


def product(tile: TileConfig, split: int) -> tuple[int, int, int]:
    """(M, N, K): two token tiles, the second with a row; two row tiles, the second with 24; a ragged end of K."""
    steps = max(split, 1) * (tile.stages + 1)  # of even shares (split 0), each is a part of a tile
    return tile.tokens + 1, tile.rows + 24, 64 * tile.step_units * steps + 72


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a folder with a bundle and pins.json, else the embedded one")
    parser.add_argument("--only", default="", help="only schedules whose name contains this")
    parser.add_argument("--types", default="bf16", choices=["bf16", "fp16"])
    options = parser.parse_args()
    if options.bundle:
        (pin,) = json.loads((options.bundle / "pins.json").read_text())["bundles"]
        machete.use_bundle(open_bundle(options.bundle / pin["file"], manifest_sha256=pin["manifest_sha256"]))
    dtype = torch.bfloat16 if options.types == "bf16" else torch.float16
    manifest = default_bundle().manifest
    tiles = {kernel.tile.name: kernel.tile for kernel in manifest.kernels}
    failures = 0
    for schedule in manifest.schedules:
        if options.only not in schedule.name:
            continue
        m, n, k = product(tiles[schedule.tile], schedule.split)
        layer = Layer(n, k, 64, dtype)
        a, bias = layer.acts(m), layer.bias()
        out = layer.gemm(a, bias=bias, schedule=schedule.name)
        error = layer.error(out, layer.expected(a, bias))
        failures += error > 1
        print(f"{schedule.name}  M={m} N={n} K={k}: error {error:.2f} of the tolerance", flush=True)
    print(f"{failures} failed")
    return failures != 0


if __name__ == "__main__":
    sys.exit(main())
