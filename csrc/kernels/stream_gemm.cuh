// SPDX-License-Identifier: Apache-2.0
// Family "stream": few tokens, where reading the weights is what takes the time.
//   out[m, n] = sum over k of acts[m, k] * dequant(weights)[n, k] (+ bias[n])
//
// A CTA computes ROWS rows of n for TOKENS tokens over one K range. Its warpgroups divide the rows (ROW_WG) and K
// (K_WG); the CTAs of a cluster share the rows and divide K again. All partial tiles of a row block meet through
// (distributed) shared memory and are summed in a fixed order, so the result is deterministic.
//   warps 0 .. WARPS-1   consumers: load words, convert, wgmma, reduce, store
//   warp  WARPS          weight producer (one lane): fills the ring before earlier kernels have ended
//   warp  WARPS+1        activation producer (one lane): waits for the earlier kernels first
//   warp  WARPS+2        producer of scales and zero points (one lane)
// What a step costs besides conversion and wgmma (wait, arrive, addresses) matters: at 8 tokens it can take as long as
// the multiplications. Hence steps of 256 to 512 k and a consumer loop unrolled over the ring.
#pragma once
#include "consumer.cuh"
#include "epilogue.cuh"
#include "producers.cuh"

namespace machete {

template <int RowWarpgroups, int KWarpgroups, int Blocks, int Units, int Tokens, int Stages, int CtasPerSm,
          int UnitBytes, int AuxRows>
struct StreamTile : Tile<RowWarpgroups, KWarpgroups, Blocks, Units, Tokens, Stages, CtasPerSm, UnitBytes, AuxRows> {
  using Base = Tile<RowWarpgroups, KWarpgroups, Blocks, Units, Tokens, Stages, CtasPerSm, UnitBytes, AuxRows>;
  static constexpr bool ONE_RANGE = true;  // of K, for a CTA
  static constexpr int THREADS = 32 * (Base::WARPS + PRODUCERS);
  static constexpr int LOG_K_WG = KWarpgroups == 1 ? 0 : KWarpgroups == 2 ? 1 : 2;
  static constexpr int SLABS = Base::ROWS / 16;  // 16 rows of one warp in one block: the unit of the reduction
  static constexpr int SLAB_BYTES = 16 * Tokens * 4;

  // A worker is the set of warpgroups with one K range: worker = rank * K_WG + k_wg. Each owns SLABS / workers slabs
  // and receives them from all other workers.
  static constexpr uint32_t shared_memory(int split) {
    const int workers = split * KWarpgroups;
    return Base::RING_END + KWarpgroups * (workers - 1) * (SLABS / workers) * SLAB_BYTES;
  }
  static_assert(SLABS % KWarpgroups == 0 && (KWarpgroups & (KWarpgroups - 1)) == 0, "K_WG is a power of two");
};

enum { BARRIERS_READY = 1, PARTIALS_READY = 2 };  // named barriers

template <class Types, class T>
DEVICE void stream_gemm(const TensorMaps& maps, const GemmParams& p) {
  extern __shared__ __align__(1024) uint8_t smem[];
  // At the start: the next kernel's CTAs move in as soon as there is room, and fill their rings. Where these would take
  // bandwidth from this kernel's own copies, to leave it unused while this one ends, that is put off.
  if (p.late_steps == 0) launch_dependents();

  // through a shuffle, so that the compiler knows the warp index, and all that follows from it, to be uniform
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = cluster_rank(), log_split = 31 - __clz(cluster_size()), split = 1 << log_split;
  const int log_workers = log_split + T::LOG_K_WG, workers = 1 << log_workers;
  const int row0 = (blockIdx.x >> log_split) * T::ROWS;
  // The last of several tiles ends with the last token, and has some of the tile before it once more, to the same bits:
  // the copy engine takes longer for a row of zeros past the end than for one that it reads.
  const int token0 = max(0, min(int(blockIdx.y) * T::TOKENS, p.m - T::TOKENS));
  const int k_units = (p.k + UNIT_K - 1) / UNIT_K;
  const int all_steps = (k_units + T::STEP_UNITS - 1) / T::STEP_UNITS;
  const int step0 = all_steps * rank >> log_split;
  // A padding CTA, past n, holds its place on an SM and stores nothing, so that the next kernel finds the same room on
  // every SM when it is let in: at the start of this one, or as long as the others take. It multiplies a part of
  // another one's tile, or all of it, whose weights are in L2.
  const bool padding = row0 >= p.n;
  const int steps = padding && p.late_steps == 0 ? 1 : (all_steps * (rank + 1) >> log_split) - step0;

  const Ring<T> ring{smem_address(smem)};
  const uint32_t reduced = ring.extra_barrier();

  if (warp == T::WARPS) {
    if (elect_one()) {
      ring.init_barriers();
      mbar_init(reduced, 1);
      mbar_init_fence();
      if (split > 1)  // what other CTAs will send
        mbar_expect(reduced, T::K_WG * (workers - T::K_WG) * (T::SLABS >> log_workers) * T::SLAB_BYTES);
    }
    __syncwarp();
    barrier_arrive(BARRIERS_READY, T::THREADS);
  } else {
    barrier_sync(BARRIERS_READY, T::THREADS);
  }
  if (split > 1) cluster_arrive();  // peers may write into our reduction buffer from now on

  const int row_wg = warp / 4 % T::ROW_WG, k_wg = warp / 4 / T::ROW_WG;
  const int strip0 = row_wg * T::BLOCKS;  // the warpgroup's first 64-row strip in the tile
  auto meet_cluster = [&] {
    if (split == 1) return;
    __syncwarp();
    cluster_wait();
  };
  if (warp >= T::WARPS) {  // to its own end: where the paths joined again, consumers would have fewer registers
    const Ring<T> own = ring.copy();
    if (elect_one()) {
      const uint64_t policy = gridDim.y == 1 ? policy_evict_first() : policy_evict_normal();
      const int rows = p.row_tiles * T::ROWS, read0 = padding ? min(row0 - rows, rows - T::ROWS) : row0;
      const int unit0 = step0 * T::STEP_UNITS, ahead = steps_ahead<T>(p, steps);
      Position<T::STAGES> at;  // the first round of waits passes at once
      if (warp == T::WARPS) {
        WeightProducer<T> weights(p, read0, unit0, k_units);
        const Pace pace;
        // when consumers have late_steps left, less the part of a step until its weights are converted
        const int let_in = p.late_steps == 0 ? -1 : steps - p.late_steps + T::STAGES - 1;
        fill<Operand::Weights>(own, at, steps, [&](int slot, int step) {
          weights.load(own, slot, policy);
          if (step < T::STAGES) pace.hold((step + 1) * T::WEIGHTS_BYTES);
          if (step == T::STAGES - 1) weights.prefetch(ahead, policy);
          if (step == let_in) launch_dependents();
        });
      } else if (warp == T::WARPS + 1) {
        prefetch_tensor_map(&maps.acts);
        wait_for_predecessors();  // activations and output belong to earlier kernels until here; stores depend on these
                                  // loads
        fill<Operand::Acts>(own, at, steps, [&](int slot, int step) {
          load_acts(own, slot, maps.acts, p, token0, unit0 + step * T::STEP_UNITS);
        });
      } else {
        prefetch_tensor_map(&maps.scales);
        ScaleProducer<T> scales(maps, p, read0, unit0);
        fill<Operand::Weights>(own, at, steps, [&](int slot, int step) {
          scales.load(own, slot, policy);
          if (step == T::STAGES - 1) scales.prefetch(ahead);
        });
      }
    }
    meet_cluster();
    return;
  }
  float acc[T::BLOCKS][T::TOKENS / 2];
  Consumer<Types, T>(p, ring, strip0, k_wg, warp, lane).multiply(acc, steps);
  meet_cluster();
  auto slab_row = [&](int b) { return row0 + (strip0 + b) * 64 + warp % 4 * 16; };
  SlabBias bias[T::BLOCKS];
#pragma unroll
  for (int b = 0; b < T::BLOCKS; b++) bias[b] = SlabBias::load<Types>(p, slab_row(b), lane);
  if (workers == 1) {
#pragma unroll
    for (int b = 0; b < T::BLOCKS; b++) store_slab<Types, T::TOKENS>(p, acc[b], bias[b], slab_row(b), token0, lane);
    return;
  }

  // ---- reduction: send the slabs that others own, sum our own in worker order
  const int per_owner = T::SLABS >> log_workers, me = rank * T::K_WG + k_wg;
  auto place = [&](int slab, int owner, int source) {  // in the owner's buffer; a worker sends nothing to itself
    const int from = source < owner ? source : source - 1;
    return T::RING_END +
           ((owner % T::K_WG * (workers - 1) + from) * per_owner + (slab - owner * per_owner)) * T::SLAB_BYTES +
           lane * 16;
  };
#pragma unroll
  for (int b = 0; b < T::BLOCKS; b++) {
    const int slab = b * 4 * T::ROW_WG + row_wg * 4 + warp % 4, owner = slab * workers / T::SLABS;
    if (owner == me) continue;
    const uint32_t dst = ring.base + place(slab, owner, me);
    if (T::K_WG > 1 && owner / T::K_WG == rank) {  // in our own CTA
#pragma unroll
      for (int v = 0; v < T::TOKENS / 8; v++)
        store_shared_float4(dst + v * 512, acc[b][4 * v], acc[b][4 * v + 1], acc[b][4 * v + 2], acc[b][4 * v + 3]);
    } else {
      const uint32_t remote = peer_address(dst, owner / T::K_WG), bar = peer_address(reduced, owner / T::K_WG);
#pragma unroll
      for (int v = 0; v < T::TOKENS / 8; v++)
        store_async(remote + v * 512, acc[b][4 * v], acc[b][4 * v + 1], acc[b][4 * v + 2], acc[b][4 * v + 3], bar);
    }
  }
  if (T::K_WG > 1) barrier_sync(PARTIALS_READY, 32 * T::WARPS);  // those of our own CTA
  if (split > 1) mbar_wait_cluster(reduced, 0);
#pragma unroll
  for (int b = 0; b < T::BLOCKS; b++) {
    const int slab = b * 4 * T::ROW_WG + row_wg * 4 + warp % 4, owner = slab * workers / T::SLABS;
    if (owner != me) continue;
    float sum[T::TOKENS / 2];
#pragma unroll
    for (int i = 0; i < T::TOKENS / 2; i++) sum[i] = 0;
#pragma unroll(T::TOKENS <= 16 ? 4 : 1)
    for (int s = 0; s < workers; s++) {  // without a branch for our own partial, so that the loads overlap
      const uint32_t src = ring.base + place(slab, me, s == me ? !me : s);
#pragma unroll
      for (int v = 0; v < T::TOKENS / 8; v++) {
        const float4 x = load_shared_float4(src + v * 512);
        sum[4 * v] += s == me ? acc[b][4 * v] : x.x;
        sum[4 * v + 1] += s == me ? acc[b][4 * v + 1] : x.y;
        sum[4 * v + 2] += s == me ? acc[b][4 * v + 2] : x.z;
        sum[4 * v + 3] += s == me ? acc[b][4 * v + 3] : x.w;
      }
    }
    store_slab<Types, T::TOKENS>(p, sum, bias[b], slab_row(b), token0, lane);
  }
}

}  // namespace machete
