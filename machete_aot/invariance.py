# SPDX-License-Identifier: Apache-2.0
"""Schedules for ``gemm(..., batch_invariant=True)``: a row of the result has the same bits whatever M is.

Why choosing schedules is enough. The fp32 sum that a wgmma instruction adds to a column does not depend on the
instruction's n, on the column's place or on its neighbours, and every kernel converts weights and rounds sums alike. So
the bits of a row follow from how K is divided among workers, each of which adds up its units of 64 k in ascending
order, and from the order in which their partial sums are added. That is the *reduction order*. The choice here fixes
one order for a layer, from (types, N, K, GPU) alone, and then takes for each M the fastest schedule that has it.

Zeros do not count. A ring step that reaches past the end of K multiplies finite weights by zeros, and a worker all of
whose units lie there gives zero. Adding zero changes a sum only if that is -0, to +0. Sums start from +0 and +0 + -0 is
+0, so only a sum that underflows could be -0; and the last operation, sum * 2^c + bias with +0 for no bias, gives the
same for both unless the bias is -0 itself. The weights of such a step are any codes with the last group's scale: where
the product of that scale with some code is not finite (fp16 scales of 8,192 and more), nothing is promised.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from . import selection
from .config import UNIT_K, TileConfig, TypeConfig, ceil_div
from .errors import ArgumentError, UnsupportedError
from .manifest import HeuristicTable, Manifest, ScheduleInfo
from .part import Part
from .selection import ByIdentity, Candidate, Explanation

REPRESENTATIVE_M = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Share:
    """What one worker adds up: ``run`` units of 64 k from every ``stride``, in ascending order, of first .. end - 1.

    Where the units are contiguous, ``run`` and ``stride`` are both end - first.
    """

    first: int
    end: int
    run: int
    stride: int

    def __str__(self) -> str:
        span = f"{self.first}-{self.end - 1}" if self.end - self.first > 1 else f"{self.first}"
        return span if self.run == self.stride else f"{self.run} of every {self.stride} in {span}"


Order = tuple[Share, ...]  # of the workers with units, in the order in which their partial sums are added


def reduction_order(tile: TileConfig, split: int, k: int) -> Order | None:
    """How this schedule adds up a column of length ``k``; None where that depends on M.

    Two schedules have equal orders if and only if every worker of the one adds up the same units as the same worker of
    the other, units past the end of K left out.
    """
    units = ceil_div(k, UNIT_K)
    if tile.family == "flat" and split == 1:  # whole tiles, each by one CTA
        return (Share(0, units, units, units),)
    if tile.family != "stream":
        return None  # even shares; or nothing is known of it
    split, steps = tile.effective_split(split, k), tile.steps(k)
    shares = (
        _share(tile, k_warpgroup, steps * rank // split, steps * (rank + 1) // split, units)
        for rank in range(split)
        for k_warpgroup in range(tile.k_warpgroups)
    )
    return tuple(share for share in shares if share is not None)


def _share(tile: TileConfig, k_warpgroup: int, first_step: int, end_step: int, units: int) -> Share | None:
    """Units of one warpgroup of a CTA that takes these ring steps; None if all of them lie past the end."""
    first = first_step * tile.step_units + k_warpgroup * tile.units
    if first >= units:
        return None
    last_run = (end_step - 1) * tile.step_units + k_warpgroup * tile.units
    if last_run >= units:  # the last step of all is the only one that may reach past the end
        last_run -= tile.step_units
    end = min(last_run + tile.units, units)
    if tile.k_warpgroups == 1 or last_run == first:
        return Share(first, end, end - first, end - first)
    return Share(first, end, tile.units, tile.step_units)


@dataclass(frozen=True)
class Choice:
    """The order of a layer. ``costs``: for each representative M the predicted time over the free choice's.

    ``manifest`` holds only the kernels, schedules and costs of the order.
    """

    order: Order
    manifest: Manifest
    costs: tuple[tuple[int, float], ...]

    @property
    def mean_cost(self) -> float:
        """Geometric mean over the representative M of the time over the free choice's, each counted as at least 1.

        Less than 1 is predicted only of tiles that are outside their measured range at that M, where the model is not
        trusted that far.
        """
        return math.exp(sum(math.log(max(1.0, ratio)) for _, ratio in self.costs) / len(self.costs))


def choose_order(manifest: Manifest, types_name: str, n: int, k: int, part: Part) -> Choice:
    """The order of every (any M, N, K) product: the one whose ``mean_cost`` is the least.

    Of equal ones the one whose first schedule comes first in the manifest. For each M, the order's schedules that suit
    it are compared, or all of them if none does. Cached. Raises UnsupportedError if no fitted schedule has an order
    that is independent of M.
    """
    return _choose_order(ByIdentity(manifest), types_name, n, k, part)


def select(manifest: Manifest, types_name: str, m: int, n: int, k: int, part: Part) -> ScheduleInfo:
    """The schedule with the shortest predicted time among those of the layer's order. Raises like ``choose_order``."""
    order = choose_order(manifest, types_name, n, k, part)
    return selection.select(order.manifest, types_name, m, n, k, part)


def check_schedule(manifest: Manifest, types: TypeConfig, schedule: ScheduleInfo, n: int, k: int, part: Part) -> None:
    """Raises ArgumentError if a schedule that the caller named has another order than the layer's."""
    chosen = choose_order(manifest, types.name, n, k, part)
    tile = manifest.kernel_for(types, schedule.name).tile
    if reduction_order(tile, schedule.split, k) != chosen.order:
        names = ", ".join(s.name for s in chosen.manifest.schedules)
        raise ArgumentError(
            f"schedule {schedule.name!r} does not add up K = {k} in the order that batch_invariant=True keeps for N = "
            f"{n} on {part.sms} SMs; these do: {names}; name one of them, or leave out one of the two options"
        )


@dataclass(frozen=True)
class InvariantExplanation(Explanation):
    """Why a batch-invariant product gets its schedule. ``candidates``: the schedules of the ``order``, fastest first.

    ``free``: what the product would get without batch invariance. ``costs`` and ``mean_cost``: see ``Choice``.
    """

    order: Order
    free: Candidate
    costs: tuple[tuple[int, float], ...]
    mean_cost: float

    def text(self, most: int = 12) -> str:
        """The table of the ``most`` fastest candidates, the order, and what it costs."""
        fastest = self.candidates[0].time_us
        costs = ", ".join(f"{m}: {_percent(ratio)}" for m, ratio in self.costs)
        return "\n".join(
            (
                super().text(most),
                f"batch invariant: for every M the units of 64 k are added up as {' | '.join(map(str, self.order))}",
                f"against the free choice, {self.free.schedule}: {_percent(fastest / self.free.time_us)} "
                f"({fastest:.1f} us, not {self.free.time_us:.1f} us)",
                f"for M of {costs}; {_percent(self.mean_cost)} in the geometric mean",
            )
        )


def explain(manifest: Manifest, types_name: str, m: int, n: int, k: int, part: Part) -> InvariantExplanation:
    """``selection.explain`` among the schedules of the layer's order. Raises like ``choose_order``."""
    choice = choose_order(manifest, types_name, n, k, part)
    kept = selection.explain(choice.manifest, types_name, m, n, k, part)
    free = selection.explain(manifest, types_name, m, n, k, part).candidates[0]
    return InvariantExplanation(
        types_name, m, n, k, part.sms, kept.source, kept.candidates, choice.order, free, choice.costs, choice.mean_cost
    )


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.0%}"


@functools.lru_cache(maxsize=1024)
def _choose_order(key: ByIdentity[Manifest], types_name: str, n: int, k: int, part: Part) -> Choice:
    manifest = key.value
    table = selection.table_for(manifest, part, types_name)
    free = {m: _fastest_us(manifest, types_name, m, n, k, part) for m in REPRESENTATIVE_M}
    choices = []
    for order, names in _orders(manifest, types_name, k, table).items():
        kept = _restricted(manifest, types_name, names, table)
        times = {m: _fastest_us(kept, types_name, m, n, k, part) for m in REPRESENTATIVE_M}
        choices.append(Choice(order, kept, tuple((m, times[m] / free[m]) for m in REPRESENTATIVE_M)))
    if not choices:
        raise UnsupportedError(
            f"no fitted schedule for {types_name} adds up K = {k} in an order that is independent of M; call without "
            "batch_invariant=True, or use a bundle that has one"
        )
    return min(choices, key=lambda c: round(c.mean_cost, 9))  # rounded: a tie stays one whatever the last bit


def _fastest_us(manifest: Manifest, types_name: str, m: int, n: int, k: int, part: Part) -> float:
    return selection.explain(manifest, types_name, m, n, k, part).candidates[0].time_us


def _orders(manifest: Manifest, types_name: str, k: int, table: HeuristicTable) -> dict[Order, set[str]]:
    """Names of the fitted schedules of each order, in the manifest's order of schedules."""
    tiles = {kernel.tile.name: kernel.tile for kernel in manifest.kernels if kernel.types.name == types_name}
    fitted = table.coefficients[types_name]
    found: dict[Order, set[str]] = {}
    for schedule in manifest.schedules:
        if types_name in schedule.types and schedule.tile in tiles and schedule.name in fitted:
            order = reduction_order(tiles[schedule.tile], schedule.split, k)
            if order is not None:
                found.setdefault(order, set()).add(schedule.name)
    return found


def _restricted(manifest: Manifest, types_name: str, names: set[str], table: HeuristicTable) -> Manifest:
    """The manifest with these schedules alone, their kernels of these types, and their costs on one GPU."""
    schedules = tuple(s for s in manifest.schedules if s.name in names)
    tiles = {s.tile for s in schedules}
    kernels = tuple(x for x in manifest.kernels if x.types.name == types_name and x.tile.name in tiles)
    heuristic = replace(manifest.heuristic, tables=(table,))
    return replace(manifest, schedules=schedules, kernels=kernels, heuristic=heuristic)
