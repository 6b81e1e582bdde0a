# SPDX-License-Identifier: Apache-2.0
"""Qualification: every kernel of a bundle, with every schedule, on this GPU against the reference.

Each product goes through the public ``gemm`` into a poisoned buffer larger than its output, twice. The data is drawn
anew for each run of the command; weights and reference results are shared by all schedules of one type.
"""

from __future__ import annotations

import datetime
import random
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import driver, reference
from .bundle import Bundle
from .config import TypeConfig
from .errors import DeviceError
from .fetch import use_bundle
from .kernel import check_device
from .prepack import A_DTYPES, prepack_b
from .product import gemm
from .record import SCHEMA, TOLERANCE, BundleId, DeviceInfo, KernelResult, Record, ScheduleResult
from .scalar_type import ScalarType, scalar_type

SHAPES = ((128, 128), (4224, 4160), (4304, 1152), (576, 7168), (1000, 1096))  # N, K: 1096 is no multiple of 64
GROUPS = (-1, 64, 128)
CASES = 13  # of each schedule
POISON = 0x7FFF  # a NaN in bf16 and in fp16
MARGIN_ROWS = 1
MARGIN_COLUMNS = {True: (8, 8), False: (3, 4)}  # left, right; the latter gives odd addresses and an odd row stride
ROWS_BEYOND = 3


@dataclass(frozen=True)
class Case:
    """One product. ``aligned``: the output's rows begin on 16 bytes, as those of an allocation of its own do."""

    m: int
    n: int
    k: int
    group: int
    bias: bool
    aligned: bool


@dataclass(frozen=True)
class Outcome:
    """``error`` is ||out - ref|| / ||ref||, None where some element is not finite (an unwritten one is NaN)."""

    error: float | None
    deterministic: bool
    guards_intact: bool


def qualify(bundle: Bundle, *, progress: Callable[[int, int, str], None] | None = None) -> dict[str, object]:
    """Runs every kernel and schedule of the bundle on torch's current device and returns the record, good or bad.

    ``record.check_record`` judges it. ``progress(done, total, what)`` is called before each schedule and once at the
    end. The bundle stays the process's bundle (``use_bundle``). Raises DeviceError where its kernels cannot run at all.
    """
    if not torch.cuda.is_available():
        raise DeviceError("qualification runs kernels and needs a GPU; torch.cuda.is_available() is False here")
    index = torch.cuda.current_device()
    check_device(bundle.manifest, driver.device(index))
    use_bundle(bundle)
    seed = secrets.randbits(32)
    with torch.no_grad():
        kernels = _run_all(bundle, seed, progress)
    info = bundle.manifest.bundle
    return Record(
        schema=SCHEMA,
        bundle=BundleId(info.arch, info.version, bundle.manifest_sha256),
        device=_device_info(index),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        seed=seed,
        tolerance=TOLERANCE,
        kernels=kernels,
    ).as_json()


def cases_for(tokens: int) -> list[Case]:
    """The products for a tile of so many tokens: M around its multiples, every shape and group size in turn."""
    rows = sorted({1, max(1, tokens - 1), tokens, tokens + 1, _most_rows(tokens)})
    cases = []
    for i in range(CASES):
        n, k = SHAPES[(i + i // len(SHAPES)) % len(SHAPES)]
        cases.append(Case(rows[i % len(rows)], n, k, GROUPS[i % len(GROUPS)], bias=i % 2 == 0, aligned=i % 4 < 2))
    return cases


def _most_rows(tokens: int) -> int:
    return 2 * tokens + ROWS_BEYOND


def _run_all(bundle: Bundle, seed: int, progress: Callable[[int, int, str], None] | None) -> dict[str, KernelResult]:
    manifest = bundle.manifest
    rows = max(_most_rows(k.tile.tokens) for k in manifest.kernels)
    work = [(types, schedule.name) for types in manifest.types for schedule in manifest.schedules_for(types)]
    results: dict[str, dict[str, ScheduleResult]] = {k.id: {} for k in manifest.kernels}
    data: _Data | None = None
    for done, (types, schedule) in enumerate(work):
        kernel = manifest.kernel_for(types, schedule)
        if progress is not None:
            progress(done, len(work), f"{types.name} {schedule}")
        if data is None or data.types != types:
            data = _Data(types, rows, seed)
        results[kernel.id][schedule] = _run_schedule(data, schedule, cases_for(kernel.tile.tokens))
    if progress is not None:
        progress(len(work), len(work), "done")
    return {kernel: KernelResult(schedules) for kernel, schedules in results.items()}


def _run_schedule(data: _Data, schedule: str, cases: Sequence[Case]) -> ScheduleResult:
    worst, worst_case = -1.0, cases[0]
    deterministic = guards_intact = True
    failures = []
    for case in cases:
        try:
            outcome = run_case(data.operands(case), case, data.b_type, schedule)
        except Exception as error:  # collected, so that one failure hides no other
            failures.append(_describe(case, error))
            continue
        deterministic &= outcome.deterministic
        guards_intact &= outcome.guards_intact
        value = float("inf") if outcome.error is None else outcome.error
        if value > worst:
            worst, worst_case = value, case
    return ScheduleResult(
        worst_error=worst if 0 <= worst < float("inf") else None,
        worst_case=(worst_case.m, worst_case.n, worst_case.k, worst_case.group),
        cases=len(cases),
        deterministic=deterministic,
        guards_intact=guards_intact,
        failures=tuple(failures),
    )


def run_case(operands: Operands, case: Case, b_type: ScalarType, schedule: str | None) -> Outcome:
    """One product, twice, each time into a freshly poisoned buffer."""
    first, second = (_product(operands, case, b_type, schedule) for _ in range(2))
    left, right = MARGIN_COLUMNS[case.aligned]
    inner = (slice(MARGIN_ROWS, -MARGIN_ROWS), slice(left, -right))
    out, expected = first[inner].double(), operands.expected[case.bias][: case.m].double()
    error = ((out - expected).norm() / expected.norm()).item() if bool(out.isfinite().all()) else None
    bits = first.view(torch.int16)
    deterministic = torch.equal(bits, second.view(torch.int16))
    margins = bits.clone()
    margins[inner] = POISON
    return Outcome(error, deterministic, bool((margins == POISON).all()))


def _product(operands: Operands, case: Case, b_type: ScalarType, schedule: str | None) -> torch.Tensor:
    """The poisoned buffer [M + margins, N + margins] with the product in its middle."""
    left, right = MARGIN_COLUMNS[case.aligned]
    shape = (case.m + 2 * MARGIN_ROWS, left + case.n + right)
    buffer = torch.full(shape, POISON, dtype=torch.int16, device=operands.a.device).view(operands.a.dtype)
    gemm(
        operands.a[: case.m],
        operands.b,
        b_type,
        b_scales=operands.scales,
        b_zeros=operands.zeros,
        b_group_size=case.group,
        bias=operands.bias if case.bias else None,
        out=buffer[MARGIN_ROWS:-MARGIN_ROWS, left:-right],
        schedule=schedule,
    )
    return buffer


@dataclass(frozen=True)
class Operands:
    """Data of one (N, K, group). ``a`` has as many rows as any case takes; ``expected`` is without, with bias."""

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor
    expected: tuple[torch.Tensor, torch.Tensor]


class _Data:
    """The operands of one type, made when first asked for."""

    def __init__(self, types: TypeConfig, rows: int, seed: int) -> None:
        self.types = types
        self.b_type = scalar_type(types.b)
        self._rows, self._seed = rows, seed
        self._made: dict[tuple[int, int, int], Operands] = {}

    def operands(self, case: Case) -> Operands:
        key = (case.n, case.k, case.group)
        if key not in self._made:
            seed = random.Random(f"{self._seed} {self.types.name} {key}").getrandbits(63)
            generator = torch.Generator("cuda").manual_seed(seed)
            self._made[key] = make_operands(self.types, *key, self._rows, generator)
        return self._made[key]


def make_operands(types: TypeConfig, n: int, k: int, group: int, rows: int, generator: torch.Generator) -> Operands:
    """Random operands on the generator's device: every code, scales over many binades with some negative and zero."""
    b_type, dtype, device = scalar_type(types.b), A_DTYPES[types.a], generator.device
    groups = 1 if group == -1 else -(-k // group)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    w_q = torch.randint(
        -(2**31), 2**31, (-(-k // b_type.per_int32), n), dtype=torch.int32, generator=generator, device=device
    )
    b = prepack_b(w_q, b_type, dtype, k=k)
    # Each weight has its own range, or rows of small scales would vanish in the norm. 8-bit codes are 16 times larger.
    centre = -10 + 6 * uniform(1) - (b_type.bits - 4)
    scales = torch.exp2(centre + 4 * uniform(groups, n) - 2)
    scales = torch.where(uniform(groups, n) < 1 / 16, -scales, scales)
    scales = torch.where(uniform(groups, n) < 1 / 64, 0.0, scales).to(dtype)
    zeros = None if types.zeros == "none" else (scales * (8 * uniform(groups, n)).round()).to(dtype)
    a = normal(rows, k).to(dtype)
    bias = (normal(n) * scales.float().std() * k**0.5).to(dtype)
    without = reference.gemm(a, b, b_type, scales, zeros, group)
    return Operands(a, b, scales, zeros, bias, (without, reference.gemm(a, b, b_type, scales, zeros, group, bias)))


def _describe(case: Case, error: Exception) -> str:
    text = f"M={case.m} N={case.n} K={case.k} group={case.group}: {type(error).__name__}: {error}"
    return re.sub(r"[^ -~]+", " ", text)[:500]


def _device_info(index: int) -> DeviceInfo:
    found = driver.device(index)
    return DeviceInfo(found.name, found.sms, _kernel_driver(), driver.driver_version(), torch.__version__)


def _kernel_driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    match = re.search(r"Kernel Module\b.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match.group(1) if match else "unknown"
