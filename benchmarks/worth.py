# SPDX-License-Identifier: Apache-2.0
"""What each schedule is worth: the most that a swept product would lose without it: ``python -m benchmarks.worth``.

Schedules that share a table of build_kernels/catalogue.py are judged by the products of all its types. The catalogue
keeps what is worth 2%, and of family "stream" what runs without clusters (split 1).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from build_kernels.catalogue import IMPLEMENTATIONS, typed_schedules
from build_kernels.configs import ImplConfig

from .tables import RESULTS

LEAST = 1.02
Row = dict[str, Any]


class Worth(NamedTuple):
    """``loss``: the next best schedule's time over this one's, at ``product``; 0 where it is the best nowhere."""

    loss: float
    product: str


def rows_of(paths: Iterable[Path]) -> list[Row]:
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


def worth(rows: Sequence[Row], implementation: ImplConfig) -> dict[str, Worth]:
    """Of each schedule of a table, over the products of its types, beside every schedule that the catalogue has."""
    names = {types.name for types in implementation.types}
    known = {(types.name, schedule.name) for types, schedule in typed_schedules()}
    found = {schedule.name: Worth(0, "") for schedule in implementation.schedules}
    for row in rows:
        if row["types"] not in names:
            continue
        times = {name: us for name, us in row["us"].items() if (row["types"], name) in known}
        best = min(times, key=lambda name: times[name])
        others = [us for name, us in times.items() if name != best]
        if best in found and others:
            product = f"{row['types']} {row['n']} x {row['k']}, M = {row['m']}"
            found[best] = max(found[best], Worth(min(others) / times[best], product))
    return found


def kept_anyway(implementation: ImplConfig) -> set[str]:
    """Schedules of family "stream" that run without clusters."""
    return {s.name for s in implementation.schedules if s.tile.family == "stream" and s.split == 1}


def unworthy(found: Mapping[str, Worth], implementation: ImplConfig) -> list[str]:
    """The schedules that the rule would not keep."""
    return [n for n, (loss, _) in found.items() if loss < LEAST and n not in kept_anyway(implementation)]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.worth", description=__doc__)
    parser.add_argument("sweeps", nargs="*", type=Path, help="default: all in benchmarks/results but what is held out")
    options = parser.parse_args()
    paths = options.sweeps or [path for path in RESULTS.glob("sweep-*.json") if "held-out" not in path.name]
    rows = rows_of(paths)
    for implementation in IMPLEMENTATIONS:
        print(f"\n{', '.join(types.name for types in implementation.types)}")
        found = worth(rows, implementation)
        for name, (loss, product) in found.items():
            mark = "  below 2%" if name in unworthy(found, implementation) else ""
            print(f"  {name:<38} {100 * (loss - 1) if loss else 0:5.1f}%  {product}{mark}")


if __name__ == "__main__":
    main()
