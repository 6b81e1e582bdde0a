// SPDX-License-Identifier: Apache-2.0
// The parameter block of every kernel. Written by `python -m build_kernels abi` from machete_aot/abi.py: edit that.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { MACHETE_ABI_VERSION = 1 };

enum {
  FLAG_ACTS_2D = 1,
  FLAG_STORE_PAIRS = 2,
};

typedef struct GemmParams {
  const uint8_t* weights;  // prepacked weights: [ceil(n/64)][ceil(k/64)] units of 2048 bytes
  const uint16_t* scales;  // group scales [ceil(k/group)][scale_stride], 16-bit floats
  const uint16_t* bias;    // [n] in the output's type, or null
  uint16_t* out;           // output [m][out_stride], 16-bit floats
  int32_t m;               // tokens: rows of the activations
  int32_t n;               // rows of the weights: columns of the output
  int32_t k;               // reduction length: columns of the activations
  int32_t scale_stride;    // elements from one group's scales to the next, a multiple of 8
  int32_t out_stride;      // elements from one output row to the next
  int32_t group_units;     // 64-k units that share a scale; at least ceil(k/64): one group over all of K
  int32_t flags;           // sum of the FLAG_ values
} GemmParams;

#ifdef __cplusplus
#define MACHETE_ABI_ASSERT(condition) static_assert(condition, #condition)
#else
#define MACHETE_ABI_ASSERT(condition) _Static_assert(condition, #condition)
#endif
MACHETE_ABI_ASSERT(sizeof(GemmParams) == 64);
MACHETE_ABI_ASSERT(offsetof(GemmParams, weights) == 0);
MACHETE_ABI_ASSERT(offsetof(GemmParams, scales) == 8);
MACHETE_ABI_ASSERT(offsetof(GemmParams, bias) == 16);
MACHETE_ABI_ASSERT(offsetof(GemmParams, out) == 24);
MACHETE_ABI_ASSERT(offsetof(GemmParams, m) == 32);
MACHETE_ABI_ASSERT(offsetof(GemmParams, n) == 36);
MACHETE_ABI_ASSERT(offsetof(GemmParams, k) == 40);
MACHETE_ABI_ASSERT(offsetof(GemmParams, scale_stride) == 44);
MACHETE_ABI_ASSERT(offsetof(GemmParams, out_stride) == 48);
MACHETE_ABI_ASSERT(offsetof(GemmParams, group_units) == 52);
MACHETE_ABI_ASSERT(offsetof(GemmParams, flags) == 56);
#undef MACHETE_ABI_ASSERT
