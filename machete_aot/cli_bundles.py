# SPDX-License-Identifier: Apache-2.0
"""The commands that move and check bundles: fetch, verify, export, import, cache, sign."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .cache import Cache, bundle_name, manifest_name, signature_name
from .cli_output import (
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
from .errors import ArgumentError, BundleError, MissingError, UnreachableError

Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """Adds the commands to the parser; ``add`` makes one from its name, function and description."""
    fetch = add("fetch", _fetch, "bring a bundle to this machine, whole or in part")
    _add_which(fetch)
    fetch.add_argument(
        "--only",
        metavar="WHAT",
        action="append",
        type=_only,
        help="types (bf16_u4b8), a schedule or a shape (16x4096x4096) whose kernels are enough; may be repeated",
    )
    verify = add("verify", _verify, "check every digest of a bundle")
    add_bundle_options(verify)
    verify.add_argument("--all", action="store_true", help="check every file of the cache too")
    verify.add_argument("--repair", action="store_true", help="replace what is corrupt in the cache from the source")
    export = add("export", _export, "write a bundle into the folder of a mirror")
    _add_which(export)
    export.add_argument("--to", metavar="DIR", required=True, help="the folder; made if it is not there")
    import_ = add("import", _import, "copy a bundle from a file or a mirror's folder into the cache")
    import_.add_argument("file", metavar="FILE", help="a bundle's file, or a folder written by export")
    _add_which(import_, source=False)
    sign = add("sign", _sign, "sign a manifest")
    sign.add_argument("file", metavar="MANIFEST", help="a manifest as export writes it; FILE.sig is written beside it")
    sign.add_argument("--key", metavar="FILE", required=True, help="an Ed25519 private key in PEM, without passphrase")
    cache = add("cache", _cache, "list the files of the cache, or remove them")
    cache.add_argument("action", choices=("list", "prune", "clear"), help="prune keeps the newest bundles")
    cache.add_argument("--keep", metavar="N", type=_count, default=1, help="bundles that prune keeps (default: 1)")
    cache.add_argument("--cache-dir", metavar="DIR", help="the cache's folder (default: MACHETE_AOT_CACHE or yours)")
    for parser in (fetch, verify, export, import_, sign, cache):
        add_json_option(parser)


def _add_which(parser: argparse.ArgumentParser, *, source: bool = True) -> None:
    add_bundle_options(parser, source=source)
    parser.add_argument("--arch", default="sm90a", help="default: %(default)s")
    parser.add_argument("--version", metavar="V", help="the bundle's version (default: this package's, or the newest)")


def _only(text: str) -> str | tuple[int, ...]:
    shape = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", text)
    return tuple(int(n) for n in shape.groups()) if shape else text


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _fetch(options: argparse.Namespace) -> int:
    bundle = open_bundle(options, arch=options.arch, version=options.version, only=options.only)
    if options.json:
        print_json({"ok": True, "bundle": bundle_facts(bundle)})
    else:
        print(f"{title(bundle)}\n{trace_text(bundle)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Without --repair, corrupt files of the cache are problems; with it, only what could not be replaced is one."""
    cache = Cache(options.cache_dir)
    damaged = cache.check() if options.all or options.repair else []
    problems = [] if options.repair else [error for _, error in damaged]
    bundle = None
    try:
        bundle = open_bundle(options)
        problems += bundle.verify()
    except BundleError as error:
        problems.append(error)
    if options.json:
        print_json(
            {
                "ok": not problems,
                "bundle": bundle_facts(bundle) if bundle else None,
                "kernels": len(bundle.manifest.kernels) if bundle else 0,
                "cache": {"folder": str(cache.folder), "set_aside": [name for name, _ in damaged]},
                "problems": [problem_facts(p) for p in problems],
            }
        )
    elif bundle and not problems:
        print(f"{title(bundle)}\n{len(bundle.manifest.kernels)} kernels intact")
    for problem in problems:
        print(f"machete-aot: {problem}", file=sys.stderr)
    return exit_code(problems[0]) if problems else 0


def _export(options: argparse.Namespace) -> int:
    from .mirror import export_bundle

    bundle = open_bundle(options, arch=options.arch, version=options.version)
    paths = [str(path) for path in export_bundle(bundle, options.to)]
    if options.json:
        print_json({"ok": True, "bundle": bundle_facts(bundle), "files": paths})
    else:
        print("\n".join([title(bundle), *paths]))
    return 0


def _import(options: argparse.Namespace) -> int:
    if "://" in options.file:
        raise ArgumentError("import copies from a file or a folder; use fetch --source for a URL")
    options.source = [options.file]
    bundle = open_bundle(options, arch=options.arch, version=options.version)
    paths = _store(bundle, Cache(options.cache_dir))
    if options.json:
        print_json({"ok": True, "bundle": bundle_facts(bundle), "files": paths})
    else:
        print("\n".join([title(bundle), *paths]))
    return 0


def _store(bundle: Bundle, cache: Cache) -> list[str]:
    """Puts a whole bundle into the cache, verified, its manifest last: without that nothing else counts."""
    digest = bundle.manifest_sha256
    files = {bundle_name(digest): bundle.to_bytes()}
    if bundle.signature is not None:
        files[signature_name(digest)] = bundle.signature
    files[manifest_name(digest)] = bundle.manifest_bytes
    for name, content in files.items():
        cache.put(name, content)
    return [str(cache.folder / name) for name in files]


def _sign(options: argparse.Namespace) -> int:
    from .frames import manifest_text
    from .manifest import parse_manifest
    from .publish import publish
    from .trust import SIGNATURE_SUFFIX, sign_manifest

    manifest = _read(options.file)
    parse_manifest(manifest_text(manifest))  # nobody should sign what nobody can use
    signature = sign_manifest(manifest, _read(options.key))
    path = Path(options.file + SIGNATURE_SUFFIX)
    try:
        publish(path, signature)
    except OSError as error:
        raise UnreachableError(f"{path} cannot be written: {error.strerror or error}") from error
    digest = hashlib.sha256(manifest).hexdigest()
    if options.json:
        print_json({"ok": True, "file": str(path), "manifest_sha256": digest})
    else:
        print(f"{path}\nmanifest sha256 {digest}")
    return 0


def _read(path: str) -> bytes:
    from .manifest_rules import MAX_MANIFEST_BYTES

    try:
        with open(path, "rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise MissingError(f"there is no file {path}") from None
    except OSError as error:
        raise UnreachableError(f"{path} cannot be read: {error.strerror or error}") from None


def _cache(options: argparse.Namespace) -> int:
    cache = Cache(options.cache_dir)
    if options.action == "list":
        entries = [{"name": e.name, "kind": e.kind, "bytes": e.size} for e in cache.entries()]
        facts: dict[str, Any] = {"files": entries, "bytes": sum(e.size for e in cache.entries())}
        lines = [f"{e['bytes']:>10}  {e['name']}" for e in entries]
    else:
        removed = cache.clear() if options.action == "clear" else cache.prune(options.keep)
        facts, lines = {"removed": removed}, [f"removed {name}" for name in removed]
    if options.json:
        print_json({"ok": True, "folder": str(cache.folder), **facts})
    else:
        print(
            "\n".join(
                [f"{cache.folder}: {len(lines)} files" + ("" if options.action == "list" else " removed"), *lines]
            )
        )
    return 0
