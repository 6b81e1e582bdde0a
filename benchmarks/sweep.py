# SPDX-License-Identifier: Apache-2.0
"""Times every schedule over a grid of products and writes the evidence that ``benchmarks.fit`` fits the heuristic to.

python -m benchmarks.sweep --out sweep.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import machete_aot as machete

from .timing import Layer, alternate_us, as_lines

SHAPES = (
    (4096, 4096),
    (6144, 4096),
    (8192, 8192),
    (28672, 4096),
    (8192, 28672),
    (57344, 8192),
    (1024, 4096),
    (2560, 2560),
    (4096, 14336),
    (12288, 4096),
    (14336, 5120),
    (3584, 18944),
    (2048, 8192),
    (5120, 13824),
    (7168, 2048),
)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
HELD_OUT_SHAPES = ((5120, 5120), (3072, 8192), (18944, 3584))
HELD_OUT_TOKENS = (4, 24, 48, 96, 192, 384, 2048)
ROUNDS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def sweep(types: str, shapes: list[tuple[int, int]], tokens: list[int], group: int) -> list[dict[str, Any]]:
    """One row a product: {"types", "m", "n", "k", "group", "cublas_us", "us": {schedule: microseconds}}."""
    manifest = machete.fetch_bundle().manifest
    tiles = {kernel.tile.name: kernel.tile for kernel in manifest.kernels}
    rows = []
    for n, k in shapes:
        layer = Layer.make(n, k, group, DTYPES[types])
        for m in tokens:
            names = [s.name for s in manifest.schedules if tiles[s.tile].suits(m)]
            graphs = [layer.cublas_graph(m), *(layer.gemm_graph(m, name) for name in names)]
            cublas, *ours = (round(us, 3) for us in alternate_us(graphs, ROUNDS))
            times = dict(zip(names, ours, strict=True))
            best = min(times, key=lambda name: times[name])
            rows.append(
                {"types": f"{types}_u4b8", "m": m, "n": n, "k": k, "group": group, "cublas_us": cublas, "us": times}
            )
            print(f"{types} {n} x {k}  M={m}: {times[best]:.2f} us {best}, cuBLAS {cublas:.2f}", flush=True)
        del layer
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["bf16", "fp16"], choices=sorted(DTYPES))
    parser.add_argument("--held-out", action="store_true", help="the products that the fit never sees")
    parser.add_argument("--shapes", type=int, help="only the first so many shapes")
    options = parser.parse_args()
    shapes = list(HELD_OUT_SHAPES if options.held_out else SHAPES)[: options.shapes]
    tokens = list(HELD_OUT_TOKENS if options.held_out else TOKENS)
    rows = [row for types in options.types for row in sweep(types, shapes, tokens, 128)]
    device = torch.cuda.get_device_properties(0)
    bundle = machete.fetch_bundle()
    record = {
        "device": {"name": device.name, "sms": device.multi_processor_count},
        "torch": torch.__version__,
        "bundle": bundle.manifest_sha256,
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    options.out.write_text(as_lines(record))


if __name__ == "__main__":
    main()
