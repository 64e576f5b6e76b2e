#pragma once

// Codes to fp16 or bf16 registers of mma.sp, in integer operations that host and device share, so
// that a test on the host runs the very functions of the kernel. A "pair" is two 16-bit floats.

#include <cstdint>

#ifdef __CUDACC__
#define DZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DZ_HOST_DEVICE inline
#endif

namespace deltazip::cuda {

// v with some bits taken, over a number whose last mantissa bit is worth one. Left to itself the
// compiler makes two LOP3 of it, since one has room for one constant.
DZ_HOST_DEVICE std::uint32_t take_bits(std::uint32_t v, std::uint32_t mask, std::uint32_t base) {
#ifdef __CUDA_ARCH__
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(v), "r"(mask), "r"(base));
  return out;
#else
  return (v & mask) | base;
#endif
}

DZ_HOST_DEVICE std::uint32_t rotate_right(std::uint32_t v, std::uint32_t count) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(v, v, count);
#else
  return count % 32 == 0 ? v : v >> (count % 32) | v << (32 - count % 32);
#endif
}

// Bytes 0, 2, 0, 2 of a word: two 8-bit fields side by side, in both halves.
DZ_HOST_DEVICE std::uint32_t bytes_0_2_twice(std::uint32_t v) {
#ifdef __CUDA_ARCH__
  return __byte_perm(v, 0, 0x2020);
#else
  const std::uint32_t half = (v & 0xFFu) | (v >> 8 & 0xFF00u);
  return half | half << 16;
#endif
}

DZ_HOST_DEVICE std::uint32_t swap_halves(std::uint32_t v) {
#ifdef __CUDA_ARCH__
  return __byte_perm(v, 0, 0x1032);
#else
  return v >> 16 | v << 16;
#endif
}

// Ternary groups. A state is five bits: index planes a, b, c and signs s0, s1 (1 is minus).
//   index nibble: a ? 8 + b + 4c : (b ? 14 : 4), that is index0 | index1 << 2
//   E = c and not a: one weight of the pair is zero, the second where s0 == s1, else the first
// Six pairs without E, and with E the pairs (0,1) and (2,3) again, which reach every single place.
// Bits are spread so that a word decodes many groups at once. For rows q and q + 8 of a tile r
// (r8 = 0, 1) and k tile j = 2y + s... as mma.sp's metadata has it, with h = half of k, p = group %
// 4:
//   plane word y of quad q: bit 16 r8 + 4 p + 2 s + h for tile j = s + 2 y
//   sign word of lane 4 q + p: bit 8 r8 + 4 y + 2 s + h is s0, the bit 16 above is s1
struct TernaryPlanes {
  std::uint32_t a[2], b[2], c[2];  // [y]
};

// The metadata register of lane 4 q + c for tiles j = c / 2 + 2 y.
DZ_HOST_DEVICE std::uint32_t ternary_metadata(const TernaryPlanes& planes, int y, std::uint32_t c) {
  const std::uint32_t a = planes.a[y], b = planes.b[y], third = planes.c[y];
  const std::uint32_t mine = 0x11111111u << c;
  // Bits of the nibble, each at the lane's offset: a sum, in 64 bits since the last may overflow.
  std::uint64_t nibbles = a & b & mine;
  nibbles += std::uint64_t{~a & b & mine} * 2u;
  nibbles += std::uint64_t{(~a | third) & mine} * 4u;
  nibbles += std::uint64_t{(a | b) & mine} * 8u;
#ifdef __CUDA_ARCH__
  return __funnelshift_r(static_cast<std::uint32_t>(nibbles),
                         static_cast<std::uint32_t>(nibbles >> 32), c);
#else
  return static_cast<std::uint32_t>(nibbles >> c);
#endif
}

// Sixteen groups of a lane as digits of two bits, (minus, not zero), ready to be shifted into
// place: odd[i] for groups of bit b = 2 i + 1 (second half of k), even[i] for b = 2 i.
struct TernaryDigits {
  std::uint32_t odd, even;
};

DZ_HOST_DEVICE TernaryDigits ternary_digits(const TernaryPlanes& planes, std::uint32_t signs,
                                            std::uint32_t c) {
  const std::uint32_t e0 = ~planes.a[0] & planes.c[0], e1 = ~planes.a[1] & planes.c[1];
  const std::uint32_t low = rotate_right(e0, 4 * c), high = rotate_right(e1, 4 * c + 28);
  const std::uint32_t single = bytes_0_2_twice((low & 0x0F0F0F0Fu) | (high & 0xF0F0F0F0u));
  const std::uint32_t differ = signs ^ swap_halves(signs) ^ 0xFFFF0000u;
  const std::uint32_t kept = ~(single & differ);
  return {(signs & 0xAAAAAAAAu) | (kept >> 1 & 0x55555555u),
          (signs << 1 & 0xAAAAAAAAu) | (kept & 0x55555555u)};
}

// Sign and the top exponent bit of both halves: 2, 0, -2 in fp16 and in bf16 alike.
inline constexpr float kTernaryUnit = 2.0F;

// The pair of bit b = 8 r8 + 4 y + 2 s + h.
template <int kBit>
DZ_HOST_DEVICE std::uint32_t ternary_pair(const TernaryDigits& digits) {
  if constexpr (kBit % 2 == 1) {
    return digits.odd << (15 - kBit) & 0xC000C000u;
  } else {
    return digits.even << (14 - kBit) & 0xC000C000u;
  }
}

// The word of sparse24_int4 for one lane and tile: the two codes of a[i] in this nibble and in that
// 4 above. So fp16 needs one shift a word.
constexpr int int4_nibble(int i) { return i % 2 * 2 + i / 2; }

// The word of sparse24_int2 for one lane and two tiles: a[i] of tile t is field f = 4 t + i, its
// first code at bits 2 f + 1, the second 16 above, the word taken as a ring.

}  // namespace deltazip::cuda
