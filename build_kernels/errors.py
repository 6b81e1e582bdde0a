# SPDX-License-Identifier: Apache-2.0
"""The pipeline's errors; each carries the exit status that `python -m build_kernels` ends with."""

from __future__ import annotations

from collections.abc import Sequence


class BuildError(Exception):
    """A kernel does not compile, fails its checks, or differs. ``problems`` lists everything found."""

    exit_status = 1

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message + "".join(f"\n  - {p}" for p in self.problems))


class ToolchainError(BuildError):
    """A tool is missing or has the wrong version."""

    exit_status = 3
