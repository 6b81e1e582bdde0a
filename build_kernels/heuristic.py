# SPDX-License-Identifier: Apache-2.0
"""Reads heuristic.json, the coefficients of the cost model that were fitted to a sweep on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from machete_aot.config import ScheduleConfig, TypeConfig
from machete_aot.decode import decode, parse_json
from machete_aot.manifest import Heuristic, HeuristicTable
from machete_aot.manifest_rules import MAX_MANIFEST_BYTES
from machete_aot.selection import COEFFICIENTS

from .errors import BuildError
from .paths import HEURISTIC

_UNFITTED = Heuristic(version=2, tables=())


def read_heuristic(path: Path = HEURISTIC) -> Heuristic:
    """The fitted data; without a file, data that fit nothing. Raises BuildError if the file is not valid."""
    if not path.is_file():
        return _UNFITTED
    problems: list[str] = []
    document = parse_json(path.read_bytes(), MAX_MANIFEST_BYTES, problems)
    found = decode(Heuristic, document, "heuristic", problems) if not problems else None
    if isinstance(found, Heuristic):
        problems.extend(_model_problems(found))
        if not problems:
            return found
    raise BuildError(f"{path} is not valid; write it with the sweep's fit", problems)


def _model_problems(heuristic: Heuristic) -> Iterator[str]:
    """What the model in machete_aot/selection.py could not predict from."""
    for table in heuristic.tables:
        for types, schedules in table.coefficients.items():
            for schedule, coefficients in schedules.items():
                if coefficients.keys() != set(COEFFICIENTS):
                    yield (
                        f"{table.device} {types} {schedule}: coefficients {sorted(coefficients)}, wanted "
                        f"{sorted(COEFFICIENTS)}"
                    )


def fitted_to(
    heuristic: Heuristic, served: Sequence[tuple[TypeConfig, ScheduleConfig]], *, allow_unfitted: bool = False
) -> Heuristic:
    """The part of the data that concerns these types and schedules.

    Raises BuildError if some have coefficients in no table. They need not be in all: a GPU without a table of its own
    for some types gets another's, scaled.
    """
    missing: list[str] = [] if heuristic.tables else ["any: there is no table"]
    if heuristic.tables:
        fitted = {(t, s) for table in heuristic.tables for t, found in table.coefficients.items() for s in found}
        missing += [f"{t.name} {s.name}" for t, s in served if (t.name, s.name) not in fitted]
    if missing and not allow_unfitted:
        raise BuildError(
            "schedules without coefficients in build_kernels/heuristic.json; fit them, or build with --allow-unfitted",
            missing,
        )
    wanted: dict[str, set[str]] = {}
    for types, schedule in served:
        wanted.setdefault(types.name, set()).add(schedule.name)
    return Heuristic(heuristic.version, tuple(_part_of(table, wanted) for table in heuristic.tables))


def _part_of(table: HeuristicTable, wanted: Mapping[str, set[str]]) -> HeuristicTable:
    coefficients = {
        types: {name: dict(values) for name, values in found.items() if name in wanted[types]}
        for types, found in table.coefficients.items()
        if types in wanted
    }
    measured = {
        types: dataclasses.replace(
            found, deviations={s: text for s, text in found.deviations.items() if s in coefficients[types]}
        )
        for types, found in table.measured.items()
        if types in coefficients
    }
    return dataclasses.replace(table, coefficients=coefficients, measured=measured)
