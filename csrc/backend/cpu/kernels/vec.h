#pragma once

// Sixteen float lanes, whatever the machine: one zmm, two ymm, or what the baseline has.
// Everything here has internal linkage: code built for AVX-512 must never be the copy of an inline
// function that the linker keeps for the rest of the program.

#include <cstdint>
#include <cstring>

#include "deltazip/base/dtype.h"

#if defined(DZ_ISA_AVX512) || defined(DZ_ISA_AVX2)
#include <immintrin.h>
#endif

#define DZ_INLINE inline __attribute__((always_inline))

namespace deltazip::cpu::DZ_ISA {
namespace {

constexpr int kLanes = 16;

DZ_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

DZ_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

#if defined(DZ_ISA_AVX512)

using F32 = __m512;

DZ_INLINE F32 zero() { return _mm512_setzero_ps(); }
DZ_INLINE F32 set1(float value) { return _mm512_set1_ps(value); }
DZ_INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
DZ_INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
DZ_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
DZ_INLINE F32 load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
DZ_INLINE void store_first(float* p, F32 v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
DZ_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
DZ_INLINE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
DZ_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
DZ_INLINE F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
DZ_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// As maxps and minps: b where either is NaN.
DZ_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
DZ_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
DZ_INLINE F32 round_nearest(F32 v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// value * 2^n, n integral in [-126, 127].
DZ_INLINE F32 scale_by_power(F32 value, F32 n) {
  const __m512i e = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), e));
}
// `value` where a < b, else 0.
DZ_INLINE F32 zero_unless_less(F32 a, F32 b, F32 value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ), value);
}
DZ_INLINE unsigned mask_less_equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
DZ_INLINE unsigned mask_less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
DZ_INLINE unsigned mask_equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

DZ_INLINE F32 load_half(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
DZ_INLINE void store_half(void* p, F32 v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
DZ_INLINE F32 load_bfloat16(const void* p) {
  const __m256i raw = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
// Sixteen words, low half and high half of each a bfloat16.
DZ_INLINE void load_bfloat16_pairs(const void* p, F32& low, F32& high) {
  const __m512i raw = _mm512_loadu_si512(p);
  low = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  high =
      _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

#elif defined(DZ_ISA_AVX2)

struct F32 {
  __m256 a, b;
};

DZ_INLINE F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
DZ_INLINE F32 set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
DZ_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
DZ_INLINE void store(float* p, F32 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
DZ_INLINE F32 load_first(const float* p, int n) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(float) * static_cast<unsigned>(n));
  return load(lanes);
}
DZ_INLINE void store_first(float* p, F32 v, int n) {
  float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, sizeof(float) * static_cast<unsigned>(n));
}
DZ_INLINE F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
DZ_INLINE F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
DZ_INLINE F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
DZ_INLINE F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
DZ_INLINE F32 fma(F32 x, F32 y, F32 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
DZ_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
DZ_INLINE F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
DZ_INLINE F32 round_nearest(F32 v) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, kMode), _mm256_round_ps(v.b, kMode)};
}
DZ_INLINE __m256 scale_by_power(__m256 value, __m256 n) {
  const __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), e));
}
DZ_INLINE F32 scale_by_power(F32 value, F32 n) {
  return {scale_by_power(value.a, n.a), scale_by_power(value.b, n.b)};
}
DZ_INLINE F32 zero_unless_less(F32 x, F32 y, F32 value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NGE_UQ), value.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_NGE_UQ), value.b)};
}
template <int kPredicate>
DZ_INLINE unsigned compare(F32 x, F32 y) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, kPredicate))) |
         static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, kPredicate))) << 8;
}
DZ_INLINE unsigned mask_less_equal(F32 x, F32 y) { return compare<_CMP_LE_OQ>(x, y); }
DZ_INLINE unsigned mask_less(F32 x, F32 y) { return compare<_CMP_LT_OQ>(x, y); }
DZ_INLINE unsigned mask_equal(F32 x, F32 y) { return compare<_CMP_EQ_OQ>(x, y); }

DZ_INLINE F32 load_half(const void* p) {
  const auto* words = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(words)), _mm256_cvtph_ps(_mm_loadu_si128(words + 1))};
}
DZ_INLINE void store_half(void* p, F32 v) {
  auto* words = static_cast<__m128i*>(p);
  _mm_storeu_si128(words, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(words + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
DZ_INLINE F32 load_bfloat16(const void* p) {
  const auto* words = static_cast<const __m128i*>(p);
  const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(words));
  const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(words + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}
DZ_INLINE void load_bfloat16_pairs(const void* p, F32& low, F32& high) {
  const auto* words = static_cast<const __m256i*>(p);
  const __m256i x = _mm256_loadu_si256(words), y = _mm256_loadu_si256(words + 1);
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  low = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
         _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))};
  high = {_mm256_castsi256_ps(_mm256_and_si256(x, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(y, mask))};
}

#else  // the baseline: the compiler cuts these vectors to what the machine has

typedef float F32 __attribute__((vector_size(64)));
typedef std::int32_t I32 __attribute__((vector_size(64)));
typedef std::uint32_t U32 __attribute__((vector_size(64)));

DZ_INLINE F32 zero() { return F32{}; }
DZ_INLINE F32 set1(float value) { return F32{} + value; }
DZ_INLINE F32 load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
DZ_INLINE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof(v)); }
DZ_INLINE F32 load_first(const float* p, int n) {
  F32 v{};
  std::memcpy(&v, p, sizeof(float) * static_cast<unsigned>(n));
  return v;
}
DZ_INLINE void store_first(float* p, F32 v, int n) {
  std::memcpy(p, &v, sizeof(float) * static_cast<unsigned>(n));
}
DZ_INLINE F32 add(F32 a, F32 b) { return a + b; }
DZ_INLINE F32 sub(F32 a, F32 b) { return a - b; }
DZ_INLINE F32 mul(F32 a, F32 b) { return a * b; }
DZ_INLINE F32 div(F32 a, F32 b) { return a / b; }
DZ_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
DZ_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
DZ_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
DZ_INLINE F32 round_nearest(F32 v) {
  const F32 magic = set1(12582912.0F);  // 1.5 * 2^23: the sum has no fraction bits left
  return (v + magic) - magic;
}
DZ_INLINE F32 scale_by_power(F32 value, F32 n) {
  const I32 e = __builtin_convertvector(n, I32) << 23;
  return reinterpret_cast<F32>(reinterpret_cast<I32>(value) + e);
}
DZ_INLINE F32 zero_unless_less(F32 a, F32 b, F32 value) {
  return reinterpret_cast<F32>(~(a >= b) & reinterpret_cast<I32>(value));
}
DZ_INLINE unsigned to_bits(I32 mask) {
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
  return bits;
}
DZ_INLINE unsigned mask_less_equal(F32 a, F32 b) { return to_bits(a <= b); }
DZ_INLINE unsigned mask_less(F32 a, F32 b) { return to_bits(a < b); }
DZ_INLINE unsigned mask_equal(F32 a, F32 b) { return to_bits(a == b); }

DZ_INLINE float half_to_float(std::uint32_t bits) {
  // Shift the exponent into place, then a product with 2^112 rebuilds subnormals too.
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t magnitude = (bits & 0x7FFFu) << 13;
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  const std::uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  return bits_to_float(float_to_bits(scaled) | special | sign);
}
DZ_INLINE std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = float_to_bits(value), magnitude = bits & 0x7FFFFFFFu;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // adding 0.5 leaves the rounded subnormal in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5F) - 0x3F000000u;
  } else {
    half = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}
DZ_INLINE F32 load_half(const void* p) {
  std::uint16_t raw[kLanes];
  std::memcpy(raw, p, sizeof(raw));
  F32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(raw[i]);
  return v;
}
DZ_INLINE void store_half(void* p, F32 v) {
  std::uint16_t raw[kLanes];
  for (int i = 0; i < kLanes; ++i) raw[i] = float_to_half(v[i]);
  std::memcpy(p, raw, sizeof(raw));
}
DZ_INLINE F32 load_bfloat16(const void* p) {
  std::uint16_t raw[kLanes];
  std::memcpy(raw, p, sizeof(raw));
  U32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<std::uint32_t>(raw[i]) << 16;
  return reinterpret_cast<F32>(v);
}
DZ_INLINE void load_bfloat16_pairs(const void* p, F32& low, F32& high) {
  U32 raw;
  std::memcpy(&raw, p, sizeof(raw));
  low = reinterpret_cast<F32>(raw << 16);
  high = reinterpret_cast<F32>(raw & 0xFFFF0000u);
}

#endif

DZ_INLINE void store_bfloat16(void* p, F32 v) {
  float lanes[kLanes];
  std::uint16_t raw[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) {
    const std::uint32_t bits = float_to_bits(lanes[i]);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    raw[i] = static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
  }
  std::memcpy(p, raw, sizeof(raw));
}

// The order of a reduction is fixed, so equal lanes give equal bits everywhere.
DZ_INLINE float reduce_add(F32 v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
DZ_INLINE float reduce_max(F32 v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i)
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}

// Sixteen elements at p of a stored type; element i of an array is at p + i * bytes.
template <DType kType>
DZ_INLINE F32 load_as(const void* p) {
  if constexpr (kType == DType::kFloat32) return load(static_cast<const float*>(p));
  if constexpr (kType == DType::kFloat16) return load_half(p);
  if constexpr (kType == DType::kBFloat16) return load_bfloat16(p);
}
template <DType kType>
DZ_INLINE void store_as(void* p, F32 v) {
  if constexpr (kType == DType::kFloat32) store(static_cast<float*>(p), v);
  if constexpr (kType == DType::kFloat16) store_half(p, v);
  if constexpr (kType == DType::kBFloat16) store_bfloat16(p, v);
}
template <DType kType>
constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;

// e^x within 1 ulp or so; 0 below -87.3, NaN stays. Cody-Waite reduction, degree-6 polynomial.
DZ_INLINE F32 exp(F32 x) {
  const F32 lowest = set1(-87.3F);
  const F32 clamped = max(lowest, min(set1(88.7F), x));
  const F32 n = round_nearest(mul(clamped, set1(1.44269504F)));
  F32 r = fma(n, set1(-0.693145751953125F), clamped);
  r = fma(n, set1(-1.42860682030941723e-6F), r);
  F32 p = set1(1.98756915e-4F);
  p = fma(p, r, set1(1.39819995e-3F));
  p = fma(p, r, set1(8.33345194e-3F));
  p = fma(p, r, set1(4.16657960e-2F));
  p = fma(p, r, set1(1.66666655e-1F));
  p = fma(p, r, set1(0.5F));
  p = add(fma(p, mul(r, r), r), set1(1.0F));
  return zero_unless_less(lowest, x, scale_by_power(p, n));
}

}  // namespace
}  // namespace deltazip::cpu::DZ_ISA
