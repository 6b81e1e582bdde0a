# SPDX-License-Identifier: Apache-2.0
"""Times greedy decoding of models in several ways, for ``benchmarks.model``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from examples.greedy import WAYS, Greedy
from examples.layers import ATTENTIONS

PROMPT = 64
REFERENCE = "bf16"
LONGEST = 20  # kernels of a profile that are printed


@dataclass(frozen=True)
class Way:
    """A way of ``examples.greedy`` with a kind of attention, None for transformers' own."""

    way: str
    attention: str | None

    def __str__(self) -> str:
        return self.way if self.attention is None else f"{self.way}+{self.attention}"


def way_of(text: str) -> Way:
    """Reads "graph", "layers+packed" and so on."""
    way, _, attention = text.partition("+")
    if way not in WAYS or (attention and attention not in ATTENTIONS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(WAYS)}, with or without one of +{', +'.join(ATTENTIONS)}"
        )
    return Way(way, attention or None)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--new", type=int, default=256, help="tokens that are generated")
    parser.add_argument("--batches", default="1,16,64", help="numbers of sequences that are decoded at a time")
    parser.add_argument(
        "--ways", type=lambda text: [way_of(each) for each in text.split(",")],
        default=[Way("graph", None), Way("layers", "products")], metavar="WAY[+ATTENTION],...",
        help="how; default: graph,layers+products: transformers' kernels in a CUDA graph, and compiled ones",
    )  # fmt: skip
    parser.add_argument("--per", type=int, default=4, help="decoder layers that are compiled together")
    parser.add_argument(
        "--inductor", type=json.loads, metavar="OPTIONS",
        help='of torch.compile; default: {"triton.enable_pdl": true} where torch has that; {} for none',
    )  # fmt: skip
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step, by their time")
    parser.add_argument("--seconds", type=float, help="begin no decoding after so many seconds of the run")


class Run(Protocol):
    """What of ``benchmarks.model.Run`` is used here."""

    options: argparse.Namespace
    device: torch.device
    ids: torch.Tensor
    found: dict[str, Any]
    tokens: dict[tuple[str, str, int], torch.Tensor]
    start: float

    def note(self, text: str) -> None: ...
    def seconds(self, call: Callable[[], Any]) -> tuple[float, Any]: ...
    def reset_peak(self) -> None: ...
    def peak_gb(self) -> float | None: ...
    def save(self) -> None: ...


def decode(run: Run, name: str, model: Any) -> None:
    """Times one model in every way, for each batch. A way that fails is recorded with its reason."""
    for way in run.options.ways:
        for batch in map(int, run.options.batches.split(",")):
            what = f"{name}, {way}, batch {batch}"
            limit = run.options.seconds
            if limit is not None and time.perf_counter() - run.start > limit:
                run.note(f"{what}: left out, --seconds {limit:g} are over")
                continue
            entry: dict[str, Any] = {"model": name, "way": str(way), "batch": batch}
            try:
                entry |= _measured(run, name, way, batch, model)
            except Exception as error:
                entry["problem"] = f"{type(error).__name__}: {str(error)[:500]}"
                run.note(f"{what}: failed, {entry['problem']}")
            else:
                faster = f", {entry['speed_up']:.2f} times bf16" if "speed_up" in entry else ""
                run.note(f"{what}: {entry['step_ms']:.3f} ms a step, {entry['tokens_per_s']:.0f} tokens/s{faster}")
            run.found["decode"].append(entry)
            run.save()


def _measured(run: Run, name: str, way: Way, batch: int, model: Any) -> dict[str, Any]:
    options, new = run.options, run.options.new
    prompt = run.ids[0, :PROMPT].repeat(batch, 1)
    prompt = (prompt + torch.arange(batch, device=run.device)[:, None]) % options.vocab
    run.reset_peak()
    torch.compiler.reset()  # what was compiled for another model
    on_gpu = run.device.type == "cuda"
    greedy = Greedy(
        model, batch, prompt.shape[1] + new, "eager" if way.way == "graph" and not on_gpu else way.way,
        options.backend, attention=way.attention, per=options.per, inductor=options.inductor,
    )  # fmt: skip
    prepare, _ = run.seconds(lambda: greedy.prepare(prompt))
    prefill, _ = run.seconds(lambda: greedy.generate(prompt, 1))
    seconds, tokens = run.seconds(lambda: greedy.generate(prompt, new))
    step_ms = 1e3 * (seconds - prefill) / max(1, new - 1)
    entry: dict[str, Any] = {
        "new": new, "prepare_seconds": prepare, "seconds": seconds, "prefill_seconds": prefill, "step_ms": step_ms,
        "tokens_per_s": batch * new / seconds, "peak_gb": run.peak_gb(),
    }  # fmt: skip
    mine = tokens[:, prompt.shape[1] :].cpu()
    run.tokens[name, str(way), batch] = mine
    reference = run.tokens.get((REFERENCE, str(way), batch))
    if reference is not None and name != REFERENCE:
        entry["tokens_as_bf16"] = float((mine == reference).int().cumprod(1).sum(1).float().mean())  # until one differs
        other = next(
            e for e in run.found["decode"] if (e["model"], e["way"], e["batch"]) == (REFERENCE, str(way), batch)
        )
        entry["speed_up"] = other["step_ms"] / step_ms
    if options.profile:
        greedy.generate(prompt, 1)
        entry |= kernels_of(run, greedy)
        if "kernels" in entry:
            count = sum(kernel["count"] for kernel in entry["kernels"])
            run.note(f"  {count} kernels, {sum(kernel['us'] for kernel in entry['kernels']):.0f} us; the longest:")
            for kernel in entry["kernels"][:LONGEST]:
                run.note(f"  {kernel['us']:9.1f} us {kernel['count']:5} x {kernel['name'][:100]}")
    return entry


def kernels_of(run: Run, greedy: Greedy) -> dict[str, Any]:
    """The kernels of one step, on a CPU its operators, or why there is no profile."""
    on_gpu = run.device.type == "cuda"
    try:
        with torch.profiler.profile(
            activities=[getattr(torch.profiler.ProfilerActivity, "CUDA" if on_gpu else "CPU")]
        ) as found:
            run.seconds(greedy.step)
        events = [
            {
                "name": event.key,
                "count": event.count,
                "us": event.self_device_time_total if on_gpu else event.self_cpu_time_total,
            }
            for event in found.key_averages()
        ]
    except Exception as error:
        return {"profile_problem": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"kernels": sorted((event for event in events if event["us"] > 0), key=lambda event: -event["us"])}
