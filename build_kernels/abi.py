# SPDX-License-Identifier: Apache-2.0
"""Writes csrc/kernels/gemm_params.h, the C form of the parameter block that machete_aot/abi.py defines."""

from __future__ import annotations

from pathlib import Path

from machete_aot import abi

from .paths import KERNELS

HEADER = KERNELS / "gemm_params.h"

_TEMPLATE = """\
// SPDX-License-Identifier: Apache-2.0
// The parameter block of every kernel. Written by `python -m build_kernels abi` from machete_aot/abi.py: edit that.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum {{ MACHETE_ABI_VERSION = {version} }};

enum {{
{flags}
}};

typedef struct GemmParams {{
{fields}
}} GemmParams;

#ifdef __cplusplus
#define MACHETE_ABI_ASSERT(condition) static_assert(condition, #condition)
#else
#define MACHETE_ABI_ASSERT(condition) _Static_assert(condition, #condition)
#endif
MACHETE_ABI_ASSERT(sizeof(GemmParams) == {size});
{asserts}
#undef MACHETE_ABI_ASSERT
"""


def flags() -> dict[str, int]:
    """The FLAG_ constants of machete_aot.abi, by value."""
    found = {name: value for name, value in vars(abi).items() if name.startswith("FLAG_")}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def render_header() -> str:
    """The text of gemm_params.h."""
    fields = [f"  {f.ctype} {f.name};" for f in abi.FIELDS]
    width = max(map(len, fields))
    return _TEMPLATE.format(
        version=abi.ABI_VERSION,
        flags="\n".join(f"  {name} = {value}," for name, value in flags().items()),
        fields="\n".join(f"{line:<{width}}  // {f.doc}" for line, f in zip(fields, abi.FIELDS, strict=True)),
        size=abi.SIZE,
        asserts="\n".join(
            f"MACHETE_ABI_ASSERT(offsetof(GemmParams, {name}) == {offset});" for name, offset in abi.OFFSETS.items()
        ),
    )


def header_is_current(path: Path = HEADER) -> bool:
    """Whether the header on disk is what ``render_header`` gives."""
    return path.is_file() and path.read_text() == render_header()


def write_header(path: Path = HEADER) -> None:
    """Writes the header; leaves a current one alone, so that nothing is rebuilt for it."""
    if not header_is_current(path):
        path.write_text(render_header())
