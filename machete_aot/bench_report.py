# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's rows say: a table as they come, their means, what was left out, and a record for JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import driver
from .bench import OURS, Plan, Row, Timing, device_ceiling, run
from .clocks import Monitor
from .fetch import default_bundle
from .peers import Peer, find_peers
from .product import A_NAMES
from .publish import publish
from .version import __version__


def run_and_print(
    plan: Plan,
    names: Sequence[str],
    command: str,
    out: Path | None = None,
    adjust: Callable[[Row], Row] | None = None,
) -> list[Row]:
    """Times the plan beside the peers of these names, prints the tables and returns the rows.

    ``adjust`` changes each row, and may give peers that are missing a time. ``out``: the record's file, written anew
    after each row, so that a run that is cut short leaves what it has. ``command``: what the record says was run.
    """
    peers, missing = find_peers(names)
    monitor = Monitor(torch.cuda.current_device())
    columns = [name for name in names if adjust or name not in missing]
    print(f"{device_name()}; {floor_text()}\n{header(columns)}")
    rows: list[Row] = []
    for row in run(plan, peers, monitor):
        rows.append(adjust(row) if adjust else row)
        print(line(rows[-1], columns), flush=True)
        if out is not None:
            publish(out, as_lines(record(plan, rows, peers, missing, monitor, command)).encode())
    print("\n".join([summary(rows, columns), *clock_notes(rows), *notes(rows, missing)]))
    return rows


def means(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each number of tokens, over its products: geometric means of the peers' times and of the floor over ours.

    [{"m", "products", "speedup": best peer / ours, "worst": its minimum, "over_floor": ours / floor, "peers": {name:
    peer / ours}}]; None where nothing was timed.
    """
    timed = [row for row in rows if row.ours.us is not None]
    table = []
    for m in sorted({row.m for row in timed}):
        of_m = [row for row in timed if row.m == m]
        names = dict.fromkeys(name for row in of_m for name in row.peers)
        speedups = [row.speedup for row in of_m if row.speedup is not None]
        table.append(
            {
                "m": m,
                "products": len(of_m),
                "speedup": _mean(speedups),
                "worst": round(min(speedups), 5) if speedups else None,
                "over_floor": _mean([(row.ours.us or 0) / row.floor_us for row in of_m]),
                "peers": {name: _mean(_ratios(of_m, name)) for name in names},
            }
        )
    return table


def _ratios(rows: Iterable[Row], name: str) -> list[float]:
    pairs = [(row.peers[name].us, row.ours.us) for row in rows if name in row.peers]
    return [theirs / ours for theirs, ours in pairs if theirs and ours]


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.geometric_mean(values), 5) if values else None


def notes(rows: Iterable[Row], missing: Mapping[str, str]) -> list[str]:
    """What was not timed, and why: a line for each implementation and reason."""
    lines = [f"{name}: not timed, {why}" for name, why in missing.items()]
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, timing in ((OURS, row.ours), *row.peers.items()):
            if timing.problem:
                where.setdefault((name, timing.problem), []).append(f"{row.n}x{row.k} M={row.m}")
    for (name, problem), products in where.items():
        more = f" and {len(products) - 1} more" if len(products) > 1 else ""
        lines.append(f"{name}: not timed at {products[0]}{more}, {problem}")
    return lines


def header(names: Sequence[str]) -> str:
    """The table's head line. ``names``: the peers', each a column."""
    peers = "".join(f"{name:>10}" for name in names)
    return f"{'N x K':>14}{'M':>6}{'ours us':>10}  {'schedule':<38}{'floor us':>9}{peers}{'best peer / ours':>18}"


def line(row: Row, names: Sequence[str]) -> str:
    """One line of the table; times that were scaled have a "~"."""
    peers = "".join(f"{_cell(row.peers.get(name, Timing())):>10}" for name in names)
    ratio = "-" if row.speedup is None else f"{row.speedup:.2f}"
    return (
        f"{f'{row.n} x {row.k}':>14}{row.m:>6}{_cell(row.ours):>10}  {row.schedule:<38}{row.floor_us:>9.1f}{peers}"
        f"{ratio:>18}"
    )


def _cell(timing: Timing) -> str:
    if timing.us is None:
        return "wrong" if (timing.problem or "").startswith("wrong") else "-"
    return f"{'~' if timing.source == 'scaled' else ''}{timing.us:.1f}"


def summary(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The means as a table."""
    lines = ["geometric means over the shapes; a peer's column is its time over ours"]
    lines.append(f"{'M':>6}{'best / ours':>13}{'worst':>8}{'ours / floor':>14}" + "".join(f"{n:>10}" for n in names))
    for found in means(rows):
        cells = [found["speedup"], found["worst"], found["over_floor"], *(found["peers"].get(n) for n in names)]
        widths = [13, 8, 14, *(10 for _ in names)]
        shown = ["-" if value is None else f"{value:.2f}" for value in cells]
        lines.append(f"{found['m']:>6}" + "".join(f"{s:>{w}}" for s, w in zip(shown, widths, strict=True)))
    return "\n".join(lines)


def floor_text() -> str:
    """What floors are stated for on this device, in a line."""
    ceiling, own = device_ceiling()
    rate = f"max(bytes / {ceiling.bytes_per_us / 1e6:.2f} TB/s, flops / {ceiling.flops_per_us / 1e6:.0f} TFLOP/s)"
    return f"floor: {rate}, as measured on an {ceiling.of}" + ("" if own else "; this card was not measured")


def record(
    plan: Plan,
    rows: Sequence[Row],
    peers: Sequence[Peer],
    missing: Mapping[str, str],
    monitor: Monitor | None,
    command: str,
) -> dict[str, Any]:
    """Everything about a run as plain data. ``missing``: peers that could not be used, and why."""
    ceiling, own = device_ceiling()
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machete_aot": __version__,
        "bundle": default_bundle().manifest_sha256,
        "torch": torch.__version__,
        "device": device_facts(monitor),
        "clocks": {
            "sm_mhz": _spread([row.sm_mhz for row in rows]),
            "memory_mhz": _spread([row.memory_mhz for row in rows]),
        },
        "ceiling": {
            "of": ceiling.of,
            "measured_on_this_card": own,
            "bytes_per_us": ceiling.bytes_per_us,
            "flops_per_us": ceiling.flops_per_us,
        },
        "types": A_NAMES[plan.dtype],
        "weights": plan.weights.name,
        "group": plan.group,
        "rounds": plan.rounds,
        "rest": plan.rest,
        "alone": plan.alone,
        "peers": {
            **{peer.name: {"version": peer.version, "problem": None} for peer in peers},
            **{name: {"version": None, "problem": why} for name, why in missing.items()},
        },
        "means": means(rows),
        "rows": [row.facts() for row in rows],
    }


def clock_notes(rows: Sequence[Row]) -> list[str]:
    """The clocks seen, in a line, if any were."""
    sm, memory = _spread([row.sm_mhz for row in rows]), _spread([row.memory_mhz for row in rows])
    if sm is None or memory is None:
        return []
    return [f"clocks while ours ran: SM {sm['min']} to {sm['max']} MHz, memory {memory['min']} to {memory['max']} MHz"]


def device_name() -> str:
    return torch.cuda.get_device_name()


def device_facts(monitor: Monitor | None) -> dict[str, Any]:
    """Torch's current device; None for what NVML alone knows where it is not there."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "sms": properties.multi_processor_count,
        "driver": monitor and monitor.driver(),
        "cuda_driver_api": driver.driver_version(),
        "power_limit_w": monitor and monitor.power_limit_w(),
    }


def _spread(values: Iterable[int | None]) -> dict[str, float] | None:
    """Minimum, median and maximum, None where nothing was read."""
    known = [value for value in values if value is not None]
    return {"min": min(known), "median": statistics.median(known), "max": max(known)} if known else None


def as_lines(record: Mapping[str, Any]) -> str:
    """JSON of a record with a list "rows", one row a line."""
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
