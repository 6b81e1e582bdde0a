# SPDX-License-Identifier: Apache-2.0
"""load_quantized: a Hugging Face checkpoint of GPTQ, AWQ or compressed-tensors into a model, a layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import ArgumentError, CheckpointError, MacheteError
from ..prepack import A_DTYPES
from .checkpoint import Checkpoint
from .linear import MacheteLinear
from .scheme import QuantizationConfig, Scheme
from .tree import Tree, target_device

# Tensors that old checkpoints have and models compute: nothing is lost without them.
COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


@dataclass(frozen=True)
class Item:
    """What is loaded at a time: a quantised module with the names of its tensors, or one tensor as it is."""

    name: str
    tensors: dict[str, str]  # by the last part of the name
    scheme: Scheme | None = None


def load_quantized(
    model: ModelT,
    checkpoint_dir: str | Path,
    device: torch.device | str | int | None = None,
    progress: bool = True,
    *,
    strict: bool = True,
) -> ModelT:
    """Fills ``model`` from a checkpoint in which linear layers are quantised, and returns it.

    ``model``: of floating linear layers in bfloat16 or float16, such as ``AutoModelForCausalLM.from_config(config,
    dtype=torch.bfloat16)`` makes; on any device, best made under ``parameters_on_meta()``. ``torch.nn.Linear`` modules
    that the checkpoint has quantised, by the rules of its ``config.json``, become ``MacheteLinear``; all other tensors
    are loaded as they are, in the model's dtype. Scales are rounded to the layer's dtype: pass a float16 model to keep
    those of a float16 checkpoint exactly.

    ``device``: where it all goes; None: where the model is, or, from meta, the GPU if there is one. Weights are
    prepacked there. Files are read one after another; beyond the model itself, memory holds about one layer.
    ``progress``: a bar on stderr. ``strict`` False: tensors that the model has no place for are left out.

    Before anything is changed: raises CheckpointError with all missing and unexpected tensors, UnsupportedError for a
    method that is not read, ArgumentError for a model of another dtype. An error later leaves the model half filled.
    """
    target = target_device(model, device)
    config = QuantizationConfig.find(checkpoint_dir)
    checkpoint = Checkpoint.find(checkpoint_dir, target)
    try:
        tree = Tree(model, target)
        items = _plan(model, tree, config, checkpoint, strict)
        with torch.no_grad():
            for item in _in_order(items, checkpoint, progress):
                if item.scheme is None:
                    tree.give(item.name, checkpoint.tensor(item.tensors[""]))
                else:
                    tree.replace(item.name, _quantized(model, item, item.scheme, checkpoint))
    finally:
        checkpoint.close()
    tree.finish()
    return model


def _plan(
    model: torch.nn.Module, tree: Tree, config: QuantizationConfig, checkpoint: Checkpoint, strict: bool
) -> list[Item]:
    """What there is to load. Raises CheckpointError with everything that does not fit."""
    ending = f".{config.marker}"
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted, left = tree.wanted(), set(checkpoint.files)
    items, problems, missing = [], [], []
    for name in sorted(file.removesuffix(ending) for file in checkpoint.files if file.endswith(ending)):
        module = modules.get(name)
        if module is None:
            continue  # its tensors are unexpected
        if not isinstance(module, torch.nn.Linear):
            problems.append(f"{name} is quantised in the checkpoint but is a {type(module).__name__} in the model")
            continue
        kind = type(module).__name__
        if config.excludes(name, kind):
            problems.append(f"{name} is quantised in the checkpoint, but its quantization_config leaves it out")
        if module.weight.dtype not in A_DTYPES.values():
            raise ArgumentError(
                f"{name} is {module.weight.dtype} in the model; make it with dtype=torch.bfloat16 or torch.float16"
            )
        scheme = config.scheme(name, kind)
        missing += [f"{name}.{part}" for part in scheme.needed if f"{name}.{part}" not in left]
        if module.bias is not None and f"{name}.bias" not in left:
            missing.append(f"{name}.bias")
        parts = [part for part in (*scheme.needed, *scheme.optional) if f"{name}.{part}" in left]
        tensors = {part: f"{name}.{part}" for part in parts}
        items.append(Item(name, tensors, scheme))
        left -= set(tensors.values())
        wanted -= {f"{name}.weight", f"{name}.bias"}
    plain = left & wanted
    items += [Item(name, {"": name}) for name in plain]
    covered = {tied for name in plain for tied in tree.ties(name)}
    missing += sorted(wanted - covered)
    unexpected = sorted(name for name in left - wanted if not COMPUTED.search(name)) if strict else []
    if problems or missing or unexpected:
        raise CheckpointError(
            f"the checkpoint in {checkpoint.folder} does not fit the model: {len(missing)} tensors are missing, "
            f"{len(unexpected)} unexpected",
            problems,
            missing=missing,
            unexpected=unexpected,
        )
    return items


def _in_order(items: list[Item], checkpoint: Checkpoint, progress: bool) -> Iterator[Item]:
    """Items file by file, each file closed when no later item needs it; a bar of their bytes."""
    from tqdm.auto import tqdm

    files = {item.name: sorted({checkpoint.files[name] for name in item.tensors.values()}) for item in items}
    sizes = {item.name: sum(checkpoint.nbytes(name) for name in item.tensors.values()) for item in items}
    ordered = sorted(items, key=lambda item: (files[item.name], item.name))
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        for i, item in enumerate(ordered):
            yield item
            bar.update(sizes[item.name])
            following = files[ordered[i + 1].name] if i + 1 < len(ordered) else []
            if following != files[item.name]:
                checkpoint.keep(file for later in ordered[i + 1 :] for file in files[later.name])


def _quantized(model: torch.nn.Module, item: Item, scheme: Scheme, checkpoint: Checkpoint) -> MacheteLinear:
    """The layer of one module's tensors. Errors say which module it was."""
    linear = model.get_submodule(item.name)
    assert isinstance(linear, torch.nn.Linear)
    tensors = {part: checkpoint.tensor(name) for part, name in item.tensors.items()}
    try:
        layer = MacheteLinear.from_weights(scheme.convert(tensors), linear.weight.dtype)
    except MacheteError as error:
        raise CheckpointError(f"{item.name}: {error}") from error
    found, shape = (layer.out_features, layer.in_features), (linear.out_features, linear.in_features)
    if found != shape:
        raise CheckpointError(f"{item.name} is {found} in the checkpoint and {shape} in the model")
    if linear.bias is None and layer.bias is not None and not bool(layer.bias.any()):
        layer.bias = None  # some GPTQ writers store zeros for layers without a bias
    return layer


def replace_hqq(model: ModelT, dtype: torch.dtype | None = None) -> ModelT:
    """Replaces the HQQ layers of a model that the hqq library has loaded or quantised; returns the model.

    An HQQ layer is a module with ``W_q``, ``meta`` and ``bias``. ``dtype``: of the activations; None: that of the
    layer's scales if it is bfloat16 or float16, else bfloat16. Raises CheckpointError, which names the layer,
    also for a model without any.
    """
    replaced = 0
    for name, module in list(model.named_modules()):
        if not (hasattr(module, "W_q") and isinstance(getattr(module, "meta", None), dict)):
            continue
        scale = module.meta["scale"]
        chosen = dtype or (scale.dtype if scale.dtype in A_DTYPES.values() else torch.bfloat16)
        try:
            layer = MacheteLinear.from_hqq(module.W_q.data, module.meta, module.bias, dtype=chosen)
        except MacheteError as error:
            raise CheckpointError(f"{name}: {error}") from error
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        replaced += 1
    if not replaced:
        raise CheckpointError(
            "the model has no HQQ layers, modules with W_q and meta; load or quantise it with the hqq library first"
        )
    return model
