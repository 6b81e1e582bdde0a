// SPDX-License-Identifier: Apache-2.0
// The parameter block of every kernel. Written by `python -m build_kernels abi` from machete_aot/abi.py: edit that.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { MACHETE_ABI_VERSION = 2 };

enum {
  FLAG_ACTS_2D = 1,
  FLAG_STORE_PAIRS = 2,
};

typedef struct GemmParams {
  const uint8_t* weights;  // prepacked weights: [ceil(n/64)][ceil(k/64)] units of 2048 bytes
  const uint16_t* scales;  // group scales [ceil(k/group)][scale_stride], 16-bit floats
  const uint16_t* bias;    // [n] in the output's type, or null
  uint16_t* out;           // output [m][out_stride], 16-bit floats
  uint8_t* workspace;      // where CTAs of even shares hand over partial tiles, TileConfig.workspace bytes
  uint64_t token;          // what flags in the workspace are set to: a number that no earlier launch had
  int32_t m;               // tokens: rows of the activations
  int32_t n;               // rows of the weights: columns of the output
  int32_t k;               // reduction length: columns of the activations
  int32_t scale_stride;    // elements from one group's scales to the next, a multiple of 8
  int32_t out_stride;      // elements from one output row to the next
  int32_t group_units;     // 64-k units that share a scale; at least ceil(k/64): one group over all of K
  int32_t flags;           // sum of the FLAG_ values
  int32_t row_tiles;       // family flat: tiles along n
  int32_t token_tiles;     // tiles along m
  int32_t steps;           // ring steps of K of a tile
  int32_t even_tiles;      // the last tiles, whose steps of K all CTAs share evenly
  int32_t share_steps;     // steps of each CTA's share of them
  int32_t longer_shares;   // the first so many shares have one step more
} GemmParams;

#ifdef __cplusplus
#define MACHETE_ABI_ASSERT(condition) static_assert(condition, #condition)
#else
#define MACHETE_ABI_ASSERT(condition) _Static_assert(condition, #condition)
#endif
MACHETE_ABI_ASSERT(sizeof(GemmParams) == 104);
MACHETE_ABI_ASSERT(offsetof(GemmParams, weights) == 0);
MACHETE_ABI_ASSERT(offsetof(GemmParams, scales) == 8);
MACHETE_ABI_ASSERT(offsetof(GemmParams, bias) == 16);
MACHETE_ABI_ASSERT(offsetof(GemmParams, out) == 24);
MACHETE_ABI_ASSERT(offsetof(GemmParams, workspace) == 32);
MACHETE_ABI_ASSERT(offsetof(GemmParams, token) == 40);
MACHETE_ABI_ASSERT(offsetof(GemmParams, m) == 48);
MACHETE_ABI_ASSERT(offsetof(GemmParams, n) == 52);
MACHETE_ABI_ASSERT(offsetof(GemmParams, k) == 56);
MACHETE_ABI_ASSERT(offsetof(GemmParams, scale_stride) == 60);
MACHETE_ABI_ASSERT(offsetof(GemmParams, out_stride) == 64);
MACHETE_ABI_ASSERT(offsetof(GemmParams, group_units) == 68);
MACHETE_ABI_ASSERT(offsetof(GemmParams, flags) == 72);
MACHETE_ABI_ASSERT(offsetof(GemmParams, row_tiles) == 76);
MACHETE_ABI_ASSERT(offsetof(GemmParams, token_tiles) == 80);
MACHETE_ABI_ASSERT(offsetof(GemmParams, steps) == 84);
MACHETE_ABI_ASSERT(offsetof(GemmParams, even_tiles) == 88);
MACHETE_ABI_ASSERT(offsetof(GemmParams, share_steps) == 92);
MACHETE_ABI_ASSERT(offsetof(GemmParams, longer_shares) == 96);
#undef MACHETE_ABI_ASSERT
