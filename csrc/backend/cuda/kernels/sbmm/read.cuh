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
  using read_detail::word_at;
  const int r = row / 16, q = row % 8, r8 = row / 8 % 2, pair = r / 2;
  const int j = group / 8, half = group / 4 % 2, p = group % 4;
  const int lane = 4 * q + p;                         // that holds the values
  const int index_lane = 4 * q + 2 * (j % 2) + half;  // that holds the indices
  const int index_word = ((pair * 32 + index_lane) * 2 + r % 2) * 2 + j / 2;
  const int index_shift = 16 * r8 + 4 * p;
  const int a = r8 + 2 * half;  // register of mma.sp
  switch (type) {
    case DeltaType::kSparse24Int4: {
      const std::uint32_t word = word_at(record, (r * 32 + lane) * 4 + j) >> (4 * int4_nibble(a));
      return read_detail::scatter(
          word_at(record + kRecordRows * kRecordColumns / 4, index_word) >> index_shift & 15u,
          static_cast<float>(word & 15u) - 8.0F, static_cast<float>(word >> 16 & 15u) - 8.0F);
    }
    case DeltaType::kSparse24Int2: {
      const std::uint32_t word =
          rotate_right(word_at(record, ((pair * 32 + lane) * 2 + r % 2) * 2 + j / 2),
                       static_cast<std::uint32_t>(2 * (j % 2 * 4 + a) + 1));
      return read_detail::scatter(
          word_at(record + kRecordRows * kRecordColumns / 8, index_word) >> index_shift & 15u,
          2.0F * static_cast<float>(word & 3u) - 3.0F,
          2.0F * static_cast<float>(word >> 16 & 3u) - 3.0F);
    }
    case DeltaType::kSparse24Ternary: {
      const int e = j / 2 * 2 + r % 2, plane_bit = 16 * r8 + 4 * p + e;
      const int planes = (pair * 32 + index_lane) * 4;
      const std::uint32_t pa = word_at(record, planes) >> plane_bit & 1u;
      const std::uint32_t pb = word_at(record, planes + 1) >> plane_bit & 1u;
      const std::uint32_t pc = word_at(record, planes + 2) >> plane_bit & 1u;
      const std::uint32_t signs =
          (r8 == 0 ? word_at(record, (pair * 32 + lane) * 4 + 3)
                   : word_at(record + kTernaryLowerSigns, pair * 32 + lane)) >>
          (8 * (j % 2) + 4 * half + e);
      const bool minus0 = (signs & 1u) != 0, minus1 = (signs >> 16 & 1u) != 0;
      const bool single = pa == 0 && pc == 1;
      const float first = single && minus0 != minus1 ? 0.0F : minus0 ? -1.0F : 1.0F;
      const float second = single && minus0 == minus1 ? 0.0F : minus1 ? -1.0F : 1.0F;
      return read_detail::scatter(pa != 0 ? 8 + pb + 4 * pc : pb != 0 ? 14 : 4, first, second);
    }
    case DeltaType::kDenseInt4:
    case DeltaType::kDenseInt8: {
      // Columns 4 group and on: lanes c = 2 (group % 2) and the next, register pair `half`'s.
      GroupValues out;
      const int k = group % 8 * 4;  // within the tile of 32
      const int mma = k / 16, upper = k / 8 % 2, c = k % 8 / 2;
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * q + c + i / 2;
        if (type == DeltaType::kDenseInt4) {
          const std::uint32_t word = word_at(record, ((r * 4 + j) * 32 + at) * 2 + mma);
          out.v[i] = static_cast<float>(word >> (4 * (2 * r8 + upper) + 16 * (i % 2)) & 15u) - 8.0F;
        } else {
          const std::uint32_t word = word_at(record, ((r * 4 + j) * 32 + at) * 4 + 2 * mma + upper);
          out.v[i] = static_cast<float>(word >> (8 * r8 + 16 * (i % 2)) & 255u) - 128.0F;
        }
      }
      return out;
    }
    case DeltaType::kSparse14Sign:  // comes as ternary
      break;
  }
  return {};
}

}  // namespace deltazip::cuda
