# SPDX-License-Identifier: Apache-2.0
"""Which schedule a product gets: a small cost model whose coefficients were fitted to measurements.

The model of a schedule's time for an (M, N, K) product, in microseconds:

    memory  = (weights + scales + activations + output, in bytes) / (bandwidth * memory_rate)
    compute = busy * cta_us + steps * max(busy * step_us, rounds * alone_us) + givers * give_us
    time    = fixed_us + (memory^4 + compute^4)^(1/4)

``busy`` is the number of CTA tiles on an SM, between their mean (wave = 0: the next kernel fills the last, partial
wave) and that of the busiest SM (wave = 1), ``rounds`` the same in rounds of all CTAs that an SM holds, and ``steps``
the ring stages that a tile goes through. A step costs the SM ``step_us``, but takes a CTA that is alone on its SM at
least ``alone_us``. Even shares have no partial wave; there ``givers`` CTAs share a tile.
The fourth-power sum is a maximum with a soft corner. Coefficients and bandwidth come from the manifest;
docs/performance.md says how they were measured.

Then the time is corrected by what the model missed at measured products nearby: the mean of ln(measured / model) over
the schedule's measured products, weighted by exp(-d^2 / 2) / (d^2 + 0.05), where d^2 is the sum of squares of the
doublings in M, N and K between the products, and pulled to 0 by a weight of 1. At a measured product that is nearly
the measured time; far from all of them it is the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from .config import ScheduleConfig, ceil_div
from .errors import UnsupportedError
from .manifest import HeuristicTable, Manifest, Measured, ScheduleInfo
from .manifest_rules import DEVIATION_ZERO, NOT_MEASURED
from .part import Part

COEFFICIENTS = ("fixed_us", "cta_us", "step_us", "alone_us", "give_us", "wave", "memory_rate")
FAR = 9.0  # squared distance past which a measured product says nothing
CLOCK_BOUND = ("cta_us", "step_us", "alone_us", "give_us")


@dataclass(frozen=True)
class Candidate:
    """One schedule's prediction for one product. Times in microseconds."""

    schedule: str
    time_us: float
    memory_us: float
    compute_us: float
    fixed_us: float
    correction: float
    ctas: int
    per_sm: float
    steps: int


@dataclass(frozen=True)
class Explanation:
    """Why a product gets its schedule: every candidate, fastest first."""

    types: str
    m: int
    n: int
    k: int
    sms: int
    source: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> str:
        return self.candidates[0].schedule

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {"chosen": self.chosen, **asdict(self)}

    def text(self, most: int = 12) -> str:
        """A table of the ``most`` fastest candidates."""
        best = self.candidates[0].time_us
        lines = [
            f"{self.types}  M={self.m} N={self.n} K={self.k} on {self.sms} SMs: {self.chosen}",
            f"predicted from {self.source}; time = correction * (fixed + (memory^4 + compute^4)^(1/4)), microseconds",
            f"{'schedule':40} {'time':>8} {'memory':>8} {'compute':>8} {'fixed':>6} {'correction':>10}   "
            "CTAs per SM  steps",
        ]
        for c in self.candidates[:most]:
            verdict = "chosen" if c.schedule == self.chosen else f"{c.time_us / best - 1:+.0%}"
            lines.append(
                f"{c.schedule:40} {c.time_us:8.1f} {c.memory_us:8.1f} {c.compute_us:8.1f} {c.fixed_us:6.1f} "
                f"{c.correction:10.2f} {c.ctas:6} {c.per_sm:6.4g} {c.steps:6}  {verdict}"
            )
        if len(self.candidates) > most:
            lines.append(f"and {len(self.candidates) - most} slower ones")
        return "\n".join(lines)


def traffic(m: int, n: int, k: int, weight_bits: int = 4, group: int = 128) -> int:
    """Bytes that a product must move at least: packed weights, 16-bit scales, activations and output, each once."""
    return n * k * weight_bits // 8 + ceil_div(k, group) * n * 2 + 2 * m * (n + k)


Value = TypeVar("Value")


class ByIdentity(Generic[Value]):
    """A part of a manifest as the key of a cache: it has no hash of its own, and comparing two takes long."""

    def __init__(self, value: Value) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.value is other.value


class Work(NamedTuple):
    """What a schedule makes of a product on a number of SMs: the model's variables.

    ``busy`` and ``rounds`` come as (mean, most): with the last wave spread over all SMs, and on the busiest one.
    """

    bytes: int
    ctas: int
    steps: int
    busy: tuple[float, float]
    rounds: tuple[float, float]
    givers: float


def work_of(schedule: ScheduleConfig, product: tuple[int, int, int], sms: int) -> Work:
    """The model's variables for a schedule. ``product`` is (M, N, K)."""
    m, n, k = product
    tile = schedule.tile
    tiles = ceil_div(n, tile.rows) * ceil_div(m, tile.tokens)
    if schedule.even_ctas:
        ctas = schedule.even_ctas * sms
        busy, rounds = tiles / sms, tiles / ctas  # below 1 too: a share is then a part of a tile
        givers = max(1, ctas / max(tiles, 1)) if tiles % ctas else 0
        return Work(traffic(m, n, k), ctas, tile.steps(k), (busy, busy), (rounds, rounds), givers)
    split = tile.effective_split(schedule.split, k)
    ctas = tiles * split
    usable = sms if split <= 2 else max(1, sms * 10 // 11)  # clusters of 4 and 8 leave SMs of a GPC unused
    most = ceil_div(ctas, usable)
    most_rounds = ceil_div(most, tile.ctas_per_sm)
    busy = max(ctas / usable, min(1, most))
    rounds = max(ctas / usable / tile.ctas_per_sm, min(1, most_rounds))
    return Work(traffic(m, n, k), ctas, ceil_div(tile.steps(k), split), (busy, most), (rounds, most_rounds), 0)


def times_us(work: Work, coefficients: Mapping[str, float], bandwidth: float) -> tuple[float, float, float]:
    """(time, memory, compute) of the model above. ``bandwidth`` in bytes per microsecond."""
    wave = coefficients["wave"]
    busy, rounds = (mean + wave * (most - mean) for mean, most in (work.busy, work.rounds))
    memory = work.bytes / (bandwidth * coefficients["memory_rate"])
    compute = (
        busy * coefficients["cta_us"]
        + work.steps * max(busy * coefficients["step_us"], rounds * coefficients["alone_us"])
        + work.givers * coefficients["give_us"]
    )
    return coefficients["fixed_us"] + (memory**4 + compute**4) ** 0.25, memory, compute


def predict(
    schedule: ScheduleConfig,
    product: tuple[int, int, int],
    sms: int,
    coefficients: Mapping[str, float],
    bandwidth: float,
    factor: float = 1.0,
) -> Candidate:
    """The model above for one schedule. ``product`` is (M, N, K), ``bandwidth`` in bytes per microsecond."""
    work = work_of(schedule, product, sms)
    time, memory, compute = times_us(work, coefficients, bandwidth)
    fixed = coefficients["fixed_us"]
    return Candidate(schedule.name, time * factor, memory, compute, fixed, factor, work.ctas, work.busy[1], work.steps)


def table_for(manifest: Manifest, part: Part) -> HeuristicTable:
    """The manifest's table for a GPU; for one that was not measured, that of the most similar one, scaled to it.

    Similar is what has the nearest ratio of memory bandwidth to SM clocks, which decides what limits a schedule. Times
    of CTAs and steps are scaled by the SM clocks, memory by the bandwidths; fixed times are not, and the number of SMs
    enters the model itself. Raises UnsupportedError if the manifest has no table.
    """
    tables = manifest.heuristic.tables
    for table in tables:
        if (table.device, table.sms) == (part.name, part.sms):
            return table
    if not tables:
        raise UnsupportedError(
            "the bundle's manifest has no table of schedules' costs; name one of supported_schedules(...) with "
            "schedule=, or use a bundle that was built with its heuristic"
        )
    balance = math.log(part.peak_bytes_per_us / (part.clock_mhz * part.sms))
    near = min(tables, key=lambda t: abs(math.log(t.peak_bytes_per_us / (t.clock_mhz * t.sms)) - balance))
    return _scaled(ByIdentity(near), part)


@functools.lru_cache(maxsize=16)
def _scaled(key: ByIdentity[HeuristicTable], part: Part) -> HeuristicTable:
    table = key.value
    clock, memory = table.clock_mhz / part.clock_mhz, part.peak_bytes_per_us / table.peak_bytes_per_us
    return dataclasses.replace(
        table,
        source=f"{table.source}; derived for {part.name} from {table.device}: SM clock x{1 / clock:.2f}, memory "
        f"bandwidth x{memory:.2f}, {part.sms} SMs",
        device=part.name,
        bytes_per_us=table.bytes_per_us * memory,
        coefficients={
            types: {name: _clock_scaled(found, clock) for name, found in schedules.items()}
            for types, schedules in table.coefficients.items()
        },
    )


def _clock_scaled(coefficients: Mapping[str, float], scale: float) -> dict[str, float]:
    return {name: value * scale if name in CLOCK_BOUND else value for name, value in coefficients.items()}


def corrections(measured: Measured, product: tuple[int, int, int]) -> dict[str, float]:
    """The factor of each measured schedule's time at an (M, N, K) product, as above."""
    m, n, k = (math.log2(size) for size in product)
    near = []
    for index, (log_m, log_n, log_k) in enumerate(measured.logarithms):
        distance = (log_m - m) ** 2 + (log_n - n) ** 2 + (log_k - k) ** 2
        if distance < FAR:
            near.append((index, math.exp(-distance / 2) / (distance + 0.05)))
    factors = {}
    for schedule, text in measured.deviations.items():
        total, weights = 0.0, 1.0
        for index, weight in near:
            if text[index] != NOT_MEASURED:
                total += weight * (ord(text[index]) - DEVIATION_ZERO)
                weights += weight
        factors[schedule] = math.exp(total / weights / 100)
    return factors


def explain(manifest: Manifest, types_name: str, m: int, n: int, k: int, part: Part) -> Explanation:
    """The schedules that the bundle holds for these types and that suit ``m`` tokens, with their predicted times.

    Raises UnsupportedError if the manifest has no coefficients for these types.
    """
    tiles = {kernel.tile.name: kernel.tile for kernel in manifest.kernels if kernel.types.name == types_name}
    table = table_for(manifest, part)
    coefficients = table.coefficients.get(types_name, {})
    fitted = [s for s in manifest.schedules if s.tile in tiles and s.name in coefficients]
    if not fitted:
        raise UnsupportedError(
            f"the bundle's manifest has no fitted schedule for {types_name}; name one of supported_schedules(...) with "
            "schedule=, or use a bundle that was built with its heuristic"
        )
    suitable = [s for s in fitted if tiles[s.tile].suits(m)] or fitted
    measured = table.measured.get(types_name)
    factors = corrections(measured, (m, n, k)) if measured else {}
    candidates = [
        predict(
            ScheduleConfig(tiles[s.tile], s.split, s.even_ctas),
            (m, n, k),
            part.sms,
            coefficients[s.name],
            table.bytes_per_us,
            factors.get(s.name, 1.0),
        )
        for s in suitable
    ]
    candidates.sort(key=lambda c: c.time_us)
    return Explanation(types_name, m, n, k, part.sms, table.source, tuple(candidates))


def select(manifest: Manifest, types_name: str, m: int, n: int, k: int, part: Part) -> ScheduleInfo:
    """The schedule with the shortest predicted time. Raises UnsupportedError like ``explain``."""
    return manifest.schedule(explain(manifest, types_name, m, n, k, part).chosen)
