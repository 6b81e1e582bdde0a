# SPDX-License-Identifier: Apache-2.0
"""Processes that share a cache: cold starts, kills, forks, two versions, locks that lie and a clock that jumps."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fault_server import FaultServer, running, status, truncated
from places import DIGEST, JSON, KERNELS, ZIP, bad_files, embedded, final_files, mirror_files, newer
from run_children import children, unreliable_library

PROCESSES, KILLS = 32, 200

needs_compiler = pytest.mark.skipif(not unreliable_library(), reason="there is no C compiler")


def failures(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in results if r["error"] or not r["right"]]


def test_32_processes_on_a_cold_cache_make_one_download(
    server: FaultServer, tmp_path: Path, counts: Counter[str]
) -> None:
    found = children("many", source=server.url, cache=tmp_path / "cache", sha256=DIGEST, count=PROCESSES)
    assert failures(found["results"]) == []
    assert server.count(ZIP) == 1
    assert server.count(JSON) <= 1
    assert bad_files(tmp_path / "cache") == []
    assert len(final_files(tmp_path / "cache", "bundle")) == 1
    counts["cold processes"] += PROCESSES


@needs_compiler
def test_locks_that_lie_cost_downloads_and_nothing_else(
    server: FaultServer, tmp_path: Path, counts: Counter[str]
) -> None:
    variables = {"LD_PRELOAD": unreliable_library(), "FLOCK_LIES": "1"}
    cache = tmp_path / "cache"
    found = children("many", variables=variables, source=server.url, cache=cache, sha256=DIGEST, count=16)
    assert failures(found["results"]) == []
    assert 1 <= server.count(ZIP) <= 16
    assert bad_files(cache) == []
    counts["processes under lying locks"] += 16


def test_200_kills_leave_no_bad_file(tmp_path: Path, counts: Counter[str]) -> None:
    """The real bundle, whose files take longer to write."""
    data, text, digest = embedded()
    cache, seed = tmp_path / "cache", random.randrange(1 << 30)
    with running(mirror_files((data, text, digest))) as server:
        found = children("killed", source=server.url, cache=cache, sha256=digest, count=KILLS, seed=seed)
    assert found["bad"] == [], f"seed {seed}"
    assert failures(found["next_runs"]) == [], f"seed {seed}"
    assert found["died"] + found["finished"] == KILLS
    assert found["died"] >= KILLS // 4, f"too few kills hit: {found}"
    assert found["leftovers"], "no kill hit while a file was being written"
    counts["kills"] += KILLS
    counts["kills during the fetch"] += found["died"]
    counts["kills that left a temporary file"] += found["leftovers"]


@pytest.mark.parametrize("only", [None, ["bf16_u4b8_bf16"]], ids=["whole", "in part"])
def test_a_fork_after_use(server: FaultServer, tmp_path: Path, only: list[str] | None) -> None:
    only = [KERNELS[0].split("__")[0]] if only else None
    found = children("fork_after_use", source=server.url, cache=tmp_path / "c", sha256=DIGEST, count=6, only=only)
    assert failures(found["results"]) == []
    assert bad_files(tmp_path / "c") == []


def test_two_versions_side_by_side(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with running(mirror_files(newer())) as new, running(mirror_files()) as old:
        sources = [old.url, new.url]
        digests = [DIGEST, newer()[2]]
        found = children("versions", source=sources, cache=cache, digests=digests, sha256="", count=12)
    assert failures(found["results"]) == []
    assert bad_files(cache) == []
    assert len(final_files(cache, "bundle")) == 2


@needs_compiler
def test_a_clock_that_jumps(server: FaultServer, tmp_path: Path) -> None:
    """Retries, timeouts and the lock's patience do not go by the wall clock."""
    server.script(ZIP, status(503, Retry_After="1"), truncated(), status(502))
    variables = {"LD_PRELOAD": unreliable_library(), "CLOCK_JUMPS": "1"}
    cache = tmp_path / "cache"
    found = children("many", variables=variables, source=server.url, cache=cache, sha256=DIGEST, count=4)
    assert failures(found["results"]) == []
    assert bad_files(cache) == []
    assert server.count(ZIP) == 4
