// SPDX-License-Identifier: Apache-2.0
// What both families share: the shared-memory ring's layout. producers.cuh fills it, consumer.cuh empties it.
//
// A ring stage holds one step of K: activations (128-byte swizzled tiles of TOKENS rows x 64 k), prepacked weights,
// scales and zero points. Full barriers count the producers, empty ones the consumer warps. Weights, with scales and
// zero points, go through registers two units before they are multiplied, and their place is free as soon as the last
// of a stage is converted; activations are read by the multiplications themselves, and are needed when the first of
// these starts until the last has ended. So they have barriers of their own (APART): with one pair for both, a stage
// would be in use for two units longer at either end, of a ring of 8 to 24 units. That is worth 1 to 5% up to 64 tokens
// and costs 2% above, where the tensor cores set the pace.
//
// Groups of k that are not multiples of 64, "fine" ones, have their scales change within units. They have kernels of
// their own: with a branch in each unit those of other groups would take up to a tenth longer.
//
// The CTAs of a tile's cluster (CLUSTER; not those that family "stream" divides K among) have different rows and the
// same tokens. Each copies its part of a step's activations, into all of them. So these are filled in step: the place
// of a slot's activations is free when the consumers of all CTAs have released it.
#pragma once
#include <cuda.h>

#include "gemm_params.h"
#include "ptx.cuh"

namespace machete {

struct TensorMaps {  // the kernels' first parameter; machete_aot/abi.py says which of them a launch has
  CUtensorMap acts, scales, zeros;
};

constexpr int UNIT_K = 64, UNIT_ROWS = 64;
constexpr int PART_BYTES = 2048;  // 16 bytes for each thread of a warpgroup: a prepacked unit of 4-bit weights, half of
                                  // one of 8-bit weights

template <int RowWarpgroups, int KWarpgroups, int Blocks, int Units, int Tokens, int Stages, int CtasPerSm,
          int UnitBytes, int AuxRows, int Cluster = 1>
struct Tile {
  static constexpr int ROW_WG = RowWarpgroups, K_WG = KWarpgroups;  // consumer warpgroups along N and along K
  static constexpr int BLOCKS = Blocks;                             // 64-row blocks of a warpgroup
  static constexpr int UNITS = Units;                               // 64-k units of a warpgroup and step
  static constexpr int TOKENS = Tokens;                             // n of the wgmma instruction
  static constexpr int STAGES = Stages;
  static constexpr int CTAS_PER_SM = CtasPerSm;  // resident ones, which bounds the registers
  static constexpr int CLUSTER = Cluster;        // CTAs that share activations
  static constexpr int UNIT_BYTES = UnitBytes;   // of a prepacked unit
  static constexpr bool APART = Tokens < 128;    // weights and activations have barriers of their own
  static constexpr bool GENERAL = AuxRows > 1;   // beside a row of scales there is one of zero points
  static constexpr bool FINE = AuxRows == 4;     // and each half of a unit has its own
  static constexpr int HALVES = FINE ? 2 : 1;
  static_assert(AuxRows == 1 || AuxRows == 2 || AuxRows == 4, "see TypeConfig.aux_rows");

  static constexpr int STEP_UNITS = K_WG * UNITS;
  static constexpr int STRIPS = ROW_WG * BLOCKS, ROWS = UNIT_ROWS * STRIPS;
  static constexpr int WARPS = 4 * ROW_WG * K_WG;              // consumers
  static constexpr int ACTS_TILE = TOKENS * 128;               // TOKENS rows of 64 k
  static constexpr int ACTS_BYTES = STEP_UNITS * ACTS_TILE;    // of a stage, as all below
  static constexpr int STRIP_BYTES = STEP_UNITS * UNIT_BYTES;  // weights of one strip
  static constexpr int WEIGHTS_BYTES = STRIPS * STRIP_BYTES;   // of all strips
  static constexpr int SCALE_ROW = ROWS * 2;                   // of scales, and of zero points, whatever their size
  static constexpr int SCALE_ROWS = STEP_UNITS * HALVES;
  static constexpr int SCALES_BYTES = SCALE_ROWS * SCALE_ROW;
  static constexpr int AUX_BYTES = STEP_UNITS * AuxRows * SCALE_ROW;  // scales, and zero points likewise
  static_assert(UNITS % 2 == 0, "a step starts at an even unit for every warpgroup");
  static_assert((STEP_UNITS & (STEP_UNITS - 1)) == 0, "so that groups that divide a step are powers of two");

  // shared memory, in order; activations first, because their tiles need 1024-byte alignment
  static constexpr uint32_t WEIGHTS_AT = STAGES * ACTS_BYTES;
  static constexpr uint32_t SCALES_AT = WEIGHTS_AT + STAGES * WEIGHTS_BYTES;
  static constexpr uint32_t BARRIERS_AT = SCALES_AT + STAGES * AUX_BYTES;
  static constexpr uint32_t RING_END = (BARRIERS_AT + ((APART ? 4 : 2) * STAGES + 1) * 8 + 127) / 128 * 128;
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

constexpr int PRODUCERS = 3;  // warps: of weights, of activations, of scales and zero points

// The ring's addresses in this CTA.
template <class T>
struct Ring {
  uint32_t base;
  // For a warp: without it the compiler computes the base anew in every round of the producers' loops.
  DEVICE Ring copy() const { return {uniform(base)}; }

  DEVICE uint32_t acts(int slot) const { return base + slot * T::ACTS_BYTES; }
  DEVICE uint32_t weights(int slot) const { return base + T::WEIGHTS_AT + slot * T::WEIGHTS_BYTES; }
  DEVICE uint32_t scales(int slot) const { return base + T::SCALES_AT + slot * T::AUX_BYTES; }
  DEVICE uint32_t zeros(int slot) const { return scales(slot) + T::SCALES_BYTES; }
  DEVICE uint32_t weights_full(int slot) const { return barrier(slot); }
  DEVICE uint32_t weights_empty(int slot) const { return barrier(T::STAGES + slot); }
  DEVICE uint32_t acts_full(int slot) const { return barrier((T::APART ? 2 : 0) * T::STAGES + slot); }
  DEVICE uint32_t acts_empty(int slot) const { return barrier((T::APART ? 3 : 1) * T::STAGES + slot); }
  DEVICE uint32_t extra_barrier() const { return barrier((T::APART ? 4 : 2) * T::STAGES); }

  static constexpr int ACTS_ARRIVALS = T::APART ? 1 : PRODUCERS;  // that complete a slot's activations
  DEVICE void init_barriers() const {
    for (int s = 0; s < T::STAGES; s++) {  // full: one arrival by each producer, and their bytes
      if (T::APART) mbar_init(weights_full(s), PRODUCERS - 1);
      if (T::APART) mbar_init(weights_empty(s), T::WARPS * ARRIVALS);
      mbar_init(acts_full(s), ACTS_ARRIVALS);
      mbar_init(acts_empty(s), T::CLUSTER * T::WARPS * ARRIVALS);
    }
  }
  // By a consumer warp that has read a stage's weights, scales and zero points, or its activations, for the last time.
  // The warp's barrier orders the other lanes' reads before the arrival.
  DEVICE void release_weights(int slot, int lane) const {
    if (!T::APART) return;
    __syncwarp();
    if (ARRIVALS == 32 || lane == 0) mbar_arrive(weights_empty(slot));
  }
  DEVICE void release_acts(int slot, int lane) const {
    __syncwarp();
    if (T::CLUSTER == 1) {
      if (ARRIVALS == 32 || lane == 0) mbar_arrive(acts_empty(slot));
    } else if (ARRIVALS == 1) {  // lane r tells rank r, whose copies come here too
      if (lane < T::CLUSTER) mbar_arrive_at(peer_address(acts_empty(0), lane) + 8 * slot);
    } else {
      for (int rank = 0; rank < T::CLUSTER; rank++) mbar_arrive_at(peer_address(acts_empty(slot), rank));
    }
  }

 private:
  DEVICE uint32_t barrier(int i) const { return base + T::BARRIERS_AT + 8 * i; }
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
}  // namespace machete
