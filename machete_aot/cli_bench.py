# SPDX-License-Identifier: Apache-2.0
"""The command that measures: bench."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from .cli_output import OTHER, add_bundle_options, open_bundle
from .errors import ArgumentError

Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
Shapes = tuple[tuple[int, int], ...]

# N x K of a decoder layer's products on one GPU: qkv, attention's output, gate and up, down.
MODELS: dict[str, Shapes] = {
    "llama3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "qwen2.5-32b": ((7168, 5120), (5120, 5120), (55296, 5120), (5120, 27648)),
}
WEIGHTS = ("u4b8", "u8b128", "u4", "u8", "u4+zeros", "u4+int-zeros", "u8+zeros", "u8+int-zeros")
PEER_NAMES = ("cublas", "machete", "marlin", "humming")


def add_command(add: Add) -> None:
    """Adds the command to the parser; ``add`` makes one from its name, function and description."""
    bench = add("bench", _bench, "time products on this GPU, beside cuBLAS and other implementations")
    bench.set_defaults(json=False)  # an error is text: this command's JSON goes to a file
    bench.add_argument(
        "--shapes",
        metavar="NxK,...",
        type=_shapes,
        help=f"shapes of weights, or the layers of models: {', '.join(MODELS)} (default: six of Llama 3's)",
    )
    bench.add_argument("--tokens", metavar="M,...", type=_tokens, help="rows of the activations (default: 1 to 4096)")
    bench.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="default: %(default)s")
    bench.add_argument("--weights", choices=WEIGHTS, default="u4b8", help="and their zeros (default: %(default)s)")
    bench.add_argument(
        "--group", type=_group, default=128, help="k that share a scale, -1 for all (default: %(default)s)"
    )
    bench.add_argument("--rounds", metavar="R", type=_positive, help="replays that each median is of (default: 9)")
    add_heat_options(bench)
    bench.add_argument(
        "--peers",
        metavar="NAME,...",
        type=_peers,
        default=PEER_NAMES,
        help=f"whom to compare with, of those that are installed, or none (default: {','.join(PEER_NAMES)})",
    )
    bench.add_argument("--json", metavar="PATH", type=Path, dest="json_path", help="write everything as JSON")
    bench.add_argument("--plot", metavar="PATH", type=Path, help="draw it, as .svg or .png; needs machete-aot[bench]")
    add_bundle_options(bench)


def add_heat_options(parser: argparse.ArgumentParser) -> None:
    """Adds what tells how far power limits those that are compared, in turns by default."""
    heat = parser.add_mutually_exclusive_group()
    heat.add_argument(
        "--rest",
        metavar="T",
        type=_rest,
        default=0.0,
        help="idle after each replay for T times its duration: power then limits less (default: 0)",
    )
    heat.add_argument(
        "--alone",
        metavar="S",
        type=_seconds,
        default=0.0,
        help="replay nothing else for S seconds, twice, instead of in turns with the others",
    )


def _bench(options: argparse.Namespace) -> int:
    from . import bench, bench_report, plot, timing
    from .fetch import use_bundle
    from .prepack import A_DTYPES

    _check_paths(options)
    if options.plot is not None:
        plot.require(options.plot)  # now, not after minutes of measuring
    use_bundle(open_bundle(options))
    bench.require_gpu()
    plan = bench.Plan(
        options.shapes or bench.SHAPES,
        options.tokens or bench.TOKENS,
        A_DTYPES[options.dtype],
        options.group,
        options.rounds or bench.ROUNDS,
        timing.KINDS[options.weights],
        options.rest,
        options.alone,
    )
    command = shlex.join(["machete-aot", *sys.argv[1:]])
    rows = bench_report.run_and_print(plan, options.peers, command, options.json_path)
    if options.plot is not None:
        types = f"{options.dtype} x {options.weights}"
        plot.write_plot(rows, f"{types}, group {options.group}, {bench_report.device_name()}", options.plot)
    if any(row.ours.problem for row in rows):
        print("machete-aot: a result was wrong; `machete-aot qualify` tells more", file=sys.stderr)
        return OTHER
    return 0


def _check_paths(options: argparse.Namespace) -> None:
    """Raises ArgumentError where a file could not be written at the end."""
    for path in (options.json_path, options.plot):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ArgumentError(f"cannot write {path}: name a file in a folder that exists")


def _shapes(text: str) -> Shapes:
    found: dict[tuple[int, int], None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", part)
        if part in MODELS:
            found |= dict.fromkeys(MODELS[part])
        elif match:
            found[int(match[1]), int(match[2])] = None
        else:
            raise argparse.ArgumentTypeError(
                f"{part!r} is neither NxK, as in 4096x4096, nor one of {', '.join(MODELS)}"
            )
    return tuple(found)


def _tokens(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _rest(text: str) -> float:
    """A value of ``--rest``, for argparse: see ``timing.alternate_us``."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 100")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 60")
    return value


def _group(text: str) -> int:
    value = -1 if text == "-1" else _positive(text)
    if value != -1 and value % 32:
        raise argparse.ArgumentTypeError(f"{value} is neither a multiple of 32 nor -1, which the kernels take")
    return value


def _peers(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PEER_NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(PEER_NAMES)}, or none")
    return names
