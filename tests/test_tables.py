# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md and docs/performance.md are those that the committed runs give."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parent.parent
MADE = tables.tables()


@pytest.mark.parametrize("title", MADE)
def test_a_table_stands_in_its_page(title: str) -> None:
    page = ROOT / ("README.md" if title == "README.md" else "docs/performance.md")
    assert MADE[title]
    assert "\n".join(MADE[title]) in page.read_text(), f"{page}: put in what `python -m benchmarks.tables` prints"


@pytest.mark.parametrize("name", ["compare-h100-bf16", "compare-h100-fp16"])
def test_what_is_slower_than_its_best_peer_is_named(name: str) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    slower = tables.slower(tables.load(name))
    for text in slower:
        product, _, ratio = text.partition(": ")
        assert product in page and ratio in page, text
    assert len(slower) < 6


def test_a_run_is_read_as_it_is() -> None:
    def row(m: int, us: float, peer: float) -> dict[str, object]:
        timing = {"us": peer}
        return {
            **{"m": m, "n": 8192, "k": 8192, "us": us, "schedule": "s", "floor_us": 1.0},
            **{"peers": {"cublas": timing}, "best_peer": "cublas", "best_peer_us": peer},
        }

    run = {"rows": [row(1, 2.0, 3.0), row(8, 200.0, 150.0)], "means": []}
    assert tables.one_shape(run) == [
        "| 1 | 2.0 | s | 1.0 | 3.0 | 3.0 cublas | 1.50 |",
        "| 8 | 200.0 | s | 1.0 | 150.0 | 150.0 cublas | 0.75 |",
    ]
    assert tables.slower(run) == ["8192 x 8192 at M = 8: 0.750"]
    assert tables.readme(run, run)[0] == "| machete-aot, us | 2.0 | 200 |"
    assert tables.ratio({(1, 2, 3): 4.0}, {(1, 2, 3): 2.0, (1, 5, 6): 1.0}, 1) == "2.00"
    assert tables.ratio({}, {(1, 2, 3): 2.0}, 1) == ""
