# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels with ninja: .cu -> PTX -> PTX as ptxas wants it -> cubin and the log of ptxas.

For a kernel ``<id>`` the build folder holds <id>.cu, <id>.raw.ptx, <id>.ptx, <id>.cubin and <id>.log. Only what changed
is compiled anew. Cubins do not depend on the folder.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import ninja

from . import ptx
from .errors import BuildError
from .generate import generate
from .helpers import Target
from .paths import BUILD, KERNELS, TEMPLATES
from .toolchain import NVCC_FLAGS, PTXAS_FLAGS, Tools, find_tools

_RULES = """\
ninja_required_version = 1.10
rule ptx
  command = {nvcc} -ptx -MD -MF $out.d -o $out $in
  depfile = $out.d
  deps = gcc
  description = PTX $id
rule finish
  command = {finish} $in $out
  description = finish $id
rule cubin
  command = {ptxas} $in -o $out >$log 2>&1 || {{ cat $log; rm -f $out; exit 1; }}
  description = cubin $id
"""
_KERNEL = """\
build {id}.raw.ptx: ptx {id}.cu
  id = {id}
build {id}.ptx: finish {id}.raw.ptx | {script}
  id = {id}
build {id}.cubin | {id}.log: cubin {id}.ptx
  id = {id}
  log = {id}.log
"""


def compile_kernels(
    kernels: Sequence[Target],
    folder: Path = BUILD,
    *,
    jobs: int | None = None,
    includes: Iterable[Path] = (KERNELS,),
    templates: Path = TEMPLATES,
    defines: Sequence[str] = (),
    quiet: bool = False,
) -> None:
    """Generates and compiles the kernels in ``folder``. Raises BuildError, after every kernel has been tried."""
    tools = find_tools()
    generate(kernels, folder, templates)
    graph = render_graph([k.id for k in kernels], tools, includes, defines)
    path = folder / "build.ninja"
    if not path.is_file() or path.read_text() != graph:
        path.write_text(graph)
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-k", "0"]
    command += [] if jobs is None else ["-j", str(jobs)]
    result = subprocess.run(command, stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if result.returncode:
        missing = [k.id for k in kernels if not (folder / f"{k.id}.cubin").is_file()]
        raise BuildError(f"compiling failed; see the messages above\n{result.stdout or ''}".rstrip(), missing)


def render_graph(ids: Sequence[str], tools: Tools, includes: Iterable[Path], defines: Sequence[str] = ()) -> str:
    """The build.ninja of these kernels. Its tools' paths are part of the commands: another tool compiles all anew."""
    options = [f"-D{name}" for name in defines] + [f"-I{folder}" for folder in (*includes, tools.cutlass)]
    script = str(Path(ptx.__file__))
    rules = _RULES.format(
        nvcc=_command(str(tools.nvcc), *NVCC_FLAGS, *options),
        finish=_command(sys.executable, script),
        ptxas=_command(str(tools.ptxas), *PTXAS_FLAGS),
    )
    return rules + "".join(_KERNEL.format(id=kernel, script=_path(script)) for kernel in ids)


def _command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(text: str) -> str:
    """A path as ninja's build lines want it."""
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
