# SPDX-License-Identifier: Apache-2.0
"""The build pipeline but for the compiler: catalogue, generated sources, the ABI header, toolchain, release, CLI."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from build_kernels import abi, catalogue, toolchain
from build_kernels.__main__ import main
from build_kernels.check import (
    Instructions,
    Report,
    parse_instructions,
    pool_problems,
    register_limit,
    shared_memory_problems,
)
from build_kernels.configs import Specialization
from build_kernels.errors import BuildError, ToolchainError
from build_kernels.generate import generate, render
from build_kernels.helpers import HELPERS
from build_kernels.heuristic import fitted_to, read_heuristic
from build_kernels.pack import Product, served, write_bundle
from build_kernels.paths import ROOT
from build_kernels.release import release
from build_kernels.reproduce import choose
from build_kernels.sources import source_digest, source_files
from machete_aot.abi import ABI_VERSION, OFFSETS, SIZE
from machete_aot.bundle import open_bundle
from machete_aot.config import PRODUCTS, ScheduleConfig, TileConfig, TypeConfig
from machete_aot.frames import manifest_text
from machete_aot.manifest import Heuristic, parse_manifest
from machete_aot.selection import COEFFICIENTS
from small_bundle import TYPES, cubin_like, heuristic_table, products
from small_bundle import release as small_release

STREAM = TileConfig("stream", 1, 2, 1, 2, 8, 8, 2)
KERNEL = Specialization(TYPES[0], STREAM, (1, 2))

# ---------------------------------------------------------------- the catalogue


def test_catalogue_ids_are_unique_and_are_c_identifiers() -> None:
    kernels = catalogue.specializations()
    assert len({k.id for k in kernels}) == len(kernels) >= 6 * len(catalogue.TYPES)
    assert [k.id for k in kernels] == sorted(k.id for k in kernels)
    assert all(re.fullmatch(r"machete_[a-z0-9_]+", k.symbol) for k in kernels)


def test_catalogue_schedules_are_unique_and_cover_the_kernels() -> None:
    schedules = catalogue.schedules()
    assert len({s.name for s in schedules}) == len(schedules) >= 6
    assert {k.tile for k in catalogue.specializations()} == {s.tile for s in schedules}


@pytest.mark.parametrize("types", catalogue.TYPES, ids=lambda types: types.name)
def test_every_number_of_tokens_has_a_schedule_without_clusters(types: TypeConfig) -> None:
    """For a device that refuses clusters: the error then says to choose such a schedule."""
    alone = [s.tile for t, s in catalogue.typed_schedules() if t == types and s.split <= 1 and s.tile.cluster == 1]
    assert all(any(tile.suits(m) for tile in alone) for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 4096))


def test_every_product_that_kernels_could_serve_is_in_the_catalogue() -> None:
    wanted = {types for product in PRODUCTS for types in product.kernel_types()}
    assert wanted == set(catalogue.TYPES) == {k.types for k in catalogue.specializations()}
    assert {k.cpp_types for k in catalogue.specializations()} == {
        f"machete::{name}"
        for name in (
            *("Bf16U4b8", "Fp16U4b8", "Bf16U4Float", "Bf16U4Int", "Bf16U8Float", "Bf16U8Int"),
            *("Fp16U4Any", "Fp16U8Any"),
        )
    }


def test_types_that_share_a_tile_keep_their_own_schedules() -> None:
    by_types = {types: {s for t, s in catalogue.typed_schedules() if t == types} for types in catalogue.TYPES}
    tile = TileConfig("stream", 2, 1, 1, 2, 128, 4, 1)
    for types, splits in ((catalogue.SYMMETRIC[0], {1, 2, 4}), (catalogue.GENERAL_4[0], {1, 2})):
        assert {s.split for s in by_types[types] if s.tile == tile} == splits
    for group in (catalogue.SYMMETRIC, catalogue.GENERAL_4, catalogue.GENERAL_8, catalogue.FINE_4, catalogue.FINE_8):
        assert len({frozenset(by_types[types]) for types in group}) == 1
    assert {s for _, s in catalogue.typed_schedules()} == set(catalogue.schedules())


@pytest.mark.parametrize("kernel", catalogue.specializations(), ids=lambda k: k.id)
def test_catalogue_tiles_are_such_as_the_headers_take(kernel: Specialization) -> None:
    """What ring.cuh and flat_gemm.cuh assert, so that it is known before they are compiled."""
    tile = kernel.tile
    assert tile.units * tile.blocks % 2 == 0  # two sets of fragments alternate
    if 0 in kernel.splits:  # a 16-byte vector of each consumer's sums fits into a stage's activations
        assert 32 * 4 * tile.row_warpgroups * 16 <= tile.step_units * tile.tokens * 128


@pytest.mark.parametrize(
    ("types", "unit_bytes", "aux"),
    [
        *(("bf16_u4b8", 2048, 2), ("bf16_u4_float", 2048, 4), ("bf16_u8_int", 4096, 4), ("fp16_u8_any", 4096, 4)),
        *(("bf16_u4_float_fine", 2048, 8), ("fp16_u8_any_fine", 4096, 8)),
    ],
)
def test_storage_of_a_tile(types: str, unit_bytes: int, aux: int) -> None:
    """By hand: 3 stages of 4 units of 128 rows and 16 tokens; ``aux`` bytes a row and unit for scales and zeros."""
    (config,) = (t for t in catalogue.TYPES if t.name == types)
    tile = TileConfig("stream", 2, 1, 1, 4, 16, 3, 2)
    ring = 3 * (4 * 16 * 128 + 4 * 2 * unit_bytes + 4 * 128 * aux)
    assert tile.barriers_at(config) == ring
    assert tile.shared_memory(1, config) == ring + 128  # 7 barriers of 8 bytes, in whole 128
    slab = 16 * 16 * 4
    assert tile.shared_memory(2, config) == ring + 128 + 1 * 4 * slab  # half of 8 slabs from one other worker
    assert tile.shared_memory(4, config) == ring + 128 + 3 * 2 * slab
    text = render(Specialization(config, tile, (1, 4)))
    assert f"/*unit_bytes*/ {unit_bytes}, /*aux_rows*/ {aux // 2}>;" in text
    assert f"shared_memory<Tile>(4) == {tile.shared_memory(4, config)});" in text


@pytest.mark.parametrize("kernel", catalogue.specializations(), ids=lambda k: k.id)
def test_catalogue_shared_memory_is_within_budget(kernel: Specialization) -> None:
    assert list(shared_memory_problems(kernel)) == []


def test_shared_memory_budgets() -> None:
    tile = TileConfig("stream", 2, 1, 1, 2, 64, 4, 2)
    assert any("2 CTAs an SM need" in p for p in shared_memory_problems(Specialization(TYPES[0], tile, (2,))))
    assert list(shared_memory_problems(Specialization(TYPES[0], tile, (1,)))) == []
    assert list(shared_memory_problems(Specialization(TYPES[0], tile, (1,)), static=32 * 1024))
    huge = TileConfig("flat", 2, 1, 1, 2, 256, 4, 1)
    assert any("limit 232448" in p for p in shared_memory_problems(Specialization(TYPES[0], huge, (1,))))
    assert any("not among" in p for p in shared_memory_problems(Specialization(TYPES[0], huge, (2,))))


# threads, CTAs an SM -> what ptxas allows for __launch_bounds__(threads, CTAs)
@pytest.mark.parametrize(
    ("threads", "ctas", "limit"),
    [(320, 2, 96), (320, 1, 168), (192, 2, 168), (576, 1, 96), (384, 1, 168), (128, 1, 255)],
)
def test_register_limit(threads: int, ctas: int, limit: int) -> None:
    assert register_limit(threads, ctas) == limit


# ---------------------------------------------------------------- generated sources


@pytest.mark.parametrize(
    ("warpgroups", "registers", "raised", "lowered", "fits"),
    [
        (2, 168, 224, 56, True),  # 504 of 504
        (2, 168, 232, 56, False),
        (3, 128, 152, 56, True),  # 512 of 512
        (4, 96, 112, 56, False),  # 504 of 480: a kernel that hung on an H100
        (4, 96, 104, 56, True),
        (4, 96, 0, 0, True),  # without setmaxnreg
    ],
)
def test_register_pool(warpgroups: int, registers: int, raised: int, lowered: int, fits: bool) -> None:
    tile = TileConfig("flat", warpgroups, 1, 1, 2, 64, 4, 1)
    found = Instructions(("64x64x16",), raised, lowered)
    assert (list(pool_problems(tile, registers, found)) == []) == fits


def test_a_tile_of_three_row_warpgroups() -> None:
    tile = TileConfig("flat", 3, 1, 1, 2, 128, 4, 1)
    kernel = Specialization(TYPES[0], tile, (1, 0))
    assert (tile.name, tile.rows, tile.threads) == ("flat_192x128x128_r3k1_s4c1", 192, 512)
    assert tile.splits(TYPES[0]) == kernel.splits
    assert list(shared_memory_problems(kernel)) == []
    launched = register_limit(tile.threads, tile.ctas_per_sm)
    for raised, fits in ((152, True), (160, False)):
        assert (list(pool_problems(tile, launched, Instructions(("64x128x16",), raised, 56))) == []) == fits
    text = render(kernel)
    assert "using Tile = machete::FlatTile</*row_warpgroups*/ 3," in text
    for fact in ("Tile::THREADS == 512", "Tile::ROWS == 192", "Tile::STEP_UNITS == 2"):
        assert f"static_assert({fact});\n" in text
    for split in kernel.splits:
        assert (
            f"static_assert(machete::shared_memory<Tile>({split}) == {tile.shared_memory(split, TYPES[0])});\n" in text
        )
    even = ScheduleConfig(tile, 0, 1)
    kernels = [Product(Specialization(types, tile, (0,)), Report(launched, 0, 0), b"cubin") for types in TYPES]
    manifest = parse_manifest(manifest_text(write_bundle(kernels, small_release([even]))[1]))
    assert manifest.kernel_for(TYPES[0], f"{tile.name}_e1").tile == tile


def test_a_tile_of_a_cluster() -> None:
    tile = TileConfig("flat", 2, 1, 1, 2, 128, 5, 1, cluster=2)
    assert (tile.name, tile.rows, tile.row_tiles(257)) == ("flat_128x128x128_r2k1_s5c1m2", 128, 2)
    text = render(Specialization(TYPES[0], tile, (1, 0)))
    assert "/*aux_rows*/ 1, /*cluster*/ 2>;" in text
    alone = replace(tile, cluster=1)
    assert "/*aux_rows*/ 1, /*cluster*/ 1>;" in render(Specialization(TYPES[0], alone, (1, 0)))
    assert alone.name == "flat_128x128x128_r2k1_s5c1"


def test_reading_a_disassembly() -> None:
    text = """
        /*03b0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe0 ;
        /*0400*/                   HGMMA.64x8x16.F32.BF16 R24, R68, gdesc[UR16], R24, gsb0 ;
        /*7bf0*/                   USETMAXREG.DEALLOC.CTAPOOL 0x38 ;
    """
    assert parse_instructions(text) == Instructions(("64x8x16",), 224, 56)


def test_generated_source() -> None:
    text = render(KERNEL)
    assert text.startswith("// SPDX-License-Identifier: Apache-2.0\n")
    assert '#include "stream_gemm.cuh"\n' in text
    assert "using Types = machete::Bf16U4b8;\n" in text
    tile = re.search(r"using Tile = machete::StreamTile<(.*?)>;", text, re.S)
    assert tile and re.findall(r"/\*(\w+)\*/ (\d+)", tile[1]) == [
        *(("row_warpgroups", "1"), ("k_warpgroups", "2"), ("blocks", "1")),
        *(("units", "2"), ("tokens", "8"), ("stages", "8"), ("ctas_per_sm", "2"), ("unit_bytes", "2048")),
        ("aux_rows", "1"),
    ]
    for fact in ("THREADS == 352", "ROWS == 64", "STEP_UNITS == 4"):
        assert f"static_assert(Tile::{fact});\n" in text
    for split in KERNEL.splits:
        assert (
            f"static_assert(machete::shared_memory<Tile>({split}) == {STREAM.shared_memory(split, TYPES[0])});\n"
            in text
        )
    assert f"__launch_bounds__(Tile::THREADS, Tile::CTAS_PER_SM)\n    {KERNEL.symbol}(" in text
    assert "  machete::stream_gemm<Types, Tile>(maps, params);\n" in text


def test_unchanged_sources_are_not_written_again(tmp_path: Path) -> None:
    generate([KERNEL], tmp_path)
    path = tmp_path / f"{KERNEL.id}.cu"
    before = path.stat().st_mtime_ns
    generate([KERNEL], tmp_path)
    assert path.stat().st_mtime_ns == before
    path.write_text("changed")
    generate([KERNEL], tmp_path)
    assert path.read_text() == render(KERNEL)


def test_the_source_digest_follows_every_source(tmp_path: Path) -> None:
    names = source_files()
    for name in (
        *("csrc/kernels/gemm_params.h", "build_kernels/templates/kernel.cu.j2", "machete_aot/config.py"),
        *("csrc/kernels/permute_columns.cuh", "build_kernels/templates/helper.cu.j2", "machete_aot/permute_abi.py"),
    ):
        assert name in names
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    digests = {source_digest(tmp_path)}
    assert digests == {source_digest()}
    for name in names:
        with (tmp_path / name).open("a") as f:
            f.write("\n")
        digests.add(source_digest(tmp_path))
    assert len(digests) == len(names) + 1


# ---------------------------------------------------------------- the ABI header

_PROBE = """
#include <stdio.h>
#include "gemm_params.h"
int main(void) {
  printf("%d %d\\n", MACHETE_ABI_VERSION, (int)sizeof(GemmParams));
  FLAGS
  FIELDS
  return 0;
}
"""


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_compiled_header_agrees_with_python(tmp_path: Path, language: str) -> None:
    fields = "\n".join(f'printf("%d\\n", (int)offsetof(GemmParams, {name}));' for name in OFFSETS)
    flags = "\n".join(f'printf("%d\\n", {name});' for name in abi.flags())
    program = tmp_path / "probe"
    abi.write_header(tmp_path / "gemm_params.h")
    command = ["g++", "-x", language, "-Wall", "-Werror", "-", f"-I{tmp_path}", "-o", str(program)]
    probe = _PROBE.replace("FIELDS", fields).replace("FLAGS", flags)
    subprocess.run(command, input=probe, text=True, check=True)
    first, *rest = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert list(map(int, first.split())) == [ABI_VERSION, SIZE] == [8, 136]
    assert list(map(int, rest)) == [1, 2, 4, 8, 16, 32, 64, 128, 256, *OFFSETS.values()]


def test_the_header_in_the_tree_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert abi.header_is_current()
    assert main(["abi", "--check"]) == 0
    stale = tmp_path / "gemm_params.h"
    assert not abi.header_is_current(stale)
    stale.write_text(abi.render_header().replace("int32_t m;", "int64_t m;"))
    assert not abi.header_is_current(stale)


# ---------------------------------------------------------------- toolchain


@pytest.fixture
def fresh_tools() -> Iterator[None]:
    toolchain.find_tools.cache_clear()
    yield
    toolchain.find_tools.cache_clear()


def test_another_version_of_nvcc_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_tools: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(toolchain.NVCC_VARIABLE, str(fake_tool(tmp_path / "nvcc", "12.4.131")))
    with pytest.raises(ToolchainError, match=r"version 12\.4\.131, wanted 13\.0\.88"):
        toolchain.find_tools()
    assert main(["--only", KERNEL.id]) == 3
    assert "12.4.131" in capsys.readouterr().err


@pytest.mark.parametrize("variable", [toolchain.NVCC_VARIABLE, toolchain.PTXAS_VARIABLE])
def test_a_missing_tool_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_tools: None, variable: str
) -> None:
    own_tools(tmp_path, monkeypatch)
    monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    with pytest.raises(ToolchainError, match=f"{variable} names .*nothing, which is no file"):
        toolchain.find_tools()


def fake_tool(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release 0.0, V{version}\n")
    path.chmod(0o755)
    return path


def own_tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvcc and a ptxas of the right versions, by the variables."""
    nvcc = fake_tool(folder / "own" / "nvcc", toolchain.CUDA_VERSION)
    ptxas = fake_tool(folder / "own" / "ptxas", toolchain.PTXAS_VERSION)
    monkeypatch.setenv(toolchain.NVCC_VARIABLE, str(nvcc))
    monkeypatch.setenv(toolchain.PTXAS_VARIABLE, str(ptxas))


def test_the_variables_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_tools: None) -> None:
    own_tools(tmp_path, monkeypatch)
    tools = toolchain.find_tools()
    assert (tools.nvcc, tools.ptxas) == (tmp_path / "own" / "nvcc", tmp_path / "own" / "ptxas")
    toolchain.find_tools.cache_clear()
    fake_tool(tools.ptxas, toolchain.CUDA_VERSION)  # the assembler that comes with nvcc is not the one
    with pytest.raises(
        ToolchainError, match=r"own/ptxas has version 13\.0\.88, wanted 12\.9\.86; pip .*MACHETE_AOT_PTXAS"
    ):
        toolchain.find_tools()
    tools.ptxas.chmod(0o644)
    with pytest.raises(ToolchainError, match=r"own/ptxas has version none .*executable.*, wanted 12\.9\.86"):
        toolchain.find_tools()


def test_the_assembler_is_found_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_tools: None
) -> None:
    own_tools(tmp_path, monkeypatch)
    monkeypatch.delenv(toolchain.PTXAS_VARIABLE)
    wheels = tmp_path / "site" / "nvidia"
    newer = fake_tool(wheels / "cu13" / "bin" / "ptxas", toolchain.CUDA_VERSION)
    wanted = fake_tool(wheels / "cuda_nvcc" / "bin" / "ptxas", toolchain.PTXAS_VERSION)
    spec = importlib.machinery.ModuleSpec("nvidia", None)
    spec.submodule_search_locations = [str(wheels)]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "nvidia" else find(name))
    monkeypatch.setenv("PATH", str(newer.parent))
    wanted.chmod(0o644)  # as some ways of unpacking a wheel leave it
    assert toolchain.find_tools().ptxas == wanted
    assert os.access(wanted, os.X_OK)
    toolchain.find_tools.cache_clear()
    wanted.unlink()
    with pytest.raises(ToolchainError, match=r"cu13/bin/ptxas has version 13\.0\.88, wanted 12\.9\.86"):
        toolchain.find_tools()
    toolchain.find_tools.cache_clear()
    newer.unlink()
    with pytest.raises(ToolchainError, match=r"ptxas 12\.9\.86 was not found in MACHETE_AOT_PTXAS, .*pip install"):
        toolchain.find_tools()


# ---------------------------------------------------------------- release and command line

SERVED = served(products(), small_release().served)


def fitted(*, without: tuple[str, str] | None = None) -> Heuristic:
    coefficients: dict[str, dict[str, dict[str, float]]] = {}
    for types, schedule in SERVED:
        if (types.name, schedule.name) != without:
            coefficients.setdefault(types.name, {})[schedule.name] = {"fixed_us": 1.0}
    return Heuristic(2, (heuristic_table(coefficients),))


def test_unfitted_schedules_are_listed() -> None:
    assert fitted_to(fitted(), SERVED) == fitted()
    missing = (SERVED[1][0].name, SERVED[1][1].name)
    partial = fitted(without=missing)
    with pytest.raises(BuildError) as caught:
        fitted_to(partial, SERVED)
    assert caught.value.problems == (" ".join(missing),)
    assert fitted_to(partial, SERVED, allow_unfitted=True) == partial
    other: list[tuple[TypeConfig, ScheduleConfig]] = SERVED[:1]
    assert list(fitted_to(fitted(), other).tables[0].coefficients) == [SERVED[0][0].name]
    with pytest.raises(BuildError) as caught:
        fitted_to(Heuristic(2, ()), SERVED)
    assert caught.value.problems == ("any: there is no table",)
    assert fitted_to(Heuristic(2, ()), SERVED, allow_unfitted=True).tables == ()
    one_has_them = Heuristic(2, (*fitted().tables, replace(partial.tables[0], device="other")))
    assert fitted_to(one_has_them, SERVED) == one_has_them
    none_has_it = Heuristic(2, (*partial.tables, replace(partial.tables[0], device="other")))
    with pytest.raises(BuildError) as caught:
        fitted_to(none_has_it, SERVED)
    assert caught.value.problems == (" ".join(missing),)


def test_reading_the_heuristic(tmp_path: Path) -> None:
    path = tmp_path / "heuristic.json"
    assert read_heuristic(path).tables == ()
    table = asdict(heuristic_table({"t": {"s": {name: 1.5 for name in COEFFICIENTS}}}))
    good = {"version": 2, "tables": [table]}
    path.write_text(json.dumps(good))
    assert [asdict(found) for found in read_heuristic(path).tables] == [table]
    unknown = table | {"coefficients": {"t": {"s": {"c": 1.5}}}}
    for wrong, word in (
        ("{", "not JSON"),
        ("{}", "version: missing"),
        (json.dumps(good | {"version": "1"}), "expected int"),
        (json.dumps(good | {"tables": [{}]}), "bytes_per_us: missing"),
        (json.dumps(good | {"tables": [unknown]}), r"t s: coefficients \['c'\], wanted"),
    ):
        path.write_text(wrong)
        with pytest.raises(BuildError, match=f"not valid[^$]*{word}"):
            read_heuristic(path)


def test_release_writes_a_bundle_that_its_pin_opens(tmp_path: Path) -> None:
    kernels = catalogue.specializations()
    for i, kernel in enumerate((*kernels, *HELPERS)):
        (tmp_path / f"{kernel.id}.cubin").write_bytes(cubin_like(i))
    reports = {k.id: Report(40, 0, 0) for k in (*kernels, *HELPERS)}
    data, manifests = tmp_path / "data", tmp_path / "manifests"
    path = release(reports, tmp_path, allow_unfitted=True, data=data, manifests=manifests)
    assert path == data / "machete-aot-sm90a.zip"
    (pin,) = json.loads((data / "pins.json").read_text())["bundles"]
    bundle = open_bundle(data / pin["file"], manifest_sha256=pin["manifest_sha256"])
    assert bundle.verify() == []
    manifest = manifests / f"machete-aot-sm90a-{pin['version']}.json"
    assert manifest.read_bytes() == manifest_text(bundle.manifest_bytes)
    assert hashlib.sha256(bundle.manifest_bytes).hexdigest() == pin["manifest_sha256"]
    assert bundle.manifest.provenance.source_digest == source_digest()
    assert [k.id for k in bundle.manifest.kernels] == [k.id for k in kernels]
    assert [h.id for h in bundle.manifest.helpers] == [h.id for h in HELPERS]
    assert [s.name for s in bundle.manifest.schedules] == [s.name for s in catalogue.schedules()]
    for types in catalogue.TYPES:
        have = {s.name for s in bundle.manifest.schedules_for(types)}  # types may share a tile and divide K otherwise
        assert have == {s.name for t, s in catalogue.typed_schedules() if t == types}
    before = path.read_bytes()
    release(reports, tmp_path, allow_unfitted=True, data=data, manifests=manifests)
    assert path.read_bytes() == before
    assert sorted(p.name for p in data.iterdir()) == ["machete-aot-sm90a.zip", "pins.json"]


def test_samples_follow_the_seed() -> None:
    ids = [str(i) for i in range(50)]
    assert choose(ids, 3, 1) == choose(ids[::-1], 3, 1) != choose(ids, 3, 2)
    assert choose(ids, None, 1) == sorted(ids)
    assert len(choose(ids, 99, 1)) == 50


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no_such_kernel"]) == 1
    assert "matches no kernel" in capsys.readouterr().err
    for wrong in (["--jobs", "0"], ["banana"], ["reproduce", "--all", "--sample", "2"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


def test_help_documents_the_exit_status() -> None:
    command = [sys.executable, "-m", "build_kernels", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for word in ("exit status", "--only", "--jobs", "reproduce", "abi", "MACHETE_AOT_NVCC"):
        assert word in text
