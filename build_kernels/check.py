# SPDX-License-Identifier: Apache-2.0
"""What every compiled kernel must satisfy before it may enter a bundle."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from machete_aot.abi import PARAMETERS
from machete_aot.config import SHARED_PER_SM, SHARED_RESERVED, WARPGROUP, TileConfig

from .configs import Specialization
from .elf import Cubin, read_cubin
from .errors import BuildError
from .helpers import Helper, Target
from .paths import BUILD
from .toolchain import find_disassembler

ELF_ABI = 7  # of cubins of ptxas 12.x, which drivers from CUDA 12.0 up load; those of 13.x have 8

REGISTERS_PER_SM = 65536
REGISTER_GRANULE = 8  # registers of a thread are allocated in eights
PARTITIONS = 4  # of an SM; each has a quarter of its registers and serves every fourth warp
SHARED_PER_CTA = 227 * 1024

_QUIET_LOG = re.compile(
    r"\d+ bytes gmem"
    r"|Compiling entry function '\S+' for 'sm_90a'"
    r"|Function properties for \S+"
    r"|Used \d+ registers(, \S+ \d+ barriers?)?(, \d+ bytes (smem|cumulative stack size|[cl]mem\S*))*"
    r"|Compile time = \S+ ms"
)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Log:
    """What ``ptxas -v`` said: bytes of stack, spills and static shared memory, and every line that is not routine."""

    stack: int
    spills: int
    static_shared_memory: int
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A kernel that passed, with what the manifest says of it."""

    registers: int
    spills: int
    static_shared_memory: int


def parse_log(text: str) -> Log:
    """Reads the output of ``ptxas -v``. Performance warnings come as "info", so all but known lines are remarks."""
    stack = spills = static = 0
    remarks = []
    for line in filter(None, map(str.strip, text.splitlines())):
        body = re.sub(r"^ptxas info\s*: ", "", line)
        if frame := _FRAME.fullmatch(body):
            stack += int(frame[1])
            spills += int(frame[2]) + int(frame[3])
        elif not _QUIET_LOG.fullmatch(body):
            remarks.append(line)
        elif shared := re.search(r"(\d+) bytes smem", body):
            static += int(shared[1])
    return Log(stack, spills, static, tuple(remarks))


@dataclass(frozen=True)
class Instructions:
    """What the checks look for in a cubin's instructions.

    ``matrix_shapes``: of every HGMMA (wgmma), such as "64x8x16". ``raised``, ``lowered``: registers a thread that
    setmaxnreg asks for and leaves, 0 where a kernel does not use it.
    """

    matrix_shapes: tuple[str, ...]
    raised: int = 0
    lowered: int = 0


def disassemble(cubin: Path) -> Instructions:
    """Reads a cubin with nvdisasm."""
    command = [str(find_disassembler()), "-c", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"nvdisasm cannot read {cubin}: {result.stderr.strip()}")
    return parse_instructions(result.stdout)


def parse_instructions(text: str) -> Instructions:
    """Reads the output of ``nvdisasm -c``."""
    raised = re.findall(r"\bUSETMAXREG\.TRY_ALLOC\S* \S+ (0x[0-9a-f]+)", text)
    lowered = re.findall(r"\bUSETMAXREG\.DEALLOC\S* (0x[0-9a-f]+)", text)
    return Instructions(
        tuple(re.findall(r"\bHGMMA\.(\d+x\d+x\d+)", text)),
        max((int(value, 16) for value in raised), default=0),
        max((int(value, 16) for value in lowered), default=0),
    )


def pool_problems(tile: TileConfig, registers: int, found: Instructions) -> Iterator[str]:
    """Warpgroups that would wait for registers for ever.

    setmaxnreg takes from the pool of registers that the CTA was launched with, ``registers`` for each thread, and not
    from the SM's: what its consumer warpgroups raise and its producer warpgroup keeps must fit into that.
    """
    if not found.raised and not found.lowered:
        return
    groups = tile.threads // WARPGROUP
    wanted, pool = (groups - 1) * found.raised + found.lowered, groups * registers
    if wanted > pool:
        yield (
            f"setmaxnreg: {groups - 1} x {found.raised} + {found.lowered} = {wanted} registers, but the CTA starts "
            f"with {groups} x {registers} = {pool}: it would wait for ever"
        )


def register_limit(threads: int, ctas_per_sm: int) -> int:
    """The most registers a thread can have if that many CTAs are to be resident on an SM."""
    warps = -(-threads // 32)
    warps_of_partition = -(-warps * ctas_per_sm // PARTITIONS)
    granules = REGISTERS_PER_SM // PARTITIONS // (32 * warps_of_partition) // REGISTER_GRANULE
    return min(granules * REGISTER_GRANULE, 255)


def shared_memory_problems(kernel: Specialization, static: int = 0) -> Iterator[str]:
    """Splits whose shared memory exceeds what a CTA, or ``ctas_per_sm`` of them, can have."""
    tile = kernel.tile
    for split in kernel.splits:
        if split not in tile.splits(kernel.types):
            yield f"split {split} is not among the tile's splits {tile.splits(kernel.types)}"
        used = tile.shared_memory(split, kernel.types) + static
        if used > SHARED_PER_CTA:
            yield f"split {split} needs {used} bytes of shared memory, limit {SHARED_PER_CTA}"
        resident = tile.ctas_per_sm * (used + SHARED_RESERVED)
        if resident > SHARED_PER_SM:
            yield f"split {split}: {tile.ctas_per_sm} CTAs an SM need {resident} bytes of it, limit {SHARED_PER_SM}"


def check_kernel(kernel: Target, folder: Path = BUILD) -> tuple[Report, list[str]]:
    """Checks ``<id>.cubin`` and ``<id>.log`` in ``folder``; the list holds every problem found."""
    path = folder / f"{kernel.id}.cubin"
    log = parse_log((folder / f"{kernel.id}.log").read_text())
    try:
        cubin = read_cubin(path.read_bytes())
    except ValueError as e:
        return Report(0, 0, 0), [str(e)]
    if isinstance(kernel, Helper):
        limits = kernel.threads, kernel.ctas_per_sm
        problems = [*_log_problems(log), *_cubin_problems(kernel.symbol, kernel.parameters, *limits, cubin)]
    else:
        limits = kernel.tile.threads, kernel.tile.ctas_per_sm
        problems = [
            *_log_problems(log),
            *_cubin_problems(kernel.symbol, PARAMETERS, *limits, cubin),
            *_instruction_problems(kernel, cubin.registers, disassemble(path)),
            *shared_memory_problems(kernel, log.static_shared_memory),
        ]
    return Report(cubin.registers, log.spills, log.static_shared_memory), problems


def check_kernels(
    kernels: Sequence[Target], folder: Path = BUILD, jobs: int | None = None, *, lenient: bool = False
) -> dict[str, Report]:
    """The report of each kernel by id. Raises BuildError that lists every problem of every kernel.

    ``lenient``: for kernels whose speed does not matter, problems are printed only.
    """
    missing = [k.id for k in kernels if not (folder / f"{k.id}.cubin").is_file()]
    if missing:
        raise BuildError(f"not compiled in {folder}; run `python -m build_kernels` first", missing)
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda k: check_kernel(k, folder), kernels))
    problems = [f"{k.id}: {p}" for k, (_, found) in zip(kernels, results, strict=True) for p in found]
    if problems and not lenient:
        raise BuildError("kernels fail their checks", problems)
    for problem in problems:
        print(problem)
    return {k.id: report for k, (report, _) in zip(kernels, results, strict=True)}


def _log_problems(log: Log) -> Iterator[str]:
    if log.stack or log.spills:
        yield f"stack frame of {log.stack} bytes, {log.spills} bytes of spills"
    for remark in log.remarks:
        yield f"ptxas says: {remark}"


def _cubin_problems(
    symbol: str, parameters: tuple[tuple[int, int], ...], threads: int, ctas_per_sm: int, cubin: Cubin
) -> Iterator[str]:
    if cubin.abi != ELF_ABI:
        yield f"ELF ABI {cubin.abi}, wanted {ELF_ABI}"
    if cubin.entries != (symbol,):
        yield f"entries {', '.join(cubin.entries) or 'none'}, wanted {symbol} alone"
        return
    if cubin.parameters != parameters:
        yield f"parameters {cubin.parameters}, wanted {parameters} (machete_aot/abi.py, permute_abi.py)"
    if cubin.max_threads != threads:
        yield f"launch bound of {cubin.max_threads} threads, wanted {threads}"
    if cubin.frame:
        yield f"a stack frame of {cubin.frame} bytes"
    limit = register_limit(threads, ctas_per_sm)
    if not 0 < cubin.registers <= limit:
        yield f"{cubin.registers} registers a thread, limit {limit} for {ctas_per_sm} CTAs per SM"


def _instruction_problems(kernel: Specialization, registers: int, found: Instructions) -> Iterator[str]:
    shapes, wanted = set(found.matrix_shapes), f"64x{kernel.tile.tokens}x16"
    if shapes != {wanted}:
        yield f"HGMMA instructions of shapes {', '.join(sorted(shapes)) or 'none'}, wanted {wanted} alone"
    yield from pool_problems(kernel.tile, registers, found)
