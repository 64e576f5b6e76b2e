#pragma once

// One native register of output rows for the SBMM kernels: 16 lanes, or 8 under AVX2 where a panel
// is two parts. Integer codes are signed and read by a shift or a table look-up.

#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/kernels/vec.h"
#include "backend/cpu/layout.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

#if defined(DZ_ISA_AVX512)

using NF = __m512;
using NI = __m512i;
constexpr int kNative = 16;

DZ_INLINE NF n_zero() { return _mm512_setzero_ps(); }
DZ_INLINE NF n_set1(float v) { return _mm512_set1_ps(v); }
DZ_INLINE NF n_add(NF a, NF b) { return _mm512_add_ps(a, b); }
DZ_INLINE NF n_fma(NF a, NF b, NF c) { return _mm512_fmadd_ps(a, b, c); }
DZ_INLINE NF n_load(const float* p) { return _mm512_loadu_ps(p); }
DZ_INLINE void n_store(float* p, NF v) { _mm512_storeu_ps(p, v); }
DZ_INLINE NI n_load_words(const char* p) { return _mm512_loadu_si512(p); }
DZ_INLINE NF n_load_scales(const char* p) { return load_half(p); }
template <int kShift>
DZ_INLINE NI n_shift(NI v) {
  return _mm512_srli_epi32(v, kShift);
}
DZ_INLINE NF n_broadcast4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
// In each 128-bit lane, float number (control & 3).
DZ_INLINE NF n_pick(NF v, NI control) { return _mm512_permutevar_ps(v, control); }
// The signed nibble that starts at bit kShift.
template <int kShift>
DZ_INLINE NF n_level4(NI word) {
  const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(word, kShift), levels);
}
// -3 -1 1 3 by the two bits at kShift.
template <int kShift>
DZ_INLINE NF n_level2(NI word) {
  const __m512 levels = _mm512_broadcast_f32x4(_mm_setr_ps(-3, -1, 1, 3));
  return _mm512_permutevar_ps(levels, _mm512_srli_epi32(word, kShift));
}
DZ_INLINE NF n_load_int8(const char* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#elif defined(DZ_ISA_AVX2)

using NF = __m256;
using NI = __m256i;
constexpr int kNative = 8;

DZ_INLINE NF n_zero() { return _mm256_setzero_ps(); }
DZ_INLINE NF n_set1(float v) { return _mm256_set1_ps(v); }
DZ_INLINE NF n_add(NF a, NF b) { return _mm256_add_ps(a, b); }
DZ_INLINE NF n_fma(NF a, NF b, NF c) { return _mm256_fmadd_ps(a, b, c); }
DZ_INLINE NF n_load(const float* p) { return _mm256_loadu_ps(p); }
DZ_INLINE void n_store(float* p, NF v) { _mm256_storeu_ps(p, v); }
DZ_INLINE NI n_load_words(const char* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
DZ_INLINE NF n_load_scales(const char* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int kShift>
DZ_INLINE NI n_shift(NI v) {
  return _mm256_srli_epi32(v, kShift);
}
DZ_INLINE NF n_broadcast4(const float* p) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
}
DZ_INLINE NF n_pick(NF v, NI control) { return _mm256_permutevar_ps(v, control); }
template <int kShift>
DZ_INLINE NF n_level4(NI word) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(word, 28 - kShift), 28));
}
template <int kShift>
DZ_INLINE NF n_level2(NI word) {
  const __m256 levels = _mm256_setr_ps(-3, -1, 1, 3, -3, -1, 1, 3);
  return _mm256_permutevar_ps(levels, _mm256_srli_epi32(word, kShift));
}
DZ_INLINE NF n_load_int8(const char* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

#else

using NF = F32;
using NI = U32;
constexpr int kNative = 16;

DZ_INLINE NF n_zero() { return NF{}; }
DZ_INLINE NF n_set1(float v) { return set1(v); }
DZ_INLINE NF n_add(NF a, NF b) { return a + b; }
DZ_INLINE NF n_fma(NF a, NF b, NF c) { return a * b + c; }
DZ_INLINE NF n_load(const float* p) { return load(p); }
DZ_INLINE void n_store(float* p, NF v) { store(p, v); }
DZ_INLINE NI n_load_words(const char* p) {
  NI v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
DZ_INLINE NF n_load_scales(const char* p) { return load_half(p); }
template <int kShift>
DZ_INLINE NI n_shift(NI v) {
  return v >> kShift;
}
// Without a lane shuffle, the four floats stay in memory and every row looks its own up.
using NX = const float*;
DZ_INLINE NX n_broadcast4(const float* p) { return p; }
DZ_INLINE NF n_pick(NX x, NI control) {
  NF v;
  for (int i = 0; i < kNative; ++i) v[i] = x[control[i] & 3u];
  return v;
}
template <int kShift>
DZ_INLINE NF n_level4(NI word) {
  return __builtin_convertvector(reinterpret_cast<I32>(word << (28 - kShift)) >> 28, NF);
}
template <int kShift>
DZ_INLINE NF n_level2(NI word) {
  const I32 code = reinterpret_cast<I32>((word >> kShift) & 3u);
  return __builtin_convertvector(code * 2 - 3, NF);
}
DZ_INLINE NF n_load_int8(const char* p) {
  NF v;
  for (int i = 0; i < kNative; ++i) v[i] = static_cast<float>(static_cast<signed char>(p[i]));
  return v;
}

#endif

constexpr int kParts = kLanes / kNative;

// Calls body.operator()<kFirst>() up to <kLast - 1>(): shifts must be constants.
template <int kFirst, int kLast, typename Body>
DZ_INLINE void unroll(const Body& body) {
  if constexpr (kFirst < kLast) {
    body.template operator()<kFirst>();
    unroll<kFirst + 1, kLast>(body);
  }
}

// y[t] += sums[t] on the valid rows of a panel.
DZ_INLINE void add_to_output(const float (*sums)[kLanes], int num_tokens, float* y,
                             std::int64_t y_stride, std::int64_t num_valid) {
  for (int t = 0; t < num_tokens; ++t) {
    float* out = y + t * y_stride;
    if (num_valid >= kLanes) {
      store(out, add(load(out), load(sums[t])));
    } else {
      const int n = static_cast<int>(num_valid);
      store_first(out, add(load_first(out, n), load(sums[t])), n);
    }
  }
}

// Kernels exist for 1, 2, 4, 6 and 8 tokens: every further one is minutes of compilation. The rows
// of x up to the next of these are staged as zeros, and their sums dropped.
template <typename Body>
DZ_INLINE void with_tokens(int num_tokens, const Body& body) {
  if (num_tokens == 1) return body.template operator()<1>();
  if (num_tokens == 2) return body.template operator()<2>();
  if (num_tokens <= 4) return body.template operator()<4>();
  if (num_tokens <= 6) return body.template operator()<6>();
  return body.template operator()<8>();
}
static_assert(kSbmmMaxTokens == 8);

}  // namespace
}  // namespace deltazip::cpu::DZ_ISA
