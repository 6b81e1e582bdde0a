# SPDX-License-Identifier: Apache-2.0
"""Times machete_aot.gemm, with the schedule that it chooses itself, beside cuBLAS and beside the peers' figures.

    python -m benchmarks.compare --out compare.json

The peers' times of peers_h100.json are scaled by cuBLAS's time in this run over its time in that file, so that another
clock or another card does not count for or against them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

import machete_aot as machete

from .timing import Layer, alternate_us, as_lines, floor_us

ROUNDS = 9
PEERS = Path(__file__).with_name("peers_h100.json")


def compare(dtype: torch.dtype, group: int) -> list[dict[str, Any]]:
    """One row a product: ours, cuBLAS, floor, the best peer's time and name."""
    peers = json.loads(PEERS.read_text())
    rows = []
    for shape in peers["shapes"]:
        n, k = shape["n"], shape["k"]
        layer = Layer.make(n, k, group, dtype)
        for index, m in enumerate(peers["tokens"]):
            ours, cublas = alternate_us([layer.gemm_graph(m, None), layer.cublas_graph(m)], ROUNDS)
            scale = cublas / shape["us"]["cublas"][index]
            times = {name: us[index] * scale for name, us in shape["us"].items()}
            best = min(times, key=lambda name: times[name])
            row = {
                "n": n,
                "k": k,
                "m": m,
                "schedule": machete.explain(m, n, k, dtype).chosen,
                "us": round(ours, 2),
                "cublas_us": round(cublas, 2),
                "floor_us": round(floor_us(m, n, k), 2),
                "best_peer": best,
                "best_peer_us": round(times[best], 2),
            }
            rows.append(row)
            print(
                f"{n:6} x {k:6} M={m:5} {ours:9.2f} us  floor {row['floor_us']:8.2f}  cuBLAS {cublas:9.2f}  best peer "
                f"{times[best]:9.2f} {best:8} x{times[best] / ours:.2f}  {row['schedule']}",
                flush=True,
            )
        del layer
        torch.cuda.empty_cache()
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Geometric means over the shapes for each number of tokens."""
    lines = [f"{'M':>6} {'speed-up':>9} {'worst':>6} {'time / floor':>13}"]
    for m in sorted({row["m"] for row in rows}):
        of_m = [row for row in rows if row["m"] == m]
        ratios = [row["best_peer_us"] / row["us"] for row in of_m]
        floors = [row["us"] / row["floor_us"] for row in of_m]
        lines.append(f"{m:6} {_mean(ratios):9.2f} {min(ratios):6.2f} {_mean(floors):13.2f}")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--group", type=int, default=128)
    options = parser.parse_args()
    rows = compare(torch.bfloat16 if options.types == "bf16" else torch.float16, options.group)
    device = torch.cuda.get_device_properties(0)
    record = {
        "device": {"name": device.name, "sms": device.multi_processor_count},
        "torch": torch.__version__,
        "bundle": machete.fetch_bundle().manifest_sha256,
        "date": time.strftime("%Y-%m-%d"),
        "types": options.types,
        "group": options.group,
        "rows": rows,
    }
    options.out.write_text(as_lines(record))
    print(summary(rows))


if __name__ == "__main__":
    main()
