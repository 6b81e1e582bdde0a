// SPDX-License-Identifier: Apache-2.0
// Columns of a matrix of 16-bit elements in another order, for activations of layers with act-order:
//   out[m, j] = a[m, order[j]]
//
// A thread has pieces of 8 consecutive columns of the output, whose order it reads once and keeps in registers for all
// rows of its CTA. The elements come from one of two places (machete_aot/permute_plan.py chooses):
// * Few elements: from global memory, a piece a thread. An SM gathers about one element a clock from there, because the
//   32 addresses of a warp lie in 32 cache lines, but nothing has to be copied before.
// * Many: `stage_rows` rows at a time are copied to shared memory, where a warp's 32 addresses take about 3.5 clocks.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace machete {

constexpr int PERMUTE_PIECE = 8;  // columns: 16 bytes of the output, 32 of the order

// Constant while the kernel runs, so past the ordinary cache. Volatile: must stay before the wait.
DEVICE int4 load_order_4(const int32_t* p) {
  int4 v;
  asm volatile("ld.global.nc.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE int load_order(const int32_t* p) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
DEVICE void copy_async_16(uint32_t dst, const void* src) {  // past L1: each byte is read once
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
DEVICE void store_shared_16(uint32_t dst, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(dst), "h"(v) : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE bool on_16_bytes(const void* p, int64_t stride) {
  return (reinterpret_cast<uint64_t>(p) | 2 * stride) % 16 == 0;
}

// The order of `count` columns, at most 8; of columns that there are not, 0, which is always an element of a row.
DEVICE void load_piece(int (&order)[PERMUTE_PIECE], const int32_t* p, int count) {
  if (count == PERMUTE_PIECE && reinterpret_cast<uint64_t>(p) % 16 == 0) {
    const int4 low = load_order_4(p), high = load_order_4(p + 4);
    order[0] = low.x, order[1] = low.y, order[2] = low.z, order[3] = low.w;
    order[4] = high.x, order[5] = high.y, order[6] = high.z, order[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < PERMUTE_PIECE; i++) order[i] = i < count ? load_order(p + i) : 0;
  }
}

DEVICE void store_piece(uint16_t* out, const uint32_t (&values)[PERMUTE_PIECE], int count, bool aligned) {
  if (count == PERMUTE_PIECE && aligned) {
    store_global_128(out, make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16,
                                     values[4] | values[5] << 16, values[6] | values[7] << 16));
  } else {
#pragma unroll
    for (int i = 0; i < PERMUTE_PIECE; i++)
      if (i < count) out[i] = uint16_t(values[i]);
  }
}

// `rows` rows of `columns` elements into shared memory, `pitch` bytes apart, by all threads of the CTA.
DEVICE void stage(uint32_t shared, int pitch, const uint16_t* a, int64_t a_stride, int rows, int columns) {
  const int whole = on_16_bytes(a, a_stride) ? columns / PERMUTE_PIECE : 0;  // a row that is not aligned: elements
  for (int row = 0; row < rows; row++, shared += pitch, a += a_stride) {
    for (int i = threadIdx.x; i < whole; i += blockDim.x) copy_async_16(shared + 16 * i, a + PERMUTE_PIECE * i);
    for (int i = PERMUTE_PIECE * whole + threadIdx.x; i < columns; i += blockDim.x)
      store_shared_16(shared + 2 * i, a[i]);
  }
  wait_for_copies();
  __syncthreads();
}

// CTA (x, y) has the `pieces` pieces from x * pieces on, one a thread at most, and with stage_rows = 0 the rows y,
// y + gridDim.y, ..., or else groups of stage_rows rows likewise.
DEVICE void permute_columns(const uint16_t* a, const int32_t* order, uint16_t* out, int64_t a_stride,
                            int64_t out_stride, int rows, int columns, int pieces, int stage_rows) {
  extern __shared__ __align__(16) uint8_t memory[];
  launch_dependents();  // the product behind this kernel reads its weights meanwhile
  const int64_t column = int64_t(blockIdx.x * pieces + threadIdx.x) * PERMUTE_PIECE;
  const int count = threadIdx.x < pieces ? int(min(columns - column, int64_t(PERMUTE_PIECE))) : 0;
  int found[PERMUTE_PIECE];
  load_piece(found, order + column, count);
  // In every thread, whether it has a piece or not: who waits for this kernel must have waited for those before it.
  wait_for_predecessors();
  const bool aligned = on_16_bytes(out, out_stride);
  const uint32_t shared = smem_address(memory);
  const int pitch = (2 * columns + 15) / 16 * 16, step = max(stage_rows, 1);
  for (int64_t row = int64_t(blockIdx.y) * step; row < rows; row += int64_t(gridDim.y) * step) {
    const int group = int(min(int64_t(step), rows - row));
    if (stage_rows) stage(shared, pitch, a + row * a_stride, a_stride, group, columns);
#pragma unroll 1
    for (int i = 0; i < group && count > 0; i++) {
      uint32_t values[PERMUTE_PIECE];
      if (stage_rows) {
        const uint32_t from = shared + i * pitch;
#pragma unroll
        for (int j = 0; j < PERMUTE_PIECE; j++) values[j] = load_shared_16(from + 2 * found[j]);
      } else {
        const uint16_t* from = a + row * a_stride;
#pragma unroll
        for (int j = 0; j < PERMUTE_PIECE; j++) values[j] = from[found[j]];
      }
      store_piece(out + (row + i) * out_stride + column, values, count, aligned);
    }
    if (stage_rows) __syncthreads();  // before the next rows overwrite these
  }
}

}  // namespace machete
