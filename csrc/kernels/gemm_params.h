// SPDX-License-Identifier: Apache-2.0
// The parameter block of every kernel. Written by `python -m build_kernels abi` from machete_aot/abi.py: edit that.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { MACHETE_ABI_VERSION = 8 };

enum {
  FLAG_ACTS_2D = 1,
  FLAG_STORE_PAIRS = 2,
  FLAG_INTEGER_ZEROS = 4,
  FLAG_OUT_FP32 = 8,
  FLAG_OUT_BF16 = 16,
  FLAG_OUT_FP16 = 32,
  FLAG_SWIGLU = 64,
  FLAG_SCALE_MAPS = 128,
  FLAG_ONE_PER_SM = 256,
};

typedef struct GemmParams {
  const uint8_t* weights;       // prepacked weights: [ceil(n/64)][ceil(k/64)] units of 2048 or 4096 bytes
  const uint16_t* scales;       // group scales [groups][scale_stride], 16-bit floats
  const void* zeros;            // [groups][zero_stride] 16-bit floats, uint8 with FLAG_INTEGER_ZEROS, or null
  const uint16_t* bias;         // [n] in the activations' type, or null
  const float* channel_scales;  // [n], or null
  const float* token_scales;    // [m], or null
  void* out;                    // output [m][out_stride] in the activations' type, or as a FLAG_OUT_ says
  uint8_t* workspace;           // where CTAs of even shares hand over partial tiles, TileConfig.workspace bytes
  uint64_t token;               // what flags in the workspace are set to: a number that no earlier launch had
  int32_t m;                    // tokens: rows of the activations
  int32_t n;                    // rows of the weights: columns of the product
  int32_t k;                    // reduction length: columns of the activations
  int32_t scale_stride;         // elements from one group's scales to the next, a multiple of 8
  int32_t zero_stride;          // elements from one group's zeros to the next, a multiple of 16 bytes
  int32_t out_stride;           // elements from one output row to the next
  int32_t group_blocks;         // 32-k blocks that share a scale; 2^26: one group over K
  int32_t code_zero;            // the code that stands for zero where zeros is null
  int32_t flags;                // sum of the FLAG_ values
  int32_t row_tiles;            // tiles along n
  int32_t token_tiles;          // tiles along m
  int32_t steps;                // ring steps of K of a tile
  int32_t even_tiles;           // the last tiles, whose steps of K all CTAs share evenly
  int32_t share_steps;          // steps of each CTA's share of them
  int32_t longer_shares;        // the first so many shares have one step more
  int32_t late_steps;           // family stream: steps before a CTA's end at which it lets the next kernel in, or 0
} GemmParams;

#ifdef __cplusplus
#define MACHETE_ABI_ASSERT(condition) static_assert(condition, #condition)
#else
#define MACHETE_ABI_ASSERT(condition) _Static_assert(condition, #condition)
#endif
MACHETE_ABI_ASSERT(sizeof(GemmParams) == 136);
MACHETE_ABI_ASSERT(offsetof(GemmParams, weights) == 0);
MACHETE_ABI_ASSERT(offsetof(GemmParams, scales) == 8);
MACHETE_ABI_ASSERT(offsetof(GemmParams, zeros) == 16);
MACHETE_ABI_ASSERT(offsetof(GemmParams, bias) == 24);
MACHETE_ABI_ASSERT(offsetof(GemmParams, channel_scales) == 32);
MACHETE_ABI_ASSERT(offsetof(GemmParams, token_scales) == 40);
MACHETE_ABI_ASSERT(offsetof(GemmParams, out) == 48);
MACHETE_ABI_ASSERT(offsetof(GemmParams, workspace) == 56);
MACHETE_ABI_ASSERT(offsetof(GemmParams, token) == 64);
MACHETE_ABI_ASSERT(offsetof(GemmParams, m) == 72);
MACHETE_ABI_ASSERT(offsetof(GemmParams, n) == 76);
MACHETE_ABI_ASSERT(offsetof(GemmParams, k) == 80);
MACHETE_ABI_ASSERT(offsetof(GemmParams, scale_stride) == 84);
MACHETE_ABI_ASSERT(offsetof(GemmParams, zero_stride) == 88);
MACHETE_ABI_ASSERT(offsetof(GemmParams, out_stride) == 92);
MACHETE_ABI_ASSERT(offsetof(GemmParams, group_blocks) == 96);
MACHETE_ABI_ASSERT(offsetof(GemmParams, code_zero) == 100);
MACHETE_ABI_ASSERT(offsetof(GemmParams, flags) == 104);
MACHETE_ABI_ASSERT(offsetof(GemmParams, row_tiles) == 108);
MACHETE_ABI_ASSERT(offsetof(GemmParams, token_tiles) == 112);
MACHETE_ABI_ASSERT(offsetof(GemmParams, steps) == 116);
MACHETE_ABI_ASSERT(offsetof(GemmParams, even_tiles) == 120);
MACHETE_ABI_ASSERT(offsetof(GemmParams, share_steps) == 124);
MACHETE_ABI_ASSERT(offsetof(GemmParams, longer_shares) == 128);
MACHETE_ABI_ASSERT(offsetof(GemmParams, late_steps) == 132);
#undef MACHETE_ABI_ASSERT
