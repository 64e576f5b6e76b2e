#pragma once

// A record's words of one warp, from global memory to the registers of mma.

#include <cuda_fp16.h>

#include <cstdint>
#include <utility>

#include "backend/cuda/kernels/device/ldmatrix.cuh"
#include "backend/cuda/kernels/device/mma_int8.cuh"
#include "backend/cuda/kernels/device/smem.cuh"
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

// Where a lane reads its words of a record, and its scales.
struct LaneSource {
  const unsigned char *first, *second, *scales;

  __device__ __forceinline__ void advance(int num_bytes) {
    first += num_bytes;
    second += num_bytes;
    scales += num_bytes;
  }
};
template <typename V>
__device__ __forceinline__ V load_words(const unsigned char* from, int index = 0) {
  return stream_load(reinterpret_cast<const V*>(from) + index, kEvictFirst);
}

template <int kIndex>
__device__ __forceinline__ std::uint32_t get(const uint4& v) {
  return kIndex == 0 ? v.x : kIndex == 1 ? v.y : kIndex == 2 ? v.z : v.w;
}

// The bytes of mma's A and metadata.
struct SparseFragment {
  std::uint32_t a[4], metadata;
};

// Row tiles 2 pair and 2 pair + 1 of a record, as lane 4 q + c holds them: load() asks for the
// words, prepare() is the part of decoding that all tiles share, and gives what has the tiles
// themselves: fragment<y, r>() of 64 columns of a sparse type, fragment<j, r>() of 32 of a dense.
template <DeltaType kType>
struct Words;

template <>
struct Words<DeltaType::kSparse24Int4> {
  static constexpr float kUnit = kInt4Unit;
  static constexpr int kRegisters = 12;
  uint4 values[2], indices;

  __device__ static void place(LaneSource& from, int pair, int lane) {
    from.first += pair * 1024 + lane * 16;
    from.second += kRecordRows * kRecordColumns / 4 + pair * 512 + lane * 16;
  }
  __device__ __forceinline__ void load(const LaneSource& from) {
    values[0] = load_words<uint4>(from.first);
    values[1] = load_words<uint4>(from.first, 32);
    indices = load_words<uint4>(from.second);
  }
  __device__ __forceinline__ const Words& prepare(int) const { return *this; }
  template <int kY, int kR>
  __device__ __forceinline__ SparseFragment fragment() const {
    const std::uint32_t left = get<2 * kR>(values[kY]), right = get<2 * kR + 1>(values[kY]);
    return {{int4_bytes(left, false), int4_bytes(left, true), int4_bytes(right, false),
             int4_bytes(right, true)},
            get<2 * kY + kR>(indices)};
  }
};

template <>
struct Words<DeltaType::kSparse24Int2> {
  static constexpr float kUnit = kInt2Unit;
  static constexpr int kRegisters = 8;
  uint4 values, indices;

  __device__ static void place(LaneSource& from, int pair, int lane) {
    from.first += (pair * 32 + lane) * 16;
  }
  __device__ __forceinline__ void load(const LaneSource& from) {
    values = load_words<uint4>(from.first);
    indices = load_words<uint4>(from.first, 64);
  }
  __device__ __forceinline__ const Words& prepare(int) const { return *this; }
  template <int kY, int kR>
  __device__ __forceinline__ SparseFragment fragment() const {
    const std::uint32_t word = get<2 * kY + kR>(values);
    return {{int2_bytes(word, 0), int2_bytes(word, 1), int2_bytes(word, 2), int2_bytes(word, 3)},
            get<2 * kY + kR>(indices)};
  }
};

struct TernaryTiles {
  TernaryDigits digits;
  std::uint32_t metadata[4];

  template <int kY, int kR>
  __device__ __forceinline__ SparseFragment fragment() const {
    return {{ternary_bytes(digits.of[0][kR], 0, kY), ternary_bytes(digits.of[0][kR], 1, kY),
             ternary_bytes(digits.of[1][kR], 0, kY), ternary_bytes(digits.of[1][kR], 1, kY)},
            metadata[2 * kY + kR]};
  }
};

template <>
struct Words<DeltaType::kSparse24Ternary> {
  static constexpr float kUnit = kTernaryUnit;
  static constexpr int kRegisters = 5;
  uint4 words;  // planes a, b, c; signs 0
  std::uint32_t second_signs;

  __device__ static void place(LaneSource& from, int pair, int lane) {
    from.first += (pair * 32 + lane) * 16;
    from.second += kTernarySecondSigns + (pair * 32 + lane) * 4;
  }
  __device__ __forceinline__ void load(const LaneSource& from) {
    words = load_words<uint4>(from.first);
    second_signs = load_words<std::uint32_t>(from.second);
  }
  __device__ __forceinline__ TernaryTiles prepare(int lane_index) const {
    const auto lane = static_cast<std::uint32_t>(lane_index);
    const TernaryPlanes planes{words.x, words.y, words.z};
    std::uint32_t singles = ternary_singles(planes);
    singles = exchange_bytes(singles, __shfl_xor_sync(0xFFFFFFFFu, singles, 1), lane);
    singles = exchange_halves(singles, __shfl_xor_sync(0xFFFFFFFFu, singles, 2), lane);
    TernaryTiles tiles;
    ternary_metadata(tiles.metadata, planes);
    tiles.digits = ternary_digits(words.w, second_signs, swap_inner_nibbles(singles));
    return tiles;
  }
};

struct DenseFragment {
  std::uint32_t a[4];
};

template <>
struct Words<DeltaType::kDenseInt4> {
  static constexpr float kUnit = kInt4Unit;
  static constexpr int kRegisters = 16;
  uint2 words[8];

  __device__ static void place(LaneSource& from, int pair, int lane) {
    from.first += (pair * 256 + lane) * static_cast<int>(sizeof(uint2));
  }
  __device__ __forceinline__ void load(const LaneSource& from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = load_words<uint2>(from.first, i * 32);
  }
  __device__ __forceinline__ const Words& prepare(int) const { return *this; }
  template <int kJ, int kR>
  __device__ __forceinline__ DenseFragment fragment() const {
    const uint2 word = words[kR * 4 + kJ];
    return {{int4_bytes(word.x, false), int4_bytes(word.x, true), int4_bytes(word.y, false),
             int4_bytes(word.y, true)}};
  }
};

template <>
struct Words<DeltaType::kDenseInt8> {
  static constexpr float kUnit = kInt8Unit;
  static constexpr int kRegisters = 32;
  uint4 words[8];

  __device__ static void place(LaneSource& from, int pair, int lane) {
    from.first += (pair * 256 + lane) * static_cast<int>(sizeof(uint4));
  }
  __device__ __forceinline__ void load(const LaneSource& from) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = load_words<uint4>(from.first, i * 32);
  }
  __device__ __forceinline__ const Words& prepare(int) const { return *this; }
  template <int kJ, int kR>
  __device__ __forceinline__ DenseFragment fragment() const {
    const uint4 word = words[kR * 4 + kJ];
    return {{word.x, word.y, word.z, word.w}};
  }
};

// A lane's places in x, of kTiles tiles of tokens: for ldmatrix, and of the scale of its token.
template <int kTiles>
struct LaneX {
  std::uint32_t bytes[kTiles], scales[kTiles];

  __device__ __forceinline__ void advance(int records) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      bytes[n] += records * kRecordColumns;
      scales[n] += records * 4;
    }
  }
};

// 32 rows of a record with their scales.
template <DeltaType kType, int kParts>
struct HalfRecord {
  static constexpr int kRegisters = Words<kType>::kRegisters + 2 * kParts;
  Words<kType> words;
  uint2 scales[kParts];

  // The lane's places in the record that begins at `record`.
  __device__ static LaneSource source(const unsigned char* record, int scales_offset, int pair,
                                      int lane) {
    LaneSource from{record, record, record + scales_offset + (lane / 4 * 2 + pair) * 8};
    Words<kType>::place(from, pair, lane);
    return from;
  }
  __device__ __forceinline__ void load(const LaneSource& from) {
    words.load(from);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      scales[i] = load_words<uint2>(from.scales, i * (kScalePartBytes / 8));
    }
  }

  // acc += these rows times kTiles * 4 tokens, in units of 1 / kUnit. The sum of a group is an
  // exact integer; scales are applied to it.
  template <int kTiles>
  __device__ __forceinline__ void multiply(float (&acc)[2][kTiles][2], int lane,
                                           const LaneX<kTiles>& x) const {
    const auto& tiles = words.prepare(lane);
    float x_scales[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) x_scales[n] = load_shared_float(x.scales[n]);
    // x of both halves first where registers allow: each load would be waited for.
    constexpr bool kHoldsX = kTiles <= 2;
    std::uint32_t b[kHoldsX ? 2 : 1][kTiles][4];
    if constexpr (kHoldsX) {
#pragma unroll
      for (int y = 0; y < 2; ++y) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) ldmatrix_x4(b[y][n], x.bytes[n] + y * 64);
      }
    }
    static_for<2>([&](auto r) {
      int sum[kTiles][4];
      const auto apply = [&](int part) {
        const std::uint32_t both = r == 0 ? scales[part].x : scales[part].y;
        const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&both));
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          acc[r][n][0] = fmaf(static_cast<float>(sum[n][0] * 256 + sum[n][1]),
                              scale.x * x_scales[n], acc[r][n][0]);
          acc[r][n][1] = fmaf(static_cast<float>(sum[n][2] * 256 + sum[n][3]),
                              scale.y * x_scales[n], acc[r][n][1]);
        }
      };
      static_for<2>([&](auto y) {
        if constexpr (!kHoldsX) {
#pragma unroll
          for (int n = 0; n < kTiles; ++n) ldmatrix_x4(b[0][n], x.bytes[n] + y * 64);
        }
        const auto& columns = b[kHoldsX ? y : 0];
        if constexpr (is_sparse24(kType)) {
          const SparseFragment f = tiles.template fragment<y, r>();
          if constexpr (kParts < 4) {
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
              const auto& v = columns[n];
              mma_sp_m16n8k64<kParts == 1 && y == 1>(sum[n], f.a, v[0], v[1], v[2], v[3],
                                                     f.metadata);
            }
            if (kParts == 2) apply(y);
          } else {
            // A group ends amid a product: each half of x by itself.
            static_for<2>([&](auto h) {
#pragma unroll
              for (int n = 0; n < kTiles; ++n) {
                const auto& v = columns[n];
                mma_sp_m16n8k64<false>(sum[n], f.a, h == 0 ? v[0] : 0, h == 0 ? v[1] : 0,
                                       h == 0 ? 0 : v[2], h == 0 ? 0 : v[3], f.metadata);
              }
              apply(2 * y + h);
            });
          }
        } else {
          static_for<2>([&](auto h) {
            constexpr int kJ = 2 * y + h;
            const DenseFragment f = tiles.template fragment<kJ, r>();
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
              mma_m16n8k32<kParts == 1 && kJ != 0>(sum[n], f.a, columns[n][2 * h],
                                                   columns[n][2 * h + 1]);
            }
            if (kParts == 4) apply(kJ);
          });
        }
      });
      if (kParts == 1) apply(0);
    });
  }
};

}  // namespace deltazip::cuda
