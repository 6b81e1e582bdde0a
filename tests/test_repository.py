# SPDX-License-Identifier: Apache-2.0
"""What must hold of the repository as a whole: licence headers, commands in the documentation, dependencies, sizes."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = sorted((ROOT / "machete_aot").rglob("*.py"))
PIPELINE = sorted((ROOT / "build_kernels").glob("*.py"))
DISTRIBUTIONS = {"cuda": "cuda-bindings"}  # import name -> distribution, where they differ
OPTIONAL = {  # its extra, its only user
    "cryptography": ("sign", "trust.py"),
    "matplotlib": ("bench", "plot.py"),
    "safetensors": ("models", "checkpoint.py"),
}
OUTSIDE = {"transformers"}  # in these extras for examples and benchmarks, which the runtime is not
PEERS = {"humming", "vllm"}  # compared with where they happen to be installed, so no extra asks for them


def load_tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imported(path: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports absolutely, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.literal_eval(node.args[0]).split(".")[0]


def third_party(paths: list[Path]) -> set[str]:
    names = {name for path in paths for name in imported(path)}
    return {n for n in names if n not in sys.stdlib_module_names and n not in ("machete_aot", "build_kernels")}


def test_every_source_file_has_its_licence_header() -> None:
    tool = load_tool("check_spdx")
    files = [p for p in ROOT.rglob("*") if p.is_file() and not _ignored(p)]
    assert len([p for p in files if tool.is_source(p)]) > 20
    assert tool.missing_headers(files) == []


def _ignored(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return any((p.startswith(".") and p != ".ci") or p in ("build", "dist") or p.endswith(".egg-info") for p in parts)


@pytest.mark.parametrize(
    ("name", "content", "missing"),
    [
        ("a.py", "# SPDX-License-Identifier: Apache-2.0\n", False),
        ("a.py", "#!/usr/bin/env python3\n# SPDX-License-Identifier: Apache-2.0\n", False),
        ("a.cuh", "// SPDX-License-Identifier: Apache-2.0\n", False),
        ("a.py", "import os\n# SPDX-License-Identifier: Apache-2.0\n", True),
        ("a.py", "", True),
        ("Makefile", "all:\n", True),
        ("a.cu", "// SPDX-License-Identifier: MIT\n", True),
        ("notes.md", "words\n", False),
    ],
)
def test_header_check(tmp_path: Path, name: str, content: str, missing: bool) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert load_tool("check_spdx").main([str(path)]) == int(missing)


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        used = set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / name).read_text()))
        assert used <= targets, name
    assert {"demo", "test", "lint", "bundle", "check", "clean", "help"} <= targets


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert re.search(r"^ {4}make test\b", (ROOT / "README.md").read_text(), flags=re.M)
    script = ROOT / ".ci" / "run"
    assert re.search(r"\bmake test$", script.read_text(), flags=re.M)
    assert os.access(script, os.X_OK)


def test_documented_commands_and_statuses_exist() -> None:
    cli = importlib.import_module("machete_aot.cli")
    readme = (ROOT / "README.md").read_text()
    table = readme.split("## Command line")[1].split("Exit status")[0]
    commands = set(re.findall(r"^\| `([a-z]+)", table, flags=re.M)) - {"machete"}
    help_text = cli._parser().format_help()
    assert commands == {
        *("demo", "doctor", "list", "explain", "qualify", "bench"),
        *("fetch", "verify", "export", "import", "sign", "cache"),
    }
    assert all(re.search(rf"^ +{c} ", help_text, flags=re.M) for c in commands)
    documented = readme.split("Exit status:")[1].split("\n\n")[0]
    assert {int(d) for d in re.findall(r"\b\d\b", documented)} == {0, cli.OTHER, *(code for _, code in cli.EXIT_CODES)}


def test_links_in_the_documentation_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tables = text.split("## Runtime modules")[1].split("## Kernels, tiles")[0]
    named = set(re.findall(r"`(\w+\.py)`", tables))
    trivial = {"__init__.py", "__main__.py", "version.py", "paths.py"}
    assert named == {path.name for path in (*RUNTIME, *PIPELINE)} - trivial


def test_the_readme_example_runs() -> None:
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    w_q, scales, a, out = (scope[name].cpu() for name in ("w_q", "scales", "a", "out"))
    codes = torch.stack([w_q >> (4 * i) & 15 for i in range(8)], dim=1).flatten(0, 1)
    weights = (codes.to(scales.dtype) - 8) * scales.repeat_interleave(scope["group"], dim=0)
    expected = a.double() @ weights.double()
    assert float((out.double() - expected).norm() / expected.norm()) < 2.5e-3


def test_the_runtime_imports_only_what_it_declares() -> None:
    metadata = project()
    declared = {Requirement(d).name for d in metadata["dependencies"]}
    extras = {extra for extra, _ in OPTIONAL.values()}
    optional = {Requirement(d).name for extra in extras for d in metadata["optional-dependencies"][extra]}
    assert optional == OPTIONAL.keys() | OUTSIDE and not declared & optional
    found = {DISTRIBUTIONS.get(name, name) for name in third_party(RUNTIME)}
    assert found == declared | OPTIONAL.keys() | PEERS


@pytest.mark.parametrize(
    ("name", "user"), [*((name, user) for name, (_, user) in OPTIONAL.items()), *((name, "peers.py") for name in PEERS)]
)
def test_what_is_optional_is_imported_by_one_module_and_lazily(name: str, user: str) -> None:
    users = [path for path in RUNTIME if name in third_party([path])]
    assert [path.name for path in users] == [user]
    top_level = [n for n in ast.parse(users[0].read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any(name in ast.unparse(node) for node in top_level)


def test_the_runtime_needs_neither_the_pipeline_nor_a_compiler() -> None:
    for path in RUNTIME:
        forbidden = {"build_kernels", "jinja2", "ninja", "triton", "numpy", "subprocess"} & set(imported(path))
        assert not forbidden, f"{path.name} imports {forbidden}"


def test_the_pipeline_imports_only_what_is_declared() -> None:
    metadata = project()
    extra = metadata["optional-dependencies"]["build"]
    declared = {Requirement(d).name for d in (*metadata["dependencies"], *extra)}
    assert {DISTRIBUTIONS.get(name, name) for name in third_party(PIPELINE)} <= declared


def test_constraints_pin_every_requirement() -> None:
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    pinned = {}
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line), line
        name, version = line.split("==")
        pinned[name] = version
    metadata = project()
    groups = (metadata["dependencies"], *metadata["optional-dependencies"].values())
    for requirement in (Requirement(d) for group in groups for d in group):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_compiler_wheels_are_pinned_exactly() -> None:
    build = [Requirement(d) for d in project()["optional-dependencies"]["build"]]
    pinned = {r.name for r in build if any(s.operator == "==" for s in r.specifier)}
    names = ("cuda-nvcc", "cuda-nvcc-cu12", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
    assert {f"nvidia-{n}" for n in names} == pinned


def test_no_file_holds_a_path_of_somebody_s_machine_or_something_unfinished() -> None:
    pattern = re.compile(r"/(root|Users)/\w|\b(TO[D]O|FIX[M]E)\b")
    assert pattern.search("/root" + "/x")
    for path in ROOT.rglob("*"):
        if path.is_file() and not _ignored(path) and path.suffix not in (".zip", ".pyc", ".so"):
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_modules_are_small_and_say_their_job() -> None:
    for path in (*RUNTIME, *PIPELINE):
        source = path.read_text()
        assert len(source.splitlines()) <= 400, f"{path.name} has over 400 lines"
        assert ast.get_docstring(ast.parse(source)), f"{path.name} has no docstring"


def test_wheel_holds_the_runtime_and_its_bundle_alone() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"] == ["machete_aot", "machete_aot.nn"]
    assert {"data/*.zip", "data/pins.json"} <= set(setuptools["package-data"]["machete_aot"])
