// Ternary delta products. Four columns have 32 possible signed sums of two: per token they are
// tabulated once and shared by all output rows, so a row's code is an address (as in T-MAC, 2024).
// AVX2 has no 32-entry look-up; there a code is turned into two places and two signs.

#include "backend/cpu/kernels/sbmm_tables.h"
#include "backend/cpu/kernels/table.h"

namespace deltazip::cpu::DZ_ISA {
namespace {

constexpr int kStates = 32;

struct States {
  alignas(64) float value0[kStates], value1[kStates];
  alignas(64) std::int32_t index0[kStates], index1[kStates];
};

constexpr States make_states() {
  constexpr int kPairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  States s{};
  for (int code = 0; code < kStates; ++code) {
    if (code < 8) {
      const int place = code / 2;
      const float value = code % 2 == 0 ? 1.0F : -1.0F;
      s.index0[code] = place < 3 ? place : 2;
      s.index1[code] = place < 3 ? place + 1 : 3;
      s.value0[code] = place < 3 ? value : 0.0F;
      s.value1[code] = place < 3 ? 0.0F : value;
    } else {
      const int d = code - 8;
      s.index0[code] = kPairs[d / 4][0];
      s.index1[code] = kPairs[d / 4][1];
      s.value0[code] = d % 2 != 0 ? -1.0F : 1.0F;
      s.value1[code] = d % 4 >= 2 ? -1.0F : 1.0F;
    }
  }
  return s;
}

constexpr States kStateTable = make_states();

#if !defined(DZ_ISA_AVX2)

// The codes of one panel and block; code<g>() is ready to look sums up with.
struct TernaryCodes {
  static constexpr DeltaType kType = DeltaType::kSparse24Ternary;
  static constexpr int kStates = DZ_ISA::kStates;

  NI low;
  const char* masks;

  DZ_INLINE TernaryCodes(const char* words, const char* mask_row, int)
      : low(n_load_words(words)), masks(mask_row) {}

#if defined(DZ_ISA_AVX512)
  DZ_INLINE static void make_sums(const float* x, float* sums) {
    const __m512 four = n_broadcast4(x);
    for (int half = 0; half < kStates; half += kLanes) {
      const __m512 x0 = n_pick(four, _mm512_load_si512(kStateTable.index0 + half));
      const __m512 x1 = n_pick(four, _mm512_load_si512(kStateTable.index1 + half));
      const __m512 sum = _mm512_mul_ps(x0, _mm512_load_ps(kStateTable.value0 + half));
      _mm512_store_ps(sums + half, n_fma(x1, _mm512_load_ps(kStateTable.value1 + half), sum));
    }
  }
  template <int kGroup>
  DZ_INLINE __m512i code() const {
    std::uint16_t mask;
    std::memcpy(&mask, masks + 2 * kGroup, sizeof(mask));
    const __m512i nibble = _mm512_and_si512(n_shift<4 * kGroup>(low), _mm512_set1_epi32(15));
    return _mm512_mask_or_epi32(nibble, mask, nibble, _mm512_set1_epi32(16));
  }
  DZ_INLINE static NF look_up(const float* sums, __m512i code) {
    return _mm512_permutex2var_ps(_mm512_load_ps(sums), code, _mm512_load_ps(sums + kLanes));
  }
#else
  DZ_INLINE static void make_sums(const float* x, float* sums) {
    for (int i = 0; i < kStates; ++i) {
      sums[i] = x[kStateTable.index0[i]] * kStateTable.value0[i] +
                x[kStateTable.index1[i]] * kStateTable.value1[i];
    }
  }
  template <int kGroup>
  DZ_INLINE U32 code() const {
    std::uint16_t mask;
    std::memcpy(&mask, masks + 2 * kGroup, sizeof(mask));
    U32 code = (low >> (4 * kGroup)) & 15u;
    for (unsigned i = 0; i < kLanes; ++i) code[i] |= ((static_cast<unsigned>(mask) >> i) & 1u) << 4;
    return code;
  }
  DZ_INLINE static NF look_up(const float* sums, U32 code) {
    NF v;
    for (int i = 0; i < kLanes; ++i) v[i] = sums[code[i]];
    return v;
  }
#endif
};

template <int kTokens>
void sweep(const SbmmItem& item, float* scratch) {
  sweep_tables<TernaryCodes, kTokens>(item, scratch);
}

#else

// Byte of a state: index0, index1 << 2, then the signs as places in {0, +1, -1}.
struct PackedStates {
  alignas(16) char low[16], high[16];
};
constexpr char pack_state(int code) {
  const auto place = [](float v) { return v == 0.0F ? 0 : v > 0.0F ? 1 : 2; };
  return static_cast<char>(kStateTable.index0[code] | kStateTable.index1[code] << 2 |
                           place(kStateTable.value0[code]) << 4 |
                           place(kStateTable.value1[code]) << 6);
}
constexpr PackedStates pack_states() {
  PackedStates packed{};
  for (int code = 0; code < 16; ++code) {
    packed.low[code] = pack_state(code);
    packed.high[code] = pack_state(code + 16);
  }
  return packed;
}
constexpr PackedStates kPackedStates = pack_states();

template <int kTokens>
void sweep(const SbmmItem& item, float*) {
  const DeltaMatrix& delta = item.delta;
  const DeltaLayout layout =
      delta_layout(DeltaType::kSparse24Ternary, delta.rows, delta.columns, delta.group_size);
  const char* data = static_cast<const char*>(delta.data);
  const __m256i low_states = _mm256_broadcastsi128_si256(
      _mm_load_si128(reinterpret_cast<const __m128i*>(kPackedStates.low)));
  const __m256i high_states = _mm256_broadcastsi128_si256(
      _mm_load_si128(reinterpret_cast<const __m128i*>(kPackedStates.high)));
  const __m256 signs = _mm256_setr_ps(0, 1, -1, 0, 0, 1, -1, 0);
  const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (std::int64_t panel = item.first_panel; panel < item.last_panel; ++panel) {
    alignas(64) float sums[kTokens][kLanes];
    for (int part = 0; part < kParts; ++part) {
      __m256 totals[kTokens];
      for (int t = 0; t < kTokens; ++t) totals[t] = n_zero();
      const float* x = item.x;
      for (std::int64_t block = 0; block < layout.num_blocks; ++block) {
        const std::int64_t cell = block * layout.num_panels + panel;
        const __m256i words = n_load_words(data + cell * kWordRowBytes + part * 32);
        const char* masks = data + layout.masks_offset + cell * kMaskRowBytes + part;
        __m256 first[kTokens], second[kTokens];
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) first[t] = second[t] = n_zero();
        unroll<0, 8>([&]<int kGroup>() __attribute__((always_inline)) {
          const __m256i nibble =
              _mm256_and_si256(n_shift<4 * kGroup>(words), _mm256_set1_epi32(15));
          const __m256i bits = _mm256_set1_epi32(static_cast<unsigned char>(masks[2 * kGroup]));
          const __m256i is_high = _mm256_cmpeq_epi32(_mm256_and_si256(bits, lane_bits), lane_bits);
          const __m256i state =
              _mm256_blendv_epi8(_mm256_shuffle_epi8(low_states, nibble),
                                 _mm256_shuffle_epi8(high_states, nibble), is_high);
          const __m256i index1 = n_shift<2>(state);
          const __m256 value0 = n_pick(signs, n_shift<4>(state));
          const __m256 value1 = n_pick(signs, n_shift<6>(state));
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            const __m256 four = n_broadcast4(x + t * item.x_stride + 4 * kGroup);
            first[t] = n_fma(n_pick(four, state), value0, first[t]);
            second[t] = n_fma(n_pick(four, index1), value1, second[t]);
          }
        });
        const __m256 scale = n_load_scales(
            data + layout.scales_offset +
            (block / layout.blocks_per_group * layout.num_panels + panel) * kScaleRowBytes +
            part * 16);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          totals[t] = n_fma(scale, n_add(first[t], second[t]), totals[t]);
        }
        x += kDeltaBlockColumns;
      }
      for (int t = 0; t < kTokens; ++t) n_store(sums[t] + part * kNative, totals[t]);
    }
    const std::int64_t first_row = panel * kDeltaPanelRows;
    add_to_output(sums, item.num_tokens, item.y + first_row, item.y_stride, delta.rows - first_row);
  }
}

#endif

}  // namespace

void sbmm_ternary(const SbmmItem& item, float* scratch) {
  with_tokens(item.num_tokens, [&]<int kTokens>() { sweep<kTokens>(item, scratch); });
}

}  // namespace deltazip::cpu::DZ_ISA
