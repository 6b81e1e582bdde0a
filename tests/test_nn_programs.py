# SPDX-License-Identifier: Apache-2.0
"""The programs that run a whole Hugging Face model: the example, and the benchmark at a size for the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")
if not transformers.utils.is_torch_available():
    pytest.skip(f"transformers {transformers.__version__} does not work with this torch", allow_module_level=True)


@pytest.mark.parametrize(("form", "more"), [("gptq", []), ("awq", ["--skip-compile"])])
def test_example(form: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from examples import generate

    sizes = ["--hidden", "128", "--layers", "1", "--tokens", "4", "--batch", "1", "--group", "64"]
    assert generate.main(["--format", form, *sizes, *more]) == 0
    printed = capsys.readouterr().out
    assert "2 merged, 0 not" in printed and "all ways give the same tokens" in printed
    assert ("choices of the dequantised model against those of layers" in printed) == (not more)


def test_benchmark_of_a_model(tmp_path: Path) -> None:
    from benchmarks import model

    out = tmp_path / "model.json"
    sizes = "--layers 1 --hidden 128 --intermediate 256 --heads 2 --kv-heads 1 --vocab 96 --positions 64"
    parts = (
        "--new 2 --batches 1 --skip-act-order --skip-unfused --ways graph,layers+packed --backend aot_eager --profile"
    )
    assert model.main([*sizes.split(), *parts.split(), "--out", str(out), "--folder", str(tmp_path)]) == 0
    found = json.loads(out.read_text())
    assert set(found["formats"]) == {"gptq", "awq"}
    for form in found["formats"].values():
        for logits, limit in ((form["logits"], 0.01), (form["logits_fused"], 0.02)):
            assert logits["to_bf16"]["relative_norm"] < limit and logits["to_bf16"]["different_choices"] > 32
            # as far from the model in fp32 as the bf16 model is, or nearer
            assert 0 < logits["to_fp32"]["relative_norm"] < 1.2 * form["logits_bf16"]["relative_norm"] < 0.02
        assert form["fuse"]["merged"] == 2 and form["load"]["packed_gb"] > 0
    assert [(entry["model"], entry["way"]) for entry in found["decode"]] == [
        (name, way) for name in ("bf16", "gptq, fused", "awq, fused") for way in ("graph", "layers+packed")
    ]
    assert not any("problem" in entry for entry in found["decode"])
    assert all(entry["kernels"][0]["us"] >= entry["kernels"][-1]["us"] > 0 for entry in found["decode"])
    for entry in found["decode"]:  # the operator is called where torch compiles
        names = [kernel["name"] for kernel in entry["kernels"]]
        assert ("machete_aot::gemm" in names) == (entry["model"] != "bf16" and entry["way"] != "graph")
    assert all(("speed_up" in entry) == (entry["model"] != "bf16") for entry in found["decode"])
    assert list(tmp_path.iterdir()) == [out]


def test_benchmark_of_ways_that_fail_or_come_too_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A way that fails is recorded with its reason, and the others are measured."""
    from benchmarks import model

    out = tmp_path / "model.json"
    sizes = "--layers 1 --hidden 128 --intermediate 256 --heads 2 --kv-heads 1 --vocab 96 --positions 64"
    parts = "--new 2 --batches 1 --skip-act-order --skip-unfused --skip-gptq --skip-logits --ways layers,graph"
    always = [*sizes.split(), *parts.split(), "--out", str(out), "--folder", str(tmp_path)]
    assert model.main([*always, "--backend", "no_such_backend"]) == 0
    decoded = json.loads(out.read_text())["decode"]
    assert [entry["way"] for entry in decoded if "no_such_backend" in entry.get("problem", "")] == 2 * ["layers"]
    assert [entry["way"] for entry in decoded if "step_ms" in entry] == 2 * ["graph"]
    assert model.main([*always, "--seconds", "0"]) == 0
    assert json.loads(out.read_text())["decode"] == []
    assert "awq, fused, graph, batch 1: left out, --seconds 0 are over" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        model.main(["--ways", "graph+fast"])
