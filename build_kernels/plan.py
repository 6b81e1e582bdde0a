# SPDX-License-Identifier: Apache-2.0
"""What a build would do: which kernels it would compile anew, and about how long that takes. Compiles nothing."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ninja

from machete_aot.config import ScheduleConfig, TypeConfig

from .compile import render_graph
from .errors import BuildError
from .generate import render
from .helpers import Helper, Target
from .paths import BUILD, KERNELS, TEMPLATES
from .toolchain import Tools

# Core-seconds a kernel. Measured with every fourth kernel of the catalogue (12), 2 jobs and 2 cores of an x86-64
# server: 7.5 s of ninja and 2.4 s of checks, so 9.9 s * 2 / 12.
SECONDS_PER_KERNEL = 1.65
_MARK = "would run: "  # begins the lines of ninja that name a step


@dataclass(frozen=True)
class Plan:
    """``kernels`` in the order of the catalogue, and the ids of those that are not up to date."""

    kernels: tuple[Target, ...]
    outdated: frozenset[str]

    def seconds(self, jobs: int) -> float:
        """About how long building what is outdated takes with ``jobs`` jobs, each on a core of its own."""
        count = len(self.outdated)
        return count * SECONDS_PER_KERNEL / max(min(jobs, count), 1)


def make_plan(
    kernels: Sequence[Target],
    tools: Tools,
    folder: Path = BUILD,
    *,
    includes: Sequence[Path] = (KERNELS,),
    templates: Path = TEMPLATES,
) -> Plan:
    """Compares the generated sources with those in ``folder`` and asks ninja about the rest. Compiles nothing.

    A kernel is up to date if its .cu is the one that would be generated and ninja has no step to run for it: commands,
    headers and outputs are those of the last build. Raises BuildError if ninja fails.
    """
    generated = [k.id for k in kernels if _is_generated(k, folder, templates)]
    pending = _pending(generated, render_graph(generated, tools, includes), folder) if generated else set()
    return Plan(tuple(kernels), frozenset({k.id for k in kernels} - set(generated) | pending))


def _is_generated(kernel: Target, folder: Path, templates: Path) -> bool:
    path = folder / f"{kernel.id}.cu"
    return path.is_file() and path.read_text() == render(kernel, templates)


def _pending(ids: Sequence[str], graph: str, folder: Path) -> set[str]:
    """The kernels that ``ninja -n`` names a step of. It writes nothing in ``folder``, but drops a damaged log."""
    with tempfile.TemporaryDirectory(prefix="machete-aot-") as other:
        path = Path(other) / "build.ninja"
        path.write_text(graph)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-f", str(path), "-n"]
        environment = {**os.environ, "NINJA_STATUS": _MARK}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise BuildError(
            f"ninja cannot tell what is up to date in {folder}: {(result.stderr or result.stdout).strip()}"
        )
    found = {line.split()[-1] for line in result.stdout.splitlines() if line.startswith(_MARK)}
    if unknown := found - set(ids):
        raise BuildError(f"ninja -n names steps of no kernel in {folder}; has its output changed?", sorted(unknown))
    return found


def table(kernels: Sequence[Target], served: Sequence[tuple[TypeConfig, ScheduleConfig]]) -> str:
    """A line a kernel: id, threads, dynamic shared memory of its largest split in bytes, names of its schedules.

    Of a helper only the first two: it has no schedules, and takes as much shared memory as its operands need.
    """
    width = max((len(k.id) for k in kernels), default=0)
    lines = [f"{'kernel':<{width}}  threads  shared memory  schedules"]
    for kernel in kernels:
        if isinstance(kernel, Helper):
            lines.append(f"{kernel.id:<{width}}  {kernel.threads:>7}")
            continue
        shared = max(kernel.tile.shared_memory(split, kernel.types) for split in kernel.splits)
        mine = (s for types, s in served if (types, s.tile) == (kernel.types, kernel.tile))
        endings = [s.name.removeprefix(f"{s.tile.name}_") for s in mine]
        lines.append(f"{kernel.id:<{width}}  {kernel.tile.threads:>7}  {shared:>13,}  {' '.join(endings)}")
    return "\n".join(lines)
