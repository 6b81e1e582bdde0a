# SPDX-License-Identifier: Apache-2.0
"""What the fault tests share: a server each, and the counts that the summary prints."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fault_server import FaultServer, running
from places import mirror_files

_counts: Counter[str] = Counter()
VARIABLES = ("SOURCE", "PATH", "CACHE", "OFFLINE", "KEYS")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def counts() -> Counter[str]:
    """Add to it what a test has tried; the totals are printed when the tests are over."""
    return _counts


@pytest.fixture(autouse=True)
def plain_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests, and a home that is empty."""
    for name in VARIABLES:
        monkeypatch.delenv(f"MACHETE_AOT_{name}", raising=False)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))


@pytest.fixture
def server(counts: Counter[str]) -> Iterator[FaultServer]:
    """A mirror of the small bundle."""
    with running(mirror_files()) as state:
        yield state
    counts["requests answered"] += len(state.requests)
    counts["faults served"] += state.faults_served


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _counts:
        line = ", ".join(f"{count} {what}" for what, count in sorted(_counts.items()))
        terminalreporter.write_line(f"fault suite on {os.cpu_count()} cores: {line}")
