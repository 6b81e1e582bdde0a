# SPDX-License-Identifier: Apache-2.0
"""The command line of the pipeline: ``python -m build_kernels --help``."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from machete_aot.errors import MacheteError

from . import abi, catalogue_page, diff, plan, shards
from .catalogue import specializations, typed_schedules
from .check import check_kernels
from .compile import compile_kernels
from .errors import BuildError, ToolchainError
from .helpers import HELPERS, Target
from .paths import BUILD, RACECHECK
from .release import release
from .reproduce import reproduce
from .toolchain import find_tools

_EPILOG = """\
exit status: 0 done; 1 a kernel does not compile, fails a check or differs from the bundle, gemm_params.h or
docs/catalogue.md is out of date, shards do not fit together, or with `diff --exit-code` two bundles differ; 2 wrong
usage; 3 a tool is missing or has the wrong version. MACHETE_AOT_NVCC and MACHETE_AOT_PTXAS name the tools to use.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int | None] = options.run
    started = time.monotonic()
    try:
        status = command(options)
    except BuildError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_status
    except MacheteError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if not getattr(options, "json", False):
        print(f"done in {time.monotonic() - started:.1f} s")
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m build_kernels", description=__doc__, epilog=_EPILOG)
    _add_build_options(parser)
    parser.set_defaults(run=_build)
    commands = parser.add_subparsers(title="commands (default: build)", metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, epilog=_EPILOG)
        command.set_defaults(run=run)
        return command

    _add_build_options(add("build", _build, "generate, compile, check, and write the embedded bundle"))
    _add_selection(add("check", _check, "check the kernels that were compiled last"))
    pack = add("pack", _pack, "check what was compiled last and write the embedded bundle")
    _add_jobs(pack)
    _add_unfitted(pack)
    header = add("abi", _abi, "write csrc/kernels/gemm_params.h from machete_aot/abi.py")
    header.add_argument("--check", action="store_true", help="only say whether it is up to date")
    _add_jobs(add("racecheck", _racecheck, "write a bundle to build/racecheck whose ordering racecheck can follow"))
    again = add("reproduce", _reproduce, "compile kernels of the embedded bundle anew and compare digests")
    amount = again.add_mutually_exclusive_group()
    amount.add_argument("--sample", type=_positive, default=4, metavar="N", help="how many kernels (default 4)")
    amount.add_argument("--all", action="store_true", help="every kernel")
    again.add_argument("--seed", type=int, default=0, metavar="S", help="chooses the sample (default 0)")
    _add_jobs(again)
    _add_maintenance(add)
    return parser


def _add_maintenance(
    add: Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser],
) -> None:
    _add_selection(add("plan", _plan, "say what a build would compile, and for how long; compile nothing"))
    compared = add("diff", _diff, "say what differs between two bundles")
    for name in ("old", "new"):
        compared.add_argument(
            name,
            metavar=name.upper(),
            help="a bundle's file, a folder with one, `embedded`, or `REVISION:`, the one embedded in a git revision",
        )
    compared.add_argument("--exit-code", action="store_true", help="end with status 1 if they differ")
    compared.add_argument("--json", action="store_true", help="print JSON")
    merged = add("merge", _merge, "check the kernels of all shards and write the embedded bundle")
    merged.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="a folder that holds one shard or several")
    _add_jobs(merged)
    _add_unfitted(merged)
    page = add("catalogue", _catalogue, "write docs/catalogue.md from the embedded bundle")
    page.add_argument("--check", action="store_true", help="only say whether it is up to date")


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser).add_argument(
        "--shard", type=shards.parse_shard, metavar="I/N", help="only every N-th kernel from the I-th on, for `merge`"
    )
    _add_unfitted(parser)


def _add_selection(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Adds --only and --jobs; returns the group of options that cannot be combined with --only."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--only", metavar="PATTERN", help="only kernels whose id contains or (*, ?) matches it; no bundle is written"
    )
    _add_jobs(parser)
    return group


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=_positive, default=os.cpu_count(), metavar="N", help="parallel jobs (default: all cores)"
    )


def _add_unfitted(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-unfitted", action="store_true", help="accept schedules without coefficients in heuristic.json"
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def _everything() -> tuple[Target, ...]:
    """All that is compiled."""
    return (*specializations(), *HELPERS)


def _chosen(pattern: str | None) -> tuple[Target, ...]:
    kernels = _everything()
    if pattern is None:
        return kernels
    found = tuple(k for k in kernels if pattern in k.id or fnmatch.fnmatchcase(k.id, pattern))
    if not found:
        raise BuildError(f"--only {pattern} matches no kernel; there are", [k.id for k in kernels])
    return found


def _build(options: argparse.Namespace) -> None:
    kernels = _chosen(options.only) if options.shard is None else options.shard.choose(_everything())
    if options.shard is not None:
        shards.forget_shard(options.shard, BUILD)
    if not abi.header_is_current():
        raise BuildError(f"{abi.HEADER} is out of date; run `python -m build_kernels abi`")
    print(f"compiling {len(kernels)} kernels", flush=True)
    compile_kernels(kernels, jobs=options.jobs)
    if options.shard is not None:
        check_kernels(kernels, jobs=options.jobs)
        print(f"{len(kernels)} kernels pass their checks; wrote {shards.write_shard(options.shard, kernels, BUILD)}")
    elif options.only is None:
        _pack(options)
    else:
        _check(options)


def _check(options: argparse.Namespace) -> None:
    kernels = _chosen(options.only)
    reports = check_kernels(kernels, jobs=options.jobs)
    for name, report in reports.items():
        print(f"{name}: {report.registers} registers")
    print(f"{len(kernels)} kernels pass their checks")


def _pack(options: argparse.Namespace) -> None:
    _pack_from(BUILD, options)


def _pack_from(folder: Path, options: argparse.Namespace) -> None:
    reports = check_kernels(_everything(), folder, jobs=options.jobs)
    path = release(reports, folder, allow_unfitted=options.allow_unfitted)
    page = catalogue_page.write_page(diff.open_named(str(path)))
    print(f"{len(reports)} kernels pass their checks; wrote {path}, {path.stat().st_size} bytes, and {page}")


def _merge(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="machete-aot-") as folder:
        shards.merge_shards(options.folders, _everything(), Path(folder))
        _pack_from(Path(folder), options)


def _plan(options: argparse.Namespace) -> None:
    kernels = _chosen(options.only)
    print(plan.table(kernels, typed_schedules()))
    try:
        found = plan.make_plan(kernels, find_tools())
    except ToolchainError as e:
        found = plan.Plan(kernels, frozenset(k.id for k in kernels))
        print(f"nothing counts as up to date, because there is no compiler to build with: {e}")
    count = len(found.outdated)
    print(f"{len(kernels)} kernels, {len(kernels) - count} up to date in {BUILD}, {count} to compile")
    print(f"about {found.seconds(options.jobs):.0f} s with {options.jobs} jobs, each on a core of its own")


def _diff(options: argparse.Namespace) -> int:
    found = diff.compare(diff.open_named(options.old), diff.open_named(options.new))
    print(json.dumps(diff.as_json(found), indent=2, sort_keys=True) if options.json else diff.as_text(found))
    return int(options.exit_code and not found.identical)


def _catalogue(options: argparse.Namespace) -> None:
    bundle = diff.open_named(diff.EMBEDDED)
    if options.check:
        catalogue_page.check_page(bundle)
    else:
        print(f"wrote {catalogue_page.write_page(bundle)}")


def _racecheck(options: argparse.Namespace) -> None:
    """See csrc/kernels/ring.cuh, ARRIVALS, and docs/sanitizer.md."""
    kernels = _everything()
    compile_kernels(kernels, RACECHECK, jobs=options.jobs, defines=("MACHETE_RACECHECK",))
    reports = check_kernels(kernels, RACECHECK, jobs=options.jobs, lenient=True)
    path = release(reports, RACECHECK, allow_unfitted=True, data=RACECHECK, manifests=RACECHECK)
    print(f"wrote {path}")


def _abi(options: argparse.Namespace) -> None:
    if not options.check:
        abi.write_header()
    elif not abi.header_is_current():
        raise BuildError(f"{abi.HEADER} is out of date; run `python -m build_kernels abi`")


def _reproduce(options: argparse.Namespace) -> None:
    from machete_aot.fetch import fetch_bundle

    names = reproduce(fetch_bundle(), None if options.all else options.sample, options.seed, jobs=options.jobs)
    print(f"{len(names)} kernels compile to the bundle's digests:", *names, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
