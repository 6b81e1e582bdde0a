# SPDX-License-Identifier: Apache-2.0
"""Compiling and checking kernels: small ones (tests/tiny_kernel), each with one fault for the checks to find."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from build_kernels import check, toolchain
from build_kernels.check import (
    ELF_ABI,
    Report,
    check_kernel,
    check_kernels,
    disassemble,
    parse_log,
)
from build_kernels.compile import compile_kernels
from build_kernels.configs import Specialization
from build_kernels.elf import read_cubin
from build_kernels.errors import BuildError, ToolchainError
from build_kernels.paths import KERNELS, ROOT
from build_kernels.ptx import NVCC_PTX_VERSION, PTXAS_PTX_VERSION, lower_version, prune
from machete_aot.abi import PARAMETERS
from machete_aot.config import TileConfig
from small_bundle import TYPES, cubin_like

TINY = ROOT / "tests" / "tiny_kernel"
KERNEL = Specialization(TYPES[0], TileConfig("stream", 1, 2, 1, 2, 8, 8, 2), (1, 2))

# ---------------------------------------------------------------- PTX and logs

_PTX = """\
.version 9.0
.global .align 1 .b8 _ZN34_INTERNAL_330352a4_4_k_cu_1a7443ba5beginE[1];
.global .align 8 .u64 points_to = first;
.global .align 4 .u32 first;
.visible .global .align 4 .u32 used;
.const .align 4 .b8 table[8] = {1, 2, 3, 4, 5, 6, 7, 8};
.visible .entry k(.param .u64 k_param_0) {
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2, [%r3];
  ld.global.u32 %r1, [used];
}
"""


def test_unreferenced_globals_are_dropped() -> None:
    lines = _PTX.splitlines(keepends=True)
    assert prune(_PTX) == "".join([lines[0], lines[4], *lines[6:]])


def test_path_dependent_names_that_stay_are_errors() -> None:
    with pytest.raises(ValueError, match="depends on the source's path"):
        prune(_PTX.replace("[used]", "[_ZN34_INTERNAL_330352a4_4_k_cu_1a7443ba5beginE]"))
    with pytest.raises(ValueError, match="line information"):
        prune(_PTX + '.file 1 "/home/me/k.cu"\n')


def test_the_version_of_the_ptx_is_lowered() -> None:
    lowered = lower_version(_PTX)
    assert lowered == _PTX.replace(".version 9.0\n", ".version 8.8\n") != _PTX
    for wrong, found in (
        (_PTX.replace("9.0", "9.1"), "states version 9.1"),
        (lowered, "states version 8.8"),
        (_PTX.replace(".version", "//"), "states version none"),
        (_PTX + ".version 9.0\n", "states version 9.0 and 9.0"),
    ):
        with pytest.raises(ValueError, match=f"{found}, wanted 9.0 from nvcc"):
            lower_version(wrong)


_LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 52 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compile time = 144.281 ms
"""


def test_logs() -> None:
    assert parse_log(_LOG).remarks == ()
    assert parse_log(_LOG).static_shared_memory == 2048
    spilled = parse_log(
        _LOG.replace("0 bytes stack frame, 0 bytes spill stores, 0", "8 bytes stack frame, 12 bytes spill stores, 30")
    )
    assert (spilled.stack, spilled.spills) == (8, 42)
    serialised = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert parse_log(_LOG + serialised).remarks == (serialised,)
    assert parse_log(_LOG + "ptxas warning : anything").remarks == ("ptxas warning : anything",)


# ---------------------------------------------------------------- compiled kernels


@pytest.fixture(scope="module")
def nvcc() -> Path:
    try:
        return toolchain.find_tools().nvcc
    except ToolchainError as e:
        pytest.skip(str(e))


def compile_tiny(folder: Path, *replacements: tuple[str, str]) -> None:
    """Compiles tests/tiny_kernel as KERNEL, with parts of its source replaced."""
    templates = folder / "templates"
    templates.mkdir(parents=True)
    text = (TINY / "kernel.cu.j2").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (templates / "kernel.cu.j2").write_text(text)
    compile_kernels([KERNEL], folder / "out", templates=templates, quiet=True)


@pytest.fixture(scope="module")
def good(nvcc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    compile_tiny(folder)
    return folder / "out"


def test_a_good_kernel_passes(good: Path) -> None:
    report, problems = check_kernel(KERNEL, good)
    assert problems == []
    cubin = read_cubin((good / f"{KERNEL.id}.cubin").read_bytes())
    assert cubin.entries == (KERNEL.symbol,)
    assert (cubin.abi, cubin.parameters, cubin.max_threads, cubin.frame) == (ELF_ABI, PARAMETERS, 352, 0)
    assert report == Report(cubin.registers, 0, 0)
    assert 8 <= report.registers <= 96
    assert disassemble(good / f"{KERNEL.id}.cubin").matrix_shapes == ("64x8x16",)
    assert check_kernels([KERNEL], good) == {KERNEL.id: report}


def test_the_elf_header_is_what_drivers_from_cuda_12_up_load(good: Path) -> None:
    data = (good / f"{KERNEL.id}.cubin").read_bytes()
    assert (data[7], data[8]) == (0x33, ELF_ABI) == (0x33, 7)


def test_another_elf_abi_is_refused(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "read_cubin", lambda data: replace(read_cubin(data), abi=8))
    assert check_kernel(KERNEL, good)[1] == ["ELF ABI 8, wanted 7"]


def test_the_bytes_of_the_abi_belong_together(good: Path) -> None:
    data = bytearray((good / f"{KERNEL.id}.cubin").read_bytes())
    for os_abi, version in ((0x33, 8), (0x41, 7), (0x33, 6)):
        data[7:9] = os_abi, version
        with pytest.raises(ValueError, match=f"OS ABI {os_abi:#x} and ABI version {version}: not a known pair"):
            read_cubin(bytes(data))
    data[7:9] = 0x41, 8  # as ptxas 13 writes
    assert read_cubin(bytes(data)).abi == 8


def test_the_compiler_states_one_version_of_ptx_and_the_assembler_reads_another(good: Path) -> None:
    for suffix, version in ((".raw.ptx", NVCC_PTX_VERSION), (".ptx", PTXAS_PTX_VERSION)):
        assert f"\n.version {version}\n" in (good / f"{KERNEL.id}{suffix}").read_text()


def test_headers_leave_nothing_behind(good: Path) -> None:
    assert "_INTERNAL_" in (good / f"{KERNEL.id}.raw.ptx").read_text()
    assert "_INTERNAL_" not in (good / f"{KERNEL.id}.ptx").read_text()
    assert b"INTERNAL" not in (good / f"{KERNEL.id}.cubin").read_bytes()


def test_cubins_do_not_depend_on_the_folder(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder: with $pecial 'characters'"
    compile_tiny(folder)
    name = f"{KERNEL.id}.cubin"
    assert (folder / "out" / name).read_bytes() == (good / name).read_bytes()


FAULTS = {
    "no wgmma": (("#if 1  // multiply", "#if 0"), "HGMMA instructions of shapes none"),
    "other symbol": (("{{ kernel.symbol }}(", "other("), "entries other, wanted"),
    "second entry": (('extern "C"', 'extern "C" __global__ void second() {}\nextern "C"'), "alone"),
    "other parameters": (("GemmParams params)", "GemmParams params, int more)"), "parameters ("),
    "other bound": (("({{ tile.threads }},", "(256,"), "launch bound of 256 threads"),
    "stack frame": (
        ("// after", "float local[64] = {};\nlocal[params.m & 63] = d[0];\nd[1] += local[params.n & 63];"),
        "stack frame",
    ),
    "serialised": (("// between", "d[0] += 1.0f;"), "ptxas says: ptxas info    : (C75"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(nvcc: Path, tmp_path: Path, fault: str) -> None:
    replacement, word = FAULTS[fault]
    compile_tiny(tmp_path, replacement)
    _, problems = check_kernel(KERNEL, tmp_path / "out")
    assert any(word in p for p in problems), problems
    with pytest.raises(BuildError) as caught:
        check_kernels([KERNEL], tmp_path / "out")
    assert caught.value.problems == tuple(f"{KERNEL.id}: {p}" for p in problems)


def test_used_path_dependent_names_fail_the_build(nvcc: Path, tmp_path: Path) -> None:
    internal = ('extern "C"', 'namespace { __device__ int counter; }\nextern "C"')
    use = ("// after", "if (atomicAdd(&counter, 1)) return;")
    with pytest.raises(BuildError) as caught:
        compile_tiny(tmp_path, internal, use)
    assert "depends on the source's path" in str(caught.value)
    assert caught.value.problems == (KERNEL.id,)


def test_compile_errors_are_shown(nvcc: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="banana"):
        compile_tiny(tmp_path, ("// after", "banana;"))


def test_incremental_rebuilds(nvcc: Path, tmp_path: Path) -> None:
    headers, out = tmp_path / "headers", tmp_path / "out"
    headers.mkdir()
    shutil.copy(KERNELS / "gemm_params.h", headers)

    def build() -> dict[str, int]:
        compile_kernels([KERNEL], out, includes=[headers], templates=TINY, quiet=True)
        return {p.suffix: p.stat().st_mtime_ns for p in out.glob(f"{KERNEL.id}.*") if ".raw" not in p.name}

    first = build()
    assert set(first) == {".cu", ".ptx", ".cubin", ".log"}
    assert build() == first
    with (headers / "gemm_params.h").open("a") as f:
        f.write("// changed\n")
    second = build()
    assert second[".cu"] == first[".cu"]
    assert second[".cubin"] > first[".cubin"]
    (out / f"{KERNEL.id}.log").unlink()
    assert build()[".log"] > second[".log"]


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF" + bytes(200), cubin_like(1)])
def test_what_is_no_cubin(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ELF"):
        read_cubin(data)
