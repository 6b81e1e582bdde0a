# SPDX-License-Identifier: Apache-2.0
"""save_prepacked and load_prepacked: the same model again, and a refusal of everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import BF16, FP16, Case, Toy, toy, write
from machete_aot import ahead
from machete_aot.errors import CheckpointError
from machete_aot.nn import MacheteLinear, load_prepacked, load_quantized, save_prepacked

safetensors = pytest.importorskip("safetensors")

IDS = torch.arange(12).view(2, 6) * 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("checkpoint")
    floating = toy(bias=True)
    write(folder, floating, Case("GPTQ", 4, 64, True, "integer"))
    return load_quantized(floating, folder, progress=False)


def meta_toy(**sizes: Any) -> Toy:
    with torch.device("meta"):
        return Toy(bias=True, **sizes).to(FP16)


def linears(model: torch.nn.Module) -> list[MacheteLinear]:
    return [module for module in model.modules() if isinstance(module, MacheteLinear)]


@pytest.mark.parametrize("shard_bytes", [1, 1 << 16, 1 << 30])
def test_round_trip(model: Toy, shard_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = save_prepacked(model, tmp_path / "new" / "folder", shard_bytes=shard_bytes)
    described = json.loads(index.read_text())
    assert described["layouts"] == {"n64k64-u4": 1} and described["aliases"] == {"lm_head.weight": "embed.weight"}
    files = set(described["tensors"].values())
    assert {path.name for path in index.parent.glob("*.safetensors")} == files
    assert len(files) == {1: len(described["tensors"]), 1 << 30: 1}.get(shard_bytes, len(files))
    other = load_prepacked(meta_toy(), index.parent)
    assert "loading: 100%" in capsys.readouterr().err
    assert torch.equal(other(IDS), model(IDS)) and other.lm_head.weight is other.embed.weight
    assert len(linears(other)) == 14
    again = load_prepacked(toy(bias=True), index.parent, progress=False)  # from a model that has values
    assert torch.equal(again(IDS), model(IDS))


def test_loading_makes_ready_for_the_first_product(model: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prepacked(model, tmp_path)
    told: list[tuple[bool, str, str]] = []
    monkeypatch.setattr(ahead, "prepare", lambda w, b_type, a: told.append((w.is_meta, b_type.name, a)))
    load_prepacked(meta_toy(), tmp_path, progress=False)
    assert set(told) == {(False, layer.b_type.name, "fp16") for layer in linears(model)} and len(told) == 14


def test_files_say_what_they_are(model: Toy, tmp_path: Path) -> None:
    save_prepacked(model, tmp_path)
    with safetensors.safe_open(str(tmp_path / "prepacked-00001.safetensors"), "pt") as file:
        assert file.metadata() == {
            "format": '"machete-aot-prepacked"', "format_version": "1", "layouts": '{"n64k64-u4": 1}'
        }  # fmt: skip


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "layout": (
        lambda index: index.update(layouts={"n64k64-u5": 1}),
        "in a layout that this machete-aot does not have.*\n  - n64k64-u5 version 1, here there are n64k64-u4",
    ),
    "version": (
        lambda index: index.update(layouts={"n64k64-u4": 2}),
        "prepack the original checkpoint again .*\n  - n64k64-u4 version 2, here version 1",
    ),
    "format": (lambda index: index.update(format="gguf"), "is of format gguf version 1; this machete-aot reads"),
    "format version": (lambda index: index.update(format_version=2), "version 2; this machete-aot reads .* version 1"),
    "another save": (
        lambda index: index.update(layouts={"n64k64-u8": 1}),
        "is not of the save that machete.json describes",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_formats_and_layouts_are_refused(model: Toy, name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    path = save_prepacked(model, tmp_path)
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    target = meta_toy()
    with pytest.raises(CheckpointError, match=message):
        load_prepacked(target, tmp_path, progress=False)
    assert isinstance(target.layers[0].mlp.up_proj, torch.nn.Linear)  # nothing was changed


def test_models_that_do_not_fit(model: Toy, tmp_path: Path) -> None:
    save_prepacked(model, tmp_path)
    target = meta_toy()
    target.register_buffer("more", torch.zeros(1))
    del target.steps
    with pytest.raises(CheckpointError) as caught:
        load_prepacked(target, tmp_path, progress=False)
    assert (caught.value.missing, caught.value.unexpected) == (("more",), ("steps",))
    with pytest.raises(CheckpointError, match=r"the model has no layers\.1\.self_attn\.q_proj, which was saved"):
        load_prepacked(meta_toy(layers=1), tmp_path, progress=False)


def test_an_interrupted_save_has_no_index(model: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prepacked(model, tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("machete_aot.nn.prepacked.write_tensors", fails)
    with pytest.raises(OSError, match="disk full"):
        save_prepacked(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no machete\.json"):
        load_prepacked(meta_toy(), tmp_path, progress=False)


def test_an_order_that_is_no_permutation(model: Toy, tmp_path: Path) -> None:
    save_prepacked(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith(".perm"))
    tensors[name][0] = tensors[name][1]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=f"{name} in .* is not a permutation of the layer's inputs"):
        load_prepacked(meta_toy(), tmp_path, progress=False)


def test_what_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is prepacked"):
        save_prepacked(toy(BF16), tmp_path)


def test_without_safetensors(model: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'machete-aot\[models\]'"):
        save_prepacked(model, tmp_path)
