# SPDX-License-Identifier: Apache-2.0
"""The bundle in the package: intact, pinned, built from the sources in this tree, and qualified on a GPU."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from build_kernels import catalogue_page
from build_kernels.catalogue import schedules, specializations
from build_kernels.check import ELF_ABI
from build_kernels.elf import read_cubin
from build_kernels.errors import BuildError, ToolchainError
from build_kernels.helpers import HELPERS
from build_kernels.pack import COMPUTE_CAPABILITY, MIN_DRIVER
from build_kernels.paths import MANIFESTS
from build_kernels.release import manifest_path, toolchain
from build_kernels.reproduce import reproduce
from build_kernels.sources import source_digest
from build_kernels.toolchain import find_tools
from machete_aot.bundle import Bundle
from machete_aot.bundle_data import MemoryData
from machete_aot.fetch import fetch_bundle, pins
from machete_aot.frames import manifest_text
from machete_aot.manifest import Compat, dump_manifest
from machete_aot.record import check_record
from machete_aot.version import __version__

SAMPLE = int(os.environ.get("MACHETE_AOT_REPRODUCE_SAMPLE", "2"))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MACHETE_AOT_SOURCE", raising=False)
        return fetch_bundle("sm90a")


def test_every_byte_is_intact(bundle: Bundle) -> None:
    assert bundle.verify() == []


def test_the_pin_the_copy_in_manifests_and_the_bundle_agree(bundle: Bundle) -> None:
    copy = manifest_path().read_bytes()
    assert manifest_text(bundle.manifest_bytes) == dump_manifest(bundle.manifest) == copy
    digest = hashlib.sha256(bundle.manifest_bytes).hexdigest()
    assert [p.manifest_sha256 for p in pins() if p.arch == "sm90a"] == [digest]
    assert bundle.manifest.bundle.version == __version__


def test_it_was_built_from_these_sources(bundle: Bundle) -> None:
    assert bundle.manifest.provenance.source_digest == source_digest(), "run `python -m build_kernels`"
    assert bundle.manifest.toolchain == toolchain()
    assert [k.id for k in bundle.manifest.kernels] == [k.id for k in specializations()]
    assert [h.id for h in bundle.manifest.helpers] == [h.id for h in HELPERS]
    assert [s.name for s in bundle.manifest.schedules] == [s.name for s in schedules()]


def test_the_cubins_have_the_elf_abi_that_the_manifest_states(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert {read_cubin(bundle.cubin(k.id)).abi for k in manifest.compiled} == {manifest.compat.elf_abi}
    assert manifest.compat == Compat(COMPUTE_CAPABILITY, MIN_DRIVER, ELF_ABI), "run `python -m build_kernels`"


def test_kernels_are_without_spills_and_schedules_with_coefficients(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert {k.spills for k in manifest.compiled} == {0}
    assert manifest.heuristic.tables
    for types in manifest.types:
        tables = [table.coefficients.get(types.name, {}) for table in manifest.heuristic.tables]
        assert set().union(*tables) == {s.name for s in manifest.schedules_for(types)}, "built with --allow-unfitted"


def test_the_page_of_the_catalogue_is_current(bundle: Bundle) -> None:
    catalogue_page.check_page(bundle)


def test_the_page_of_the_catalogue_shows_what_the_manifest_says(bundle: Bundle, tmp_path: Path) -> None:
    manifest = bundle.manifest
    text = catalogue_page.render_page(bundle)
    for kernel in manifest.kernels:
        assert f"`{kernel.tile.name}` |" in text and f"{kernel.cubin.size:,} |" in text
    for h in manifest.helpers:
        row = f"| `{h.id}` | {h.threads} | {h.registers} | {h.frame.length:,} | {h.cubin.size:,} |"
        assert row in text.splitlines()
    head: list[str] = []  # of the table that a line is in
    seen = set()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[:1] == ["tile"]:
            head = cells
        if not line.startswith(("| `stream", "| `flat")):
            continue
        name = cells[0].strip("`")
        types = list(dict.fromkeys(cell.split("`")[1] for cell in head if "`" in cell))
        by_id = {k.id: k for k in manifest.kernels}
        kernels = [by_id.get(f"{t}__{name}") for t in types]  # some types lack the tile
        there = [k for k in kernels if k]
        assert there
        if head[1].startswith("frame"):
            pairs = [(f"{k.frame.length:,}", f"{k.cubin.size:,}") if k else ("-", "-") for k in kernels]
            assert cells[1:] == [cell for pair in pairs for cell in pair]
            continue
        seen.update(k.id for k in there)
        for kernel in there:
            endings = [s.name.removeprefix(name) for s in manifest.schedules_of(kernel)]
            shared = max(kernel.tile.shared_memory(s.split, kernel.types) for s in manifest.schedules_of(kernel))
            assert cells[7] == f"{shared:,}" and cells[-1] == " ".join(f"`{e}`" for e in endings)
        assert cells[8:-1] == [str(k.registers) if k else "-" for k in kernels]
    assert seen == {k.id for k in manifest.kernels}
    page = tmp_path / "catalogue.md"
    with pytest.raises(BuildError, match="out of date"):
        catalogue_page.check_page(bundle, page)
    catalogue_page.check_page(bundle, catalogue_page.write_page(bundle, page))
    first = manifest.kernels[0]
    other = replace(manifest, kernels=(replace(first, registers=first.registers + 8), *manifest.kernels[1:]))
    changed = Bundle(MemoryData(bundle.to_bytes()), other, bundle.manifest_bytes, "a test")
    with pytest.raises(BuildError, match="out of date"):
        catalogue_page.check_page(changed, page)


def test_a_sample_compiles_to_the_same_digests(bundle: Bundle) -> None:
    try:
        find_tools()
    except ToolchainError as e:
        pytest.skip(str(e))
    assert len(reproduce(bundle, SAMPLE, seed=int(bundle.manifest_sha256[:8], 16), quiet=True)) == SAMPLE


def test_a_qualification_record_covers_it(bundle: Bundle) -> None:
    def problems_of(path: Path) -> list[str]:
        return check_record(json.loads(path.read_text()), bundle.manifest, bundle.manifest_sha256)

    folder = MANIFESTS / "qualification"
    found = {p.name: problems_of(p) for p in sorted(folder.glob("*.json"))}
    complaints = "\n".join(f"{name}: {problems[:5]}" for name, problems in found.items())
    assert any(not problems for problems in found.values()), (
        f"no record in {folder} covers manifest {bundle.manifest_sha256}; run `machete-aot qualify`\n{complaints}"
    )
