# SPDX-License-Identifier: Apache-2.0
"""Qualification without a GPU: check_record finds every way in which a record may not vouch for a bundle, and a case
finds every way in which a kernel may be wrong."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from machete_aot import qualify, record
from machete_aot.config import TypeConfig
from machete_aot.errors import DeviceError
from machete_aot.manifest import kernel_id, parse_manifest
from machete_aot.scalar_type import u4b8
from small_bundle import TILES, TYPES, small_bundle

BF16, FP16 = TYPES
STREAM, FLAT = TILES
_, MANIFEST_TEXT, MANIFEST_DIGEST = small_bundle()
MANIFEST = parse_manifest(MANIFEST_TEXT)
NAMES = [s.name for s in MANIFEST.schedules]


def make_record() -> dict[str, Any]:
    """A record that qualifies ``MANIFEST``, as plain JSON values."""
    result = record.ScheduleResult(1e-4, (1, 128, 128, -1), 13, True, True, ())
    kernels = {
        k.id: record.KernelResult({s.name: result for s in MANIFEST.schedules if s.tile == k.tile.name})
        for k in MANIFEST.kernels
    }
    return record.Record(
        schema=1,
        bundle=record.BundleId("sm90a", "0.1.0", MANIFEST_DIGEST),
        device=record.DeviceInfo("NVIDIA H100 80GB HBM3", 132, "580.159.04", 13000, "2.13.0"),
        date="2026-11-22",
        seed=7,
        tolerance=record.TOLERANCE,
        kernels=kernels,
    ).as_json()


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
    "schema": (lambda r: r.update(schema=2), "schema: 2 is not 1"),
    "date": (lambda r: r.update(date="yesterday"), "date: 'yesterday' is not a date"),
    "kernel missing": (lambda r: at(r, "kernels").pop(FP16_FLAT), f"kernel {FP16_FLAT}: not in the record"),
    "kernel unknown": (lambda r: at(r, "kernels").update(x={"schedules": {}}), "kernel x: not in the manifest"),
    "schedule missing": (lambda r: at(r, *ONE[:-1]).pop(NAMES[1]), f"schedule {NAMES[1]}: not in the record"),
    "schedule of another tile": (
        lambda r: at(r, *ONE[:-1]).update({NAMES[2]: at(r, *ONE)}),
        f"schedule {NAMES[2]}: not in the manifest",
    ),
    "error": (lambda r: at(r, *ONE).update(worst_error=2.6e-3), "error 0.0026, where 0 to 0.0025 is allowed, at M=1"),
    "error for fp16": (lambda r: at(r, *FP16_ONE).update(worst_error=4e-4), "error 0.0004, where 0 to 0.00035"),
    "error below 0": (lambda r: at(r, *ONE).update(worst_error=-1.0), "error -1, where 0 to"),
    "error not finite": (lambda r: at(r, *ONE).update(worst_error=float("nan")), "worst_error: not finite"),
    "output not finite": (
        lambda r: at(r, *ONE).update(worst_error=None),
        "an output is not finite, or was not written",
    ),
    "not deterministic": (lambda r: at(r, *ONE).update(deterministic=False), "two runs differ"),
    "guards": (lambda r: at(r, *ONE).update(guards_intact=False), "something beside the output was written"),
    "too few cases": (lambda r: at(r, *ONE).update(cases=4), "4 cases, where 10 are wanted"),
    "raised": (lambda r: at(r, *ONE).update(failures=["M=1: DriverCallError"]), "raised M=1: DriverCallError"),
    "loose tolerance": (lambda r: at(r, "tolerance").update(bf16=0.1), "tolerance: 'bf16' at 0.1"),
    "unknown tolerance": (lambda r: at(r, "tolerance").update(fp8=0.1), "tolerance: 'fp8' at 0.1"),
    "field missing": (lambda r: at(r, *ONE).pop("guards_intact"), "guards_intact: missing"),
    "field unknown": (lambda r: r.update(comment="fine"), "record.comment: unknown"),
    "wrong type": (lambda r: at(r, *ONE).update(deterministic="yes"), "deterministic: expected bool, found str"),
    "case of three": (lambda r: at(r, *ONE).update(worst_case=[1, 2, 3]), "expected 4 values, found 3"),
    "device missing": (lambda r: r.pop("device"), "record.device: missing"),
}


def test_a_good_record_qualifies() -> None:
    assert record.check_record(make_record(), MANIFEST) == []


@pytest.mark.parametrize("name", TAMPERED)
def test_each_violation_is_found(name: str) -> None:
    tamper, message = TAMPERED[name]
    values = make_record()
    tamper(values)
    problems = record.check_record(values, MANIFEST)
    assert len(problems) == 1 and message in problems[0]


def test_violations_name_kernel_and_schedule() -> None:
    values = make_record()
    at(values, *ONE)["deterministic"] = False
    assert record.check_record(values, MANIFEST) == [f"kernel {BF16_STREAM}: schedule {NAMES[1]}: two runs differ"]


def test_all_violations_are_found_at_once() -> None:
    together = ["digest", "version", "arch", "schema", "date", "loose tolerance", "error", "error for fp16", "raised"]
    together += ["not deterministic", "guards", "too few cases"]
    values = make_record()
    for name in together:
        TAMPERED[name][0](values)
    problems = record.check_record(values, MANIFEST)
    assert len(problems) == len(together)
    for name in together:
        assert any(TAMPERED[name][1] in p for p in problems), name


@pytest.mark.parametrize("values", [None, [], "record", 3, {}, {"schema": 1}], ids=repr)
def test_anything_may_come_as_a_record(values: object) -> None:
    assert record.check_record(values, MANIFEST)


def test_another_manifest_is_not_qualified() -> None:
    values = make_record()
    at(values, "bundle")["manifest_sha256"] = "0" * 64
    assert "manifest_sha256" in record.check_record(values, MANIFEST)[0]


def test_written_records_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    path = record.write_record(make_record(), folder)
    assert path == folder / "sm90a-0.1.0-nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text()) == make_record()
    assert record.check_record(json.loads(path.read_text()), MANIFEST) == []
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


@pytest.mark.parametrize("tokens", [8, 16, 64, 256])
def test_cases(tokens: int) -> None:
    cases = qualify.cases_for(tokens)
    assert len(cases) == len(set(cases)) == qualify.CASES >= record.MIN_CASES
    assert {c.m for c in cases} == {1, tokens - 1, tokens, tokens + 1, 2 * tokens + 3}
    assert {(c.n, c.k) for c in cases} == set(qualify.SHAPES)
    assert {c.group for c in cases} == {-1, 64, 128}
    assert {(c.bias, c.aligned) for c in cases} == {(x, y) for x in (True, False) for y in (True, False)}


# ---------------------------------------------------------------- one case, with right and wrong kernels

CASE = qualify.Case(m=5, n=128, k=200, group=64, bias=True, aligned=False)
Gemm = Callable[..., torch.Tensor]


def operands(types: TypeConfig = BF16) -> qualify.Operands:
    return qualify.make_operands(types, CASE.n, CASE.k, CASE.group, 11, torch.Generator().manual_seed(3))


def run_with(monkeypatch: pytest.MonkeyPatch, damage: Callable[[torch.Tensor], object]) -> qualify.Outcome:
    """The outcome of the case when something happens to the output after the product."""
    honest = qualify.gemm

    def damaged(*arguments: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        honest(*arguments, out=out, **options)
        damage(out)
        return out

    monkeypatch.setattr(qualify, "gemm", damaged)
    return qualify.run_case(operands(), CASE, u4b8, None)


@pytest.mark.parametrize("types", [BF16, FP16, TypeConfig("bf16", "u8", "bf16", "bf16")], ids=lambda t: t.name)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_right_kernel_passes(types: TypeConfig, bias: bool, aligned: bool) -> None:
    case = qualify.Case(CASE.m, CASE.n, CASE.k, CASE.group, bias, aligned)
    outcome = qualify.run_case(operands(types), case, qualify.scalar_type(types.b), None)
    assert outcome == qualify.Outcome(error=0.0, deterministic=True, guards_intact=True)


def test_a_wrong_element_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_with(monkeypatch, lambda out: out[3, 100:].zero_())
    assert outcome.error is not None and outcome.error > 0.01
    assert outcome.deterministic and outcome.guards_intact


def test_an_unwritten_element_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_with(monkeypatch, lambda out: out.view(torch.int16)[4, 127:].fill_(qualify.POISON))
    assert outcome.error is None and outcome.deterministic and outcome.guards_intact


@pytest.mark.parametrize(("row", "column"), [(0, -1), (0, CASE.n), (4, CASE.n), (-1, 0), (CASE.m, 127), (4, -3)])
def test_a_store_beside_the_output_shows(monkeypatch: pytest.MonkeyPatch, row: int, column: int) -> None:
    def store(out: torch.Tensor) -> None:
        offset = out.storage_offset() + row * out.stride(0) + column
        out.as_strided((1,), (1,), offset).zero_()

    outcome = run_with(monkeypatch, store)
    assert outcome == qualify.Outcome(error=0.0, deterministic=True, guards_intact=False)


def test_one_different_bit_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    flips = iter([0, 1])
    outcome = run_with(monkeypatch, lambda out: out.view(torch.int16)[2, 9].bitwise_xor_(next(flips)))
    assert not outcome.deterministic and outcome.guards_intact


def test_random_operands_are_what_the_record_claims() -> None:
    made, again = operands(), operands()
    assert all(torch.equal(x, y) for x, y in zip(made.expected, again.expected, strict=True))
    assert all(bool(e.isfinite().all()) and float(e.float().norm()) > 0 for e in made.expected)
    assert not torch.equal(*made.expected)
    assert bool((made.scales < 0).any()) and bool((made.scales == 0).any())


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match="needs a GPU"):
        qualify.qualify(None)  # type: ignore[arg-type]
