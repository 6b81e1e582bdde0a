# SPDX-License-Identifier: Apache-2.0
"""Importing the package: needs no driver, starts no CUDA, writes no file, and gives the names that it promises."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import machete_aot

NAMES = {
    *("u4b8", "u8b128", "u4", "u8", "ScalarType", "prepack_b", "unpack_b", "gemm", "reference", "supported_schedules"),
    *("fetch_bundle", "use_bundle", "warmup", "explain", "set_overlap", "__version__", "MacheteError", "ArgumentError"),
    *("UnsupportedError", "DeviceError", "DriverCallError", "CaptureError", "BundleError"),
}


def python(code: str, tmp_path: Path, **environment: str) -> str:
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")}
    root = str(Path(machete_aot.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, keep.get("PYTHONPATH")]))
    environment = {**keep, "PYTHONPATH": path, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_promised_names() -> None:
    assert set(machete_aot.__all__) >= NAMES
    for name in machete_aot.__all__:
        assert hasattr(machete_aot, name)
    assert callable(machete_aot.gemm)
    assert inspect.ismodule(machete_aot.reference)
    assert callable(machete_aot.reference.gemm)


def test_layers_are_imported_when_they_are_asked_for(tmp_path: Path) -> None:
    code = """
import sys, machete_aot
assert not any(name.startswith("machete_aot.nn") for name in sys.modules)
assert machete_aot.nn.MacheteLinear is sys.modules["machete_aot.nn"].MacheteLinear
try:
    machete_aot.no_such_name
except AttributeError as error:
    print(error)
"""
    assert python(code, tmp_path) == "module 'machete_aot' has no attribute 'no_such_name'\n"


def test_signatures() -> None:
    parameters = inspect.signature(machete_aot.gemm).parameters
    assert list(parameters) == [
        "a", "b", "b_type", "b_scales", "b_zeros", "b_group_size", "bias", "out", "schedule", "overlap",
        "batch_invariant", "channel_scales", "token_scales", "activation", "out_dtype",
    ]  # fmt: skip
    assert list(inspect.signature(machete_aot.reference.gemm).parameters) == list(parameters)
    for name in ("channel_scales", "token_scales", "activation", "out_dtype"):
        assert (parameters[name].kind, parameters[name].default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert parameters["b_group_size"].default == 128
    for call in (machete_aot.gemm, machete_aot.reference.gemm, machete_aot.warmup, machete_aot.explain):
        added = inspect.signature(call).parameters["batch_invariant"]
        assert (added.kind, added.default) == (inspect.Parameter.KEYWORD_ONLY, False)
    assert list(inspect.signature(machete_aot.supported_schedules).parameters) == [
        "a_dtype", "b_type", "b_group_size", "with_zeros"
    ]  # fmt: skip


def test_import_touches_no_driver(tmp_path: Path) -> None:
    code = """
import sys, torch
before = open("/proc/self/maps").read().count("libcuda.so")
import machete_aot
assert open("/proc/self/maps").read().count("libcuda.so") == before
assert not torch.cuda.is_initialized()
from machete_aot import driver
assert driver._state.api is None
"""
    python(code, tmp_path)


def test_import_writes_nothing(tmp_path: Path) -> None:
    """An audit hook sees every file that is opened to write."""
    code = """
import sys, torch, tempfile
written = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        written.append(arguments[0])
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate"):
        written.append((event, arguments))
sys.addaudithook(hook)
import machete_aot
print(written)
open("proof", "w").close()
assert written[-1] == "proof"
"""
    assert python(code, tmp_path).strip() == "[]"
    assert [p.name for p in tmp_path.iterdir()] == ["proof"]


@pytest.mark.parametrize("missing", ["cuda", "cuda.bindings", "cuda.bindings.driver"])
def test_import_without_cuda_bindings(tmp_path: Path, missing: str) -> None:
    code = f"""
import sys, torch
for name in [n for n in sys.modules if n.split(".")[0] == "cuda"]:
    del sys.modules[name]
sys.modules[{missing!r}] = None
import machete_aot
from machete_aot import driver
try:
    driver.device(0)
except machete_aot.DeviceError as error:
    print(error)
"""
    assert "pip install" in python(code, tmp_path)


def test_import_without_torch(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
import machete_aot, build_kernels.__main__
assert machete_aot.fetch_bundle().verify() == []
for name in machete_aot.__all__:
    try:
        getattr(machete_aot, name)
    except ImportError as error:
        print(name, "pip install torch" in str(error))
try:
    machete_aot.nothing
except AttributeError:
    print("nothing")
"""
    names = (
        *(
            "explain",
            "gemm",
            "interleave_gate_up",
            "nn",
            "permute_columns",
            "prepack_b",
            "prepack_gate_up",
            "reference",
        ),
        *("set_overlap", "supported_schedules", "unpack_b", "warmup"),
    )
    assert python(code, tmp_path).split("\n") == [*(f"{name} True" for name in names), "nothing", ""]


def test_import_takes_no_network_and_few_modules(tmp_path: Path) -> None:
    code = """
import torch, sys
before = set(sys.modules)
import machete_aot
print(*{m.split(".")[0] for m in set(sys.modules) - before})
"""
    new = set(python(code, tmp_path).split())
    assert {"machete_aot", "zstandard"} <= new
    assert not {"requests", "urllib3", "jinja2", "ninja", "build_kernels", "triton"} & new
