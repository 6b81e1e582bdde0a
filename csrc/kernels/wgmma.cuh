// SPDX-License-Identifier: Apache-2.0
// wgmma with A in registers and B in 128-byte swizzled shared memory, both K-major, fp32 accumulation: CuTe's
// instruction wrappers behind one interface that takes the accumulators as an array.
#pragma once
#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "ptx.cuh"

namespace machete {

// Shared-memory operand: start >> 4 | leading offset (unused when swizzled) | 1024 bytes between 8-row groups |
// 128-byte swizzle. Advancing k by 16 elements adds 32 bytes, that is 2.
DEVICE uint64_t wgmma_descriptor(uint32_t smem) {
  return uint64_t((smem & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}
DEVICE void wgmma_fence() { cute::warpgroup_arrive(); }
DEVICE void wgmma_commit() { cute::warpgroup_commit_batch(); }
template <int Pending>
DEVICE void wgmma_wait() {
  cute::warpgroup_wait<Pending>();
}

template <class Atom, size_t... I>
DEVICE void wgmma_call(float (&d)[sizeof...(I)], const uint32_t (&a)[4], uint64_t b, std::index_sequence<I...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, d[I]..., cute::SM90::GMMA::ScaleOut::One);
}
// d[64 rows x Tokens] += a[64 x 16] * b[16 x Tokens]; a thread holds rows g, g + 8 and tokens 8 i + 2 t, + 1 as
// d[4 i + 0, 1] and d[4 i + 2, 3], with g = lane / 4 and t = lane % 4.
template <class Atom, int Tokens>
DEVICE void wgmma_rs(float (&d)[Tokens / 2], const uint32_t (&a)[4], uint64_t b) {
  wgmma_call<Atom>(d, a, b, std::make_index_sequence<Tokens / 2>());
}

// The instruction for a token count: WgmmaAtom<Bf16, 64>::type.
struct Bf16;
struct Fp16;
template <class Element, int Tokens>
struct WgmmaAtom;
#define MACHETE_WGMMA_ATOM(N)                                                                                     \
  template <>                                                                                                     \
  struct WgmmaAtom<Bf16, N> {                                                                                     \
    using type =                                                                                                  \
        cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  };                                                                                                              \
  template <>                                                                                                     \
  struct WgmmaAtom<Fp16, N> {                                                                                     \
    using type =                                                                                                  \
        cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;   \
  };
MACHETE_WGMMA_ATOM(8)
MACHETE_WGMMA_ATOM(16)
MACHETE_WGMMA_ATOM(32)
MACHETE_WGMMA_ATOM(64)
MACHETE_WGMMA_ATOM(128)
MACHETE_WGMMA_ATOM(256)
#undef MACHETE_WGMMA_ATOM

}  // namespace machete
