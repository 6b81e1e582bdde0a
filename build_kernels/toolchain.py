# SPDX-License-Identifier: Apache-2.0
"""Finds the compiler, the assembler, the disassembler and the CUTLASS headers, and insists on their versions.

The bundle's digests hold for exactly one toolchain, so another version is an error and not a warning. The assembler is
older than the compiler: drivers before CUDA 13 do not load what ptxas 13 makes, see docs/building.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import ToolchainError

CUDA_VERSION = "13.0.88"  # of nvcc
PTXAS_VERSION = "12.9.86"  # the newest whose cubins have ELF ABI 7, which every driver from CUDA 12.0 up loads
CUTLASS_VERSION = "4.2.0"
NVCC_VARIABLE = "MACHETE_AOT_NVCC"
PTXAS_VARIABLE = "MACHETE_AOT_PTXAS"

NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=compute_90a", "-DNDEBUG")
PTXAS_FLAGS = ("-arch=sm_90a", "-v", "-O3", "--warn-on-spills")
FLAGS = (*NVCC_FLAGS, *(f"-Xptxas={flag}" for flag in PTXAS_FLAGS))  # as the manifest records them

_INSTALL = "pip install -c constraints.txt '.[build]' and pip install -c constraints.txt --no-deps nvidia-cutlass"


@dataclass(frozen=True)
class Tools:
    """A checked toolchain. ``cutlass`` is the headers' folder."""

    nvcc: Path
    ptxas: Path
    cutlass: Path


@cache
def find_tools() -> Tools:
    """The toolchain. nvcc and ptxas are those that MACHETE_AOT_NVCC and MACHETE_AOT_PTXAS name, else the first of the
    right version in the wheels and PATH. Raises ToolchainError.
    """
    nvcc = _find("nvcc", CUDA_VERSION, NVCC_VARIABLE)
    ptxas = _find("ptxas", PTXAS_VERSION, PTXAS_VARIABLE)
    return Tools(nvcc, ptxas, _find_cutlass())


def find_disassembler() -> Path:
    """nvdisasm from its wheel, else from PATH. Any version from 13.0 up reads these cubins. Raises ToolchainError."""
    for path in (*_wheel_binaries("nvdisasm"), shutil.which("nvdisasm")):
        if path:
            return Path(path)
    raise ToolchainError("nvdisasm is needed to check the kernels and was not found; pip install nvidia-cuda-nvdisasm")


def _find(name: str, wanted: str, variable: str) -> Path:
    if chosen := os.environ.get(variable):
        if not Path(chosen).is_file():
            raise ToolchainError(f"{variable} names {chosen}, which is no file; unset it or name {name} {wanted}")
        candidates = [Path(chosen)]
    else:
        on_path = shutil.which(name)
        candidates = [*_wheel_binaries(name), *([Path(on_path)] if on_path else [])]
    versions = {path.absolute(): _version(path) for path in candidates}
    for path, version in versions.items():
        if version == wanted:
            return path
    if not versions:
        raise ToolchainError(f"{name} {wanted} was not found in {variable}, site-packages or PATH; {_INSTALL}")
    found = " and ".join(f"{path} has version {version}" for path, version in versions.items())
    raise ToolchainError(f"{found}, wanted {wanted}; {_INSTALL}, or set {variable}")


def _wheel_binaries(name: str) -> Iterator[Path]:
    """Programs of NVIDIA's wheels, which all install into the namespace package ``nvidia``."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob(f"*/bin/{name}"), reverse=True):
            if not os.access(path, os.X_OK):  # some ways of unpacking a wheel lose the modes of its files
                with contextlib.suppress(OSError):  # not ours to change: asking for its version says what is wrong
                    path.chmod(path.stat().st_mode | 0o111)
            yield path


def _version(tool: Path) -> str:
    """What the program says of itself, or in brackets why it says nothing."""
    try:
        result = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    except OSError as e:
        return f"none ({e.strerror}; is it executable here?)"
    found = re.search(r"\bV(\d+\.\d+\.\d+)", result.stdout)
    return found[1] if found else f"none (exit status {result.returncode}: {result.stderr.strip()[:200]})"


def _find_cutlass() -> Path:
    spec = importlib.util.find_spec("cutlass_library")  # found and not imported: importing it needs the whole package
    if spec is None or spec.origin is None:
        raise ToolchainError(f"the CUTLASS {CUTLASS_VERSION} headers were not found; {_INSTALL}")
    include = Path(spec.origin).parent / "source" / "include"
    header = include / "cutlass" / "version.h"
    text = header.read_text() if header.is_file() else ""
    numbers = [re.search(rf"#define CUTLASS_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    version = ".".join(n[1] for n in numbers if n)
    if version != CUTLASS_VERSION:
        raise ToolchainError(
            f"the CUTLASS headers in {include} have version {version or 'none'}, wanted {CUTLASS_VERSION}; {_INSTALL}"
        )
    return include
