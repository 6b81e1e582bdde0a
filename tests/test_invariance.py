# SPDX-License-Identifier: Apache-2.0
"""Batch invariance: reduction orders against a model of the kernels' loops, the choice of one, and the CPU's bits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import machete_aot as machete
from build_kernels.check import Report
from build_kernels.configs import ImplConfig
from build_kernels.pack import Product, Release, write_bundle
from machete_aot import cli, invariance, product, reference, selection
from machete_aot.bundle import Bundle, open_bundle
from machete_aot.config import ScheduleConfig, TileConfig, TypeConfig
from machete_aot.invariance import REPRESENTATIVE_M, InvariantExplanation, Share, choose_order, reduction_order
from machete_aot.launch import choose
from machete_aot.manifest import Heuristic, Manifest
from machete_aot.operands import run_kernel
from machete_aot.part import H100, Part
from machete_aot.selection import COEFFICIENTS
from machete_aot.validate import check_gemm
from quantised import gptq, random_codes
from small_bundle import TYPES, release
from stub.cubin import stub_cubin
from stub.harness import Launch, Stub, stubbed

BF16, FP16 = TYPES
STREAM = 0x5EED0

# fmt: off
ROWS = (  # tiles of several orders and numbers of tokens, and their splits; 0: even shares of one CTA an SM
    (("stream", 1, 2, 1, 2, 8,   8, 2), (1, 2)),
    (("stream", 1, 2, 1, 4, 8,   4, 2), (1, 2)),
    (("stream", 2, 1, 1, 4, 8,   5, 2), (1, 2, 4)),
    (("stream", 1, 2, 1, 2, 16,  6, 2), (1, 2)),
    (("stream", 2, 1, 1, 4, 16,  4, 2), (1, 2, 4)),
    (("stream", 1, 2, 1, 2, 32,  6, 1), (1, 2)),
    (("stream", 2, 1, 1, 4, 32,  6, 1), (1, 2, 4)),
    (("stream", 1, 2, 1, 2, 64,  5, 1), (1, 2)),
    (("stream", 2, 1, 1, 2, 64,  6, 1), (1, 2, 4)),
    (("stream", 2, 1, 1, 2, 128, 4, 1), (1, 2, 4)),
    (("flat",   2, 1, 1, 4, 16,  4, 2), (1, 0)),
    (("flat",   2, 1, 1, 2, 64,  4, 2), (1, 0)),
    (("flat",   2, 1, 2, 2, 128, 4, 1), (1, 0)),
    (("flat",   2, 1, 1, 2, 256, 3, 1), (1, 0)),
)
# fmt: on
SCHEDULES = tuple(
    ScheduleConfig(TileConfig(*tile), split, 0 if split else 1) for tile, splits in ROWS for split in splits
)
TILES = {schedule.tile.name: schedule.tile for schedule in SCHEDULES}


def coefficients(schedule: ScheduleConfig) -> dict[str, float]:
    """Made up, in proportion to what a step of the tile copies and multiplies."""
    tile = schedule.tile
    work = tile.step_units * tile.rows / 64
    step = work * (0.012 + 0.02 * max(tile.tokens, 16) / 64)
    fixed = 2 + 0.3 * math.log2(schedule.split or 4)
    known = {"fixed_us": fixed, "cta_us": 0.4, "step_us": step, "alone_us": 1.2 * step}  # the others are factors
    return {name: known.get(name, 1.0) for name in COEFFICIENTS}


@functools.cache
def bundle() -> Bundle:
    """Every tile and schedule of the table, for the stub driver."""
    kernels = ImplConfig(TYPES, SCHEDULES).specializations
    products = [Product(kernel, Report(80, 0, 0), stub_cubin(kernel.symbol)) for kernel in kernels]
    fitted = {types.name: {s.name: coefficients(s) for s in SCHEDULES} for types in TYPES}
    plain = release(SCHEDULES)
    data, manifest = write_bundle(products, dataclasses.replace(plain, heuristic=with_coefficients(plain, fitted)))
    return open_bundle(data, manifest_sha256=hashlib.sha256(manifest).hexdigest())


def with_times(times: dict[str, float], others: float = 1e6) -> Manifest:
    """The manifest with schedules that take a fixed time each, whatever the product."""
    rest = {**dict.fromkeys(COEFFICIENTS, 0.0), "memory_rate": 1.0}  # a divisor
    flat = {s.name: {**rest, "fixed_us": times.get(s.name, others)} for s in SCHEDULES}
    manifest = bundle().manifest
    heuristic = with_coefficients(manifest, {types.name: flat for types in TYPES})
    return dataclasses.replace(manifest, heuristic=heuristic)


def with_coefficients(owner: Manifest | Release, fitted: dict[str, dict[str, dict[str, float]]]) -> Heuristic:
    (table,) = owner.heuristic.tables
    return dataclasses.replace(owner.heuristic, tables=(dataclasses.replace(table, coefficients=fitted),))


@pytest.fixture(autouse=True)
def _bundle() -> Iterator[None]:
    machete.use_bundle(bundle())
    yield
    machete.use_bundle(None)


# ---- reduction orders


def loop_of_the_kernel(tile: TileConfig, cluster: int, k: int) -> list[list[int]]:
    """Units that each worker multiplies, in order of workers: the loops of csrc/kernels, step by step.

    ``cluster``: CTAs of the launch's cluster. Units past the end are zeros and left out, and so are workers with
    nothing else.
    """
    k_units = (k + 63) // 64
    workers = []
    all_steps = (k_units + tile.step_units - 1) // tile.step_units
    for rank in range(cluster):
        step0 = all_steps * rank // cluster
        steps = all_steps * (rank + 1) // cluster - step0
        for k_wg in range(tile.k_warpgroups):
            units = []
            for step in range(steps):
                stage = (step0 + step) * tile.step_units
                for unit in range(tile.units):
                    units.append(stage + k_wg * tile.units + unit)
            workers.append([unit for unit in units if unit < k_units])
    return [units for units in workers if units]


def cluster_of(tile: TileConfig, split: int, k: int) -> int:
    while split > max(1, math.ceil(math.ceil(k / 64) / tile.step_units)):
        split //= 2
    return split


def spelled_out(order: Sequence[Share]) -> list[list[int]]:
    return [[u for run in range(s.first, s.end, s.stride) for u in range(run, min(run + s.run, s.end))] for s in order]


tiles = st.builds(
    TileConfig,
    family=st.just("stream"),
    row_warpgroups=st.sampled_from([1, 2]),
    k_warpgroups=st.sampled_from([1, 2, 4]),
    blocks=st.just(2),
    units=st.integers(1, 5),
    tokens=st.just(8),
    stages=st.just(4),
    ctas_per_sm=st.just(1),
)
splits = st.sampled_from([1, 2, 4, 8])


@given(tiles, splits, st.integers(1, 9000))
def test_the_order_is_that_of_the_kernels_loop(tile: TileConfig, split: int, k: int) -> None:
    order = reduction_order(tile, split, k)
    assert order is not None
    units = spelled_out(order)
    assert units == loop_of_the_kernel(tile, cluster_of(tile, split, k), k)
    assert sorted(unit for worker in units for unit in worker) == list(range(math.ceil(k / 64)))


@settings(max_examples=300)
@given(tiles, splits, tiles, splits, st.integers(1, 3000))
def test_equal_orders_are_equal_loops(a: TileConfig, a_split: int, b: TileConfig, b_split: int, k: int) -> None:
    loops = [loop_of_the_kernel(tile, cluster_of(tile, split, k), k) for tile, split in ((a, a_split), (b, b_split))]
    equal = reduction_order(a, a_split, k) == reduction_order(b, b_split, k)
    assert equal == (loops[0] == loops[1])


def stream(k_warpgroups: int, units: int) -> TileConfig:
    return TileConfig("stream", 1, k_warpgroups, 1, units, 8, 4, 1)


def test_orders_by_hand() -> None:
    whole = (Share(0, 64, 64, 64),)
    assert [reduction_order(stream(1, units), 1, 4096) for units in (1, 2, 3, 4)] == [whole] * 4
    halves = (Share(0, 32, 32, 32), Share(32, 64, 32, 32))
    assert [reduction_order(stream(1, units), 2, 4096) for units in (1, 2, 4)] == [halves] * 3
    assert reduction_order(stream(1, 3), 2, 4096) == (Share(0, 33, 33, 33), Share(33, 64, 31, 31))
    assert reduction_order(stream(2, 2), 1, 640) == (Share(0, 10, 2, 4), Share(2, 8, 2, 4))
    uneven = (Share(0, 2, 2, 2), Share(2, 4, 2, 2), Share(4, 10, 2, 4), Share(6, 8, 2, 2))
    assert reduction_order(stream(2, 2), 2, 640) == uneven
    assert reduction_order(stream(2, 4), 1, 200) == reduction_order(stream(1, 1), 1, 200) == (Share(0, 4, 4, 4),)
    assert reduction_order(stream(2, 1), 1, 200) == (Share(0, 3, 1, 2), Share(1, 4, 1, 2))
    assert [str(share) for share in (Share(0, 1, 1, 1), Share(4, 8, 4, 4), Share(2, 64, 2, 4))] == [
        "0", "4-7", "2 of every 4 in 2-63"
    ]  # fmt: skip


@pytest.mark.parametrize("k", [1, 64, 4096, 2**27 - 1])
def test_even_shares_have_no_order_and_whole_tiles_one_worker(k: int) -> None:
    tile = TileConfig("flat", 2, 1, 2, 1, 128, 4, 1)
    units = -(-k // 64)
    assert reduction_order(tile, 1, k) == (Share(0, units, units, units),) == reduction_order(stream(1, 4), 1, k)
    assert reduction_order(tile, 0, k) is None
    assert reduction_order(dataclasses.replace(tile, family="other"), 1, k) is None


# ---- the choice


def order_for(manifest: Manifest, types: str, m: int, n: int, k: int, part: Part) -> object:
    chosen = invariance.select(manifest, types, m, n, k, part)
    return reduction_order(TILES[chosen.tile], chosen.split, k)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(TYPES), st.integers(1, 20000), st.integers(1, 20000), st.sampled_from([78, 114, 132]))
def test_the_order_is_the_same_for_every_m(types: TypeConfig, n: int, k: int, sms: int) -> None:
    part = dataclasses.replace(H100, sms=sms)
    found = {order_for(bundle().manifest, types.name, m, n, k, part) for m in range(1, 5001)}
    assert len(found) == 1
    assert found == {choose_order(bundle().manifest, types.name, n, k, part).order}
    assert None not in found


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (576, 7168)])
def test_the_order_is_the_same_for_really_every_m(n: int, k: int) -> None:
    manifest = bundle().manifest
    chosen = {m: invariance.select(manifest, BF16.name, m, n, k, H100) for m in range(1, 5001)}
    orders = {reduction_order(TILES[s.tile], s.split, k) for s in chosen.values()}
    assert len(orders) == 1
    assert len({s.tile for s in chosen.values()}) > 2  # one schedule for all would not be much of a choice
    free = {m: selection.select(manifest, BF16.name, m, n, k, H100) for m in (1, 16, 64, 256, 1024, 4096)}
    assert {reduction_order(TILES[s.tile], s.split, k) for s in free.values()} != orders


def names_of(order: object, k: int) -> list[str]:
    return [s.name for s in SCHEDULES if reduction_order(s.tile, s.split, k) == order]


@pytest.mark.parametrize("split", [1, 2])
def test_the_cheapest_order_is_chosen(split: int) -> None:
    tile = next(s.tile for s in SCHEDULES if s.split == 2 and s.tile.k_warpgroups == 1)
    order = reduction_order(tile, split, 4096)
    manifest = with_times(dict.fromkeys(names_of(order, 4096), 1e6), others=1.1e6)
    choice = choose_order(manifest, BF16.name, 4096, 4096, H100)
    assert choice.order == order
    assert [s.name for s in choice.manifest.schedules] == names_of(order, 4096)
    assert choice.mean_cost == pytest.approx(1)


def test_the_mean_is_over_all_of_the_representative_m() -> None:
    """An order that is best at few M and bad at the others loses against one that is always a little slower."""
    k, manifest = 4096, bundle().manifest

    def fastest(kept: Manifest, m: int) -> float:
        return min(c.time_us for c in selection.explain(kept, BF16.name, m, 4096, k, H100).candidates)

    ratios = {}
    for order in {reduction_order(s.tile, s.split, k) for s in SCHEDULES} - {None}:
        names = names_of(order, k)
        kept = dataclasses.replace(manifest, schedules=tuple(s for s in manifest.schedules if s.name in names))
        ratios[order] = np.array([fastest(kept, m) / fastest(manifest, m) for m in (1, 16, 64, 256, 1024, 4096)])
    means = {order: float(np.exp(np.log(np.maximum(ratio, 1)).mean())) for order, ratio in ratios.items()}
    choice = choose_order(manifest, BF16.name, 4096, k, H100)
    assert choice.mean_cost == pytest.approx(means[choice.order]) == pytest.approx(min(means.values()))
    assert [cost for _, cost in choice.costs] == pytest.approx(ratios[choice.order].tolist())
    assert len(means) > 2
    assert min(means, key=lambda order: ratios[order][0]) != choice.order  # the first M alone would choose another


def test_a_tie_goes_to_the_first_of_the_manifest() -> None:
    manifest = with_times({}, others=5.0)
    first = next(s for s in manifest.schedules if reduction_order(TILES[s.tile], s.split, 4096) is not None)
    assert first.name in {s.name for s in choose_order(manifest, FP16.name, 4096, 4096, H100).manifest.schedules}
    backwards = dataclasses.replace(manifest, schedules=manifest.schedules[::-1])
    last = next(s for s in backwards.schedules if reduction_order(TILES[s.tile], s.split, 4096) is not None)
    assert last.name in {s.name for s in choose_order(backwards, FP16.name, 4096, 4096, H100).manifest.schedules}


def test_times_outside_the_measured_range_gain_nothing() -> None:
    """A tile of 8 tokens that is cheap at one token is said to be as cheap at 4096, where it is not among the free."""
    name = next(s.name for s in SCHEDULES if s.tile.tokens == 8 and s.tile.family == "stream")
    manifest = with_times({name: 1e6}, others=2e6)
    choice = choose_order(manifest, BF16.name, 4096, 4096, H100)
    assert dict(choice.costs)[1] == pytest.approx(1)
    assert dict(choice.costs)[4096] == pytest.approx(0.5, rel=1e-3)
    assert choice.mean_cost == pytest.approx(1)


def test_an_order_serves_every_m_with_what_it_has() -> None:
    """Tiles of 8 tokens alone: they do not suit 4096, but nothing else has their order."""
    narrow = [s for s in SCHEDULES if s.tile.tokens == 8 and s.tile.k_warpgroups == 2]
    kept = {s.name for s in narrow if s.tile == narrow[0].tile}
    manifest = with_times({})
    manifest = dataclasses.replace(manifest, schedules=tuple(s for s in manifest.schedules if s.name in kept))
    assert invariance.select(manifest, BF16.name, 4096, 4096, 4096, H100).name in kept


def test_the_choice_is_made_once() -> None:
    manifest = with_times({}, others=3.0)
    first = choose_order(manifest, BF16.name, 640, 4096, H100)
    assert choose_order(manifest, BF16.name, 640, 4096, H100) is first
    assert choose_order(manifest, FP16.name, 640, 4096, H100) is not first
    assert choose_order(manifest, BF16.name, 640, 4096, dataclasses.replace(H100, sms=114)) is not first
    assert choose_order(with_times({}, others=3.0), BF16.name, 640, 4096, H100) is not first


def test_bundles_without_such_schedules() -> None:
    manifest = bundle().manifest
    even = tuple(s for s in manifest.schedules if s.split == 0)
    with pytest.raises(machete.UnsupportedError, match="no fitted schedule for bf16_u4b8 adds up K = 4096 in an order"):
        invariance.select(dataclasses.replace(manifest, schedules=even), BF16.name, 1, 4096, 4096, H100)
    unfitted = dataclasses.replace(manifest, heuristic=with_coefficients(manifest, {}))
    with pytest.raises(machete.UnsupportedError, match="no fitted schedule"):
        invariance.select(unfitted, BF16.name, 1, 4096, 4096, H100)


def test_a_named_schedule_must_have_the_order() -> None:
    n, k = 6144, 4096
    kept = [s.name for s in choose_order(bundle().manifest, BF16.name, n, k, H100).manifest.schedules]
    others = [s.name for s in SCHEDULES if s.name not in kept]
    assert kept and others
    for name in kept:
        assert choose(bundle(), BF16, (5, n, k), name, H100, batch_invariant=True).name == name
    for name in others:
        assert choose(bundle(), BF16, (5, n, k), name, H100).name == name
        with pytest.raises(machete.ArgumentError) as caught:
            choose(bundle(), BF16, (5, n, k), name, H100, batch_invariant=True)
        assert all(other in str(caught.value) for other in (name, *kept, "batch_invariant"))
    with pytest.raises(machete.ArgumentError, match="no schedule 'nonsense'"):
        choose(bundle(), BF16, (5, n, k), "nonsense", H100, batch_invariant=True)


# ---- what is launched and loaded


def launched_order(launch: Launch, k: int) -> list[list[int]]:
    """By the model above, from nothing but what the driver was given."""
    return loop_of_the_kernel(TILES[launch.symbol.split("__")[1]], launch.cluster[0], k)


@pytest.mark.parametrize(("n", "k"), [(512, 1152), (576, 640)])
@stubbed
def test_launches_have_the_order(stub: Stub, n: int, k: int) -> None:
    b = machete.prepack_b(gptq(random_codes(k, n, 4, seed=1), 4), machete.u4b8, torch.bfloat16, k=k)
    scales = torch.rand(-(-k // 128), n).bfloat16()
    tokens = (*range(1, 40), 64, 100, 128, 500, 512, 1000, 4096)
    for batch_invariant in (True, False):
        for m in tokens:
            problem = check_gemm(torch.empty(m, k).bfloat16(), b, machete.u4b8, scales, None, 128, None, None)
            out = torch.empty(m, n).bfloat16()
            run_kernel(bundle(), BF16, problem, b, machete.u4b8, out, None, None, 0, STREAM, batch_invariant)
    invariant, free = stub.launches[: len(tokens)], stub.launches[len(tokens) :]
    orders = [launched_order(launch, k) for launch in invariant]
    assert all(order == orders[0] for order in orders)
    assert len({launch.symbol for launch in invariant}) > 2
    assert any(launch.symbol != other.symbol for launch, other in zip(invariant, free, strict=True))


@stubbed
def test_warmup_loads_what_will_be_launched(stub: Stub) -> None:
    product._current_stream = lambda index: STREAM
    n, k = 6144, 4096
    for m in (1, 64, 4096):
        chosen = invariance.select(bundle().manifest, BF16.name, m, n, k, H100)
        loaded = machete.warmup(torch.bfloat16, machete.u4b8, [(m, n, k)], 0, batch_invariant=True)
        assert loaded == [f"bf16_u4b8__{chosen.tile}"]


# ---- explanations


def test_explanation() -> None:
    n, k = 6144, 4096
    for m in (1, 64, 4096):
        found = machete.explain(m, n, k, sms=132, batch_invariant=True)
        free = machete.explain(m, n, k, sms=132)
        assert isinstance(found, InvariantExplanation)
        assert not isinstance(free, InvariantExplanation)
        assert found.chosen == invariance.select(bundle().manifest, BF16.name, m, n, k, H100).name
        assert found.free == free.candidates[0]
        assert {c.schedule for c in found.candidates} <= set(names_of(found.order, k))
        text = found.text()
        assert text.startswith(free.text().split("SMs: ")[0])
        shares = " | ".join(str(share) for share in found.order)
        for part in (found.chosen, free.chosen, shares, "in the geometric mean"):
            assert part in text
        cost = found.candidates[0].time_us / free.candidates[0].time_us - 1
        assert f"{cost:+.0%}" in text.split(free.chosen)[-1].split("\n")[0]
        assert json.loads(json.dumps(found.as_dict()))["chosen"] == found.chosen


def test_the_command_explains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "open_bundle", lambda options: bundle())
    assert cli.main(["explain", "16", "6144", "4096", "--sms", "132", "--batch-invariant"]) == 0
    text = capsys.readouterr().out
    assert machete.explain(16, 6144, 4096, sms=132, batch_invariant=True).text() in text
    assert cli.main(["explain", "16", "6144", "4096", "--sms", "132", "--batch-invariant", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["free"]["schedule"] == selection.select(bundle().manifest, BF16.name, 16, 6144, 4096, H100).name
    assert [cost[0] for cost in document["costs"]] == list(REPRESENTATIVE_M)
    assert document["order"][0]["first"] == 0


# ---- the reference on the CPU


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


class CpuLayer:
    def __init__(self, n: int, k: int, dtype: torch.dtype, b_type: machete.ScalarType = machete.u4b8) -> None:
        torch.manual_seed(0)
        self.k, self.dtype, self.b_type = k, dtype, b_type
        self.b = machete.prepack_b(gptq(random_codes(k, n, b_type.bits, 1), b_type.bits), b_type, dtype, k=k)
        self.scales, self.bias = (torch.rand(-(-k // 128), n) / 50).to(dtype), torch.randn(n).to(dtype)
        self.zeros = None if b_type.bias else torch.rand_like(self.scales)

    def acts(self, m: int) -> torch.Tensor:
        return torch.randn(m, self.k).to(self.dtype)

    def gemm(self, a: torch.Tensor, **options: object) -> torch.Tensor:
        return machete.gemm(a, self.b, self.b_type, self.scales, self.zeros, bias=self.bias, **options)  # type: ignore[arg-type]


CPU_LAYERS = (
    (torch.bfloat16, machete.u4b8, 200, 300),
    (torch.float16, machete.u4b8, 130, 520),
    (torch.float16, machete.u8, 70, 200),
)


@pytest.mark.parametrize(("dtype", "b_type", "n", "k"), CPU_LAYERS, ids=str)
def test_rows_on_the_cpu(dtype: torch.dtype, b_type: machete.ScalarType, n: int, k: int) -> None:
    layer = CpuLayer(n, k, dtype, b_type)
    a = layer.acts(140)
    alone = torch.cat([layer.gemm(row[None], batch_invariant=True) for row in a])
    for m in (2, 3, 7, 16, 33, 127, 128, 129, 140):
        assert torch.equal(bits(layer.gemm(a[:m], batch_invariant=True)), bits(alone[:m])), m
    shuffle = torch.randperm(140)
    assert torch.equal(bits(layer.gemm(a[shuffle], batch_invariant=True)), bits(alone[shuffle]))
    columns = a.t().contiguous().t()
    out = torch.empty(140, n + 3, dtype=dtype)[:, 1 : n + 1]
    assert torch.equal(bits(layer.gemm(columns, batch_invariant=True, out=out)), bits(alone))
    plain = layer.gemm(a)
    assert float((plain.double() - alone.double()).norm() / plain.double().norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_on_the_cpu_beside_what_is_not_finite(dtype: torch.dtype) -> None:
    layer = CpuLayer(200, 520, dtype)
    a = layer.acts(70)
    expected = layer.gemm(a, batch_invariant=True)
    strange = {0: torch.nan, 7: torch.inf, 8: -torch.inf, 31: torch.nan, 69: -torch.inf}
    for row, value in strange.items():
        a[row, 3 * row : 3 * row + 40] = value
    found = layer.gemm(a, batch_invariant=True)
    others = [i for i in range(70) if i not in strange]
    assert torch.equal(bits(found[others]), bits(expected[others]))
    for row in strange:
        assert found[row].isnan().any()
        assert torch.equal(bits(layer.gemm(a[row], batch_invariant=True)), bits(found[row]))
    assert set(bits(found[found.isnan()]).tolist()) == {int(bits(torch.tensor([torch.nan], dtype=dtype)))}


def one_after_the_other(acts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """acts @ weights by a loop in numpy that adds product after product in fp64."""
    sums = np.zeros((acts.shape[0], weights.shape[1]))
    for column, row in zip(acts.double().t().numpy(), weights.double().numpy(), strict=True):
        sums = sums + np.multiply.outer(column, row)
    return torch.from_numpy(sums)


def of_many_magnitudes(*shape: int) -> torch.Tensor:
    """bf16 of which some are so much larger than others that an fp64 sum depends on the order."""
    return (torch.randn(shape) * torch.exp2(torch.randint(-30, 31, shape))).bfloat16()


def test_the_sum_is_taken_in_the_order_of_k() -> None:
    torch.manual_seed(3)
    acts, weights = of_many_magnitudes(140, 257).double(), of_many_magnitudes(257, 600).double()
    found = reference._sums_in_order(acts, weights)
    expected = one_after_the_other(acts, weights)
    assert torch.equal(found.view(torch.int64), expected.view(torch.int64))
    assert not torch.equal(expected, one_after_the_other(acts.flip(1), weights.flip(0)))
    assert reference._sums_in_order(acts[:0], weights).shape == (0, 600)


def test_sums_that_cancel_on_the_cpu() -> None:
    """What is left of these sums is rounding errors: each order gives another result, in all of its bits."""
    torch.manual_seed(4)
    half, n = of_many_magnitudes(40, 400), 96
    a = torch.cat([half, -half[:, torch.randperm(400)]], dim=1)
    b = machete.prepack_b(gptq(np.full((800, n), 9, dtype=np.uint8), 4), machete.u4b8, torch.bfloat16, k=800)
    scales = torch.rand(1, n).bfloat16()
    found = machete.gemm(a, b, machete.u4b8, scales, b_group_size=-1, batch_invariant=True)
    expected = one_after_the_other(a, scales.expand(800, n)).float().bfloat16()
    assert torch.equal(bits(found), bits(expected))
    for m in (1, 3, 16, 39):
        part = machete.gemm(a[-m:], b, machete.u4b8, scales, b_group_size=-1, batch_invariant=True)
        assert torch.equal(bits(part), bits(found[-m:]))


def test_chunks_and_threads_change_nothing_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CpuLayer(300, 520, torch.bfloat16)
    a = layer.acts(150)
    expected = layer.gemm(a, batch_invariant=True)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(reference, "BLOCK_SUMS", 900)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(bits(layer.gemm(a, batch_invariant=True)), bits(expected))
    finally:
        torch.set_num_threads(threads)


def test_no_rows_on_the_cpu() -> None:
    layer = CpuLayer(70, 300, torch.bfloat16)
    assert layer.gemm(torch.empty(2, 0, 300).bfloat16(), batch_invariant=True).shape == (2, 0, 70)
