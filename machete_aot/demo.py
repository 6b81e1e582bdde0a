# SPDX-License-Identifier: Apache-2.0
"""The demonstration: quantises weights of real layers' shapes, prepacks, multiplies, compares, and on a GPU measures.

The error is ||out - ref|| / ||ref||, where ref is the fp64 product with the weights as they were before prepacking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .bundle import Bundle
from .config import TypeConfig
from .driver import device as driver_device
from .errors import DeviceError
from .fetch import default_bundle
from .kernel import check_device
from .part import H100, Part
from .prepack import prepack_b
from .product import A_NAMES, gemm
from .record import TOLERANCE
from .scalar_type import u4b8
from .selection import select

COLD_BYTES = 256 << 20  # weights that a measurement rotates over: several times any Hopper's L2 cache


@dataclass(frozen=True)
class Layer:
    """A linear layer: weights [n, k] of a model, quantised in groups of ``group`` k (-1: one group)."""

    name: str
    n: int
    k: int
    group: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def types(self) -> TypeConfig:
        return TypeConfig(A_NAMES[self.dtype], u4b8.name, A_NAMES[self.dtype])


@dataclass(frozen=True)
class Result:
    """One product of the table. ``seconds`` and ``bytes_per_second`` are None where no GPU measured them."""

    layer: Layer
    m: int
    schedule: str
    error: float
    seconds: float | None
    bytes_per_second: float | None


CPU_LAYERS = (
    Layer("Qwen2.5-0.5B o_proj", 896, 896),
    Layer("Qwen2.5-0.5B gate_up", 9728, 896),
    Layer("Qwen2.5-0.5B down", 896, 4864, group=64),
    Layer("SigLIP-so400m fc1", 4304, 1152, group=-1, dtype=torch.float16),
)
GPU_LAYERS = (
    Layer("Llama-3.1-8B qkv", 6144, 4096),
    Layer("Llama-3.1-8B gate_up", 28672, 4096),
    Layer("Llama-3.1-8B down", 4096, 14336, group=64),
    Layer("Llama-3.1-70B o_proj", 8192, 8192),
    Layer("SigLIP-so400m fc1", 4304, 1152, group=-1, dtype=torch.float16),
)
CPU_TOKENS = (1, 16, 256)
GPU_TOKENS = (1, 16, 64, 256, 2048)


def quantise(weights: torch.Tensor, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds float weights [K, N] to u4b8, symmetric, in groups of ``group`` k (-1: one group over K).

    Returns the codes, int32 [K, N] in 0..15, and the scales, ``dtype`` [ceil(K / group), N].
    """
    k, n = weights.shape
    group = k if group == -1 else group
    groups = -(-k // group)
    scales = torch.empty(groups, n, dtype=dtype, device=weights.device)
    codes = torch.empty(k, n, dtype=torch.int32, device=weights.device)
    for g in range(groups):
        part = weights[g * group : (g + 1) * group]
        scales[g] = part.abs().amax(dim=0).clamp(min=1e-4) / 7
        codes[g * group : (g + 1) * group] = (part / scales[g].float()).round().clamp(-8, 7).int() + 8
    return codes, scales


def pack_gptq(codes: torch.Tensor) -> torch.Tensor:
    """int32 codes [K, N] in 0..15 -> int32 [K / 8, N] in GPTQ order: the lowest four bits hold the lowest k."""
    k, n = codes.shape
    packed = torch.zeros(k // 8, n, dtype=torch.int32, device=codes.device)
    for i in range(8):
        packed |= codes[i::8] << (4 * i)
    return packed


def usable_gpu() -> tuple[torch.device | None, str]:
    """The current GPU if the kernels run there, else None; and why, in words."""
    if not torch.cuda.is_available():
        return None, "torch sees no GPU"
    index = torch.cuda.current_device()
    try:
        check_device(default_bundle().manifest, driver_device(index))
    except DeviceError as error:
        return None, str(error)
    return torch.device("cuda", index), torch.cuda.get_device_name(index)


def run_demo(layers: tuple[Layer, ...] | None = None, tokens: tuple[int, ...] | None = None) -> Iterator[Result]:
    """Yields one result a layer and number of tokens, as each is ready. Random data from a fixed seed.

    Raises whatever ``gemm`` raises.
    """
    device = usable_gpu()[0] or torch.device("cpu")
    on_gpu = device.type == "cuda"
    part = driver_device(device.index).part if on_gpu else H100
    bundle = default_bundle()
    generator = torch.Generator(device).manual_seed(0)
    for layer in layers or (GPU_LAYERS if on_gpu else CPU_LAYERS):
        yield from _run_layer(layer, tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS), bundle, part, generator)


def _run_layer(
    layer: Layer, tokens: tuple[int, ...], bundle: Bundle, part: Part, generator: torch.Generator
) -> Iterator[Result]:
    device, n, k = generator.device, layer.n, layer.k
    codes, scales = quantise(torch.randn(k, n, generator=generator, device=device) / k**0.5, layer.group, layer.dtype)
    packed = prepack_b(pack_gptq(codes), u4b8, a_dtype=layer.dtype)
    repeated = scales.repeat_interleave(k if layer.group == -1 else layer.group, dim=0)[:k]
    dequantised = (codes - 8).to(layer.dtype).mul_(repeated).double()
    for m in tokens:
        a = torch.randn(m, k, generator=generator, device=device).to(layer.dtype)
        out = gemm(a, packed, u4b8, b_scales=scales, b_group_size=layer.group)
        wanted = a.double() @ dequantised
        error = float((out.double() - wanted).norm() / wanted.norm())
        schedule = select(bundle.manifest, layer.types.name, m, n, k, part).name
        seconds = _seconds(a, packed, scales, layer.group) if device.type == "cuda" else None
        moved = sum(t.numel() * t.element_size() for t in (a, packed, scales, out))
        yield Result(layer, m, schedule, error, seconds, moved / seconds if seconds else None)


def _seconds(a: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, group: int) -> float:
    """Seconds of one product, in a CUDA graph that rotates over enough copies of the weights to find none in L2."""
    copies = max(2, -(-COLD_BYTES // (packed.numel() * packed.element_size())))
    weights = [(packed.clone(), scales.clone()) for _ in range(copies)]
    out = gemm(a, packed, u4b8, b_scales=scales, b_group_size=group)

    def call_all() -> None:
        for b, s in weights:
            gemm(a, b, u4b8, b_scales=s, b_group_size=group, out=out)

    call_all()  # loads the kernel, and lets later calls overlap
    torch.cuda.synchronize(a.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_all()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / copies)
    return best


def header() -> str:
    """The table's head line."""
    return (
        f"{'layer':<22}{'M':>6}{'N':>7}{'K':>7}{'group':>7}  {'type':<6}"
        f"{'schedule':<34}{'error':>9}{'time':>11}{'bandwidth':>12}"
    )


def line(result: Result) -> str:
    """One line of the table."""
    r, layer = result, result.layer
    time = "-" if r.seconds is None else f"{r.seconds * 1e6:.1f} us"
    bandwidth = "-" if r.bytes_per_second is None else f"{r.bytes_per_second / 1e12:.2f} TB/s"
    return (
        f"{layer.name:<22}{r.m:>6}{layer.n:>7}{layer.k:>7}{layer.group:>7}  {layer.types.a:<6}"
        f"{r.schedule:<34}{r.error:>9.1e}{time:>11}{bandwidth:>12}"
    )


def facts(result: Result) -> dict[str, str | int | float | bool | None]:
    """The same as plain data for JSON."""
    r, layer = result, result.layer
    return {
        "layer": layer.name,
        "types": layer.types.name,
        "m": r.m,
        "n": layer.n,
        "k": layer.k,
        "group": layer.group,
        "schedule": r.schedule,
        "error": r.error,
        "accurate": is_accurate(r),
        "seconds": r.seconds,
        "bytes_per_second": r.bytes_per_second,
    }


def is_accurate(result: Result) -> bool:
    """Whether the error is within what rounding the output once explains."""
    return result.error <= TOLERANCE[result.layer.types.a]
