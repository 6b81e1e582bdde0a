# SPDX-License-Identifier: Apache-2.0
"""Filling a model with tensors as they come: modules and parameters replaced by name, ties kept, meta left behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..errors import CheckpointError, DeviceError


class Tree:
    """A model that is being filled, on ``device``. Its parameters may be on the meta device.

    A parameter that several modules share is named by each; giving it under one name gives it to all.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        tied: dict[int, list[str]] = {}
        for name, tensor in self._persistent():
            tied.setdefault(id(tensor), []).append(name)
        self._ties = {name: names for names in tied.values() for name in names}
        self._given: set[str] = set()

    def wanted(self) -> set[str]:
        """Names of all parameters and of the buffers that a state has."""
        return set(self._ties)

    def ties(self, name: str) -> list[str]:
        """All names of the parameter of this name."""
        return self._ties[name]

    def replace(self, name: str, module: torch.nn.Module) -> None:
        """Puts ``module`` where the model has one of this name, or under a new name in an existing parent."""
        parent, leaf = self._owner(name)
        old = getattr(parent, leaf, None)
        if isinstance(old, torch.nn.Module):
            for inner in (*dict(old.named_parameters(remove_duplicate=False)), *dict(old.named_buffers())):
                if (tied := self._ties.pop(f"{name}.{inner}", None)) is not None:
                    tied.remove(f"{name}.{inner}")
        setattr(parent, leaf, module)

    def give(self, name: str, tensor: torch.Tensor) -> None:
        """A parameter's or buffer's value, in the dtype that it has. Raises CheckpointError for another shape."""
        old = self._get(name)
        if old.shape != tensor.shape:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(old.shape)} in the model"
            )
        value: torch.Tensor = tensor.to(device=self.device, dtype=old.dtype)
        if isinstance(old, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=old.requires_grad)
        for each in self._ties[name]:
            parent, leaf = self._owner(each)
            setattr(parent, leaf, value)
            self._given.add(each)

    def finish(self) -> None:
        """Moves what no checkpoint holds to the device. Raises CheckpointError where something is still on meta.

        Buffers that a state does not have, and that are on the meta device, are computed again where their module can
        be made from its ``config``, as rotary embeddings of Hugging Face models can.
        """
        for module in self.model.modules():
            if any(b is not None and b.is_meta for b in module._buffers.values()):
                self._recompute(module)
            for leaf, tensor in list(module._buffers.items()):
                if tensor is not None and not tensor.is_meta:
                    module._buffers[leaf] = tensor.to(self.device)
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.is_meta and parameter.device != self.device:
                    parameter.data = parameter.data.to(self.device)
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        left = [name for name, tensor in tensors if tensor.is_meta]
        if left:
            raise CheckpointError(
                "the model has tensors on the meta device that its state does not have and that cannot be computed "
                "again; make the model under machete_aot.nn.parameters_on_meta() instead",
                missing=left,
            )

    def _recompute(self, module: torch.nn.Module) -> None:
        config = getattr(module, "config", None)
        if config is None or any(True for _ in module.parameters()):
            return
        try:
            with torch.device("cpu"):
                fresh = type(module)(config)
        except Exception:
            return  # ``finish`` names what is left
        for leaf, tensor in fresh._buffers.items():
            old = module._buffers.get(leaf)
            if tensor is not None and old is not None and old.is_meta and old.shape == tensor.shape:
                module._buffers[leaf] = tensor.to(old.dtype)

    def _persistent(self) -> Iterable[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for leaf, tensor in module._buffers.items():
                if tensor is not None and leaf not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{leaf}" if prefix else leaf, tensor

    def _owner(self, name: str) -> tuple[torch.nn.Module, str]:
        parent, _, leaf = name.rpartition(".")
        return self.model.get_submodule(parent), leaf

    def _get(self, name: str) -> torch.Tensor:
        parent, leaf = self._owner(name)
        tensor = getattr(parent, leaf)
        assert isinstance(tensor, torch.Tensor)
        return tensor


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Models made meanwhile have their parameters on the meta device, without memory or values, and real buffers.

    Unlike ``torch.device("meta")`` it leaves alone what no checkpoint holds. It changes torch.nn.Module, for all
    threads.
    """
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is on meta may be shared
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def target_device(model: torch.nn.Module, device: torch.device | str | int | None) -> torch.device:
    """``device``, or else where the model is, or, if it is on meta, the GPU that torch uses, or the CPU."""
    if device is not None:
        found = torch.device(device)
    else:
        real = next((p.device for p in model.parameters() if not p.is_meta), None)
        found = real or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cuda" and found.index is None:
        if not torch.cuda.is_available():
            raise DeviceError(
                'torch sees no GPU; run `machete-aot doctor`, or pass device="cpu", where the reference multiplies'
            )
        return torch.device("cuda", torch.cuda.current_device())
    return found
