# SPDX-License-Identifier: Apache-2.0
"""What each rank of gpu/test_parallel_gpu.py does: shard layers of real sizes, compare with those that are not sharded.

On GPUs through NCCL, in a CUDA graph too; test_nn_parallel.py runs the same with small sizes on the CPU through gloo.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from checkpoints import BF16, Case, Toy, make, toy
from machete_aot.nn import ColumnParallel, MacheteLinear, RowParallel, fuse

CASES = [Case("GPTQ", 4, 128, False, "symmetric"), Case("GPTQ", 4, 64, False, "integer")]
TOKENS = (1, 16, 200)
LIMIT = 4e-3  # of the norm: each rank rounds its part to bf16, and so does the sum
REPLAYS = 3


def run(rank: int, ranks: int, folder: str, kind: str) -> None:
    """All checks of one rank on a "cuda" or "cpu" device; what it raises is written into the folder, for the parent."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast, which two GPUs do not need and some hosts forbid
    try:
        if kind == "cuda":
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=30),
        )  # fmt: skip
        mesh = init_device_mesh(kind, (ranks,))
        device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
        for case in CASES:
            layers(mesh, rank, ranks, device, case)
        decoder(mesh, rank, ranks, device, CASES[0])
        dist.destroy_process_group()
        Path(folder, f"done-{rank}").touch()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise


def linear(case: Case, n: int, k: int, device: torch.device, seed: int = 0) -> MacheteLinear:
    stored = make(case, n, k, seed)
    tensors = {name: tensor.to(device) for name, tensor in stored.tensors.items()}
    return MacheteLinear.from_gptq(**tensors, **stored.options, dtype=BF16)


def random(shape: tuple[int, ...], device: torch.device, seed: int) -> torch.Tensor:
    """The same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, BF16)


def check(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, (what, found.shape, found.dtype)
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    assert error < LIMIT, f"{what}: {error:.2g} of the norm from the layer that is not sharded"


def same_everywhere(found: torch.Tensor, ranks: int, what: str) -> None:
    with torch.inference_mode(False):  # as in machete_aot/nn/parallel.py
        others = [torch.empty_like(found) for _ in range(ranks)]
    dist.all_gather(others, found.contiguous())
    assert all(torch.equal(other, found) for other in others), f"{what}: ranks have different results"


@torch.inference_mode()
def layers(mesh: DeviceMesh, rank: int, ranks: int, device: torch.device, case: Case) -> None:
    """One layer cut along N and along K, with and without the collectives, alone and in a CUDA graph."""
    hidden, inner = (4096, 14336) if device.type == "cuda" else (128, 256)
    up, down = linear(case, inner, hidden, device), linear(case, hidden, inner, device, 1)
    for style in (ColumnParallel(), ColumnParallel(gather_output=True)):
        part = parallelize_module(copy.deepcopy(up), mesh, style)
        for m in TOKENS:
            x, what = random((m, hidden), device, m), f"{case}, {type(style).__name__}, M = {m}"
            wanted = up(x)
            if style.gather_output:
                check(part(x), wanted, what)
                same_everywhere(part(x), ranks, what)
            else:
                check(part(x), wanted.chunk(ranks, dim=-1)[rank], what)
    for style in (RowParallel(input_is_parallel=False), RowParallel(reduce_dtype=torch.float32)):
        part = parallelize_module(copy.deepcopy(down), mesh, style)
        for m in TOKENS:
            x, what = random((m, inner), device, m), f"{case}, {type(style).__name__}, M = {m}"
            mine = x.chunk(ranks, dim=-1)[rank].contiguous() if style.input_is_parallel else x
            check(part(mine), down(x), what)
            same_everywhere(part(mine), ranks, what)
    gathered = parallelize_module(copy.deepcopy(up), mesh, ColumnParallel(gather_output=True))
    in_a_graph(gathered, up, lambda seed: random((16, hidden), device, seed), f"{case}, gathered")


@torch.inference_mode()
def decoder(mesh: DeviceMesh, rank: int, ranks: int, device: torch.device, case: Case) -> None:
    """A decoder with its heads divided among the ranks, fused, in one CUDA graph."""
    hidden, inner, heads = (2048, 5632, 16) if device.type == "cuda" else (128 * ranks, 128 * ranks, 2 * ranks)
    model: Toy = toy(BF16, hidden=hidden, inner=inner, heads=heads, layers=2)
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            layer = linear(case, module.out_features, module.in_features, device, seed)
            setattr(model.get_submodule(parent), leaf, layer)
    model.to(device)
    part = copy.deepcopy(model)
    plan: dict[str, Any] = {f"layers.*.self_attn.{name}_proj": ColumnParallel() for name in "qkv"}
    plan |= {f"layers.*.mlp.{name}_proj": ColumnParallel() for name in ("gate", "up")}
    plan |= {"layers.*.self_attn.o_proj": RowParallel(), "layers.*.mlp.down_proj": RowParallel()}
    parallelize_module(part, mesh, plan)
    assert len(fuse(part).merged) == 4 and len(fuse(model).merged) == 4

    def ids(seed: int) -> torch.Tensor:
        return torch.randint(96, (2, 6), generator=torch.Generator().manual_seed(seed)).to(device)

    check_model(part(ids(0)), model(ids(0)))
    same_everywhere(part(ids(0)), ranks, "decoder")
    in_a_graph(part, model, ids, "decoder", check_model)


def check_model(found: torch.Tensor, wanted: torch.Tensor, what: str = "decoder") -> None:
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    assert error < 5 * LIMIT, f"{what}: {error:.2g} of the norm from the model that is not sharded"


def in_a_graph(
    part: Callable[[torch.Tensor], torch.Tensor],
    whole: Callable[[torch.Tensor], torch.Tensor],
    make_input: Callable[[int], torch.Tensor],
    what: str,
    compare: Callable[[torch.Tensor, torch.Tensor, str], None] = check,
) -> None:
    """Captures ``part`` and replays it with other inputs; collectives are captured with the products."""
    x = make_input(0)
    if x.device.type != "cuda":
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        part(x)  # kernels cannot be loaded, nor ranks connected, while a graph is captured
    torch.cuda.current_stream().wait_stream(stream)
    dist.barrier()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog thread may ask for the state of an event meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = part(x)
    for seed in range(1, 1 + REPLAYS):
        x.copy_(make_input(seed))
        found.zero_()
        graph.replay()
        compare(found, whole(x), f"{what}, in a graph")
    torch.cuda.synchronize()
    dist.barrier()
