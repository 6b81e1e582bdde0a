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

// x / (1 + exp(-x))
DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// Whether all that the epilogue does is what store_block can do, to 16-byte pieces of the output.
template <class Types>
DEVICE bool whole_lines(const GemmParams& p) {
  const bool swiglu = p.flags & FLAG_SWIGLU;
  const int flags = p.flags & FLAGS_OUT, columns = swiglu ? p.n / 2 : p.n;
  return (flags == 0 || (swiglu && flags == Types::OUT && !p.channel_scales && !p.token_scales)) &&
         reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && (p.out_stride | columns) % 8 == 0;
}

// What store_plain does, or silu(gate) * up, for a whole 64-row block by its warpgroup, through shared memory: 8
// threads write 128 contiguous bytes (4 write 64 of silu(gate) * up), where store_plain's 4 lanes write 16. `staging`
// has room for one chunk of tokens, or for two, so that one barrier a chunk is enough: who writes a chunk has passed
// the barrier after which all threads had read the one before the last. 16-byte parts are permuted by the token,
// against bank conflicts.
constexpr int STAGING_CHUNK = 16 * 128;
template <class Types, int Tokens, int Chunks, bool Swiglu>
DEVICE void store_block(const GemmParams& p, const float (&d)[Tokens / 2], SlabBias bias, int block_row, int token0,
                        int warp, int lane, uint32_t staging, int barrier) {
  constexpr int PARTS = Swiglu ? 4 : 8, CHUNK = STAGING_CHUNK / (PARTS * 16);  // 16-byte parts of a token, tokens
  static_assert(Tokens % (CHUNK * Chunks) == 0, "the next block starts with the first chunk again");
  auto place = [&](int token, int part) { return staging + (token * PARTS + (part ^ token * PARTS / 8 % PARTS)) * 16; };
  const uint32_t to = Swiglu ? place(lane, warp) : place(lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
  const int thread = warp * 32 + lane, token = thread / PARTS, part = thread % PARTS;
  const uint32_t from = place(token, part);
  const int column = (Swiglu ? block_row / 2 : block_row) + part * 8;
  const bool in_row = column < (Swiglu ? p.n / 2 : p.n);
  uint16_t* out = static_cast<uint16_t*>(p.out) + size_t(token0 + token) * p.out_stride + column;
#pragma unroll
  for (int c = 0; c < Tokens / CHUNK; c++) {
    uint32_t pairs[4];  // of tokens: 8 of g and 8 of g + 8, twice; or 8 of silu(gate) * up, four times
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* x = d + c * CHUNK / 2 + (Swiglu ? 4 * i : 2 * i);
      if (Swiglu) {
        const float gate = fmaf(x[0], Types::UNDO, bias.g), next_gate = fmaf(x[1], Types::UNDO, bias.g);
        pairs[i] = Types::pack(silu(gate) * fmaf(x[2], Types::UNDO, bias.g8),
                               silu(next_gate) * fmaf(x[3], Types::UNDO, bias.g8));
      } else {
        const float b = i % 2 ? bias.g8 : bias.g;
        pairs[i] = Types::pack(fmaf(x[0], Types::UNDO, b), fmaf(x[1], Types::UNDO, b));
      }
    }
    if (Chunks == 1) barrier_sync(barrier, 128);
    store_matrices_transposed(to + c % Chunks * STAGING_CHUNK, pairs[0], pairs[1], pairs[2], pairs[3]);
    barrier_sync(barrier, 128);
    const uint4 line = load_shared_128(from + c % Chunks * STAGING_CHUNK);
    if (in_row && token0 + CHUNK * c + token < p.m) store_global_128(out, line);
    out += size_t(CHUNK) * p.out_stride;
  }
}

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
