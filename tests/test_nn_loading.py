# SPDX-License-Identifier: Apache-2.0
"""load_quantized: every format into a model, shards, ties and meta, memory, and everything that can be wrong."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import BF16, CONFIGS, FP16, Case, Toy, make, toy, write
from machete_aot.errors import ArgumentError, CheckpointError, DeviceError, UnsupportedError
from machete_aot.nn import MacheteLinear, load_quantized, parameters_on_meta, replace_hqq
from machete_aot.nn.checkpoint import Checkpoint
from machete_aot.nn.scheme import QuantizationConfig

pytest.importorskip("safetensors")

GPTQ = Case("GPTQ", 4, 64, False, "integer")
IDS = torch.arange(12).view(2, 6) * 7
CASES = [
    GPTQ,
    Case("GPTQ", 8, 128, True, "symmetric"),
    Case("GPTQ v2", 4, 32, True, "integer"),
    Case("AWQ", 4, 128, False, "integer"),
    Case("compressed-tensors", 4, 64, True, "integer"),
    Case("compressed-tensors", 8, -1, False, "symmetric"),
]


def meta_toy(dtype: torch.dtype = FP16, **sizes: Any) -> Toy:
    with torch.device("meta"):
        return Toy(**sizes).to(dtype)


def assert_same(model: torch.nn.Module, floating: torch.nn.Module, dtype: torch.dtype = FP16) -> None:
    """Logits of a loaded model and of the model with the same weights in floating point."""
    with torch.no_grad():
        found, wanted = model(IDS).double(), copy.deepcopy(floating).double()(IDS)
    limit = {BF16: 2e-2, FP16: 4e-3}[dtype]
    assert float((found - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits(case: Case, files: int, tmp_path: Path) -> None:
    floating = toy(bias=files == 3)
    write(tmp_path, floating, case, files=files)
    model = load_quantized(meta_toy(bias=files == 3), tmp_path, progress=False)
    quantised = [name for name, module in model.named_modules() if isinstance(module, MacheteLinear)]
    assert len(quantised) == 14 and "lm_head" not in quantised
    assert model.lm_head.weight is model.embed.weight
    assert_same(model, floating)


def test_a_model_that_is_not_on_meta_and_another_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    floating = toy(BF16)
    write(tmp_path, floating, GPTQ)
    model = toy(BF16)
    model.embed.weight.requires_grad_(False)
    assert load_quantized(model, str(tmp_path), device="cpu") is model
    assert "loading: 100%" in capsys.readouterr().err
    assert_same(model, floating, BF16)
    assert not model.embed.weight.requires_grad and model.layers[0].norm.weight.requires_grad
    load_quantized(toy(BF16), tmp_path, progress=False)
    assert capsys.readouterr().err == ""


def test_memory_beyond_the_model_is_about_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, toy(layers=6), GPTQ, files=2)
    alive: dict[int, int] = {}
    most = 0

    def tensor(self: Checkpoint, name: str, read: Callable[..., torch.Tensor] = Checkpoint.tensor) -> torch.Tensor:
        nonlocal most
        found = read(self, name)
        if "qweight" in name:  # what is kept of the others is the model's
            alive[id(found)] = found.nbytes
            weakref.finalize(found, alive.pop, id(found))
            most = max(most, sum(alive.values()))
        return found

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    load_quantized(meta_toy(layers=6), tmp_path, progress=False)
    assert most == 128 * 256 // 2 and not alive


def test_files_are_read_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floating = toy(layers=4)
    write(tmp_path, floating, GPTQ, files=3, in_turn=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    read: list[str] = []
    opened: list[int] = []

    def tensor(self: Checkpoint, name: str, get: Callable[..., torch.Tensor] = Checkpoint.tensor) -> torch.Tensor:
        found = get(self, name)
        read.append(index[name])
        opened.append(len(self._open))
        return found

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    load_quantized(meta_toy(layers=4), tmp_path, progress=False)
    assert len(read) == len(index)
    changes = sum(before != after for before, after in pairwise(read))
    assert changes <= 2 + 2 * 2  # and a module that is in two files
    assert opened[-1] == 1 and max(opened[len(read) // 2 :]) <= 2


def damaged(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], **options: Any) -> CheckpointError:
    write(tmp_path, toy(), GPTQ, change=change)
    model = meta_toy()
    with pytest.raises(CheckpointError) as caught:
        load_quantized(model, tmp_path, progress=False, **options)
    return caught.value


def test_all_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.0.self_attn.q_proj.scales"], tensors["layers.1.norm.weight"], tensors["steps"]
        tensors["layers.7.self_attn.q_proj.qweight"] = torch.zeros(1)
        tensors["extra"] = torch.zeros(1)
        tensors["model.rotary_emb.inv_freq"] = torch.zeros(1)  # computed, and so not looked at

    error = damaged(tmp_path, change)
    assert error.missing == ("layers.0.self_attn.q_proj.scales", "layers.1.norm.weight", "steps")
    assert error.unexpected == ("extra", "layers.7.self_attn.q_proj.qweight")
    assert "3 tensors are missing, 2 unexpected" in str(error)
    assert "\n  - missing: steps" in str(error) and "\n  - unexpected: extra" in str(error)


def test_unexpected_tensors_may_be_left_out(tmp_path: Path) -> None:
    floating = toy()
    write(tmp_path, floating, GPTQ, change=lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert_same(load_quantized(meta_toy(), tmp_path, progress=False, strict=False), floating)


def test_a_missing_bias(tmp_path: Path) -> None:
    write(tmp_path, toy(bias=True), GPTQ, change=lambda tensors: tensors.__delitem__("layers.0.self_attn.q_proj.bias"))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(meta_toy(bias=True), tmp_path, progress=False)
    assert caught.value.missing == ("layers.0.self_attn.q_proj.bias",)


def test_a_layer_of_another_size_is_named(tmp_path: Path) -> None:
    def other(tensors: dict[str, torch.Tensor]) -> None:
        layer = make(GPTQ, 64, 256)
        tensors.update({f"layers.1.mlp.down_proj.{part}": value for part, value in layer.tensors.items()})

    assert "layers.1.mlp.down_proj is (64, 256) in the checkpoint and (128, 256) in the model" in str(
        damaged(tmp_path, other)
    )

    def inconsistent(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.mlp.up_proj.scales"] = torch.zeros(5, 256)

    assert "layers.0.mlp.up_proj: qzeros must have shape (5, 32)" in str(damaged(tmp_path, inconsistent))

    def embedding(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(n for n in tensors if n in ("embed.weight", "lm_head.weight"))] = torch.zeros(95, 128)

    assert "is (95, 128) in the checkpoint and (96, 128) in the model" in str(damaged(tmp_path, embedding))


def test_rules_and_tensors_must_agree(tmp_path: Path) -> None:
    write(tmp_path, toy(), GPTQ)
    config = {**CONFIGS["GPTQ"](GPTQ), "modules_to_not_convert": ["mlp"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(CheckpointError) as caught:
        load_quantized(meta_toy(), tmp_path, progress=False)
    assert len(caught.value.problems) == 6
    assert "layers.0.mlp.down_proj is quantised in the checkpoint, but its quantization_config leaves it out" in str(
        caught.value
    )
    model = meta_toy()
    model.layers[0].mlp = torch.nn.ModuleDict({n: torch.nn.Identity() for n in ("gate_proj", "up_proj", "down_proj")})
    with pytest.raises(
        CheckpointError, match=r"mlp\.gate_proj is quantised in the checkpoint but is a Identity in the"
    ):
        load_quantized(model, tmp_path, progress=False)


def test_models_of_another_dtype_are_refused(tmp_path: Path) -> None:
    write(tmp_path, toy(), GPTQ)
    with pytest.raises(ArgumentError, match=r"is torch\.float32 in the model; make it with dtype=torch\.bfloat16"):
        load_quantized(Toy(), tmp_path, progress=False)


class Rotary(torch.nn.Module):
    """As Hugging Face's rotary embeddings: a buffer that no state has, made from a config."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", torch.arange(config["size"]) / config["size"], persistent=False)


def test_buffers_on_meta_are_computed_again(tmp_path: Path) -> None:
    floating = toy()
    write(tmp_path, floating, GPTQ)
    with torch.device("meta"):
        model = Toy().to(FP16)
        model.rotary = Rotary({"size": 4})
    load_quantized(model, tmp_path, progress=False)
    assert torch.equal(model.rotary.inv_freq, torch.arange(4) / 4)
    with torch.device("meta"):
        model = Toy().to(FP16)
        model.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(CheckpointError) as caught:
        load_quantized(model, tmp_path, progress=False)
    assert caught.value.missing == ("table",) and "under machete_aot.nn.parameters_on_meta()" in str(caught.value)


def test_parameters_alone_on_meta(tmp_path: Path) -> None:
    floating = toy()
    write(tmp_path, floating, GPTQ)
    register = torch.nn.Module.register_parameter
    with parameters_on_meta():
        model = Toy().to(FP16)
        model.register_buffer("table", torch.arange(3), persistent=False)
    assert torch.nn.Module.register_parameter is register
    assert all(parameter.is_meta for parameter in model.parameters()) and not model.steps.is_meta
    assert model.lm_head.weight is model.embed.weight
    assert_same(load_quantized(model, tmp_path, progress=False), floating)
    assert model.table.tolist() == [0, 1, 2]


def test_incomplete_folders(tmp_path: Path) -> None:
    def fails(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_quantized(meta_toy(), tmp_path, progress=False)

    fails(r"has no config\.json")
    (tmp_path / "config.json").write_text("{}")
    fails(r"config\.json has no quantization_config: .* is not quantised")
    (tmp_path / "config.json").write_text("[]")
    fails("must hold a JSON object")
    (tmp_path / "config.json").write_text("{")
    fails("is not JSON")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CONFIGS["GPTQ"](GPTQ)}))
    fails(r"has 0 safetensors files and no model\.safetensors\.index\.json")
    write(tmp_path, toy(), GPTQ, files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    fails(r"incomplete\n  - model-00002-of-00003\.safetensors is not there")
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    fails("is no intact safetensors file")
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    fails("is no name of a file")
    index = {"weight_map": {"a": "model-00001-of-00003.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="its files lack") as caught:
        load_quantized(meta_toy(), tmp_path, progress=False)
    assert caught.value.missing == ("a",)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    fails("has no weight_map")


def config(method: str, **changes: Any) -> QuantizationConfig:
    case = Case(method, 4, 128, False, "symmetric")
    return QuantizationConfig({**CONFIGS[method](case), **changes})


def test_rules_of_gptq() -> None:
    dynamic = {"+:.*\\.down_proj": {"bits": 8, "group_size": 64, "sym": False}, "-:.*\\.layers\\.1\\.": {}}
    rules = config("GPTQ", dynamic=dynamic)
    down = rules.scheme("model.layers.0.mlp.down_proj")
    assert (down.bits, down.group_size, down.symmetric, down.version) == (8, 64, False, 1)
    plain = rules.scheme("model.layers.0.mlp.up_proj")
    assert (plain.bits, plain.group_size, plain.symmetric) == (4, 128, True)
    assert rules.excludes("model.layers.1.mlp.up_proj") and not rules.excludes("model.layers.0.mlp.up_proj")
    assert rules.excludes("lm_head")
    assert not config("GPTQ", lm_head=True).excludes("lm_head")
    assert config("GPTQ", checkpoint_format="gptq_v2").scheme("x").version == 2


def test_rules_of_awq() -> None:
    rules = config("AWQ", modules_to_not_convert=["visual", "mlp.gate"])
    assert rules.excludes("visual.blocks.0.q") and rules.excludes("model.layers.0.mlp.gate")
    assert not rules.excludes("model.layers.0.mlp.gate_proj")
    old = QuantizationConfig({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"})
    assert old.scheme("x").group_size == 64


def test_rules_of_compressed_tensors() -> None:
    def group(targets: list[str], **weights: Any) -> dict[str, Any]:
        return {"targets": targets, "weights": {"num_bits": 4, "type": "int", "strategy": "channel", **weights}}

    groups = {
        "a": group(["Linear"]),
        "b": group(["re:.*down_proj"], num_bits=8),
        "c": group(["model.layers.0.mlp.up_proj"], strategy="group", group_size=32),
    }
    rules = config("compressed-tensors", config_groups=groups, ignore=["lm_head", "re:.*router$"])
    assert rules.scheme("model.layers.3.mlp.down_proj").bits == 8
    assert rules.scheme("model.layers.0.mlp.up_proj").group_size == 32
    assert rules.scheme("model.layers.1.mlp.up_proj").group_size == -1
    assert rules.excludes("model.layers.0.router") and rules.excludes("lm_head") and not rules.excludes("model.x")
    with pytest.raises(CheckpointError, match="no rule of its quantization_config covers it"):
        config("compressed-tensors", config_groups={"b": groups["b"]}).scheme("x")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "GPTQ",
            {"quant_method": "bitsandbytes"},
            "quant_method 'bitsandbytes'; there are gptq, awq, compressed-tensors",
        ),
        ("GPTQ", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("AWQ", {"version": "gemv"}, "version 'gemv'; only gemm is read"),
        ("compressed-tensors", {"format": "float-quantized"}, "only integers of format pack-quantized"),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
            "quantises activations too",
        ),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "block"}}}},
            "strategy 'block'",
        ),
    ],
)
def test_methods_that_are_not_read(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        config(method, **changes)


def test_quantize_config_of_older_gptq_checkpoints(tmp_path: Path) -> None:
    floating = toy()
    write(tmp_path, floating, GPTQ)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False}))
    assert_same(load_quantized(meta_toy(), tmp_path, progress=False), floating)


class HqqLayer(torch.nn.Module):
    """What replace_hqq knows of an HQQ layer."""

    def __init__(self, linear: torch.nn.Linear, seed: int) -> None:
        super().__init__()
        stored = make(Case("HQQ", 4, 64, False, "floating"), linear.out_features, linear.in_features, seed)
        self.W_q = torch.nn.Parameter(stored.tensors["W_q"], requires_grad=False)
        self.meta, self.bias = stored.options["meta"], None
        linear.weight.data = stored.weights(linear.weight.dtype).t()


def test_replace_hqq() -> None:
    floating = toy()
    model = copy.deepcopy(floating)
    for seed, (name, module) in enumerate(floating.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, HqqLayer(module, seed))
    assert replace_hqq(model, FP16) is model
    assert sum(isinstance(module, MacheteLinear) for module in model.modules()) == 14
    assert_same(model, floating)
    model.layers[0].mlp.up_proj = HqqLayer(torch.nn.Linear(128, 256), 0)
    model.layers[0].mlp.up_proj.meta["axis"] = 0
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj: HQQ groups along axis 0"):
        replace_hqq(model)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder TheBloke/Llama-2-7B-GPTQ; .*snapshot_download"):
        QuantizationConfig.find("TheBloke/Llama-2-7B-GPTQ")
    with pytest.raises(CheckpointError, match=r"has no config\.json; wanted the folder of a GPTQ"):
        QuantizationConfig.find(tmp_path)
    (tmp_path / "machete.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was written by save_prepacked; read it with load_prepacked"):
        QuantizationConfig.find(tmp_path)


def test_a_model_without_hqq_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the model has no HQQ layers"):
        replace_hqq(toy(layers=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_gpu_that_torch_does_not_see(tmp_path: Path) -> None:
    write(tmp_path, toy(layers=1), Case("GPTQ", 4, 64, False, "symmetric"))
    with pytest.raises(DeviceError, match=r'torch sees no GPU; .* pass device="cpu"'):
        load_quantized(toy(layers=1), tmp_path, device="cuda")
