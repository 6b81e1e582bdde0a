# SPDX-License-Identifier: Apache-2.0
"""fuse(model): projections of one input as one product, q/k/v and gate/up, where their weights agree.

The model's own code stays as it is. The projections are replaced by parts of a product: the first that is called
multiplies for all of them, the others return their columns of that result. Where a module is gate, up, SiLU and down
and nothing else, which is checked by running it, it becomes two products, the first with ``activation="swiglu"``. Its
outputs then come in whatever order the second wants them, so that down's act-order costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import UNIT_ROWS
from ..gate_up import interleave_gate_up, prepack_gate_up
from ..prepack import prepack_b, unpack_to_gptq
from ..validate import GATE_BLOCK
from .linear import MacheteLinear

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
DOWN = "down_proj"
TOLERANCE = 0.02  # of the norm, between an MLP and its fused form: both round to 16 bits in between
ROWS = 4  # of the input with which they are compared
SPREAD = 3.0  # standard deviation of the gate's outputs for it


@dataclass
class FuseReport:
    """``merged``: names of the new layers. ``skipped``: why others were not merged, by their parent's name.

    ``without_activation``: which of ``merged`` are gate and up that the model's own code still multiplies.
    ``reordered``: which of ``merged`` give their outputs in the act-order of the layer after them, which then has none.
    """

    merged: list[str] = field(default_factory=list)
    without_activation: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    reordered: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.merged)} merged, {len(self.skipped)} not"]
        lines += [f"{name}: {reason}" for name, reason in self.skipped.items()]
        lines += [
            f"{name}: merged without its activation: the MLP is not silu(gate) * up alone"
            for name in self.without_activation
        ]
        if self.reordered:
            lines.append(f"{len(self.reordered)} have taken over the act-order of the layer after them")
        return "\n".join(lines)


class Shared:
    """One product for several callers with the same input: computed at the first call, handed out in parts."""

    def __init__(self, linear: MacheteLinear, sizes: Sequence[int]) -> None:
        self.linear, self.sizes = linear, tuple(sizes)
        # Input, its version and the parts that are left: read and replaced as one, since threads may call at once.
        self._last: tuple[torch.Tensor, int | None, list[torch.Tensor | None]] | None = None

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Columns of part ``index`` of the product of x, a view [..., size] of a tensor that all parts share."""
        last = self._last
        part = last[2][index] if last is not None and last[0] is x and last[1] == _version(x) else None
        if last is None or part is None:
            parts: list[torch.Tensor | None] = list(torch.split(self.linear(x), list(self.sizes), dim=-1))
            last = self._last = (x, _version(x), parts)
            part = parts[index]
            assert part is not None
        last[2][index] = None
        if all(p is None for p in last[2]):
            self._last = None  # or what another thread has put there, whose parts are then computed again
        return part


class MergedPart(torch.nn.Module):
    """Some columns of a merged layer, in the place of the layer that had them alone."""

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.in_features, self.out_features = shared.linear.in_features, shared.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.part(x, self.index)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, part {self.index} of a merged layer"


class GateUpMLP(torch.nn.Module):
    """down(silu(gate(x)) * up(x)) as two products; ``gate_up_proj`` has ``activation="swiglu"``."""

    def __init__(self, gate_up: MacheteLinear, down: torch.nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x))


@torch.no_grad()
def fuse(model: torch.nn.Module) -> FuseReport:
    """Merges q/k/v and gate/up projections of ``MacheteLinear`` in place, and says what was merged and what was not.

    Layers are merged where inputs, type, group size, kind of zeros, dtype, device and act-order agree. Layers of other
    act-orders would each need their own activations, so they stay apart. Weights are repacked on their device, a layer
    at a time; the merged ones take the memory of the parts. On a GPU the merged product may have another schedule than
    its parts had, and so add up in another order.
    """
    report = FuseReport()
    for name, parent in list(model.named_modules()):
        dot = f"{name}." if name else ""
        if _has(parent, QKV):
            reason = _difference([getattr(parent, leaf) for leaf in QKV])
            if reason is None:
                attach_merged(parent, "qkv_proj", QKV, merge([getattr(parent, leaf) for leaf in QKV]))
                report.merged.append(f"{dot}qkv_proj")
            else:
                report.skipped[name] = f"{', '.join(QKV)}: {reason}"
        if _has(parent, GATE_UP):
            reason = _fuse_mlp(model, name, parent)
            if reason is None:
                report.merged.append(f"{dot}gate_up_proj")
                if _has(parent, ("gate_up_proj",)):
                    report.without_activation.append(f"{dot}gate_up_proj")
                elif _folds(parent):
                    report.reordered.append(f"{dot}gate_up_proj")
            else:
                report.skipped[name] = f"{', '.join(GATE_UP)}: {reason}"
    return report


def merge(layers: Sequence[MacheteLinear]) -> MacheteLinear:
    """One layer of the columns of several that agree, in their order."""
    first = layers[0]
    if all(layer.out_features % UNIT_ROWS == 0 for layer in layers[:-1]):
        qweight = torch.cat([layer.qweight for layer in layers])
    else:
        codes = torch.cat([_gptq(layer) for layer in layers], dim=1)
        qweight = prepack_b(codes, first.b_type, first.scales.dtype, k=first.in_features)
    zeros = None if first.zeros is None else torch.cat([_zeros(layer) for layer in layers], dim=1)
    merged = MacheteLinear.from_packed(
        qweight, first.b_type, torch.cat([layer.scales for layer in layers], dim=1), zeros, first.in_features,
        first.group_size, _biases(layers), first.perm,
    )  # fmt: skip
    merged.batch_invariant, merged.is_part = first.batch_invariant, first.is_part
    return merged


def merge_gate_up(gate: MacheteLinear, up: MacheteLinear, order: torch.Tensor | None = None) -> MacheteLinear:
    """One layer with ``activation="swiglu"`` of two that agree; their outputs are a multiple of 8.

    ``order``: integers [outputs], a permutation; output i is what was output ``order[i]``. None: as they are.
    """

    def both(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (gate, up) if order is None else (gate.index_select(-1, order), up.index_select(-1, order))

    codes = both(_gptq(gate), _gptq(up))
    qweight = prepack_gate_up(*codes, gate.b_type, gate.scales.dtype, k=gate.in_features)
    biases = _biases([gate, up])
    merged = MacheteLinear.from_packed(
        qweight, gate.b_type, interleave_gate_up(*both(gate.scales, up.scales)),
        None if gate.zeros is None else interleave_gate_up(*both(gate.zeros, _zeros(up))), gate.in_features,
        gate.group_size, None if biases is None else interleave_gate_up(*both(*biases.chunk(2))), gate.perm,
        activation="swiglu",
    )  # fmt: skip
    merged.batch_invariant, merged.is_part = gate.batch_invariant, gate.is_part
    return merged


def without_order(layer: MacheteLinear) -> MacheteLinear:
    """The same layer, of the same memory, for activations that are in its act-order already."""
    found = MacheteLinear.from_packed(
        layer.qweight, layer.b_type, layer.scales, layer.zeros, layer.in_features, layer.group_size, layer.bias
    )
    found.batch_invariant, found.is_part = layer.batch_invariant, layer.is_part
    return found


def attach_merged(
    parent: torch.nn.Module, leaf: str, names: Sequence[str], merged: MacheteLinear, sizes: Sequence[int] | None = None
) -> None:
    """Puts ``merged`` into ``parent`` as ``leaf``, and its parts in the places of ``names``.

    ``sizes``: their columns; None: those of the layers that are there.
    """
    shared = Shared(merged, sizes or [getattr(parent, name).out_features for name in names])
    setattr(parent, leaf, merged)
    for index, name in enumerate(names):
        setattr(parent, name, MergedPart(shared, index))


def merged_parts(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """What ``attach_merged`` needs to do it again: by the merged layer's name, its parts' names and sizes."""
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, MacheteLinear)}
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MergedPart):
            merged = names[id(module.shared.linear)]
            entry = found.setdefault(merged, {"parts": [], "sizes": list(module.shared.sizes)})
            entry["parts"].append((module.index, name.rpartition(".")[2]))
    for entry in found.values():
        entry["parts"] = [part for _, part in sorted(entry["parts"])]
    return found


def _fuse_mlp(model: torch.nn.Module, name: str, parent: torch.nn.Module) -> str | None:
    """Fuses gate and up of a module, with their activation if it can. Returns why not, if not."""
    gate, up = (getattr(parent, leaf) for leaf in GATE_UP)
    reason = _difference([gate, up])
    if reason is None and gate.out_features != up.out_features:
        reason = "they have different numbers of outputs"
    if reason is not None:
        return reason
    if name and gate.out_features % GATE_BLOCK == 0 and _may_be_swiglu(parent):
        down = getattr(parent, DOWN)
        if _folds(parent):
            fused = GateUpMLP(merge_gate_up(gate, up, down.perm), without_order(down))
        else:
            fused = GateUpMLP(merge_gate_up(gate, up), down)
        if _same(parent, fused, gate):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, fused)
            return None
    attach_merged(parent, "gate_up_proj", GATE_UP, merge([gate, up]))
    return None


def _has(parent: torch.nn.Module, names: Sequence[str]) -> bool:
    return all(isinstance(getattr(parent, name, None), MacheteLinear) for name in names)


def _difference(layers: Sequence[MacheteLinear]) -> str | None:
    """Why layers of one input cannot be one product, if they cannot."""
    first = layers[0]
    for what, of in (
        ("inputs", lambda x: x.in_features),
        ("types", lambda x: x.b_type),
        ("group sizes", lambda x: x.group_size),
        ("kinds of zero points", lambda x: x.zeros_kind),
        ("dtypes", lambda x: x.scales.dtype),
        ("devices", lambda x: x.scales.device),
        ("settings of batch_invariant", lambda x: x.batch_invariant),
    ):
        if any(of(layer) != of(first) for layer in layers):
            return f"they have different {what}: {', '.join(str(of(layer)) for layer in layers)}"
    if any(layer.activation is not None for layer in layers):
        return "one of them has an activation"
    if any((layer.perm is None) != (first.perm is None) for layer in layers):
        return "only some of them have an act-order"
    if first.perm is not None and any(not torch.equal(layer.perm, first.perm) for layer in layers):  # type: ignore[arg-type]
        return "their act-orders (g_idx) are different"
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return "one of them has forward hooks"
    if any(layer.sharding is not None for layer in layers):
        return "one of them communicates with other ranks"
    return None


def _may_be_swiglu(parent: torch.nn.Module) -> bool:
    """Whether the module has gate, up, down and one activation, and no more."""
    children = dict(parent.named_children())
    rest = children.keys() - {*GATE_UP, DOWN}
    plain = (
        not parent._parameters and not parent._buffers and not parent._forward_hooks and not parent._forward_pre_hooks
    )
    return plain and DOWN in children and len(rest) <= 1


def _folds(parent: torch.nn.Module) -> bool:
    """Whether down's act-order can be that of gate's and up's outputs instead."""
    down = getattr(parent, DOWN)
    return (
        isinstance(down, MacheteLinear)
        and down.perm is not None
        and down.sharding is None
        and not (down._forward_hooks or down._forward_pre_hooks)
    )


def _same(mlp: torch.nn.Module, fused: torch.nn.Module, layer: MacheteLinear) -> bool:
    """Whether two modules give the same for some input, within what rounding explains.

    ``layer``: the gate. The input is scaled until gates spread to where activations differ: near 0 all are x / 2.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(ROWS, layer.in_features, generator=generator, device="cpu").to(layer.scales)
    spread = float(layer(x).double().std())
    x = (x.double() * (SPREAD / spread)).to(x.dtype) if spread > 0 else x
    try:
        wanted, found = mlp(x), fused(x)
    except Exception:  # other arguments or dimensions, weights of its own: whatever it misses, it is no plain MLP
        return False
    if not isinstance(wanted, torch.Tensor) or wanted.shape != found.shape or not bool(wanted.isfinite().all()):
        return False
    return float((found.double() - wanted.double()).norm()) <= TOLERANCE * float(wanted.double().norm())


def _gptq(layer: MacheteLinear) -> torch.Tensor:
    return unpack_to_gptq(layer.qweight, layer.b_type, layer.columns, layer.in_features)


def _zeros(layer: MacheteLinear) -> torch.Tensor:
    assert layer.zeros is not None
    return layer.zeros


def _biases(layers: Sequence[MacheteLinear]) -> torch.Tensor | None:
    """Their biases in a row, zero for layers without, None where none has one."""
    if all(layer.bias is None for layer in layers):
        return None

    def biases() -> Iterator[torch.Tensor]:
        for layer in layers:
            yield layer.scales.new_zeros(layer.columns) if layer.bias is None else layer.bias

    return torch.cat(list(biases()))


def _version(x: torch.Tensor) -> int | None:
    """Counts writes to x, where torch does."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
