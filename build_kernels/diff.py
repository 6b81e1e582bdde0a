# SPDX-License-Identifier: Apache-2.0
"""What differs between two bundles: kernels, schedules, the cost model's data, and whether the new one is qualified.

Helpers count among the kernels.

For the maintainers' eyes: a bundle's frames are checked against its manifest, but nothing says whom that is from.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machete_aot.bundle import Bundle, manifest_in
from machete_aot.bundle_data import BundleData, FileData, MemoryData
from machete_aot.decode import parse_json
from machete_aot.frames import manifest_text
from machete_aot.manifest import HelperInfo, KernelInfo, parse_manifest
from machete_aot.manifest_rules import MAX_MANIFEST_BYTES, SCHEMA
from machete_aot.record import check_record

from .errors import BuildError
from .paths import DATA, MANIFESTS, ROOT
from .release import BUNDLE_FILE

EMBEDDED = "embedded"
_RECORDS = MANIFESTS / "qualification"
_FACTS = ("registers", "spills", "static_shared_memory", "threads")
_OTHER = ("bundle", "abi", "layouts", "toolchain", "provenance", "compat")


@dataclass(frozen=True)
class Changes:
    """Names that only the new manifest has, only the old one, or both with another content."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


@dataclass(frozen=True)
class Difference:
    """``other``: the manifest's other parts that differ, by name. ``identical``: the manifests are the same bytes.

    ``records``: the qualification records that cover the new bundle, by file name.
    """

    old: Bundle
    new: Bundle
    identical: bool
    kernels: Changes
    schedules: Changes
    heuristic: Changes
    other: tuple[str, ...]
    records: tuple[str, ...]


def open_named(name: str) -> Bundle:
    """The bundle that ``name`` stands for, intact, whoever made it.

    A bundle's file; a folder with a pins.json, or with one .zip; ``embedded``; or ``REVISION:`` for the bundle embedded
    in that git revision. Raises BuildError, and BundleError if the bundle is damaged or its manifest not valid.
    """
    data: BundleData
    if name.endswith(":"):
        data = MemoryData(_embedded_in(name[:-1]))
    else:
        data = FileData(_file(DATA if name == EMBEDDED else Path(name)))
    frame = manifest_in(data, name)
    text = manifest_text(frame)
    _check_schema(text, name)
    bundle = Bundle(data, parse_manifest(text), frame, name)
    if problems := bundle.verify():
        raise BuildError(f"{name} is damaged", [str(p) for p in problems])
    return bundle


def compare(old: Bundle, new: Bundle, records: Path = _RECORDS) -> Difference:
    """Everything that differs. A kernel is changed if anything but its place in the bundle is: its cubin above all."""
    a, b = old.manifest, new.manifest
    return Difference(
        old,
        new,
        identical=old.manifest_sha256 == new.manifest_sha256,
        kernels=_changes(*({k.id: _content(k) for k in m.compiled} for m in (a, b))),
        schedules=_changes(*({s.name: s for s in m.schedules} for m in (a, b))),
        heuristic=_changes(*({t.device: t for t in m.heuristic.tables} for m in (a, b))),
        other=tuple(name for name in _OTHER if getattr(a, name) != getattr(b, name)),
        records=_covering(new, records),
    )


def as_json(found: Difference) -> dict[str, Any]:
    """The difference as plain JSON values; of each kernel that differs what both bundles say of it."""
    old, new = ({k.id: _figures(k) for k in bundle.manifest.compiled} for bundle in (found.old, found.new))
    names = (*found.kernels.added, *found.kernels.removed, *found.kernels.changed)
    values: dict[str, Any] = json.loads(
        json.dumps(
            {
                "old": _title(found.old),
                "new": _title(found.new),
                "identical": found.identical,
                "kernels": dataclasses.asdict(found.kernels),
                "schedules": dataclasses.asdict(found.schedules),
                "heuristic": dataclasses.asdict(found.heuristic),
                "other": found.other,
                "figures": {name: {"old": old.get(name), "new": new.get(name)} for name in names},
                "records": found.records,
            }
        )
    )
    return values


def as_text(found: Difference) -> str:
    """The difference for reading, a line for each thing that differs."""
    lines = []
    for sign, bundle in (("old", found.old), ("new", found.new)):
        title = _title(bundle)
        lines.append(f"{sign}: {title['origin']}, {title['version']} {title['arch']}, {title['bytes']:,} bytes")
        lines.append(f"     manifest sha256 {title['manifest_sha256']}")
    lines += _section("kernels", found.kernels, len(found.new.manifest.compiled), _kernel_lines(found))
    lines += _section("schedules", found.schedules, len(found.new.manifest.schedules), {})
    lines += _section("heuristic tables", found.heuristic, len(found.new.manifest.heuristic.tables), {})
    lines += [f"{name}: differs" for name in found.other]
    if found.identical:
        lines.append("the manifests are identical")
    elif not (found.kernels or found.schedules or found.heuristic or found.other):
        lines.append("only frames or their places in the file differ")
    covered = ", ".join(found.records)
    lines.append(f"qualification of new: {covered or 'no record covers it; run `machete-aot qualify` on a Hopper GPU'}")
    return "\n".join(lines)


def _embedded_in(revision: str) -> bytes:
    path = f"{revision}:{DATA.relative_to(ROOT).as_posix()}/{BUNDLE_FILE}"
    if revision.startswith("-"):
        raise BuildError(f"{revision!r} is not the name of a git revision")
    result = subprocess.run(["git", "-C", str(ROOT), "cat-file", "blob", path], capture_output=True, check=False)
    if result.returncode:
        raise BuildError(f"git has no {path}: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout


def _file(path: Path) -> Path:
    """The bundle's file that ``path`` is, or that the folder ``path`` holds."""
    if not path.is_dir():
        return path
    names = [p.name for p in sorted(path.glob("*.zip"))]
    if (path / "pins.json").is_file():
        problems: list[str] = []
        document = parse_json((path / "pins.json").read_bytes(), MAX_MANIFEST_BYTES, problems)
        pins = document.get("bundles") if isinstance(document, dict) else None
        if problems or not isinstance(pins, list) or not all(isinstance(p, dict) and "file" in p for p in pins):
            raise BuildError(f"{path / 'pins.json'} is damaged; name the bundle's file", problems)
        names = [str(p["file"]) for p in pins]
    if len(names) != 1:
        raise BuildError(f"{path} holds {len(names)} bundles; name one file", names)
    return path / names[0]


def _check_schema(manifest: bytes, name: str) -> None:
    document = parse_json(manifest, MAX_MANIFEST_BYTES, [])
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, int) and schema < SCHEMA:
        raise BuildError(
            f"{name} has a manifest of schema {schema}, where this checkout reads {SCHEMA}: use an older one"
        )


def _changes(old: Mapping[str, object], new: Mapping[str, object]) -> Changes:
    return Changes(
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        changed=tuple(name for name in new if name in old and old[name] != new[name]),
    )


def _content(kernel: KernelInfo | HelperInfo) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(kernel).items() if name != "frame"}


def _figures(kernel: KernelInfo | HelperInfo) -> dict[str, Any]:
    facts = {name: getattr(kernel, name) for name in _FACTS}
    return facts | {
        "cubin_bytes": kernel.cubin.size,
        "frame_bytes": kernel.frame.length,
        "cubin_sha256": kernel.cubin.sha256,
    }


def _covering(bundle: Bundle, records: Path) -> tuple[str, ...]:
    found = []
    for path in sorted(records.glob("*.json")):
        problems: list[str] = []
        document = parse_json(path.read_bytes(), MAX_MANIFEST_BYTES, problems)
        if not problems and not check_record(document, bundle.manifest, bundle.manifest_sha256):
            found.append(path.name)
    return tuple(found)


def _title(bundle: Bundle) -> dict[str, Any]:
    info = bundle.manifest.bundle
    return {
        "origin": bundle.origin,
        "version": info.version,
        "arch": info.arch,
        "bytes": bundle.size,
        "manifest_sha256": bundle.manifest_sha256,
    }


def _kernel_lines(found: Difference) -> dict[str, str]:
    """What both bundles say of every kernel that differs, by id."""
    shown = {}
    for name, pair in as_json(found)["figures"].items():
        have = [p for p in (pair["old"], pair["new"]) if p]
        figures = {
            "registers": [p["registers"] for p in have],
            "spills": [p["spills"] for p in have],
            "cubin bytes": [f"{p['cubin_bytes']:,}" for p in have],
            "frame bytes": [f"{p['frame_bytes']:,}" for p in have],
        }
        shown[name] = ", ".join(f"{key} {' -> '.join(map(str, values))}" for key, values in figures.items())
    return shown


def _section(name: str, changes: Changes, count: int, details: Mapping[str, str]) -> list[str]:
    same = count - len(changes.added) - len(changes.changed)
    head = f"{name}: {len(changes.added)} added, {len(changes.removed)} removed, {len(changes.changed)} changed, "
    marked = (
        [("+", n) for n in changes.added] + [("-", n) for n in changes.removed] + [("~", n) for n in changes.changed]
    )
    return [f"{head}{same} the same", *(f"  {sign} {n}  {details.get(n, '')}".rstrip() for sign, n in marked)]
