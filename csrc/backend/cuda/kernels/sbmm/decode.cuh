#pragma once

// Codes to the bytes of mma.sp, in integer operations that host and device share, so that a test on
// the host runs the very functions of the kernel. A byte is a weight times a power of two, its
// type's unit, so that its sign stands in bit 7 wherever its code came from.

#include <cstdint>

#ifdef __CUDACC__
#define DZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DZ_HOST_DEVICE inline
#endif

namespace deltazip::cuda {

// v with some bits taken, and others set. Left to itself the compiler makes two LOP3 of it, since
// one has room for one constant.
DZ_HOST_DEVICE std::uint32_t take_bits(std::uint32_t v, std::uint32_t mask, std::uint32_t base) {
#ifdef __CUDA_ARCH__
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(v), "r"(mask), "r"(base));
  return out;
#else
  return (v & mask) | base;
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

// sparse24_int4: a word is registers a[2h] and a[2h + 1], the low and high nibbles of its bytes,
// which are code - 8 in two's complement.
inline constexpr float kInt4Unit = 16.0F;
DZ_HOST_DEVICE std::uint32_t int4_bytes(std::uint32_t word, bool is_high) {
  return (is_high ? word : word << 4) & 0xF0F0F0F0u;
}

// sparse24_int2: a word is registers a[0..3], register i at bits 2 i of each byte, the code with
// its upper bit turned over: code - 2 in two's complement, so with a one below it 2 code - 3.
inline constexpr float kInt2Unit = 32.0F;
DZ_HOST_DEVICE std::uint32_t int2_bytes(std::uint32_t word, int field) {
  return take_bits(word << (6 - 2 * field), 0xC0C0C0C0u, 0x20202020u);
}

// Ternary groups. A state is five bits: index planes a, b, c and signs s0, s1 (1 is minus).
//   index nibble: a ? 8 + b + 4c : (b ? 14 : 4), that is index0 | index1 << 2
//   E = c and not a: one weight of the pair is zero, the second where s0 == s1, else the first
// Six pairs without E, and with E the pairs (0,1) and (2,3) again, which reach every single place.
// A word holds a bit of each of a lane's 32 groups of two row tiles (r), so that one operation
// decodes all of them. mma.sp wants a group's indices in another lane of the quad than its weights:
// with tile e = 2 y + r, half h of its columns, group p = 2 c + g of the half, rows q + 8 t,
//   planes a, b, c of lane 4 q + 2 h + t: bit 4 p + e
//   signs s0 and s1 of lane 4 q + c: bit 16 h + 8 g + 4 t + e
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

// E travels from the lanes with the indices to those with the weights: byte c to lane 4 q + c, by
// an exchange with lane ^ 1, then one with lane ^ 2. Then bits [h][t][g][e] become [h][g][t][e].
DZ_HOST_DEVICE std::uint32_t ternary_singles(const TernaryPlanes& planes) {
  return ~planes.a & planes.c;
}
DZ_HOST_DEVICE std::uint32_t exchange_bytes(std::uint32_t own, std::uint32_t other,
                                            std::uint32_t lane) {
  return pick_bytes(own, other, lane % 2 == 0 ? 0x6240u : 0x3715u);
}
DZ_HOST_DEVICE std::uint32_t exchange_halves(std::uint32_t own, std::uint32_t other,
                                             std::uint32_t lane) {
  return pick_bytes(own, other, lane % 4 < 2 ? 0x5410u : 0x3276u);
}
DZ_HOST_DEVICE std::uint32_t swap_inner_nibbles(std::uint32_t v) {
  const std::uint32_t differ = (v ^ v >> 4) & 0x00F000F0u;
  return v ^ differ ^ differ << 4;
}

// The weights of half h, as digits of two bits, (minus, not zero): byte 2 g + k is the k-th of its
// group, tile (y, r) in rows q + 8 t at bits 2 (2 t + y) of digits[h][r].
struct TernaryDigits {
  std::uint32_t of[2][2];
};

DZ_HOST_DEVICE TernaryDigits ternary_digits(std::uint32_t s0, std::uint32_t s1,
                                            std::uint32_t singles) {
  const std::uint32_t kept0 = ~(singles & (s0 ^ s1)), kept1 = ~(singles & ~(s0 ^ s1));
  const std::uint32_t minus0 = s0 & kept0, minus1 = s1 & kept1;
  TernaryDigits out{};
  for (int h = 0; h < 2; ++h) {
    const std::uint32_t bytes = h == 0 ? 0x5140u : 0x7362u;
    const std::uint32_t minus = pick_bytes(minus0, minus1, bytes);
    const std::uint32_t kept = pick_bytes(kept0, kept1, bytes);
    out.of[h][0] = select_bits(0xAAAAAAAAu, minus << 1, kept);
    out.of[h][1] = select_bits(0xAAAAAAAAu, minus, kept >> 1);
  }
  return out;
}

inline constexpr float kTernaryUnit = 64.0F;
DZ_HOST_DEVICE std::uint32_t ternary_bytes(std::uint32_t digits, int t, int y) {
  return digits << (6 - 2 * (2 * t + y)) & 0xC0C0C0C0u;
}

// dense_int4: a word is registers a[2h] and a[2h + 1] as above; dense_int8: a word is a register.
inline constexpr float kInt8Unit = 1.0F;

}  // namespace deltazip::cuda
