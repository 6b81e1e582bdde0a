// SPDX-License-Identifier: Apache-2.0
// Family "dense": many tokens, where the tensor cores are what takes the time.
//   out[m, n] = sum over k of acts[m, k] * dequant(weights)[n, k] (+ bias[n])
//
// Persistent CTAs, one an SM: each takes every gridDim-th tile of ROWS rows of n x TOKENS tokens and all of K. The
// producers run ahead over the tile boundary, so that the ring stays full while the consumers store a tile.
//   warpgroups 0 .. ROW_WG-1  consumers, most registers: load words, convert, wgmma, store
//   warpgroup  ROW_WG         producers, few registers: warp 0 weights and scales, warp 1 activations, one lane each
#pragma once
#include "epilogue.cuh"
#include "ring.cuh"

namespace machete {

template <int RowWarpgroups, int KWarpgroups, int Blocks, int Units, int Tokens, int Stages>
struct DenseTile : Tile<RowWarpgroups, KWarpgroups, Blocks, Units, Tokens, Stages> {
  static_assert(KWarpgroups == 1, "all of K in one warpgroup");
  using Base = Tile<RowWarpgroups, KWarpgroups, Blocks, Units, Tokens, Stages>;
  static constexpr int THREADS = 32 * Base::WARPS + 128;
  static constexpr uint32_t shared_memory(int) { return Base::RING_END; }
};

// The order of the tiles: bands of about 1,024 tokens, in a band all tokens of one row block, then the next row block.
// CTAs that run together then share activations and weights in L2.
template <class T>
struct Raster {
  static constexpr int BAND = T::TOKENS >= 1024 ? 1 : 1024 / T::TOKENS;
  int token_tiles, row_tiles;
  DEVICE Raster(const GemmParams& p)
      : token_tiles((p.m + T::TOKENS - 1) / T::TOKENS), row_tiles((p.n + T::ROWS - 1) / T::ROWS) {}
  DEVICE int tiles() const { return token_tiles * row_tiles; }
  DEVICE void place(int tile, int& row0, int& token0) const {
    const int band = tile / (BAND * row_tiles), in_band = tile % (BAND * row_tiles);
    const int height = min(BAND, token_tiles - band * BAND);
    row0 = in_band / height * T::ROWS;
    token0 = (band * BAND + in_band % height) * T::TOKENS;
  }
};

template <class Types, class T>
DEVICE void dense_gemm(const CUtensorMap& acts, const GemmParams& p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  launch_dependents();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Ring<T> ring{smem_address(smem)};
  const Raster<T> raster(p);
  const int k_units = (p.k + UNIT_K - 1) / UNIT_K, steps = (k_units + T::STEP_UNITS - 1) / T::STEP_UNITS;

  if (threadIdx.x == 0) {
    ring.init_barriers();
    mbar_init_fence();
  }
  __syncthreads();

  if (warp >= T::WARPS) {
    // 65,536 registers are 512 for each of 128 threads: two consumer warpgroups of 224 and a producer warpgroup of 56
    set_registers_down<56>();
    int row0, token0;
    Position<T::STAGES> at{0, 1};  // parity 1: the first round passes at once
    if (warp == T::WARPS && elect_one()) {
      const uint64_t policy = raster.token_tiles == 1 ? policy_evict_first() : policy_evict_normal();
      for (int tile = blockIdx.x; tile < raster.tiles(); tile += gridDim.x) {
        raster.place(tile, row0, token0);
        WeightProducer<T> weights(p, row0, 0, k_units);
        for (int step = 0; step < steps; step++) {
          mbar_wait(ring.empty(at.slot), at.parity);
          weights.load(ring, at.slot, policy);
          at.advance();
        }
      }
    } else if (warp == T::WARPS + 1 && elect_one()) {
      prefetch_tensor_map(&acts);
      wait_for_predecessors();  // activations and output belong to earlier kernels until here; stores depend on these
                                // loads
      for (int tile = blockIdx.x; tile < raster.tiles(); tile += gridDim.x) {
        raster.place(tile, row0, token0);
        for (int step = 0; step < steps; step++) {
          mbar_wait(ring.empty(at.slot), at.parity);
          load_acts(ring, at.slot, acts, p.flags, token0, step * T::STEP_UNITS);
          at.advance();
        }
      }
    }
  } else {
    set_registers_up<224>();
    const int strip0 = warp / 4 * T::BLOCKS;  // the warpgroup's first 64-row strip in the tile
    const bool per_unit = !T::PAIRS || scale_per_unit(p, k_units);
    const uint32_t my_words = strip0 * T::STRIP_BYTES + threadIdx.x % 128 * 16;
    const uint32_t my_scales = (strip0 * 64 + warp % 4 * 16 + lane / 4) * 2;
    const uint64_t my_acts = wgmma_descriptor(ring.acts(0));

    Consumer<Types, T> consumer;
    mbar_wait(ring.full(0), 0);
    consumer.start(ring.weights(0) + my_words, ring.scales(0) + my_scales);

    Position<T::STAGES> at;
    for (int tile = blockIdx.x; tile < raster.tiles(); tile += gridDim.x) {
      float acc[T::BLOCKS][T::TOKENS / 2];
#pragma unroll
      for (int b = 0; b < T::BLOCKS; b++)
#pragma unroll
        for (int i = 0; i < T::TOKENS / 2; i++) acc[b][i] = 0;
      const bool last_tile = tile + gridDim.x >= raster.tiles();
      int old_slot = at.slot;
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        Position<T::STAGES> next = at;
        // the next step may be the next tile's first; after the very last one the held unit is loaded again, for
        // nothing
        const bool more = !(last_tile && step == steps - 1);
        if (more) next.advance();
        const uint64_t desc = my_acts + (at.slot * T::ACTS_BYTES >> 4);
        uint32_t ready = 1;
        constexpr int UNITS = T::UNITS * T::BLOCKS;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
          const bool last = u == UNITS - 1;  // the next unit lies in the next step
          const int b = u % T::BLOCKS, nu = (u + 1) % UNITS, nb = nu % T::BLOCKS, nk = nu / T::BLOCKS;
          const int next_stage = last ? next.slot : at.slot;
          if (last && more) ready = mbar_test(ring.full(next.slot), next.parity);  // looked at after a multiplication
          consumer.unit(
              acc[b], desc + (u / T::BLOCKS * T::ACTS_TILE >> 4), b, nb,
              ring.weights(next_stage) + my_words + nb * T::STRIP_BYTES + nk * UNIT_BYTES,
              ring.scales(next_stage) + my_scales + nk * T::SCALE_ROW + nb * 128, nk % 2 == 0 || per_unit,
              [&] {
                if (last && !ready) mbar_wait(ring.full(next.slot), next.parity);
              },
              [&] {
                if (u == 0 && step > 0) ring.release(old_slot, lane);  // the last step's last wgmma has retired
              });
        }
        old_slot = at.slot;
        at = next;
      }
      wgmma_wait<0>();
      ring.release(old_slot, lane);

      int row0, token0;
      raster.place(tile, row0, token0);
#pragma unroll
      for (int b = 0; b < T::BLOCKS; b++) {
        const int row = row0 + (strip0 + b) * 64 + warp % 4 * 16;
        if (row >= p.n) continue;
        store_slab<Types, T::TOKENS>(p, acc[b], SlabBias::load<Types>(p, row, lane), row, token0, lane);
      }
    }
  }
}

}  // namespace machete
