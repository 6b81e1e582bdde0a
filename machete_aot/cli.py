# SPDX-License-Identifier: Apache-2.0
"""The command ``machete-aot``: arguments in, one module's job done, text or JSON and an exit status out.

Exit status: 0 good; 1 any other error, or a check that failed; 2 wrong usage; 3 bundle or kernel missing; 4 corrupt or
truncated; 5 unreachable; 6 incompatible or written for a newer runtime; 7 not trusted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import cli_bench, cli_bundles
from .cli_output import (
    EXIT_CODES,
    OTHER,
    USAGE,
    add_bundle_options,
    add_json_option,
    bundle_facts,
    exit_code,
    open_bundle,
    print_json,
    problem_facts,
    title,
    trace_text,
)
from .errors import MacheteError
from .scalar_type import SCALAR_TYPES, scalar_type
from .version import __version__

__all__ = ["EXIT_CODES", "OTHER", "USAGE", "exit_code", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. Wrong usage raises SystemExit(2), as argparse does."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    warnings = logging.StreamHandler()
    warnings.setFormatter(logging.Formatter("machete-aot: %(message)s"))
    logger = logging.getLogger(__package__)
    logger.addHandler(warnings)
    try:
        status = command(options)
        sys.stdout.flush()
        return status
    except MacheteError as error:
        if options.json:
            print_json({"ok": False, "error": problem_facts(error)})
        print(f"machete-aot: {error}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OTHER
    except KeyboardInterrupt:
        return 130
    finally:
        logger.removeHandler(warnings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="machete-aot",
        description="Ahead-of-time compiled mixed-precision matrix products for Hopper GPUs.",
        epilog="Exit status: 0 good, 1 other error, 2 wrong usage, 3 missing, 4 corrupt or truncated, 5 unreachable, "
        "6 incompatible or too new, 7 not trusted.",
    )
    parser.add_argument("--version", action="version", version=f"machete-aot {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=command)
        return sub

    add_json_option(add("demo", _demo, "multiply at the shapes of real layers, compare, and on a GPU measure"))
    for name, command, text in (
        ("list", _list, "show the kernels and schedules of a bundle"),
        ("doctor", _doctor, "show what works here, what does not, and what to do"),
    ):
        sub = add(name, command, text)
        add_bundle_options(sub)
        add_json_option(sub)
    explain = add("explain", _explain, "show which schedule a product gets, and why")
    for name, text in (("m", "rows of the activations"), ("n", "columns of the output"), ("k", "reduction length")):
        explain.add_argument(name, metavar=name.upper(), type=_positive, help=text)
    explain.add_argument("--a", choices=("bf16", "fp16"), default="bf16", help="activations (default: %(default)s)")
    explain.add_argument("--b", choices=tuple(SCALAR_TYPES), default="u4b8", help="weights (default: %(default)s)")
    explain.add_argument("--zeros", choices=("none", "float", "int"), default="none", help="default: %(default)s")
    explain.add_argument(
        "--group", type=int, default=128, help="k that share a scale, -1 for all (default: %(default)s)"
    )
    explain.add_argument("--sms", type=_positive, help="multiprocessors (default: this GPU's, or 132 as on an H100)")
    explain.add_argument(
        "--batch-invariant", action="store_true", help="as with gemm(..., batch_invariant=True), and what that costs"
    )
    add_bundle_options(explain)
    add_json_option(explain)
    qualify = add("qualify", _qualify, "run every kernel on this GPU against the reference and write a record")
    qualify.add_argument("--out", metavar="DIR", default="manifests/qualification", help="default: %(default)s")
    add_bundle_options(qualify)
    add_json_option(qualify)
    cli_bench.add_command(add)
    cli_bundles.add_commands(add)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _demo(options: argparse.Namespace) -> int:
    from . import demo
    from .part import H100

    device, reason = demo.usable_gpu()
    if options.json:
        results = list(demo.run_demo())
        print_json({"gpu": device is not None, "reason": reason, "products": [demo.facts(r) for r in results]})
        return 0 if all(map(demo.is_accurate, results)) else OTHER
    if device is not None:
        print(f"{reason}: times are of cold weights, in a CUDA graph")
    else:
        print(f"No kernel runs here: {reason}")
        print(f"The reference runs on the CPU; the schedules are those of an {H100.name}.")
    print(demo.header())
    accurate = True
    for result in demo.run_demo():
        print(demo.line(result), flush=True)
        accurate &= demo.is_accurate(result)
    if not accurate:
        print("machete-aot: an error is above the tolerance; `machete-aot qualify` tells more", file=sys.stderr)
    return 0 if accurate else OTHER


def _list(options: argparse.Namespace) -> int:
    bundle = open_bundle(options)
    manifest = bundle.manifest
    kernels = [
        {
            "id": k.id,
            "types": k.types.name,
            "tile": k.tile.name,
            "layout": k.layout,
            "threads": k.threads,
            "registers": k.registers,
            "shared_memory": max((k.tile.shared_memory(s.split, k.types) for s in manifest.schedules_of(k)), default=0),
            "frame_bytes": k.frame.length,
            "cubin_bytes": k.cubin.size,
        }
        for k in manifest.kernels
    ]
    helpers = [
        {
            "id": h.id,
            "threads": h.threads,
            "registers": h.registers,
            "frame_bytes": h.frame.length,
            "cubin_bytes": h.cubin.size,
        }
        for h in manifest.helpers
    ]
    schedules: list[dict[str, Any]] = [
        {"name": s.name, "tile": s.tile, "split": s.split, "even_ctas": s.even_ctas, "types": list(s.types)}
        for s in manifest.schedules
    ]
    if options.json:
        print_json({"bundle": bundle_facts(bundle), "kernels": kernels, "helpers": helpers, "schedules": schedules})
        return 0
    print(title(bundle))
    columns = ("id", "layout", "threads", "registers", "shared_memory", "frame_bytes", "cubin_bytes")
    _print_table("kernels", kernels, columns)
    _print_table("helpers", helpers, ("id", "threads", "registers", "frame_bytes", "cubin_bytes"))
    texts = [{**s, "types": " ".join(s["types"])} for s in schedules]
    _print_table("schedules", texts, ("name", "tile", "split", "even_ctas", "types"))
    return 0


def _print_table(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    widths = [max(map(len, (c, *(str(r[c]) for r in rows)))) for c in columns]
    print(f"\n{len(rows)} {title if len(rows) != 1 else title[:-1]}")
    for cells in (columns, *([str(r[c]) for c in columns] for r in rows)):
        pairs = zip(cells, widths, strict=True)
        print("  " + "  ".join(c.rjust(w) if c.isdigit() else c.ljust(w) for c, w in pairs).rstrip())


def _explain(options: argparse.Namespace) -> int:
    from .fetch import use_bundle
    from .prepack import A_DTYPES
    from .product import explain

    bundle = open_bundle(options)
    use_bundle(bundle)
    dtype, b_type = A_DTYPES[options.a], scalar_type(options.b)
    product = (options.m, options.n, options.k)
    explanation = explain(
        *product,
        dtype,
        b_type,
        sms=options.sms,
        batch_invariant=options.batch_invariant,
        b_group_size=options.group,
        with_zeros=False if options.zeros == "none" else options.zeros,
    )
    if options.json:
        print_json({**explanation.as_dict(), "bundle": bundle_facts(bundle)})
    else:
        print(f"{explanation.text()}\n{trace_text(bundle)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import diagnose, text

    report = diagnose(lambda: open_bundle(options))
    if options.json:
        print_json(report)
    else:
        print(text(report))
    return 0 if report["ok"] else OTHER


def _qualify(options: argparse.Namespace) -> int:
    from .qualify import qualify
    from .record import check_record, write_record

    def progress(done: int, total: int, what: str) -> None:
        print(f"[{done}/{total}] {what}", file=sys.stderr)

    bundle = open_bundle(options)
    record = qualify(bundle, progress=progress)
    problems = check_record(record, bundle.manifest, bundle.manifest_sha256)
    if problems:
        raise MacheteError("this GPU does not qualify the bundle, no record was written:\n  " + "\n  ".join(problems))
    path = str(write_record(record, options.out))
    if options.json:
        print_json({"ok": True, "record": path})
    else:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
