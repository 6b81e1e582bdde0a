# SPDX-License-Identifier: Apache-2.0
"""The benchmark as a picture: times and fractions of the floor against the number of tokens.

The package ``matplotlib`` is needed only here, and comes with the extra "bench".
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench import OURS, Row
from .errors import ArgumentError

SUFFIXES = (".svg", ".png")
MOST_PANELS = 8  # more shapes are shown as their geometric mean
FLOOR = "floor"
COLOURS = {  # apart for colour-blind readers too
    OURS: "#0072b2",
    "cublas": "#666666",
    "machete": "#d55e00",
    "marlin": "#009e73",
    "humming": "#cc79a7",
    FLOOR: "#000000",
}
Curves = Mapping[str, Mapping[int, float]]  # name -> M -> microseconds


def require(path: Path) -> Any:
    """matplotlib's module ``figure``. Raises ArgumentError if it is not installed or ``path`` names no picture."""
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"a plot is written as {' or '.join(SUFFIXES)}, got {path.name}; name it so")
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ArgumentError(
            f"a plot needs matplotlib, which cannot be imported ({error}); pip install 'machete-aot[bench]'"
        ) from error


def panels(rows: Sequence[Row]) -> dict[str, Curves]:
    """The curves of each panel by its title: one panel a shape, or of all shapes where they are too many."""
    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    each = {f"{n} x {k}": _curves([row for row in rows if (row.n, row.k) == (n, k)]) for n, k in shapes}
    if len(each) <= MOST_PANELS:
        return each
    return {f"geometric mean of {len(each)} shapes": _means(list(each.values()))}


def write_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes the panels, times above and fractions of the floor below. Raises ArgumentError and OSError."""
    shown = panels(rows)
    figure = require(path).Figure(figsize=(1 + 3.2 * len(shown), 6.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(2, len(shown), sharex=True, sharey="row", squeeze=False)
    for (name, curves), (above, below) in zip(shown.items(), axes.T, strict=True):
        above.set_title(name, fontsize=9)
        for label, times in curves.items():
            style = {"color": COLOURS.get(label), "linewidth": 2 if label == OURS else 1.2}
            tokens = list(times)
            if label == FLOOR:
                above.plot(tokens, list(times.values()), linestyle=":", label=label, **style)
                continue
            above.plot(tokens, list(times.values()), marker=".", label=label, **style)
            below.plot(tokens, [curves[FLOOR][m] / times[m] for m in tokens], marker=".", **style)
        above.set_xscale("log", base=2)
        above.set_yscale("log")
        below.set_ylim(0, 1.05)
        below.set_xlabel("M, tokens")
        for ax in (above, below):
            ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("microseconds a product")
    axes[1][0].set_ylabel("floor / time")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _curves(rows: Sequence[Row]) -> Curves:
    """Times by name, ours first; a product where something was not timed is a gap in its curve alone."""
    curves: dict[str, dict[int, float]] = {OURS: {}, FLOOR: {}}
    for row in sorted(rows, key=lambda row: row.m):
        curves[FLOOR][row.m] = row.floor_us
        for name, timing in ((OURS, row.ours), *row.peers.items()):
            if timing.us is not None:
                curves.setdefault(name, {})[row.m] = timing.us
    return curves


def _means(shapes: Sequence[Curves]) -> Curves:
    """Geometric means over shapes, of what was timed at every shape."""
    names = dict.fromkeys(name for curves in shapes for name in curves)
    means: dict[str, dict[int, float]] = {}
    for name in names:
        found = [curves.get(name, {}) for curves in shapes]
        common = [m for m in found[0] if all(m in times for times in found)]
        means[name] = {m: statistics.geometric_mean(times[m] for times in found) for m in common}
    return means
