// SPDX-License-Identifier: Apache-2.0
// What both families share: the shared-memory ring's layout, the producers that fill it, and the consumers' loop, which
// multiplies one 64 x 64 unit of weights while it loads and converts the next.
//
// A ring stage holds one step of K: activations (128-byte swizzled tiles of TOKENS rows x 64 k), prepacked weights,
// scales and zero points. One full barrier a stage counts the producers; one empty barrier counts the consumer warps.
//
// Groups of k that are not multiples of 64, "fine" ones, have their scales change within units. They have kernels of
// their own: with a branch in each unit those of other groups would take up to a tenth longer.
//
// The CTAs of a tile's cluster (CLUSTER; not those that family "stream" divides K among) have different rows and the
// same tokens. Each copies its part of a step's activations, into all of them. So their rings are filled in step: a
// slot is free when the consumers of all CTAs have released it.
#pragma once
#include <cuda.h>

#include "gemm_params.h"
#include "ptx.cuh"
#include "types.cuh"
#include "wgmma.cuh"

namespace machete {

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
  static constexpr int SCALE_ROW = ROWS * 2;
  static constexpr int SCALES_BYTES = STEP_UNITS * HALVES * SCALE_ROW;
  static constexpr int AUX_BYTES = STEP_UNITS * AuxRows * SCALE_ROW;  // scales, and zero points likewise
  static constexpr bool PAIRS = UNITS % 2 == 0;  // a step starts at an even unit for every warpgroup

  // shared memory, in order; activations first, because their tiles need 1024-byte alignment
  static constexpr uint32_t WEIGHTS_AT = STAGES * ACTS_BYTES;
  static constexpr uint32_t SCALES_AT = WEIGHTS_AT + STAGES * WEIGHTS_BYTES;
  static constexpr uint32_t BARRIERS_AT = SCALES_AT + STAGES * AUX_BYTES;
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
  DEVICE uint32_t full(int slot) const { return base + T::BARRIERS_AT + 8 * slot; }
  DEVICE uint32_t empty(int slot) const { return base + T::BARRIERS_AT + 8 * (T::STAGES + slot); }
  DEVICE uint32_t extra_barrier() const { return base + T::BARRIERS_AT + 16 * T::STAGES; }

  DEVICE void init_barriers() const {
    for (int s = 0; s < T::STAGES; s++) {
      mbar_init(full(s), PRODUCERS);  // one arrival by each, and their bytes
      mbar_init(empty(s), T::CLUSTER * T::WARPS * ARRIVALS);
    }
  }
  DEVICE void release(int slot, int lane) const {  // by a consumer warp that has read a stage for the last time
    __syncwarp();                                  // orders the other lanes' reads before the arrival
    if (T::CLUSTER == 1) {
      if (ARRIVALS == 32 || lane == 0) mbar_arrive(empty(slot));
    } else if (ARRIVALS == 1) {  // lane r tells rank r, whose copies come here too
      if (lane < T::CLUSTER) mbar_arrive_at(peer_address(empty(0), lane) + 8 * slot);
    } else {
      for (int rank = 0; rank < T::CLUSTER; rank++) mbar_arrive_at(peer_address(empty(slot), rank));
    }
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

// Whether scales may change at every unit of K, and not just at every other.
template <class T>
DEVICE bool changes_per_unit(const GemmParams& p) {
  return T::FINE || !T::PAIRS || (p.group_blocks % 4 && p.group_blocks < (p.k + 31) / 32);
}

// One producer's loop over `steps` stages: `load(slot, step)` each time that a slot is free.
template <class T, class Load>
DEVICE void fill(const Ring<T>& ring, Position<T::STAGES>& at, int steps, Load load) {
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    mbar_wait(ring.empty(at.slot), at.free_parity());
    load(at.slot, step);
    at.advance();
  }
}

// The producers: one lane each, to be elected and used from beginning to end, since state that crosses a join of lanes
// is no longer uniform for the compiler, which then wraps every copy in a loop over lanes. The instructions of a lane
// between two stages bound the rate at which the ring is filled, so that each kind of operand has a lane of its own.
// Weights, scales and zero points are constants: their producers never wait for earlier kernels.

// Weights of a strip are one contiguous run. A cluster's last CTA may have no rows at all. Units past the end of K get
// no weights (what lies in shared memory is some code, times activations that arrive as zeros).
template <class T>
struct WeightProducer {
  const uint8_t* words;
  size_t strip_stride;  // in bytes
  int strips, unit, units;

  // `unit0` is where the K range starts.
  DEVICE WeightProducer(const GemmParams& p, int row0, int unit0, int k_units) {
    unit = unit0;
    units = k_units;
    strip_stride = size_t(k_units) * T::UNIT_BYTES;
    words = p.weights + size_t(row0 / UNIT_ROWS) * strip_stride + size_t(unit0) * T::UNIT_BYTES;
    strips = (min(T::ROWS, p.n - row0) + UNIT_ROWS - 1) / UNIT_ROWS;
  }
  DEVICE void load(const Ring<T>& ring, int slot, uint64_t policy) {
    const uint32_t bytes = min(T::STEP_UNITS, units - unit) * T::UNIT_BYTES, bar = ring.full(slot);
    if (T::CLUSTER > 1 && strips <= 0) {  // all rows are past n
      mbar_arrive(bar);
      return;
    }
    mbar_expect(bar, strips * bytes);
#pragma unroll
    for (int j = 0; j < T::STRIPS; j++)
      if (j < strips) bulk_copy(ring.weights(slot) + j * T::STRIP_BYTES, words + j * strip_stride, bytes, bar, policy);
    words += T::STEP_UNITS * T::UNIT_BYTES;
    unit += T::STEP_UNITS;
  }
};

// The copy engine takes requests in order. A kernel that moves in beside the one before it could have all of its ring
// queued up before that one's activations, which all of its warps wait for; so the first filling is not asked for
// faster than this. That is still nearly twice what memory delivers.
constexpr uint32_t FILLING_RATE = 24;  // bytes of weights per cycle
struct Pace {
  const uint32_t begin = clock_cycles();
  DEVICE void hold(uint32_t bytes) const {
    while (clock_cycles() - begin < bytes / FILLING_RATE) {
    }
  }
};

// Units past the end of K get the last group's scales, so that no stale scale can make a NaN.
template <class T>
struct ScaleProducer {
  static constexpr int ROWS = T::STEP_UNITS * T::HALVES;  // of a stage

  const uint8_t *scales, *zeros;     // of the group that `at` lies in
  size_t scale_stride, zero_stride;  // in bytes
  int scale_bytes, zero_bytes = 0;   // of a row; 0 without zero points
  int at, end, boundary, group;      // position in K, its end, the group's end and length, in rows: units, or halves
  int every;                         // of a stage's rows is copied
  uint32_t bytes;                    // of a stage

  // `unit0` is where the K range starts.
  DEVICE ScaleProducer(const GemmParams& p, int row0, int unit0) {
    const int rows = min(T::ROWS, p.n - row0);
    scale_bytes = (rows + 7) / 8 * 16;
    at = unit0 * T::HALVES;
    end = T::FINE ? (p.k + 31) / 32 : (p.k + UNIT_K - 1) / UNIT_K;
    group = T::FINE ? p.group_blocks : (p.group_blocks + 1) / 2;
    // at / group without an integer division, which would delay the first copy: exact below 2^21, since
    // (at + 0.5) / group is at least 0.5 / group away from an integer
    const int index = at == 0 ? 0 : int((float(at) + 0.5f) * __frcp_rn(float(group)));
    boundary = (index + 1) * group;
    scale_stride = size_t(p.scale_stride) * 2;
    scales = reinterpret_cast<const uint8_t*>(p.scales + row0) + index * scale_stride;
    if (T::GENERAL) {
      const int log_size = p.flags & FLAG_INTEGER_ZEROS ? 0 : 1;
      zero_stride = p.zeros ? size_t(p.zero_stride) << log_size : 0;
      zeros = static_cast<const uint8_t*>(p.zeros) + (size_t(row0) << log_size) + index * zero_stride;
      zero_bytes = p.zeros == nullptr ? 0 : log_size ? scale_bytes : (rows + 15) / 16 * 16;
    }
    every = changes_per_unit<T>(p) ? 1 : 2;
    bytes = (ROWS + every - 1) / every * (scale_bytes + zero_bytes);
    if (T::CLUSTER > 1 && rows <= 0) bytes = 0;
  }
  DEVICE void load(const Ring<T>& ring, int slot, uint64_t policy) {
    const uint32_t bar = ring.full(slot);
    mbar_expect(bar, bytes);
    if (T::CLUSTER > 1 && bytes == 0) return;  // all rows are past n
#pragma unroll(T::FINE ? 1 : ROWS)
    for (int r = 0; r < ROWS; r++) {
      if (r % 2 && every == 2) continue;
      bulk_copy(ring.scales(slot) + r * T::SCALE_ROW, scales, scale_bytes, bar, policy);
      if (T::GENERAL && zero_bytes) bulk_copy(ring.zeros(slot) + r * T::SCALE_ROW, zeros, zero_bytes, bar, policy);
      at += every;
      if (at >= boundary && boundary < end) {
        scales += scale_stride;
        if (T::GENERAL) zeros += zero_stride;
        boundary += group;
      }
    }
  }
};

// What a consumer thread loads of a row of scales, and of zero points, for its rows g and g + 8.
template <class Types, bool General = Types::GENERAL>
struct RawRows {
  uint32_t g, g8;
};
template <class Types>
struct RawRows<Types, true> {
  uint32_t g, g8, zero_g, zero_g8;
};

// Where a consumer thread's zero points lie in the ring. In a launch without any the scales stand in for them.
template <class Types, bool General = Types::GENERAL>
struct ZeroRows {
  DEVICE ZeroRows(const GemmParams&, uint32_t, uint32_t, int) {}
  DEVICE void load(RawRows<Types>&, uint32_t, int) const {}
  DEVICE void set(typename Types::Rows& rows, const RawRows<Types>& raw) const { rows.set(pair(raw.g, raw.g8)); }
};
template <class Types>
struct ZeroRows<Types, true> {
  const typename Types::Aux aux;
  const bool integers;
  uint32_t mine;  // address of the first; one of a byte is read with its neighbour

  DEVICE ZeroRows(const GemmParams& p, uint32_t my_scales, uint32_t zeros, int row)
      : aux(p, row),
        integers(Types::ZERO_BYTES ? Types::ZERO_BYTES == 1 : p.zeros && (p.flags & FLAG_INTEGER_ZEROS)),
        mine(!p.zeros   ? my_scales
             : integers ? zeros + (row & ~1)
                        : zeros + row * 2) {}
  DEVICE void load(RawRows<Types>& to, uint32_t at, int block) const {
    const uint32_t bytes = integers ? 1 : 2, first = mine + at + block * 64 * bytes;
    to.zero_g = load_shared_16(first);
    to.zero_g8 = load_shared_16(first + 8 * bytes);
  }
  DEVICE void set(typename Types::Rows& rows, const RawRows<Types>& raw) const {
    rows.set(pair(raw.g, raw.g8), raw.zero_g, raw.zero_g8, aux);
  }
};

// One lane's copy of a step of activations. k past the end arrive as zeros and count as bytes. So do rows past m in the
// last of several tiles of tokens; a single one has no more rows than m, since the copy engine takes longer for a row
// of zeros than for one that it reads. What then lies in the others stays in columns that nobody stores. In a cluster,
// of the units that fall to this CTA's rank; the others' may arrive before their bytes are announced here, but not
// before the slot is free: the CTA that sends them has waited for these consumers too.
template <class T>
DEVICE void load_acts(const Ring<T>& ring, int slot, const CUtensorMap& map, const GemmParams& p, int token0, int unit,
                      int rank = 0) {
  static_assert(T::STEP_UNITS % T::CLUSTER == 0, "every CTA copies as many units");
  constexpr int UNITS = T::STEP_UNITS / T::CLUSTER;
  constexpr uint16_t ALL = (1 << T::CLUSTER) - 1;
  const uint32_t bar = ring.full(slot);
  mbar_expect(bar, min(p.m, T::TOKENS) * (T::ACTS_BYTES / T::TOKENS));
  if (p.flags & FLAG_ACTS_2D) {
    for (int u = rank * UNITS; u < (rank + 1) * UNITS; u++) {
      const uint32_t to = ring.acts(slot) + u * T::ACTS_TILE;
      if (T::CLUSTER == 1) tensor_copy_2d(to, &map, (unit + u) * UNIT_K, token0, bar);
      else tensor_multicast_2d(to, &map, (unit + u) * UNIT_K, token0, bar, ALL);
    }
  } else if (T::CLUSTER == 1) {
    tensor_copy_3d(ring.acts(slot), &map, 0, token0, unit, bar);
  } else {
    const int u = rank * UNITS;
    tensor_multicast_3d(ring.acts(slot) + u * T::ACTS_TILE, &map, 0, token0, unit + u, bar, ALL);
  }
}

// A consumer thread: where its part of slot 0 lies, and its registers between units. While a unit is being multiplied,
// the next one is converted and the one after that is loaded.
template <class Types, class T>
struct Consumer {
  static constexpr int UNITS = T::UNITS * T::BLOCKS;  // of a step: (k64 0, block 0), (k64 0, block 1), .., (k64 1, ..
  static_assert(UNITS % 2 == 0, "the two sets of fragments alternate");
  static_assert(T::GENERAL == Types::GENERAL);
  static constexpr int PARTS = T::UNIT_BYTES / PART_BYTES;
  static constexpr int AUX_PART = T::UNITS * T::HALVES * T::SCALE_ROW;  // rows of scales of a part of a stage's K

  const Ring<T> ring;
  const int lane;
  const bool per_unit;  // see changes_per_unit
  const uint32_t my_words, my_scales, acts_offset;
  const ZeroRows<Types> zeros;
  uint32_t fillings = 0;  // bit s: whether slot s has been filled, and emptied, an odd number of times

  typename Types::Rows rows[T::BLOCKS];  // scales and zero points, prepared
  uint4 words[PARTS];                    // of the next unit
  RawRows<Types> raw[T::HALVES];         // its scales, where they may be new
  uint32_t frag[2][4][4];

  // Of the tile's 64-row strips from `strip0` on, and of the part `k_wg` of a stage's K.
  DEVICE Consumer(const GemmParams& p, const Ring<T>& ring, int strip0, int k_wg, int warp, int lane)
      : ring(ring),
        lane(lane),
        per_unit(changes_per_unit<T>(p)),
        my_words(ring.weights(0) + strip0 * T::STRIP_BYTES + k_wg * T::UNITS * T::UNIT_BYTES + threadIdx.x % 128 * 16),
        my_scales(ring.scales(0) + k_wg * AUX_PART + first_row(strip0, warp, lane) * 2),
        acts_offset(k_wg * T::UNITS * T::ACTS_TILE),
        zeros(p, my_scales, ring.zeros(0) + k_wg * AUX_PART, first_row(strip0, warp, lane)) {}

  // acc = the product over `steps` stages, of which the first is in slot 0; all of them are released. Unrolled over the
  // ring, so that every address is a constant. `late_steps` before the end the next kernel is let in, unless that is 0.
  DEVICE void multiply(float (&acc)[T::BLOCKS][T::TOKENS / 2], int steps, int late_steps = 0) {
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
        if (T::ONE_RANGE && left - slot == late_steps) launch_dependents();
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
          load(u + 2 < UNITS ? slot : next_slot, (u + 2) % UNITS);  // (the last step's for nothing, and the conversion)
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

  // The first of the thread's two rows of its first strip, in the tile.
  static DEVICE int first_row(int strip0, int warp, int lane) { return strip0 * 64 + warp % 4 * 16 + lane / 4; }

  DEVICE bool may_be_new(int unit) const { return unit / T::BLOCKS % 2 == 0 || per_unit; }

  DEVICE void load(int slot, int unit) {
    const int b = unit % T::BLOCKS, k = unit / T::BLOCKS;
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      words[i] =
          load_shared_128(my_words + slot * T::WEIGHTS_BYTES + b * T::STRIP_BYTES + k * T::UNIT_BYTES + i * PART_BYTES);
    if (may_be_new(unit))
#pragma unroll
      for (int h = 0; h < T::HALVES; h++)
        load_rows(raw[h], slot * T::AUX_BYTES + (k * T::HALVES + h) * T::SCALE_ROW, b);
  }
  DEVICE void load_rows(RawRows<Types>& to, uint32_t at, int b) {
    to.g = load_shared_16(my_scales + at + b * 128);
    to.g8 = load_shared_16(my_scales + at + b * 128 + 16);
    zeros.load(to, at, b);
  }
  DEVICE void convert(int unit, uint32_t (&to)[4][4]) {
    auto& s = rows[unit % T::BLOCKS];
    if (may_be_new(unit)) zeros.set(s, raw[0]);
#pragma unroll
    for (int c = 0; c < 4; c++) {
      if (T::FINE && c == 2) zeros.set(s, raw[T::HALVES - 1]);
      if constexpr (PARTS == 1) {
        Types::convert(word(words[0], c), s, to[c]);
      } else {
        const uint4& part = words[c / 2];
        Types::convert(word(part, c % 2 * 2), word(part, c % 2 * 2 + 1), s, to[c]);
      }
    }
  }
  static DEVICE uint32_t word(const uint4& part, int i) {
    return i == 0 ? part.x : i == 1 ? part.y : i == 2 ? part.z : part.w;
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
