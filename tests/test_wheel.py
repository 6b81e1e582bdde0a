# SPDX-License-Identifier: Apache-2.0
"""Wheels: with the loader for one platform, or, where it cannot be compiled, for any."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from machete_aot import loader
from test_repository import ROOT, load_tool

LIBRARY = "machete_aot/native/libmachete_loader.so"
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "THIRD_PARTY_NOTICES")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a wheel is built from, without the bundle."""
    target = tmp_path / "tree"
    for folder in ("machete_aot", "csrc/loader"):
        leave = shutil.ignore_patterns("__pycache__", "native", "*.zip")
        shutil.copytree(ROOT / folder, target / folder, ignore=leave)
    for name in (*FILES, "csrc/kernels/gemm_params.h", "tools/build_loader.py"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def build(tree: Path, hook: str = "build_wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"from setuptools import build_meta; build_meta.{hook}('dist')"
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "MACHETE_AOT_WHEEL_PLATFORM")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**kept, **environment}, capture_output=True, text=True
    )


def wheel_of(tree: Path) -> Path:
    (found,) = (tree / "dist").glob("*.whl")
    return found


def test_a_wheel_for_this_machine_has_the_loader(tree: Path, tmp_path: Path) -> None:
    done = build(tree)
    assert done.returncode == 0, done.stderr
    wheel = wheel_of(tree)
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        loader.Loader(archive.extract(LIBRARY, tmp_path))
        assert LIBRARY in archive.read(next(n for n in archive.namelist() if n.endswith("/RECORD"))).decode()
        text = archive.read(next(n for n in archive.namelist() if n.endswith("/WHEEL"))).decode()
    assert "Root-Is-Purelib: false" in text


def test_without_a_compiler_the_wheel_is_pure(tree: Path) -> None:
    done = build(tree, CC="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "launches will go through cuda-bindings" in done.stderr + done.stdout
    wheel = wheel_of(tree)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY not in archive.namelist()


def test_without_its_sources_the_wheel_is_pure(tree: Path) -> None:
    shutil.rmtree(tree / "csrc")
    assert build(tree).returncode == 0
    assert wheel_of(tree).name.endswith("-py3-none-any.whl")
    assert "this tree has no csrc/loader" in build(tree, MACHETE_AOT_WHEEL_PLATFORM="manylinux_2_17_x86_64").stderr


def test_a_wheel_for_a_platform_has_the_loader_or_is_not_made(tree: Path) -> None:
    assert "is no platform such as" in build(tree, MACHETE_AOT_WHEEL_PLATFORM="win_amd64").stderr
    platform = "manylinux_2_17_aarch64"
    done = build(tree, MACHETE_AOT_WHEEL_PLATFORM=platform)
    if importlib.util.find_spec("ziglang") is None:
        assert done.returncode and "pip install ziglang" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    wheel = wheel_of(tree)
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(LIBRARY)
    assert (data[:4], int.from_bytes(data[18:20], "little")) == (b"\x7fELF", 183)  # EM_AARCH64
    versions = {tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_([0-9.]+)", data)}
    assert versions and max(versions) <= (2, 17)


def test_the_source_archive_has_what_a_wheel_is_made_of(tree: Path, tmp_path: Path) -> None:
    done = build(tree, "build_sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert build(folder).returncode == 0
    assert not wheel_of(folder).name.endswith("-any.whl")


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("build_loader")
    output = tmp_path / "new" / "loader.so"
    assert tool.main(["--output", str(output)]) == 0
    loader.Loader(output)
    monkeypatch.setenv("CC", "/nonexistent")
    assert tool.main(["--output", str(output)]) == 3
    monkeypatch.setenv("CC", "false")
    assert tool.main(["--output", str(output)]) == 1
    assert "no C compiler" in capfd.readouterr().err


def test_the_platforms_of_a_release() -> None:
    tool = load_tool("build_loader")
    assert {p.rsplit("_", 1)[0] for p in tool.PLATFORMS} == {"manylinux_2_17_x86", "manylinux_2_17"}
    assert tool.IN_PACKAGE.as_posix() == LIBRARY
    assert loader.IN_PACKAGE.as_posix().endswith(LIBRARY)
