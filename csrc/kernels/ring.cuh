// SPDX-License-Identifier: Apache-2.0
// What both families share: the shared-memory ring's layout, the producers that fill it, and the consumers' inner step
// that multiplies one 64 x 64 unit of weights while it loads and converts the next.
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

template <int RowWarpgroups, int KWarpgroups, int Blocks, int Units, int Tokens, int Stages>
struct Tile {
  static constexpr int ROW_WG = RowWarpgroups, K_WG = KWarpgroups;  // consumer warpgroups along N and along K
  static constexpr int BLOCKS = Blocks;                             // 64-row blocks of a warpgroup
  static constexpr int UNITS = Units;                               // 64-k units of a warpgroup and step
  static constexpr int TOKENS = Tokens;                             // n of the wgmma instruction
  static constexpr int STAGES = Stages;

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

  static_assert((STRIPS & (STRIPS - 1)) == 0 && (K_WG & (K_WG - 1)) == 0, "powers of two");
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

// A position in the ring: slot and phase parity.
template <int Stages>
struct Position {
  int slot = 0;
  uint32_t parity = 0;
  DEVICE void advance() {
    if (++slot == Stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Whether every unit, and not just every other, may start a new group: an odd number of units share a scale.
DEVICE bool scale_per_unit(const GemmParams& p, int k_units) { return (p.group_units & 1) && p.group_units < k_units; }

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
    per_unit = !T::PAIRS || scale_per_unit(p, k_units);
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

// A consumer thread's registers between units. Fragments f and f + 1 are being multiplied while f + 2 is converted.
template <class Types, class T>
struct Consumer {
  PairScale<Types> scale[T::BLOCKS];
  uint4 words;
  uint32_t frag[4][4];

  DEVICE void start(uint32_t word_address, uint32_t scale_address) {
    words = load_shared_128(word_address);
    scale[0].g.set(load_shared_16(scale_address));
    scale[0].g8.set(load_shared_16(scale_address + 16));
    scale[0].convert(words.x, frag[0]);
    scale[0].convert(words.y, frag[1]);
  }

  // Multiplies the unit whose words are held, of block `b`, with the activations at `desc`, and makes the unit at
  // `next_words`, of block `nb`, the held one. wait_for_next() returns when that one has arrived. release() is called
  // when every multiplication issued before this unit has retired.
  template <class Wait, class Release>
  DEVICE void unit(float (&acc)[T::TOKENS / 2], uint64_t desc, int b, int nb, uint32_t next_words, uint32_t next_scales,
                   bool new_scale, Wait wait_for_next, Release release) {
    auto multiply = [&](int f) {
      wgmma_fence();
      wgmma_rs<typename Types::template Atom<T::TOKENS>, T::TOKENS>(acc, frag[f], desc + 2 * f);
      wgmma_commit();
      wgmma_wait<2>();  // f - 2 has retired
    };
    uint32_t s_g = 0, s_g8 = 0;
    multiply(0);
    scale[b].convert(words.z, frag[2]);
    wait_for_next();
    const uint4 next = load_shared_128(next_words);
    if (new_scale) {
      s_g = load_shared_16(next_scales);
      s_g8 = load_shared_16(next_scales + 16);
    }
    multiply(1);
    release();
    scale[b].convert(words.w, frag[3]);
    multiply(2);
    if (new_scale) {
      scale[nb].g.set(s_g);
      scale[nb].g8.set(s_g8);
    }
    scale[nb].convert(next.x, frag[0]);
    multiply(3);
    scale[nb].convert(next.y, frag[1]);
    words = next;
  }
};

}  // namespace machete
