# SPDX-License-Identifier: Apache-2.0
"""A whole model from quantised checkpoints: time to load, logits against 16 bits, and decoding beside the bf16 model.

    python -m benchmarks.model --out model.json                # a random Llama 3 8B, GPTQ and AWQ, group 128
    python -m benchmarks.model --vocab 32000 --skip-awq

Checkpoints of random codes are written layer by layer into a temporary folder. GPTQ's are symmetric, AWQ's have zero
points. Codes are normally distributed around the zero point, and what writes to the residual stream is scaled down with
the depth, as models are initialised: weights with a mean make every position the same, and without the scaling a deep
random model amplifies any rounding. The bf16 model has the same weights, dequantised here from the formats'
definitions; the logits of both are also compared with that model in fp32. Decoding is greedy, with a static cache and a
step as one CUDA graph: with transformers' own kernels between the products, and with the decoder layers by
torch.compile (``--ways``); both models are decoded in the same ways. Without a GPU there are no graphs: for a try with
small sizes. Needs the extra "models".
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.decoding import REFERENCE, add_options, decode
from benchmarks.random_weights import DEQUANTISED, GROUP, RANDOM, WEIGHT, preferred, random_gptq
from benchmarks.run_record import run_record
from machete_aot.bench_report import device_facts
from machete_aot.nn import MacheteLinear, fuse, load_quantized, parameters_on_meta
from machete_aot.nn.checkpoint import Checkpoint
from machete_aot.nn.tree import Tree
from machete_aot.permute import permute_columns
from machete_aot.publish import publish
from machete_aot.scalar_type import u4b8

RESIDUAL = ("o_proj", "down_proj")  # what writes to the residual stream
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq",
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Loads, checks and times a whole quantised model.")
    for name, default in (
        ("layers", 32), ("hidden", 4096), ("intermediate", 14336), ("heads", 32), ("kv-heads", 8), ("vocab", 128256),
        ("positions", 1000),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    add_options(parser)
    parser.add_argument("--out", type=Path, help="a JSON file of every figure")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: the temporary folder")
    for part in ("gptq", "awq", "logits", "decode", "unfused", "bf16", "act-order"):
        parser.add_argument(f"--skip-{part}", action="store_true")
    return parser.parse_args(arguments)


class Run:
    """One run: its options, and what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        self.found: dict[str, Any] = {
            **run_record("model"),
            "device": device_facts(None) if self.device.type == "cuda" else "cpu",
            "model": {
                k: getattr(options, k) for k in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")
            },
            "formats": {},
            "decode": [],
        }
        torch.manual_seed(0)
        self.ids = torch.randint(options.vocab, (1, options.positions), device=self.device)
        self.tokens: dict[tuple[str, str, int], torch.Tensor] = {}
        self.start = START

    def note(self, text: str) -> None:
        print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)

    def save(self) -> None:
        if self.options.out is not None:
            publish(self.options.out, json.dumps(self.found, indent=1).encode())

    def empty(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        with parameters_on_meta():
            return AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()

    @torch.inference_mode()
    def logits(self, model: Any) -> torch.Tensor:
        """[positions, vocabulary] of one sequence, fp32."""
        return model(self.ids).logits[0].float()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.synchronize()
        start = time.perf_counter()
        result = call()
        self.synchronize()
        return time.perf_counter() - start, result

    def reset_peak(self) -> None:
        gc.collect()  # models of Hugging Face may hold themselves
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None

    def held_gb(self) -> float | None:
        return torch.cuda.memory_allocated() / 1e9 if self.device.type == "cuda" else None


def write(run: Run, folder: Path, form: str) -> int:
    """Writes a checkpoint, a file for each layer and one for the rest; returns the bytes of packed weights."""
    places: dict[str, str] = {}
    packed = 0
    linear: dict[str, dict[str, tuple[int, int]]] = {}
    rest: dict[str, torch.Tensor] = {}
    device = run.device
    for name, module in run.empty().named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            linear.setdefault(".".join(name.split(".")[:3]), {})[name] = (module.out_features, module.in_features)
        else:
            for leaf, value in module.named_parameters(recurse=False):
                random = torch.ones(value.shape)
                if value.dim() == 2:  # embeddings are as large as what all layers add to them
                    random = torch.randn(value.shape, device=device)
                if name == "lm_head":
                    random.add_(preferred(rest["model.embed_tokens.weight"].to(device))).mul_(WEIGHT)
                rest[f"{name}.{leaf}"] = random.to(torch.bfloat16).cpu()
    for file, shapes in [("rest", {}), *linear.items()]:
        tensors = rest if not shapes else {}
        for name, (n, k) in shapes.items():
            parts = RANDOM[form](n, k, device)
            if name.endswith(RESIDUAL):
                parts["scales"] /= (2 * run.options.layers) ** 0.5
            tensors |= {f"{name}.{part}": value.cpu() for part, value in parts.items()}
            packed += tensors[f"{name}.qweight"].nbytes
        save_file(tensors, str(folder / f"{file}.safetensors"), metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, f"{file}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIGS[form]}))
    return packed


def floating_model(run: Run, folder: Path, form: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a checkpoint's weights, dequantised to bf16, that calculates in ``dtype``."""
    model, checkpoint = run.empty(dtype), Checkpoint.find(folder, run.device)
    tree = Tree(model, run.device)
    for name in sorted(tree.wanted()):
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in checkpoint.files:
            tensors = {part: checkpoint.tensor(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")}
            tree.give(name, DEQUANTISED[form](tensors).to(dtype))
        else:
            tree.give(name, checkpoint.tensor(name).to(dtype))
    checkpoint.close()
    tree.finish()
    return model


def compare(found: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Logits [positions, vocabulary]. Differences are of the largest logit, and of the norm."""
    best = wanted.argmax(-1)
    agree = found.argmax(-1) == best
    # Where they disagree, by how much what is wanted prefers its own choice.
    margin = wanted.gather(1, best[:, None]) - wanted.gather(1, found.argmax(-1)[:, None])
    largest = float(wanted.abs().max())
    return {
        "positions": len(best),
        "different_choices": len(best.unique()),  # agreement on one token everywhere would say nothing
        "max_difference_over_max_logit": float((found - wanted).abs().max()) / largest,
        "relative_norm": float((found - wanted).norm() / wanted.norm()),
        "top1_agreement": float(agree.float().mean()),
        "largest_margin_over_max_logit": float(margin.max()) / largest,
    }


class Logits(NamedTuple):
    """What the logits of a quantised model are compared with: the same weights in bf16 and in fp32."""

    bf16: torch.Tensor
    fp32: torch.Tensor

    def compare(self, run: Run, what: str, model: Any) -> dict[str, Any]:
        found = run.logits(model)
        return {
            f"to_{name}": note_logits(run, f"{what} to {name}", compare(found, other))
            for name, other in self._asdict().items()
        }


def note_logits(run: Run, what: str, entry: dict[str, float]) -> dict[str, float]:
    """Says what ``compare`` has found, and returns it."""
    run.note(
        f"{what}: norm of the difference {entry['relative_norm']:.4f}, largest "
        f"{entry['max_difference_over_max_logit']:.4f}, first choice {entry['top1_agreement']:.1%} the same"
    )
    return entry


def act_order(run: Run) -> list[dict[str, float]]:
    """What gathering the activations costs: a layer with and without a permutation, in graphs of many calls.

    And what a gather takes by itself, by the package's kernel and in torch's ways of doing it.
    """
    found = []
    calls = 20
    for k in (run.options.hidden, run.options.intermediate):
        n = run.options.hidden
        tensors = {name: value.to(run.device) for name, value in random_gptq(n, k, run.device).items()}
        layers = []
        for shuffled in (False, True):
            order = torch.randperm(k, device=run.device) if shuffled else torch.arange(k, device=run.device)
            layers.append(MacheteLinear.from_gptq(**dict(tensors, g_idx=tensors["g_idx"][order])))
        assert layers[0].b_type == u4b8 and layers[0].perm is None and layers[1].perm is not None
        for m in (1, 16, 64, 1024):
            x = torch.randn(m, k, device=run.device).to(torch.bfloat16)
            us = [1e6 * _graph_seconds(run, layer, x, calls) / calls for layer in layers]
            gathers = {
                name: 1e6 * _graph_seconds(run, gather, x, calls) / calls
                for name, gather in _gathers(layers[1].perm, x).items()
            }
            found.append({"m": m, "n": n, "k": k, "plain_us": us[0], "act_order_us": us[1], "gathers_us": gathers})
            run.note(f"act-order {n} x {k}, M = {m}: {us[0]:.1f} us without, {us[1]:.1f} us with")
            run.note("  gathers: " + ", ".join(f"{name} {us:.1f} us" for name, us in gathers.items()))
    return found


def _gathers(perm: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Columns of x in another order, in several ways."""
    longer, into = perm.long(), torch.empty_like(x)
    everywhere = longer.expand(x.shape)
    return {
        "permute_columns": lambda x: permute_columns(x, perm),
        "index_select, int32": lambda x: x.index_select(-1, perm),
        "index_select, int64": lambda x: x.index_select(-1, longer),
        "index_select into a buffer": lambda x: torch.index_select(x, -1, perm, out=into),
        "index": lambda x: x[..., perm],
        "gather": lambda x: x.gather(-1, everywhere),
    }


@torch.inference_mode()
def _graph_seconds(run: Run, layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, calls: int) -> float:
    """Seconds of so many calls, in a CUDA graph where there is a GPU; the least of several. The weights stay in L2."""

    def many() -> None:
        for _ in range(calls):
            layer(x)

    if run.device.type != "cuda":
        return run.seconds(many)[0]
    many()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    graph.replay()
    return min(run.seconds(graph.replay)[0] for _ in range(5))


def measure_format(run: Run, form: str, first: bool) -> None:
    """Everything about one format. ``first``: the bf16 model is decoded too."""
    options = run.options
    decodes_floating = first and not options.skip_bf16 and not options.skip_decode
    found: dict[str, Any] = {}
    run.found["formats"][form] = found
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        seconds, packed = run.seconds(lambda: write(run, folder, form))
        run.note(f"{form}: wrote {packed / 1e9:.2f} GB of packed weights in {seconds:.1f} s")
        model = run.empty()
        run.reset_peak()
        before = run.held_gb()
        seconds, model = run.seconds(lambda: load_quantized(model, folder, device=run.device))
        peak, held = run.peak_gb(), run.held_gb()
        found["load"] = {
            "seconds": seconds, "packed_gb": packed / 1e9, "packed_gb_per_s": packed / 1e9 / seconds,
            "file_gb": sum(p.stat().st_size for p in folder.iterdir()) / 1e9,
            "extra_peak_gb": None if peak is None or held is None else peak - held, "held_gb_before": before,
        }  # fmt: skip
        run.note(f"{form}: loaded in {seconds:.1f} s, {packed / 1e9 / seconds:.2f} GB of packed weights a second")
        floating, wanted = None, None
        if not options.skip_logits or decodes_floating:
            floating = floating_model(run, folder, form)
            run.note(f"{form}: dequantised to bf16")
        if not options.skip_logits:
            wanted = Logits(run.logits(floating), run.logits(floating_model(run, folder, form, torch.float32)))
    if wanted is not None:
        found["logits_bf16"] = note_logits(run, f"{form}, in bf16, to fp32", compare(*wanted))
        found["logits"] = wanted.compare(run, form, model)
    if decodes_floating:
        decode(run, REFERENCE, floating)
    if not options.skip_decode and not options.skip_unfused and first:
        decode(run, form, model)
    seconds, report = run.seconds(lambda: fuse(model))
    found["fuse"] = {"seconds": seconds, "merged": len(report.merged), "skipped": report.skipped}
    run.note(f"{form}: {len(report.merged)} layers merged in {seconds:.1f} s")
    if wanted is not None:
        found["logits_fused"] = wanted.compare(run, f"{form}, fused,", model)
    del floating, wanted
    if not options.skip_decode:
        decode(run, f"{form}, fused", model)
    run.save()


def main(arguments: Sequence[str] | None = None) -> int:
    run = Run(parse(arguments))
    run.note(f"{run.found['device']}, torch {torch.__version__}")
    forms = [form for form in CONFIGS if not getattr(run.options, f"skip_{form}")]
    for i, form in enumerate(forms):
        measure_format(run, form, first=i == 0)
    if not run.options.skip_act_order:
        run.found["act_order"] = act_order(run)
    run.found["seconds"] = time.perf_counter() - START
    run.save()
    return 0


START = time.perf_counter()

if __name__ == "__main__":
    sys.exit(main())
