# SPDX-License-Identifier: Apache-2.0
"""What a product costs on the host: ``python -m benchmarks.launch [--json FILE] [--profile]``.

Needs no GPU. The driver is tests/stub/libcuda.c, which checks a launch and returns; tensors are on the CPU, and only
their addresses matter. Times are of one thread, the least of several runs, in microseconds a call:

* ``gemm`` in steady state, through the loader and through cuda-bindings, and with bias, out, several shapes in turn;
* its native call alone, packing included, and how much of that is the stub's own time.

What is missing against a GPU is the driver's own work, and that torch's allocator for the GPU differs from malloc.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import json
import os
import platform
import pstats
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STREAM = 0x5EED0
SHAPES = ((1, 4096, 4096), (16, 4096, 4096), (16, 6144, 4096), (64, 4096, 14336))  # M, N, K


CALLS = 20000


def microseconds(call: Callable[[], object], share: int = 1, runs: int = 7) -> float:
    """The least mean time of a call, of ``runs`` means over CALLS / ``share`` calls."""
    calls = max(1, CALLS // share)
    call()
    return min(timeit.repeat(call, number=calls, repeat=runs)) / calls * 1e6


def child(mode: str, profile: bool) -> dict[str, float]:
    """Figures of one process. ``mode``: "native" or "bindings"."""
    from stub.harness import Stub

    stub = Stub()
    import torch

    import machete_aot as machete
    from machete_aot import calls, loader, product
    from machete_aot.overlap import constants
    from stub.bundles import NARROW, make_bundle, schedule

    torch.set_num_threads(1)
    stub.set(record=0)
    machete.use_bundle(make_bundle())
    # As if the tensors were on a GPU; these take a little longer than what they replace.
    product._current_stream = lambda index: STREAM
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    torch.Tensor.get_device = lambda tensor: 0  # type: ignore[assignment]
    native = loader.active()
    assert (native is not None) == (mode == "native"), loader.status()

    def layer(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
        b = torch.zeros(n // 64, k // 64, 512, dtype=torch.int32)
        return torch.zeros(m, k).bfloat16(), b, torch.ones(k // 128, n).bfloat16()

    def gemm(tensors: tuple[torch.Tensor, ...], bias: Any = None, out: Any = None) -> Callable[[], object]:
        a, b, scales = tensors
        name = schedule(NARROW)

        return lambda: machete.gemm(a, b, machete.u4b8, scales, None, 128, bias, out, name)

    layers = [layer(*shape) for shape in SHAPES]
    several = [gemm(tensors) for tensors in layers]
    figures = {"gemm": microseconds(several[0])}
    figures["gemm, bias and out"] = microseconds(
        gemm(layers[1], torch.zeros(4096).bfloat16(), torch.zeros(16, 4096).bfloat16())
    )
    figures["gemm, four shapes in turn"] = microseconds(lambda: [call() for call in several], len(several)) / len(
        several
    )
    a, b, scales = layers[0]
    figures["torch.empty of the result"] = microseconds(
        lambda: torch.empty(1, 4096, dtype=torch.bfloat16, device=a.device)
    )
    assert constants.holds(b) and constants.holds(scales)
    if native is not None:
        figures.update(native_figures(native, stub, calls, a, b, scales))
    if profile:
        with cProfile.Profile() as profiler:
            for _ in range(CALLS):
                several[0]()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(20)
    return figures


def native_figures(native: Any, stub: Any, calls: Any, a: Any, b: Any, scales: Any) -> dict[str, float]:
    """The native call by itself, and the stub's share of it."""
    entry = next(iter(calls.known._entries.values()))
    out = a.clone()
    pack, launch, plan = calls.pack, native.launch, entry._plan_address
    kernel, context = entry._kernel_handle, entry._context
    addresses = a.data_ptr(), b.data_ptr(), scales.data_ptr(), out.data_ptr()

    def call() -> object:
        acts, weights, rows, target = addresses
        return launch(
            pack(
                calls.CALL_MAGIC, calls.CALL_BYTES, 1, 0, plan, kernel, STREAM, context, acts, weights, rows, 0, 0, 0,
                0, target, 0,
            )
        )  # fmt: skip

    assert call() == 0
    figures = {"native call": microseconds(call)}
    function = stub._library.stub_time_launches
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    figures["of which the stub"] = min(function(kernel, context, CALLS) for _ in range(7))
    figures["native call beyond the stub"] = figures["native call"] - figures["of which the stub"]
    return figures


def main() -> None:
    global CALLS
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--profile", action="store_true", help="print where gemm's time goes")
    parser.add_argument("--calls", type=int, default=CALLS, help="calls that a mean is of (default: %(default)s)")
    parser.add_argument("--mode", choices=("native", "bindings"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    CALLS = options.calls
    if options.mode:
        print(json.dumps(child(options.mode, options.profile)))
        return
    import subprocess

    sys.path.insert(0, str(ROOT / "tools"))
    import build_loader

    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = build_loader.build(Path(folder) / "libmachete_loader.so")
        for mode, setting in (("native", str(library)), ("bindings", "0")):
            command = [
                sys.executable,
                "-m",
                "benchmarks.launch",
                "--mode",
                mode,
                "--calls",
                str(CALLS),
                *["--profile"] * options.profile,
            ]
            environment = {**os.environ, "MACHETE_AOT_LOADER": setting}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            figures[mode] = json.loads(done.stdout)
    for mode, found in figures.items():
        for name, value in found.items():
            print(f"{mode:10} {name:32} {value:7.2f} us")
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        rounded = {mode: {name: round(value, 2) for name, value in found.items()} for mode, found in figures.items()}
        options.json.write_text(json.dumps({**machine, "us": rounded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
