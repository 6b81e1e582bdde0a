# SPDX-License-Identifier: Apache-2.0
"""Qualification: every kernel of a bundle, with every schedule, and every helper, on this GPU against the reference.

Each product goes through the public ``gemm`` into a poisoned buffer larger than its output, twice. The data is drawn
anew for each run of the command; weights and the reference's sums are shared by all schedules of one type.

A schedule's products are ``CASES`` of all combinations of what its kernel multiplies (weight types, kinds of zeros,
group sizes), what becomes of the sums (EPILOGUES) and the bias. Each schedule has every one of each alone; twenty
schedules of the same types have all combinations.
"""

from __future__ import annotations

import datetime
import math
import random
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import driver, reference
from .bundle import Bundle
from .config import UNIT_K, ProductTypes, TypeConfig
from .errors import DeviceError
from .fetch import use_bundle
from .kernel import check_device
from .manifest import Manifest
from .permute_abi import HELPER_ID
from .prepack import A_DTYPES, prepack_b
from .product import gemm
from .qualify_permute import MARGIN_ROWS, MARGINS, describe, qualify_permute
from .record import LIMITS, OUTPUTS, SCHEMA, BundleId, DeviceInfo, KernelResult, Record, ScheduleResult
from .rounded_error import rounded_error
from .scalar_type import SCALAR_TYPES, scalar_type

SHAPES = ((128, 128), (4224, 4160), (4304, 1152), (576, 7168), (1000, 1096))  # N, K: 1096 is no multiple of 64
GROUPS = (-1, 32, 64, 96, 128, 192, 384)
CASES = 20  # of each schedule: no types have more operands
POISON = {2: 0x7FFF, 4: 0x7FFFFFFF}  # by the bytes of an element: a NaN in bf16, in fp16 and in fp32
BITS = {2: torch.int16, 4: torch.int32}
ROWS_BEYOND = 3
OUT_DTYPES = {**A_DTYPES, "fp32": torch.float32}  # by the names of record.OUTPUTS
SIGNIFICANT_BITS = {"bf16": 8, "fp16": 11}
OTHER = {"bf16": "fp16", "fp16": "bf16"}


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums. ``out``: "a", the activations' type, "other", the other one of 16 bits, or "fp32"."""

    channel: bool = False
    token: bool = False
    swiglu: bool = False
    out: str = "a"


# Every pair of their features; kernels have a way of their own for the plain one, so it comes twice.
EPILOGUES = (
    *(Epilogue(), Epilogue(True, True, False, "fp32"), Epilogue(False, True, True, "a")),
    *(Epilogue(True, False, False, "other"), Epilogue(out="fp32")),
    *(Epilogue(), Epilogue(False, False, True, "fp32"), Epilogue(True, True, True, "other")),
    *(Epilogue(False, True, False, "other"), Epilogue(True, False, True, "a")),
)


@dataclass(frozen=True)
class Weights:
    """Quantised weights as a caller may have them. ``zeros``: "none", "float" or "int"; ``group`` -1: one group."""

    b: str
    zeros: str
    group: int


@dataclass(frozen=True)
class Case:
    """One product. ``aligned``: the output's rows begin on 16 bytes, as those of an allocation of its own do.

    ``out`` is the name of the output's type. ``n`` counts the columns of gate and up together.
    """

    m: int
    n: int
    k: int
    weights: Weights
    bias: bool
    aligned: bool
    channel: bool
    token: bool
    swiglu: bool
    out: str

    @property
    def columns(self) -> int:
        """Of the output."""
        return self.n // 2 if self.swiglu else self.n

    def __str__(self) -> str:
        w = self.weights
        features = ("bias", "channel", "token", "swiglu")
        extras = "".join(f" {name}" for name in features if getattr(self, name))
        zeros = "" if w.zeros == "none" else f" zeros={w.zeros}"
        return (
            f"M={self.m} N={self.n} K={self.k} group={w.group} {w.b}{zeros}{extras} out={self.out}"
            f"{'' if self.aligned else ' unaligned'}"
        )


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
        helpers = {h.id: qualify_permute(seed) for h in bundle.manifest.helpers if h.id == HELPER_ID}
    info = bundle.manifest.bundle
    return Record(
        schema=SCHEMA,
        bundle=BundleId(info.arch, info.version, bundle.manifest_sha256),
        device=_device_info(index),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        seed=seed,
        tolerance=LIMITS,
        kernels=kernels,
        helpers=helpers,
    ).as_json()


def weights_of(manifest: Manifest, types: TypeConfig) -> list[Weights]:
    """What the kernels of these types multiply by, for ``gemm`` with this bundle: other types may come before them.

    Neighbours differ in as much as they can.
    """
    found = []
    for group in GROUPS:
        fine = group > 0 and group % UNIT_K != 0
        for b in SCALAR_TYPES:
            for zeros in ("none", "float", "int"):
                if manifest.types_for(ProductTypes(types.a, b, zeros, fine)) == types:
                    found.append(Weights(b, zeros, group))
    return found


def cases_for(types: TypeConfig, weights: Sequence[Weights], tokens: int, number: int) -> list[Case]:
    """The products of the schedule of this number among those of its types, whose tile has so many tokens.

    M is around multiples of the tile's tokens. What goes with what shifts from one schedule to the next.
    """
    rows = sorted({1, max(1, tokens - 1), tokens, tokens + 1, _most_rows(tokens)})
    cases = []
    for i in range(CASES):
        epilogue = EPILOGUES[i % len(EPILOGUES)]
        n, k = SHAPES[(i + i // len(SHAPES) + 3 * number) % len(SHAPES)]
        cases.append(
            Case(
                m=rows[(i + i // len(EPILOGUES) + 2 * number) % len(rows)],
                n=-(-n // 16) * 16 if epilogue.swiglu else n,
                k=k,
                weights=weights[(i + number) % len(weights)],
                bias=i // len(EPILOGUES) % 2 == 1,
                aligned=(i // 2 + number) % 2 == 0,
                channel=epilogue.channel,
                token=epilogue.token,
                swiglu=epilogue.swiglu,
                out={"a": types.a, "other": OTHER[types.a]}.get(epilogue.out, epilogue.out),
            )
        )
    return cases


def _most_rows(tokens: int) -> int:
    return 2 * tokens + ROWS_BEYOND


def _run_all(bundle: Bundle, seed: int, progress: Callable[[int, int, str], None] | None) -> dict[str, KernelResult]:
    manifest = bundle.manifest
    rows = max(_most_rows(k.tile.tokens) for k in manifest.kernels)
    results: dict[str, dict[str, ScheduleResult]] = {k.id: {} for k in manifest.kernels}
    done, total = 0, sum(len(manifest.schedules_for(types)) for types in manifest.types)
    for types in manifest.types:
        data, weights = _Data(types, rows, seed), weights_of(manifest, types)
        for number, schedule in enumerate(manifest.schedules_for(types)):
            if progress is not None:
                progress(done, total, f"{types.name} {schedule.name}")
            done += 1
            kernel = manifest.kernel_for(types, schedule.name)
            cases = cases_for(types, weights, kernel.tile.tokens, number)
            results[kernel.id][schedule.name] = _run_schedule(data, schedule.name, cases)
    if progress is not None:
        progress(done, total, "done")
    return {kernel: KernelResult(schedules) for kernel, schedules in results.items()}


def _run_schedule(data: _Data, schedule: str, cases: Sequence[Case]) -> ScheduleResult:
    worst: dict[str, float] = {}
    largest, worst_case = -1.0, cases[0]
    deterministic = guards_intact = True
    failures = []
    for case in cases:
        try:
            outcome = run_case(data.operands(case), case, schedule)
        except Exception as error:  # collected, so that one failure hides no other
            failures.append(describe(case, error))
            continue
        deterministic &= outcome.deterministic
        guards_intact &= outcome.guards_intact
        value = math.inf if outcome.error is None else outcome.error
        worst[case.out] = max(worst.get(case.out, 0.0), value)
        if value > largest:
            largest, worst_case = value, case
    return ScheduleResult(
        worst_errors={out: worst[out] if worst[out] < math.inf else None for out in OUTPUTS if out in worst},
        worst_case=str(worst_case),
        cases=len(cases),
        deterministic=deterministic,
        guards_intact=guards_intact,
        failures=tuple(failures),
    )


def run_case(operands: Operands, case: Case, schedule: str | None) -> Outcome:
    """One product, twice, each time into a freshly poisoned buffer."""
    first, second = (_product(operands, case, schedule) for _ in range(2))
    left, right = MARGINS[case.aligned]
    inner = (slice(MARGIN_ROWS, -MARGIN_ROWS), slice(left, -right))
    error = rounded_error(first[inner], _expected(operands, case)) if bool(first[inner].isfinite().all()) else None
    bits = first.view(BITS[first.element_size()])
    deterministic = torch.equal(bits, second.view(bits.dtype))
    margins = bits.clone()
    margins[inner] = POISON[bits.element_size()]
    return Outcome(error, deterministic, bool((margins == POISON[bits.element_size()]).all()))


def _product(operands: Operands, case: Case, schedule: str | None) -> torch.Tensor:
    """The poisoned buffer [M + margins, columns + margins] with the product in its middle."""
    left, right = MARGINS[case.aligned]
    dtype = OUT_DTYPES[case.out]
    shape = (case.m + 2 * MARGIN_ROWS, left + case.columns + right)
    bits = torch.full(shape, POISON[dtype.itemsize], dtype=BITS[dtype.itemsize], device=operands.a.device)
    buffer = bits.view(dtype)
    gemm(
        operands.a[: case.m],
        operands.b,
        scalar_type(case.weights.b),
        b_scales=operands.scales,
        b_zeros=operands.zeros,
        b_group_size=case.weights.group,
        out=buffer[MARGIN_ROWS:-MARGIN_ROWS, left:-right],
        schedule=schedule,
        out_dtype=dtype,
        **_after(operands, case),
    )
    return buffer


def _expected(operands: Operands, case: Case) -> torch.Tensor:
    return reference.epilogue(operands.sums[: case.m], out_dtype=torch.float32, **_after(operands, case))


def _after(operands: Operands, case: Case) -> dict[str, Any]:
    """The arguments that say what becomes of the sums."""
    return {
        "bias": operands.bias if case.bias else None,
        "channel_scales": operands.channel_scales if case.channel else None,
        "token_scales": operands.token_scales[: case.m] if case.token else None,
        "activation": "swiglu" if case.swiglu else None,
    }


@dataclass(frozen=True)
class Operands:
    """Data of one (N, K, Weights). ``a`` has as many rows as any case takes; ``sums`` is the product in fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor
    channel_scales: torch.Tensor
    token_scales: torch.Tensor
    sums: torch.Tensor


class _Data:
    """The operands of one kernel's types, made when first asked for."""

    def __init__(self, types: TypeConfig, rows: int, seed: int) -> None:
        self.types = types
        self._rows, self._seed = rows, seed
        self._made: dict[tuple[int, int, Weights], Operands] = {}

    def operands(self, case: Case) -> Operands:
        key = (case.n, case.k, case.weights)
        if key not in self._made:
            seed = random.Random(f"{self._seed} {self.types.name} {key}").getrandbits(63)
            generator = torch.Generator("cuda").manual_seed(seed)
            self._made[key] = make_operands(self.types.a, *key, self._rows, generator)
        return self._made[key]


def make_operands(a_name: str, n: int, k: int, weights: Weights, rows: int, generator: torch.Generator) -> Operands:
    """Random operands on the generator's device: every code, scales over many binades with some negative and zero.

    Where zeros are floating the reference rounds code * scale, and the kernels, in one fused multiply-add, do not. For
    any scales these two differ by more than the tolerance: by 2.7e-3 to 3.8e-3 in bf16. So 7 of 8 columns have scales
    of so few bits that the products are exact, and both ways agree; the others, blocks of gate and up together, have
    any scales, but smaller ones, so that these differences do not fill the norm.
    """
    b_type, dtype, device = scalar_type(weights.b), A_DTYPES[a_name], generator.device
    groups = 1 if weights.group == -1 else -(-k // weights.group)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    w_q = torch.randint(
        -(2**31), 2**31, (-(-k // b_type.per_int32), n), dtype=torch.int32, generator=generator, device=device
    )
    b = prepack_b(w_q, b_type, dtype, k=k)
    # Each weight has its own range, or rows of small scales would vanish in the norm. 8-bit codes are 16 times larger.
    # In any range the largest gate * up, about 36,000, is a number of fp16.
    centre = -12 + 5 * uniform(1) - (b_type.bits - 4)
    scales = torch.exp2(centre + 4 * uniform(groups, n) - 2)
    if weights.zeros == "float":
        exact = _shortened(scales, SIGNIFICANT_BITS[a_name] - b_type.bits)
        blocks = torch.arange(n, device=device) // 16 + (8 * uniform(1)).long()
        scales = torch.where(blocks % 8 == 0, scales / 8, exact)
    scales = torch.where(uniform(groups, n) < 1 / 16, -scales, scales)
    scales = torch.where(uniform(groups, n) < 1 / 64, 0.0, scales).to(dtype)
    steps = (uniform(groups, n) * (1 << b_type.bits)).floor()
    zeros = None
    if weights.zeros == "int":
        zeros = steps.to(torch.uint8)
    elif weights.zeros == "float":
        zeros = (scales.float() * steps).to(dtype)
    a = normal(rows, k).to(dtype)
    bias = (normal(n) * scales.float().std() * k**0.5).to(dtype)
    channel_scales, token_scales = (torch.exp2(1.5 * uniform(size) - 1) for size in (n, rows))
    channel_scales = torch.where(uniform(n) < 1 / 16, -channel_scales, channel_scales)
    sums = reference.gemm(a, b, b_type, scales, zeros, weights.group, out_dtype=torch.float32)
    return Operands(a, b, scales, zeros, bias, channel_scales, token_scales, sums)


def _shortened(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Positive values rounded to so many significant bits, at least one."""
    ulp = torch.exp2(values.log2().floor() - max(bits - 1, 0))
    if bits < 2:
        return ulp
    return (values / ulp).round() * ulp


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
