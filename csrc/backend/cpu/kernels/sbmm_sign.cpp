// Products of deltas that keep one signed weight of four: eight states, which every ISA can look up
// at once. Table look-ups read the low bits of a code only, so codes are shifted and not masked.

#include "backend/cpu/kernels/sbmm_tables.h"
#include "backend/cpu/kernels/table.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

struct SignCodes {
  static constexpr DeltaType kType = DeltaType::kSparse14Sign;
  static constexpr int kStates = 8;

  NI codes;  // 24 bits of each row

  template <int kGroup>
  DZ_INLINE NI code() const {
    return n_shift<3 * kGroup>(codes);
  }

#if defined(DZ_ISA_AVX512) || defined(DZ_ISA_AVX2)
  DZ_INLINE static void make_sums(const float* x, float* sums) {
    const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
    const __m256 twice = _mm256_permutevar_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    _mm256_store_ps(sums, _mm256_xor_ps(twice, _mm256_setr_ps(0.0F, -0.0F, 0.0F, -0.0F, 0.0F, -0.0F,
                                                              0.0F, -0.0F)));
  }
#endif
#if defined(DZ_ISA_AVX512)
  DZ_INLINE SignCodes(const char* low, const char* high, int)
      : codes(_mm512_or_si512(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low))),
            _mm512_slli_epi32(
                _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high))),
                16))) {}
  DZ_INLINE static NF look_up(const float* sums, NI code) {
    return _mm512_permutexvar_ps(code, _mm512_broadcast_f32x8(_mm256_load_ps(sums)));
  }
#elif defined(DZ_ISA_AVX2)
  DZ_INLINE SignCodes(const char* low, const char* high, int part)
      : codes(_mm256_or_si256(
            _mm256_cvtepu16_epi32(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + part * 16))),
            _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(
                                  reinterpret_cast<const __m128i*>(high + part * 8))),
                              16))) {}
  DZ_INLINE static NF look_up(const float* sums, NI code) {
    return _mm256_permutevar8x32_ps(_mm256_load_ps(sums), code);
  }
#else
  DZ_INLINE SignCodes(const char* low, const char* high, int) {
    std::uint16_t halves[kLanes];
    std::memcpy(halves, low, sizeof(halves));
    for (int i = 0; i < kLanes; ++i) {
      codes[i] = halves[i] | static_cast<std::uint32_t>(static_cast<unsigned char>(high[i])) << 16;
    }
  }
  DZ_INLINE static void make_sums(const float* x, float* sums) {
    for (int i = 0; i < 4; ++i) {
      sums[2 * i] = x[i];
      sums[2 * i + 1] = -x[i];
    }
  }
  DZ_INLINE static NF look_up(const float* sums, NI code) {
    NF v;
    for (int i = 0; i < kLanes; ++i) v[i] = sums[code[i] & 7u];
    return v;
  }
#endif
};

}  // namespace

void sbmm_sign(const SbmmItem& item, float* scratch) {
  with_tokens(item.num_tokens,
              [&]<int kTokens>() { sweep_tables<SignCodes, kTokens>(item, scratch); });
}

}  // namespace deltazip::cpu::DZ_ISA
