// SPDX-License-Identifier: Apache-2.0
// The consumers' loop of both families, which multiplies one 64 x 64 unit of weights while it loads and converts the
// next.
#pragma once
#include "ring.cuh"
#include "scale_rows.cuh"
#include "types.cuh"
#include "wgmma.cuh"

namespace machete {

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

// A consumer thread: where its part of slot 0 lies, and its registers between units. While a unit is being multiplied,
// the next one is converted and the one after that is loaded.
template <class Types, class T>
struct Consumer {
  static constexpr int UNITS = T::UNITS * T::BLOCKS;  // of a step: (k64 0, block 0), (k64 0, block 1), .., (k64 1, ..
  static_assert(UNITS % 2 == 0, "the two sets of fragments alternate");
  static_assert(T::GENERAL == Types::GENERAL);
  static constexpr int PARTS = T::UNIT_BYTES / PART_BYTES;
  // Zero points leave two CTAs an SM no register to spare. There the activations' barrier is not tested ahead, of fine
  // groups the weights' neither, and weights are released when fewer registers are in use, half a percent slower.
  static constexpr bool TIGHT = T::GENERAL && T::CTAS_PER_SM > 1;
  static constexpr bool TEST_WEIGHTS = !(TIGHT && T::FINE);
  static constexpr int PART_ROWS = T::UNITS * T::HALVES;  // positions of scales of a part of a stage's K

  const Ring<T> ring;
  const int lane;
  const bool per_unit;         // whether scales may change at every unit of K, and not just at every other
  const uint32_t second_pair;  // offset of the row of the third unit's scales, where they may be new
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
        per_unit(T::FINE || p.group_blocks % 4),
        second_pair((2 >> row_shift(p, T::FINE)) * T::SCALE_ROW),
        my_words(ring.weights(0) + strip0 * T::STRIP_BYTES + k_wg * T::UNITS * T::UNIT_BYTES + threadIdx.x % 128 * 16),
        my_scales(ring.scales(0) + part_offset(p, k_wg) + first_row(strip0, warp, lane) * 2),
        acts_offset(k_wg * T::UNITS * T::ACTS_TILE),
        zeros(p, my_scales, ring.zeros(0) + part_offset(p, k_wg), first_row(strip0, warp, lane)) {}

  // acc = the product over `steps` stages, of which the first is in slot 0; all of them are released. Unrolled over the
  // ring, so that every address is a constant.
  DEVICE void multiply(float (&acc)[T::BLOCKS][T::TOKENS / 2], int steps) {
#pragma unroll
    for (int b = 0; b < T::BLOCKS; b++)
#pragma unroll
      for (int i = 0; i < T::TOKENS / 2; i++) acc[b][i] = 0;
    mbar_wait(ring.weights_full(0), parity(0));
    load(0, 0);
    convert(0, frag[0]);
    load(0, 1);
    constexpr uint32_t ALL = uint32_t((uint64_t(1) << T::STAGES) - 1);
    uint32_t acts_ready = 0;
#pragma unroll 1
    for (int left = steps; left > 0; left -= T::STAGES) {
      const uint64_t acts = wgmma_descriptor(uniform(ring.acts(0) + acts_offset));
#pragma unroll
      for (int slot = 0; slot < T::STAGES; slot++) {
        if (slot >= left) break;
        const int next_slot = (slot + 1) % T::STAGES, old_slot = (slot + T::STAGES - 1) % T::STAGES;
        const uint32_t next_parity = parity(next_slot) ^ (next_slot == 0);
        uint32_t weights_ready = TEST_WEIGHTS;
        if (T::APART && !acts_ready) mbar_wait(ring.acts_full(slot), parity(slot));
#pragma unroll
        for (int u = 0; u < UNITS; u++) {  // barriers are tested before a conversion, and looked at after it
          const bool to_next = u == UNITS - 2 && slot + 1 < left;  // the unit to load is the next step's first
          if (TEST_WEIGHTS && to_next) weights_ready = mbar_test(ring.weights_full(next_slot), next_parity);
          if (TIGHT && u == UNITS - 1) ring.release_weights(slot, lane);
          multiply_unit(acc[u % T::BLOCKS], frag[u % 2],
                        acts + (slot * T::ACTS_BYTES + u / T::BLOCKS * T::ACTS_TILE >> 4));
          if (u == 0 && (slot > 0 || left < steps)) ring.release_acts(old_slot, lane);  // its last unit has retired
          if (T::APART && !TIGHT && u == UNITS - 1) acts_ready = mbar_test(ring.acts_full(next_slot), next_parity);
          convert((u + 1) % UNITS, frag[(u + 1) % 2]);
          if (!TIGHT && u == UNITS - 2) ring.release_weights(slot, lane);  // its last unit is in registers
          if (to_next && !weights_ready) mbar_wait(ring.weights_full(next_slot), next_parity);
          load(u + 2 < UNITS ? slot : next_slot, (u + 2) % UNITS);  // (the last step's for nothing, and the conversion)
        }
      }
      fillings ^= left >= T::STAGES ? ALL : (1u << left) - 1;
    }
    wgmma_wait<0>();
    ring.release_acts((steps + T::STAGES - 1) % T::STAGES, lane);
  }

  // Waits for a filling of a slot's activations with something else than a step.
  DEVICE void wait_acts(int slot) {
    mbar_wait(ring.acts_full(slot), parity(slot));
    fillings ^= 1u << slot;
  }

 private:
  // In a single range of K all slots of a round have the same parity.
  DEVICE uint32_t parity(int slot) const { return (T::ONE_RANGE ? fillings : fillings >> slot) & 1; }

  // The first of the thread's two rows of its first strip, in the tile.
  static DEVICE int first_row(int strip0, int warp, int lane) { return strip0 * 64 + warp % 4 * 16 + lane / 4; }

  static DEVICE uint32_t part_offset(const GemmParams& p, int k_wg) {
    return (k_wg * PART_ROWS >> row_shift(p, T::FINE)) * T::SCALE_ROW;
  }
  // Of the row of scales of unit `k`, half `h`, from its part's first row. Where scales change at every unit, and of
  // fine groups, each has its own.
  DEVICE uint32_t row_offset(int k, int h) const {
    static_assert(T::FINE || T::UNITS <= 4);
    return !T::FINE && k == 2 ? second_pair : (k * T::HALVES + h) * T::SCALE_ROW;
  }

  DEVICE bool may_be_new(int unit) const { return unit / T::BLOCKS % 2 == 0 || per_unit; }

  DEVICE void load(int slot, int unit) {
    const int b = unit % T::BLOCKS, k = unit / T::BLOCKS;
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      words[i] =
          load_shared_128(my_words + slot * T::WEIGHTS_BYTES + b * T::STRIP_BYTES + k * T::UNIT_BYTES + i * PART_BYTES);
    if (may_be_new(unit))
#pragma unroll
      for (int h = 0; h < T::HALVES; h++) load_rows(raw[h], slot * T::AUX_BYTES + row_offset(k, h), b);
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
