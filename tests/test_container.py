# SPDX-License-Identifier: Apache-2.0
"""The container build, as far as it can be checked without building it: its packages, its files, its stages."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
REQUIREMENTS = (ROOT / "docker" / "requirements.txt").read_text()


def instructions() -> list[str]:
    """The Dockerfile's instructions, without comments, each in one line."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def pins() -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", REQUIREMENTS, flags=re.M))


def lock_container() -> Any:
    if sys.version_info < (3, 11):
        pytest.skip("tools/lock_container.py needs Python 3.11")
    spec = importlib.util.spec_from_file_location("lock_container", ROOT / "tools" / "lock_container.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packages_are_pinned_as_everywhere_else() -> None:
    constraints = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.M))
    assert pins().items() <= constraints.items()


def test_every_package_has_hashes_and_none_is_missing() -> None:
    entries = [e for e in REQUIREMENTS.replace(" \\\n", " ").splitlines() if not e.startswith("#")]
    assert len(entries) == len(pins())
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+( +--hash=sha256:[0-9a-f]{64})+", entry), entry
    tool = lock_container()
    assert pins().keys() >= {*(Requirement(r).name for r in tool.roots()), *tool.ALONE}
    assert not pins().keys() & tool.UNUSED


def test_compiled_packages_have_a_wheel_for_every_architecture() -> None:
    tool = lock_container()
    for_every_python = {"charset-normalizer", "markupsafe", "zstandard"}
    for name in pins():
        expected = 1
        if name in for_every_python:
            expected = len(tool.ARCHITECTURES) * len(tool.PYTHONS)
        elif name == "ninja" or (name.startswith("nvidia-") and name != "nvidia-cutlass"):
            expected = len(tool.ARCHITECTURES)
        assert REQUIREMENTS.split(f"\n{name}==")[1].split("==")[0].count("--hash") == expected, name


def test_the_lock_is_written_sorted() -> None:
    text = lock_container().lock_text({"b==1": {"2", "1"}, "a==1": {"3"}})
    body = [line for line in text.splitlines() if not line.startswith("#")]
    assert body == [
        "a==1 \\",
        "    --hash=sha256:3",
        "b==1 \\",
        "    --hash=sha256:1 \\",
        "    --hash=sha256:2",
    ]


def _in_context(path: str) -> bool:
    """Whether .dockerignore lets a file through: the last pattern that matches it or a folder above it decides."""
    inside = True
    parts = path.split("/")
    candidates = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            names = parts if line.startswith("**/") else candidates
            if any(fnmatch.fnmatchcase(n, pattern) and n.count("/") == pattern.count("/") for n in names):
                inside = line.startswith("!")
    return inside


def test_what_is_copied_exists_and_is_in_the_context() -> None:
    copied = [shlex.split(i)[1:] for i in instructions() if i.startswith("COPY") and "--from=" not in i]
    sources = [word for words in copied for word in words[:-1] if not word.startswith("--")]
    assert sources == ["docker/requirements.txt", "."]
    assert all((ROOT / source).exists() for source in sources)
    needed = [*("docker/requirements.txt", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES")]
    for folder in ("build_kernels", "csrc/kernels", "machete_aot"):
        needed += [p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()]
    needed += [p.relative_to(ROOT).as_posix() for p in (ROOT / "manifests").glob("*.json")]
    for path in needed:
        assert (ROOT / path).is_file()
        assert _in_context(path) == ("__pycache__" not in path), path
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        assert not line.startswith("!") or list(ROOT.glob(line[1:])), line
    assert not any(map(_in_context, (".git/config", ".venv/bin/python", "build/kernels/a.cubin", "docs/a.md")))


def test_stages() -> None:
    steps = instructions()
    stages = [i for i, step in enumerate(steps) if step.startswith("FROM ")]
    assert [steps[i] for i in stages] == [
        "FROM ${BASE_IMAGE} AS base",
        "FROM base AS build",
        "FROM build AS wheel",
        "FROM scratch",
    ]
    assert steps[0].startswith("ARG BASE_IMAGE=")
    assert [s.split()[:2] for s in steps[stages[-1] + 1 :]] == [["COPY", "--from=wheel"]]
    assert steps[stages[1] + 1] == "USER builder" and sum(s.startswith("USER") for s in steps) == 1
    installs = [s for s in steps if "pip install" in s]
    assert installs and all("--require-hashes" in s and "--no-deps" in s for s in installs)
    assert not re.search(r"^ADD |\bcurl\b|\bwget\b|https?:", DOCKERFILE, flags=re.M)
