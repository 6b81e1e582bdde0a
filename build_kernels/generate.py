# SPDX-License-Identifier: Apache-2.0
"""Renders one .cu per kernel."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jinja2

from .helpers import Helper, Target
from .paths import TEMPLATES

TEMPLATE = "kernel.cu.j2"
HELPER_TEMPLATE = "helper.cu.j2"


def render(kernel: Target, templates: Path = TEMPLATES) -> str:
    """The source of one kernel."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    if isinstance(kernel, Helper):
        return environment.get_template(HELPER_TEMPLATE).render(helper=kernel)
    return environment.get_template(TEMPLATE).render(kernel=kernel, tile=kernel.tile)


def generate(kernels: Iterable[Target], folder: Path, templates: Path = TEMPLATES) -> None:
    """Writes ``<id>.cu`` of each kernel. Unchanged files keep their time stamp, so that nothing is rebuilt."""
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in kernels:
        path, text = folder / f"{kernel.id}.cu", render(kernel, templates)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
