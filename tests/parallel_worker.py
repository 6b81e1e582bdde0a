# SPDX-License-Identifier: Apache-2.0
"""What each rank of test_nn_parallel.py does: shard layers, multiply, compare with the layer that was not sharded."""

from __future__ import annotations

import copy
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from checkpoints import FP16, Case, make, toy
from machete_aot.errors import CheckpointError, MacheteError
from machete_aot.nn import ColumnParallel, MacheteLinear, RowParallel, fuse, save_prepacked
from machete_aot.nn.fuse import merge_gate_up

ULP = 2.0**-11


def layer(case: Case, n: int, k: int, seed: int = 0, bias: bool = True) -> MacheteLinear:
    stored = make(case, n, k, seed)
    extra = torch.randn(n, generator=torch.Generator().manual_seed(seed)) if bias else None
    return MacheteLinear.from_gptq(**stored.tensors, **stored.options, bias=extra, dtype=FP16)


def run(rank: int, ranks: int, folder: str) -> None:
    """All checks of one rank; what it raises is written into the folder, for the parent."""
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        torch.set_num_threads(1)
        mesh = init_device_mesh("cpu", (ranks,))
        for check in (columns, pairs, rows, block, ordered_block, models, mistakes):
            check(mesh, rank, ranks)
        dist.destroy_process_group()
        Path(folder, f"done-{rank}").touch()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise


def columns(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """Bitwise: each output is computed as before."""
    for case in (Case("GPTQ", 4, 64, True, "integer"), Case("GPTQ", 8, -1, False, "symmetric")):
        whole = layer(case, 64 * ranks, 128)
        x = torch.randn(3, 2, 128, generator=torch.Generator().manual_seed(1)).to(FP16)
        expected = whole(x)
        part = parallelize_module(copy.deepcopy(whole), mesh, ColumnParallel())
        assert torch.equal(part(x), expected[..., 64 * rank : 64 * (rank + 1)])
        assert part.qweight.shape[0] == 1 and part.out_features == 64
        gathered = parallelize_module(copy.deepcopy(whole), mesh, ColumnParallel(gather_output=True))
        assert torch.equal(gathered(x), expected)
    assert part.is_part and gathered.is_part and not whole.is_part
    refused(lambda: save_prepacked(torch.nn.Sequential(part), "nowhere"), RuntimeError, "hold one rank's part")
    uneven = layer(Case("GPTQ", 4, 64, False, "integer"), 64 * ranks + 40, 128)
    expected = uneven(x)
    part = parallelize_module(copy.deepcopy(uneven), mesh, ColumnParallel(gather_output=True, uneven=True))
    assert torch.equal(part(x), expected)
    assert part.out_features == (104 if rank == ranks - 1 else 64)


def pairs(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """A layer cut along N and one cut along K behind it, where the size has no even cut: at the same places."""
    case, middle = Case("GPTQ", 4, 128, False, "integer"), 128 * ranks + 64
    first, second = layer(case, middle, 128), layer(case, 64, middle)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(3)).to(FP16) / 8
    expected = second(first(x))
    parts = torch.nn.Sequential(copy.deepcopy(first), copy.deepcopy(second))
    plan = {"0": ColumnParallel(uneven=True, multiple=128), "1": RowParallel(uneven=True)}
    parallelize_module(parts, mesh, plan)
    assert parts[0].out_features == parts[1].in_features == (192 if rank == ranks - 1 else 128)
    error = float((parts(x).double() - expected.double()).norm() / expected.double().norm())
    assert error < 2e-3, error
    halves = [layer(case, middle, 128, seed, bias=False) for seed in (1, 2)]
    both = parallelize_module(merge_gate_up(*halves), mesh, ColumnParallel(uneven=True, multiple=64))
    assert both.out_features == parts[0].out_features  # counted in outputs, each of two columns
    refused(lambda: ColumnParallel(multiple=96), ValueError, "a positive multiple of 64")


def rows(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    for group, unit in ((64, 64), (128, 128), (-1, 64), (96, 192)):
        for uneven in (False, True):
            k = unit * ranks + (unit if uneven else 0)
            whole = layer(Case("GPTQ", 4, group, False, "integer"), 80, k)
            x = torch.randn(5, k, generator=torch.Generator().manual_seed(2)).to(FP16)
            expected = whole(x)
            for options in ({}, {"reduce_dtype": torch.float32}):
                style = RowParallel(input_is_parallel=False, uneven=uneven, **options)
                part = parallelize_module(copy.deepcopy(whole), mesh, style)
                found = part(x)
                assert found.dtype == FP16 and (part.bias is None) == (rank > 0)
                size = float(expected.float().abs().max())
                steps = 1 if options else ranks + 2  # one rounding, or each rank's and those of the sum
                assert float((found.float() - expected.float()).abs().max()) <= steps * ULP * size
                others = [torch.empty_like(found) for _ in range(ranks)]
                dist.all_gather(others, found)
                assert all(torch.equal(other, found) for other in others)


def block(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """A gated MLP cut both ways, before and after its first products are fused."""
    case = Case("GPTQ", 4, 64, False, "integer")
    mlp = toy(hidden=128, inner=64 * ranks).layers[0].mlp
    for seed, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        linear = getattr(mlp, name)
        setattr(mlp, name, layer(case, linear.out_features, linear.in_features, seed, bias=False))
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3)).to(FP16)
    expected = mlp(x).float()
    plan = {"gate_proj": ColumnParallel(), "up_proj": ColumnParallel(), "down_proj": RowParallel()}
    holder = torch.nn.ModuleDict({"mlp": copy.deepcopy(mlp)})
    parallelize_module(holder["mlp"], mesh, plan)
    found = holder["mlp"](x).float()
    assert float((found - expected).norm()) < 4e-3 * float(expected.norm())
    assert fuse(holder).merged == ["mlp.gate_up_proj"]
    found = holder["mlp"](x).float()
    assert float((found - expected).norm()) < 4e-3 * float(expected.norm())
    fused = torch.nn.ModuleDict({"mlp": copy.deepcopy(mlp)})
    fuse(fused)
    parallelize_module(fused, mesh, {"mlp.gate_up_proj": ColumnParallel(), "mlp.down_proj": RowParallel()})
    assert fused["mlp"].gate_up_proj.out_features == 64
    found = fused["mlp"](x).float()
    assert float((found - expected).norm()) < 4e-3 * float(expected.norm())


def ordered_block(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """A gated MLP with act-order: once it is fused, its second product has none and can be cut along K."""
    case = Case("GPTQ", 4, 64, True, "integer")
    holder = torch.nn.ModuleDict({"mlp": toy(hidden=128, inner=64 * ranks).layers[0].mlp})
    for name, seed in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        linear = getattr(holder["mlp"], name)
        setattr(holder["mlp"], name, layer(case, linear.out_features, linear.in_features, seed, bias=False))
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3)).to(FP16)
    expected = holder["mlp"](x).float()
    assert fuse(holder).reordered == ["mlp.gate_up_proj"]
    parallelize_module(holder, mesh, {"mlp.gate_up_proj": ColumnParallel(), "mlp.down_proj": RowParallel()})
    found = holder["mlp"](x).float()
    assert float((found - expected).norm()) < 4e-3 * float(expected.norm())


def models(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """A decoder with its heads divided among the ranks, by a plan with wildcards."""
    case = Case("GPTQ", 4, 64, False, "symmetric")
    model = toy(hidden=64 * ranks, inner=64 * ranks, heads=2 * ranks)
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(parent), leaf, layer(case, module.out_features, module.in_features, seed, False)
            )
    ids = torch.arange(6).view(1, 6)
    expected = model(ids).float()
    plan: dict[str, Any] = {f"layers.*.self_attn.{name}_proj": ColumnParallel() for name in "qkv"}
    plan |= {f"layers.*.mlp.{name}_proj": ColumnParallel() for name in ("gate", "up")}
    plan |= {"layers.*.self_attn.o_proj": RowParallel(), "layers.*.mlp.down_proj": RowParallel()}
    parallelize_module(model, mesh, plan)
    assert len(fuse(model).merged) == 4
    found = model(ids).float()
    assert float((found - expected).norm()) < 6e-3 * float(expected.norm())
    refused(lambda: save_prepacked(model, "nowhere"), CheckpointError, "hold one rank's part")


def refused(call: Any, error: type[Exception], message: str) -> None:
    try:
        call()
    except error as found:
        assert isinstance(found, MacheteError) and message in str(found), found
    else:
        raise AssertionError(f"{message}: not raised")


def mistakes(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    order, plain = Case("GPTQ", 4, 64, True, "integer"), Case("GPTQ", 4, 64, False, "integer")

    def apply(module: torch.nn.Module, style: Any) -> Any:
        return lambda: parallelize_module(module, mesh, style)

    size = 64 * ranks
    refused(apply(layer(order, 64, size), RowParallel()), NotImplementedError, "act-order cannot be cut along K")
    refused(apply(layer(plain, 64, size + 64), RowParallel()), NotImplementedError, "cannot be cut evenly")
    refused(apply(layer(plain, size + 8, 64), ColumnParallel()), NotImplementedError, f"no multiple of {size}")
    few = layer(plain, 64, 64)
    refused(apply(few, ColumnParallel(uneven=True)), NotImplementedError, f"has 1 units of 64, fewer than {ranks}")
    refused(apply(torch.nn.Linear(8, 8), ColumnParallel()), ValueError, "use torch's ColwiseParallel")
    refused(lambda: RowParallel(reduce_dtype=FP16), ValueError, "reduce_dtype must be None or torch.float32")
    part = parallelize_module(layer(plain, 64, size), mesh, RowParallel())
    refused(apply(part, RowParallel()), ValueError, "one rank's part already")
    attention = toy(layers=1).layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, layer(plain, 128, 128))
    fuse(attention)
    refused(apply(attention.q_proj, ColumnParallel()), NotImplementedError, "call parallelize_module before fuse")
