// SPDX-License-Identifier: Apache-2.0
// What both families share: the shared-memory ring's layout, the producers that fill it, and the consumers' loop, which
// multiplies one 64 x 64 unit of weights while it loads and converts the next.
//
// A ring stage holds one step of K: activations (128-byte swizzled tiles of TOKENS rows x 64 k), prepacked weights and
// scales. One full barrier a stage counts both producers; one empty barrier counts the consumer warps.
#pragma once
#include <cuda.h>

#include "gemm_params.h"
#include "ptx.cuh"
#include "types.cuh"
#include "wgmma.cuh"

namespace machete {

constexpr int UNIT_K = 64, UNIT_ROWS = 64;
constexpr int UNIT_BYTES = 2048;  // a prepacked unit of 4-bit weights: 16 bytes for each thread of a warpgroup

template <int RowWarpgroups, int KWarpgroups, int Blocks, int Units, int Tokens, int Stages, int CtasPerSm>
struct Tile {
  static constexpr int ROW_WG = RowWarpgroups, K_WG = KWarpgroups;  // consumer warpgroups along N and along K
  static constexpr int BLOCKS = Blocks;                             // 64-row blocks of a warpgroup
  static constexpr int UNITS = Units;                               // 64-k units of a warpgroup and step
  static constexpr int TOKENS = Tokens;                             // n of the wgmma instruction
  static constexpr int STAGES = Stages;
  static constexpr int CTAS_PER_SM = CtasPerSm;  // resident ones, which bounds the registers

  static constexpr int STEP_UNITS = K_WG * UNITS;
  static constexpr int STRIPS = ROW_WG * BLOCKS, ROWS = UNIT_ROWS * STRIPS;
  static constexpr int WARPS = 4 * ROW_WG * K_WG;              // consumers
  static constexpr int ACTS_TILE = TOKENS * 128;               // TOKENS rows of 64 k
  static constexpr int ACTS_BYTES = STEP_UNITS * ACTS_TILE;    // of a stage, as all below
  static constexpr int STRIP_BYTES = STEP_UNITS * UNIT_BYTES;  // weights of one strip
  static constexpr int WEIGHTS_BYTES = STRIPS * STRIP_BYTES;   // of all strips
  static constexpr int SCALE_ROW = ROWS * 2;                   // a slot for each unit
  static constexpr int SCALES_BYTES = STEP_UNITS * SCALE_ROW;
  static constexpr bool PAIRS = UNITS % 2 == 0;  // a step starts at an even unit for every warpgroup

  // shared memory, in order; activations first, because their tiles need 1024-byte alignment
  static constexpr uint32_t WEIGHTS_AT = STAGES * ACTS_BYTES;
  static constexpr uint32_t SCALES_AT = WEIGHTS_AT + STAGES * WEIGHTS_BYTES;
  static constexpr uint32_t BARRIERS_AT = SCALES_AT + STAGES * SCALES_BYTES;
  static constexpr uint32_t RING_END = (BARRIERS_AT + (2 * STAGES + 1) * 8 + 127) / 128 * 128;
};

// Bytes of dynamic shared memory of a launch; machete_aot/config.py has the same formula.
template <class T>
constexpr uint32_t shared_memory(int split) {
  return T::shared_memory(split);
}

// Lanes of a warp that arrive to release a stage. compute-sanitizer's racecheck follows an arrival for the arriving
// lane only, and not for the lanes that __syncwarp ordered before it; a build for it lets every lane arrive for itself.
#ifdef MACHETE_RACECHECK
constexpr int ARRIVALS = 32;
#else
constexpr int ARRIVALS = 1;
#endif

// The ring's addresses in this CTA.
template <class T>
struct Ring {
  uint32_t base;
  DEVICE uint32_t acts(int slot) const { return base + slot * T::ACTS_BYTES; }
  DEVICE uint32_t weights(int slot) const { return base + T::WEIGHTS_AT + slot * T::WEIGHTS_BYTES; }
  DEVICE uint32_t scales(int slot) const { return base + T::SCALES_AT + slot * T::SCALES_BYTES; }
  DEVICE uint32_t full(int slot) const { return base + T::BARRIERS_AT + 8 * slot; }
  DEVICE uint32_t empty(int slot) const { return base + T::BARRIERS_AT + 8 * (T::STAGES + slot); }
  DEVICE uint32_t extra_barrier() const { return base + T::BARRIERS_AT + 16 * T::STAGES; }

  DEVICE void init_barriers() const {
    for (int s = 0; s < T::STAGES; s++) {
      mbar_init(full(s), 2);  // one arrival by each producer, and their bytes
      mbar_init(empty(s), T::WARPS * ARRIVALS);
    }
  }
  // By a consumer warp that has read a stage for the last time.
  DEVICE void release(int slot, int lane) const {
    __syncwarp();  // orders the other lanes' reads before the arrival
    if (ARRIVALS == 32 || lane == 0) mbar_arrive(empty(slot));
  }
};

// A producer's position in the ring.
template <int Stages>
struct Position {
  int slot = 0;
  uint32_t fillings = 0;  // bit s: whether slot s has been filled an odd number of times

  // The parity of the phase that ends when the slot is free: the one before the first filling passes at once.
  DEVICE uint32_t free_parity() const { return ~(fillings >> slot) & 1; }
  DEVICE void advance() {
    fillings ^= 1u << slot;
    if (++slot == Stages) slot = 0;
  }
  // To slot 0, where every range of K starts: the consumers' loop is unrolled over the ring.
  DEVICE void rewind() { slot = 0; }
};

// Whether every unit, and not just every other, may start a new group: an odd number of units share a scale.
template <class T>
DEVICE bool scale_per_unit(const GemmParams& p, int k_units) {
  return !T::PAIRS || ((p.group_units & 1) && p.group_units < k_units);
}

// One lane's copies of weights and scales, both constants: it never waits for earlier kernels. Weights of a strip are
// one contiguous run. Units past the end of K get no weights (what lies in shared memory is some code, times
// activations that arrive as zeros) but do get the last group's scales, so that no stale scale can make a NaN. To be
// used by an elected lane from beginning to end: state that crosses a join of lanes is no longer uniform for the
// compiler, which then wraps every copy in a loop over lanes.
template <class T>
struct WeightProducer {
  const uint8_t* words;
  const uint16_t* scales;  // of the group that `unit` lies in
  size_t strip_stride;
  uint32_t scale_bytes;
  int strips, unit, units, boundary, scale_stride, group_units;
  bool per_unit;

  // `unit0` is where the K range starts.
  DEVICE WeightProducer(const GemmParams& p, int row0, int unit0, int k_units) {
    unit = unit0;
    units = k_units;
    strip_stride = size_t(k_units) * UNIT_BYTES;
    words = p.weights + size_t(row0 / UNIT_ROWS) * strip_stride + size_t(unit0) * UNIT_BYTES;
    const int rows = min(T::ROWS, p.n - row0);
    strips = (rows + UNIT_ROWS - 1) / UNIT_ROWS;
    scale_bytes = (rows + 7) / 8 * 16;
    scale_stride = p.scale_stride;
    group_units = p.group_units;
    per_unit = scale_per_unit<T>(p, k_units);
    // unit0 / group_units without an integer division, which would delay the first copy: exact below 2^21 units, since
    // (unit0 + 0.5) / group_units is at least 0.5 / group_units away from an integer
    const int group = unit0 == 0 ? 0 : int((float(unit0) + 0.5f) * __frcp_rn(float(group_units)));
    scales = p.scales + size_t(group) * scale_stride + row0;
    boundary = (group + 1) * group_units;
  }
  DEVICE void load(const Ring<T>& ring, int slot, uint64_t policy) {
    const uint32_t bytes = min(T::STEP_UNITS, units - unit) * UNIT_BYTES, bar = ring.full(slot);
    mbar_expect(bar, strips * bytes + (per_unit ? T::STEP_UNITS : (T::STEP_UNITS + 1) / 2) * scale_bytes);
#pragma unroll
    for (int j = 0; j < T::STRIPS; j++)
      if (j < strips) bulk_copy(ring.weights(slot) + j * T::STRIP_BYTES, words + j * strip_stride, bytes, bar, policy);
    words += T::STEP_UNITS * UNIT_BYTES;
#pragma unroll
    for (int u = 0; u < T::STEP_UNITS; u++) {
      if (u % 2 == 0 || per_unit) bulk_copy(ring.scales(slot) + u * T::SCALE_ROW, scales, scale_bytes, bar, policy);
      if (++unit >= boundary && boundary < units) {
        scales += scale_stride;
        boundary += group_units;
      }
    }
  }
};

// One lane's copy of a step of activations. Rows past m and k past the end arrive as zeros and count as bytes.
template <class T>
DEVICE void load_acts(const Ring<T>& ring, int slot, const CUtensorMap& map, int flags, int token0, int unit) {
  const uint32_t bar = ring.full(slot);
  mbar_expect(bar, T::ACTS_BYTES);
  if (flags & FLAG_ACTS_2D) {
    for (int u = 0; u < T::STEP_UNITS; u++)
      tensor_copy_2d(ring.acts(slot) + u * T::ACTS_TILE, &map, (unit + u) * UNIT_K, token0, bar);
  } else {
    tensor_copy_3d(ring.acts(slot), &map, 0, token0, unit, bar);
  }
}

// A consumer thread: where its part of slot 0 lies, and its registers between units. While a unit is being multiplied,
// the next one is converted and the one after that is loaded.
template <class Types, class T>
struct Consumer {
  static constexpr int UNITS = T::UNITS * T::BLOCKS;  // of a step: (k64 0, block 0), (k64 0, block 1), .., (k64 1, ..
  static_assert(UNITS % 2 == 0, "the two sets of fragments alternate");

  const Ring<T> ring;
  const int lane;
  const bool per_unit;  // whether scales may change at odd units of K too
  uint32_t my_words, my_scales, acts_offset;
  uint32_t fillings = 0;  // bit s: whether slot s has been filled an odd number of times: the parity to wait for next
  PairScale<Types> scale[T::BLOCKS];
  uint4 words;             // of the next unit
  uint32_t new_g, new_g8;  // its scales, where they may be new
  uint32_t frag[2][4][4];

  // Of the tile's 64-row strips from `strip0` on, and of the part `k_wg` of a stage's K.
  DEVICE Consumer(const Ring<T>& ring, int strip0, int k_wg, int warp, int lane, bool per_unit)
      : ring(ring), lane(lane), per_unit(per_unit) {
    my_words = ring.weights(0) + strip0 * T::STRIP_BYTES + k_wg * T::UNITS * UNIT_BYTES + threadIdx.x % 128 * 16;
    my_scales = ring.scales(0) + k_wg * T::UNITS * T::SCALE_ROW + (strip0 * 64 + warp % 4 * 16 + lane / 4) * 2;
    acts_offset = k_wg * T::UNITS * T::ACTS_TILE;
  }

  // acc = the product over `steps` stages, of which the first is in slot 0; all of them are released. Unrolled over the
  // ring, so that every address is a constant.
  DEVICE void multiply(float (&acc)[T::BLOCKS][T::TOKENS / 2], int steps) {
#pragma unroll
    for (int b = 0; b < T::BLOCKS; b++)
#pragma unroll
      for (int i = 0; i < T::TOKENS / 2; i++) acc[b][i] = 0;
    mbar_wait(ring.full(0), parity(0));
    load(0, 0);
    convert(0, frag[0]);
    load(0, 1);
    constexpr uint32_t ALL = uint32_t((uint64_t(1) << T::STAGES) - 1);
#pragma unroll 1
    for (int left = steps; left > 0; left -= T::STAGES) {
      const uint64_t acts = wgmma_descriptor(uniform(ring.acts(0) + acts_offset));
#pragma unroll
      for (int slot = 0; slot < T::STAGES; slot++) {
        if (slot >= left) break;
        const int next_slot = (slot + 1) % T::STAGES, old_slot = (slot + T::STAGES - 1) % T::STAGES;
        const uint32_t next_parity = parity(next_slot) ^ (next_slot == 0);
        uint32_t ready = 1;
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
          const bool to_next = u == UNITS - 2 && slot + 1 < left;  // the unit to load is the next step's first
          if (to_next) ready = mbar_test(ring.full(next_slot), next_parity);  // looked at after a conversion
          multiply_unit(acc[u % T::BLOCKS], frag[u % 2],
                        acts + (slot * T::ACTS_BYTES + u / T::BLOCKS * T::ACTS_TILE >> 4));
          if (u == 0 && (slot > 0 || left < steps)) ring.release(old_slot, lane);  // its last unit has retired
          convert((u + 1) % UNITS, frag[(u + 1) % 2]);
          if (to_next && !ready) mbar_wait(ring.full(next_slot), next_parity);
          // (after the last step's, old units are loaded and converted for nothing)
          load(u + 2 < UNITS ? slot : next_slot, (u + 2) % UNITS);
        }
      }
      fillings ^= left >= T::STAGES ? ALL : (1u << left) - 1;
    }
    wgmma_wait<0>();
    ring.release((steps + T::STAGES - 1) % T::STAGES, lane);
  }

  // Waits for a filling of `slot` that holds something else than a step.
  DEVICE void wait(int slot) {
    mbar_wait(ring.full(slot), parity(slot));
    fillings ^= 1u << slot;
  }

 private:
  // In a single range of K all slots of a round have the same parity.
  DEVICE uint32_t parity(int slot) const { return (T::ONE_RANGE ? fillings : fillings >> slot) & 1; }

  DEVICE bool may_be_new(int unit) const { return unit / T::BLOCKS % 2 == 0 || per_unit; }

  DEVICE void load(int slot, int unit) {
    const int b = unit % T::BLOCKS, k = unit / T::BLOCKS;
    words = load_shared_128(my_words + slot * T::WEIGHTS_BYTES + b * T::STRIP_BYTES + k * UNIT_BYTES);
    if (may_be_new(unit)) {
      const uint32_t scales = my_scales + slot * T::SCALES_BYTES + k * T::SCALE_ROW + b * 128;
      new_g = load_shared_16(scales);
      new_g8 = load_shared_16(scales + 16);
    }
  }
  DEVICE void convert(int unit, uint32_t (&to)[4][4]) {
    PairScale<Types>& s = scale[unit % T::BLOCKS];
    if (may_be_new(unit)) {
      s.g.set(new_g);
      s.g8.set(new_g8);
    }
    s.convert(words.x, to[0]);
    s.convert(words.y, to[1]);
    s.convert(words.z, to[2]);
    s.convert(words.w, to[3]);
  }
  // When it returns, the unit before this one has retired.
  DEVICE void multiply_unit(float (&acc)[T::TOKENS / 2], const uint32_t (&a)[4][4], uint64_t desc) {
    wgmma_fence();
#pragma unroll
    for (int f = 0; f < 4; f++) wgmma_rs<typename Types::template Atom<T::TOKENS>, T::TOKENS>(acc, a[f], desc + 2 * f);
    wgmma_commit();
    wgmma_wait<1>();
  }
};

}  // namespace machete
