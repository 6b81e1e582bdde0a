# SPDX-License-Identifier: Apache-2.0
"""What the commands share: exit statuses, the options that name a bundle, JSON, and a progress bar."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import errors
from .bundle import Bundle
from .errors import MacheteError

if TYPE_CHECKING:
    from .download import Progress

OTHER, USAGE = 1, 2
EXIT_CODES: tuple[tuple[type[MacheteError], int], ...] = (
    (errors.ArgumentError, USAGE),
    (errors.MissingError, 3),
    (errors.CorruptError, 4),
    (errors.TruncatedError, 4),
    (errors.UnreachableError, 5),
    (errors.IncompatibleError, 6),
    (errors.SchemaTooNewError, 6),
    (errors.UntrustedError, 7),
)


def exit_code(error: MacheteError) -> int:
    """The exit status that this error stands for."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), OTHER)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_bundle_options(parser: argparse.ArgumentParser, *, source: bool = True) -> None:
    """Which bundle, and why it is trusted. Without ``source`` the command sets options.source itself."""
    if source:
        parser.add_argument(
            "--source",
            "--bundle",
            metavar="SOURCE",
            action="append",
            help="a bundle's file, a mirror's folder, or the http(s) URL of one; several are tried in order "
            "(default: MACHETE_AOT_SOURCE, the embedded bundle, MACHETE_AOT_PATH, the cache)",
        )
    parser.add_argument("--sha256", metavar="HEX", help="the digest of its manifest, if this package does not pin it")
    parser.add_argument(
        "--key",
        metavar="FILE",
        action="append",
        help="a public key that may have signed it (default: MACHETE_AOT_KEYS)",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="the cache's folder (default: MACHETE_AOT_CACHE or yours)")
    parser.add_argument("--offline", action="store_true", default=None, help="download nothing")


def open_bundle(options: argparse.Namespace, **more: Any) -> Bundle:
    """The bundle that the options name. ``more``: further arguments of fetch_bundle."""
    from .fetch import fetch_bundle

    with progress_bar() as progress:
        return fetch_bundle(
            source=options.source,
            expected_sha256=options.sha256,
            keys=options.key,
            cache_dir=options.cache_dir,
            offline=options.offline,
            progress=progress,
            **more,
        )


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    info = bundle.manifest.bundle
    return {
        "name": info.name,
        "version": info.version,
        "arch": info.arch,
        "manifest_sha256": bundle.manifest_sha256,
        "origin": bundle.origin,
        "bytes": bundle.size,
        "trace": list(bundle.trace),
    }


def title(bundle: Bundle) -> str:
    info = bundle.manifest.bundle
    head = f"{info.name} {info.version} {info.arch}, {bundle.size} bytes, from {bundle.origin}"
    return f"{head}\nmanifest sha256 {bundle.manifest_sha256}"


def trace_text(bundle: Bundle) -> str:
    """Why this bundle and none of the others: a line for each source that was considered."""
    return "\n".join(["sources:", *(f"  {line}" for line in bundle.trace)])


def problem_facts(error: MacheteError) -> dict[str, Any]:
    problems = list(error.problems) if isinstance(error, errors.BundleError) else []
    return {"type": type(error).__name__, "message": str(error), "problems": problems}


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, sort_keys=True))


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A callback that draws a bar on stderr once bytes arrive; None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, delay=0.2, desc="fetching") as bar:

        def show(done: int, total: int | None) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        yield show
