// SPDX-License-Identifier: Apache-2.0
// Family "flat": persistent CTAs, which take tiles of ROWS rows of n x TOKENS tokens one after the other.
//   out[m, n] = sum over k of acts[m, k] * dequant(weights)[n, k] (+ bias[n])
//
// Whole tiles seldom divide evenly among the SMs. So the last tiles (p.even_tiles; none in a launch with whole tiles
// only) are laid end to end, as one list of ring steps, and every CTA takes an equal, contiguous share of it. A CTA
// whose share begins inside a tile gives its partial tile to the CTA that has the tile's first steps, through global
// memory; that one adds the partials in the order of K and stores. Shares do not depend on timing, so the result is
// deterministic.
//   warpgroups 0 .. ROW_WG-1  consumers, most registers: load words, convert, wgmma, store
//   warpgroup  ROW_WG         producers, few registers, one lane of each warp: warp 0 weights, warp 1 activations,
//                             warp 2 scales and zero points, warp 3 announces a partial tile
// The producers run ahead over the tile boundary, so that the ring stays full while the consumers store a tile.
//
// With a cluster (T::CLUSTER > 1) all above is said of it: it takes a tile of CLUSTER * ROWS rows, of which each CTA
// has ROWS, and all its CTAs go through the same steps, so that each needs to read only its part of the activations
// from L2. A CTA gives its rows of a partial tile to the CTA of its own rank.
#pragma once
#include "consumer.cuh"
#include "epilogue.cuh"
#include "producers.cuh"

namespace machete {

template <int RowWarpgroups, int KWarpgroups, int Blocks, int Units, int Tokens, int Stages, int CtasPerSm,
          int UnitBytes, int AuxRows, int Cluster = 1>
struct FlatTile
    : Tile<RowWarpgroups, KWarpgroups, Blocks, Units, Tokens, Stages, CtasPerSm, UnitBytes, AuxRows, Cluster> {
  static_assert(KWarpgroups == 1, "all of K in one warpgroup");
  using Base = Tile<RowWarpgroups, KWarpgroups, Blocks, Units, Tokens, Stages, CtasPerSm, UnitBytes, AuxRows, Cluster>;
  static constexpr bool ONE_RANGE = false;  // of K, for a CTA
  static constexpr int THREADS = 32 * Base::WARPS + 128;
  // Chunks of output that a warpgroup has in shared memory; 0: it is stored from registers.
  static constexpr int CHUNKS = Tokens < 64 ? 0 : Base::GENERAL ? 1 : 2;
  static constexpr uint32_t STAGING = CHUNKS * STAGING_CHUNK;
  static constexpr uint32_t shared_memory(int) { return Base::RING_END + RowWarpgroups * STAGING; }

  // setmaxnreg moves registers within what the CTA was launched with, LAUNCH for each thread. The producers' loops need
  // 56, or without zero points 48 where the consumers have few. The rest goes to these, but for what eights do not
  // divide.
  static constexpr int LAUNCH = 65536 / CtasPerSm / THREADS / 8 * 8;
  static constexpr int POOL = (RowWarpgroups + 1) * LAUNCH;
  static constexpr int PRODUCER_LEAST = LAUNCH < 96 && AuxRows == 1 ? 48 : 56;
  static constexpr int CONSUMER_REGISTERS = (POOL - PRODUCER_LEAST) / RowWarpgroups / 8 * 8;
  static constexpr int PRODUCER_REGISTERS = POOL - RowWarpgroups * CONSUMER_REGISTERS;
  static_assert(LAUNCH < 248 && CONSUMER_REGISTERS <= 240, "an SM has more registers than these threads can have");
};

// The CTA's number in its cluster.
template <class T>
DEVICE int cta_rank() {
  return blockIdx.x % T::CLUSTER;
}

// The CTA's first row and token of a tile. The order of the tiles: bands of about 1,024 tokens, in a band all tokens of
// one row block, then the next row block. CTAs that run together then share activations and weights in L2.
template <class T>
DEVICE void place_tile(const GemmParams& p, int tile, int& row0, int& token0) {
  constexpr int BAND = T::TOKENS >= 1024 ? 1 : 1024 / T::TOKENS;
  if (p.token_tiles == 1) {  // without the divisions, which would delay the first copies
    row0 = (tile * T::CLUSTER + cta_rank<T>()) * T::ROWS;
    token0 = 0;
    return;
  }
  const int band = tile / (BAND * p.row_tiles), in_band = tile % (BAND * p.row_tiles);
  const int height = min(BAND, p.token_tiles - band * BAND);
  row0 = (in_band / height * T::CLUSTER + cta_rank<T>()) * T::ROWS;
  token0 = (band * BAND + in_band % height) * T::TOKENS;
}

// A cluster's work, piece by piece: steps [from, to) of a tile. First whole tiles, every clusters()-th, then its share
// of the even ones. Shares are numbered against blockIdx: share i waits for share i + 1, which is thus a cluster that
// started earlier, so no CTA waits for one that may have no room to start.
template <class T>
struct Work {
  const GemmParams& p;
  int tile, from, to = 0;
  int left;  // steps of the share after this piece

  DEVICE Work(const GemmParams& p) : p(p), tile(cluster() - clusters()), left(share_steps(p, share())) {}
  static DEVICE int cluster() { return blockIdx.x / T::CLUSTER; }
  static DEVICE int clusters() { return gridDim.x / T::CLUSTER; }
  static DEVICE int share() { return clusters() - 1 - cluster(); }
  static DEVICE int share_begin(const GemmParams& p, int i) { return p.share_steps * i + min(i, p.longer_shares); }
  static DEVICE int share_steps(const GemmParams& p, int i) { return p.share_steps + (i < p.longer_shares); }
  // Whether this cluster's share begins inside a tile.
  static DEVICE bool gives(const GemmParams& p) {
    return share_steps(p, share()) > 0 && share_begin(p, share()) % p.steps > 0;
  }

  DEVICE bool next() {
    const int whole_tiles = p.token_tiles * p.row_tiles - p.even_tiles;
    if (tile + clusters() < whole_tiles) {
      tile += clusters();
      from = 0;
      to = p.steps;
      return true;
    }
    if (left == 0) return false;
    if (tile < whole_tiles) {  // the share's first piece
      const int begin = share_begin(p, share());
      tile = whole_tiles + begin / p.steps;
      from = begin % p.steps;
    } else {
      tile++;
      from = 0;
    }
    to = min(p.steps, from + left);
    left -= to - from;
    return true;
  }
};

// Partial tiles in global memory, one place a share and CTA of its cluster. The giver's consumers store theirs and go
// on; a producer warp says so with a flag when all have. The taker's producer of activations waits for the flag and
// copies the partial tile into the ring behind the last step, in chunks of a stage's activations. The flag's value,
// p.token, is new in every launch, so the memory need not be cleared, and the taker overwrites it, so that a launch
// repeated in a graph does not find the last one's.
template <class T>
struct Partials {
  static constexpr int VECTORS = T::BLOCKS * T::TOKENS / 8;  // of 16 bytes, of a thread
  static constexpr int BYTES = VECTORS * T::WARPS * 512;
  static constexpr int chunks(int at_least) {  // as few as fit, and as divide the vectors
    return BYTES / at_least <= T::ACTS_BYTES && VECTORS % at_least == 0 ? at_least : chunks(at_least + 1);
  }
  static constexpr int CHUNKS = chunks(1);
  static constexpr int CHUNK_VECTORS = VECTORS / CHUNKS;

  static DEVICE uint64_t* flag(const GemmParams& p, int share) {
    return reinterpret_cast<uint64_t*>(p.workspace) + share * T::CLUSTER + cta_rank<T>();
  }
  static DEVICE uint8_t* place(const GemmParams& p, int share) {
    return p.workspace + (gridDim.x * 8 + 1023) / 1024 * 1024 + size_t(share * T::CLUSTER + cta_rank<T>()) * BYTES;
  }
  // Consumers of the giver.
  static DEVICE void store(const GemmParams& p, const float (&acc)[T::BLOCKS][T::TOKENS / 2], uint32_t given, int warp,
                           int lane) {
    uint8_t* dst = place(p, Work<T>::share()) + warp * 512 + lane * 16;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const float* x = acc[v / (T::TOKENS / 8)] + v % (T::TOKENS / 8) * 4;
      store_global_float4(dst + v * (T::WARPS * 512), x[0], x[1], x[2], x[3]);
    }
    __syncwarp();
    if (ARRIVALS == 32 || lane == 0) mbar_arrive(given);
  }
  // One lane of the giver's producers.
  static DEVICE void announce(const GemmParams& p, uint32_t given) {
    mbar_wait(given, 0);
    store_release(flag(p, Work<T>::share()), p.token);
  }
  // The taker's producer of activations: share `share` into their part of the ring, from slot 0 on.
  static DEVICE void load(const GemmParams& p, int share, const Ring<T>& ring, Position<T::STAGES>& at) {
    while (load_acquire(flag(p, share)) != p.token) {
    }
    store_relaxed(flag(p, share), ~p.token);
    fence_proxy_async();  // the copy engine must see what the flag published
    const uint8_t* src = place(p, share);
    const uint64_t policy = policy_evict_first();
    for (int c = 0; c < CHUNKS; c++) {
      mbar_wait(ring.acts_empty(at.slot), at.free_parity());
      for (int other = 1; other < ring.ACTS_ARRIVALS; other++) mbar_arrive(ring.acts_full(at.slot));
      mbar_expect(ring.acts_full(at.slot), BYTES / CHUNKS);  // the arrivals above stand for producers that have ended
      bulk_copy(ring.acts(at.slot), src + c * (BYTES / CHUNKS), BYTES / CHUNKS, ring.acts_full(at.slot), policy);
      at.advance();
    }
    at.rewind();
  }
  // Consumers of the taker.
  template <class Types>
  static DEVICE void add(Consumer<Types, T>& consumer, float (&acc)[T::BLOCKS][T::TOKENS / 2], int warp, int lane) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int slot = c % T::STAGES;
      consumer.wait_acts(slot);
#pragma unroll
      for (int i = 0; i < CHUNK_VECTORS; i++) {
        const int v = c * CHUNK_VECTORS + i;
        float* sum = acc[v / (T::TOKENS / 8)] + v % (T::TOKENS / 8) * 4;
        const float4 x = load_shared_float4(consumer.ring.acts(slot) + i * (T::WARPS * 512) + warp * 512 + lane * 16);
        sum[0] += x.x;
        sum[1] += x.y;
        sum[2] += x.z;
        sum[3] += x.w;
      }
      consumer.ring.release_acts(slot, lane);
    }
  }
};

template <class Types, class T>
DEVICE void flat_gemm(const TensorMaps& maps, const GemmParams& p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  launch_dependents();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Ring<T> ring{smem_address(smem)};
  const int k_units = (p.k + UNIT_K - 1) / UNIT_K;

  if (threadIdx.x == 0) {
    ring.init_barriers();
    mbar_init(ring.extra_barrier(), T::WARPS * ARRIVALS);
    mbar_init_fence();
  }
  __syncthreads();
  if (T::CLUSTER > 1) {  // until all barriers are ready, nothing may be sent to another CTA; weights are our own
    cluster_arrive();
    if (warp != T::WARPS) cluster_wait();
  }

  if (warp >= T::WARPS) {
    set_registers_down<T::PRODUCER_REGISTERS>();
    const Ring<T> own = ring.copy();
    Position<T::STAGES> at;
    if (warp == T::WARPS && elect_one()) {
      int row0, token0;
      Work<T> work(p);
      const uint64_t policy = p.token_tiles == 1 ? policy_evict_first() : policy_evict_normal();
      const Pace pace;
      for (int filled = 0; work.next(); at.rewind()) {
        place_tile<T>(p, work.tile, row0, token0);
        WeightProducer<T> weights(p, row0, work.from * T::STEP_UNITS, k_units);
        fill<Operand::Weights>(own, at, work.to - work.from, [&](int slot, int) {
          weights.load(own, slot, policy);
          if (filled < T::STAGES) pace.hold(++filled * T::WEIGHTS_BYTES);
        });
      }
    } else if (warp == T::WARPS + 1 && elect_one()) {
      int row0, token0;
      Work<T> work(p);
      prefetch_tensor_map(&maps.acts);
      wait_for_predecessors();  // activations, output and workspace belong to earlier kernels until here; all accesses
                                // to them depend on these loads
      for (; work.next(); at.rewind()) {
        place_tile<T>(p, work.tile, row0, token0);
        fill<Operand::Acts>(own, at, work.to - work.from, [&](int slot, int step) {
          load_acts(own, slot, maps.acts, p, token0, (work.from + step) * T::STEP_UNITS, cta_rank<T>());
        });
      }
      for (int share = Work<T>::share(), done = work.from > 0 ? p.steps : work.to; done < p.steps;) {
        Partials<T>::load(p, ++share, own, at);
        done += Work<T>::share_steps(p, share);
      }
      if (T::CLUSTER > 1)  // we stay until all consumers have released our last slots, so nothing comes after us
        for (at.rewind(); at.slot < T::STAGES; at.slot++) mbar_wait(own.acts_empty(at.slot), at.free_parity());
    } else if (warp == T::WARPS + 2 && elect_one()) {
      int row0, token0;
      Work<T> work(p);
      const uint64_t policy = p.token_tiles == 1 ? policy_evict_first() : policy_evict_normal();
      prefetch_tensor_map(&maps.scales);
      for (; work.next(); at.rewind()) {
        place_tile<T>(p, work.tile, row0, token0);
        ScaleProducer<T> scales(maps, p, row0, work.from * T::STEP_UNITS);
        fill<Operand::Weights>(own, at, work.to - work.from, [&](int slot, int) { scales.load(own, slot, policy); });
      }
    } else if (warp == T::WARPS + 3 && elect_one() && Work<T>::gives(p)) {
      Partials<T>::announce(p, own.extra_barrier());
    }
  } else {
    set_registers_up<T::CONSUMER_REGISTERS>();
    const int strip0 = warp / 4 * T::BLOCKS;  // the warpgroup's first 64-row strip in the tile
    Consumer<Types, T> consumer(p, ring, strip0, 0, warp, lane);
    Work<T> work(p);
    float acc[T::BLOCKS][T::TOKENS / 2];
    while (work.next()) {
      consumer.multiply(acc, work.to - work.from);
      if (work.from > 0) {
        Partials<T>::store(p, acc, ring.extra_barrier(), warp, lane);
        continue;
      }
      for (int share = Work<T>::share(), done = work.to; done < p.steps;) {
        Partials<T>::add(consumer, acc, warp, lane);
        done += Work<T>::share_steps(p, ++share);
      }
      int row0, token0;
      place_tile<T>(p, work.tile, row0, token0);
      const int w = uniform(threadIdx.x / 32);  // the warp, anew: what follows from it takes no registers in the loop
      const bool lines = T::CHUNKS > 0 && whole_lines<Types>(p);
#pragma unroll
      for (int b = 0; b < T::BLOCKS; b++) {
        const int row = row0 + (w / 4 * T::BLOCKS + b) * 64 + w % 4 * 16;
        if constexpr (T::CHUNKS > 0) {
          if (lines) {
            const SlabBias bias = SlabBias::load<Types>(p, row, lane);
            const uint32_t staging = ring.base + T::RING_END + w / 4 * T::STAGING;
            const int block_row = row - w % 4 * 16, barrier = 1 + w / 4;
            if (p.flags & FLAG_SWIGLU)
              store_block<Types, T::TOKENS, T::CHUNKS, true>(p, acc[b], bias, block_row, token0, w % 4, lane, staging,
                                                             barrier);
            else
              store_block<Types, T::TOKENS, T::CHUNKS, false>(p, acc[b], bias, block_row, token0, w % 4, lane, staging,
                                                              barrier);
            continue;
          }
        }
        if (row >= p.n) continue;
        store_slab<Types, T::TOKENS>(p, acc[b], SlabBias::load<Types>(p, row, lane), row, token0, lane);
      }
    }
  }
}

}  // namespace machete
