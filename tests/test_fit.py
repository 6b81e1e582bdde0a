# SPDX-License-Identifier: Apache-2.0
"""Sweeps of any kernel types become coefficients under the types' names, beside those that the file has already."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from benchmarks import fit
from build_kernels.catalogue import GENERAL_8, SYMMETRIC, typed_schedules
from build_kernels.errors import BuildError
from build_kernels.heuristic import fitted_to, read_heuristic
from machete_aot.config import ScheduleConfig, TypeConfig
from machete_aot.part import H100
from machete_aot.selection import COEFFICIENTS, times_us, work_of

TRUE = dict(zip(COEFFICIENTS, (2.0, 0.4, 0.3, 0.4, 1.0, 0.7, 0.9), strict=True))
PRODUCTS = [(m, n, k) for m in (1, 8) for n, k in ((4096, 4096), (28672, 4096), (8192, 8192))]


def schedules_of(types: TypeConfig) -> list[ScheduleConfig]:
    """Two schedules of few tokens."""
    return [s for t, s in typed_schedules() if t == types and s.tile.tokens == 8 and s.tile.family == "stream"][:2]


def sweep(path: Path, *all_types: TypeConfig, clock: float = H100.clock_mhz) -> Path:
    """A sweep's file of times that the model explains entirely."""
    rows = [
        {
            **{"types": types.name, "m": m, "n": n, "k": k, "group": 128, "cublas_us": 1.0},
            "us": {
                s.name: times_us(work_of(s, types, (m, n, k), H100.sms), TRUE, fit.BANDWIDTH["H100"])[0]
                for s in schedules_of(types)
            },
        }
        for types in all_types
        for m, n, k in PRODUCTS
    ]
    device = {**H100.facts(), "clock_mhz": clock}
    path.write_text(json.dumps({"device": device, "date": "2026-11-22", "rows": rows}))
    return path


def run(monkeypatch: pytest.MonkeyPatch, out: Path, arguments: Sequence[object]) -> None:
    monkeypatch.setattr(sys, "argv", ["fit", *map(str, arguments), "--out", str(out)])
    fit.main()


def test_types_are_fitted_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, first, second = tmp_path / "heuristic.json", SYMMETRIC[0], GENERAL_8[0]
    run(monkeypatch, out, [sweep(tmp_path / "a.json", first)])
    alone = json.loads(out.read_text())["tables"][0]
    run(monkeypatch, out, [sweep(tmp_path / "b.json", second)])
    (table,) = json.loads(out.read_text())["tables"]
    assert table["coefficients"].keys() == table["measured"].keys() == {first.name, second.name}
    for part in ("coefficients", "measured"):
        assert table[part][first.name] == alone[part][first.name]
    names = {s.name for s in schedules_of(second)}
    assert table["coefficients"][second.name].keys() == table["measured"][second.name]["deviations"].keys() == names

    served = [(types, s) for types in (first, second) for s in schedules_of(types)]
    heuristic = fitted_to(read_heuristic(out), served)
    with pytest.raises(BuildError, match=GENERAL_8[1].name):
        fitted_to(read_heuristic(out), [*served, (GENERAL_8[1], served[-1][1])])
    found = heuristic.tables[0]
    for types, schedule in served:
        for product in PRODUCTS:
            work = work_of(schedule, types, product, H100.sms)
            wanted = times_us(work, TRUE, found.bytes_per_us)[0]
            fitted = times_us(work, found.coefficients[types.name][schedule.name], found.bytes_per_us)[0]
            assert fitted == pytest.approx(wanted, rel=0.05)


def test_a_table_is_of_one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "heuristic.json"
    run(monkeypatch, out, [sweep(tmp_path / "a.json", SYMMETRIC[0])])
    before = out.read_bytes()
    with pytest.raises(SystemExit, match="bf16_u4b8 of another NVIDIA H100"):
        run(monkeypatch, out, [sweep(tmp_path / "b.json", GENERAL_8[0], clock=1755.0)])
    assert out.read_bytes() == before
