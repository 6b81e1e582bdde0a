// SPDX-License-Identifier: Apache-2.0
// The types of a product, one traits struct each: how prepacked words become a wgmma A fragment, how scales and zero
// points are prepared, and how a sum becomes an output. A new TypeConfig of an existing family needs one such struct.
//
// An A fragment of m64k16 is four registers a thread: R0 (row g, k 2t and 2t + 1), R1 (row g + 8), R2 (row g, k + 8),
// R3 (row g + 8, k + 8). A word of 4-bit codes holds all four, its nibbles ordered so that two masks on the word and
// two on the word >> 8 pick them. Of 8-bit codes the first word holds R0 and R1, the second R2 and R3.
//
// A struct whose GENERAL is set also takes zero points, types without one (u4, u8), and groups of 32. It applies
//   value = scale * (code - z)           z the integer zero point, or else the type's own
//   value = scale * code - zero          with floating zero points
#pragma once
#include <cstdint>

#include "gemm_params.h"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace machete {

DEVICE uint32_t both_halves(uint32_t bits16) {
  uint32_t d;
  asm("{.reg .b16 h;\ncvt.u16.u32 h, %1;\nmov.b32 %0, {h, h};}" : "=r"(d) : "r"(bits16));
  return d;
}
// Bytes 0 and 2 of a word in its halves, or bytes 1 and 3; above each the byte `above`.
DEVICE uint32_t even_bytes(uint32_t word, uint32_t above) { return __byte_perm(word, above, 0x4240); }
DEVICE uint32_t odd_bytes(uint32_t word, uint32_t above) { return __byte_perm(word, above, 0x4341); }

// ---- bf16 activations
struct Bf16Types {
  template <int Tokens>
  using Atom = typename WgmmaAtom<Bf16, Tokens>::type;
  static constexpr int OUT = FLAG_OUT_BF16;    // the flag of an output in the activations' type
  static constexpr float UNDO = 4294967296.f;  // 2^c, see below

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
  static DEVICE uint32_t add(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
};

// IEEE exponent fields 0 and 1 share one ulp, so the low 8 bits of a bf16 read as u * 2^-133: a mask already converts.
// One fused multiply-add then applies scale and zero point: fma(u * 2^-133, s * 2^(133 - c), -8 * s * 2^-c) rounds
// once, to round(s * (u - 8)) * 2^-c exactly, the value that dequantising to bf16 gives. Code bits 4 to 7 carry 16 u:
// their scale is 16 times smaller. c = 32 keeps every intermediate normal for scales from 2^-94 up to 2^26; the
// epilogue undoes it.
struct Bf16U4b8 : Bf16Types {
  static constexpr bool GENERAL = false;

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
  template <class Row>
  static DEVICE void convert(uint32_t word, const Row& g, const Row& g8, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = fma(word & 0x000f000fu, g.lo, g.bias);
    frag[2] = fma(word & 0x00f000f0u, g.hi, g.bias);
    frag[1] = fma(word8 & 0x000f000fu, g8.lo, g8.bias);
    frag[3] = fma(word8 & 0x00f000f0u, g8.hi, g8.bias);
  }
};

// As Bf16U4b8, with -z * 2^-c as the addend for a floating zero point z. Where there is none, the type's own zero point
// is a power of two, or 0, times the scale: the same multiplication by another factor, of the scale.
struct Bf16Float : Bf16Types {
  static constexpr bool GENERAL = true;
  static constexpr int ZERO_BYTES = 2;  // of a zero point in the ring
  struct Aux {
    uint32_t factor;
    DEVICE explicit Aux(const GemmParams& p) {
      const float f = p.zeros ? -1.f / UNDO : -float(p.code_zero) / UNDO;
      factor = pack(f, f);
    }
  };
};
struct Bf16U4Float : Bf16Float {
  struct RowScale {
    uint32_t lo, hi, bias;
    DEVICE void set(uint32_t scale, uint32_t zero, const Aux& aux) {
      const uint32_t s = both_halves(scale);
      lo = multiply(s, 0x72007200u);  // 2^101
      hi = multiply(s, 0x70007000u);  // 2^97
      bias = multiply(both_halves(zero), aux.factor);
    }
  };
  static DEVICE void convert(uint32_t word, const RowScale& g, const RowScale& g8, uint32_t (&frag)[4]) {
    Bf16U4b8::convert(word, g, g8, frag);
  }
};
struct Bf16U8Float : Bf16Float {
  struct RowScale {
    uint32_t s, bias;
    DEVICE void set(uint32_t scale, uint32_t zero, const Aux& aux) {
      s = multiply(both_halves(scale), 0x72007200u);  // 2^101
      bias = multiply(both_halves(zero), aux.factor);
    }
  };
  // 8 instructions for 8 weights
  static DEVICE void convert(uint32_t word0, uint32_t word1, const RowScale& g, const RowScale& g8,
                             uint32_t (&frag)[4]) {
    frag[0] = fma(even_bytes(word0, 0), g.s, g.bias);
    frag[1] = fma(odd_bytes(word0, 0), g8.s, g8.bias);
    frag[2] = fma(even_bytes(word1, 0), g.s, g.bias);
    frag[3] = fma(odd_bytes(word1, 0), g8.s, g8.bias);
  }
};

// Integer zero points: (u - z) * 2^-133 is exact, for any u and z up to 255, and the multiplication rounds once. An
// integer below 256 is its own bits as such a number.
struct Bf16Int : Bf16Types {
  static constexpr bool GENERAL = true;
  static constexpr int ZERO_BYTES = 1;
  struct Aux {
    DEVICE explicit Aux(const GemmParams&) {}
  };
  static DEVICE uint32_t minus(uint32_t zero) { return both_halves((zero & 0xffu) | 0x8000u); }
};
struct Bf16U4Int : Bf16Int {
  struct RowScale {
    uint32_t lo, hi, zero_lo, zero_hi;
    DEVICE void set(uint32_t scale, uint32_t zero, const Aux&) {
      const uint32_t s = both_halves(scale);
      lo = multiply(s, 0x72007200u);  // 2^101
      hi = multiply(s, 0x70007000u);  // 2^97
      zero_lo = minus(zero);
      zero_hi = multiply(zero_lo, 0x41804180u);  // 16
    }
  };
  // 13 instructions for 8 weights
  static DEVICE void convert(uint32_t word, const RowScale& g, const RowScale& g8, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = multiply(add(word & 0x000f000fu, g.zero_lo), g.lo);
    frag[2] = multiply(add(word & 0x00f000f0u, g.zero_hi), g.hi);
    frag[1] = multiply(add(word8 & 0x000f000fu, g8.zero_lo), g8.lo);
    frag[3] = multiply(add(word8 & 0x00f000f0u, g8.zero_hi), g8.hi);
  }
};
struct Bf16U8Int : Bf16Int {
  struct RowScale {
    uint32_t s, zero;
    DEVICE void set(uint32_t scale, uint32_t z, const Aux&) {
      s = multiply(both_halves(scale), 0x72007200u);  // 2^101
      zero = minus(z);
    }
  };
  // 12 instructions for 8 weights
  static DEVICE void convert(uint32_t word0, uint32_t word1, const RowScale& g, const RowScale& g8,
                             uint32_t (&frag)[4]) {
    frag[0] = multiply(add(even_bytes(word0, 0), g.zero), g.s);
    frag[1] = multiply(add(odd_bytes(word0, 0), g8.zero), g8.s);
    frag[2] = multiply(add(even_bytes(word1, 0), g.zero), g.s);
    frag[3] = multiply(add(odd_bytes(word1, 0), g8.zero), g8.s);
  }
};

// ---- fp16 activations
//
// fp16 lacks the exponent range for the form above: it is exact for six binades of scales only. So the code is put into
// the mantissa of 1024, which makes 1024 + u (or 1024 + 16 u), an exact operation gives u - z, and a multiplication
// rounds once, to the value that dequantising to fp16 gives, whatever the scale.
struct Fp16Types {
  template <int Tokens>
  using Atom = typename WgmmaAtom<Fp16, Tokens>::type;
  static constexpr int OUT = FLAG_OUT_FP16;  // the flag of an output in the activations' type
  static constexpr float UNDO = 1.f;

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
  static DEVICE uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
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
  static DEVICE uint32_t low(uint32_t word) { return (word & 0x000f000fu) | 0x64006400u; }   // 1024 + u
  static DEVICE uint32_t high(uint32_t word) { return (word & 0x00f000f0u) | 0x64006400u; }  // 1024 + 16 u
  static constexpr uint32_t SIXTEENTH = 0x2c002c00u;
};

struct Fp16U4b8 : Fp16Types {
  static constexpr bool GENERAL = false;

  struct RowScale {
    uint32_t s;
    DEVICE void set(uint32_t bits) { s = both_halves(bits); }
  };
  // 13 instructions for 8 weights
  static DEVICE void convert(uint32_t word, const RowScale& g, const RowScale& g8, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = multiply(add(low(word), 0xe408e408u), g.s);              // 1024 + u - 1032
    frag[2] = multiply(fma(high(word), SIXTEENTH, 0xd480d480u), g.s);  // (1024 + 16 u) / 16 - 72
    frag[1] = multiply(add(low(word8), 0xe408e408u), g8.s);
    frag[3] = multiply(fma(high(word8), SIXTEENTH, 0xd480d480u), g8.s);
  }
};

// The same with another constant in a register, and a fused addend: -(1024 + z) and 0 for an integer zero point z or
// the type's own, -1024 and -z for a floating one. So one struct serves all zero points.
struct Fp16Any : Fp16Types {
  static constexpr bool GENERAL = true;
  static constexpr int ZERO_BYTES = 0;  // as the launch's flags say
  struct Aux {
    uint32_t offset, integer_mask, float_mask;
    DEVICE explicit Aux(const GemmParams& p) {
      const bool integers = p.flags & FLAG_INTEGER_ZEROS;
      offset = 0xe400u | (p.zeros ? 0 : p.code_zero);
      integer_mask = p.zeros && integers ? 0xffu : 0;
      float_mask = p.zeros && !integers ? 0xffffu : 0;
    }
    DEVICE uint32_t minus_offset(uint32_t zero) const { return both_halves(offset | (zero & integer_mask)); }
    DEVICE uint32_t addend(uint32_t zero) const { return both_halves((zero & float_mask) ^ 0x8000u); }
  };
};
struct Fp16U4Any : Fp16Any {
  struct RowScale {
    uint32_t s, zero_lo, zero_hi, bias;
    DEVICE void set(uint32_t scale, uint32_t zero, const Aux& aux) {
      s = both_halves(scale);
      zero_lo = aux.minus_offset(zero);
      zero_hi = add(zero_lo, 0x63806380u);  // -(1024 + z) + 960
      bias = aux.addend(zero);
    }
  };
  static DEVICE void convert(uint32_t word, const RowScale& g, const RowScale& g8, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = fma(add(low(word), g.zero_lo), g.s, g.bias);
    frag[2] = fma(fma(high(word), SIXTEENTH, g.zero_hi), g.s, g.bias);
    frag[1] = fma(add(low(word8), g8.zero_lo), g8.s, g8.bias);
    frag[3] = fma(fma(high(word8), SIXTEENTH, g8.zero_hi), g8.s, g8.bias);
  }
};
struct Fp16U8Any : Fp16Any {
  struct RowScale {
    uint32_t s, zero, bias;
    DEVICE void set(uint32_t scale, uint32_t z, const Aux& aux) {
      s = both_halves(scale);
      zero = aux.minus_offset(z);
      bias = aux.addend(z);
    }
  };
  // 12 instructions for 8 weights; 0x64 above a byte makes 1024 + u
  static DEVICE void convert(uint32_t word0, uint32_t word1, const RowScale& g, const RowScale& g8,
                             uint32_t (&frag)[4]) {
    frag[0] = fma(add(even_bytes(word0, 0x64), g.zero), g.s, g.bias);
    frag[1] = fma(add(odd_bytes(word0, 0x64), g8.zero), g8.s, g8.bias);
    frag[2] = fma(add(even_bytes(word1, 0x64), g.zero), g.s, g.bias);
    frag[3] = fma(add(odd_bytes(word1, 0x64), g8.zero), g8.s, g8.bias);
  }
};

}  // namespace machete
