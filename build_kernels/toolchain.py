# SPDX-License-Identifier: Apache-2.0
"""Finds the compiler, the disassembler and the CUTLASS headers, and insists on their versions.

The bundle's digests hold for exactly one toolchain, so another version is an error and not a warning.
"""

from __future__ import annotations

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

CUDA_VERSION = "13.0.88"
CUTLASS_VERSION = "4.2.0"
NVCC_VARIABLE = "MACHETE_AOT_NVCC"

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
    """The toolchain: nvcc from MACHETE_AOT_NVCC, else the wheel, else PATH. Raises ToolchainError."""
    nvcc = _find_nvcc()
    ptxas = nvcc.with_name("ptxas")
    if not ptxas.is_file():
        raise ToolchainError(f"no ptxas beside {nvcc}; {_INSTALL}")
    for tool in (nvcc, ptxas):
        _check_version(tool)
    return Tools(nvcc, ptxas, _find_cutlass())


def find_disassembler() -> Path:
    """nvdisasm from its wheel, else from PATH. Any version from 13.0 up reads these cubins. Raises ToolchainError."""
    for path in (*_wheel_binaries("nvdisasm"), shutil.which("nvdisasm")):
        if path:
            return Path(path)
    raise ToolchainError("nvdisasm is needed to check the kernels and was not found; pip install nvidia-cuda-nvdisasm")


def _find_nvcc() -> Path:
    if chosen := os.environ.get(NVCC_VARIABLE):
        if not Path(chosen).is_file():
            raise ToolchainError(f"{NVCC_VARIABLE} names {chosen}, which is no file; unset it or name an nvcc")
        return Path(chosen).absolute()
    for path in (*_wheel_binaries("nvcc"), shutil.which("nvcc")):
        if path:
            return Path(path).absolute()
    raise ToolchainError(f"nvcc {CUDA_VERSION} was not found in {NVCC_VARIABLE}, site-packages or PATH; {_INSTALL}")


def _wheel_binaries(name: str) -> Iterator[Path]:
    """Programs of NVIDIA's wheels, which all install into the namespace package ``nvidia``."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from (p for p in sorted(Path(folder).glob(f"*/bin/{name}"), reverse=True) if os.access(p, os.X_OK))


def _check_version(tool: Path) -> None:
    result = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\bV(\d+\.\d+\.\d+)", result.stdout)
    version = found[1] if found else f"none (exit status {result.returncode}: {result.stderr.strip()[:200]})"
    if version != CUDA_VERSION:
        raise ToolchainError(f"{tool} has version {version}, wanted {CUDA_VERSION}; {_INSTALL}, or set {NVCC_VARIABLE}")


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
