# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/loader into a shared library: ``python tools/build_loader.py [--platform P] [--output FILE]``.

Without a platform it is for this machine, by $CC, cc or gcc. A platform is a wheel's tag, manylinux_<glibc>_<machine>
as in manylinux_2_17_aarch64: the compiler is then that of the PyPI package ziglang, which compiles for any of them on
any machine. ``--wheel DIR`` builds a wheel with the library instead, for each ``--platform``.
Exit status: 0 done, 1 the compiler failed, 2 wrong usage, 3 there is no compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "loader" / "machete_loader.c"
INCLUDES = (ROOT / "csrc" / "loader", ROOT / "csrc" / "kernels")
IN_PACKAGE = Path("machete_aot") / "native" / "libmachete_loader.so"
PLATFORM_VARIABLE = "MACHETE_AOT_WHEEL_PLATFORM"
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux_2_17_aarch64")
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-ffile-prefix-map={root}=.")
_PLATFORM = re.compile(r"manylinux_(\d+)_(\d+)_(x86_64|aarch64)\Z")


class NoCompilerError(Exception):
    """There is no compiler for the wanted platform."""


def compiler(target: str | None) -> list[str]:
    """The command of a C compiler for a platform, or for this machine. Raises NoCompilerError."""
    if target is None:
        named = os.environ.get("CC")
        found = shlex.split(named) if named else [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
        if not found or not shutil.which(found[0]):
            raise NoCompilerError("no C compiler: install gcc or clang, or name one in CC")
        return found
    parts = _PLATFORM.match(target)
    if parts is None:
        raise NoCompilerError(f"{target!r} is no platform such as {PLATFORMS[0]}")
    if importlib.util.find_spec("ziglang") is None:
        raise NoCompilerError(f"{target} is compiled by the package ziglang; pip install ziglang")
    major, minor, machine = parts.groups()
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{major}.{minor}"]


def build(output: Path, target: str | None = None, extra: Sequence[str] = ()) -> Path:
    """Compiles the library. Raises NoCompilerError, and CalledProcessError with the compiler's messages on stderr."""
    output.parent.mkdir(parents=True, exist_ok=True)
    flags = [flag.format(root=ROOT) for flag in FLAGS]
    includes = [f"-I{folder}" for folder in INCLUDES]
    link = ["-shared", "-Wl,-soname,libmachete_loader.so", "-s", "-o", str(output), str(SOURCE), "-ldl"]
    subprocess.run([*compiler(target), *flags, *extra, *includes, *link], check=True)
    return output


def wheel_platform(target: str | None) -> str:
    """The platform tag of a wheel with a library for ``target``."""
    return target or f"linux_{platform.machine()}"


def build_wheels(folder: Path, targets: Sequence[str]) -> None:
    """A wheel for each platform, without build isolation: what it needs must be installed."""
    for target in targets:
        environment = {**os.environ, PLATFORM_VARIABLE: target}
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, env=environment)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--platform", action="append", default=[], metavar="P", help=f"such as {PLATFORMS[0]}")
    parser.add_argument(
        "--output", type=Path, default=ROOT / IN_PACKAGE, help="default: where the package looks for it"
    )
    parser.add_argument("--wheel", type=Path, metavar="DIR", help=f"write wheels; default platforms: {PLATFORMS}")
    options = parser.parse_args(arguments)
    try:
        if options.wheel:
            build_wheels(options.wheel, options.platform or PLATFORMS)
        elif len(options.platform) > 1:
            parser.error("one platform at a time, but for --wheel")
        else:
            print(build(options.output, next(iter(options.platform), None)))
    except NoCompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except subprocess.CalledProcessError as error:
        return 1 if error.returncode else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
