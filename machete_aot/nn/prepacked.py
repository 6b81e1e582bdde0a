# SPDX-License-Identifier: Apache-2.0
"""save_prepacked and load_prepacked: a model with its weights as the kernels read them, in safetensors files.

A folder of ``prepacked-00001.safetensors`` and so on, and the index ``machete.json``, which is written last:

* ``format``, ``format_version``: what this is.
* ``layouts``: names and versions of the prepacked layouts, as in docs/architecture.md.
* ``modules``: by name, what each MacheteLinear is (``MacheteLinear.description``) and its dtype.
* ``merged``, ``gate_up``: what ``fuse`` made, by name.
* ``tensors``: the file of each tensor. ``aliases``: names of tensors that are another's.

The files' own metadata repeat format, version and layouts.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import ahead
from ..errors import CheckpointError
from ..layout import LAYOUTS, layout_for
from ..prepack import A_DTYPES, A_NAMES
from ..publish import publish
from .checkpoint import PREPACKED_INDEX as INDEX
from .checkpoint import Checkpoint, read_json, write_tensors
from .fuse import DOWN, GateUpMLP, attach_merged, merged_parts
from .linear import MacheteLinear, is_permutation
from .tree import Tree, target_device

FORMAT = "machete-aot-prepacked"
FORMAT_VERSION = 1
SHARD_BYTES = 4 << 30

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def save_prepacked(model: torch.nn.Module, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes all parameters and persistent buffers of a model with MacheteLinear layers; returns the index's path.

    ``folder`` is made where it is not there. Files hold about ``shard_bytes`` each. A fused model is saved as it is.
    Raises CheckpointError for a model without such layers, or of which each rank holds a part.
    """
    folder = Path(folder)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MacheteLinear)}
    if not layers:
        raise CheckpointError("the model has no MacheteLinear: nothing is prepacked")
    sharded = [name for name, layer in layers.items() if layer.is_part]
    if sharded:
        raise CheckpointError("these layers hold one rank's part; save the model before parallelize_module", sharded)
    layouts = {layout.name: layout.version for layout in (layout_for(layer.b_type) for layer in layers.values())}
    index: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layouts": layouts,
        "modules": {n: {**layer.description(), "dtype": A_NAMES[layer.scales.dtype]} for n, layer in layers.items()},
        "merged": merged_parts(model),
        "gate_up": [name for name, module in model.named_modules() if isinstance(module, GateUpMLP)],
        "tensors": {},
        "aliases": {},
    }
    metadata = {key: json.dumps(index[key]) for key in ("format", "format_version", "layouts")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # an old index would name files of both
    shard: dict[str, torch.Tensor] = {}
    written = size = 0
    state = _unique_state(model, index["aliases"])
    for name, tensor in state.items():
        shard[name] = tensor
        size += tensor.nbytes
        if size >= shard_bytes:
            written = _write(folder, written, shard, index, metadata)
            size = 0
    _write(folder, written, shard, index, metadata)
    publish(folder / INDEX, json.dumps(index, indent=1).encode())
    return folder / INDEX


def load_prepacked(
    model: ModelT,
    folder: str | Path,
    device: torch.device | str | int | None = None,
    progress: bool = True,
) -> ModelT:
    """Fills ``model``, of the architecture that was saved, from ``save_prepacked``'s folder; returns it.

    ``model``: with floating linear layers, on any device or on meta; those that were saved prepacked are replaced, and
    what was fused is fused. ``device``: as ``load_quantized`` takes it. Raises CheckpointError for another format,
    version or layout than this package's, and with all tensors that are missing or unexpected.
    """
    folder = Path(folder)
    index = _checked_index(folder)
    target = target_device(model, device)
    checkpoint = Checkpoint(folder, index["tensors"], target)
    try:
        for file in sorted(set(index["tensors"].values())):
            _check_metadata(checkpoint, file, index)
        _rebuild(model, index)
        tree = Tree(model, target)
        wanted, held = tree.wanted(), set(index["tensors"]) | set(index["aliases"])
        covered = {tied for name in held & wanted for tied in tree.ties(name)}
        missing, unexpected = sorted(wanted - covered), sorted(held - wanted)
        if missing or unexpected:
            raise CheckpointError(f"{folder} does not fit the model", missing=missing, unexpected=unexpected)
        with torch.no_grad():
            _fill(tree, checkpoint, index["aliases"], progress)
    finally:
        checkpoint.close()
    tree.finish()
    for path, layer in model.named_modules():
        if isinstance(layer, MacheteLinear):
            if layer.perm is not None and not is_permutation(layer.perm):
                raise CheckpointError(f"{path}.perm in {folder} is not a permutation of the layer's inputs")
            ahead.prepare(layer.qweight, layer.b_type, A_NAMES[layer.scales.dtype])
    return model


def _fill(tree: Tree, checkpoint: Checkpoint, aliases: dict[str, str], progress: bool) -> None:
    from tqdm.auto import tqdm

    names = sorted(checkpoint.files, key=lambda name: (checkpoint.files[name], name))
    others: dict[str, list[str]] = {}
    for alias, original in aliases.items():
        others.setdefault(original, []).append(alias)
    sizes = [checkpoint.nbytes(name) for name in names]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        for name, size in zip(names, sizes, strict=True):
            checkpoint.keep([checkpoint.files[name]])
            tensor = checkpoint.tensor(name)
            for each in (name, *others.get(name, ())):
                tree.give(each, tensor)
            bar.update(size)


def _unique_state(model: torch.nn.Module, aliases: dict[str, str]) -> dict[str, torch.Tensor]:
    """The model's state without extra states, each tensor under one name; the others go into ``aliases``."""
    found: dict[str, torch.Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] == "_extra_state":
            continue
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            found[name] = tensor
    return found


def _write(
    folder: Path, written: int, shard: dict[str, torch.Tensor], index: dict[str, Any], metadata: dict[str, str]
) -> int:
    """Writes and empties a shard; returns how many there are."""
    if not shard:
        return written
    file = f"prepacked-{written + 1:05}.safetensors"
    write_tensors(folder / file, shard, metadata)
    index["tensors"].update(dict.fromkeys(shard, file))
    shard.clear()
    return written + 1


def _checked_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has no {INDEX}: save_prepacked has not written it, or not to its end")
    index = read_json(folder / INDEX)
    found = (index.get("format"), index.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{folder / INDEX} is of format {found[0]} version {found[1]}; this machete-aot reads {FORMAT} version "
            f"{FORMAT_VERSION}"
        )
    other = [
        f"{name} version {version}, here "
        + (f"version {LAYOUTS[name].version}" if name in LAYOUTS else f"there are {', '.join(LAYOUTS)}")
        for name, version in index["layouts"].items()
        if name not in LAYOUTS or LAYOUTS[name].version != version
    ]
    if other:
        raise CheckpointError(
            f"the weights in {folder} are prepacked in a layout that this machete-aot does not have; prepack the "
            "original checkpoint again with load_quantized and save_prepacked",
            other,
        )
    return index


def _check_metadata(checkpoint: Checkpoint, file: str, index: dict[str, Any]) -> None:
    """A file of another save must not pass for one of these."""
    found = checkpoint.metadata(file)
    wanted = {key: index[key] for key in ("format", "format_version", "layouts")}
    if {key: json.loads(found.get(key, "null")) for key in wanted} != wanted:
        raise CheckpointError(f"{checkpoint.folder / file} is not of the save that {INDEX} describes")


def _rebuild(model: torch.nn.Module, index: dict[str, Any]) -> None:
    """Puts empty layers into the model where the index has them."""
    for name in index["gate_up"]:
        owner, leaf = _place(model, name, index)
        placeholder = torch.nn.Linear(1, 1, device="meta")  # replaced below
        setattr(owner, leaf, GateUpMLP(placeholder, getattr(getattr(owner, leaf), DOWN)))  # type: ignore[arg-type]
    for name, description in index["modules"].items():
        layer = MacheteLinear.from_description(description, A_DTYPES[description["dtype"]], "meta")
        owner, leaf = _place(model, name, index)
        if name in index["merged"]:
            entry = index["merged"][name]
            attach_merged(owner, leaf, entry["parts"], layer, entry["sizes"])
        else:
            setattr(owner, leaf, layer)


def _place(model: torch.nn.Module, name: str, index: dict[str, Any]) -> tuple[torch.nn.Module, str]:
    """The parent of a module that was saved, and the module's name in it."""
    parent, _, leaf = name.rpartition(".")
    with contextlib.suppress(AttributeError):
        owner = model.get_submodule(parent)
        if name in index["merged"] or hasattr(owner, leaf):
            return owner, leaf
    raise CheckpointError(f"the model has no {name}, which was saved; make a model of the same architecture")
