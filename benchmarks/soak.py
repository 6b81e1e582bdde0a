# SPDX-License-Identifier: Apache-2.0
"""A million calls over changing shapes, during which no memory may grow: ``python -m benchmarks.soak --out soak.json``.

Fifteen shapes in turn, and every 50th call has a random number of tokens: more kinds of calls than are kept
(``calls.MOST``), so that old ones go and come again. All kinds are called before memory is looked at first. What is
compared is what the process has resident, not the most that it ever had, and what is in use on the whole device, with
what the driver takes for itself; other programs there would show. 20 to 30 seconds on an H100; tests/test_loader.py
does the same on the stub driver. Exit status 1 where memory grew, or where ``--seconds`` were over before the calls.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import machete_aot as machete
from machete_aot import calls, loader

from .run_record import run_record

GROUP = 128
LAYERS = ((4096, 4096), (1000, 1096), (576, 7168))
TOKENS = (1, 7, 16, 64, 200)
MOST_TOKENS = 2000
BETWEEN = 50  # calls from one of a random number of tokens to the next
PASSES = 4  # over all kinds before memory is looked at: the order in which they are kept, and so the heap, has settled
FIGURES = 10  # parts of the run after which memory is looked at
HOST_MIB, DEVICE_MIB = 16, 0  # growth that is none: malloc has ups and downs, the device has not


class Layer:
    def __init__(self, n: int, k: int, device: str) -> None:
        codes = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, device=device)
        self.b = machete.prepack_b(codes, machete.u4b8, k=k)
        self.scales = torch.rand(-(-k // GROUP), n, device=device).to(torch.bfloat16)
        self.acts = torch.randn(MOST_TOKENS, k, device=device).to(torch.bfloat16)

    def multiply(self, m: int) -> None:
        machete.gemm(self.acts[:m], self.b, machete.u4b8, self.scales, b_group_size=GROUP)


def resident_mib() -> float:
    """Memory of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def device_mib() -> float:
    """Memory in use on the device, by whoever."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**20, 1)


def work(layers: list[Layer], choose: random.Random) -> Iterator[tuple[Layer, int]]:
    """Layers and numbers of tokens, without end."""
    for number, (m, layer) in enumerate(itertools.cycle([(m, layer) for m in TOKENS for layer in layers])):
        yield (layer, m) if number % BETWEEN else (layer, choose.randrange(1, MOST_TOKENS + 1))


def soak(count: int, seconds: float, device: str = "cuda") -> dict[str, Any]:
    """Memory over so many calls, or as many as there is time for."""
    layers = [Layer(n, k, device) for n, k in LAYERS]
    start, choose = time.perf_counter(), random.Random(0)
    kinds = list(itertools.product(layers, range(1, MOST_TOKENS + 1)))
    for _ in range(PASSES):
        choose.shuffle(kinds)
        for layer, m in kinds:
            layer.multiply(m)
    todo = work(layers, choose)
    prepared, done, host, used = time.perf_counter(), 0, [resident_mib()], [device_mib()]
    while done < count and time.perf_counter() - prepared < seconds:
        part = min(-(-count // FIGURES), count - done)
        for layer, m in itertools.islice(todo, part):
            layer.multiply(m)
        done += part
        used.append(device_mib())
        host.append(resident_mib())
    return {
        "launches": loader.status()[1],
        "calls": done,
        "kinds": {"called": len(kinds), "kept": len(calls.known)},
        "prepared_s": round(prepared - start, 1),
        "seconds": round(time.perf_counter() - prepared, 1),
        "host_mib": host,
        "device_mib": used,
        "host_growth_mib": round(host[-1] - host[0], 1),
        "device_growth_mib": round(used[-1] - used[0], 1),
    }


def problems(found: dict[str, Any], count: int) -> list[str]:
    wrong = [f"only {found['calls']} of {count} calls were made in the time"] if found["calls"] < count else []
    for what, most in (("host", HOST_MIB), ("device", DEVICE_MIB)):
        growth = found[f"{what}_growth_mib"]
        if growth > most:
            wrong.append(f"memory of the {what} grew by {growth} MiB: {found[f'{what}_mib']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=60, help="stop after about so long (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU; tests/test_loader.py does the same on the stub driver")
    found = soak(options.calls, options.seconds)
    record = {**run_record("soak"), "device": torch.cuda.get_device_name()}
    text = json.dumps({**record, **found}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    wrong = problems(found, options.calls)
    print("\n".join(wrong) or "nothing grew", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
