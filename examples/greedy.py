# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of a Hugging Face model with a static cache: a step at a time, compiled, or as a CUDA graph."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from transformers import StaticCache

from examples.layers import CompiledLayers, attention_of

ALIGNED = 16
WAYS = ("eager", "compile", "graph", "layers")


def early_kernels() -> dict[str, Any]:
    """Options of torch.compile: its kernels start, and let the next one start, before the one before has ended.

    Then a product's weights are on their way while the kernel before it runs. {} where torch does not have that.
    """
    from torch._inductor import config

    return {"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {}


class Greedy:
    """Decodes ``batch`` sequences of up to ``length`` tokens, prompt included.

    ``way``: "eager"; "compile", a step by torch.compile; "graph", a step as a CUDA graph; "layers", the decoder layers
    by torch.compile, ``per`` at a time, and on a GPU the step as a CUDA graph. A step has fixed shapes and addresses:
    it reads the last token and its position from tensors, and writes the next ones there.

    ``attention``: one of ``examples.layers.ATTENTIONS`` for the steps; None: the model's own. ``backend`` and
    ``inductor``: torch.compile's, the latter its ``options``; None: ``early_kernels()``, where that is the backend.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        way: str = "eager",
        backend: str = "inductor",
        *,
        attention: str | None = None,
        per: int = 4,
        inductor: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.way, self.attention, self.per, device = model, way, attention, per, model.device
        if inductor is None:
            inductor = early_kernels() if backend == "inductor" and device.type == "cuda" else {}
        self.options = {"backend": backend, **({"options": inductor} if inductor else {})}
        # Attention reads all of the cache, so it is no longer than needed; its kernels want masks of 16 bytes.
        places = -(-length // ALIGNED) * ALIGNED
        self.cache = StaticCache(config=model.config, max_cache_len=places)
        self.tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.last = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(places, device=device)
        self.layers: CompiledLayers | None = None
        self._next = torch.compile(self._step, **self.options) if way == "compile" else self._step

    @torch.inference_mode()
    def prepare(self, prompt: torch.Tensor) -> None:
        """Runs what later calls need: memory, kernels, compilation, the graph. ``prompt`` as in ``generate``."""
        self._prefill(prompt)
        if self.way == "layers":
            self.layers = CompiledLayers(self.model, self.cache, self.position, self.per, **self.options)
        if self.way not in ("graph", "layers") or self.model.device.type != "cuda":
            self._next()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # kernels cannot be loaded while a graph is captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._next = graph.replay

    @torch.inference_mode()
    def generate(self, prompt: torch.Tensor, new: int) -> torch.Tensor:
        """prompt [batch, P] -> [batch, P + new], each token the likeliest. Asynchronous on a GPU."""
        self._prefill(prompt)
        for _ in range(new - 1):
            self.step()
        return self.tokens[:, : prompt.shape[1] + new].clone()

    @torch.inference_mode()
    def step(self) -> None:
        """The next token of each sequence, after ``generate`` of fewer than ``length``."""
        self._next()

    def _prefill(self, prompt: torch.Tensor) -> None:
        size = prompt.shape[1]
        self.cache.reset()
        positions = self.places[:size].unsqueeze(0)
        found = self.model(prompt, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens[:, :size] = prompt
        self.position.fill_(size)
        self._take(found.logits)

    def _step(self) -> None:
        mask = (self.places <= self.position).view(1, 1, 1, -1).expand(self.last.shape[0], 1, 1, -1)
        if self.attention is not None:  # additive, so that no layer has to convert it
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, float("-inf"))
        with ExitStack() as stack:
            if self.attention is not None:
                stack.enter_context(attention_of(self.model, self.attention))
            if self.layers is not None:
                stack.enter_context(self.layers.installed())
            found = self.model(
                self.last,
                attention_mask=mask,
                position_ids=self.position.unsqueeze(0),
                past_key_values=self.cache,
                use_cache=True,
            )
        self.position += 1
        self._take(found.logits)

    def _take(self, logits: torch.Tensor) -> None:
        """The next token, which belongs at ``position``."""
        self.last.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.tokens.index_copy_(1, self.position, self.last)
