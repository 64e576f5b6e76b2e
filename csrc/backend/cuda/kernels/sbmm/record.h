#pragma once

// How a delta stands in device memory, for the host's tiling and for the kernels. A matrix is cut
// into records of 64 rows x 128 columns, each one contiguous run [values | indices | scales];
// the records of a row block follow each other along k, row blocks follow each other.
//
// Within a record: r = tile of 16 rows, y = tile of 64 columns, e = 2 y + r % 2, j = tile of 32
// columns, lane = 4q + c as mma_int8.cuh has it, "pair" = two row tiles (what one warp reads).
// Words of 32 bits, slowest index first; codes stand so that decode.cuh has little to do.
//   sparse24_int4     values [pair][y][lane][r % 2][h]; indices [pair][lane][e]
//   sparse24_int2     values [pair][lane][e]; indices so too
//   sparse24_ternary  [pair][lane][planes a, b, c, signs 0]; then, as kTernarySecondSigns says,
//                     [pair][lane] signs 1
//   dense_int4        values [r][j][lane][2]
//   dense_int8        values [r][j][lane][4]
// Index word e of a lane is a metadata register: a word of the file.
// Scales: fp16 [part][q][r][rows q, q + 8]; a record has 1, 2 or 4 parts, as groups end within it.

#include <cstdint>

#include "deltazip/backend/delta_matrix.h"

namespace deltazip::cuda {

inline constexpr int kRecordRows = 64;
inline constexpr int kRecordColumns = 128;
inline constexpr int kRecordGroups = kRecordColumns / 4;  // of four columns
inline constexpr int kScalePartBytes = kRecordRows * 2;
inline constexpr int kTernarySecondSigns = kRecordRows * kRecordColumns / 8;

struct RecordLayout {
  std::int32_t values_bytes;  // where the indices begin; ternary: of everything but scales
  std::int32_t indices_bytes;
  std::int32_t scales_offset;
  std::int32_t scale_parts;  // 1, 2 or 4
  std::int32_t record_bytes;
  std::int64_t row_blocks, records;  // records of a row block
};

constexpr RecordLayout record_layout(DeltaType type, std::int64_t rows, std::int64_t columns,
                                     std::int32_t group_size) {
  RecordLayout layout{};
  constexpr std::int32_t kWeights = kRecordRows * kRecordColumns;
  switch (type) {
    case DeltaType::kSparse24Int4:
      layout.values_bytes = kWeights / 4;
      layout.indices_bytes = kWeights / 8;
      break;
    case DeltaType::kSparse24Int2:
      layout.values_bytes = kWeights / 8;
      layout.indices_bytes = kWeights / 8;
      break;
    case DeltaType::kSparse24Ternary:
      layout.values_bytes = kWeights * 5 / 32;
      break;
    case DeltaType::kDenseInt4:
      layout.values_bytes = kWeights / 2;
      break;
    case DeltaType::kDenseInt8:
      layout.values_bytes = kWeights;
      break;
    case DeltaType::kSparse14Sign:  // comes as ternary
      break;
  }
  layout.scales_offset = layout.values_bytes + layout.indices_bytes;
  // Dense types, rare, do without a kernel for two.
  layout.scale_parts = group_size % 128 == 0                       ? 1
                       : group_size % 64 == 0 && is_sparse24(type) ? 2
                                                                   : 4;
  layout.record_bytes = layout.scales_offset + layout.scale_parts * kScalePartBytes;
  layout.row_blocks = (rows + kRecordRows - 1) / kRecordRows;
  layout.records = (columns + kRecordColumns - 1) / kRecordColumns;
  return layout;
}

// Where the scale of a record's row stands among a part's halves.
constexpr int scale_place(int row) { return row % 8 * 8 + row / 16 * 2 + row / 8 % 2; }

}  // namespace deltazip::cuda
