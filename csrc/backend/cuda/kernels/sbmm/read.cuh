#pragma once

// Single groups of four columns out of a tiled delta, for what reads rows and not products.
// Host and device.

#include <cstdint>

#include "backend/cuda/kernels/sbmm/decode.cuh"
#include "backend/cuda/kernels/sbmm/record.h"

namespace deltazip::cuda {

// Four neighbouring columns of a row, without their scale.
struct GroupValues {
  float v[4];
};

namespace read_detail {

DZ_HOST_DEVICE std::uint32_t word_at(const unsigned char* from, int index) {
  return reinterpret_cast<const std::uint32_t*>(from)[index];
}

// A signed byte of a word.
DZ_HOST_DEVICE float byte_at(std::uint32_t word, int index) {
  return static_cast<float>(static_cast<std::int32_t>(word << (24 - 8 * index)) >> 24);
}

// Two kept values to their columns. No indexed store, which would put v into local memory.
DZ_HOST_DEVICE GroupValues scatter(std::uint32_t nibble, float first, float second) {
  GroupValues out;
  for (std::uint32_t i = 0; i < 4; ++i) {
    out.v[i] = (nibble & 3u) == i ? first : (nibble >> 2 & 3u) == i ? second : 0.0F;
  }
  return out;
}

}  // namespace read_detail

// Group `group` (0..31) of row `row` (0..63) of a record.
DZ_HOST_DEVICE GroupValues read_group(const unsigned char* record, DeltaType type, int row,
                                      int group) {
  using read_detail::byte_at;
  using read_detail::word_at;
  const int r = row / 16, q = row % 8, t = row / 8 % 2, pair = r / 2;
  if (!is_sparse24(type)) {
    // Four columns are the bytes, or nibbles of the bytes, of one word.
    const int half = group / 4 % 2, lane = ((r * 4 + group / 8) * 32) + 4 * q + group % 4;
    const bool is_int4 = type == DeltaType::kDenseInt4;
    const std::uint32_t word = is_int4 ? int4_bytes(word_at(record, lane * 2 + half), t == 1)
                                       : word_at(record, lane * 4 + 2 * half + t);
    const float unit = 1.0F / (is_int4 ? kInt4Unit : kInt8Unit);
    GroupValues out;
    for (int i = 0; i < 4; ++i) out.v[i] = byte_at(word, i) * unit;
    return out;
  }
  const int y = group / 16, h = group / 8 % 2, p = group % 8, g = p % 2, e = 2 * y + r % 2;
  const int lane = pair * 32 + 4 * q + p / 2;            // that holds the values
  const int index_lane = pair * 32 + 4 * q + 2 * h + t;  // that holds the indices
  if (type == DeltaType::kSparse24Ternary) {
    const int bit = 4 * p + e, sign_bit = 16 * h + 8 * g + 4 * t + e;
    const std::uint32_t a = word_at(record, index_lane * 4) >> bit & 1u;
    const std::uint32_t b = word_at(record, index_lane * 4 + 1) >> bit & 1u;
    const std::uint32_t c = word_at(record, index_lane * 4 + 2) >> bit & 1u;
    const bool minus0 = (word_at(record, lane * 4 + 3) >> sign_bit & 1u) != 0;
    const bool minus1 = (word_at(record + kTernarySecondSigns, lane) >> sign_bit & 1u) != 0;
    const bool single = a == 0 && c == 1;
    const float first = single && minus0 != minus1 ? 0.0F : minus0 ? -1.0F : 1.0F;
    const float second = single && minus0 == minus1 ? 0.0F : minus1 ? -1.0F : 1.0F;
    return read_detail::scatter(a != 0 ? 8 + b + 4 * c : b != 0 ? 14 : 4, first, second);
  }
  constexpr int kWeights = kRecordRows * kRecordColumns;
  const bool is_int4 = type == DeltaType::kSparse24Int4;
  const std::uint32_t nibble =
      word_at(record + (is_int4 ? kWeights / 4 : kWeights / 8), index_lane * 4 + e) >> (4 * p) &
      15u;
  const std::uint32_t word =
      is_int4 ? int4_bytes(word_at(record, ((2 * pair + y) * 32 + lane % 32) * 4 + r % 2 * 2 + h),
                           t == 1)
              : int2_bytes(word_at(record, lane * 4 + e), t + 2 * h);
  const float unit = 1.0F / (is_int4 ? kInt4Unit : kInt2Unit);
  return read_detail::scatter(nibble, byte_at(word, 2 * g) * unit, byte_at(word, 2 * g + 1) * unit);
}

}  // namespace deltazip::cuda
