# SPDX-License-Identifier: Apache-2.0
"""Runs a function in several processes, the ranks of torch.distributed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def run_ranks(
    function: Callable[..., None], ranks: int, folder: Path, *rest: Any, seconds: float = 120, patience: float = 5
) -> None:
    """Calls ``function(rank, ranks, folder, *rest)`` for each rank in a process of its own, all within ``seconds``.

    The function leaves ``done-RANK`` in the folder, or what it raised in ``error-RANK``. When a rank fails the others
    may wait for it in vain: they get five more seconds.
    """
    context = mp.get_context("spawn")
    processes = [context.Process(target=function, args=(rank, ranks, str(folder), *rest)) for rank in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + patience)
        processes[0].join(0.1)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        processes[rank].kill()
        processes[rank].join()
    errors = "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("error-*")))
    assert not errors, errors
    assert not late, f"ranks {late} were not done after {seconds:g} s"
    assert len(list(folder.glob("done-*"))) == ranks, [process.exitcode for process in processes]
