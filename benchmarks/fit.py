# SPDX-License-Identifier: Apache-2.0
"""Fits the cost model of machete_aot.selection to sweeps and writes build_kernels/heuristic.json.

    python -m benchmarks.fit sweep.json --held-out held_out.json

Each schedule has four coefficients, fitted to its own times by a pattern search on the squared logarithm of predicted
over measured time. A time counts the more the nearer it is to the best schedule's of that product, because only
those decide. Then the schedule that the model chooses is compared with the best one, also on products that the
fit has not seen.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from build_kernels.catalogue import schedules
from machete_aot.config import ScheduleConfig
from machete_aot.selection import COEFFICIENTS, predict

BANDWIDTH = 3.05e6  # bytes per microsecond that long products reach in the sweep (an H100's reads alone: 3.15)
START = {"fixed_us": 2.0, "cta_us": 0.5, "step_us": 0.3, "alone_us": 0.4}
NEARNESS = 6  # a time counts (best / time) ** NEARNESS
Fitted = dict[str, dict[str, dict[str, float]]]  # types, schedule, coefficient
Point = tuple[tuple[int, int, int], float, float]  # (m, n, k), measured microseconds, weight


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in paths]


def points_of(rows: Iterable[dict[str, Any]], types: str, schedule: str) -> list[Point]:
    points = []
    for row in rows:
        if row["types"] == types and schedule in row["us"]:
            time = row["us"][schedule]
            points.append(((row["m"], row["n"], row["k"]), time, (min(row["us"].values()) / time) ** NEARNESS))
    return points


def loss(schedule: ScheduleConfig, coefficients: dict[str, float], points: Sequence[Point], sms: int) -> float:
    total = 0.0
    for product, time, weight in points:
        found = predict(schedule.name, schedule.tile, schedule.split, product, sms, coefficients, BANDWIDTH)
        total += weight * math.log(found.time_us / time) ** 2
    return total


def fit(schedule: ScheduleConfig, points: Sequence[Point], sms: int) -> dict[str, float]:
    """Pattern search: each coefficient in turn is multiplied or divided by a factor that shrinks when nothing helps."""
    best = dict(START)
    score, factor = loss(schedule, best, points, sms), 2.0
    while factor > 1.002:
        improved = False
        for name in COEFFICIENTS:
            for scale in (factor, 1 / factor):
                trial = {**best, name: best[name] * scale}
                found = loss(schedule, trial, points, sms)
                if found < score:
                    best, score, improved = trial, found, True
        if not improved:
            factor = math.sqrt(factor)
    return {name: round(value, 5) for name, value in best.items()}


def regret(
    rows: Iterable[dict[str, Any]], fitted: dict[str, dict[str, dict[str, float]]], sms: int, label: str
) -> None:
    """Prints how much slower the chosen schedule is than the best measured one."""
    known = {s.name: s for s in schedules()}
    losses = []
    for row in rows:
        coefficients = fitted[row["types"]]
        product = (row["m"], row["n"], row["k"])
        times = {
            name: predict(name, known[name].tile, known[name].split, product, sms, found, BANDWIDTH).time_us
            for name, found in coefficients.items()
            if name in row["us"]
        }
        chosen, best = min(times, key=lambda name: times[name]), min(row["us"], key=lambda name: row["us"][name])
        losses.append((row["us"][chosen] / row["us"][best], row["types"], product, chosen, best))
    mean = math.exp(sum(math.log(loss[0]) for loss in losses) / len(losses))
    print(f"{label}: {len(losses)} products, chosen / best {mean:.3f} in the geometric mean; the worst:")
    for slowdown, types, product, chosen, best in sorted(losses, reverse=True)[:8]:
        print(f"  {slowdown:.3f}  {types} {product}: {chosen} instead of {best}")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.fit", description=__doc__)
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--held-out", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, default=Path("build_kernels/heuristic.json"))
    options = parser.parse_args()
    sweeps = load(options.sweeps)
    device = sweeps[0]["device"]
    rows = [row for sweep in sweeps for row in sweep["rows"]]
    fitted: Fitted = {types: {} for types in sorted({row["types"] for row in rows})}
    with ProcessPoolExecutor() as pool:
        jobs = {}
        for types in fitted:
            for schedule in schedules():
                if points := points_of(rows, types, schedule.name):
                    jobs[types, schedule.name] = pool.submit(fit, schedule, points, device["sms"])
        for (types, name), job in jobs.items():
            fitted[types][name] = job.result()
    source = f"{device['name']}, {sweeps[0]['date']}: python -m benchmarks.sweep, python -m benchmarks.fit"
    document = {
        "version": 1,
        "source": source,
        "device": {**device, "bandwidth_bytes_per_us": BANDWIDTH},
        "coefficients": fitted,
    }
    options.out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    regret(rows, fitted, device["sms"], "fitted")
    held_out = [row for sweep in load(options.held_out) for row in sweep["rows"]]
    if held_out:
        regret(held_out, fitted, device["sms"], "held out")


if __name__ == "__main__":
    main()
