# SPDX-License-Identifier: Apache-2.0
"""Kernels of a bundle that compute no product: in the file, the manifest, the cache, the record, and their building."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from build_kernels import catalogue_page, diff, plan
from build_kernels.check import Report, check_kernel, check_kernels
from build_kernels.compile import compile_kernels
from build_kernels.configs import Specialization
from build_kernels.errors import BuildError, ToolchainError
from build_kernels.generate import render
from build_kernels.helpers import HELPERS
from build_kernels.pack import HelperProduct, write_bundle
from build_kernels.paths import KERNELS
from build_kernels.toolchain import find_tools
from machete_aot import permute_abi, record
from machete_aot.abi import Field
from machete_aot.bundle import Bundle, open_bundle
from machete_aot.cache import Cache, frame_name, manifest_name
from machete_aot.errors import BundleError, MissingError
from machete_aot.frames import manifest_text
from machete_aot.manifest import dump_manifest, parse_manifest
from machete_aot.pinned import parse_pinned
from machete_aot.request import Request, Trust
from small_bundle import SCHEDULES, TYPES, cubin_like, products, release, small_bundle
from test_qualify_record import make_record

(HELPER,) = HELPERS
CUBIN = cubin_like(77, 900)
DATA, FRAME = write_bundle(products(), release(), [HelperProduct(HELPER, Report(32, 0, 16), CUBIN)])
TEXT = manifest_text(FRAME)
MANIFEST = parse_manifest(TEXT)
DIGEST = hashlib.sha256(FRAME).hexdigest()
(INFO,) = MANIFEST.helpers


def opened() -> Bundle:
    return open_bundle(DATA, manifest_sha256=DIGEST)


# ---------------------------------------------------------------- in a bundle


def test_it_lies_behind_the_kernels() -> None:
    with zipfile.ZipFile(io.BytesIO(DATA)) as archive:
        names = archive.namelist()
    assert names == [
        "dictionaries/flat",
        "dictionaries/stream",
        *(f"frames/{k.id}" for k in MANIFEST.kernels),
        f"frames/{HELPER.id}",
        "manifest.json.zst",
    ]
    assert (INFO.id, INFO.symbol, INFO.threads) == (HELPER.id, f"machete_{HELPER.id}", HELPER.threads)
    assert (INFO.registers, INFO.spills, INFO.static_shared_memory) == (32, 0, 16)
    assert MANIFEST.compiled == (*MANIFEST.kernels, INFO)
    bundle = opened()
    assert bundle.cubin(HELPER.id) == CUBIN
    assert bundle.verify() == [] and bundle.to_bytes() == DATA


def test_lookups() -> None:
    assert MANIFEST.named(HELPER.id) is INFO
    assert MANIFEST.named(MANIFEST.kernels[1].id) is MANIFEST.kernels[1]
    with pytest.raises(MissingError, match=f"no kernel '{HELPER.id}'"):
        MANIFEST.kernel(HELPER.id)
    with pytest.raises(MissingError, match=f"no kernel '{HELPER.id}'"):
        parse_manifest(manifest_text(small_bundle()[1])).named(HELPER.id)


def test_a_pinned_manifest_gives_it_without_the_kernels() -> None:
    parts = parse_pinned(TEXT)
    assert parts._parts is not None
    assert parts.named(HELPER.id) == INFO
    assert not {"kernels", "schedules", "heuristic"} & set(vars(parts))
    assert parts == MANIFEST and dump_manifest(parts) == TEXT


def test_damage_is_found() -> None:
    data = bytearray(DATA)
    data[INFO.frame.offset + 9] ^= 1
    bundle = open_bundle(bytes(data), manifest_sha256=DIGEST)
    assert bundle.cubin(MANIFEST.kernels[0].id)
    with pytest.raises(BundleError, match=HELPER.id):
        bundle.cubin(HELPER.id)
    assert any(HELPER.id in str(problem) for problem in bundle.verify())


def test_it_belongs_to_any_choice_of_kernels(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for only, kernels in ((None, MANIFEST.kernels), ([TYPES[0].name], MANIFEST.kernels_for(TYPES[0]))):
        request = Request("sm90a", None, (), Trust((), ()), cache, only)
        wanted = [(d.offset, d.length) for d in MANIFEST.dictionaries]
        wanted += [(f.offset, f.length) for f in (*(k.frame for k in kernels), INFO.frame)]
        assert sorted(request.spans(MANIFEST)) == sorted(wanted)


def test_the_cache_keeps_its_frame_with_the_bundle(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(manifest_name(DIGEST), FRAME)
    frame = DATA[INFO.frame.offset : INFO.frame.offset + INFO.frame.length]
    cache.put(frame_name(INFO.frame.sha256), frame)
    cache.put(frame_name(hashlib.sha256(b"other").hexdigest()), b"other")
    cache.prune(1)
    assert cache.get(frame_name(INFO.frame.sha256), INFO.frame.sha256) == frame
    assert cache.get(frame_name(hashlib.sha256(b"other").hexdigest()), hashlib.sha256(b"other").hexdigest()) is None


def helper(**changes: Any) -> Callable[[Any], None]:
    return lambda document: document["helpers"][0].update(changes)


def twice(document: Any) -> None:
    document["helpers"].append(copy.deepcopy(document["helpers"][0]))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (helper(id="other"), "symbol 'machete_permute_columns_16' is not"),
        (helper(id="bf16__x", symbol="machete_bf16__x"), "id is not a name of lower case words"),
        (helper(id="Other", symbol="machete_Other"), "id is not a name"),
        (helper(id="a" * 101, symbol="machete_" + "a" * 101), "id is not a name"),
        (helper(symbol="machete_other"), "helper 'permute_columns_16': symbol"),
        (helper(threads=0), "threads 0"),
        (helper(threads=1025), "threads 1025"),
        (helper(threads=100), "threads 100 are not whole warps"),
        (helper(registers=0), "registers 0"),
        (helper(registers=256), "registers 256"),
        (helper(spills=-1), "out of range"),
        (helper(static_shared_memory=1 << 20), "out of range"),
        (helper(threads="32"), "expected int, found str"),
        (helper(tile={}), "helpers[0].tile: unknown"),
        (lambda d: d["helpers"][0].pop("cubin"), "helpers[0].cubin: missing"),
        (lambda d: d["helpers"][0]["cubin"].update(sha256="x"), "not a sha256"),
        (lambda d: d["helpers"][0]["frame"].update(length=0), "are empty or outside"),
        (lambda d: d["helpers"][0]["frame"].update(d["kernels"][0]["frame"]), "overlap at byte"),
        (lambda d: d.pop("helpers"), "helpers: missing"),
        (twice, "helper id 'permute_columns_16' occurs twice"),
    ],
)
def test_manifests_that_are_refused(change: Callable[[Any], None], word: str) -> None:
    document = json.loads(TEXT)
    change(document)
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(document).encode())
    assert any(word in problem for problem in caught.value.problems), caught.value.problems


# ---------------------------------------------------------------- the record


def good_record() -> dict[str, Any]:
    result = record.HelperResult(64, (), True, True, ())
    values = make_record()
    values["bundle"]["manifest_sha256"] = DIGEST
    return values | {"helpers": {HELPER.id: json.loads(json.dumps(dataclasses.asdict(result)))}}


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda r: r["helpers"].clear(), f"helper {HELPER.id}: not in the record"),
    "unknown": (lambda r: r["helpers"].update(x=r["helpers"][HELPER.id]), "helper x: not in the manifest"),
    "too few": (lambda r: r["helpers"][HELPER.id].update(cases=3), "3 cases, where 48 are wanted"),
    "wrong": (lambda r: r["helpers"][HELPER.id].update(wrong=["M=1 K=8"]), "wrong M=1 K=8"),
    "not repeatable": (lambda r: r["helpers"][HELPER.id].update(deterministic=False), "two runs differ"),
    "guards": (lambda r: r["helpers"][HELPER.id].update(guards_intact=False), "something beside the output"),
    "raised": (lambda r: r["helpers"][HELPER.id].update(failures=["M=1: error"]), "raised M=1: error"),
    "no field": (lambda r: r["helpers"][HELPER.id].pop("wrong"), "wrong: missing"),
    "old": (lambda r: r.pop("helpers"), "record.helpers: missing"),
}


def test_a_good_record_qualifies() -> None:
    assert record.check_record(good_record(), MANIFEST, DIGEST) == []


@pytest.mark.parametrize("name", TAMPERED)
def test_each_violation_is_found(name: str) -> None:
    tamper, message = TAMPERED[name]
    values = good_record()
    tamper(values)
    (problem,) = record.check_record(values, MANIFEST, DIGEST)
    assert message in problem


# ---------------------------------------------------------------- building


def test_generated_source() -> None:
    text = render(HELPER)
    assert text.startswith("// SPDX-License-Identifier: Apache-2.0\n")
    assert '#include "permute_columns.cuh"\n' in text
    assert f"__launch_bounds__({HELPER.threads}, {HELPER.ctas_per_sm})\n    {HELPER.symbol}(" in text
    (signature,) = re.findall(rf"{HELPER.symbol}\((.*)\) \{{", text)
    assert signature.split(", ") == [f"{f.ctype} {f.name}" for f in permute_abi.FIELDS]
    assert f"  machete::permute_columns({', '.join(f.name for f in permute_abi.FIELDS)});\n" in text


def test_parameters_are_aligned_as_the_compiler_aligns_them() -> None:
    end = 0
    for offset, size in permute_abi.PARAMETERS:
        assert offset == -(-end // size) * size
        end = offset + size
    assert end == permute_abi.SIZE
    values = {f.name: i - 3 if f.code == "q" else i + 1 for i, f in enumerate(permute_abi.FIELDS)}
    assert permute_abi.unpack_params(permute_abi.pack_params(**values)) == values


def test_both_sides_count_columns_in_the_same_pieces() -> None:
    header = (KERNELS / "permute_columns.cuh").read_text()
    assert f"constexpr int PERMUTE_PIECE = {permute_abi.PIECE};" in header


def test_it_compiles_and_passes_its_checks(tmp_path: Path) -> None:
    try:
        tools = find_tools()
    except ToolchainError as e:
        pytest.skip(str(e))
    assert plan.make_plan([HELPER], tools, tmp_path).outdated == {HELPER.id}
    compile_kernels([HELPER], tmp_path, jobs=1, quiet=True)
    assert plan.make_plan([HELPER], tools, tmp_path).outdated == frozenset()
    report = check_kernels([HELPER], tmp_path)[HELPER.id]
    assert 0 < report.registers <= 32 and (report.spills, report.static_shared_memory) == (0, 0)
    more = (*HELPER.fields, Field("more", "int64_t", "q", ""))
    wrong = [
        (dataclasses.replace(HELPER, parameters=HELPER.parameters[:-1]), "parameters"),
        (dataclasses.replace(HELPER, threads=512), "launch bound of 1024 threads, wanted 512"),
        (dataclasses.replace(HELPER, ctas_per_sm=4), "32 registers a thread, limit 16 for 4 CTAs"),
    ]
    for other, word in wrong:
        (problem,) = check_kernel(other, tmp_path)[1]
        assert word in problem
    with pytest.raises(BuildError):  # the device function has no such parameter
        compile_kernels([dataclasses.replace(HELPER, fields=more)], tmp_path, jobs=1, quiet=True)


def test_the_table_of_a_plan_has_it() -> None:
    kernels = [products()[0].kernel, HELPER]
    lines = plan.table(kernels, [(TYPES[0], SCHEDULES[0])]).splitlines()
    assert lines[-1].split() == [HELPER.id, str(HELPER.threads)]
    assert isinstance(kernels[0], Specialization) and lines[-2].split()[0] == kernels[0].id


def test_the_page_of_the_catalogue_has_it() -> None:
    text = catalogue_page.render_page(opened())
    assert f"| `{HELPER.id}` | {HELPER.threads} | 32 | {INFO.frame.length:,} | {len(CUBIN):,} |\n" in text
    assert f"| frames | {sum(c.frame.length for c in MANIFEST.compiled):,} |" in text
    assert "; helpers: 1." in text


def test_a_difference_names_it(tmp_path: Path) -> None:
    path, plain = tmp_path / "with.zip", tmp_path / "without.zip"
    path.write_bytes(DATA)
    plain.write_bytes(small_bundle()[0])
    found = diff.compare(diff.open_named(str(plain)), diff.open_named(str(path)), tmp_path)
    assert found.kernels == diff.Changes((HELPER.id,), (), ()) and found.other == ()
    assert f"+ {HELPER.id}  registers 32, spills 0, cubin bytes 900" in diff.as_text(found)
