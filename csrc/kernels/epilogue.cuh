// SPDX-License-Identifier: Apache-2.0
// From fp32 sums to the output: undo the conversion's power of two, add the bias, round once, store.
#pragma once
#include "gemm_params.h"
#include "ptx.cuh"

namespace machete {

// Bias of the thread's rows g and g + 8 of a slab: 16 rows of n by all tokens of the tile, one warp's share of a block.
struct SlabBias {
  float g = 0, g8 = 0;
  template <class Types>
  static DEVICE SlabBias load(const GemmParams& p, int row, int lane) {
    SlabBias b;
    if (p.bias) {
      const int g = row + lane / 4;
      if (g < p.n) b.g = Types::to_float(p.bias[g]);
      if (g + 8 < p.n) b.g8 = Types::to_float(p.bias[g + 8]);
    }
    return b;
  }
};

// Stores a slab. Transposed in registers, so that 4 lanes write 16 contiguous bytes.
template <class Types, int Tokens>
DEVICE void store_slab(const GemmParams& p, const float (&d)[Tokens / 2], SlabBias bias, int row, int token0,
                       int lane) {
  const bool pairs = p.flags & FLAG_STORE_PAIRS;
  const int column = row + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Tokens / 8; i++) {
    const uint32_t top =
        transpose_8x8_b16(Types::pack(fmaf(d[4 * i], Types::UNDO, bias.g), fmaf(d[4 * i + 1], Types::UNDO, bias.g)));
    const uint32_t bottom = transpose_8x8_b16(
        Types::pack(fmaf(d[4 * i + 2], Types::UNDO, bias.g8), fmaf(d[4 * i + 3], Types::UNDO, bias.g8)));
    const int token = token0 + 8 * i + lane / 4;
    if (token >= p.m) continue;
    uint16_t* out = p.out + size_t(token) * p.out_stride + column;
    if (pairs) {  // n is a multiple of 8
      if (row < p.n) *reinterpret_cast<uint32_t*>(out) = top;
      if (row + 8 < p.n) *reinterpret_cast<uint32_t*>(out + 8) = bottom;
    } else {
      if (column < p.n) out[0] = uint16_t(top);
      if (column + 1 < p.n) out[1] = uint16_t(top >> 16);
      if (column + 8 < p.n) out[8] = uint16_t(bottom);
      if (column + 9 < p.n) out[9] = uint16_t(bottom >> 16);
    }
  }
}

}  // namespace machete
