// SPDX-License-Identifier: Apache-2.0
// The producers of both families: what one lane each does to fill the ring with weights, activations, and scales with
// zero points.
#pragma once
#include "ring.cuh"
#include "scale_rows.cuh"

namespace machete {

// One producer's loop over `steps` stages: `load(slot, step)` each time that its place in a slot is free, of
// activations or of what goes with the weights.
enum class Operand { Weights, Acts };
template <Operand Of, class T, class Load>
DEVICE void fill(const Ring<T>& ring, Position<T::STAGES>& at, int steps, Load load) {
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    mbar_wait(Of == Operand::Acts ? ring.acts_empty(at.slot) : ring.weights_empty(at.slot), at.free_parity());
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
    const uint32_t bytes = min(T::STEP_UNITS, units - unit) * T::UNIT_BYTES, bar = ring.weights_full(slot);
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
  // Brings the next steps' weights into L2.
  DEVICE void prefetch(int steps, uint64_t policy) const {
    const int bytes = min(steps * T::STEP_UNITS, units - unit) * T::UNIT_BYTES;
    if (bytes <= 0) return;
#pragma unroll
    for (int j = 0; j < T::STRIPS; j++)
      if (j < strips) bulk_prefetch(words + j * strip_stride, bytes, policy);
  }
};

// The copy engine takes requests in order. A kernel that moves in beside the one before it could have all of its ring
// queued up before that one's activations, which all of its warps wait for; so the first filling is not asked for
// faster than this. That is still a quarter more than memory delivers.
constexpr uint32_t FILLING_RATE = 16;  // bytes of weights per cycle
struct Pace {
  const uint32_t begin = clock_cycles();
  DEVICE void hold(uint32_t bytes) const {
    while (clock_cycles() - begin < bytes / FILLING_RATE) {
    }
  }
};

// A kernel that lies beside the one before it has filled its ring long before that one ends, and memory would idle
// until a slot is free. So the steps behind the ring go to L2 meanwhile: as much as memory delivers in that time, and
// no more, since it comes before what the other CTAs still need.
constexpr int AHEAD_BYTES = 64 << 10;  // of weights, for each SM
template <class T>
DEVICE int steps_ahead(const GemmParams& p, int steps) {
  if (T::CTAS_PER_SM == 1 || blockIdx.y > 0) return 0;  // comes when the one before has ended; reads what others read
  const int bytes = p.flags & FLAG_ONE_PER_SM ? AHEAD_BYTES : AHEAD_BYTES / T::CTAS_PER_SM;
  return min(steps - T::STAGES, bytes / T::WEIGHTS_BYTES);
}

// Scales and zero points: of all groups of a stage by one tensor map each, or row by row where stages begin and end
// inside groups. Integer zero points come in pairs, and as many pairs as the tile has rows: so all rows are as long.
template <class T>
struct ScaleProducer {
  const TensorMaps& maps;
  const GemmParams& p;
  const int row0;
  GroupWalk walk;

  // `unit0` is where the K range starts.
  DEVICE ScaleProducer(const TensorMaps& maps, const GemmParams& p, int row0, int unit0)
      : maps(maps), p(p), row0(row0), walk(p, T::FINE, T::SCALE_ROWS, unit0 * T::HALVES) {}
  DEVICE void load(const Ring<T>& ring, int slot, uint64_t policy) {
    const bool zeros = T::GENERAL && p.zeros, integers = zeros && p.flags & FLAG_INTEGER_ZEROS;
    if (p.flags & FLAG_SCALE_MAPS) load_groups(ring, slot, policy, zeros, integers);
    else load_rows(ring, slot, policy, zeros, integers);
  }

  // Brings those of the next steps into L2, where they have tensor maps.
  DEVICE void prefetch(int steps) const {
    if (!(p.flags & FLAG_SCALE_MAPS)) return;
    const bool zeros = T::GENERAL && p.zeros, integers = zeros && p.flags & FLAG_INTEGER_ZEROS;
    GroupWalk next = walk;
    for (; steps > 0; steps--) {
      tensor_prefetch_2d(&maps.scales, row0, next.index);
      if (zeros) tensor_prefetch_2d(&maps.zeros, integers ? row0 / 2 : row0, next.index);
      next.advance(T::SCALE_ROWS);
    }
  }

 private:
  DEVICE void load_groups(const Ring<T>& ring, int slot, uint64_t policy, bool zeros, bool integers) {
    const uint32_t bar = ring.weights_full(slot);
    mbar_expect(bar, walk.groups * (zeros ? 2 * T::SCALE_ROW : T::SCALE_ROW));
    tensor_copy_2d(ring.scales(slot), &maps.scales, row0, walk.index, bar, policy);
    if (zeros) tensor_copy_2d(ring.zeros(slot), &maps.zeros, integers ? row0 / 2 : row0, walk.index, bar, policy);
    walk.advance(T::SCALE_ROWS);
  }
  DEVICE void load_rows(const Ring<T>& ring, int slot, uint64_t policy, bool zeros, bool integers) {
    const int rows = min(T::ROWS, p.n - row0), log_size = integers ? 0 : 1;  // of a zero point
    const uint32_t bar = ring.weights_full(slot), scale_bytes = (rows + 7) / 8 * 16;
    const uint32_t zero_bytes = !zeros ? 0 : integers ? (rows + 15) / 16 * 16 : scale_bytes;
    if (T::CLUSTER > 1 && rows <= 0) {  // all rows are past n
      mbar_arrive(bar);
      return;
    }
    mbar_expect(bar, T::SCALE_ROWS * (scale_bytes + zero_bytes));
#pragma unroll 1
    for (uint32_t to = ring.scales(slot), r = 0; r < T::SCALE_ROWS; r++, to += T::SCALE_ROW) {
      const size_t scale = size_t(walk.index) * p.scale_stride + row0, zero = size_t(walk.index) * p.zero_stride + row0;
      bulk_copy(to, p.scales + scale, scale_bytes, bar, policy);
      if (zeros)
        bulk_copy(to + T::SCALES_BYTES, static_cast<const uint8_t*>(p.zeros) + (zero << log_size), zero_bytes, bar,
                  policy);
      walk.advance(1);
    }
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
  const uint32_t bar = ring.acts_full(slot);
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
}  // namespace machete
