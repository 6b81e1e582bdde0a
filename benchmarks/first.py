# SPDX-License-Identifier: Apache-2.0
"""What a new process pays for its first product: ``python -m benchmarks.first --out first.json``.

Each figure is the median of several new processes, in each of which torch and CUDA are started, the package is imported
and the operands are made before the clock starts; the clock stops when the GPU is done. Once the weights come from
elsewhere, so that the product opens the bundle itself, and once ``prepack_b`` has made them in the same process. The
parts of the product's time are taken during it. CPU time is this thread's: without what other programs took.

Without a GPU the driver is tests/stub/libcuda.c, which loads and launches nothing, and tensors are on the CPU: what is
measured then is all but the driver's own work. Takes a minute at most, with fewer processes if these are slow.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
M, N, K, GROUP = 16, 4096, 4096, 128
MODES = {"alone": "the product alone", "prepacked": "after prepack_b in the same process"}
LEAST = 3  # processes of each kind, however slow they are
LONGEST_S = 120  # of one process
STUB = "MACHETE_AOT_BENCH_STUB"
STREAM = 0x5EED0
# what is timed inside the product: module, name, what it is; later ones lie within earlier ones of the same column
PARTS = (
    ("product", "default_bundle", "open the bundle"),
    ("launch", "choose", "choose the schedule"),
    ("driver", "device", "describe the device"),
    ("bundle", "Bundle.cubin", "read and check the cubin"),
    ("kernel", "_load_library", "the same, and load it"),
    ("kernel", "_make_ready", "make the kernel ready"),
    ("launch", "launch", "launch"),
)


def ms(since: float) -> float:
    return (time.perf_counter() - since) * 1e3


def timed(owner: Any, name: str, what: str, taken: dict[str, float]) -> None:
    """Adds to ``taken`` what the first call of this function takes."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            taken.setdefault(what, ms(start))

    setattr(owner, name, run)


def time_parts(taken: dict[str, float]) -> None:
    import importlib

    for module, path, what in PARTS:
        owner = importlib.import_module(f"machete_aot.{module}")
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        timed(owner, name, what, taken)


def play_a_gpu(stub: str) -> None:
    """Makes CPU tensors take the way to the driver, which is the stub; cubins become what it can load."""
    import torch

    from machete_aot import driver, product

    sys.path.insert(0, str(ROOT / "tests"))
    from stub.cubin import stub_cubin, symbol_in

    library = ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
    assert library.stub_set(b"h100", 1) == 0
    call = driver.call

    def calling(name: str, *arguments: Any) -> Any:
        if name == "cuLibraryLoadData":
            arguments = (stub_cubin(symbol_in(arguments[0])), *arguments[1:])
        return call(name, *arguments)

    driver.call = calling
    product._current_stream = lambda index: STREAM
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    torch.Tensor.get_device = lambda tensor: 0  # type: ignore[assignment]


def child(mode: str) -> dict[str, Any]:
    """Figures of this process."""
    stub = os.environ.get(STUB)
    import torch

    device = "cpu" if stub else "cuda"
    synchronize: Callable[[], object] = (lambda: None) if stub else torch.cuda.synchronize
    torch.zeros(1, device=device)
    synchronize()
    start = time.perf_counter()
    import machete_aot as machete

    figures: dict[str, Any] = {"import": ms(start)}
    if stub:
        play_a_gpu(stub)
    words = functools.partial(torch.randint, -(2**31), 2**31, dtype=torch.int32, device=device)
    a = torch.randn(M, K, device=device).to(torch.bfloat16)
    scales = torch.rand(K // GROUP, N, device=device).to(torch.bfloat16)
    if mode == "prepacked":
        codes = words((K // machete.u4b8.per_int32, N))
        for name in ("first prepack_b", "second prepack_b"):
            start = time.perf_counter()
            b = machete.prepack_b(codes, machete.u4b8)
            synchronize()
            figures[name] = ms(start)
    else:
        b = words((N // 64, K // 64, 512))
    synchronize()

    gc.collect()  # else a pause of 1 to 2 ms falls into the product or not, as many objects as were made before
    parts: dict[str, float] = {}
    time_parts(parts)
    modules = set(sys.modules)
    for name in ("first product", "second product"):
        start, busy = time.perf_counter(), time.thread_time()
        machete.gemm(a, b, machete.u4b8, scales, b_group_size=GROUP)
        synchronize()
        figures[name], figures[f"{name}, CPU time"] = ms(start), (time.thread_time() - busy) * 1e3
    imported = sorted(set(sys.modules) - modules)
    from machete_aot import loader

    return {"ms": {**figures, **parts}, "loader": loader.status()[1], "imported": imported}


@contextlib.contextmanager
def driver_for_children() -> Iterator[tuple[str, dict[str, str]]]:
    """What it is, and the variables that make the children use it."""
    import torch

    if torch.cuda.is_available():
        yield torch.cuda.get_device_name(), {}
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from stub.harness import build

    yield "none, the stub driver", {STUB: str(build())}


def run_children(most: int, seconds: float, environment: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """What each process printed, in turns; the first round, which may compile modules, does not count."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    start = time.monotonic()
    for turn in range(most + 1):
        if turn > LEAST and time.monotonic() - start > seconds * turn / (turn + 1):
            break
        for mode, figures in found.items():
            command = [sys.executable, "-m", "benchmarks.first", "--child", mode]
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
                    timeout=LONGEST_S,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise SystemExit(f"a process with {MODES[mode]} took over {LONGEST_S} s and was stopped") from None
            if done.returncode:
                raise SystemExit(f"a process with {MODES[mode]} failed:\n{done.stderr[-4000:]}")
            if turn:
                figures.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def summary(children: list[dict[str, Any]]) -> dict[str, Any]:
    names = children[0]["ms"]
    columns = {name: [c["ms"][name] for c in children if name in c["ms"]] for name in names}
    return {
        "processes": len(children),
        "median_ms": {name: round(statistics.median(values), 3) for name, values in columns.items()},
        "imported": children[0]["imported"],  # by the products
        "first_product_ms": [round(value, 2) for value in sorted(columns["first product"])],
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.first", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--processes", type=int, default=7, help="of each kind, at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="start no more processes then (default: %(default)s)")
    parser.add_argument("--child", choices=tuple(MODES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    if options.processes < 1:
        parser.error("--processes must be at least 1")
    from .run_record import run_record

    with driver_for_children() as (device, environment):
        found = run_children(options.processes, options.seconds, environment)
    record = {
        **run_record("first"),
        "device": device,
        "python": platform.python_version(),
        "product": [M, N, K],
        "loader": found["alone"][0]["loader"],
        **{mode: summary(children) for mode, children in found.items()},
    }
    for mode, title in MODES.items():
        print(f"{title}, {record[mode]['processes']} processes, median ms:")
        for name, value in record[mode]["median_ms"].items():
            print(f"  {name:26} {value:8.2f}")
        print(f"  {'all first products':26} {' '.join(map(str, record[mode]['first_product_ms']))}")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
