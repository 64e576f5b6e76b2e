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

DZ_HOST_DEVICE std::uint32_t swap_halves(std::uint32_t v) {
#ifdef __CUDA_ARCH__
  return __byte_perm(v, 0, 0x1032);
#else
  return v >> 16 | v << 16;
#endif
}

// x where mask has a bit, else y. As one LOP3, for the reason of take_bits().
DZ_HOST_DEVICE std::uint32_t select_bits(std::uint32_t mask, std::uint32_t x, std::uint32_t y) {
#ifdef __CUDA_ARCH__
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(out) : "r"(mask), "r"(x), "r"(y));
  return out;
#else
  return (x & mask) | (y & ~mask);
#endif
}

// v with some bits taken and some of these turned over.
DZ_HOST_DEVICE std::uint32_t flip_bits(std::uint32_t v, std::uint32_t mask, std::uint32_t flip) {
#ifdef __CUDA_ARCH__
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(out) : "r"(v), "r"(mask), "r"(flip));
  return out;
#else
  return (v & mask) ^ flip;
#endif
}

// Four bytes of a pair of words (y above x), one a nibble of the selector.
DZ_HOST_DEVICE std::uint32_t pick_bytes(std::uint32_t x, std::uint32_t y, std::uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(x, y, selector);
#else
  std::uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t at = selector >> (4 * i) & 7u;
    out |= ((at < 4 ? x : y) >> (8 * (at % 4)) & 0xFFu) << (8 * i);
  }
  return out;
#endif
}

// Ternary groups. A state is five bits: index planes a, b, c and signs s0, s1 (1 is minus).
//   index nibble: a ? 8 + b + 4c : (b ? 14 : 4), that is index0 | index1 << 2
//   E = c and not a: one weight of the pair is zero, the second where s0 == s1, else the first
// Six pairs without E, and with E the pairs (0,1) and (2,3) again, which reach every single place.
// A word holds a bit of each of a lane's 32 groups of two row tiles (r), so that one operation
// decodes all of them. mma.sp wants a group's indices in another lane of the quad than its weights:
// with tile j = s + 2 y, half h of its columns, group p of the half, and rows q + 8 r8,
//   planes a, b, c of lane 4 q + 2 s + h: bit 16 r8 + 4 p + e,          e = 2 y + r
//   signs of lane 4 q + p: word r8, bit 8 s + 4 h + e is s0, the bit 16 above is s1
struct TernaryPlanes {
  std::uint32_t a, b, c;
};

// The metadata registers [e] of a lane: nibbles from their bits, a 4x4 transposition in each.
DZ_HOST_DEVICE void ternary_metadata(std::uint32_t (&out)[4], const TernaryPlanes& planes) {
  const std::uint32_t a = planes.a, b = planes.b;
  const std::uint32_t n0 = a & b, n1 = ~a & b, n2 = ~a | planes.c, n3 = a | b;
  constexpr std::uint32_t kEven = 0x55555555u, kLow = 0x33333333u;
  const std::uint32_t low0 = select_bits(kEven, n0, n1 << 1);
  const std::uint32_t high0 = select_bits(kEven, n2, n3 << 1);
  const std::uint32_t low1 = select_bits(kEven, n0 >> 1, n1);
  const std::uint32_t high1 = select_bits(kEven, n2 >> 1, n3);
  out[0] = select_bits(kLow, low0, high0 << 2);
  out[1] = select_bits(kLow, low1, high1 << 2);
  out[2] = select_bits(kLow, low0 >> 2, high0);
  out[3] = select_bits(kLow, low1 >> 2, high1);
}

// E travels from the lanes with the indices to those with the weights by two exchanges within the
// quad, first with lane ^ 1, then with lane ^ 2. Bits 16 r8 + 4 p + e become 16 r8 + 8 s + 4 h + e.
DZ_HOST_DEVICE std::uint32_t ternary_singles(const TernaryPlanes& planes) {
  return ~planes.a & planes.c;
}
DZ_HOST_DEVICE std::uint32_t exchange_nibbles(std::uint32_t own, std::uint32_t other,
                                              std::uint32_t lane) {
  const bool is_odd = lane % 2 != 0;
  return select_bits(is_odd ? 0xF0F0F0F0u : 0x0F0F0F0Fu, own, rotate_right(other, is_odd ? 4 : 28));
}
DZ_HOST_DEVICE std::uint32_t exchange_bytes(std::uint32_t own, std::uint32_t other,
                                            std::uint32_t lane) {
  return pick_bytes(own, other, lane % 4 < 2 ? 0x6240u : 0x3715u);
}

// The weights of rows q + 8 r8 as digits of two bits, (minus, zero), those of a group 16 apart:
// tile[r] has (tile j, half h) at bits b and b - 1 with b = 8 s + 4 h + 2 y + r, the word taken as
// a ring.
struct TernaryDigits {
  std::uint32_t tile[2];
};

DZ_HOST_DEVICE TernaryDigits ternary_digits(std::uint32_t signs, std::uint32_t singles, int r8) {
  const std::uint32_t both = pick_bytes(singles, 0, r8 == 0 ? 0x1010u : 0x3232u);
  const std::uint32_t zero = both & (signs ^ swap_halves(signs) ^ 0xFFFF0000u);
  const std::uint32_t below = rotate_right(zero, 1);
  return {{select_bits(0x55555555u, signs, below), select_bits(0xAAAAAAAAu, signs, below)}};
}

// Sign and the top exponent bit: 2, 0 or -0, -2 in fp16 and in bf16 alike.
inline constexpr float kTernaryUnit = 2.0F;

// The pair of tile j = s + 2 y, half h, row tile r.
template <int kR, int kJ, int kHalf>
DZ_HOST_DEVICE std::uint32_t ternary_pair(std::uint32_t tile) {
  constexpr int kShift = 15 - (8 * (kJ % 2) + 4 * kHalf + 2 * (kJ / 2) + kR);
  const std::uint32_t turned = kShift == 15 ? rotate_right(tile, 32 - kShift) : tile << kShift;
  return flip_bits(turned, 0xC000C000u, 0x40004000u);
}

// The word of sparse24_int4 for one lane and tile: the two codes of a[i] in this nibble and in that
// 4 above. So fp16 needs one shift a word.
constexpr int int4_nibble(int i) { return i % 2 * 2 + i / 2; }

// The word of sparse24_int2 for one lane and two tiles: a[i] of tile t is field f = 4 t + i, its
// first code at bits 2 f + 1, the second 16 above, the word taken as a ring.

}  // namespace deltazip::cuda
