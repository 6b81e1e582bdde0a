# SPDX-License-Identifier: Apache-2.0
"""Which tests run where: those marked ``gpu`` on a Hopper GPU alone, those on the stub driver before a real one is up.

Nothing here asks for a GPU while tests are collected: that would load the driver whose place the stub takes.
"""

from __future__ import annotations

import functools

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not getattr(getattr(item, "function", None), "on_stub_driver", False))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _hopper():
        pytest.skip("needs a GPU of compute capability 9.0")


@functools.cache
def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
