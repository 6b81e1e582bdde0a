# SPDX-License-Identifier: Apache-2.0
"""Adds the loader (csrc/loader), a plain shared library, to the build that pyproject.toml describes.

With MACHETE_AOT_WHEEL_PLATFORM, such as manylinux_2_17_aarch64, a wheel for that platform or none. Without it the wheel
is for this machine, or, where it has no C compiler, a pure one: the package then launches through cuda-bindings.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _tool() -> Any:
    """tools/build_loader.py, or None in a tree that has no sources of the loader."""
    path = ROOT / "tools" / "build_loader.py"
    if not path.is_file() or not (ROOT / "csrc" / "loader").is_dir():
        return None
    spec = importlib.util.spec_from_file_location("build_loader", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
TARGET = os.environ.get("MACHETE_AOT_WHEEL_PLATFORM") or None
if TARGET and not TOOL:
    sys.exit("MACHETE_AOT_WHEEL_PLATFORM is set, and this tree has no csrc/loader to compile")


class BuildWithLoader(build_py):
    """Copies the package, then compiles the loader into the copy, or into this tree if it is installed in place."""

    built: Path | None = None

    def run(self) -> None:
        super().run()
        if TOOL is None:
            return
        output = (ROOT if self.editable_mode else Path(self.build_lib)) / TOOL.IN_PACKAGE
        output.unlink(missing_ok=True)  # never one of another platform, or of older sources
        try:
            BuildWithLoader.built = TOOL.build(output, TARGET)
        except Exception as error:  # whatever ails a compiler: the package works without its library
            if TARGET:
                raise
            self.warn(f"the loader was not compiled, and launches will go through cuda-bindings: {error}")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [str(self.built)] if self.built and not self.editable_mode else []
        return [*super().get_outputs(include_bytecode), *own]


class WheelWithLoader(bdist_wheel):
    """Any Python 3, for one platform where the loader is inside."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", TOOL.wheel_platform(TARGET)) if BuildWithLoader.built else tag

    def write_wheelfile(self, *arguments: Any, **options: Any) -> None:
        if BuildWithLoader.built:
            self.root_is_pure = False
        super().write_wheelfile(*arguments, **options)


setup(cmdclass={"build_py": BuildWithLoader, "bdist_wheel": WheelWithLoader})
