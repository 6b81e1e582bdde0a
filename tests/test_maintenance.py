# SPDX-License-Identifier: Apache-2.0
"""The maintainers' commands of the pipeline: plan, diff, shards and merge."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from build_kernels import __main__ as commands
from build_kernels import catalogue, catalogue_page, diff, paths, plan, shards
from build_kernels import release as release_module
from build_kernels.__main__ import main
from build_kernels.check import Report, check_kernels
from build_kernels.compile import compile_kernels
from build_kernels.configs import ImplConfig, Specialization
from build_kernels.errors import BuildError, ToolchainError
from build_kernels.heuristic import fitted_to
from build_kernels.pack import Product, Release, served, write_bundle
from build_kernels.release import release
from build_kernels.shards import Shard, merge_shards, write_shard
from build_kernels.toolchain import find_tools
from machete_aot.config import ScheduleConfig
from machete_aot.errors import BundleError
from machete_aot.frames import manifest_text
from machete_aot.manifest import Heuristic
from machete_aot.manifest_rules import SCHEMA
from small_bundle import SCHEDULES, TYPES, cubin_like, products, rewritten, small_bundle
from small_bundle import release as small_release

TINY = paths.ROOT / "tests" / "tiny_kernel"
KERNELS = tuple(sorted(ImplConfig(TYPES, SCHEDULES).specializations, key=lambda k: k.id))

# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "1/2/3", "-1/2", "a/b", "01/2"])
def test_what_names_no_shard(text: str) -> None:
    with pytest.raises(ValueError, match="is not I/N"):
        shards.parse_shard(text)
    with pytest.raises(SystemExit) as caught:
        main(["build", f"--shard={text}"])
    assert caught.value.code == 2


@pytest.mark.parametrize("count", [1, 2, 3, 7, 48])
def test_shards_divide_the_catalogue(count: int) -> None:
    kernels = catalogue.specializations()
    parts = [Shard(i, count).choose(kernels[::-1]) for i in range(1, count + 1)]
    assert sorted(k.id for part in parts for k in part) == [k.id for k in kernels]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts[0][0] == kernels[0] and parts[-1][0] == kernels[count - 1]
    with pytest.raises(BuildError, match="at most 4"):
        Shard(1, 5).choose(KERNELS)


def test_shard_and_only_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", "--shard", "1/2", "--only", "flat"])
    assert caught.value.code == 2


def test_a_shard_that_fails_leaves_no_listing(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "BUILD", folders[0])
    monkeypatch.setattr(commands.abi, "header_is_current", lambda: False)
    assert main(["--shard", "2/2"]) == 1
    assert (folders[0] / "shard-1-of-2.json").is_file()
    assert main(["build", "--shard", "1/2"]) == 1
    assert not (folders[0] / "shard-1-of-2.json").exists()


def write_files(folder: Path, kernels: tuple[Specialization, ...]) -> None:
    """Something like what compiling leaves."""
    folder.mkdir(exist_ok=True)
    for kernel in kernels:
        (folder / f"{kernel.id}.cubin").write_bytes(cubin_like(KERNELS.index(kernel)))
        (folder / f"{kernel.id}.log").write_text(f"log of {kernel.id}\n")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two shards in two folders."""
    found = []
    for i in (1, 2):
        shard, folder = Shard(i, 2), tmp_path / f"machine-{i}"
        write_files(folder, shard.choose(KERNELS))
        assert write_shard(shard, shard.choose(KERNELS), folder) == folder / f"shard-{i}-of-2.json"
        found.append(folder)
    return found


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    return folder


def problems_of(folders: list[Path], target: Path) -> list[str]:
    with pytest.raises(BuildError) as caught:
        merge_shards(folders, KERNELS, target)
    assert list(target.iterdir()) == []
    return list(caught.value.problems) or [str(caught.value)]


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_merging_brings_all_files_together(folders: list[Path], target: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "whole", KERNELS)
    merge_shards(folders, KERNELS, target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_one_folder_may_hold_all_shards_and_a_shard_may_be_there_twice(folders: list[Path], target: Path) -> None:
    shutil.copytree(folders[1], folders[0], dirs_exist_ok=True)
    (folders[1] / f"{KERNELS[1].id}.log").write_text("another Compile time\n")
    write_shard(Shard(2, 2), Shard(2, 2).choose(KERNELS), folders[1])
    merge_shards(folders, KERNELS, target)
    assert len(list(target.iterdir())) == 2 * len(KERNELS)


def test_a_missing_shard(folders: list[Path], target: Path) -> None:
    assert problems_of(folders[:1], target) == ["shard 2 of 2 is missing"]
    assert problems_of(folders[1:], target) == ["shard 1 of 2 is missing"]
    (folders[0] / "shard-1-of-2.json").unlink()
    assert "no shard-I-of-N.json in" in problems_of(folders, target)[0]


def test_shards_of_several_divisions(folders: list[Path], target: Path) -> None:
    write_shard(Shard(1, 3), Shard(1, 2).choose(KERNELS), folders[0])
    assert problems_of(folders, target) == ["shards of 2 and of 3 are mixed; remove the files of one division"]
    shards.forget_shard(Shard(1, 2), folders[0])
    assert list(folders[0].glob("shard*")) == []
    shards.forget_shard(Shard(1, 2), folders[1])
    assert [p.name for p in folders[1].glob("shard*")] == ["shard-2-of-2.json"]


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("source_digest", "0" * 64, "other sources, 0000"),
        ("toolchain", {"nvcc": "12.4.131", "ptxas": "12.4.131", "cutlass": "4.2.0", "flags": []}, "another toolchain"),
    ],
)
def test_shards_of_other_origin(folders: list[Path], target: Path, field: str, value: object, word: str) -> None:
    edit(folders[1] / "shard-2-of-2.json", lambda d: d.update({field: value}))
    (problem,) = problems_of(folders, target)
    assert "shard-2-of-2.json" in problem and word in problem


def test_a_kernel_with_two_digests(folders: list[Path], target: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(folders[0], again)
    kernels = Shard(1, 2).choose(KERNELS)
    (again / f"{kernels[0].id}.cubin").write_bytes(cubin_like(99))
    write_shard(Shard(1, 2), kernels, again)
    (problem,) = problems_of([*folders, again], target)
    assert problem.startswith(f"{kernels[0].id}.cubin: there are different ones")


def test_files_that_are_not_what_is_listed(folders: list[Path], target: Path) -> None:
    first, second = Shard(1, 2).choose(KERNELS)
    (folders[0] / f"{first.id}.cubin").write_bytes(b"\x7fELF")
    (folders[0] / f"{second.id}.log").unlink()
    found = problems_of(folders, target)
    assert len(found) == 2
    assert any(f"{first.id}.cubin: not the file that shard-1-of-2.json lists" in p for p in found)
    assert any(f"{second.id}.log: missing, though" in p for p in found)


def test_kernels_beside_the_catalogue(folders: list[Path], target: Path) -> None:
    with pytest.raises(BuildError) as caught:
        merge_shards(folders, KERNELS[1:], target)
    assert f"{KERNELS[0].id}.cubin: not of the catalogue" in caught.value.problems
    gone = f"{KERNELS[1].id}.cubin"
    edit(folders[1] / "shard-2-of-2.json", lambda d: d["files"].pop(gone))
    assert problems_of(folders, target) == [f"{gone}: in no shard"]


@pytest.mark.parametrize("damage", ["{", "{}", "schema", "number"])
def test_a_damaged_listing(folders: list[Path], target: Path, damage: str) -> None:
    path = folders[0] / "shard-1-of-2.json"
    if damage.startswith("{"):
        path.write_text(damage)
    else:
        edit(path, lambda d: d.update(schema=9) if damage == "schema" else d["shard"].update(number=2))
    with pytest.raises(BuildError, match="is damaged; build the shard again"):
        merge_shards(folders, KERNELS, target)
    assert main(["merge", *map(str, folders)]) == 1


def test_two_shards_make_the_bundle_of_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles two kernels and the helper through the command line, as one build and as two shards on two machines."""
    try:
        find_tools()
    except ToolchainError as e:
        pytest.skip(str(e))
    kernels = tuple(Specialization(types, KERNELS[-1].tile, (1,)) for types in TYPES)
    monkeypatch.setattr(release_module, "specializations", lambda: kernels)
    monkeypatch.setattr(release_module, "typed_schedules", lambda: tuple((t, SCHEDULES[0]) for t in TYPES))
    monkeypatch.setattr(commands, "specializations", lambda: kernels)

    def compile_here(chosen: tuple[Specialization, ...], *, jobs: int | None) -> None:
        compile_kernels(chosen, commands.BUILD, jobs=jobs, quiet=True)

    def check(chosen: tuple[Specialization, ...], folder: Path | None = None, *, jobs: int) -> dict[str, Report]:
        return check_kernels(chosen, folder or commands.BUILD, jobs)

    def release_beside(reports: dict[str, Report], folder: Path, *, allow_unfitted: bool) -> Path:
        return release(reports, folder, allow_unfitted=allow_unfitted, data=data, manifests=data)

    monkeypatch.setattr(commands, "compile_kernels", compile_here)
    monkeypatch.setattr(commands, "check_kernels", check)
    monkeypatch.setattr(commands, "release", release_beside)
    monkeypatch.setattr(catalogue_page, "write_page", lambda bundle: data / "page")
    content = {}
    for name, build, arguments in (
        ("whole", "whole", ["--jobs", "1"]),
        ("none", "first", ["--shard", "1/2", "--jobs", "1"]),
        ("none", "second", ["--shard", "2/2", "--jobs", "1"]),
        ("merged", "none", ["merge", str(tmp_path / "first"), str(tmp_path / "second")]),
    ):
        data = tmp_path / f"data-{name}"
        monkeypatch.setattr(commands, "BUILD", tmp_path / build)
        assert main([*arguments, "--allow-unfitted"]) == 0
        content[name] = {p.name: p.read_bytes() for p in data.glob("*")}
    assert [len(list((tmp_path / f).glob("*.cubin"))) for f in ("whole", "first", "second")] == [3, 2, 1]
    assert content["none"] == {} and len(content["whole"]) == 3
    assert content["merged"] == content["whole"]


# ---------------------------------------------------------------- plan


def test_estimates() -> None:
    kernels = catalogue.specializations()[:10]
    outdated = frozenset(k.id for k in kernels[:6])
    found = plan.Plan(kernels, outdated)
    assert found.seconds(1) == pytest.approx(6 * plan.SECONDS_PER_KERNEL)
    assert found.seconds(3) == pytest.approx(2 * plan.SECONDS_PER_KERNEL)
    assert found.seconds(100) == pytest.approx(plan.SECONDS_PER_KERNEL)
    assert plan.Plan(kernels, frozenset()).seconds(4) == 0


def test_the_table_of_a_plan() -> None:
    head, *lines = plan.table(KERNELS, ImplConfig(TYPES, SCHEDULES).typed_schedules).splitlines()
    assert head.split() == ["kernel", "threads", "shared", "memory", "schedules"]
    assert [line.split()[0] for line in lines] == [k.id for k in KERNELS]
    stream = KERNELS[[k.tile.family for k in KERNELS].index("stream")]
    (line,) = [text for text in lines if text.startswith(stream.id)]
    one, two = (stream.tile.shared_memory(split, stream.types) for split in (1, 2))
    assert line.split()[1:] == ["352", f"{two:,}", "x1", "x2"]
    assert two > one


def test_a_plan_follows_what_was_built(tmp_path: Path) -> None:
    try:
        tools = find_tools()
    except ToolchainError as e:
        pytest.skip(str(e))
    headers, out, templates = tmp_path / "headers", tmp_path / "out", tmp_path / "templates"
    headers.mkdir()
    shutil.copy(paths.KERNELS / "gemm_params.h", headers)
    shutil.copytree(TINY, templates)
    kernels = [Specialization(types, KERNELS[-1].tile, (1,)) for types in TYPES]

    def outdated() -> set[str]:
        files = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        found = plan.make_plan(kernels, tools, out, includes=[headers], templates=templates)
        assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == files
        return set(found.outdated)

    both = {k.id for k in kernels}
    assert outdated() == both
    compile_kernels(kernels[:1], out, jobs=1, includes=[headers], templates=templates, quiet=True)
    assert outdated() == {kernels[1].id}
    cubin = out / f"{kernels[0].id}.cubin"
    shutil.copy(cubin, tmp_path)
    cubin.unlink()
    assert outdated() == both
    shutil.move(tmp_path / cubin.name, cubin)
    os.utime(cubin)
    assert outdated() == {kernels[1].id}
    with (templates / "kernel.cu.j2").open("a") as f:
        f.write("// changed\n")
    assert outdated() == both
    shutil.copy(TINY / "kernel.cu.j2", templates)
    assert outdated() == {kernels[1].id}
    with (headers / "gemm_params.h").open("a") as f:
        f.write("// changed\n")
    assert outdated() == both
    compile_kernels(kernels, out, jobs=1, includes=[headers], templates=templates, quiet=True)
    assert outdated() == set()
    (out / ".ninja_log").write_text("damaged")  # ninja drops such a file, so what it was told there is not known
    assert plan.make_plan(kernels, tools, out, includes=[headers], templates=templates).outdated == both


def test_plan_prints_all_and_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = commands._everything()
    found = plan.Plan(kernels, frozenset(k.id for k in kernels[:5]))
    monkeypatch.setattr(commands, "find_tools", lambda: None)
    monkeypatch.setattr(plan, "make_plan", lambda chosen, tools: dataclasses.replace(found, kernels=chosen))
    monkeypatch.setattr(commands, "compile_kernels", lambda *_, **__: pytest.fail("compiles"))
    assert main(["plan", "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert all(k.id in text for k in kernels)
    assert f"{len(kernels)} kernels, {len(kernels) - 5} up to date" in text and ", 5 to compile" in text
    assert f"about {5 * plan.SECONDS_PER_KERNEL:.0f} s with 1 jobs" in text

    def no_tools() -> None:
        raise ToolchainError("no nvcc here")

    monkeypatch.setattr(commands, "find_tools", no_tools)
    assert main(["plan", "--only", "flat"]) == 0
    text = capsys.readouterr().out
    assert "no nvcc here" in text and ", 0 up to date" in text and "stream" not in text
    assert main(["plan", "--only", "banana"]) == 1


# ---------------------------------------------------------------- diff


def changed_bundle(folder: Path) -> Path:
    """The small bundle without its first kernel and last schedule, with another second kernel, and other data."""
    kept = products()[1:]
    kept[0] = Product(kept[0].kernel, Report(96, 8, 0), cubin_like(50, 900))
    made = fitting(kept, SCHEDULES[:-1])
    (table,) = made.heuristic.tables
    made = dataclasses.replace(made, heuristic=Heuristic(2, (dataclasses.replace(table, bytes_per_us=2e6),)))
    path = folder / "changed.zip"
    path.write_bytes(write_bundle(kept, dataclasses.replace(made, version="0.2.0"))[0])
    return path


def fitting(kept: list[Product], schedules: tuple[ScheduleConfig, ...] = SCHEDULES) -> Release:
    """The small release with coefficients for these kernels alone."""
    made = small_release(schedules)
    return dataclasses.replace(made, heuristic=fitted_to(made.heuristic, served(kept, made.served)))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.zip"
    path.write_bytes(small_bundle()[0])
    return path


def test_what_differs_between_two_bundles(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed_bundle(tmp_path)
    gone, changed = (p.kernel.id for p in products()[:2])
    found = diff.compare(diff.open_named(str(small)), diff.open_named(str(other)), tmp_path)
    assert found.kernels == diff.Changes((), (gone,), (changed,))
    fewer_types = tuple(s.name for s in SCHEDULES if s.tile == products()[0].kernel.tile)
    assert found.schedules == diff.Changes((), (SCHEDULES[-1].name,), fewer_types)
    assert len(found.heuristic.changed) == 1 and found.other == ("bundle",)
    assert not found.identical and found.records == ()
    back = diff.compare(found.new, found.old, tmp_path)
    assert (back.kernels.added, back.schedules.added) == ((gone,), (SCHEDULES[-1].name,))
    text = diff.as_text(found)
    assert f"~ {changed}  registers 90 -> 96, spills 0 -> 8, cubin bytes 700 -> 900, frame bytes" in text
    assert f"- {gone}  registers 90, spills 0, cubin bytes 700, frame bytes" in text
    assert "kernels: 0 added, 1 removed, 1 changed, 2 the same" in text
    assert "no record covers it" in text
    assert main(["diff", str(small), str(other), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["figures"][changed]["new"]["cubin_sha256"] == hashlib.sha256(cubin_like(50, 900)).hexdigest()
    assert document["figures"][gone]["new"] is None
    assert main(["diff", str(small), str(other), "--exit-code"]) == 1
    assert main(["diff", str(small), str(small), "--exit-code"]) == 0
    assert "the manifests are identical" in capsys.readouterr().out


def test_places_in_the_file_are_no_change_of_a_kernel(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "one-less.zip"
    path.write_bytes(write_bundle(products()[:-1], fitting(products()[:-1]))[0])
    found = diff.compare(diff.open_named(str(small)), diff.open_named(str(path)), tmp_path)
    assert found.kernels == diff.Changes((), (products()[-1].kernel.id,), ())
    assert any(
        a.frame != b.frame for a in found.old.manifest.kernels for b in found.new.manifest.kernels if a.id == b.id
    )


def test_records_that_cover_the_new_bundle(small: Path, tmp_path: Path) -> None:
    embedded = diff.open_named("embedded")
    covering = diff.compare(embedded, embedded).records
    assert covering and not diff.compare(embedded, diff.open_named(str(small))).records
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "damaged.json").write_text("{")
    shutil.copy(paths.MANIFESTS / "qualification" / covering[0], folder / "a.json")
    assert diff.compare(embedded, embedded, folder).records == ("a.json",)
    edit(folder / "a.json", lambda d: d["kernels"].popitem())
    assert diff.compare(embedded, embedded, folder).records == ()


def test_names_of_bundles(small: Path, tmp_path: Path) -> None:
    digest = diff.open_named("embedded").manifest_sha256
    assert diff.open_named(str(paths.DATA)).manifest_sha256 == digest
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(small, one / "any.zip")
    assert diff.open_named(str(one)).manifest_sha256 == small_bundle()[2]
    shutil.copy(small, one / "other.zip")
    with pytest.raises(BuildError, match="holds 2 bundles"):
        diff.open_named(str(one))
    (one / "pins.json").write_text('{"bundles": [{"file": "other.zip"}]}')
    assert diff.open_named(str(one)).manifest_sha256 == small_bundle()[2]
    (one / "pins.json").write_text('{"bundles": [7]}')
    with pytest.raises(BuildError, match="damaged"):
        diff.open_named(str(one))
    for name in ("no-such-revision:", "--help:"):
        with pytest.raises(BuildError, match=r"git has no|not the name"):
            diff.open_named(name)
    assert main(["diff", str(tmp_path / "missing.zip"), "embedded"]) == 1


def test_a_bundle_of_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = "machete_aot/data/machete-aot-sm90a.zip"
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(small_bundle()[0])
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (tmp_path / file).write_bytes(b"later")
    monkeypatch.setattr(diff, "ROOT", tmp_path)
    monkeypatch.setattr(diff, "DATA", tmp_path / "machete_aot" / "data")
    assert diff.open_named("HEAD:").manifest_sha256 == small_bundle()[2]


def test_a_bundle_of_an_older_schema_is_named_as_such(tmp_path: Path) -> None:
    text = manifest_text(small_bundle()[1]).replace(f'"schema":{SCHEMA}'.encode(), b'"schema":1')
    path = tmp_path / "old.zip"
    path.write_bytes(rewritten(text)[0])
    with pytest.raises(BuildError, match=f"schema 1, where this checkout reads {SCHEMA}"):
        diff.open_named(str(path))


def test_a_damaged_bundle_is_not_compared(small: Path) -> None:
    bundle = diff.open_named(str(small))
    data = bytearray(small.read_bytes())
    data[bundle.manifest.kernels[0].frame.offset] ^= 1
    small.write_bytes(data)
    with pytest.raises(BuildError, match="is damaged") as caught:
        diff.open_named(str(small))
    assert KERNELS[0].id in caught.value.problems[0]
    small.write_bytes(data[:100])
    with pytest.raises(BundleError):
        diff.open_named(str(small))


# ---------------------------------------------------------------- documentation


def test_documented_commands_exist() -> None:
    text = (paths.ROOT / "docs" / "building.md").read_text()
    lines = re.findall(r"^python -m build_kernels ?(.*)$", text, flags=re.M)
    assert len(lines) >= 8
    for line in lines:
        assert callable(commands._parser().parse_args(shlex.split(line)).run)
    table = text.split("| `python -m build_kernels` | |")[1].split("\n\n")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", table, flags=re.M)
    named = {name for cell in first_cells for name in re.findall(r"`([a-z]+)", cell)}
    (group,) = [a for a in commands._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert named == set(group.choices)
    assert f"{plan.SECONDS_PER_KERNEL} core-seconds" in text
