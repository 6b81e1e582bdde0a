# SPDX-License-Identifier: Apache-2.0
"""The catalogue's rule: without one of its schedules some product of the committed sweeps would take 2% longer."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import worth
from build_kernels.catalogue import IMPLEMENTATIONS
from build_kernels.configs import ImplConfig

ROWS = worth.rows_of(path for path in worth.RESULTS.glob("sweep-*.json") if "held-out" not in path.name)

tables = pytest.mark.parametrize(
    "table", IMPLEMENTATIONS, ids=lambda t: f"{t.types[0].name}-{t.schedules[0].tile.family}"
)


# Worth 1.8% in the newest sweeps. Without it the bundle is another one, for a GPU to qualify: it goes with the next.
LEAVING = ["stream_128x32x128_r2k1_s8c1_x4"]


@tables
def test_every_schedule_is_worth_two_percent_somewhere(table: ImplConfig) -> None:
    leaving = [s.name for s in table.schedules if s.name in LEAVING]
    assert worth.unworthy(worth.worth(ROWS, table), table) == leaving


@tables
def test_every_schedule_was_measured(table: ImplConfig) -> None:
    for types in table.types:
        measured = {name for row in ROWS if row["types"] == types.name for name in row["us"]}
        assert measured >= {schedule.name for schedule in table.schedules}


def test_what_a_schedule_is_worth() -> None:
    table = next(
        t for t in IMPLEMENTATIONS if t.types[0].name == "bf16_u4b8" and t.schedules[0].tile.family == "stream"
    )
    table = dataclasses.replace(table, types=table.types[:1], schedules=table.schedules[:3])
    first, second, third = (schedule.name for schedule in table.schedules)

    def row(m: int, **us: float) -> worth.Row:
        names = {"first": first, "second": second, "third": third, "gone": "no such schedule"}
        return {"types": "bf16_u4b8", "m": m, "n": 64, "k": 128, "us": {names[x]: t for x, t in us.items()}}

    rows = [row(1, first=1.0, second=1.5, gone=0.5), row(2, first=1.0, second=1.01), row(3, third=2.0, first=2.02)]
    rows.append({**row(4, second=1.0, first=9.0), "types": "fp16_u4b8"})
    found = worth.worth(rows, table)
    assert found[first] == (1.5, "bf16_u4b8 64 x 128, M = 1")
    assert found[second] == (0, "")
    assert found[third] == (1.01, "bf16_u4b8 64 x 128, M = 3")
    kept = worth.kept_anyway(table)
    assert worth.unworthy(found, table) == [name for name in (second, third) if name not in kept]
