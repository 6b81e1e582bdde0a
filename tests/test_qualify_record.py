# SPDX-License-Identifier: Apache-2.0
"""Qualification without a GPU: check_record finds every way in which a record may not vouch for a bundle, and a case
finds every way in which a kernel may be wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from machete_aot import qualify, record, reference
from machete_aot.config import PRODUCTS, TypeConfig
from machete_aot.errors import DeviceError
from machete_aot.frames import manifest_text
from machete_aot.manifest import Manifest, kernel_id, parse_manifest
from machete_aot.rounded_error import rounded_error
from machete_aot.scalar_type import ScalarType
from machete_aot.validate import Problem
from small_bundle import TILES, TYPES, small_bundle

BF16, FP16 = TYPES
STREAM, FLAT = TILES
_, MANIFEST_FRAME, MANIFEST_DIGEST = small_bundle()
MANIFEST = parse_manifest(manifest_text(MANIFEST_FRAME))
NAMES = [s.name for s in MANIFEST.schedules]


def make_record() -> dict[str, Any]:
    """A record that qualifies ``MANIFEST``, as plain JSON values."""
    errors = {"bf16": 1e-4, "fp16": 5e-5, "fp32": 1e-6}
    result = record.ScheduleResult(errors, "M=1 N=128 K=128 group=-1 u4b8 out=fp16", 20, True, True, ())
    kernels = {
        k.id: record.KernelResult({s.name: result for s in MANIFEST.schedules if s.tile == k.tile.name})
        for k in MANIFEST.kernels
    }
    return record.Record(
        schema=3,
        bundle=record.BundleId("sm90a", "0.1.0", MANIFEST_DIGEST),
        device=record.DeviceInfo("NVIDIA H100 80GB HBM3", 132, "580.159.04", 13000, "2.13.0"),
        date="2026-11-22",
        seed=7,
        tolerance=record.LIMITS,
        kernels=kernels,
        helpers={},
    ).as_json()


def set_error(name: str, out: str, value: float | None) -> Callable[[dict[str, Any]], object]:
    return lambda r: at(r, *globals()[name], "worst_errors").update({out: value})


def at(values: dict[str, Any], *path: str) -> dict[str, Any]:
    for key in path:
        values = values[key]
    return values


BF16_STREAM, FP16_FLAT = kernel_id(BF16, STREAM.name), kernel_id(FP16, FLAT.name)
ONE = ("kernels", BF16_STREAM, "schedules", NAMES[1])
FP16_ONE = ("kernels", FP16_FLAT, "schedules", NAMES[2])

TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "digest": (
        lambda r: at(r, "bundle").update(manifest_sha256="f" * 64),
        "bundle.manifest_sha256: the record is about",
    ),
    "version": (lambda r: at(r, "bundle").update(version="0.0.9"), "bundle.version: the record is about '0.0.9'"),
    "arch": (lambda r: at(r, "bundle").update(arch="sm100a"), "bundle.arch: the record is about 'sm100a'"),
    "schema": (lambda r: r.update(schema=1), "schema: 1 is not 3"),
    "date": (lambda r: r.update(date="yesterday"), "date: 'yesterday' is not a date"),
    "kernel missing": (lambda r: at(r, "kernels").pop(FP16_FLAT), f"kernel {FP16_FLAT}: not in the record"),
    "kernel unknown": (lambda r: at(r, "kernels").update(x={"schedules": {}}), "kernel x: not in the manifest"),
    "schedule missing": (lambda r: at(r, *ONE[:-1]).pop(NAMES[1]), f"schedule {NAMES[1]}: not in the record"),
    "schedule of another tile": (
        lambda r: at(r, *ONE[:-1]).update({NAMES[2]: at(r, *ONE)}),
        f"schedule {NAMES[2]}: not in the manifest",
    ),
    "error": (set_error("ONE", "bf16", 1e-3), "error 0.001 in bf16, where 0 to 0.0009 is allowed; worst case: M=1"),
    "error in fp32": (set_error("ONE", "fp32", 1e-3), "error 0.001 in fp32, where 0 to 0.0009 is allowed"),
    "error in fp16": (set_error("ONE", "fp16", 1e-3), "error 0.001 in fp16, where 0 to 0.0009 is allowed"),
    "error for fp16": (set_error("FP16_ONE", "fp16", 1.3e-4), "error 0.00013 in fp16, where 0 to 0.00012"),
    "fp32 for fp16": (set_error("FP16_ONE", "fp32", 1.3e-4), "error 0.00013 in fp32, where 0 to 0.00012"),
    "bf16 for fp16": (set_error("FP16_ONE", "bf16", 1.3e-4), "error 0.00013 in bf16, where 0 to 0.00012"),
    "error below 0": (set_error("ONE", "bf16", -1.0), "error -1 in bf16, where 0 to"),
    "error not finite": (set_error("ONE", "bf16", float("nan")), "worst_errors.bf16: not finite"),
    "output not finite": (set_error("ONE", "bf16", None), "an output in bf16 is not finite, or was not written"),
    "no fp32 output": (lambda r: at(r, *ONE, "worst_errors").pop("fp32"), "no product with an output in fp32"),
    "another output": (set_error("ONE", "fp8", 0.0), "an output of type 'fp8' is not one of"),
    "not deterministic": (lambda r: at(r, *ONE).update(deterministic=False), "two runs differ"),
    "guards": (lambda r: at(r, *ONE).update(guards_intact=False), "something beside the output was written"),
    "too few cases": (lambda r: at(r, *ONE).update(cases=4), "4 cases, where 16 are wanted"),
    "raised": (lambda r: at(r, *ONE).update(failures=["M=1: DriverCallError"]), "raised M=1: DriverCallError"),
    "loose tolerance": (lambda r: at(r, "tolerance").update(bf16=0.1), "tolerance: 'bf16' at 0.1"),
    "unknown tolerance": (lambda r: at(r, "tolerance").update(fp8=0.1), "tolerance: 'fp8' at 0.1"),
    "field missing": (lambda r: at(r, *ONE).pop("guards_intact"), "guards_intact: missing"),
    "field unknown": (lambda r: r.update(comment="fine"), "record.comment: unknown"),
    "wrong type": (lambda r: at(r, *ONE).update(deterministic="yes"), "deterministic: expected bool, found str"),
    "case of numbers": (lambda r: at(r, *ONE).update(worst_case=[1, 2, 3]), "worst_case: expected str, found a list"),
    "device missing": (lambda r: r.pop("device"), "record.device: missing"),
}


def test_a_good_record_qualifies() -> None:
    assert record.check_record(make_record(), MANIFEST, MANIFEST_DIGEST) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_that_are_cut_off_do_not_qualify(dtype: torch.dtype) -> None:
    """Though rounding is no error, and though each element is less than a unit away."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for seed in range(10):
        exact = torch.randn(2000, generator=torch.Generator().manual_seed(seed))
        dropped = 23 - round(-math.log2(torch.finfo(dtype).eps))  # bits of a significand in fp32
        cut = (exact.view(torch.int32) >> dropped << dropped).view(torch.float32).to(dtype)
        assert rounded_error(exact.to(dtype), exact) == 0
        assert rounded_error(cut, exact) > record.LIMITS[name]


@pytest.mark.parametrize("name", TAMPERED)
def test_each_violation_is_found(name: str) -> None:
    tamper, message = TAMPERED[name]
    values = make_record()
    tamper(values)
    problems = record.check_record(values, MANIFEST, MANIFEST_DIGEST)
    assert len(problems) == 1 and message in problems[0]


def test_violations_name_kernel_and_schedule() -> None:
    values = make_record()
    at(values, *ONE)["deterministic"] = False
    (problem,) = record.check_record(values, MANIFEST, MANIFEST_DIGEST)
    assert problem == f"kernel {BF16_STREAM}: schedule {NAMES[1]}: two runs differ"


def test_all_violations_are_found_at_once() -> None:
    together = ["digest", "version", "arch", "schema", "date", "loose tolerance", "error", "error for fp16", "raised"]
    together += ["not deterministic", "guards", "too few cases"]
    values = make_record()
    for name in together:
        TAMPERED[name][0](values)
    problems = record.check_record(values, MANIFEST, MANIFEST_DIGEST)
    assert len(problems) == len(together)
    for name in together:
        assert any(TAMPERED[name][1] in p for p in problems), name


@pytest.mark.parametrize("values", [None, [], "record", 3, {}, {"schema": 1}], ids=repr)
def test_anything_may_come_as_a_record(values: object) -> None:
    assert record.check_record(values, MANIFEST, MANIFEST_DIGEST)


def test_another_manifest_is_not_qualified() -> None:
    values = make_record()
    at(values, "bundle")["manifest_sha256"] = "0" * 64
    assert "manifest_sha256" in record.check_record(values, MANIFEST, MANIFEST_DIGEST)[0]


def test_written_records_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    path = record.write_record(make_record(), folder)
    assert path == folder / "sm90a-0.1.0-nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text()) == make_record()
    assert record.check_record(json.loads(path.read_text()), MANIFEST, MANIFEST_DIGEST) == []
    assert path.read_text().endswith("}\n") and stat.S_IMODE(path.stat().st_mode) == 0o644
    newer = make_record() | {"seed": 8}
    assert record.write_record(newer, str(folder)) == path
    assert json.loads(path.read_text())["seed"] == 8
    assert list(folder.iterdir()) == [path]


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = record.write_record(make_record(), tmp_path)
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        record.write_record(make_record() | {"seed": float("nan")}, tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == before


# ---------------------------------------------------------------- which products

CATALOGUE = (
    *(BF16, FP16),
    *(
        TypeConfig(a, b, a, zeros, fine)
        for a, zeros in (("bf16", "float"), ("bf16", "int"), ("fp16", "any"))
        for b in ("u4", "u8")
        for fine in (False, True)
    ),
)


def with_types(*types: TypeConfig) -> Manifest:
    """What a manifest with kernels of these types says of them."""
    return dataclasses.replace(
        MANIFEST, kernels=tuple(dataclasses.replace(MANIFEST.kernels[0], types=t) for t in types)
    )


KINDS = {
    "bf16_u4b8": {("u4b8", "none")},
    "fp16_u4b8": {("u4b8", "none")},
    "bf16_u4_float": {("u4", "none"), ("u4", "float")},
    "bf16_u4_int": {("u4", "int")},
    "bf16_u8_float": {("u8b128", "none"), ("u8", "none"), ("u8", "float")},
    "bf16_u8_int": {("u8", "int")},
    "fp16_u4_any": {("u4", "none"), ("u4", "float"), ("u4", "int")},
    "fp16_u8_any": {("u8b128", "none"), ("u8", "none"), ("u8", "float"), ("u8", "int")},
    "bf16_u4_float_fine": {("u4b8", "none"), ("u4", "none"), ("u4", "float")},
    "bf16_u4_int_fine": {("u4", "int")},
    "bf16_u8_float_fine": {("u8b128", "none"), ("u8", "none"), ("u8", "float")},
    "bf16_u8_int_fine": {("u8", "int")},
    "fp16_u4_any_fine": {("u4b8", "none"), ("u4", "none"), ("u4", "float"), ("u4", "int")},
    "fp16_u8_any_fine": {("u8b128", "none"), ("u8", "none"), ("u8", "float"), ("u8", "int")},
}
catalogue = pytest.mark.parametrize("types", CATALOGUE, ids=lambda t: t.name)


@catalogue
def test_weights(types: TypeConfig) -> None:
    found = qualify.weights_of(with_types(*CATALOGUE), types)
    assert {(w.b, w.zeros) for w in found} == KINDS[types.name]
    for b, zeros in KINDS[types.name]:
        groups = {w.group for w in found if (w.b, w.zeros) == (b, zeros)}
        assert groups == ({32, 96} if types.fine else {-1, 64, 128, 192, 384})


def test_the_types_multiply_by_all_that_there_is_once() -> None:
    """Every product of PRODUCTS that has kernels, in all of its groups, and each with one of the types."""
    manifest = with_types(*CATALOGUE)
    found = Counter((t.a, w) for t in CATALOGUE for w in qualify.weights_of(manifest, t))
    wanted = {
        (p.a, qualify.Weights(p.b, p.zeros, group))
        for p in PRODUCTS
        if p.kernel_types()
        for group in qualify.GROUPS
        if (group in (32, 96)) == p.fine
    }
    assert set(found) == wanted and set(found.values()) == {1}


def test_weights_of_a_bundle_without_the_kernels_that_come_first() -> None:
    types = TypeConfig("fp16", "u4", "fp16", "any")
    found = qualify.weights_of(with_types(types), types)
    assert {w.group for w in found if w.b == "u4b8"} == {-1, 64, 128, 192, 384}
    assert len(found) == len(set(found)) == 4 * 5 <= qualify.CASES  # so each schedule runs every one
    assert {c.weights for c in qualify.cases_for(types, found, 16, 3)} == set(found)


@catalogue
@pytest.mark.parametrize("tokens", [8, 16, 64, 256])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_cases_of_a_schedule(types: TypeConfig, tokens: int, number: int) -> None:
    weights = qualify.weights_of(with_types(*CATALOGUE), types)
    cases = qualify.cases_for(types, weights, tokens, number)
    assert len(cases) == len(set(cases)) == qualify.CASES >= record.MIN_CASES
    assert {c.weights for c in cases} == set(weights)
    features = [
        *((c.m for c in cases), (c.k for c in cases), (c.bias for c in cases), (c.aligned for c in cases)),
        *((c.weights.group for c in cases), ((c.weights.b, c.weights.zeros) for c in cases), (c.out for c in cases)),
        *((c.channel for c in cases), (c.token for c in cases), (c.swiglu for c in cases)),
    ]
    counts = [Counter(values) for values in features]
    assert min(min(count.values()) for count in counts) >= 2
    assert set(counts[0]) == {1, tokens - 1, tokens, tokens + 1, 2 * tokens + 3}
    assert {(c.n, c.k) for c in cases if not c.swiglu} <= set(qualify.SHAPES) and len(counts[1]) == len(qualify.SHAPES)
    assert set(counts[6]) == set(record.OUTPUTS)
    assert all(c.n % 16 == 0 for c in cases if c.swiglu)
    plain = [c for c in cases if not (c.channel or c.token or c.swiglu) and c.out == types.a]
    assert len(plain) >= 4 and {c.bias for c in plain} == {True, False}


@catalogue
def test_cases_of_twenty_schedules(types: TypeConfig) -> None:
    weights = qualify.weights_of(with_types(*CATALOGUE), types)
    cases = [c for number in range(20) for c in qualify.cases_for(types, weights, 16, number)]
    epilogue = {(c.channel, c.token, c.swiglu, c.out) for c in cases}
    assert len(epilogue) == len(set(qualify.EPILOGUES))
    combined = {(c.weights, c.bias, c.channel, c.token, c.swiglu, c.out) for c in cases}
    assert len(combined) == len(weights) * 2 * len(epilogue)
    for feature in ("m", "k", "aligned"):
        values = {getattr(c, feature) for c in cases}
        assert len({(getattr(c, feature), c.weights) for c in cases}) == len(values) * len(weights), feature
        crossed = {(getattr(c, feature), c.channel, c.token, c.swiglu, c.out) for c in cases}
        assert len(crossed) == len(values) * len(epilogue), feature
    assert len({(c.m, c.k) for c in cases}) == 25


def test_epilogues_have_every_pair_of_features() -> None:
    for x, y in itertools.combinations(("channel", "token", "swiglu", "out"), 2):
        pairs = {(getattr(e, x), getattr(e, y)) for e in qualify.EPILOGUES}
        assert len(pairs) == (6 if y == "out" else 4), (x, y)


def test_a_case_in_words() -> None:
    weights = qualify.Weights("u4", "int", 96)
    case = qualify.Case(7, 1008, 1096, weights, True, False, True, True, True, "fp32")
    assert str(case) == ("M=7 N=1008 K=1096 group=96 u4 zeros=int bias channel token swiglu out=fp32 unaligned")
    plain = qualify.Case(1, 128, 128, qualify.Weights("u4b8", "none", -1), False, True, False, False, False, "bf16")
    assert str(plain) == "M=1 N=128 K=128 group=-1 u4b8 out=bf16"


# ---------------------------------------------------------------- one case, with right and wrong kernels

PLAIN = qualify.Weights("u4b8", "none", 64)
CASE = qualify.Case(5, 128, 200, PLAIN, True, False, False, False, False, "bf16")
Gemm = Callable[..., torch.Tensor]


def operands(case: qualify.Case = CASE, a: str = "bf16", seed: int = 3) -> qualify.Operands:
    return qualify.make_operands(a, case.n, case.k, case.weights, 11, torch.Generator().manual_seed(seed))


def run_with(
    monkeypatch: pytest.MonkeyPatch, damage: Callable[[torch.Tensor], object], **changes: Any
) -> qualify.Outcome:
    """The outcome of the case when something happens to the output after the product."""
    honest = qualify.gemm

    def damaged(*arguments: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        honest(*arguments, out=out, **options)
        damage(out)
        return out

    monkeypatch.setattr(qualify, "gemm", damaged)
    case = dataclasses.replace(CASE, **changes)
    return qualify.run_case(operands(case), case, None)


@catalogue
def test_a_right_kernel_passes(types: TypeConfig) -> None:
    weights = qualify.weights_of(with_types(*CATALOGUE), types)
    for case in qualify.cases_for(types, weights, 4, 2):
        small = dataclasses.replace(case, n=min(case.n, 144), k=min(case.k, 200))
        outcome = qualify.run_case(operands(small, types.a), small, None)
        assert outcome == qualify.Outcome(error=0.0, deterministic=True, guards_intact=True), small


@pytest.mark.parametrize("b", ["u4", "u8"])
@pytest.mark.parametrize("a", ["bf16", "fp16"])
def test_a_kernel_that_rounds_floating_zeros_once_passes(a: str, b: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one fused multiply-add, as the kernels do; the reference rounds twice. And data on which they differ."""
    case = dataclasses.replace(CASE, n=128, k=128, weights=qualify.Weights(b, "float", 96), out=a)
    twice = reference._dequantize_columns

    def once(problem: Problem, b: torch.Tensor, b_type: ScalarType, first: int, last: int) -> torch.Tensor:
        codes = reference.unpack_b(b, b_type, problem.n, problem.k).double()
        scales, zeros = (
            reference._per_k(t.double(), problem, first, last) for t in (problem.scales, problem.zeros) if t is not None
        )
        return (codes * scales - zeros).float().to(problem.scales.dtype)

    errors = []
    for seed in range(20):
        data = operands(case, a, seed)
        for epilogue in (qualify.Epilogue(), qualify.Epilogue(swiglu=True), qualify.Epilogue(True, True)):
            kinds = {"channel": epilogue.channel, "token": epilogue.token, "swiglu": epilogue.swiglu}
            monkeypatch.setattr(reference, "_dequantize_columns", once)
            error = qualify.run_case(data, dataclasses.replace(case, **kinds), None).error
            monkeypatch.setattr(reference, "_dequantize_columns", twice)
            assert error is not None
            errors.append(error)
    assert 0 < max(errors) <= 0.7 * record.LIMITS[a]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_error(dtype: torch.dtype) -> None:
    """Nor is rounding the other way, of a sum that lies in the middle; what goes beyond is measured from there."""
    exact = torch.cat([torch.randn(1000) * 2.0**e for e in (-20, 0, 5, 10)] + [torch.zeros(3)])
    assert rounded_error(exact.to(dtype), exact) == 0
    step = torch.finfo(dtype).eps
    middle = torch.tensor([1.0, 1 + step / 2, 2 - step / 2, 1e-3])
    if dtype != torch.float32:
        for rounded in (1.0, 1 + step):
            out = torch.tensor([1.0, rounded, 2.0, 1e-3]).to(dtype)
            assert rounded_error(out, middle) < 1e-9
    wrong = torch.tensor([1 + 4 * step, 1 + step, 2 - step, 1e-3]).to(dtype)
    beyond = 4 * step if dtype == torch.float32 else 3.5 * step
    assert rounded_error(wrong, wrong * torch.tensor([1 / (1 + 4 * step), 1, 1, 1])) == pytest.approx(
        beyond / float(torch.tensor([1.0, 1 + step, 2 - step, 1e-3]).norm()), rel=0.01
    )


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("out", record.OUTPUTS)
def test_a_wrong_element_shows(monkeypatch: pytest.MonkeyPatch, out: str, swiglu: bool) -> None:
    outcome = run_with(monkeypatch, lambda out: out[3, out.shape[1] - 28 :].zero_(), out=out, swiglu=swiglu)
    assert outcome.error is not None and outcome.error > 0.01
    assert outcome.deterministic and outcome.guards_intact


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("out", record.OUTPUTS)
def test_an_unwritten_element_shows(monkeypatch: pytest.MonkeyPatch, out: str, swiglu: bool) -> None:
    def unwritten(out: torch.Tensor) -> None:
        size = out.element_size()
        out.view(qualify.BITS[size])[4, -1:].fill_(qualify.POISON[size])

    outcome = run_with(monkeypatch, unwritten, out=out, swiglu=swiglu)
    assert outcome.error is None and outcome.deterministic and outcome.guards_intact


@pytest.mark.parametrize("out", record.OUTPUTS)
@pytest.mark.parametrize(("row", "column"), [(0, -1), (0, CASE.n), (4, CASE.n), (-1, 0), (CASE.m, 127), (4, -3)])
def test_a_store_beside_the_output_shows(monkeypatch: pytest.MonkeyPatch, out: str, row: int, column: int) -> None:
    def store(out: torch.Tensor) -> None:
        offset = out.storage_offset() + row * out.stride(0) + column
        out.as_strided((1,), (1,), offset).zero_()

    outcome = run_with(monkeypatch, store, out=out)
    assert outcome == qualify.Outcome(error=0.0, deterministic=True, guards_intact=False)


@pytest.mark.parametrize("out", record.OUTPUTS)
def test_one_different_bit_shows(monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    flips = iter([0, 1])
    flip = lambda out: out.view(qualify.BITS[out.element_size()])[2, 9].bitwise_xor_(next(flips))  # noqa: E731
    outcome = run_with(monkeypatch, flip, out=out)
    assert not outcome.deterministic and outcome.guards_intact


@pytest.mark.parametrize(
    "weights", [PLAIN, qualify.Weights("u8", "float", 32), qualify.Weights("u4", "int", -1)], ids=str
)
def test_random_operands_are_what_the_record_claims(weights: qualify.Weights) -> None:
    case = dataclasses.replace(CASE, weights=weights)
    made, again = operands(case), operands(case)
    assert torch.equal(made.sums, again.sums) and made.sums.dtype == torch.float32
    assert bool(made.sums.isfinite().all()) and float(made.sums.norm()) > 0
    assert bool((made.scales < 0).any()) and bool((made.scales == 0).any())
    assert bool((made.channel_scales < 0).any()) and bool((made.token_scales > 0).all())
    wanted = {"none": None, "float": torch.bfloat16, "int": torch.uint8}[weights.zeros]
    assert (None if made.zeros is None else made.zeros.dtype) == wanted


@pytest.mark.parametrize("bits", [0, 1, 3, 7])
def test_shortened(bits: int) -> None:
    values = torch.exp2(torch.rand(1000, generator=torch.Generator().manual_seed(2)) * 20 - 15)
    found = qualify._shortened(values, bits)
    steps = found / torch.exp2(found.log2().floor() + 1 - max(bits, 1))
    assert torch.equal(steps, steps.round())
    assert bool(((found / values).log2().abs() <= (1 if bits < 2 else 2.0 ** (1 - bits))).all())


def test_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst error of each type of output, the worst case of all, and what was raised."""
    cases = [
        dataclasses.replace(CASE, m=m, out=out)
        for m, out in enumerate(["fp16", "bf16", "fp32", "bf16", "fp16", "bf16"])
    ]
    errors = iter([3e-4, 2e-3, 1e-4, 1e-3, 1e-4, ValueError("no\nkernel")])

    def outcome(*_: object) -> qualify.Outcome:
        error = next(errors)
        if isinstance(error, Exception):
            raise error
        return qualify.Outcome(error, True, error != 1e-4)

    monkeypatch.setattr(qualify, "run_case", outcome)
    data = qualify._Data(FP16, 5, 1)
    monkeypatch.setattr(data, "operands", lambda case: None)
    found = qualify._run_schedule(data, "s", cases)
    assert dict(found.worst_errors) == {"bf16": 2e-3, "fp16": 3e-4, "fp32": 1e-4}
    assert found.worst_case == str(cases[1])
    assert found.cases == 6 and found.deterministic and not found.guards_intact
    assert found.failures == (f"{cases[5]}: ValueError: no kernel",)
    errors = iter([1e-4, None])
    found = qualify._run_schedule(data, "s", cases[:2])
    assert dict(found.worst_errors) == {"bf16": None, "fp16": 1e-4} and found.worst_case == str(cases[1])


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match="needs a GPU"):
        qualify.qualify(None)  # type: ignore[arg-type]
