# SPDX-License-Identifier: Apache-2.0
"""What a first product needs whatever its size, done when weights are made for it on a GPU: while they are loaded.

That is the bundle, its dictionaries, the kernels and costs of the weights' types, the driver and the loader. Nothing
here fails: what goes wrong is met again by the product, whose error it is.
"""

from __future__ import annotations

import logging
import os

import torch

from . import driver, fetch, loader, selection
from .config import ProductTypes
from .scalar_type import ScalarType

_log = logging.getLogger(__name__)
_done: set[tuple[int, str, str]] = set()


def prepare(weights: torch.Tensor, b_type: ScalarType, a: str) -> None:
    """Makes ready for products of such weights with activations ``a``, where they lie on a GPU. Once for each kind.

    Not where the bundle may have to be downloaded.
    """
    if not weights.is_cuda or torch.compiler.is_compiling():
        return
    key = weights.get_device(), b_type.name, a
    if key in _done:
        return
    _done.add(key)
    try:
        _prepare(*key)
    except Exception as error:
        _log.debug("nothing was made ready for products of %s: %s", b_type.name, error)


def _prepare(index: int, b_name: str, a: str) -> None:
    if not fetch.default_is_at_hand():
        return
    bundle = fetch.default_bundle()
    for dictionary in bundle.manifest.dictionaries:
        _ = bundle.dictionary(dictionary)
    device = driver.device(index)
    _ = device.context
    loader.active()
    types = bundle.manifest.types_for(ProductTypes(a, b_name, "none", False))
    if types is not None:
        _ = bundle.manifest.schedules
        selection.table_for(bundle.manifest, device.part, types.name)


os.register_at_fork(after_in_child=_done.clear)
