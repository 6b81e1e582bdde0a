# SPDX-License-Identifier: Apache-2.0
"""Which scales the kernels give to which k: the arithmetic of csrc/kernels/scale_rows.cuh, compiled for this machine.

A producer's loop over the stages of a K range and a consumer's look at each position are played through, and what a
position gets is compared with the group that it lies in.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_kernels.catalogue import specializations
from build_kernels.paths import KERNELS
from machete_aot.abi import FLAG_SCALE_MAPS, ONE_GROUP
from machete_aot.config import BLOCK_K, TileConfig, ceil_div

# Reads "fine rows flags group_blocks k first_step steps" and prints, for each position of these stages, the index of
# the group whose scales it gets. A stage's memory is a list of group indices; stale ones are -1.
_PROGRAM = """
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>
#define DEVICE inline
using std::max;
static int __clz(int x) { return __builtin_clz(x); }
static float __frcp_rn(float x) { return 1.0f / x; }
#include "scale_rows.cuh"
using namespace machete;

int main() {
  int fine, rows, flags, group_blocks, k, first, steps;
  while (scanf("%d %d %d %d %d %d %d", &fine, &rows, &flags, &group_blocks, &k, &first, &steps) == 7) {
    GemmParams p = {};
    p.flags = flags, p.group_blocks = group_blocks, p.k = k;
    GroupWalk walk(p, fine, rows, first * rows);
    for (int step = 0; step < steps; step++) {
      std::vector<int> stage(rows, -1);
      if (flags & FLAG_SCALE_MAPS) {
        for (int g = 0; g < walk.groups; g++) stage.at(g) = walk.index + g;
        walk.advance(rows);
      } else {
        for (int r = 0; r < rows; r++) {
          stage.at(r) = walk.index;
          walk.advance(1);
        }
      }
      for (int i = 0; i < rows; i++) printf("%d ", stage.at(i >> row_shift(p, fine)));
    }
    printf("\\n");
  }
}
"""

LENGTHS = (8, 64, 72, 128, 192, 320, 384, 1024, 1096, 1152, 4160, 7168)  # of K
SIZES = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 4096)  # of groups
SPLITS = (1, 2, 4)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.fail("this test needs a C++ compiler; install g++")
    folder = tmp_path_factory.mktemp("scale_rows")
    (folder / "walk.cpp").write_text(_PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-static-libubsan"]
    subprocess.run([*command, f"-I{KERNELS}", "-o", folder / "walk", folder / "walk.cpp"], check=True)
    return folder / "walk"


def ranges(tile: TileConfig, k: int) -> Iterator[tuple[int, int]]:
    """(first step, steps) of the CTAs that divide K, as the kernels of family stream do it, and of odd shares."""
    steps = tile.steps(k)
    for split in SPLITS:
        if split <= steps:
            for rank in range(split):
                first = steps * rank // split
                yield first, steps * (rank + 1) // split - first
    yield steps // 3, steps - steps // 3


def cases(fine: bool) -> Iterator[tuple[TileConfig, int, int, bool]]:
    """(tile, k, group, whether by tensor maps): every step of the catalogue's tiles; both ways where both would do."""
    tiles = {s.tile.step_units: s.tile for s in specializations() if s.types.fine == fine}
    for tile in tiles.values():
        for k in LENGTHS:
            for group in SIZES:
                if fine == (group % 64 != 0 and group < k):
                    yield tile, k, group, False
                    if tile.stage_groups(group, k):
                        yield tile, k, group, True


@pytest.mark.parametrize("fine", [False, True])
def test_every_position_gets_the_scales_of_its_group(program: Path, fine: bool) -> None:
    row_k = BLOCK_K if fine else 2 * BLOCK_K
    lines, expected, maps_used = [], [], 0
    for tile, k, group, maps in cases(fine):
        rows = tile.step_units * 64 // row_k
        blocks = ONE_GROUP if group >= k else group // BLOCK_K
        last = ceil_div(k, group) - 1
        for first, steps in ranges(tile, k):
            lines.append(f"{int(fine)} {rows} {FLAG_SCALE_MAPS * maps} {blocks} {k} {first} {steps}")
            expected.append((k, row_k, group, last, first * rows, maps))
            maps_used += maps
    found = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    assert 0 < maps_used < len(lines)
    results = found.stdout.splitlines()
    assert len(results) == len(lines)
    for line, result, (k, row_k, group, last, first_row, maps) in zip(lines, results, expected, strict=True):
        for i, index in enumerate(map(int, result.split()), first_row):
            group_of = i * row_k // group
            if i * row_k < k:
                assert index == group_of, line
            elif maps:  # past the end of K: rows past the last group arrive as zeros, but nothing stale
                assert index >= 0, line
            else:
                assert index == last, line


def test_a_range_far_into_a_long_k_begins_in_the_right_group(program: Path) -> None:
    """The division without integers, up to the largest K."""
    cases = [(2**27 - 64, 64, 2, 0), (2**27 - 64, 192, 2, 0), (2**27 - 64, 128, 2, FLAG_SCALE_MAPS)]
    for k, group, rows, flags in cases:
        last = ceil_div(k, 64 * rows) - 1
        for first in (*range(last - 50, last + 1), last // 2, last // 3, 12345):
            line = f"0 {rows} {flags} {group // BLOCK_K} {k} {first} 1"
            found = subprocess.run([program], input=line, capture_output=True, text=True, check=True).stdout.split()
            assert int(found[0]) == first * rows * 64 // group, line
