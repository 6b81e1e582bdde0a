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
//
// What conversion needs of a group, Rows, is computed once for both of the thread's rows: what belongs to row g lies in
// the low halves of its registers and what belongs to row g + 8 in the high ones. Instructions of packed halves take
// either half of an operand for both of theirs, so that of_g and of_g8 cost nothing.
#pragma once
#include <cstdint>

#include "gemm_params.h"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace machete {

DEVICE uint32_t pair(uint32_t g, uint32_t g8) { return __byte_perm(g, g8, 0x5410); }  // of their low halves
DEVICE uint32_t of_g(uint32_t pair) {
  uint32_t d;
  asm("{.reg .b16 g, g8;\nmov.b32 {g, g8}, %1;\nmov.b32 %0, {g, g};}" : "=r"(d) : "r"(pair));
  return d;
}
DEVICE uint32_t of_g8(uint32_t pair) {
  uint32_t d;
  asm("{.reg .b16 g, g8;\nmov.b32 {g, g8}, %1;\nmov.b32 %0, {g8, g8};}" : "=r"(d) : "r"(pair));
  return d;
}
// word & mask | bits: of two constants the compiler would make two instructions.
DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "r"(mask), "r"(bits));
  return d;
}
// Selects, for __byte_perm(g, g8), the zero points of one byte that lie at `row`, which is g, and at g + 8: they are
// read with their neighbours, as the lower or the upper byte. They come out as halves, since bytes 2 and 3 of what was
// read are 0.
DEVICE uint32_t zero_bytes(int row) { return row % 2 ? 0x6521 : 0x6420; }
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

  struct Rows {
    uint32_t lo, hi, bias;
    DEVICE void set(uint32_t scales) {
      lo = multiply(scales, 0x72007200u);    // 2^101
      hi = multiply(scales, 0x70007000u);    // 2^97
      bias = multiply(scales, 0xb100b100u);  // -8 * 2^-32
    }
  };
  // 9 instructions for 8 weights
  template <class Rows>
  static DEVICE void convert(uint32_t word, const Rows& rows, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = fma(word & 0x000f000fu, of_g(rows.lo), of_g(rows.bias));
    frag[2] = fma(word & 0x00f000f0u, of_g(rows.hi), of_g(rows.bias));
    frag[1] = fma(word8 & 0x000f000fu, of_g8(rows.lo), of_g8(rows.bias));
    frag[3] = fma(word8 & 0x00f000f0u, of_g8(rows.hi), of_g8(rows.bias));
  }
};

// As Bf16U4b8, with -z * 2^-c as the addend for a floating zero point z. Where there is none, the type's own zero point
// is a power of two, or 0, times the scale: the same multiplication by another factor, of the scale.
struct Bf16Float : Bf16Types {
  static constexpr bool GENERAL = true;
  static constexpr int ZERO_BYTES = 2;  // of a zero point in the ring
  struct Aux {
    uint32_t factor;
    DEVICE Aux(const GemmParams& p, int /*row*/) {
      const float f = p.zeros ? -1.f / UNDO : -float(p.code_zero) / UNDO;
      factor = pack(f, f);
    }
  };
};
struct Bf16U4Float : Bf16Float {
  struct Rows {
    uint32_t lo, hi, bias;
    DEVICE void set(uint32_t scales, uint32_t zero_g, uint32_t zero_g8, const Aux& aux) {
      lo = multiply(scales, 0x72007200u);  // 2^101
      hi = multiply(scales, 0x70007000u);  // 2^97
      bias = multiply(pair(zero_g, zero_g8), aux.factor);
    }
  };
  static DEVICE void convert(uint32_t word, const Rows& rows, uint32_t (&frag)[4]) {
    Bf16U4b8::convert(word, rows, frag);
  }
};
struct Bf16U8Float : Bf16Float {
  struct Rows {
    uint32_t s, bias;
    DEVICE void set(uint32_t scales, uint32_t zero_g, uint32_t zero_g8, const Aux& aux) {
      s = multiply(scales, 0x72007200u);  // 2^101
      bias = multiply(pair(zero_g, zero_g8), aux.factor);
    }
  };
  // 8 instructions for 8 weights
  static DEVICE void convert(uint32_t word0, uint32_t word1, const Rows& rows, uint32_t (&frag)[4]) {
    frag[0] = fma(even_bytes(word0, 0), of_g(rows.s), of_g(rows.bias));
    frag[1] = fma(odd_bytes(word0, 0), of_g8(rows.s), of_g8(rows.bias));
    frag[2] = fma(even_bytes(word1, 0), of_g(rows.s), of_g(rows.bias));
    frag[3] = fma(odd_bytes(word1, 0), of_g8(rows.s), of_g8(rows.bias));
  }
};

// Integer zero points: (u - z) * 2^-133 is exact, for any u and z up to 255, and the multiplication rounds once. An
// integer below 256 is its own bits as such a number. Of code bits 4 to 7 a fused multiply-add takes a sixteenth first.
struct Bf16Int : Bf16Types {
  static constexpr bool GENERAL = true;
  static constexpr int ZERO_BYTES = 1;
  struct Aux {
    uint32_t selector;
    DEVICE Aux(const GemmParams&, int row) : selector(zero_bytes(row)) {}
  };
  struct Rows {
    uint32_t s, minus_zero;
    DEVICE void set(uint32_t scales, uint32_t zero_g, uint32_t zero_g8, const Aux& aux) {
      s = multiply(scales, 0x72007200u);  // 2^101
      minus_zero = __byte_perm(zero_g, zero_g8, aux.selector) | 0x80008000u;
    }
  };
};
struct Bf16U4Int : Bf16Int {
  static constexpr uint32_t SIXTEENTH = 0x3d803d80u;
  // 13 instructions for 8 weights
  static DEVICE void convert(uint32_t word, const Rows& rows, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = multiply(add(word & 0x000f000fu, of_g(rows.minus_zero)), of_g(rows.s));
    frag[2] = multiply(fma(word & 0x00f000f0u, SIXTEENTH, of_g(rows.minus_zero)), of_g(rows.s));
    frag[1] = multiply(add(word8 & 0x000f000fu, of_g8(rows.minus_zero)), of_g8(rows.s));
    frag[3] = multiply(fma(word8 & 0x00f000f0u, SIXTEENTH, of_g8(rows.minus_zero)), of_g8(rows.s));
  }
};
struct Bf16U8Int : Bf16Int {
  // 12 instructions for 8 weights
  static DEVICE void convert(uint32_t word0, uint32_t word1, const Rows& rows, uint32_t (&frag)[4]) {
    frag[0] = multiply(add(even_bytes(word0, 0), of_g(rows.minus_zero)), of_g(rows.s));
    frag[1] = multiply(add(odd_bytes(word0, 0), of_g8(rows.minus_zero)), of_g8(rows.s));
    frag[2] = multiply(add(even_bytes(word1, 0), of_g(rows.minus_zero)), of_g(rows.s));
    frag[3] = multiply(add(odd_bytes(word1, 0), of_g8(rows.minus_zero)), of_g8(rows.s));
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
  static DEVICE uint32_t minus(uint32_t a) {  // which becomes a sign of the operand
    uint32_t d;
    asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
  }
  static DEVICE uint32_t low(uint32_t word) { return and_or(word, 0x000f000fu, 0x64006400u); }   // 1024 + u
  static DEVICE uint32_t high(uint32_t word) { return and_or(word, 0x00f000f0u, 0x64006400u); }  // 1024 + 16 u
  static constexpr uint32_t SIXTEENTH = 0x2c002c00u;
};

struct Fp16U4b8 : Fp16Types {
  static constexpr bool GENERAL = false;

  struct Rows {
    uint32_t s;
    DEVICE void set(uint32_t scales) { s = scales; }
  };
  // 13 instructions for 8 weights
  static DEVICE void convert(uint32_t word, const Rows& rows, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = multiply(add(low(word), 0xe408e408u), of_g(rows.s));              // 1024 + u - 1032
    frag[2] = multiply(fma(high(word), SIXTEENTH, 0xd480d480u), of_g(rows.s));  // (1024 + 16 u) / 16 - 72
    frag[1] = multiply(add(low(word8), 0xe408e408u), of_g8(rows.s));
    frag[3] = multiply(fma(high(word8), SIXTEENTH, 0xd480d480u), of_g8(rows.s));
  }
};

// The same with another constant in a register, and a fused addend: -(1024 + z) and 0 for an integer zero point z or
// the type's own, -1024 and -z for a floating one. So one struct serves all zero points.
struct Fp16Any : Fp16Types {
  static constexpr bool GENERAL = true;
  static constexpr int ZERO_BYTES = 0;  // as the launch's flags say
  struct Aux {
    uint32_t selector, offset;
    bool integers, floats;
    DEVICE Aux(const GemmParams& p, int row) {
      integers = p.zeros && (p.flags & FLAG_INTEGER_ZEROS);
      floats = p.zeros && !integers;
      selector = integers ? zero_bytes(row) : 0x5410;  // or the halves
      offset = 0xe400e400u | (p.zeros ? 0 : p.code_zero * 0x00010001u);
    }
    DEVICE uint32_t zeros(uint32_t zero_g, uint32_t zero_g8) const { return __byte_perm(zero_g, zero_g8, selector); }
    DEVICE uint32_t minus_offset(uint32_t zeros) const { return offset | (integers ? zeros : 0); }
    DEVICE uint32_t subtrahend(uint32_t zeros) const { return floats ? zeros : 0; }
  };
};
struct Fp16U4Any : Fp16Any {
  struct Rows {
    uint32_t s, zero_lo, zero_hi, bias;
    DEVICE void set(uint32_t scales, uint32_t zero_g, uint32_t zero_g8, const Aux& aux) {
      const uint32_t zeros = aux.zeros(zero_g, zero_g8);
      s = scales;
      zero_lo = aux.minus_offset(zeros);
      zero_hi = add(zero_lo, 0x63806380u);  // -(1024 + z) + 960
      bias = aux.subtrahend(zeros);
    }
  };
  // 13 instructions for 8 weights
  static DEVICE void convert(uint32_t word, const Rows& rows, uint32_t (&frag)[4]) {
    const uint32_t word8 = word >> 8;
    frag[0] = fma(add(low(word), of_g(rows.zero_lo)), of_g(rows.s), minus(of_g(rows.bias)));
    frag[2] = fma(fma(high(word), SIXTEENTH, of_g(rows.zero_hi)), of_g(rows.s), minus(of_g(rows.bias)));
    frag[1] = fma(add(low(word8), of_g8(rows.zero_lo)), of_g8(rows.s), minus(of_g8(rows.bias)));
    frag[3] = fma(fma(high(word8), SIXTEENTH, of_g8(rows.zero_hi)), of_g8(rows.s), minus(of_g8(rows.bias)));
  }
};
struct Fp16U8Any : Fp16Any {
  struct Rows {
    uint32_t s, zero, bias;
    DEVICE void set(uint32_t scales, uint32_t zero_g, uint32_t zero_g8, const Aux& aux) {
      const uint32_t zeros = aux.zeros(zero_g, zero_g8);
      s = scales;
      zero = aux.minus_offset(zeros);
      bias = aux.subtrahend(zeros);
    }
  };
  // 12 instructions for 8 weights; 0x64 above a byte makes 1024 + u
  static DEVICE void convert(uint32_t word0, uint32_t word1, const Rows& rows, uint32_t (&frag)[4]) {
    frag[0] = fma(add(even_bytes(word0, 0x64), of_g(rows.zero)), of_g(rows.s), minus(of_g(rows.bias)));
    frag[1] = fma(add(odd_bytes(word0, 0x64), of_g8(rows.zero)), of_g8(rows.s), minus(of_g8(rows.bias)));
    frag[2] = fma(add(even_bytes(word1, 0x64), of_g(rows.zero)), of_g(rows.s), minus(of_g(rows.bias)));
    frag[3] = fma(add(odd_bytes(word1, 0x64), of_g8(rows.zero)), of_g8(rows.s), minus(of_g8(rows.bias)));
  }
};

}  // namespace machete
