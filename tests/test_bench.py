# SPDX-License-Identifier: Apache-2.0
"""The benchmark without a GPU: arguments, arithmetic, checks of results, peers that fail, JSON, exit statuses.

Graphs are replaced by ones that run their first call and know no time; products are the reference's, on the CPU.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import chain, compare, sweep
from build_kernels import catalogue
from machete_aot import bench, bench_report, cli, cli_bench, clocks, peers, plot, timing
from machete_aot.bench import CUBLAS, OURS, Plan, Row, Timing
from machete_aot.config import ProductTypes
from machete_aot.errors import ArgumentError, DeviceError
from machete_aot.fetch import use_bundle
from machete_aot.peers import Cublas, find_peers
from machete_aot.timing import H100, H200, KINDS, Layer, Multiply, Weights, ceiling_of, floor_us

TINY = Plan(((192, 256), (64, 384)), (1, 5), torch.bfloat16, 128, 3)


class FakeGraph:
    """Runs the first of its calls, as a capture would; ``us`` is what a replay takes."""

    def __init__(self, calls: Sequence[Callable[[], object]], us: float = 1.0) -> None:
        self.calls, self.us, self.launches = calls, us, 0
        if calls:
            calls[0]()

    def replay_us(self) -> float:
        return self.us

    def launch(self) -> None:
        self.launches += 1


class FakePeer:
    """Multiplies with the same weights through torch, then does to the result what a test asks for."""

    version = "1.2"

    def __init__(self, name: str, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.name, self.change = name, change

    def prepare(self, weights: Weights, tokens: Sequence[int]) -> Multiply:
        multiply = timing.cublas(weights)
        return lambda i, a, out: self.change(multiply(i, a, torch.empty_like(out)), out)


def good(result: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(result)


def fails(result: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    raise ValueError("no kernel\n   for this")


class Unprepared:
    name, version = "unprepared", "0"

    def prepare(self, weights: Weights, tokens: Sequence[int]) -> Multiply:
        raise RuntimeError("cannot repack")


class FakeMonitor:
    def __init__(self, device: int = 0) -> None:
        pass

    def sm_mhz(self) -> int:
        return 1755

    def memory_mhz(self) -> int | None:
        return None

    def power_limit_w(self) -> float:
        return 700.0

    def driver(self) -> str:
        return "580.1"


@pytest.fixture(autouse=True)
def default_bundle_again() -> Iterator[None]:
    yield
    use_bundle(None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that needs a device is replaced; times are 10, 20, 30, ... in the order of the graphs."""
    monkeypatch.setattr(timing, "TimedGraph", FakeGraph)
    monkeypatch.setattr(
        timing, "alternate_us", lambda graphs, rounds, rest: [10.0 * (i + 1) for i in range(len(graphs))]
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench_report, "run", partial(bench.run, device="cpu"))
    monkeypatch.setattr(bench_report, "Monitor", FakeMonitor)
    monkeypatch.setattr(bench_report, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(bench_report, "device_facts", lambda monitor: {"name": "none", "driver": monitor.driver()})
    made = Weights.make
    monkeypatch.setattr(Weights, "make", staticmethod(lambda *a, **k: made(*a, **{**k, "copies": 2})))


def measured(*found: Any) -> list[Row]:
    return list(bench.run(TINY, found, device="cpu"))


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def options_of(*arguments: str) -> Any:
    return cli._parser().parse_args(["bench", *arguments])


# Arguments


def test_defaults_are_those_of_the_figures() -> None:
    document = json.loads(compare.FIGURES.read_text())
    assert set(bench.SHAPES) == {(shape["n"], shape["k"]) for shape in document["shapes"]}
    assert list(bench.TOKENS) == document["tokens"]
    options = options_of()
    assert (options.shapes, options.tokens, options.dtype, options.group) == (None, None, "bf16", 128)
    assert options.weights == Plan().weights.name == "u4b8" and tuple(KINDS) == cli_bench.WEIGHTS
    assert options.peers == tuple(peers.PEERS) and options.json_path is None and options.json is False


def test_shapes_are_named_or_given_once_each() -> None:
    shapes = options_of("--shapes", "64x128,llama3-8b,4096x4096").shapes
    assert shapes == ((64, 128), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def test_other_options() -> None:
    options = options_of("--tokens", "8,1,8", "--group", "-1", "--dtype", "fp16", "--peers", "none", "--rounds", "5")
    assert (options.tokens, options.group, options.dtype, options.peers, options.rounds) == ((8, 1), -1, "fp16", (), 5)
    assert options_of("--peers", "humming,cublas").peers == ("humming", "cublas")
    options = options_of("--weights", "u4+int-zeros", "--group", "32", "--rest", "1.5")
    assert (options.weights, options.group, options.rest) == ("u4+int-zeros", 32, 1.5)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shapes", "64"),
        ("--shapes", "0x64"),
        ("--shapes", "64x-1"),
        ("--shapes", "llama9"),
        ("--shapes", ""),
        ("--tokens", "0"),
        ("--tokens", "1,"),
        ("--tokens", "x"),
        ("--group", "48"),
        ("--weights", "u4b8+zeros"),
        ("--group", "0"),
        ("--group", "-2"),
        ("--dtype", "fp32"),
        ("--peers", "cutlass"),
        ("--rounds", "0"),
        ("--rest", "-1"),
        ("--rest", "x"),
        ("--alone", "0"),
        ("--alone", "61"),
        ("--alone", "1", "--rest", "1"),
    ],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options_of(*arguments)
    assert stopped.value.code == cli.USAGE
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run_cli(capsys, "--json", tmp_path / "x.json")
    assert (status, out) == (cli.exit_code(DeviceError()), "") and status == cli.OTHER
    assert re.fullmatch(r"machete-aot: the benchmark .* needs a GPU .* torch sees no GPU; run it .*\n", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_could_not_be_written_is_refused_first(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for path in (tmp_path / "none" / "x.svg", tmp_path):
        status, _, err = run_cli(capsys, option, path)
        assert status == cli.USAGE and str(path) in err


def test_a_plot_without_matplotlib_names_the_extra(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run_cli(capsys, "--plot", tmp_path / "x.svg")
    assert status == cli.USAGE and "pip install 'machete-aot[bench]'" in err
    status, _, err = run_cli(capsys, "--plot", tmp_path / "x.pdf")
    assert status == cli.USAGE and ".svg or .png" in err


# Timing


def test_graphs_take_turns_and_the_median_counts() -> None:
    order: list[str] = []

    class Scripted:
        def __init__(self, name: str, times: list[float]) -> None:
            self.name, self.times = name, iter(times)

        def replay_us(self) -> float:
            order.append(self.name)
            return next(self.times)

    graphs = [Scripted("a", [99, 1, 5, 3]), Scripted("b", [99, 20, 10, 90])]
    assert timing.alternate_us(graphs, 3) == [3, 20]  # type: ignore[arg-type]
    assert order == ["a", "b"] * 4


def test_a_card_rests_in_proportion_to_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def __init__(self, us: float, calls: int) -> None:
            self.us, self.calls = us, [None] * calls

        def replay_us(self) -> float:
            return self.us

    slept: list[float] = []
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    assert timing.alternate_us([Constant(10, 30), Constant(500, 4)], 2, rest=2) == [10, 500]  # type: ignore[arg-type]
    assert slept == pytest.approx([600e-6, 4000e-6] * 2)


def test_alone_each_has_two_stretches_of_which_the_second_half_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])

    class Warming:
        """Replays of a second, slower by as much as the card has been busy."""

        def __init__(self, name: str) -> None:
            self.name = name

        def replay_us(self) -> float:
            order.append(self.name)
            now[0] += 1
            return now[0]

    graphs = [Warming("a"), Warming("b"), Warming("c")]
    found = timing.alone_us(graphs, 4)  # type: ignore[arg-type]
    assert "".join(order) == "aaaabbbbccccccccbbbbaaaa"
    # of a the replays that end at 2, 3, 4 and 22, 23, 24, and so on: the same mean for all
    assert found == [13.0, 13.0, 13.0]


def test_alone_a_replay_longer_than_its_stretch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])

    class Long:
        def replay_us(self) -> float:
            now[0] += 10
            return 7.0

    assert timing.alone_us([Long()], 0.5) == [7.0]  # type: ignore[list-item]


def test_a_plan_of_stretches_is_not_timed_in_turns(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def alone(graphs: Sequence[Any], seconds: float) -> list[float]:
        asked.append(seconds)
        return [3.0] * len(graphs)

    monkeypatch.setattr(timing, "alone_us", alone)
    (row,) = bench.run(replace(TINY, shapes=TINY.shapes[:1], tokens=TINY.tokens[:1], alone=0.25), [], device="cpu")
    assert asked == [0.25] and row.ours.us == 3.0


@pytest.mark.parametrize(
    ("name", "ceiling", "own"),
    [
        ("NVIDIA H100 80GB HBM3", H100, True),
        ("NVIDIA H200", H200, True),
        ("NVIDIA GH200 480GB", H100, False),
        ("NVIDIA H20", H100, False),
        ("NVIDIA H100 PCIe", H100, False),
    ],
)
def test_the_floor_is_of_this_card(name: str, ceiling: timing.Ceiling, own: bool) -> None:
    assert ceiling_of(name) == (ceiling, own)


def test_floors() -> None:
    # Weights, scales, activations and output at one token; arithmetic at many.
    moved = 8192 * 8192 / 2 + 64 * 8192 * 2 + 2 * (8192 + 8192)
    assert floor_us(1, 8192, 8192) == pytest.approx(moved / 3.0e6)
    assert floor_us(1, 8192, 8192, 128, H200) == pytest.approx(moved / 4.69e6)
    assert floor_us(1, 8192, 8192, -1) == pytest.approx((8192 * 8192 / 2 + 8192 * 2 + 2 * 16384) / 3.0e6)
    assert floor_us(4096, 8192, 8192) == pytest.approx(2 * 4096 * 8192 * 8192 / 790e6)
    for name, weights, zeros in (("u8b128", 1, 0), ("u4+zeros", 0.5, 2), ("u8+int-zeros", 1, 1)):
        moved = 8192 * 8192 * weights + 64 * 8192 * (2 + zeros) + 2 * (8192 + 8192)
        assert floor_us(1, 8192, 8192, kind=KINDS[name]) == pytest.approx(moved / 3.0e6)


def test_copies_are_cold_and_different() -> None:
    weights = Weights.make(2048, 2048, 128, torch.float16, "cpu")
    assert len(weights.copies) * 2048 * 2048 / 2 >= timing.COLD_BYTES
    assert weights.plain_copies * 2048 * 2048 * 2 >= timing.COLD_BYTES
    (first, scales, zeros), (second, *_) = weights.copies[:2]
    assert zeros is None
    assert first.shape == (256, 2048) and scales.shape == (16, 2048) and scales.dtype == torch.float16
    assert not torch.equal(first, second)


def test_each_layer_of_a_chain_has_its_own_weights_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 1.0)
    assert Weights.make(64, 64, 128, torch.float16, "cpu").plain_copies == 2
    assert Weights.make(64, 64, 128, torch.float16, "cpu", copies=3).plain_copies == 3


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_kinds_of_weights_are_multiplied_by_what_they_stand_for(
    kind: timing.WeightKind, dtype: torch.dtype
) -> None:
    weights = Weights.make(96, 192, 32, dtype, "cpu", copies=2, kind=kind)
    layer, b_type = Layer(weights), kind.b_type
    for copy, (words, scales, zeros) in enumerate(weights.copies):
        per = b_type.per_int32
        assert words.shape == (192 // per, 96) and (zeros is None) == (kind.zeros == "none")
        codes = torch.stack([words >> (b_type.bits * i) & (1 << b_type.bits) - 1 for i in range(per)], 1).flatten(0, 1)
        values = (codes - b_type.bias).double()
        if zeros is not None and kind.zeros == "int":
            assert zeros.dtype == torch.uint8 and int(zeros.max()) < 1 << b_type.bits
            values -= zeros.repeat_interleave(32, 0)
        values *= scales.repeat_interleave(32, 0).double()
        if zeros is not None and kind.zeros == "float":
            assert zeros.dtype == dtype
            values -= zeros.repeat_interleave(32, 0).double()
        a, out, _ = layer.buffers(4)
        for multiply in (layer.ours(), timing.cublas(weights)):
            assert bench.relative_error(multiply(copy, a, out.fill_(0)), a.double() @ values) < 1e-2
        expected = bench.reference_product(layer, 4)
        assert bench.check(layer.ours(), layer, 4, expected, 1e-9).problem is None


def test_a_sweep_multiplies_by_weights_that_no_better_kernels_serve() -> None:
    for swept in catalogue.TYPES:
        kind = sweep.kind_of(swept)
        assert ProductTypes(swept.a, kind.b_type.name, kind.zeros, swept.fine).kernel_types()[0] == swept


@pytest.mark.parametrize("group", [-1, 64])
def test_cublas_and_ours_multiply_by_the_same_values(group: int) -> None:
    weights = Weights.make(96, 192, group, torch.bfloat16, "cpu", copies=3)
    layer = Layer(weights)
    for copy, (words, scales, _) in enumerate(weights.copies):
        codes = torch.stack([words >> (4 * i) & 15 for i in range(8)], dim=1).flatten(0, 1) - 8
        expected = codes.to(torch.bfloat16) * scales.repeat_interleave(192 if group == -1 else group, dim=0)
        a, out, _ = layer.buffers(4)
        for multiply in (layer.ours(), timing.cublas(weights)):
            assert bench.relative_error(multiply(copy, a, out.fill_(0)), a.double() @ expected.double()) < 2.5e-3


def test_a_graph_calls_every_copy_equally_often(no_gpu: None) -> None:
    layer = Layer(Weights.make(64, 64, -1, torch.bfloat16, "cpu"))
    used: list[tuple[int, int]] = []

    def multiply(i: int, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        used.append((i, out.data_ptr()))
        return out

    graph = layer.graph(3, multiply)
    assert len(graph.calls) % 2 == 0 and len(graph.calls) >= 4
    assert [i for i, _ in used] == [0, 1, 0]  # each copy once before the capture
    assert used[0][1] != used[1][1]


# Checks


def test_relative_error() -> None:
    wanted = torch.randn(1200, 8)
    assert bench.relative_error(wanted * 1.01, wanted) == pytest.approx(0.01, rel=1e-4)
    wrong = wanted.clone()
    wrong[1100] = torch.nan  # beyond what is compared at first
    assert math.isnan(bench.relative_error(wrong, wanted))


def test_peers_are_checked_then_timed(no_gpu: None) -> None:
    rows = measured(Cublas(), FakePeer("good", good))
    assert [(r.n, r.k, r.m) for r in rows] == [(192, 256, 1), (192, 256, 5), (64, 384, 1), (64, 384, 5)]
    for row in rows:
        assert (row.ours.us, row.peers[CUBLAS].us, row.peers["good"].us) == (10, 20, 30)
        assert row.ours.error is not None and 0 <= row.ours.error < 2.5e-3
        assert row.best == (CUBLAS, 20) and row.speedup == 2
        assert row.schedule.count("_") >= 3 and row.floor_us == floor_us(row.m, row.n, row.k)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (fails, "failed: ValueError: no kernel for this"),
        (lambda result, out: out.copy_(result).mul_(1.02), r"wrong: error 0\.02\d?, at most 0\.01"),
        (lambda result, out: out, "wrong: some of the output is not finite, or was not written"),
        (lambda result, out: out.copy_(result)[:, :-1], r"wrong: shape \(\d, \d+\), not \(\d, \d+\)"),
    ],
)
def test_a_peer_that_fails_or_is_wrong_is_not_timed(
    no_gpu: None, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], problem: str
) -> None:
    torch.manual_seed(0)  # how far rounding takes 1.02 from 0.020 depends on the data
    for row in measured(FakePeer("bad", change), FakePeer("good", good)):
        bad = row.peers["bad"]
        assert bad.us is None and re.fullmatch(problem, bad.problem or "")
        assert (row.ours.us, row.peers["good"].us) == (10, 20)  # the times go to the graphs that there are
        assert row.best == ("good", 20)


@pytest.mark.parametrize("name", ["u8b128", "u4+zeros", "u8+int-zeros"])
def test_other_weights_are_benched(no_gpu: None, name: str) -> None:
    plan = replace(TINY, weights=KINDS[name], group=32)
    for row in bench.run(plan, [Cublas(), FakePeer("good", good)], device="cpu"):
        assert (row.ours.us, row.peers[CUBLAS].us, row.peers["good"].us) == (10, 20, 30)
        assert row.floor_us == floor_us(row.m, row.n, row.k, 32, kind=KINDS[name])
        types = f"{'u8' if name[1] == '8' else 'u4'}_{'int' if 'int' in name else 'float'}_fine"
        assert row.schedule in {s.name for t, s in catalogue.typed_schedules() if t.name == f"bf16_{types}"}


def test_a_peer_may_round_elsewhere(no_gpu: None) -> None:
    within = FakePeer("within", lambda result, out: out.copy_(result).mul_(1.008))
    assert all(row.peers["within"].us == 20 for row in measured(within))


@pytest.mark.parametrize("when", ["capture", "replay"])
def test_a_peer_that_fails_in_its_graph_only(no_gpu: None, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    class Broken(FakeGraph):
        def __init__(self, calls: Any) -> None:
            super().__init__(calls)
            self.fail("capture")

        def replay_us(self) -> float:
            self.fail("replay")
            return super().replay_us()

        def fail(self, now: str) -> None:
            if now == when and "FakePeer" in repr(self.calls[0].func):  # type: ignore[attr-defined]
                raise RuntimeError("operation not permitted")

    monkeypatch.setattr(timing, "TimedGraph", Broken)
    rows = measured(FakePeer("bad", good))
    assert all("not permitted" in (row.peers["bad"].problem or "") and row.ours.us == 10 for row in rows)


def test_a_peer_that_cannot_prepare(no_gpu: None) -> None:
    rows = measured(Unprepared(), FakePeer("good", good))
    assert all(row.peers["unprepared"] == Timing(problem="failed: RuntimeError: cannot repack") for row in rows)
    assert [list(row.peers) for row in rows] == [["unprepared", "good"]] * 4


def test_a_peer_that_breaks_the_gpu_ends_the_run(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceError, match=r"^humming left the GPU unusable .* --peers"):
        bench._failure("humming", ValueError("x"))


def test_ours_is_checked_too(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = timing.gemm
    monkeypatch.setattr(timing, "gemm", lambda *a, **k: multiply(*a, **k).mul_(1.004))
    rows = measured(FakePeer("good", good))
    assert all(row.ours.us is None and "at most 0.0025" in (row.ours.problem or "") for row in rows)
    assert all(row.peers["good"].us == 10 and row.speedup is None for row in rows)
    assert bench_report.means(rows) == []


# Peers


def test_what_cannot_be_imported_is_named() -> None:
    found, missing = find_peers(("machete", "cublas"))
    if "machete" in missing:
        assert [p.name for p in found] == ["cublas"] and missing == {"machete": "vllm is not installed"}


def test_reasons_are_one_short_line() -> None:
    assert peers.reason(ModuleNotFoundError("No module named 'a.b'", name="a.b")) == "a is not installed"
    assert peers.reason(RuntimeError()) == "RuntimeError"
    text = peers.reason(OSError("x" * 500 + "\n"))
    assert "\n" not in text and len(text) == peers.REASON_LENGTH


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def plain(
    words: torch.Tensor, scales: torch.Tensor, a: torch.Tensor, bits: int = 4, bias: int = 8, zeros: Any = None
) -> torch.Tensor:
    """a @ weights, from GPTQ-packed words [K / 8, N], scales [groups, N] and zeros that are added."""
    codes = torch.stack([words >> (bits * i) & (1 << bits) - 1 for i in range(32 // bits)], dim=1).flatten(0, 1) - bias
    group = codes.shape[0] // scales.shape[0]
    weights = codes.to(a.dtype) * scales.repeat_interleave(group, dim=0)
    if zeros is not None:
        weights += zeros.repeat_interleave(group, dim=0)
    return (a.double() @ weights.double()).to(a.dtype)


VLLM_TYPES = {"uint4b8": (4, 8), "uint8b128": (8, 128), "uint4": (4, 0), "uint8": (8, 0)}  # bits, bias


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's functions as the adapters call them, with weights left as they are."""

    def prepack(words: torch.Tensor, a_type: torch.dtype, b_type: Any, group_scales_type: torch.dtype) -> Any:
        assert words.t().is_contiguous() and a_type == group_scales_type and b_type in VLLM_TYPES.values()
        return words

    def machete(
        *, a: Any, b_q: Any, b_type: Any, b_group_scales: Any, b_group_size: int, b_group_zeros: Any = None
    ) -> torch.Tensor:
        assert b_type in VLLM_TYPES.values() and b_group_size == (-1 if len(b_group_scales) == 1 else 64)
        return plain(b_q, b_group_scales, a, *b_type, zeros=b_group_zeros)

    def repack(words: torch.Tensor, perm: torch.Tensor, k: int, n: int, bits: int) -> torch.Tensor:
        assert perm.numel() == 0 and words.shape == (k * bits // 32, n)
        return words

    def permute(scales: torch.Tensor, *, size_k: int, size_n: int, group_size: int) -> torch.Tensor:
        assert scales.shape == (1 if group_size == -1 else size_k // group_size, size_n)
        return scales

    def marlin(*, input: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, **rest: Any) -> torch.Tensor:
        assert rest["is_k_full"] and rest["workspace"] == "workspace"
        assert (rest["output_size_per_partition"], rest["input_size_per_partition"]) == (96, 192)
        return plain(weight, weight_scale, input, *rest["wtype"])

    module(monkeypatch, "vllm", __version__="0.99")
    operations = module(
        monkeypatch, "vllm._custom_ops", machete_prepack_B=prepack, machete_mm=machete, gptq_marlin_repack=repack
    )
    sys.modules["vllm"]._custom_ops = operations  # type: ignore[attr-defined]
    module(monkeypatch, "vllm.scalar_type", scalar_types=types.SimpleNamespace(**VLLM_TYPES))
    parts = ["vllm", "model_executor", "layers", "quantization", "utils"]
    for count in range(2, len(parts) + 1):
        module(monkeypatch, ".".join(parts[:count]))
    module(
        monkeypatch,
        ".".join([*parts, "marlin_utils"]),
        marlin_make_workspace_new=lambda device: "workspace",
        marlin_permute_scales=permute,
        apply_gptq_marlin_linear=marlin,
    )


@pytest.mark.parametrize("group", [64, -1])
@pytest.mark.parametrize("name", ["machete", "marlin"])
def test_vllm_gets_the_same_weights(fake_vllm: None, name: str, group: int) -> None:
    found, missing = find_peers([name])
    assert missing == {} and found[0].version == "vllm 0.99"
    layer = Layer(Weights.make(96, 192, group, torch.float16, "cpu", copies=2))
    multiply = found[0].prepare(layer.weights, (3,))
    expected = bench.reference_product(layer, 3)
    assert bench.check(multiply, layer, 3, expected, 3.5e-4).problem is None
    a, out, _ = layer.buffers(3)
    assert bench.relative_error(multiply(1, a, out), expected) > 0.1  # another copy, other values
    assert torch.equal(multiply(2, a, out), multiply(0, a, out))


@pytest.mark.parametrize(
    ("name", "kinds"), [("machete", set(KINDS)), ("marlin", {"u4b8", "u8b128"}), ("humming", {"u4b8"})]
)
def test_adapters_say_which_weights_they_know(
    fake_vllm: None, monkeypatch: pytest.MonkeyPatch, name: str, kinds: set[str]
) -> None:
    module(monkeypatch, "humming", __version__="0.1.19")
    module(monkeypatch, "humming.layer", HummingLayer=FakeHummingLayer)
    module(monkeypatch, "humming.tune", get_heuristics_config=lambda config, device: [(0, 100, {})])
    (peer,), _ = find_peers([name])
    for kind in KINDS.values():
        layer = Layer(Weights.make(96, 192, 64, torch.float16, "cpu", copies=2, kind=kind))
        if kind.name not in kinds:
            with pytest.raises(ValueError, match=re.escape(f"not {kind.name}")):
                peer.prepare(layer.weights, (3,))
            continue
        multiply = peer.prepare(layer.weights, (3,))
        expected = bench.reference_product(layer, 3)
        assert bench.check(multiply, layer, 3, expected, bench.PEER_FACTOR * 3.5e-4).problem is None


class FakeHummingLayer:
    """Keeps what it is given; multiplies once it was transformed, with a configuration for that many tokens."""

    def __init__(self, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
        self.shape, self.weight_config, self.dtype = (shape_n, shape_k), weight_config, torch_dtype
        self.humming_config = None

    def load_from_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.weight, self.scales = tensors["weight"], tensors["weight_scale"]
        n, k = self.shape
        groups = self.scales.shape[1]
        assert self.weight.shape == (n, k // 8) and self.weight.is_contiguous() and self.scales.is_contiguous()
        assert self.weight_config == {"dtype": "uint4", "group_size": k // groups if groups > 1 else 0}

    def transform(self) -> None:
        self.humming_config = "layer's"  # type: ignore[assignment]

    def __call__(self, a: torch.Tensor, *, outputs: torch.Tensor, tuning_config: str) -> torch.Tensor:
        table = json.loads(tuning_config)
        for m in (1, len(a)):  # the launcher looks one token up, too
            assert any(low < m <= high for low, high, _ in table)
        return outputs.copy_(plain(self.weight.t(), self.scales.t(), a))


@pytest.mark.parametrize("group", [64, -1])
def test_humming_gets_the_same_weights_and_few_configurations(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    asked = []

    def table(config: object, device: torch.device) -> list[tuple[int, int, dict[str, Any]]]:
        asked.append((config, device))
        return [(low, low + 8, {"block_shape": (8, 128, low)}) for low in range(0, 800, 8)]

    module(monkeypatch, "humming", __version__="0.1.19")
    module(monkeypatch, "humming.layer", HummingLayer=FakeHummingLayer)
    module(monkeypatch, "humming.tune", get_heuristics_config=table)
    (humming,), missing = find_peers(["humming"])
    assert missing == {} and humming.version == "0.1.19"
    layer = Layer(Weights.make(96, 192, group, torch.bfloat16, "cpu", copies=2))
    multiply = humming.prepare(layer.weights, (16, 100))
    assert asked == [("layer's", torch.device("cpu"))]
    for m in (16, 100):
        assert bench.check(multiply, layer, m, bench.reference_product(layer, m), 2.5e-3).problem is None
    with pytest.raises(AssertionError):
        multiply(0, *layer.buffers(50)[:2])


# Tables and JSON


def row(m: int, n: int, ours: float | None, **theirs: float | None) -> Row:
    return Row(m, n, 4096, "schedule", 4.0, Timing(ours, 0.001), {name: Timing(us) for name, us in theirs.items()})


def test_means_are_geometric() -> None:
    rows = [row(1, 64, 10.0, cublas=40.0, humming=20.0), row(1, 128, 10.0, cublas=90.0, humming=5.0)]
    rows += [row(8, 64, 8.0, cublas=8.0, humming=None), row(8, 128, None, cublas=8.0)]
    first, second = bench_report.means(rows)
    assert first == {
        "m": 1,
        "products": 2,
        "speedup": 1.0,  # sqrt(2 * 0.5)
        "worst": 0.5,
        "over_floor": 2.5,
        "peers": {"cublas": 6.0, "humming": 1.0},
    }
    assert second["products"] == 1 and second["peers"] == {"cublas": 1.0, "humming": None}
    alone = bench_report.means([row(1, 64, 10.0)])[0]
    assert alone["speedup"] is None and alone["worst"] is None


def test_facts_of_a_row() -> None:
    found = row(1, 64, 10.0, cublas=40.0, humming=19.999)
    facts = replace(
        found, peers={**found.peers, "marlin": Timing(5.0, source="scaled"), "x": Timing(problem="p")}
    ).facts()
    assert facts["best_peer"] == "marlin" and facts["best_peer_us"] == 5.0 and facts["cublas_us"] == 40.0
    assert facts["peers"]["marlin"] == {"us": 5.0, "error": None, "source": "scaled", "problem": None}
    assert facts["peers"]["humming"]["us"] == 20.0
    assert facts["peers"]["x"]["problem"] == "p" and facts["error"] == 0.001
    assert row(1, 64, 10.0).facts()["best_peer"] is None


def test_head_and_lines_are_aligned() -> None:
    names = ("cublas", "humming", "marlin", "machete")
    found = row(4096, 57344, 5555.55, cublas=5500.0, humming=None)
    found = replace(
        found, peers={**found.peers, "marlin": Timing(1.0, source="scaled"), "humming": Timing(problem="wrong: x")}
    )
    text = bench_report.line(found, names)
    assert len(text) == len(bench_report.header(names))
    assert [text.split()[i] for i in (-5, -4, -3, -2, -1)] == ["5500.0", "wrong", "~1.0", "-", "0.00"]
    lines = bench_report.summary([found], names).splitlines()
    assert len(lines[1]) == len(lines[2])


def test_notes_say_what_was_left_out_once() -> None:
    bad = Timing(problem="failed: x")
    rows = [replace(row(m, 64, 1.0), peers={"humming": bad}) for m in (1, 8, 16)]
    assert bench_report.notes(rows, {"machete": "vllm is not installed"}) == [
        "machete: not timed, vllm is not installed",
        "humming: not timed at 64x4096 M=1 and 2 more, failed: x",
    ]


@pytest.fixture
def fake_peers(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'vllm._custom_ops'", name="vllm._custom_ops")

    monkeypatch.setattr(
        peers,
        "PEERS",
        {
            "cublas": Cublas,
            "machete": missing,
            "marlin": lambda: FakePeer("marlin", lambda result, out: out.zero_()),
            "humming": lambda: FakePeer("humming", good),
        },
    )
    monkeypatch.setattr(bench, "require_gpu", lambda: None)


def test_the_command_prints_and_writes(
    fake_peers: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    arguments = [
        "--shapes",
        "192x256,64x384",
        "--tokens",
        "1,5",
        "--dtype",
        "fp16",
        "--group",
        "64",
        "--json",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", ["/bin/machete-aot", "bench", *arguments])
    status, out, err = run_cli(capsys, *arguments)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "3.00 TB/s" in lines[0] and lines[1].split()[-6:] == ["marlin", "humming", "best", "peer", "/", "ours"]
    assert "machete" not in lines[1]  # missing: in the notes alone
    assert "192 x 256" in lines[2] and "wrong" in lines[2] and lines[2].split()[-1] == "2.00"
    assert lines[-2:] == [
        "machete: not timed, vllm is not installed",
        "marlin: not timed at 192x256 M=1 and 3 more, wrong: error 1, at most 0.0014",
    ]
    document = json.loads(path.read_text())
    assert document["command"] == " ".join(["machete-aot", "bench", *arguments])
    assert (document["types"], document["group"], document["rounds"]) == ("fp16", 64, bench.ROUNDS)
    assert document["weights"] == "u4b8"
    assert document["torch"] == torch.__version__ and re.fullmatch("[0-9a-f]{64}", document["bundle"])
    assert document["clocks"] == {"sm_mhz": {"min": 1755, "median": 1755, "max": 1755}, "memory_mhz": None}
    assert document["device"] == {"name": "none", "driver": "580.1"}
    assert document["peers"]["machete"] == {"version": None, "problem": "vllm is not installed"}
    assert document["peers"]["humming"] == {"version": "1.2", "problem": None}
    assert [(r["n"], r["k"], r["m"]) for r in document["rows"]] == [
        (192, 256, 1),
        (192, 256, 5),
        (64, 384, 1),
        (64, 384, 5),
    ]
    first = document["rows"][0]
    assert (first["us"], first["cublas_us"], first["best_peer"], first["best_peer_us"]) == (10, 20, "cublas", 20)
    assert first["peers"]["humming"]["us"] == 30 and first["peers"]["humming"]["error"] < 1.4e-3
    assert first["peers"]["marlin"]["us"] is None and first["peers"]["marlin"]["error"] == pytest.approx(1)
    assert first["sm_mhz"] == 1755 and first["memory_mhz"] is None
    assert [m["speedup"] for m in document["means"]] == [2.0, 2.0]


def test_what_was_measured_is_kept_when_the_run_is_cut_short(
    fake_peers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bench_report.run

    def cut(*arguments: Any) -> Iterator[Row]:
        rows = whole(*arguments)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_report, "run", cut)
    status, _, _ = run_cli(capsys, "--shapes", "64x64", "--tokens", "1,2", "--json", tmp_path / "x.json")
    assert status == 130
    assert [r["m"] for r in json.loads((tmp_path / "x.json").read_text())["rows"]] == [1]


def test_a_wrong_result_of_ours_is_a_failed_check(
    fake_peers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    multiply = timing.gemm
    monkeypatch.setattr(timing, "gemm", lambda *a, **k: multiply(*a, **k).mul_(2))
    status, out, err = run_cli(capsys, "--shapes", "64x64", "--tokens", "1", "--peers", "cublas")
    assert status == cli.OTHER and "machete-aot qualify" in err
    assert "machete-aot: not timed at 64x64 M=1, wrong: error 1, at most 0.0025" in out


# Plots


def test_panels() -> None:
    rows = [row(8, n, 10.0 * n, cublas=40.0) for n in range(1, 3)] + [row(1, 1, 3.0, cublas=None)]
    shown = plot.panels(rows)
    assert shown == {
        "1 x 4096": {OURS: {1: 3.0, 8: 10.0}, plot.FLOOR: {1: 4.0, 8: 4.0}, "cublas": {8: 40.0}},
        "2 x 4096": {OURS: {8: 20.0}, plot.FLOOR: {8: 4.0}, "cublas": {8: 40.0}},
    }
    many = plot.panels([row(8, n, 2.0**n, cublas=40.0 if n < 8 else None) for n in range(9)])
    assert many == {"geometric mean of 9 shapes": {OURS: {8: pytest.approx(16.0)}, plot.FLOOR: {8: 4.0}, "cublas": {}}}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_plot_is_drawn(fake_peers: None, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"x{suffix}"
    status, _, _ = run_cli(capsys, "--shapes", "64x64,64x128", "--tokens", "1,2", "--plot", path)
    assert status == 0
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in data and b"64 x 128" in data


def test_the_plot_refuses_other_files() -> None:
    with pytest.raises(ArgumentError, match=r"x\.pdf"):
        plot.require(Path("x.pdf"))


# Clocks


class FakeNvml:
    """The functions that Monitor calls; ``fail``: names of those that return an error."""

    def __init__(self, *fail: str) -> None:
        self.fail, self.uuid = fail, b""

    def nvmlInit_v2(self) -> int:
        return int("init" in self.fail)

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        self.uuid, handle._obj.value = uuid, 7
        return int("uuid" in self.fail)

    def nvmlDeviceGetClockInfo(self, handle: ctypes.c_void_p, kind: int, value: Any) -> int:
        assert handle.value == 7
        value._obj.value = {clocks.SM_CLOCK: 1980, clocks.MEMORY_CLOCK: 2619}[kind]
        return int("clock" in self.fail)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: ctypes.c_void_p, value: Any) -> int:
        value._obj.value = 700_000
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        text.value = b"580.159.04"
        return 0


def monitor(monkeypatch: pytest.MonkeyPatch, library: Any, uuid: str | None = "abc") -> clocks.Monitor:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=uuid))
    monkeypatch.setattr(ctypes, "CDLL", library)
    return clocks.Monitor(3)


def readings(found: clocks.Monitor) -> tuple[object, ...]:
    return found.sm_mhz(), found.memory_mhz(), found.power_limit_w(), found.driver()


def test_nvml_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    assert readings(monitor(monkeypatch, lambda name: nvml)) == (1980, 2619, 700.0, "580.159.04")
    assert nvml.uuid == b"GPU-abc"


def test_without_nvml_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    for library in (absent, lambda name: FakeNvml("init"), lambda name: FakeNvml("uuid")):
        assert readings(monitor(monkeypatch, library)) == (None,) * 4
    assert readings(monitor(monkeypatch, lambda name: FakeNvml(), None)) == (None,) * 4
    assert readings(monitor(monkeypatch, lambda name: FakeNvml("clock"))) == (None, None, 700.0, "580.159.04")


def test_clocks_are_read_while_ours_runs(no_gpu: None) -> None:
    graph = FakeGraph([lambda: None] * 10)
    assert bench._clocks(graph, 50.0, FakeMonitor()) == (1755, None)  # type: ignore[arg-type]
    assert graph.launches == bench.BUSY_US / 500


# Comparison with recorded figures


def test_figures_are_scaled_by_cublas() -> None:
    figures = compare.load_figures(json.loads(compare.FIGURES.read_text()))
    assert figures[64, 8192, 8192] == {"cublas": 47.7, "machete": 28.0, "marlin": 37.8, "humming": 25.9}
    found = Row(64, 8192, 8192, "s", 12.0, Timing(17.0), {"cublas": Timing(95.4), "humming": Timing(30.0, 0.001)})
    scaled = compare.with_scaled(found, figures)
    assert scaled.peers["humming"] == Timing(30.0, 0.001)  # timed: left alone
    assert scaled.peers["machete"] == Timing(pytest.approx(56.0), source="scaled")  # type: ignore[arg-type]
    assert scaled.peers["marlin"].us == pytest.approx(75.6)
    assert found.peers.keys() == {"cublas", "humming"}
    failed = replace(found, peers={**found.peers, "humming": Timing(problem="failed: x")})
    assert compare.with_scaled(failed, figures).peers["humming"] == Timing(
        pytest.approx(51.8),  # type: ignore[arg-type]
        problem="failed: x",
        source="scaled",
    )


def test_nothing_is_scaled_without_cublas_or_figures() -> None:
    figures = compare.load_figures(json.loads(compare.FIGURES.read_text()))
    without = Row(64, 8192, 8192, "s", 12.0, Timing(17.0), {"cublas": Timing(problem="failed: x")})
    other = Row(63, 8192, 8192, "s", 12.0, Timing(17.0), {"cublas": Timing(50.0)})
    assert compare.with_scaled(without, figures) == without and compare.with_scaled(other, figures) == other


@pytest.mark.parametrize(
    ("name", "group", "scales"),
    [("NVIDIA H100 80GB HBM3", 128, True), ("NVIDIA H100 80GB HBM3", 64, False), ("NVIDIA H200", 128, False)],
)
def test_figures_are_of_one_kind_of_card(name: str, group: int, scales: bool) -> None:
    assert compare.comparable(name, group) is scales
    assert compare.comparable(name, group, "u8b128") is False


@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_compare_keeps_its_fields(
    fake_peers: None, card: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "tokens": [1],
        "shapes": [{"n": 64, "k": 128, "us": {"cublas": [40.0], "machete": [8.0], "marlin": [60.0]}}],
    }
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    monkeypatch.setattr(compare, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(compare, "require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(sys, "argv", ["compare", "--out", str(tmp_path / "x.json")])
    compare.main()
    document = json.loads((tmp_path / "x.json").read_text())
    assert {"device", "torch", "bundle", "date", "types", "group", "rows"} <= document.keys()
    (found,) = document["rows"]
    assert {"n", "k", "m", "schedule", "us", "cublas_us", "floor_us", "best_peer", "best_peer_us"} <= found.keys()
    out = capsys.readouterr().out
    if card == "NVIDIA H200":
        assert "machete" not in found["peers"] and found["best_peer"] == "cublas" and "not scaled" in out
        return
    assert found["peers"]["machete"] == {"us": 4.0, "error": None, "source": "scaled", "problem": None}
    assert found["peers"]["humming"]["source"] == "timed" and found["peers"]["humming"]["us"] == 30.0
    assert found["peers"]["marlin"]["us"] == 30.0 and found["peers"]["marlin"]["source"] == "scaled"
    assert (found["best_peer"], found["best_peer_us"]) == ("machete", 4.0) and "~4.0" in out


# The chain


@pytest.fixture
def small_chain(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> chain.Model:
    monkeypatch.setattr(chain, "HEAD", 16)
    monkeypatch.setattr(chain, "POSITIONS", 32)
    monkeypatch.setattr(chain, "COLD_BYTES", 1.0)
    monkeypatch.setattr(chain, "TimedGraph", FakeGraph)
    monkeypatch.setattr(chain, "alternate_us", lambda graphs, rounds: [20.0 * (i + 1) for i in range(len(graphs))])
    monkeypatch.setattr(chain, "Decoder", partial(chain.Decoder, device="cpu"))
    made = Weights.make
    monkeypatch.setattr(Weights, "make", staticmethod(lambda *a, **k: made(*a, **{**k, "device": "cpu"})))
    return chain.Model("small", 128, 192, 8, 2)


def test_models_have_enough_cold_weights() -> None:
    eight = chain.MODELS["llama3-8b"]
    assert tuple(eight.shapes.values()) == cli_bench.MODELS["llama3-8b"] and eight.layers == 3
    assert tuple(chain.MODELS["llama3-70b"].shapes.values()) == cli_bench.MODELS["llama3-70b"]
    for model in chain.MODELS.values():
        assert model.layers * sum(n * k / 2 for n, k in model.shapes.values()) >= timing.COLD_BYTES


def test_the_chain_is_a_decoder(small_chain: chain.Model) -> None:
    model, m = small_chain, 3
    weights = {name: torch.randn(n, k) / k**0.5 for name, (n, k) in model.shapes.items()}
    products = {
        name: lambda i, a, out, w=w: torch.mm(a, w.t(), out=out)  # the same weights in both layers
        for name, w in weights.items()
    }
    decoder = chain.Decoder(model, m, torch.float32)
    result = torch.empty_like(decoder.x)
    decoder.run(products, result)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(1, keepdim=True) + chain.EPSILON).sqrt() * weight

    x = decoder.x
    for (first, second), (keys, values) in zip(decoder.norms, decoder.caches, strict=True):
        queries = (norm(x, first) @ weights["qkv"].t())[:, :128].view(m, 8, 16)
        keys, values = (c.repeat_interleave(4, dim=1) for c in (keys, values))
        scores = torch.einsum("mhd,mhpd->mhp", queries, keys) / 4
        mixed = torch.einsum("mhp,mhpd->mhd", scores.softmax(-1), values).reshape(m, 128)
        x = x + mixed @ weights["o"].t()
        gate, up = (norm(x, second) @ weights["gate_up"].t()).chunk(2, dim=1)
        x = x + (gate * gate.sigmoid() * up) @ weights["down"].t()
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-4)


def test_a_chain_is_timed_with_and_without_its_products(
    small_chain: chain.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Cublas(), FakePeer("wrong", lambda result, out: out.zero_()), Unprepared()]
    rows = chain.chain(small_chain, (1, 3), torch.bfloat16, 64, 3, found)
    assert [r["m"] for r in rows] == [1, 3]
    assert rows[0]["us"] == {OURS: 10.0, chain.WAITING: 20.0, "cublas": 30.0, chain.ALONE: 40.0}  # of two layers each
    assert rows[0]["products_us"] == {OURS: -30.0, chain.WAITING: -20.0, "cublas": -10.0}
    assert rows[0]["distance_from_ours"][chain.WAITING] == 0 and rows[0]["distance_from_ours"]["cublas"] < 0.02
    assert rows[0]["problems"] == {
        "wrong": "qkv wrong: error 1, at most 0.01",
        "unprepared": "RuntimeError: cannot repack",
    }
    out = capsys.readouterr().out
    assert "wrong: not timed, qkv wrong" in out and "3.00 times ours" in out
