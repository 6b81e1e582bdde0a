# SPDX-License-Identifier: Apache-2.0
"""The C++ example: compiled, and run against the stub driver with a bundle of the real writer's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from machete_aot.abi import FLAG_ONE_PER_SM
from machete_aot.bundle import Bundle
from machete_aot.config import ScheduleConfig, TileConfig
from machete_aot.launch import Shape, make_plan
from machete_aot.loader import pack_plan
from small_bundle import with_stored
from stub.bundles import BF16, NARROW, WIDE, make_bundle, schedule
from stub.harness import build

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/csrc/loader", f"-I{ROOT}/csrc/kernels"]


# Writes the plan of a product.
PLAN = """
#define main example
#include "main.cpp"
#undef main

int main(int, char** words) {
  const Bundle bundle(words[1], words[2]);
  const std::int64_t m = std::stol(words[3]), n = std::stol(words[4]), k = std::stol(words[5]);
  const machete_loader_plan plan = plan_of(choose(bundle.manifest, m), m, n, k);
  return std::fwrite(&plan, sizeof plan, 1, stdout) == 1 ? 0 : 1;
}
"""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return make_bundle()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c, cpp = shutil.which("gcc") or shutil.which("cc"), shutil.which("g++") or shutil.which("c++")
    if c is None or cpp is None:
        pytest.skip("needs a C and a C++ compiler")
    folder = tmp_path_factory.mktemp("cpp")
    probe = folder / "probe.cpp"
    probe.write_text("#include <zstd.h>\nint main() { return ZSTD_versionNumber() ? 0 : 1; }\n")
    if subprocess.run([cpp, "-o", str(folder / "probe"), str(probe), "-lzstd"], capture_output=True).returncode:
        pytest.skip("needs libzstd with its headers: apt-get install libzstd-dev")
    part, program = folder / "loader.o", folder / "gemm"
    subprocess.run([c, "-std=c11", *FLAGS, "-c", "-o", part, ROOT / "csrc/loader/machete_loader.c"], check=True)
    example = ROOT / "examples" / "cpp"
    (folder / "plan.cpp").write_text(PLAN)
    for source, output in ((example / "main.cpp", program), (folder / "plan.cpp", folder / "plan")):
        command = [cpp, "-std=c++17", *FLAGS, f"-I{example}", "-o", output, source, part, "-lzstd", "-ldl"]
        subprocess.run(command, check=True)
    return program


def run(program: Path, bundle: bytes, digest: str, *words: str) -> subprocess.CompletedProcess[str]:
    path = program.with_name("bundle.zip")
    path.write_bytes(bundle)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(build().parent)}
    command = [program, path, digest, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("m", "tile"), [(5, NARROW), (64, WIDE), (100, WIDE)])
def test_it_launches_a_kernel_of_the_bundle(program: Path, bundle: Bundle, m: int, tile: object) -> None:
    assert tile in (NARROW, WIDE)
    chosen = NARROW if tile is NARROW else WIDE
    done = run(program, bundle.to_bytes(), bundle.manifest_sha256, str(m), "256", "512", "--launch-only")
    assert done.returncode == 0, done.stderr
    grid = f"{256 // chosen.rows} x {-(-m // chosen.tokens)}"
    assert done.stdout == (
        f"bf16_u4b8__{chosen.name}: launched {grid} CTAs of {chosen.threads} threads, "
        f"{chosen.shared_memory(1, BF16)} bytes of shared memory\n"
    )


@pytest.mark.parametrize(
    ("m", "tile", "n", "k"),
    [
        *((5, NARROW, 256, 512), (8, NARROW, 264, 4160), (64, WIDE, 256, 512), (100, WIDE, 4304, 4096)),
        *((8, NARROW, 256, 128), (63, NARROW, 256, 64)),  # one group
    ],
)
def test_its_plan_is_that_of_python(program: Path, bundle: Bundle, m: int, tile: TileConfig, n: int, k: int) -> None:
    path = program.with_name("bundle.zip")
    path.write_bytes(bundle.to_bytes())
    command = [program.with_name("plan"), path, bundle.manifest_sha256, *map(str, (m, n, k))]
    found = subprocess.run(command, capture_output=True, check=True).stdout
    kernel = bundle.manifest.kernel_for(BF16, schedule(tile))
    plan = make_plan(kernel, ScheduleConfig(tile, 1), Shape(m, n, k, 128, k, n, n, code_zero=8), sms=132)
    alone = {"late_steps": 0, "flags": plan.params["flags"] & ~FLAG_ONE_PER_SM}
    params = plan.params | alone  # which is for launches beside others, as are the next two
    grid = params["row_tiles"], params["token_tiles"], 1  # not padded for them either
    assert found == pack_plan(replace(plan, params=params, one_per_sm=False, every_sm=False, grid=grid))


def test_it_looks_at_the_result(program: Path, bundle: Bundle) -> None:
    """The stub computes nothing."""
    done = run(program, bundle.to_bytes(), bundle.manifest_sha256)
    assert (done.returncode, "expected 512" in done.stdout) == (1, True), done.stdout


def test_it_trusts_nothing_else(program: Path, bundle: Bundle) -> None:
    data = bundle.to_bytes()
    done = run(program, data, "0" * 64)
    assert done.returncode == 1
    assert f"SHA-256 is {bundle.manifest_sha256}, trusted: {'0' * 64}" in done.stderr
    kernel = bundle.manifest.kernel(f"bf16_u4b8__{NARROW.name}")
    dictionary = bundle.manifest.dictionary_of(kernel)
    assert dictionary
    used = {"the dictionary": dictionary.offset, "the kernel": kernel.frame.offset}
    for what, place in used.items():
        wrong = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        done = run(program, wrong, bundle.manifest_sha256)
        assert (done.returncode, done.stderr) == (1, "error: a frame is corrupt\n"), what
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"{}")
    manifests = {bomb: "too large", unsized: "too large", b"{}": "too large", bundle.manifest_bytes[:-1]: "not zstd"}
    for stored, message in manifests.items():
        other, digest = with_stored(stored)
        done = run(program, other, digest)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    for length in (0, 21, 100, len(data) - 1):
        assert run(program, data[:length], bundle.manifest_sha256).returncode == 1
    assert run(program, data, bundle.manifest_sha256, "1", "2").returncode == 2
    assert run(program, data, bundle.manifest_sha256, "1", "100", "100").returncode == 1


def test_every_file_that_it_names_exists() -> None:
    text = (ROOT / "examples" / "cpp" / "README.md").read_text()
    for path in re.findall(r"\b(?:csrc|examples|machete_aot)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists() or path.endswith(".zip"), path
