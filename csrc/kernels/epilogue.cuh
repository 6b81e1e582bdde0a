// SPDX-License-Identifier: Apache-2.0
// From fp32 sums to the output: undo the conversion's power of two, scale, add the bias, round once, store.
#pragma once
#include "gemm_params.h"
#include "ptx.cuh"
#include "types.cuh"

namespace machete {

constexpr int FLAGS_OUT = FLAG_OUT_FP32 | FLAG_OUT_BF16 | FLAG_OUT_FP16;  // none: the plain epilogue, in a's type

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

// Two neighbouring 16-bit columns of the output, of `columns`.
DEVICE void store_two(uint16_t* row, int column, int columns, uint32_t values, bool pairs) {
  if (pairs) {  // column and columns are even
    if (column < columns) *reinterpret_cast<uint32_t*>(row + column) = values;
  } else {
    if (column < columns) row[column] = uint16_t(values);
    if (column + 1 < columns) row[column + 1] = uint16_t(values >> 16);
  }
}

// Stores a slab in a's type. Transposed in registers, so that 4 lanes write 16 contiguous bytes.
template <class Types, int Tokens>
DEVICE void store_plain(const GemmParams& p, const float (&d)[Tokens / 2], SlabBias bias, int row, int token0,
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
    uint16_t* out = static_cast<uint16_t*>(p.out) + size_t(token) * p.out_stride;
    store_two(out, column, p.n, top, pairs);
    store_two(out, column + 8, p.n, bottom, pairs);
  }
}

// The same for a whole 64-row block by its warpgroup, through shared memory: 8 threads write 128 contiguous bytes,
// where store_plain's 4 lanes write 16. `staging` has room for one chunk of 16 tokens, or for two, so that one barrier
// a chunk is enough: who writes a chunk has passed the barrier after which all threads had read the one before the
// last. 16-byte columns are permuted by the token, against bank conflicts.
constexpr int STAGING_CHUNK = 16 * 128;
template <class Types, int Tokens, int Chunks>
DEVICE void store_block(const GemmParams& p, const float (&d)[Tokens / 2], SlabBias bias, int block_row, int token0,
                        int warp, int lane, uint32_t staging, int barrier) {
  const int in_chunk = lane / 16 * 8 + lane % 8;  // the token that this lane's address is of
  const uint32_t to = staging + in_chunk * 128 + ((warp * 2 + lane / 8 % 2) ^ (in_chunk % 8)) * 16;
  const int thread = warp * 32 + lane, token = thread / 8, column = thread % 8;
  const uint32_t from = staging + token * 128 + (column ^ (token % 8)) * 16;
  const bool in_row = block_row + column * 8 < p.n;
  uint16_t* out = static_cast<uint16_t*>(p.out) + size_t(token0 + token) * p.out_stride + block_row + column * 8;
#pragma unroll
  for (int c = 0; c < Tokens / 16; c++) {
    const float* x = d + 8 * c;
    if (Chunks == 1) barrier_sync(barrier, 128);
    store_matrices_transposed(to + c % Chunks * STAGING_CHUNK,
                              Types::pack(fmaf(x[0], Types::UNDO, bias.g), fmaf(x[1], Types::UNDO, bias.g)),
                              Types::pack(fmaf(x[2], Types::UNDO, bias.g8), fmaf(x[3], Types::UNDO, bias.g8)),
                              Types::pack(fmaf(x[4], Types::UNDO, bias.g), fmaf(x[5], Types::UNDO, bias.g)),
                              Types::pack(fmaf(x[6], Types::UNDO, bias.g8), fmaf(x[7], Types::UNDO, bias.g8)));
    barrier_sync(barrier, 128);
    const uint4 line = load_shared_128(from + c % Chunks * STAGING_CHUNK);
    if (in_row && token0 + 16 * c + token < p.m) *reinterpret_cast<uint4*>(out) = line;
    out += size_t(16) * p.out_stride;
  }
}

// Whether an output can be stored so: in a's type, rows on 16 bytes, n % 8 == 0.
DEVICE bool whole_lines(const GemmParams& p) {
  return !(p.flags & FLAGS_OUT) && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && (p.out_stride | p.n) % 8 == 0;
}

DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Stores a slab with everything else that an epilogue can do: sum * channel scale * token scale + bias, then
// silu(gate) * up where rows g and g + 8 are such a pair, in any type.
template <class Types, int Tokens>
DEVICE void store_general(const GemmParams& p, const float (&d)[Tokens / 2], SlabBias bias, int row, int token0,
                          int lane) {
  const bool swiglu = p.flags & FLAG_SWIGLU, fp32 = p.flags & FLAG_OUT_FP32, bf16 = p.flags & FLAG_OUT_BF16;
  const bool pairs = p.flags & FLAG_STORE_PAIRS;
  const int columns = swiglu ? p.n / 2 : p.n, column0 = swiglu ? row / 2 : row;
  const int g = row + lane / 4;
  const float scale_g = p.channel_scales && g < p.n ? p.channel_scales[g] * Types::UNDO : Types::UNDO;
  const float scale_g8 = p.channel_scales && g + 8 < p.n ? p.channel_scales[g + 8] * Types::UNDO : Types::UNDO;
#pragma unroll
  for (int i = 0; i < Tokens / 8; i++) {
    const int token = token0 + 8 * i + lane % 4 * 2;  // this one and the next are the thread's, until transposed
    float scale = 1, next_scale = 1;
    if (p.token_scales) {
      if (token < p.m) scale = p.token_scales[token];
      if (token + 1 < p.m) next_scale = p.token_scales[token + 1];
    }
    float v[4] = {fmaf(d[4 * i] * scale_g, scale, bias.g), fmaf(d[4 * i + 1] * scale_g, next_scale, bias.g),
                  fmaf(d[4 * i + 2] * scale_g8, scale, bias.g8), fmaf(d[4 * i + 3] * scale_g8, next_scale, bias.g8)};
    if (swiglu) {
      v[0] = silu(v[0]) * v[2];
      v[1] = silu(v[1]) * v[3];
    }
    if (fp32) {
      const int column = column0 + lane / 4;
      float* out = static_cast<float*>(p.out) + size_t(token) * p.out_stride + column;
#pragma unroll
      for (int j = 0; j < 4; j++)  // token, the next, then both 8 columns further
        if (token + j % 2 < p.m && column + j / 2 * 8 < columns && !(swiglu && j >= 2))
          out[j % 2 * size_t(p.out_stride) + j / 2 * 8] = v[j];
      continue;
    }
    const uint32_t top = transpose_8x8_b16(bf16 ? Bf16Types::pack(v[0], v[1]) : Fp16Types::pack(v[0], v[1]));
    const uint32_t bottom = transpose_8x8_b16(bf16 ? Bf16Types::pack(v[2], v[3]) : Fp16Types::pack(v[2], v[3]));
    const int out_token = token0 + 8 * i + lane / 4, column = column0 + lane % 4 * 2;
    if (out_token >= p.m) continue;
    uint16_t* out = static_cast<uint16_t*>(p.out) + size_t(out_token) * p.out_stride;
    store_two(out, column, columns, top, pairs);
    if (!swiglu) store_two(out, column + 8, columns, bottom, pairs);
  }
}

template <class Types, int Tokens>
DEVICE void store_slab(const GemmParams& p, const float (&d)[Tokens / 2], SlabBias bias, int row, int token0,
                       int lane) {
  if (p.flags & FLAGS_OUT) {
    store_general<Types, Tokens>(p, d, bias, row, token0, lane);
  } else {
    store_plain<Types, Tokens>(p, d, bias, row, token0, lane);
  }
}

}  // namespace machete
