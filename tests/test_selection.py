# SPDX-License-Identifier: Apache-2.0
"""The cost model's tables: which one a GPU gets, how it is scaled, and the correction by measured neighbours."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machete_aot import fetch_bundle
from machete_aot.config import ScheduleConfig, TileConfig
from machete_aot.errors import UnsupportedError
from machete_aot.manifest import Heuristic, HeuristicTable, Measured
from machete_aot.manifest_rules import DEVIATION_ZERO, NOT_MEASURED
from machete_aot.part import H100, Part
from machete_aot.selection import CLOCK_BOUND, COEFFICIENTS, corrections, explain, select, table_for, work_of

H200 = Part("NVIDIA H200", 132, 1980, 4.917e6)
MANIFEST = fetch_bundle().manifest
PRODUCTS = st.tuples(st.integers(1, 5000), st.integers(1, 60000), st.integers(1, 30000))


def table(device: str, part: Part) -> HeuristicTable:
    coefficients = {"t": {"s": {name: 2.0 for name in COEFFICIENTS}}}
    return HeuristicTable(
        f"measured on {device}", device, part.sms, part.clock_mhz, part.peak_bytes_per_us, 3e6, coefficients, {}
    )


BOTH = dataclasses.replace(MANIFEST, heuristic=Heuristic(2, (table("A", H100), table("B", H200))))


def test_a_measured_gpu_gets_its_own_table() -> None:
    assert table_for(BOTH, H200._replace(name="B")) is BOTH.heuristic.tables[1]


def test_another_gpu_gets_the_more_similar_table_scaled() -> None:
    part = Part("C", 78, 990, 4.022e6)  # more bandwidth for its clocks than either: nearer to B
    found = table_for(BOTH, part)
    assert found.device == "C"
    assert found.bytes_per_us == pytest.approx(3e6 * 4.022 / 4.917)
    scaled = found.coefficients["t"]["s"]
    assert {name: scaled[name] for name in CLOCK_BOUND} == {name: 4.0 for name in CLOCK_BOUND}  # half the clock
    assert all(scaled[name] == 2.0 for name in set(COEFFICIENTS) - set(CLOCK_BOUND))
    assert "derived for C from B: SM clock x0.50, memory bandwidth x0.82, 78 SMs" in found.source


def test_the_same_name_with_fewer_sms_is_another_gpu() -> None:
    assert "derived" in table_for(BOTH, H100._replace(name="A", sms=114)).source


def test_a_manifest_without_tables_says_so() -> None:
    empty = dataclasses.replace(MANIFEST, heuristic=Heuristic(2, ()))
    with pytest.raises(UnsupportedError, match="no table of schedules' costs"):
        table_for(empty, H100)


def test_explain_says_what_a_choice_was_derived_from() -> None:
    part = Part("NVIDIA H20", 78, 1980, 4.0e6)
    assert "derived for NVIDIA H20" in explain(MANIFEST, "bf16_u4b8", 16, 8192, 8192, part).text()
    assert "derived" not in explain(MANIFEST, "bf16_u4b8", 16, 8192, 8192, H100).text()


def test_the_bundle_has_a_table_for_an_h100_and_an_h200() -> None:
    assert {H100.name, H200.name} <= {t.device for t in MANIFEST.heuristic.tables}


def test_the_correction_is_the_measured_deviation_at_a_measured_product() -> None:
    text = chr(DEVIATION_ZERO + 20) + chr(DEVIATION_ZERO - 30) + NOT_MEASURED
    measured = Measured(((16, 4096, 4096), (16, 65536, 65536), (16, 4096, 8192)), {"s": text})
    (at,) = corrections(measured, (16, 4096, 4096)).values()
    assert at == pytest.approx(math.exp(0.20 * 20 / 21))  # weight 1 / 0.05, pulled to 0 by a weight of 1
    (beside,) = corrections(measured, (16, 4096, 8192)).values()
    assert 1.0 < beside < at
    (far,) = corrections(measured, (16, 512, 512)).values()
    assert far == 1.0


@given(product=PRODUCTS, split=st.sampled_from((1, 2, 4)), sms=st.integers(1, 200))
def test_the_model_s_variables_are_in_order(product: tuple[int, int, int], split: int, sms: int) -> None:
    work = work_of(ScheduleConfig(TileConfig("stream", 2, 1, 1, 4, 16, 4, 2), split), product, sms)
    for mean, most in (work.busy, work.rounds):
        assert 0 < mean <= most
    assert work.steps >= 1 and work.bytes > 0 and work.givers == 0


@given(product=PRODUCTS, ctas=st.integers(1, 2), sms=st.integers(1, 200))
def test_even_shares_have_no_partial_wave(product: tuple[int, int, int], ctas: int, sms: int) -> None:
    tile = TileConfig("flat", 2, 1, 1, 4, 16, 4, 2)
    work = work_of(ScheduleConfig(tile, 0, ctas), product, sms)
    tiles = math.ceil(product[1] / tile.rows) * math.ceil(product[0] / tile.tokens)
    assert work.busy == (tiles / sms, tiles / sms)
    assert work.rounds[0] * work.ctas == pytest.approx(tiles)
    assert work.givers == 0 if tiles % work.ctas == 0 else work.givers >= 1


@given(product=PRODUCTS)
def test_the_fastest_prediction_is_selected(product: tuple[int, int, int]) -> None:
    candidates = explain(MANIFEST, "fp16_u4b8", *product, H200).candidates
    assert candidates[0].time_us == min(c.time_us for c in candidates)
    assert select(MANIFEST, "fp16_u4b8", *product, H200).name == candidates[0].schedule
    for c in candidates:
        uncorrected = c.fixed_us + (c.memory_us**4 + c.compute_us**4) ** 0.25
        assert c.time_us == pytest.approx(uncorrected * c.correction)
