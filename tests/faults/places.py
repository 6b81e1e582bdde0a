# SPDX-License-Identifier: Apache-2.0
"""The bundles that the fault tests fetch, the mirrors that serve them, and a judge of what a cache folder holds."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import zipfile
from functools import cache
from pathlib import Path

import machete_aot
from machete_aot.bundle import Bundle, open_bundle
from machete_aot.errors import BundleError
from machete_aot.frames import manifest_text
from machete_aot.manifest import parse_manifest
from small_bundle import products, rewritten, small_bundle

DATA, FRAME, DIGEST = small_bundle()
TEXT = manifest_text(FRAME)
MANIFEST = parse_manifest(TEXT)
CUBINS = {p.kernel.id: p.cubin for p in products()}
KERNELS = tuple(CUBINS)
ZIP = "machete-aot-sm90a-0.1.0.zip"
JSON = "machete-aot-sm90a-0.1.0.json.zst"
EMBEDDED = Path(machete_aot.__file__).parent / "data"


@cache
def newer() -> tuple[bytes, bytes, str]:
    """Another version of the small bundle: its bytes, its manifest as it is stored and that one's digest."""
    info = dataclasses.replace(MANIFEST.bundle, version="0.2.0")
    data, digest = rewritten(dataclasses.replace(MANIFEST, bundle=info))
    return data, manifest_of(data), digest


def manifest_of(data: bytes) -> bytes:
    """The last entry of an archive, found as a reader in another language might: by the zip directory."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read("manifest.json.zst")


@cache
def embedded() -> tuple[bytes, bytes, str]:
    """The real bundle: its bytes, its manifest as it is stored and that one's digest."""
    pin = json.loads((EMBEDDED / "pins.json").read_text())["bundles"][0]
    data = (EMBEDDED / pin["file"]).read_bytes()
    return data, manifest_of(data), pin["manifest_sha256"]


def mirror_files(*bundles: tuple[bytes, bytes, str]) -> dict[str, bytes]:
    """The files of a mirror folder as docs/distribution.md describes it (default: of the small bundle)."""
    files, rows = {}, []
    for data, frame, digest in bundles or ((DATA, FRAME, DIGEST),):
        info = parse_manifest(manifest_text(frame)).bundle
        name = f"machete-aot-{info.arch}-{info.version}"
        files |= {f"{name}.zip": data, f"{name}.json.zst": frame}
        where = {"file": f"{name}.zip", "size": len(data), "manifest": f"{name}.json.zst", "manifest_sha256": digest}
        rows.append({"arch": info.arch, "version": info.version, **where})
    return {"index.json": json.dumps({"schema": 1, "bundles": rows}).encode(), **files}


def write_mirror(folder: Path, *bundles: tuple[bytes, bytes, str]) -> Path:
    """The same as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in mirror_files(*bundles).items():
        (folder / name).write_bytes(content)
    return folder


def is_right(bundle: Bundle) -> bool:
    """Whether every kernel of the small bundle comes out of this one as it was packed."""
    return {name: bundle.cubin(name) for name in KERNELS} == CUBINS


def bad_files(cache: Path) -> list[str]:
    """Files under a final name in a cache whose content is not what the name promises."""
    bad = []
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        found = re.fullmatch(r"(manifest|frame|bundle)-([0-9a-f]{64})\.(json\.zst|zst|zip)", path.name)
        if not found:
            continue
        content = path.read_bytes()
        if found[1] != "bundle":
            if hashlib.sha256(content).hexdigest() != found[2]:
                bad.append(path.name)
            continue
        try:
            problems = open_bundle(content, manifest_sha256=found[2]).verify()
        except BundleError as error:
            problems = [error]
        bad.extend(f"{path.name}: {p}" for p in problems)
    return bad


def final_files(cache: Path, kind: str = "") -> list[Path]:
    """Files under a final name, of one kind ("bundle", "manifest", "frame") or of all."""
    pattern = rf"({kind or 'manifest|frame|bundle'})-[0-9a-f]{{64}}\.(json\.zst|zst|zip)"
    return sorted(p for p in cache.rglob("*") if re.fullmatch(pattern, p.name))
