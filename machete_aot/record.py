# SPDX-License-Identifier: Apache-2.0
"""The qualification record: what it says, how it is written, and whether it vouches for every kernel of a bundle.

docs/architecture.md shows the JSON; ``qualify.py`` makes records, CI checks the one of the embedded bundle.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .decode import decode
from .manifest import KernelInfo, Manifest
from .publish import publish

SCHEMA = 3
# Of ||out - ref|| / ||ref||, by type. Rounding an output once, without any other error, makes 1.7e-3 in bf16 and 2.1e-4
# in fp16 of the norm.
TOLERANCE = {"bf16": 2.5e-3, "fp16": 3.5e-4}
# In a record, by the activations' type, whatever the output's: qualification does not count that rounding
# (rounded_error.py). Right kernels made up to 3.1e-4 and 3.9e-5, where zeros are floating; outputs that were cut off
# instead of rounded would make 1.1e-3 and 1.4e-4.
LIMITS = {"bf16": 9e-4, "fp16": 1.2e-4}
OUTPUTS = ("bf16", "fp16", "fp32")
MIN_CASES = 16  # products that every schedule must have been through
MIN_HELPER_CASES = 48


@dataclass(frozen=True)
class BundleId:
    """Which bundle was run."""

    arch: str
    version: str
    manifest_sha256: str


@dataclass(frozen=True)
class DeviceInfo:
    """Where. ``driver`` is the kernel driver's version, "unknown" where the system does not tell."""

    name: str
    sms: int
    driver: str
    cuda_driver_api: int
    torch: str


@dataclass(frozen=True)
class ScheduleResult:
    """One schedule of one kernel.

    ``worst_errors``: the largest error of outputs of each type of ``OUTPUTS``; None where one was not finite or not
    there. ``worst_case`` describes the product that came nearest to its tolerance, or failed it most. ``failures``
    holds what was raised, a line for each case that did.
    """

    worst_errors: Mapping[str, float | None]
    worst_case: str
    cases: int
    deterministic: bool
    guards_intact: bool
    failures: tuple[str, ...]


@dataclass(frozen=True)
class KernelResult:
    """All schedules of one kernel, by name."""

    schedules: Mapping[str, ScheduleResult]


@dataclass(frozen=True)
class HelperResult:
    """One helper. ``wrong``: the cases with a wrong bit; ``failures``: a line for each case that raised."""

    cases: int
    wrong: tuple[str, ...]
    deterministic: bool
    guards_intact: bool
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A whole run. ``date`` is the day in UTC, ``seed`` what the data was drawn from, the rest is by id."""

    schema: int
    bundle: BundleId
    device: DeviceInfo
    date: str
    seed: int
    tolerance: Mapping[str, float]
    kernels: Mapping[str, KernelResult]
    helpers: Mapping[str, HelperResult]

    def as_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return values


def write_record(record: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Writes ``<arch>-<version>-<device>.json`` into the folder, made if need be, and returns its path.

    The file appears whole or not at all, and replaces the one of an earlier run. Raises OSError.
    """
    bundle, device = record["bundle"], record["device"]["name"]
    name = "-".join(_slug(part) for part in (bundle["arch"], bundle["version"], device)) + ".json"
    target = Path(folder) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"
    publish(target, text.encode())
    return target


def check_record(record: object, manifest: Manifest, manifest_sha256: str) -> list[str]:
    """All reasons why this record does not qualify the bundle of this manifest; an empty list means that it does.

    ``manifest_sha256``: the digest of the manifest as the bundle stores it.
    ``record`` is what json.load or ``qualify`` returned; it may be anything. Never raises.
    """
    problems: list[str] = []
    parsed = decode(Record, record, "record", problems)
    if not isinstance(parsed, Record) or problems:
        return problems
    return [*_header_problems(parsed, manifest, manifest_sha256), *_coverage_problems(parsed, manifest)]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _header_problems(record: Record, manifest: Manifest, digest: str) -> Iterator[str]:
    if record.schema != SCHEMA:
        yield f"schema: {record.schema} is not {SCHEMA}"
    wanted = BundleId(manifest.bundle.arch, manifest.bundle.version, digest)
    for field in dataclasses.fields(BundleId):
        found, want = getattr(record.bundle, field.name), getattr(wanted, field.name)
        if found != want:
            yield f"bundle.{field.name}: the record is about {found!r}, the manifest is {want!r}; run qualify again"
    for name, limit in record.tolerance.items():
        if name not in TOLERANCE or limit > TOLERANCE[name]:
            yield f"tolerance: {name!r} at {limit} is not one of {TOLERANCE}, nor stricter"
    try:
        datetime.date.fromisoformat(record.date)
    except ValueError:
        yield f"date: {record.date!r} is not a date"


def _coverage_problems(record: Record, manifest: Manifest) -> Iterator[str]:
    for kernel in manifest.kernels:
        result = record.kernels.get(kernel.id)
        if result is None:
            yield f"kernel {kernel.id}: not in the record"
        else:
            yield from (f"kernel {kernel.id}: {p}" for p in _kernel_problems(result, kernel, manifest))
    for unknown in sorted(record.kernels.keys() - {k.id for k in manifest.kernels}):
        yield f"kernel {unknown}: not in the manifest"
    for helper in manifest.helpers:
        found = record.helpers.get(helper.id)
        problems = ["not in the record"] if found is None else _helper_problems(found)
        yield from (f"helper {helper.id}: {p}" for p in problems)
    for unknown in sorted(record.helpers.keys() - {h.id for h in manifest.helpers}):
        yield f"helper {unknown}: not in the manifest"


def _helper_problems(result: HelperResult) -> Iterator[str]:
    if result.cases < MIN_HELPER_CASES:
        yield f"{result.cases} cases, where {MIN_HELPER_CASES} are wanted; run qualify again"
    yield from (f"wrong {text}" for text in result.wrong)
    yield from _conduct_problems(result)


def _kernel_problems(result: KernelResult, kernel: KernelInfo, manifest: Manifest) -> Iterator[str]:
    wanted = [s.name for s in manifest.schedules_of(kernel)]
    for name in wanted:
        if name not in result.schedules:
            yield f"schedule {name}: not in the record"
        elif kernel.types.a not in LIMITS:
            yield f"no tolerance is set for activations of type {kernel.types.a!r}"
        else:
            yield from (f"schedule {name}: {p}" for p in _schedule_problems(result.schedules[name], kernel.types.a))
    for unknown in sorted(result.schedules.keys() - set(wanted)):
        yield f"schedule {unknown}: not in the manifest"


def _schedule_problems(result: ScheduleResult, activations: str) -> Iterator[str]:
    for out in OUTPUTS:
        if out not in result.worst_errors:
            yield f"no product with an output in {out}; run qualify again"
    for out, error in result.worst_errors.items():
        if out not in OUTPUTS:
            yield f"an output of type {out!r} is not one of {OUTPUTS}"
        elif error is None:
            yield f"an output in {out} is not finite, or was not written; worst case: {result.worst_case}"
        elif not 0 <= error <= LIMITS[activations]:
            allowed = f"0 to {LIMITS[activations]:.3g} is allowed"
            yield f"error {error:.3g} in {out}, where {allowed}; worst case: {result.worst_case}"
    if result.cases < MIN_CASES:
        yield f"{result.cases} cases, where {MIN_CASES} are wanted; run qualify again"
    yield from _conduct_problems(result)


def _conduct_problems(result: ScheduleResult | HelperResult) -> Iterator[str]:
    if not result.deterministic:
        yield "two runs differ"
    if not result.guards_intact:
        yield "something beside the output was written"
    yield from (f"raised {text}" for text in result.failures)
