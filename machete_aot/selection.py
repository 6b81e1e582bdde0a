# SPDX-License-Identifier: Apache-2.0
"""Which schedule a product gets: a small cost model whose coefficients were fitted to measurements.

The model of a schedule's time for an (M, N, K) product, in microseconds:

    memory  = (weights + scales + activations + output, in bytes) / bandwidth
    compute = per_sm * cta_us + steps * max(per_sm * step_us, ceil(per_sm / ctas_per_sm) * alone_us)
    time    = fixed_us + (memory^4 + compute^4)^(1/4)

``per_sm`` is the number of CTA tiles on the busiest SM and ``steps`` the number of ring stages a tile goes through. A
step costs the SM ``step_us``, but takes a CTA that is alone on its SM at least ``alone_us``. The fourth-power sum is a
maximum with a soft corner. Coefficients and bandwidth come from the manifest; docs/performance.md says how they were
measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .config import TileConfig, ceil_div
from .errors import UnsupportedError
from .manifest import Manifest, ScheduleInfo

H100_SMS = 132
COEFFICIENTS = ("fixed_us", "cta_us", "step_us", "alone_us")


@dataclass(frozen=True)
class Candidate:
    """One schedule's prediction for one product. Times in microseconds."""

    schedule: str
    time_us: float
    memory_us: float
    compute_us: float
    fixed_us: float
    ctas: int
    per_sm: int
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
            f"predicted from {self.source}; time = fixed + (memory^4 + compute^4)^(1/4), microseconds",
            f"{'schedule':44} {'time':>8} {'memory':>8} {'compute':>8} {'fixed':>6}   CTAs per SM  steps",
        ]
        for c in self.candidates[:most]:
            verdict = "chosen" if c.schedule == self.chosen else f"{c.time_us / best - 1:+.0%}"
            lines.append(
                f"{c.schedule:44} {c.time_us:8.1f} {c.memory_us:8.1f} {c.compute_us:8.1f} {c.fixed_us:6.1f} {c.ctas:6} "
                f"{c.per_sm:6} {c.steps:6}  {verdict}"
            )
        if len(self.candidates) > most:
            lines.append(f"and {len(self.candidates) - most} slower ones")
        return "\n".join(lines)


def traffic(m: int, n: int, k: int, weight_bits: int = 4, group: int = 128) -> int:
    """Bytes that a product must move at least: packed weights, 16-bit scales, activations and output, each once."""
    return n * k * weight_bits // 8 + ceil_div(k, group) * n * 2 + 2 * m * (n + k)


def predict(
    name: str,
    tile: TileConfig,
    split: int,
    product: tuple[int, int, int],
    sms: int,
    coefficients: Mapping[str, float],
    bandwidth: float,
) -> Candidate:
    """The model above for one schedule. ``product`` is (M, N, K), ``bandwidth`` in bytes per microsecond."""
    m, n, k = product
    split = tile.effective_split(split, k)
    steps = ceil_div(tile.steps(k), split)
    ctas = ceil_div(n, tile.rows) * ceil_div(m, tile.tokens) * split
    usable = sms if split <= 2 else max(1, sms * 10 // 11)  # clusters of 4 and 8 leave SMs of a GPC unused
    per_sm = ceil_div(ctas, usable)
    memory = traffic(m, n, k) / bandwidth
    busy, alone = per_sm * coefficients["step_us"], ceil_div(per_sm, tile.ctas_per_sm) * coefficients["alone_us"]
    compute = per_sm * coefficients["cta_us"] + steps * max(busy, alone)
    fixed = coefficients["fixed_us"]
    time = fixed + (memory**4 + compute**4) ** 0.25
    return Candidate(name, time, memory, compute, fixed, ctas, per_sm, steps)


def explain(manifest: Manifest, types_name: str, m: int, n: int, k: int, sms: int) -> Explanation:
    """The schedules that the bundle holds for these types and that suit ``m`` tokens, with their predicted times.

    Raises UnsupportedError if the manifest has no coefficients for these types.
    """
    tiles = {kernel.tile.name: kernel.tile for kernel in manifest.kernels if kernel.types.name == types_name}
    coefficients = manifest.heuristic.coefficients.get(types_name, {})
    bandwidth = float(manifest.heuristic.device.get("bandwidth_bytes_per_us", 0))
    fitted = [s for s in manifest.schedules if s.tile in tiles and s.name in coefficients]
    if not fitted or not bandwidth:
        raise UnsupportedError(
            f"the bundle's manifest has no fitted schedule for {types_name}; name one of supported_schedules(...) with "
            "schedule=, or use a bundle that was built with its heuristic"
        )
    suitable = [s for s in fitted if tiles[s.tile].suits(m)] or fitted
    candidates = [
        predict(s.name, tiles[s.tile], s.split, (m, n, k), sms, coefficients[s.name], bandwidth) for s in suitable
    ]
    candidates.sort(key=lambda c: c.time_us)
    return Explanation(types_name, m, n, k, sms, manifest.heuristic.source, tuple(candidates))


def select(manifest: Manifest, types_name: str, m: int, n: int, k: int, sms: int) -> ScheduleInfo:
    """The schedule with the shortest predicted time. Raises UnsupportedError like ``explain``."""
    return manifest.schedule(explain(manifest, types_name, m, n, k, sms).chosen)
