# SPDX-License-Identifier: Apache-2.0
"""Fits the cost model of machete_aot.selection to sweeps and writes build_kernels/heuristic.json.

    python -m benchmarks.fit sweep.json --held-out held_out.json

Each schedule's coefficients are fitted to its own times: a simplex search, from several starts, for the least squared
logarithm of predicted over measured time, with a weak pull to the start. A time counts the more the nearer it is to
the best schedule's of that product, because those decide. What the model still misses at the measured products goes
into the file too. Then the schedule that the model chooses is compared with the best one, also on products that the
fit has not seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from scipy.optimize import minimize

from build_kernels.catalogue import TYPES, schedules, typed_schedules
from build_kernels.paths import HEURISTIC
from machete_aot.config import ScheduleConfig, TypeConfig
from machete_aot.manifest import HeuristicTable, Measured
from machete_aot.manifest_rules import DEVIATION_ZERO, MOST_DEVIATION, NOT_MEASURED
from machete_aot.selection import COEFFICIENTS, Work, corrections, predict, times_us, work_of

BANDWIDTH = {"H100": 3.05e6, "H200": 4.6e6}  # bytes per microsecond that long products reach in the sweeps
STARTS = ((2.0, 0.5, 0.3, 0.4), (1.0, 1.0, 0.1, 0.6), (3.0, 0.2, 0.6, 0.2))  # of the coefficients in microseconds
GIVE_US, WAVE, MEMORY_RATE = 1.0, 0.7, 1.0  # start of the others
PULL = 1e-3
NEARNESS = 2  # a time counts (best / time) ** NEARNESS
KNOWN = {types.name: types for types in TYPES}
Fitted = dict[str, dict[str, dict[str, float]]]  # types, schedule, coefficient
Point = tuple[Work, float, float]  # what the model sees, measured microseconds, weight


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in paths]


def points_of(rows: Iterable[dict[str, Any]], types: TypeConfig, schedule: ScheduleConfig, sms: int) -> list[Point]:
    """The measured products of these types that the schedule suits."""
    points = []
    for row in rows:
        time = row["us"].get(schedule.name)
        if row["types"] == types.name and time and schedule.tile.suits(row["m"]):
            work = work_of(schedule, types, (row["m"], row["n"], row["k"]), sms)
            points.append((work, time, (min(row["us"].values()) / time) ** NEARNESS))
    return points


def coefficients_of(x: Sequence[float]) -> dict[str, float]:
    """From the search's unbounded variables: logarithms, and for the wave a logit."""
    values = {name: math.exp(value) for name, value in zip(COEFFICIENTS, x, strict=True)}
    values["wave"] = 1 / (1 + 1 / values["wave"])
    return values


def fit(points: Sequence[Point], bandwidth: float) -> dict[str, float]:
    """The coefficients of one schedule."""
    best = None
    for start in STARTS:
        x0 = [math.log(value) for value in (*start, GIVE_US, WAVE / (1 - WAVE), MEMORY_RATE)]

        def loss(x: Sequence[float], x0: Sequence[float] = x0) -> float:
            coefficients = coefficients_of(x)
            total = PULL * sum((a - b) ** 2 for a, b in zip(x, x0, strict=True))
            for work, time, weight in points:
                total += weight * math.log(times_us(work, coefficients, bandwidth)[0] / time) ** 2
            return total

        options = {"maxfev": 2500, "xatol": 1e-3, "fatol": 1e-6, "adaptive": True}
        found = minimize(loss, x0, method="Nelder-Mead", options=options)
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    return {name: float(f"{value:.4g}") for name, value in coefficients_of(best.x).items()}


def measured_of(
    rows: Iterable[dict[str, Any]],
    types: TypeConfig,
    fitted: Mapping[str, Mapping[str, float]],
    sms: int,
    bandwidth: float,
) -> Measured:
    """What the model misses at the measured products of these types."""
    known = {s.name: s for s in schedules()}
    rows = [row for row in rows if row["types"] == types.name]
    texts: dict[str, str] = {name: "" for name in fitted}
    for row in rows:
        product = (row["m"], row["n"], row["k"])
        for name, coefficients in fitted.items():
            if name not in row["us"] or not known[name].tile.suits(row["m"]):
                texts[name] += NOT_MEASURED
                continue
            model = predict(known[name], types, product, sms, coefficients, bandwidth).time_us
            percent = round(100 * math.log(row["us"][name] / model))
            texts[name] += chr(DEVIATION_ZERO + max(-MOST_DEVIATION, min(MOST_DEVIATION, percent)))
    return Measured(tuple((row["m"], row["n"], row["k"]) for row in rows), texts)


def regret(rows: Iterable[dict[str, Any]], table: HeuristicTable, label: str) -> None:
    """Prints how much slower the chosen schedule is than the best measured one."""
    known = {s.name: s for s in schedules()}
    losses = []
    for row in rows:
        types, product = row["types"], (row["m"], row["n"], row["k"])
        coefficients, factors = table.coefficients[types], corrections(table.measured[types], product)
        measured = {name: us for name, us in row["us"].items() if name in coefficients}
        times = {
            name: predict(
                known[name], KNOWN[types], product, table.sms, coefficients[name], table.bytes_per_us, factors[name]
            ).time_us
            for name in measured
            if known[name].tile.suits(row["m"])
        }
        chosen, best = min(times, key=lambda name: times[name]), min(measured, key=lambda name: measured[name])
        losses.append((measured[chosen] / measured[best], types, product, chosen, best))
    mean = statistics.geometric_mean(loss[0] for loss in losses)
    over = sum(loss[0] > 1.05 for loss in losses)
    print(f"{label}: chosen / best {mean:.3f} in the geometric mean, over 1.05 in {over} of {len(losses)}; the worst:")
    for slowdown, types, product, chosen, best in sorted(losses, reverse=True)[:8]:
        print(f"  {slowdown:.3f}  {types} {product}: {chosen} instead of {best}")


def write_table(path: Path, table: HeuristicTable) -> None:
    """Writes a device's table beside those of other devices that the file has; types that it lacks keep what they have.

    Those must have been fitted with the same bandwidth: a table has one.
    """
    others = json.loads(path.read_text())["tables"] if path.is_file() else []
    made = dataclasses.asdict(table)
    for other in (other for other in others if other["device"] == table.device):
        kept = [types for types in other["coefficients"] if types not in table.coefficients]
        if kept and any(
            other[name] != made[name] for name in ("sms", "bytes_per_us", "clock_mhz", "peak_bytes_per_us")
        ):
            raise SystemExit(
                f"{path} has {', '.join(kept)} of another {table.device}: fit all types from sweeps of one"
            )
        for part in ("coefficients", "measured"):
            made[part] |= {types: other[part][types] for types in kept if types in other[part]}
        if kept and other["source"] != made["source"]:
            made["source"] = f"{made['source']}; {', '.join(kept)}: {other['source']}"
    tables = [other for other in others if other["device"] != table.device] + [made]
    document = {"version": 2, "tables": sorted(tables, key=lambda t: str(t["device"]))}
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.fit", description=__doc__)
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--held-out", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, default=HEURISTIC)
    options = parser.parse_args()
    sweeps = load(options.sweeps)
    device = sweeps[0]["device"]
    bandwidth = next(value for name, value in BANDWIDTH.items() if name in device["name"])
    rows = [row for sweep in sweeps for row in sweep["rows"]]
    fitted: Fitted = {types: {} for types in sorted({row["types"] for row in rows})}
    with ProcessPoolExecutor() as pool:
        jobs = {}
        for types, schedule in typed_schedules():
            if points := points_of(rows, types, schedule, device["sms"]):
                jobs[types.name, schedule.name] = pool.submit(fit, points, bandwidth)
        for (types, name), job in jobs.items():
            fitted[types][name] = job.result()
    table = HeuristicTable(
        source=f"{device['name']}, {sweeps[0]['date']}: python -m benchmarks.sweep, python -m benchmarks.fit",
        device=device["name"],
        sms=device["sms"],
        clock_mhz=device["clock_mhz"],
        peak_bytes_per_us=device["peak_bytes_per_us"],
        bytes_per_us=bandwidth,
        coefficients=fitted,
        measured={t: measured_of(rows, KNOWN[t], found, device["sms"], bandwidth) for t, found in fitted.items()},
    )
    write_table(options.out, table)
    regret(rows, table, "fitted")
    held_out = [row for sweep in load(options.held_out) for row in sweep["rows"]]
    if held_out:
        regret(held_out, table, "held out")


if __name__ == "__main__":
    main()
