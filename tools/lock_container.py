# SPDX-License-Identifier: Apache-2.0
"""Writes docker/requirements.txt, the container's packages with their hashes: ``python tools/lock_container.py``.

The versions are those of constraints.txt. The hashes are of every wheel that pip would choose on the architectures and
Python versions below; pip reads them from the package index's pages and downloads no CUDA wheel. A wheel from anywhere
but the public index is an error, because its hash need not hold elsewhere: run with PIP_CONFIG_FILE=/dev/null where pip
is configured to use other indexes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
LOCK = ROOT / "docker" / "requirements.txt"

ARCHITECTURES = ("x86_64", "aarch64")
PYTHONS = ("3.11", "3.12", "3.13")
MANYLINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17", "manylinux2014")
INDEX_FILES = "https://files.pythonhosted.org/"

UNUSED = {"torch", "cuda-bindings"}  # run-time dependencies that building kernels does not need
ALONE = ("nvidia-cutlass", "setuptools")  # without dependencies; the wheel is built with setuptools

_HEADER = """\
# Written by tools/lock_container.py from constraints.txt. Everything that the container installs with pip:
# CPython {pythons}, Linux on {architectures}.
"""


def roots() -> list[str]:
    """Requirements of pyproject.toml whose dependencies are followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = (*project["dependencies"], *project["optional-dependencies"]["build"])
    return [r for r in wanted if r.split(">")[0] not in UNUSED]


def hashes() -> dict[str, set[str]]:
    """The sha256 of every wheel that may be installed, by ``name==version``."""
    found: dict[str, set[str]] = defaultdict(set)
    for architecture in ARCHITECTURES:
        for python in PYTHONS:
            for item in (*_report(architecture, python, roots()), *_report(architecture, python, ALONE, "--no-deps")):
                metadata, source = item["metadata"], item["download_info"]
                if not source["url"].startswith(INDEX_FILES):
                    sys.exit(
                        f"{source['url']} is not from {INDEX_FILES}; set PIP_CONFIG_FILE=/dev/null and no PIP_ index"
                    )
                name = metadata["name"].lower().replace("_", "-").replace(".", "-")
                found[f"{name}=={metadata['version']}"].add(source["archive_info"]["hashes"]["sha256"])
    return found


def lock_text(found: Mapping[str, Iterable[str]]) -> str:
    """The requirements file, sorted by name and hash."""
    entries = [" \\\n    ".join([pin, *(f"--hash=sha256:{h}" for h in sorted(found[pin]))]) for pin in sorted(found)]
    header = _HEADER.format(pythons=", ".join(PYTHONS), architectures=" and ".join(ARCHITECTURES))
    return header + "\n".join(entries) + "\n"


def _report(architecture: str, python: str, requirements: Iterable[str], *options: str) -> list[dict[str, Any]]:
    """What pip would install, as the entries of its installation report."""
    platforms = [f"--platform={tag}_{architecture}" for tag in MANYLINUX]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        where = [f"--target={folder}/target", f"--report={report}", f"--constraint={CONSTRAINTS}"]
        wheels = ["--only-binary=:all:", f"--python-version={python}", *platforms]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, *where, *wheels, *options, *requirements], check=True)
        entries: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return entries


def main() -> None:
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.write_text(lock_text(hashes()))
    print(f"wrote {LOCK}")


if __name__ == "__main__":
    main()
