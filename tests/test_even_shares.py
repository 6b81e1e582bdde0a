# SPDX-License-Identifier: Apache-2.0
"""Family "flat" as a model: what csrc/kernels/flat_gemm.cuh makes of a plan's grid and parameters.

The model is written from the kernel's text, not from launch.py. What of that text needs no GPU is compiled for this
machine and compared with the model.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_kernels.paths import KERNELS
from machete_aot.config import ScheduleConfig, TileConfig, ceil_div
from machete_aot.launch import LaunchPlan, Shape, make_plan
from stub.bundles import BF16, FLAT, make_bundle, schedule

KERNEL = make_bundle().manifest.kernel_for(BF16, schedule(FLAT))

TILES = (
    TileConfig("flat", 2, 1, 1, 4, 8, 5, 2),  # 128 rows, 8 tokens, steps of 256 k
    TileConfig("flat", 2, 1, 1, 4, 32, 3, 2),  # 128 rows, 32 tokens, steps of 256 k
    TileConfig("flat", 1, 1, 2, 1, 128, 5, 2),  # 128 rows, 128 tokens, steps of 64 k
    TileConfig("flat", 3, 1, 1, 2, 128, 4, 1),  # 192 rows, 128 tokens, steps of 128 k
    FLAT,  # 128 rows, 256 tokens, steps of 128 k
    replace(FLAT, cluster=2),  # 256 rows
    TileConfig("flat", 1, 1, 2, 2, 128, 2, 2, 2),  # 256 rows, 128 tokens, steps of 128 k, two CTAs an SM
)


class Piece(NamedTuple):
    """Steps [first, end) of a tile."""

    tile: int
    first: int
    end: int


@dataclass(frozen=True)
class Model:
    """The clusters of one launch. A share is one's number in the list of even steps, counted against blockIdx.

    The CTAs of a cluster do the same, each for its own rows; a block below is what they are together.
    """

    clusters: int
    tiles: int
    steps: int
    even_tiles: int
    share_steps: int
    longer_shares: int

    def share_of(self, block: int) -> int:
        return self.clusters - 1 - block

    def length(self, share: int) -> int:
        return self.share_steps + (share < self.longer_shares)

    def begin(self, share: int) -> int:
        return self.share_steps * share + min(share, self.longer_shares)

    def pieces(self, block: int) -> list[Piece]:
        """What ``Work`` gives it, in order: every ``clusters``-th whole tile, then its share, cut at tiles' ends."""
        whole = self.tiles - self.even_tiles
        found = [Piece(tile, 0, self.steps) for tile in range(block, whole, self.clusters)]
        share = self.share_of(block)
        at, left = self.begin(share), self.length(share)
        while left:
            first = at % self.steps
            taken = min(self.steps - first, left)
            found.append(Piece(whole + at // self.steps, first, first + taken))
            at, left = at + taken, left - taken
        return found

    def gives(self, block: int) -> bool:
        """Whether a producer warp announces a partial tile of this CTA."""
        share = self.share_of(block)
        return self.length(share) > 0 and self.begin(share) % self.steps > 0

    def awaited(self, last: Piece, block: int) -> list[int]:
        """Shares whose partial tiles this CTA adds to its last piece: they follow its own, until K is complete."""
        found = []
        share, done = self.share_of(block), self.steps if last.first > 0 else last.end
        while done < self.steps:
            share += 1
            found.append(share)
            done += self.length(share)
        return found


def plan_of(tile: TileConfig, m: int, n: int, k: int, even_ctas: int, sms: int) -> LaunchPlan:
    kernel = replace(KERNEL, tile=tile, threads=tile.threads)
    rows, columns = -(-n // 8) * 8, -(-k // 8) * 8
    division = ScheduleConfig(tile, 0, even_ctas) if even_ctas else ScheduleConfig(tile, 1)
    return make_plan(kernel, division, Shape(m, n, k, 128, columns, rows, n), sms)


def model_of(plan: LaunchPlan) -> Model:
    p = plan.params
    assert plan.grid[1:] == (1, 1) and plan.grid[0] % plan.cluster[0] == 0
    return Model(
        plan.grid[0] // plan.cluster[0],
        p["row_tiles"] * p["token_tiles"],
        p["steps"],
        p["even_tiles"],
        p["share_steps"],
        p["longer_shares"],
    )


def check(tile: TileConfig, m: int, n: int, k: int, even_ctas: int, sms: int) -> None:
    plan = plan_of(tile, m, n, k, even_ctas, sms)
    model = model_of(plan)
    assert model.tiles == ceil_div(n, tile.rows * tile.cluster) * ceil_div(m, tile.tokens)
    assert model.steps == ceil_div(ceil_div(k, 64), tile.step_units)
    assert plan.cluster == (tile.cluster, 1, 1)  # nobody but the pieces below ties clusters together
    room = max(1, (even_ctas or tile.ctas_per_sm) * sms // tile.cluster)
    assert 1 <= model.clusters <= room

    covered: Counter[tuple[int, int]] = Counter()
    stored: dict[int, int] = {}  # tile -> blockIdx
    givers: dict[int, list[int]] = defaultdict(list)  # tile -> shares, in order of K
    for block in reversed(range(model.clusters)):  # in the order of shares
        pieces = model.pieces(block)
        assert pieces, f"block {block} has nothing to do"
        covered.update((p.tile, step) for p in pieces for step in range(p.first, p.end))
        given = [p for p in pieces if p.first > 0]
        assert len(given) == model.gives(block)  # at most one place in the workspace, and announced if and only if used
        for piece in given:
            givers[piece.tile].append(model.share_of(block))
        for piece in pieces:
            assert piece.first < piece.end <= model.steps
            if piece.first == 0:
                assert piece.tile not in stored
                stored[piece.tile] = block
        assert all(p.end == model.steps for p in pieces[:-1])  # so only the last tile's partials are waited for

    # every step of every tile once, and every tile stored once, by the CTA that has its first steps
    assert len(covered) == model.tiles * model.steps
    assert set(covered.values()) == {1}
    assert stored.keys() == set(range(model.tiles))

    # a taker waits for exactly the givers of its tile; they started earlier
    for tile_index, block in stored.items():
        (piece,) = (p for p in model.pieces(block) if p.tile == tile_index)
        awaited = model.awaited(piece, block)
        assert awaited == givers.pop(tile_index, [])
        assert all(model.clusters - 1 - share < block for share in awaited)
        if model.tiles >= room:
            assert len(awaited) <= 1
    assert not givers

    if even_ctas:  # no CTA has two steps more than another
        work = [sum(p.end - p.first for p in model.pieces(block)) for block in range(model.clusters)]
        assert max(work) - min(work) <= 1

    ctas = plan.grid[0]
    used = ceil_div(ctas * 8, 1024) * 1024 + ctas * tile.rows * tile.tokens * 4
    assert plan.workspace == (used if model.even_tiles else 0)
    if not even_ctas:
        assert model.even_tiles == model.share_steps == model.longer_shares == 0


@st.composite
def products(draw: st.DrawFn) -> tuple[TileConfig, int, int, int, int, int]:
    """A tile, (m, n, k), CTAs an SM (0: whole tiles) and SMs: from one step to several rounds, ragged or not."""
    tile = draw(st.sampled_from(TILES))
    sms = draw(st.integers(1, 12) | st.sampled_from([114, 132]))
    tokens, rows, steps = (draw(st.integers(1, most)) for most in (6, 60, 12))
    step_k = tile.step_units * 64
    m = tokens * tile.tokens - draw(st.integers(0, tile.tokens - 1))
    n = rows * tile.rows - draw(st.integers(0, tile.rows - 1))  # with a cluster, the last CTA may have none
    k = steps * step_k - draw(st.integers(0, step_k - 1))
    return tile, m, n, k, draw(st.integers(0, tile.ctas_per_sm)), sms


@settings(max_examples=400, deadline=None)
@given(products())
def test_every_step_is_multiplied_once(product: tuple[TileConfig, int, int, int, int, int]) -> None:
    check(*product)


# flat_gemm.cuh's own division of the work, for every CTA, and its place of every tile
_HOST = """
#include <algorithm>
#include <cstdio>
#include "gemm_params.h"
#define DEVICE inline
using std::min;
static struct { unsigned x; } blockIdx, gridDim;
PART
struct T { static constexpr int TOKENS = 32, ROWS = 128, CLUSTER = CTAS; };
int main() {
  GemmParams p = {};
  while (std::scanf("%u %d %d %d %d %d %d", &gridDim.x, &p.row_tiles, &p.token_tiles, &p.steps, &p.even_tiles,
                    &p.share_steps, &p.longer_shares) == 7) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
      std::printf("%d", Work<T>::gives(p));
      for (Work<T> work(p); work.next();) std::printf(" %d:%d:%d", work.tile, work.from, work.to);
      std::printf("\\n");
    }
    for (int tile = 0, row, token; tile < p.row_tiles * p.token_tiles; tile++) {
      for (blockIdx.x = 0; blockIdx.x < T::CLUSTER; blockIdx.x++) {
        place_tile<T>(p, tile, row, token);
        std::printf("%d:%d ", row, token);
      }
    }
    std::printf("\\n");
  }
}
"""


@pytest.fixture(scope="module", params=[1, 2])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The program, and the CTAs of a cluster that it was compiled for."""
    text = (KERNELS / "flat_gemm.cuh").read_text()
    part = re.search(r"^template <class T>\nDEVICE int cta_rank\(.*^struct Work \{.*?^\};\n", text, re.S | re.M)
    assert part, "flat_gemm.cuh no longer has cta_rank and, after it, place_tile and Work"
    program = tmp_path_factory.mktemp("host") / "work"
    command = ["g++", "-std=c++17", f"-DCTAS={request.param}", "-x", "c++", "-", f"-I{KERNELS}", "-o", str(program)]
    subprocess.run(command, input=_HOST.replace("PART", part[0]), text=True, check=True)
    return program, request.param


PRODUCTS = [
    (1, 1, 1),
    (1, 64, 64 * 1000),  # one tile for all CTAs
    (33, 4304, 1152),
    (16, 4096, 4096),
    (64, 28672, 4096),
    (1100, 6144, 4096),  # more than one band of tokens
    (2048, 6144, 4096),
    (32 * 2, 128 * 132, 256),  # whole tiles only
    (32, 128 * 265, 2560),  # one tile more than 264 CTAs
    (32, 128 * 263, 2560),  # one less
]


@pytest.mark.parametrize("even_ctas", [0, 1, 2])
@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
def test_products_on_132_sms(host: tuple[Path, int], m: int, n: int, k: int, even_ctas: int) -> None:
    program, cluster = host
    tile = replace(TILES[1], cluster=cluster)
    check(tile, m, n, k, even_ctas, 132)
    plan = plan_of(tile, m, n, k, even_ctas, 132)
    model, p = model_of(plan), plan.params
    names = ("row_tiles", "token_tiles", "steps", "even_tiles", "share_steps", "longer_shares")
    numbers = " ".join(str(x) for x in (plan.grid[0], *(p[name] for name in names)))
    *ctas, places = subprocess.run(
        [program], input=numbers, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for block, line in enumerate(ctas):
        gives, *pieces = line.split()
        assert [Piece(*map(int, piece.split(":"))) for piece in pieces] == model.pieces(block // cluster)
        assert bool(int(gives)) == model.gives(block // cluster)
    assert len(ctas) == plan.grid[0]
    found = [tuple(map(int, place.split(":"))) for place in places.split()]
    assert sorted(found) == [
        (128 * row, 32 * token) for row in range(p["row_tiles"] * cluster) for token in range(p["token_tiles"])
    ]


def test_the_model_finds_wrong_parameters() -> None:
    """The model itself: parameters that are off by one leave steps out, or give some twice."""
    good = model_of(plan_of(TILES[1], 33, 4304, 1152, 1, 132))
    assert good.even_tiles and good.longer_shares
    for wrong in (
        replace(good, longer_shares=good.longer_shares - 1),
        replace(good, share_steps=good.share_steps + 1),
        replace(good, even_tiles=good.even_tiles - 1),
        replace(good, clusters=good.clusters - 1),
    ):
        steps = [
            (p.tile, s) for block in range(wrong.clusters) for p in wrong.pieces(block) for s in range(p.first, p.end)
        ]
        assert sorted(steps) != [(tile, step) for tile in range(good.tiles) for step in range(good.steps)]
