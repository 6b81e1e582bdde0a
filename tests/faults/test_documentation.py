# SPDX-License-Identifier: Apache-2.0
"""docs/distribution.md is true: its commands run as they are written, and its tables are the code's."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from machete_aot import cache, fetch, trust
from machete_aot.errors import CacheError
from run_children import ROOT, environment

PAGE = (ROOT / "docs" / "distribution.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.M | re.S)
TOOLS = ("bash", "openssl", "curl", "base64", "sha256sum", "dd")
missing = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.skipif(bool(missing), reason=f"the page's commands need {', '.join(missing)}")
def test_every_command_runs_as_written(tmp_path: Path, counts: Counter[str]) -> None:
    """In one shell and one empty folder; a command that fails ends it. machete-aot is this checkout's."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, arguments in (("machete-aot", "-m machete_aot.cli"), ("python3", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    assert {kind for kind, _ in BLOCKS} == {"console", "python"}
    for kind, text in BLOCKS:
        if kind == "python":
            (folder / text.split()[1]).write_text(text)  # named in its first line
    script = "".join(text for kind, text in BLOCKS if kind == "console")
    stop = "trap 'for job in $(jobs -p); do kill $job; done' EXIT\n"
    variables = {"PATH": os.pathsep.join([str(programs), os.environ["PATH"]]), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", stop + script],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "kernels are right" in done.stdout
    assert (folder / "mirror" / "index.json").is_file()
    counts["documented command blocks"] += len(BLOCKS)


def test_documented_statuses_are_those_of_the_command_line() -> None:
    output = importlib.import_module("machete_aot.cli_output")
    rows = re.findall(r"^\| (\d) \| [^|]* \| (.*) \|$", PAGE, flags=re.M)
    documented = {name: int(status) for status, names in rows for name in re.findall(r"\w+Error", names)}
    exact = {kind.__name__: status for kind, status in output.EXIT_CODES}
    assert documented == {**exact, "MacheteError": output.OTHER, "CacheError": output.exit_code(CacheError("full"))}


def test_documented_variables_are_those_that_are_read() -> None:
    documented = set(re.findall(r"^\| `(MACHETE_AOT_\w+)`", PAGE, flags=re.M))
    read = {fetch.SOURCE_VARIABLE, fetch.PATH_VARIABLE, fetch.OFFLINE_VARIABLE}
    assert documented == {*read, cache.CACHE_VARIABLE, trust.KEYS_VARIABLE}
