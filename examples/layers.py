# SPDX-License-Identifier: Apache-2.0
"""A decode step with little between the products: decoder layers by torch.compile, attention for one new token.

Between the four products of a Llama layer transformers runs 33 small kernels and attention; torch.compile makes a few
of them. Some layers are compiled together, once, and the result runs all layers: seconds, not minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, StaticCache

Result = tuple[torch.Tensor, None]


def _packed(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, heads, 1, D] -> [B, kv heads, heads of each, D]: keys are read once for all heads that share them."""
    return query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])


def _unpacked(out: torch.Tensor) -> torch.Tensor:
    """[B, kv heads, heads of each, D] -> [B, 1, heads, D], as transformers wants it."""
    return out.flatten(1, 2).unsqueeze(1)


def packed(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> Result:
    """torch's attention; heads that share keys are taken as positions of one."""
    queries = _packed(query, key)
    return _unpacked(
        functional.scaled_dot_product_attention(queries, key, value, mask, scale=options.get("scaling"))
    ), None


def products(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> Result:
    """Two batched products and a softmax."""
    scores = torch.matmul(_packed(query, key), key.transpose(2, 3)).float() * options["scaling"] + mask.float()
    return _unpacked(torch.matmul(scores.softmax(-1).to(value.dtype), value)), None


def flex(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> Result:
    """torch's flex_attention, which divides long caches among many CTAs; for compiled layers alone."""
    from torch.nn.attention.flex_attention import flex_attention

    def add_mask(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + mask[b, 0, 0, kv]

    out = flex_attention(query, key, value, score_mod=add_mask, scale=options["scaling"], enable_gqa=True)
    return out.transpose(1, 2), None


ATTENTIONS: dict[str, Callable[..., Result]] = {"packed": packed, "products": products, "flex": flex}
for _name, _function in ATTENTIONS.items():
    AttentionInterface.register(f"machete_{_name}", _function)


@contextmanager
def attention_of(model: Any, name: str | None) -> Iterator[None]:
    """The model attends by ``ATTENTIONS[name]`` meanwhile, with one query and an additive mask. None: as it is."""
    before = model.config._attn_implementation
    if name is not None:
        model.config._attn_implementation = f"machete_{name}"
    try:
        yield
    finally:
        model.config._attn_implementation = before


class Slot:
    """One layer's keys and values [B, heads, length, D] of a cache, and the position [1] that is written next."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        # New tensors of the same memory: transformers has marked its own, and each would be compiled for.
        self.keys, self.values, self.position = keys.detach(), values.detach(), position

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


def run(layers: Sequence[Any], slots: Sequence[Slot], x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    for layer, slot in zip(layers, slots, strict=True):
        x = layer(x, past_key_values=slot, **options)
    return x


class Region(torch.nn.Module):
    """Some decoder layers, in the place of one."""

    def __init__(self, layers: Sequence[Any], slots: Sequence[Slot], compiled: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.members, self.slots, self.compiled = tuple(layers), tuple(slots), compiled

    def forward(self, x: torch.Tensor, past_key_values: Any = None, **options: Any) -> torch.Tensor:
        return self.compiled(self.members, self.slots, x, options)


class CompiledLayers:
    """Decoder layers by torch.compile, ``per`` at a time, for steps of one token with ``cache``.

    ``cache`` has been filled by a prompt; ``position`` [1] is where the new token goes. ``options``: of torch.compile.
    Raises ValueError for a model whose layers are not found.
    """

    def __init__(self, model: Any, cache: StaticCache, position: torch.Tensor, per: int, **options: Any) -> None:
        self.base = model.base_model
        layers = getattr(self.base, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList) or len(layers) != len(cache.layers):
            raise ValueError(f"{type(model).__name__} has no list of decoder layers, one for each layer of the cache")
        slots = [Slot(layer.keys, layer.values, position) for layer in cache.layers]
        compiled = torch.compile(run, fullgraph=True, dynamic=False, **options)
        self.regions = torch.nn.ModuleList(
            Region(layers[i : i + per], slots[i : i + per], compiled) for i in range(0, len(layers), per)
        )
        # What runs once a step and is many small kernels too.
        self.once = {
            module: torch.compile(module.forward, fullgraph=True, dynamic=False, **options)
            for module in (getattr(self.base, name, None) for name in ("rotary_emb", "norm"))
            if module is not None
        }
        # Layers are told apart by numbers, which slots need not know, and each number would be compiled for.
        self.numbered = [module for module in layers.modules() if isinstance(getattr(module, "layer_idx", None), int)]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model runs them meanwhile."""
        layers, numbers = self.base.layers, [module.layer_idx for module in self.numbered]
        self.base.layers = self.regions
        for module in self.numbered:
            module.layer_idx = 0
        for module, forward in self.once.items():
            module.forward = forward
        try:
            yield
        finally:
            self.base.layers = layers
            for module in self.once:
                del module.forward
            for module, number in zip(self.numbered, numbers, strict=True):
                module.layer_idx = number
