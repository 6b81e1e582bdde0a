# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to tokens: writes a small quantised checkpoint, loads it, checks its logits, and generates.

    python -m examples.generate                  # GPTQ
    python -m examples.generate --format awq

The model is a random Llama of two layers, so that this takes seconds without a GPU. A real one is loaded in the same
way; see ``load`` and docs/models.md. Needs the extra "models".
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from examples.checkpoint import CONFIGS, write_checkpoint
from examples.greedy import Greedy
from machete_aot.nn import fuse, load_quantized, parameters_on_meta

TOLERANCE = 0.02  # of the logits' norm: 16-bit activations, rounded at other places
DTYPE = torch.bfloat16


def make_model(hidden: int, layers: int) -> Any:
    """A random Llama in floating point, on the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


def load(folder: Path, device: str) -> Any:
    """The three lines that load a real checkpoint, too."""
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=DTYPE)
    return load_quantized(model, folder, device=device).eval()


def difference(model: Any, floating: Any, ids: torch.Tensor) -> float:
    """||logits - logits of the dequantised model|| / ||the latter||."""
    with torch.inference_mode():
        found, wanted = model(ids).logits.double(), floating(ids).logits.double()
    return float((found - wanted).norm() / wanted.norm())


def regret(model: Any, tokens: torch.Tensor, prompt: int) -> float:
    """By how much the model prefers its own choices to these tokens', after them, over the largest logit."""
    with torch.inference_mode():
        logits = model(tokens[:, :-1].to(model.device)).logits[:, prompt - 1 :].float().cpu()
    chosen = logits.gather(-1, tokens[:, prompt:, None].cpu())[..., 0]
    return float((logits.amax(-1) - chosen).max() / logits.abs().max())


def generate(
    model: Any, prompt: torch.Tensor, new: int, way: str, backend: str, attention: str | None = None
) -> torch.Tensor:
    """Generates once to prepare and once to time, and prints the time."""
    greedy = Greedy(model, prompt.shape[0], prompt.shape[1] + new, way, backend, attention=attention)
    greedy.prepare(prompt)
    start = time.perf_counter()
    tokens = greedy.generate(prompt, new).cpu()
    seconds = time.perf_counter() - start
    print(f"{way:>8}: {new} tokens in {seconds:.3f} s, {1e3 * seconds / new:.2f} ms each: {tokens[0, -8:].tolist()}")
    return tokens


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generates with a small quantised model.")
    parser.add_argument("--format", choices=sorted(CONFIGS), default="gptq")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--backend", help="of torch.compile; default: inductor on a GPU, else aot_eager")
    parser.add_argument("--skip-compile", action="store_true")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    backend = options.backend or ("inductor" if gpu else "aot_eager")

    floating = make_model(options.hidden, options.layers)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(floating, Path(folder), options.format, options.group)
        model = load(Path(folder), device)
    floating = floating.to(device)
    prompt = torch.randint(512, (options.batch, 8), generator=torch.Generator().manual_seed(1)).to(device)

    errors = {"as loaded": difference(model, floating, prompt)}
    ways = ["eager", *([] if options.skip_compile else ["compile"]), *(["graph"] if gpu else [])]
    found = {way: generate(model, prompt, options.tokens, way, backend) for way in ways}
    print(fuse(model))
    errors["fused"] = difference(model, floating, prompt)
    found["fused"] = generate(model, prompt, options.tokens, "graph" if gpu else "eager", backend)
    if not options.skip_compile:
        found["layers"] = generate(model, prompt, options.tokens, "layers", backend, "packed")
    for name, error in errors.items():
        print(f"logits against the dequantised model, {name}: {error:.2g} of the norm")
    same = all(torch.equal(found["eager"], found[way]) for way in found if way in ("compile", "graph"))
    for way in ("fused", "layers"):  # which round elsewhere
        if way in found:
            errors[f"choices, {way}"] = regret(floating, found[way], prompt.shape[1])
            print(f"choices of the dequantised model against those of {way}: {errors[f'choices, {way}']:.2g} apart")
    print(f"all ways give {'the same tokens' if same else 'DIFFERENT tokens'}")
    return 0 if same and max(errors.values()) < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
