# SPDX-License-Identifier: Apache-2.0
"""Reads heuristic.json, the coefficients of the cost model that were fitted to a sweep on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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
    """The part of the data that concerns these types and schedules. Raises BuildError if some have no coefficients."""
    missing: list[str] = [] if heuristic.tables else ["any: there is no table"]
    tables = tuple(_fitted_to(table, served, missing) for table in heuristic.tables)
    if missing and not allow_unfitted:
        raise BuildError(
            "schedules without coefficients in build_kernels/heuristic.json; fit them, or build with --allow-unfitted",
            missing,
        )
    return Heuristic(heuristic.version, tables)


def _fitted_to(
    table: HeuristicTable, served: Sequence[tuple[TypeConfig, ScheduleConfig]], missing: list[str]
) -> HeuristicTable:
    coefficients: dict[str, dict[str, dict[str, float]]] = {}
    for types, schedule in served:
        found = table.coefficients.get(types.name, {}).get(schedule.name)
        if found:
            coefficients.setdefault(types.name, {})[schedule.name] = dict(found)
        else:
            missing.append(f"{table.device} {types.name} {schedule.name}")
    measured = {
        types: dataclasses.replace(
            found, deviations={s: text for s, text in found.deviations.items() if s in coefficients[types]}
        )
        for types, found in table.measured.items()
        if types in coefficients
    }
    return dataclasses.replace(table, coefficients=coefficients, measured=measured)
