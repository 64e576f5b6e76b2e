#pragma once

// A record's words of one warp, from global memory to the registers of mma.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "backend/cuda/kernels/device/ldmatrix.cuh"
#include "backend/cuda/kernels/device/mma.cuh"
#include "backend/cuda/kernels/device/mma_sp.cuh"
#include "backend/cuda/kernels/device/stream_load.cuh"
#include "backend/cuda/kernels/sbmm/config.h"
#include "backend/cuda/kernels/sbmm/decode.cuh"
#include "backend/cuda/kernels/sbmm/record.h"

namespace deltazip::cuda {

template <int... kI, typename Body>
__device__ __forceinline__ void for_each_index(std::integer_sequence<int, kI...>, Body&& body) {
  (body(std::integral_constant<int, kI>{}), ...);
}
template <int kCount, typename Body>
__device__ __forceinline__ void static_for(Body&& body) {
  for_each_index(std::make_integer_sequence<int, kCount>{}, body);
}
template <int... kI, typename Body>
__device__ __forceinline__ bool all_of_indices(std::integer_sequence<int, kI...>, Body&& body) {
  return (body(std::integral_constant<int, kI>{}) && ...);
}
// Until one says false.
template <int kCount, typename Body>
__device__ __forceinline__ bool all_of_first(Body&& body) {
  return all_of_indices(std::make_integer_sequence<int, kCount>{}, body);
}

// Two equal constants of 16 bits.
template <typename T>
__device__ __forceinline__ std::uint32_t twice(float value) {
  return pack_pair<T>(value, value);
}

// a * b + c on pairs.
template <typename T>
__device__ __forceinline__ std::uint32_t fma_pair(std::uint32_t a, std::uint32_t b,
                                                  std::uint32_t c) {
  std::uint32_t d;
  if constexpr (std::is_same_v<T, __half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}
template <typename T>
__device__ __forceinline__ std::uint32_t subtract_pair(std::uint32_t a, float b) {
  return fma_pair<T>(a, twice<T>(1.0F), twice<T>(-b));
}

// The four registers of a word of nibbles: value code - 8. In fp16, 1024 + code is one OR, and
// 64 + code the same four bits higher; bf16 has seven bits of mantissa, so 128 + code, and shifts.
template <typename T>
__device__ __forceinline__ void decode_nibbles(std::uint32_t (&a)[4], std::uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    const std::uint32_t upper = word >> 8;
    a[0] = subtract_pair<T>(take_bits(word, 0x000F000Fu, 0x64006400u), 1032.0F);
    a[2] = subtract_pair<T>(take_bits(word, 0x00F000F0u, 0x54005400u), 72.0F);
    a[1] = subtract_pair<T>(take_bits(upper, 0x000F000Fu, 0x64006400u), 1032.0F);
    a[3] = subtract_pair<T>(take_bits(upper, 0x00F000F0u, 0x54005400u), 72.0F);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = subtract_pair<T>(take_bits(word >> (4 * int4_nibble(i)), 0x000F000Fu, 0x43004300u),
                              136.0F);
    }
  }
}

// Field kField of an int2 word: value 2 code - 3, by one OR and one exact fma. A field at bit s
// stands for code * 2^s; s = 1, 3, 5, 7 keep the constants exact (fp16), or 1, 3, 5 (bf16).
template <typename T, int kField>
__device__ __forceinline__ std::uint32_t decode_int2(std::uint32_t word) {
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  constexpr int kPerTurn = kIsHalf ? 4 : 3;
  constexpr int kShift = 2 * (kField % kPerTurn) + 1;
  constexpr float kBase = kIsHalf ? 1024.0F : 128.0F;
  constexpr float kFactor = 2.0F / (1 << kShift);
  const std::uint32_t turned = rotate_right(word, kField / kPerTurn * kPerTurn * 2);
  const std::uint32_t number =
      take_bits(turned, 0x00030003u << kShift, kIsHalf ? 0x64006400u : 0x43004300u);
  return fma_pair<T>(number, twice<T>(kFactor), twice<T>(-kBase * kFactor - 3.0F));
}

// Two bytes of a word, 0 and 2: value code - 128.
template <typename T>
__device__ __forceinline__ std::uint32_t decode_bytes(std::uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    return subtract_pair<T>(take_bits(word, 0x00FF00FFu, 0x64006400u), 1152.0F);
  } else {
    const std::uint32_t high =
        subtract_pair<T>(take_bits(word >> 4, 0x000F000Fu, 0x43004300u), 136.0F);
    const std::uint32_t low = subtract_pair<T>(take_bits(word, 0x000F000Fu, 0x43004300u), 128.0F);
    return fma_pair<T>(high, twice<T>(16.0F), low);
  }
}

// Where a lane reads its words of a record, and its scales. Records further on are an offset of 32
// bits away: one register to count up for all three.
struct LaneSource {
  const unsigned char *first, *second, *scales;
};
template <typename V>
__device__ __forceinline__ V load_words(const unsigned char* from, std::uint32_t offset,
                                        int index = 0) {
  return stream_load(reinterpret_cast<const V*>(from + offset) + index, kEvictFirst);
}

// Row tiles 2 pair and 2 pair + 1 of a record, as lane 4 q + c holds them: load() asks for the
// words, prepare() is the part of decoding that all tiles share, multiply<r, j>() adds tile (2 pair
// + r, j) times b to sum.
template <DeltaType kType>
struct Words;

template <>
struct Words<DeltaType::kSparse24Int4> {
  static constexpr float kUnit = 1.0F;
  static constexpr int kRegisters = 12;
  uint4 values[2], indices;

  __device__ static LaneSource source(const unsigned char* record, int pair, int lane) {
    record += lane * 16;
    return {record + pair * 1024, record + kRecordRows * kRecordColumns / 4 + pair * 512, nullptr};
  }
  __device__ __forceinline__ void load(const LaneSource& from, std::uint32_t offset) {
    values[0] = load_words<uint4>(from.first, offset);
    values[1] = load_words<uint4>(from.first, offset, 32);
    indices = load_words<uint4>(from.second, offset);
  }
  __device__ __forceinline__ const Words& prepare(int) const { return *this; }
  template <typename T, int kR, int kJ, int kTiles>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][4],
                                           const std::uint32_t (&b)[kTiles][4]) const {
    const uint4& v = values[kR];
    std::uint32_t a[4];
    decode_nibbles<T>(a, kJ == 0 ? v.x : kJ == 1 ? v.y : kJ == 2 ? v.z : v.w);
    const std::uint32_t metadata =
        kR == 0 ? (kJ < 2 ? indices.x : indices.y) : (kJ < 2 ? indices.z : indices.w);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_sp_m16n8k32<T, kJ % 2>(sum[n], a, b[n], metadata);
  }
};

template <>
struct Words<DeltaType::kSparse24Int2> {
  static constexpr float kUnit = 1.0F;
  static constexpr int kRegisters = 8;
  uint4 values, indices;

  __device__ static LaneSource source(const unsigned char* record, int pair, int lane) {
    return {record + (pair * 32 + lane) * 16, nullptr, nullptr};
  }
  __device__ __forceinline__ void load(const LaneSource& from, std::uint32_t offset) {
    values = load_words<uint4>(from.first, offset);
    indices = load_words<uint4>(from.first, offset, 64);
  }
  __device__ __forceinline__ const Words& prepare(int) const { return *this; }
  template <typename T, int kR, int kJ, int kTiles>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][4],
                                           const std::uint32_t (&b)[kTiles][4]) const {
    const std::uint32_t word =
        kR == 0 ? (kJ < 2 ? values.x : values.y) : (kJ < 2 ? values.z : values.w);
    const std::uint32_t metadata =
        kR == 0 ? (kJ < 2 ? indices.x : indices.y) : (kJ < 2 ? indices.z : indices.w);
    constexpr int kFirst = kJ % 2 * 4;
    const std::uint32_t a[4] = {decode_int2<T, kFirst>(word), decode_int2<T, kFirst + 1>(word),
                                decode_int2<T, kFirst + 2>(word), decode_int2<T, kFirst + 3>(word)};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_sp_m16n8k32<T, kJ % 2>(sum[n], a, b[n], metadata);
  }
};

struct TernaryTiles {
  TernaryDigits digits[2];  // [r8]
  std::uint32_t metadata[4];

  template <typename T, int kR, int kJ, int kTiles>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][4],
                                           const std::uint32_t (&b)[kTiles][4]) const {
    const std::uint32_t upper = digits[0].tile[kR], lower = digits[1].tile[kR];
    const std::uint32_t a[4] = {ternary_pair<kR, kJ, 0>(upper), ternary_pair<kR, kJ, 0>(lower),
                                ternary_pair<kR, kJ, 1>(upper), ternary_pair<kR, kJ, 1>(lower)};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma_sp_m16n8k32<T, kJ % 2>(sum[n], a, b[n], metadata[kJ / 2 * 2 + kR]);
    }
  }
};

template <>
struct Words<DeltaType::kSparse24Ternary> {
  static constexpr float kUnit = 1.0F / kTernaryUnit;
  static constexpr int kRegisters = 5;
  uint4 words;  // planes a, b, c; signs of rows q
  std::uint32_t lower_signs;

  __device__ static LaneSource source(const unsigned char* record, int pair, int lane) {
    const int at = pair * 32 + lane;
    return {record + at * 16, record + kTernaryLowerSigns + at * 4, nullptr};
  }
  __device__ __forceinline__ void load(const LaneSource& from, std::uint32_t offset) {
    words = load_words<uint4>(from.first, offset);
    lower_signs = load_words<std::uint32_t>(from.second, offset);
  }
  __device__ __forceinline__ TernaryTiles prepare(int lane_index) const {
    const auto lane = static_cast<std::uint32_t>(lane_index);
    const TernaryPlanes planes{words.x, words.y, words.z};
    std::uint32_t singles = ternary_singles(planes);
    singles = exchange_nibbles(singles, __shfl_xor_sync(0xFFFFFFFFu, singles, 1), lane);
    singles = exchange_bytes(singles, __shfl_xor_sync(0xFFFFFFFFu, singles, 2), lane);
    TernaryTiles tiles;
    ternary_metadata(tiles.metadata, planes);
    tiles.digits[0] = ternary_digits(words.w, singles, 0);
    tiles.digits[1] = ternary_digits(lower_signs, singles, 1);
    return tiles;
  }
};

template <>
struct Words<DeltaType::kDenseInt4> {
  static constexpr float kUnit = 1.0F;
  static constexpr int kRegisters = 16;
  uint2 words[8];

  __device__ static LaneSource source(const unsigned char* record, int pair, int lane) {
    return {record + (pair * 256 + lane) * static_cast<int>(sizeof(uint2)), nullptr, nullptr};
  }
  __device__ __forceinline__ void load(const LaneSource& from, std::uint32_t offset) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = load_words<uint2>(from.first, offset, i * 32);
  }
  __device__ __forceinline__ const Words& prepare(int) const { return *this; }
  template <typename T, int kR, int kJ, int kTiles>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][4],
                                           const std::uint32_t (&b)[kTiles][4]) const {
    const uint2 word = words[kR * 4 + kJ];
    std::uint32_t a[2][4];
    decode_nibbles<T>(a[0], word.x);
    decode_nibbles<T>(a[1], word.y);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma_m16n8k16<T>(sum[n], a[0], b[n][0], b[n][1]);
      mma_m16n8k16<T>(sum[n], a[1], b[n][2], b[n][3]);
    }
  }
};

template <>
struct Words<DeltaType::kDenseInt8> {
  static constexpr float kUnit = 1.0F;
  static constexpr int kRegisters = 32;
  uint4 words[8];

  __device__ static LaneSource source(const unsigned char* record, int pair, int lane) {
    return {record + (pair * 256 + lane) * static_cast<int>(sizeof(uint4)), nullptr, nullptr};
  }
  __device__ __forceinline__ void load(const LaneSource& from, std::uint32_t offset) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = load_words<uint4>(from.first, offset, i * 32);
  }
  __device__ __forceinline__ const Words& prepare(int) const { return *this; }
  template <typename T, int kR, int kJ, int kTiles>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][4],
                                           const std::uint32_t (&b)[kTiles][4]) const {
    const uint4 word = words[kR * 4 + kJ];
    const std::uint32_t a[2][4] = {{decode_bytes<T>(word.x), decode_bytes<T>(word.x >> 8),
                                    decode_bytes<T>(word.y), decode_bytes<T>(word.y >> 8)},
                                   {decode_bytes<T>(word.z), decode_bytes<T>(word.z >> 8),
                                    decode_bytes<T>(word.w), decode_bytes<T>(word.w >> 8)}};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      mma_m16n8k16<T>(sum[n], a[0], b[n][0], b[n][1]);
      mma_m16n8k16<T>(sum[n], a[1], b[n][2], b[n][3]);
    }
  }
};

// 32 rows of a record with their scales.
template <DeltaType kType, int kParts>
struct HalfRecord {
  static constexpr int kRegisters = Words<kType>::kRegisters + 2 * kParts;
  Words<kType> words;
  uint2 scales[kParts];

  __device__ static LaneSource source(const unsigned char* record, int scales_offset, int pair,
                                      int lane) {
    LaneSource from = Words<kType>::source(record, pair, lane);
    from.scales = record + scales_offset + (lane / 4 * 2 + pair) * 8;
    return from;
  }
  __device__ __forceinline__ void load(const LaneSource& from, std::uint32_t offset) {
    words.load(from, offset);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      scales[i] = load_words<uint2>(from.scales, offset, i * (kScalePartBytes / 8));
    }
  }

  // acc += these rows times kTiles * 8 tokens. Scales are applied to the sums of a group, not to
  // its weights, kUnit by the caller. b[n]: this lane's ldmatrix address of token tile n at the
  // record's column 0.
  template <typename T, int kTiles>
  __device__ __forceinline__ void multiply(float (&acc)[2][kTiles][4], int lane,
                                           const std::uint32_t (&b)[kTiles]) const {
    constexpr int kTilesPerPart = 4 / kParts;
    const auto& tiles = words.prepare(lane);
    float sum[2][kTiles][4];
    // x of all columns first, where registers allow: each load would be waited for.
    constexpr int kEarly = kTiles == 1 ? 4 : 1;
    std::uint32_t fragments[kEarly][kTiles][4];
    static_for<4>([&](auto j) {
      if constexpr (j % kEarly == 0) {
#pragma unroll
        for (int early = 0; early < kEarly; ++early) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            ldmatrix_x4(fragments[early][n], b[n] + (j + early) * 64);
          }
        }
      }
      const auto& fragment = fragments[j % kEarly];
      static_for<2>([&](auto r) {
        if constexpr (j % kTilesPerPart == 0) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[r][n][i] = 0.0F;
          }
        }
        tiles.template multiply<T, r, j>(sum[r], fragment);
      });
      if constexpr ((j + 1) % kTilesPerPart == 0) {
        const uint2 packed = scales[j / kTilesPerPart];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const std::uint32_t both = r == 0 ? packed.x : packed.y;
          const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&both));
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            acc[r][n][0] = fmaf(sum[r][n][0], scale.x, acc[r][n][0]);
            acc[r][n][1] = fmaf(sum[r][n][1], scale.x, acc[r][n][1]);
            acc[r][n][2] = fmaf(sum[r][n][2], scale.y, acc[r][n][2]);
            acc[r][n][3] = fmaf(sum[r][n][3], scale.y, acc[r][n][3]);
          }
        }
      }
    });
  }
};

}  // namespace deltazip::cuda
