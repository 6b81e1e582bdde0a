// SPDX-License-Identifier: Apache-2.0
// The types of a product, one traits struct each: how a prepacked word becomes a wgmma A fragment, how scales are
// prepared, and how a sum becomes an output. A new TypeConfig of an existing family needs one such struct.
//
// An A fragment of m64k16 is four registers a thread: R0 (row g, k 2t and 2t + 1), R1 (row g + 8), R2 (row g, k + 8),
// R3 (row g + 8, k + 8). The word's nibbles are ordered so that two masks on the word and two on the word >> 8 pick
// them.
#pragma once
#include <cstdint>

#include "ptx.cuh"
#include "wgmma.cuh"

namespace machete {

DEVICE uint32_t both_halves(uint32_t bits16) {
  uint32_t d;
  asm("{.reg .b16 h;\ncvt.u16.u32 h, %1;\nmov.b32 %0, {h, h};}" : "=r"(d) : "r"(bits16));
  return d;
}

// ---- bf16 activations, 4-bit weights, value = scale * (code - 8).
//
// IEEE exponent fields 0 and 1 share one ulp, so the low 8 bits of a bf16 read as u * 2^-133: a mask already converts.
// One fused multiply-add then applies scale and zero point: fma(u * 2^-133, s * 2^(133 - c), -8 * s * 2^-c) rounds
// once, to round(s * (u - 8)) * 2^-c exactly, the value that dequantising to bf16 gives. Code bits 4 to 7 carry 16 u:
// their scale is 16 times smaller. c = 32 keeps every intermediate normal for scales from 2^-94 up to 2^26; the
// epilogue undoes it.
struct Bf16U4b8 {
  template <int Tokens>
  using Atom = typename WgmmaAtom<Bf16, Tokens>::type;
  static constexpr float UNDO = 4294967296.f;  // 2^c

  struct RowScale {
    uint32_t lo, hi, bias;
    DEVICE void set(uint32_t bits) {
      const uint32_t s = both_halves(bits);
      lo = multiply(s, 0x72007200u);    // 2^101
      hi = multiply(s, 0x70007000u);    // 2^97
      bias = multiply(s, 0xb100b100u);  // -8 * 2^-32
    }
  };
  // 9 instructions for 8 weights
  static DEVICE void convert(uint32_t word, const RowScale& g, const RowScale& g8, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = fma(word & 0x000f000fu, g.lo, g.bias);
    frag[2] = fma(word & 0x00f000f0u, g.hi, g.bias);
    frag[1] = fma(word8 & 0x000f000fu, g8.lo, g8.bias);
    frag[3] = fma(word8 & 0x00f000f0u, g8.hi, g8.bias);
  }
  static DEVICE uint32_t pack(float lo, float hi) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
  }
  static DEVICE float to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

  static DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static DEVICE uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
};

// ---- fp16 activations, 4-bit weights, value = scale * (code - 8).
//
// fp16 lacks the exponent range for the form above: it is exact for six binades of scales only. So the code is put into
// the mantissa of 1024, which makes 1024 + u (or 1024 + 16 u), an exact operation gives u - 8, and a multiplication
// rounds once, to the value that dequantising to fp16 gives, whatever the scale.
struct Fp16U4b8 {
  template <int Tokens>
  using Atom = typename WgmmaAtom<Fp16, Tokens>::type;
  static constexpr float UNDO = 1.f;

  struct RowScale {
    uint32_t s;
    DEVICE void set(uint32_t bits) { s = both_halves(bits); }
  };
  // 13 instructions for 8 weights
  static DEVICE void convert(uint32_t word, const RowScale& g, const RowScale& g8, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = multiply(low(word), g.s);
    frag[2] = multiply(high(word), g.s);
    frag[1] = multiply(low(word8), g8.s);
    frag[3] = multiply(high(word8), g8.s);
  }
  static DEVICE uint32_t pack(float lo, float hi) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
  }
  static DEVICE float to_float(uint16_t bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
  }

  static DEVICE uint32_t low(uint32_t word) {  // 1024 + u - 1032
    return add((word & 0x000f000fu) | 0x64006400u, 0xe408e408u);
  }
  static DEVICE uint32_t high(uint32_t word) {  // (1024 + 16 u) / 16 - 72
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(d)
        : "r"((word & 0x00f000f0u) | 0x64006400u), "r"(0x2c002c00u), "r"(0xd480d480u));
    return d;
  }
  static DEVICE uint32_t add(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static DEVICE uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
};

// The thread's two rows, g and g + 8, of a 16-row fragment.
template <class Types>
struct PairScale {
  typename Types::RowScale g, g8;
  DEVICE void convert(uint32_t word, uint32_t (&frag)[4]) const { Types::convert(word, g, g8, frag); }
};

}  // namespace machete
