# SPDX-License-Identifier: Apache-2.0
"""Which schedule a product gets: a small cost model whose coefficients were fitted to measurements.

The model of a schedule's time for an (M, N, K) product, in microseconds:

    memory  = (weights + scales + zeros + activations + output, in bytes) / (bandwidth * memory_rate)
    compute = busy * cta_us + steps * max(busy * step_us, rounds * alone_us) + givers * give_us
    time    = fixed_us + (memory^4 + compute^4)^(1/4)

``busy`` is the number of CTA tiles on an SM, between their mean (wave = 0: the next kernel fills the last, partial
wave) and that of the busiest SM (wave = 1), ``rounds`` the same in rounds of all CTAs that an SM holds, and ``steps``
the ring stages that a tile goes through. A step costs the SM ``step_us``, but takes a CTA that is alone on its SM at
least ``alone_us``. Even shares have no partial wave; there ``givers`` CTAs share a tile.
The fourth-power sum is a maximum with a soft corner. Coefficients and bandwidth come from the manifest;
docs/performance.md says how they were measured.

Then the time is corrected by what the model missed at measured products nearby: the mean of ln(measured / model) over
the schedule's measured products, weighted by exp(-d^2 / 2) / (d^2 + 0.01), where d^2 is the sum of squares of the
doublings in M, N and K between the products, and pulled to 0 by a weight of 1. At a measured product that is nearly
the measured time; far from all of them it is the model.

Types that no GPU was measured with get coefficients of others, see ``stand_in``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from .config import ScheduleConfig, TileConfig, TypeConfig, ceil_div
from .errors import UnsupportedError
from .manifest import HeuristicTable, Manifest, Measured, ScheduleInfo
from .manifest_rules import DEVIATION_ZERO, NOT_MEASURED
from .part import Part
from .placement import usable_sms

COEFFICIENTS = ("fixed_us", "cta_us", "step_us", "alone_us", "give_us", "wave", "memory_rate")
FAR = 9.0  # squared distance past which a measured product says nothing
CLOCK_BOUND = ("cta_us", "step_us", "alone_us", "give_us")
OF_A_STEP = ("step_us", "alone_us")


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


def traffic(m: int, n: int, k: int, weight_bits: int = 4, group: int = 128, zero_bytes: int = 0) -> int:
    """Bytes that a product must move at least: packed weights, 16-bit scales, zeros, activations and output, each once.

    ``zero_bytes``: of a group's zero point.
    """
    return n * k * weight_bits // 8 + ceil_div(k, group) * n * (2 + zero_bytes) + 2 * m * (n + k)


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


def work_of(schedule: ScheduleConfig, types: TypeConfig, product: tuple[int, int, int], sms: int) -> Work:
    """The model's variables for a schedule of a kernel of these types. ``product`` is (M, N, K)."""
    m, n, k = product
    tile = schedule.tile
    moved = traffic(m, n, k, types.weight_bits, zero_bytes=types.zero_bytes)
    tiles = tile.tiles(m, n)
    if schedule.even_ctas:
        clusters = tile.clusters(schedule.even_ctas * sms)
        rounds = tiles / clusters  # below 1 too: a share is then a part of a tile
        busy = rounds * schedule.even_ctas
        givers = max(1, clusters / max(tiles, 1)) if tiles % clusters else 0
        ctas = clusters * tile.cluster
        return Work(moved, ctas, tile.steps(k), (busy, busy), (rounds, rounds), givers)
    split = tile.effective_split(schedule.split, k)
    ctas = tiles * split * tile.cluster
    usable = usable_sms(sms, split)
    most = ceil_div(ctas, usable)
    most_rounds = ceil_div(most, tile.ctas_per_sm)
    busy = max(ctas / usable, min(1, most))
    rounds = max(ctas / usable / tile.ctas_per_sm, min(1, most_rounds))
    return Work(moved, ctas, ceil_div(tile.steps(k), split), (busy, most), (rounds, most_rounds), 0)


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
    types: TypeConfig,
    product: tuple[int, int, int],
    sms: int,
    coefficients: Mapping[str, float],
    bandwidth: float,
    factor: float = 1.0,
    name: str | None = None,
) -> Candidate:
    """The model above for one schedule. ``product`` is (M, N, K), ``bandwidth`` in bytes per microsecond.

    ``name``: the schedule's, where it is at hand.
    """
    work = work_of(schedule, types, product, sms)
    time, memory, compute = times_us(work, coefficients, bandwidth)
    fixed = coefficients["fixed_us"]
    return Candidate(
        name or schedule.name, time * factor, memory, compute, fixed, factor, work.ctas, work.busy[1], work.steps
    )


def table_for(manifest: Manifest, part: Part, types_name: str) -> HeuristicTable:
    """A table with coefficients for these types on a GPU.

    That of the GPU itself; where it has none for these types, the most similar GPU's, scaled; where no GPU has, the
    table that ``stand_in`` makes. Similar is what has the nearest ratio of memory bandwidth to SM clocks, which decides
    what limits a schedule. Times of CTAs and steps are scaled by the SM clocks, memory by the bandwidths; fixed times
    are not, and the number of SMs enters the model itself. Raises UnsupportedError if there is nothing to predict from.
    """
    for table in manifest.tables_for(types_name, part.name):
        if table.sms == part.sms and table.coefficients.get(types_name):
            return table
    known = manifest.tables_for(types_name)
    if not known:
        raise UnsupportedError(
            "the bundle's manifest has no table of schedules' costs; name one of supported_schedules(...) with "
            "schedule=, or use a bundle that was built with its heuristic"
        )
    tables = [t for t in known if t.coefficients.get(types_name)]
    if not tables:
        return _stand_in(ByIdentity(manifest), part, types_name)
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
        sms=part.sms,
        clock_mhz=part.clock_mhz,
        peak_bytes_per_us=part.peak_bytes_per_us,
        bytes_per_us=table.bytes_per_us * memory,
        coefficients={
            types: {name: _clock_scaled(found, clock) for name, found in schedules.items()}
            for types, schedules in table.coefficients.items()
        },
    )


def _clock_scaled(coefficients: Mapping[str, float], scale: float) -> dict[str, float]:
    return {name: value * scale if name in CLOCK_BOUND else value for name, value in coefficients.items()}


def stand_in(manifest: Manifest, part: Part, types_name: str) -> HeuristicTable:
    """Coefficients for types that no GPU was measured with: those of measured types with the same activations.

    Each schedule takes those of the measured one whose tile has the same shape and, if possible, the same division of
    K; failing that, of the nearest tile of its family in tokens, then in rows, whose times of a step are taken in
    proportion to the step. Bytes are counted as they are, and never faster than the memory's peak: a rate that was
    fitted to products which memory does not limit may be anything. What the other types' measurements say beyond the
    model is left out. Raises UnsupportedError where there are no such types.
    """
    types = _types_named(manifest, types_name)
    fitted = {name for table in manifest.heuristic.tables for name, found in table.coefficients.items() if found}
    donor = next((t for t in manifest.types if t.a == types.a and t.name in fitted), None)
    if donor is None:
        raise UnsupportedError(
            f"the bundle's manifest has no fitted schedule for {types_name}, nor for other types with {types.a} "
            "activations; name one of supported_schedules(...) with schedule=, or use a bundle that was built with its "
            "heuristic"
        )
    table = table_for(manifest, part, donor.name)
    fitted_schedules = table.coefficients[donor.name]
    known = [(s, fitted_schedules[name]) for name, s in _schedules_of(manifest, donor) if name in fitted_schedules]
    found = {}
    for name, schedule in _schedules_of(manifest, types):
        near, coefficients = min(known, key=lambda pair: _distance(pair[0], schedule))
        size = _step_size(schedule.tile) / _step_size(near.tile)
        found[name] = {c: value * size if c in OF_A_STEP else value for c, value in coefficients.items()}
        found[name]["memory_rate"] = min(found[name]["memory_rate"], table.peak_bytes_per_us / table.bytes_per_us)
    return dataclasses.replace(
        table,
        source=f"{table.source}; {types_name} was not measured, coefficients of {donor.name} stand in for its own",
        device=part.name,
        sms=part.sms,
        coefficients={types_name: found},
        measured={},
    )


@functools.lru_cache(maxsize=16)
def _stand_in(key: ByIdentity[Manifest], part: Part, types_name: str) -> HeuristicTable:
    return stand_in(key.value, part, types_name)


def _step_size(tile: TileConfig) -> int:
    return tile.step_units * tile.rows


def _distance(measured: ScheduleConfig, wanted: ScheduleConfig) -> tuple[float, ...]:
    """How much two schedules differ, the least telling last."""
    a, b = measured.tile, wanted.tile
    return (
        a.family != b.family,
        abs(math.log2(a.tokens / b.tokens)),
        abs(math.log2(a.rows / b.rows)),
        (measured.split == 0) != (wanted.split == 0),
        a.cluster != b.cluster,
        a.ctas_per_sm != b.ctas_per_sm,
        abs(math.log2(a.step_units / b.step_units)),
        abs(measured.split - wanted.split) + abs(measured.even_ctas - wanted.even_ctas),
    )


def _types_named(manifest: Manifest, name: str) -> TypeConfig:
    types = manifest.types_named(name)
    if types is not None:
        return types
    raise UnsupportedError(f"the bundle has no kernels for {name}, it has {', '.join(t.name for t in manifest.types)}")


def _schedules_of(manifest: Manifest, types: TypeConfig) -> list[tuple[str, ScheduleConfig]]:
    """The schedules of these types, by name: making one up from its parts takes longer than all else here."""
    tiles = {kernel.tile.name: kernel.tile for kernel in manifest.kernels_for(types)}
    return [(s.name, ScheduleConfig(tiles[s.tile], s.split, s.even_ctas)) for s in manifest.schedules_for(types)]


def corrections(
    measured: Measured, product: tuple[int, int, int], schedules: Iterable[str] | None = None
) -> dict[str, float]:
    """The factor of each measured schedule's time (None: of all) at an (M, N, K) product, as above."""
    m, n, k = (math.log2(size) for size in product)
    near = []
    for index, (log_m, log_n, log_k) in enumerate(zip(*measured.logarithms, strict=True)):
        distance = (log_m - m) ** 2 + (log_n - n) ** 2 + (log_k - k) ** 2
        if distance < FAR:
            near.append((index, math.exp(-distance / 2) / (distance + 0.01)))
    factors = {}
    none = ord(NOT_MEASURED)
    for schedule in measured.deviations if schedules is None else schedules:
        codes = measured.deviations.get(schedule, "").encode("ascii")
        if not codes:
            continue
        total, weights = 0.0, 1.0
        for index, weight in near:
            code = codes[index]
            if code != none:
                total += weight * (code - DEVIATION_ZERO)
                weights += weight
        factors[schedule] = math.exp(total / weights / 100)
    return factors


def explain(manifest: Manifest, types_name: str, m: int, n: int, k: int, part: Part) -> Explanation:
    """The schedules that the bundle holds for these types and that suit ``m`` tokens, with their predicted times.

    Raises UnsupportedError if the manifest has nothing to predict them from.
    """
    types = _types_named(manifest, types_name)
    table = table_for(manifest, part, types_name)
    coefficients = table.coefficients[types_name]
    fitted = [(name, schedule) for name, schedule in _schedules_of(manifest, types) if name in coefficients]
    if not fitted:
        raise UnsupportedError(
            f"the bundle's manifest has no fitted schedule for {types_name}; name one of supported_schedules(...) with "
            "schedule=, or use a bundle that was built with its heuristic"
        )
    suitable = [pair for pair in fitted if pair[1].tile.suits(m)] or fitted
    measured = table.measured.get(types_name)
    factors = corrections(measured, (m, n, k), [name for name, _ in suitable]) if measured else {}
    candidates = [
        predict(s, types, (m, n, k), part.sms, coefficients[name], table.bytes_per_us, factors.get(name, 1.0), name)
        for name, s in suitable
    ]
    candidates.sort(key=lambda c: c.time_us)
    return Explanation(types_name, m, n, k, part.sms, table.source, tuple(candidates))


def select(manifest: Manifest, types_name: str, m: int, n: int, k: int, part: Part) -> ScheduleInfo:
    """The schedule with the shortest predicted time. Raises UnsupportedError like ``explain``."""
    return manifest.schedule(explain(manifest, types_name, m, n, k, part).chosen)
