# SPDX-License-Identifier: Apache-2.0
"""The cost model's tables: which one a GPU gets, how it is scaled, and the correction by measured neighbours."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_kernels.check import Report
from build_kernels.configs import ImplConfig
from build_kernels.pack import Product, write_bundle
from machete_aot import fetch_bundle, invariance
from machete_aot.bundle import open_bundle
from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig
from machete_aot.errors import UnsupportedError
from machete_aot.manifest import Heuristic, HeuristicTable, Manifest, Measured
from machete_aot.manifest_rules import DEVIATION_ZERO, NOT_MEASURED
from machete_aot.part import H100, Part
from machete_aot.selection import (
    CLOCK_BOUND,
    COEFFICIENTS,
    OF_A_STEP,
    corrections,
    explain,
    select,
    stand_in,
    table_for,
    traffic,
    work_of,
)
from small_bundle import cubin_like, release

H200 = Part.known("NVIDIA H200", 132, 1980, 4.917e6)
MANIFEST = fetch_bundle().manifest
BF16, FP16 = TypeConfig("bf16", "u4b8", "bf16"), TypeConfig("fp16", "u4b8", "fp16")
PRODUCTS = st.tuples(st.integers(1, 5000), st.integers(1, 60000), st.integers(1, 30000))


def table(device: str, part: Part) -> HeuristicTable:
    coefficients = {"t": {"s": {name: 2.0 for name in COEFFICIENTS}}}
    return HeuristicTable(
        f"measured on {device}", device, part.sms, part.clock_mhz, part.peak_bytes_per_us, 3e6, coefficients, {}
    )


BOTH = dataclasses.replace(MANIFEST, heuristic=Heuristic(2, (table("A", H100), table("B", H200))))


def test_a_measured_gpu_gets_its_own_table() -> None:
    assert table_for(BOTH, dataclasses.replace(H200, name="B"), "t") is BOTH.heuristic.tables[1]


def test_another_gpu_gets_the_more_similar_table_scaled() -> None:
    part = Part.known("C", 78, 990, 4.022e6)  # more bandwidth for its clocks than either: nearer to B
    found = table_for(BOTH, part, "t")
    assert (found.device, found.sms, found.clock_mhz, found.peak_bytes_per_us) == (part.name, part.sms, *part.clocks())
    assert table_for(dataclasses.replace(BOTH, heuristic=Heuristic(2, (found,))), part, "t") is found  # scaled once
    assert found.bytes_per_us == pytest.approx(3e6 * 4.022 / 4.917)
    scaled = found.coefficients["t"]["s"]
    assert {name: scaled[name] for name in CLOCK_BOUND} == {name: 4.0 for name in CLOCK_BOUND}  # half the clock
    assert all(scaled[name] == 2.0 for name in set(COEFFICIENTS) - set(CLOCK_BOUND))
    assert "derived for C from B: SM clock x0.50, memory bandwidth x0.82, 78 SMs" in found.source


def test_the_same_name_with_fewer_sms_is_another_gpu() -> None:
    assert "derived" in table_for(BOTH, dataclasses.replace(H100, name="A", sms=114), "t").source


def test_a_manifest_without_tables_says_so() -> None:
    empty = dataclasses.replace(MANIFEST, heuristic=Heuristic(2, ()))
    with pytest.raises(UnsupportedError, match="no table of schedules' costs"):
        table_for(empty, H100, "t")


def test_types_that_a_gpu_lacks_come_from_the_others() -> None:
    a, b = BOTH.heuristic.tables
    both = dataclasses.replace(b, coefficients={**b.coefficients, "u": b.coefficients["t"]})
    some = dataclasses.replace(BOTH, heuristic=Heuristic(2, (a, both)))
    part = dataclasses.replace(H100, name="A")
    assert table_for(some, part, "t") is a
    found = table_for(some, part, "u")
    assert found.device == "A" and "derived for A from B" in found.source


def test_explain_says_what_a_choice_was_derived_from() -> None:
    part = Part.known("NVIDIA H20", 78, 1980, 4.0e6)
    assert "derived for NVIDIA H20" in explain(MANIFEST, "bf16_u4b8", 16, 8192, 8192, part).text()
    assert "derived" not in explain(MANIFEST, "bf16_u4b8", 16, 8192, 8192, H100).text()


def test_the_bundle_has_a_table_for_an_h100_and_an_h200() -> None:
    assert {H100.name, H200.name} <= {t.device for t in MANIFEST.heuristic.tables}


def test_the_correction_is_the_measured_deviation_at_a_measured_product() -> None:
    text = chr(DEVIATION_ZERO + 20) + chr(DEVIATION_ZERO - 30) + NOT_MEASURED
    measured = Measured(((16, 4096, 4096), (16, 65536, 65536), (16, 4096, 8192)), {"s": text})
    (at,) = corrections(measured, (16, 4096, 4096)).values()
    assert at == pytest.approx(math.exp(0.20 * 100 / 101))  # weight 1 / 0.01, pulled to 0 by a weight of 1
    (beside,) = corrections(measured, (16, 4096, 8192)).values()
    assert 1.0 < beside < at
    (far,) = corrections(measured, (16, 512, 512)).values()
    assert far == 1.0


@given(product=PRODUCTS, split=st.sampled_from((1, 2, 4)), sms=st.integers(1, 200))
def test_the_model_s_variables_are_in_order(product: tuple[int, int, int], split: int, sms: int) -> None:
    work = work_of(ScheduleConfig(TileConfig("stream", 2, 1, 1, 4, 16, 4, 2), split), BF16, product, sms)
    for mean, most in (work.busy, work.rounds):
        assert 0 < mean <= most
    assert work.steps >= 1 and work.bytes > 0 and work.givers == 0


@given(product=PRODUCTS, ctas=st.integers(1, 2), sms=st.integers(1, 200))
def test_even_shares_have_no_partial_wave(product: tuple[int, int, int], ctas: int, sms: int) -> None:
    tile = TileConfig("flat", 2, 1, 1, 4, 16, 4, 2)
    work = work_of(ScheduleConfig(tile, 0, ctas), BF16, product, sms)
    tiles = math.ceil(product[1] / tile.rows) * math.ceil(product[0] / tile.tokens)
    assert work.busy == (tiles / sms, tiles / sms)
    assert work.rounds[0] * work.ctas == pytest.approx(tiles)
    assert work.givers == 0 if tiles % work.ctas == 0 else work.givers >= 1


@given(product=PRODUCTS, split=st.sampled_from((0, 1)), sms=st.integers(1, 100).map(lambda half: 2 * half))
def test_a_cluster_works_like_a_cta_of_twice_the_rows_on_half_the_sms(
    product: tuple[int, int, int], split: int, sms: int
) -> None:
    pair = TileConfig("flat", 2, 1, 1, 2, 128, 5, 1, cluster=2)
    alone = TileConfig("flat", 4, 1, 1, 2, 128, 5, 1)
    found, twice = (
        work_of(ScheduleConfig(tile, split, 1 - split), BF16, product, on)
        for tile, on in ((pair, sms), (alone, sms // 2))
    )
    assert found._replace(ctas=found.ctas // 2) == twice


@given(product=PRODUCTS)
def test_the_fastest_prediction_is_selected(product: tuple[int, int, int]) -> None:
    candidates = explain(MANIFEST, "fp16_u4b8", *product, H200).candidates
    assert candidates[0].time_us == min(c.time_us for c in candidates)
    assert select(MANIFEST, "fp16_u4b8", *product, H200).name == candidates[0].schedule
    for c in candidates:
        uncorrected = c.fixed_us + (c.memory_us**4 + c.compute_us**4) ** 0.25
        assert c.time_us == pytest.approx(uncorrected * c.correction)


def test_traffic_counts_what_the_types_read() -> None:
    m, n, k = 3, 256, 1024
    rest = 2 * m * (n + k)
    for types, expected in (
        (BF16, n * k // 2 + 8 * n * 2),
        (TypeConfig("bf16", "u4", "bf16", "int"), n * k // 2 + 8 * n * 3),
        (TypeConfig("bf16", "u8", "bf16", "float"), n * k + 8 * n * 4),
        (TypeConfig("fp16", "u8", "fp16", "any"), n * k + 8 * n * 4),
    ):
        schedule = ScheduleConfig(TileConfig("stream", 2, 1, 1, 4, 16, 4, 2), 1)
        assert work_of(schedule, types, (m, n, k), 132).bytes == expected + rest
        assert traffic(m, n, k, types.weight_bits, 128, types.zero_bytes) == expected + rest
    assert traffic(m, n, k, group=k) == n * k // 2 + n * 2 + rest


# ---- types that were measured nowhere

MEASURED = (
    ScheduleConfig(TileConfig("stream", 2, 1, 1, 4, 8, 5, 2), 1),
    ScheduleConfig(TileConfig("stream", 2, 1, 1, 4, 8, 5, 2), 4),
    ScheduleConfig(TileConfig("stream", 2, 1, 1, 2, 64, 6, 1), 1),
    ScheduleConfig(TileConfig("flat", 2, 1, 1, 2, 64, 4, 2), 1),
    ScheduleConfig(TileConfig("flat", 2, 1, 1, 2, 64, 4, 2), 0, 1),
)
UNMEASURED = {  # schedule -> index of the measured one that stands in, how much longer a step is
    ScheduleConfig(TileConfig("stream", 2, 1, 1, 4, 8, 4, 2), 1): (0, 1),  # the same shape with fewer stages
    ScheduleConfig(TileConfig("stream", 2, 1, 1, 4, 8, 4, 2), 4): (1, 1),
    ScheduleConfig(TileConfig("stream", 2, 1, 1, 2, 8, 7, 2), 1): (0, 0.5),  # half the step
    ScheduleConfig(TileConfig("stream", 1, 2, 1, 2, 16, 5, 2), 1): (0, 0.5),  # half the rows, the nearest in tokens
    ScheduleConfig(TileConfig("flat", 4, 1, 1, 2, 64, 4, 1), 0, 1): (4, 2),  # even shares like those
    ScheduleConfig(TileConfig("flat", 2, 1, 1, 2, 8, 4, 1), 1): (3, 1),  # the family counts more than the tokens
}
U8 = TypeConfig("bf16", "u8", "bf16", "float")


@functools.cache
def partly_measured() -> Manifest:
    """bf16_u4b8, with other coefficients for every schedule, and bf16_u8_float without any."""
    kernels = (*ImplConfig((BF16,), MEASURED).specializations, *ImplConfig((U8,), tuple(UNMEASURED)).specializations)
    made_up = {s.name: {name: 1.0 + i for name in COEFFICIENTS} for i, s in enumerate(MEASURED)}
    plain = release()
    (table,) = plain.heuristic.tables
    table = dataclasses.replace(table, coefficients={BF16.name: made_up}, measured={BF16.name: Measured((), {})})
    served = tuple((BF16, s) for s in MEASURED) + tuple((U8, s) for s in UNMEASURED)
    made = dataclasses.replace(plain, served=served, heuristic=Heuristic(2, (table,)))
    data, manifest = write_bundle([Product(k, Report(80, 0, 0), cubin_like(i)) for i, k in enumerate(kernels)], made)
    return open_bundle(data, manifest_sha256=hashlib.sha256(manifest).hexdigest()).manifest


def test_coefficients_of_similar_schedules_stand_in() -> None:
    table = stand_in(partly_measured(), H100, U8.name)
    found = table.coefficients[U8.name]
    assert found.keys() == {s.name for s in UNMEASURED} and not table.measured
    for schedule, (index, size) in UNMEASURED.items():
        for name, value in found[schedule.name].items():
            wanted = (1.0 + index) * (size if name in OF_A_STEP else 1)
            if name == "memory_rate":  # no faster than the memory
                wanted = min(wanted, H100.peak_bytes_per_us / table.bytes_per_us)
            assert value == wanted, (schedule.name, name)


def test_products_of_unmeasured_types_get_a_schedule_and_explain_says_from_what() -> None:
    manifest = partly_measured()
    for part in (H100, dataclasses.replace(H200, sms=100)):
        found = explain(manifest, U8.name, 4, 4096, 4096, part)
        assert found.chosen in {s.name for s in UNMEASURED}
        assert "bf16_u8_float was not measured, coefficients of bf16_u4b8 stand in for its own" in found.text()
        assert ("derived for NVIDIA H200" in found.source) == (part is not H100)
        invariant = invariance.explain(manifest, U8.name, 4, 4096, 4096, part)
        assert invariant.source == found.source and invariant.chosen in {s.name for s in UNMEASURED}
        assert invariant.free == found.candidates[0]
    assert "stand in" not in explain(manifest, BF16.name, 4, 4096, 4096, H100).text()


def test_other_activations_never_stand_in() -> None:
    manifest = partly_measured()
    half = [dataclasses.replace(k, types=dataclasses.replace(U8, a="fp16")) for k in manifest.kernels_for(U8)]
    name = half[0].types.name
    schedules = tuple(
        dataclasses.replace(s, types=tuple(name if t == U8.name else t for t in s.types)) for s in manifest.schedules
    )
    other = dataclasses.replace(manifest, kernels=(*manifest.kernels_for(BF16), *half), schedules=schedules)
    with pytest.raises(UnsupportedError, match="nor for other types with fp16 activations"):
        explain(other, name, 4, 4096, 4096, H100)
    with pytest.raises(UnsupportedError, match="no kernels for banana, it has bf16_u4b8"):
        explain(manifest, "banana", 4, 4096, 4096, H100)


def test_every_type_of_the_bundle_can_be_predicted() -> None:
    for types in MANIFEST.types:
        names = {s.name for s in MANIFEST.schedules_for(types)}
        for m in (1, 64, 4096):
            assert select(MANIFEST, types.name, m, 4096, 4096, H100).name in names
            assert invariance.select(MANIFEST, types.name, m, 4096, 4096, H100).name in names
