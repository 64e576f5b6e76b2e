#pragma once

// How the CPU keeps base weights and deltas in memory. One SIMD lane is one output row.
// Shared by the packers and by the kernels of every ISA, hence internal linkage and plain types.

#include <cstdint>

#include "deltazip/backend/delta_matrix.h"
#include "deltazip/base/dtype.h"

namespace deltazip::cpu {
namespace {

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}
constexpr std::int64_t align_up(std::int64_t value, std::int64_t to) {
  return divide_up(value, to) * to;
}

// Base weights: panels of 32 rows, [panel][column][32]. In a bfloat16 panel rows i and i + 16 are
// neighbours: one 64-byte load, a shift and a mask give both halves. Rows past the end are zero.
constexpr std::int64_t kWeightPanelRows = 32;

constexpr std::int64_t weight_panel_bytes(DType dtype, std::int64_t columns) {
  return columns * kWeightPanelRows * (dtype == DType::kFloat32 ? 4 : 2);
}
// Where row r of a panel stands among the 32 elements of a column.
constexpr std::int64_t weight_row_place(DType dtype, std::int64_t row) {
  return dtype == DType::kBFloat16 ? 2 * (row % 16) + row / 16 : row;
}

// Deltas: panels of 16 rows, blocks of 32 columns; a word holds one row's codes. Integer codes are
// stored as signed values, so that a shift pair is enough to read them.
//   sparse24_int4   panel: scales, then per block 2 words of values (8 nibbles: two a group of
//                   four) and a word of indices (nibbles: index0 | index1 << 2)
//   sparse24_int2   panel: scales, then per block a word of values (code0 | code1 << 2) and a word
//                   of indices
//   dense_int4      panel: scales, then per block 4 words of 8 columns
//   dense_int8      panel: scales, then [32][16] bytes per block
//   sparse24_ternary  column blocks outside, panels inside, for kernels that sweep all panels with
//                   one table of sums: words [block][panel][16] (low 4 bits of 8 codes), then
//                   masks [block][panel][8] of 16 bits (bit 4 of each row's code), then scales
//                   [group][panel][16]
//   sparse14_sign   the same order, a row's 8 codes of 3 bits being 24: half words
//   [block][panel][16]
//                   (low 16 bits), then bytes [block][panel][16] (the upper 8), then scales
constexpr std::int64_t kDeltaPanelRows = 16;
constexpr std::int64_t kWordRowBytes = 64;   // one 32-bit word for each row of a panel
constexpr std::int64_t kHalfRowBytes = 32;   // the same of 16 bits
constexpr std::int64_t kMaskRowBytes = 16;   // eight 16-bit masks, or a byte for each row
constexpr std::int64_t kScaleRowBytes = 32;  // one fp16 for each row of a panel

struct DeltaLayout {
  std::int64_t num_panels, num_blocks, num_groups, blocks_per_group;
  std::int64_t scale_bytes;                  // before a panel's blocks
  std::int64_t block_bytes;                  // of one panel
  std::int64_t panel_bytes;                  // 0 for ternary and sign
  std::int64_t cell_bytes;                   // ternary and sign: a row of words or half words
  std::int64_t masks_offset, scales_offset;  // ternary and sign: of masks or upper bytes
  std::int64_t total_bytes;
};

constexpr DeltaLayout delta_layout(DeltaType type, std::int64_t rows, std::int64_t columns,
                                   std::int64_t group_size) {
  DeltaLayout layout{};
  layout.num_panels = divide_up(rows, kDeltaPanelRows);
  layout.num_blocks = divide_up(columns, kDeltaBlockColumns);
  layout.num_groups = divide_up(columns, group_size);
  layout.blocks_per_group = group_size / kDeltaBlockColumns;
  if (has_states(type)) {
    const std::int64_t cells = layout.num_blocks * layout.num_panels;
    layout.cell_bytes = type == DeltaType::kSparse24Ternary ? kWordRowBytes : kHalfRowBytes;
    layout.masks_offset = cells * layout.cell_bytes;
    layout.scales_offset = layout.masks_offset + cells * kMaskRowBytes;
    layout.total_bytes =
        layout.scales_offset + layout.num_groups * layout.num_panels * kScaleRowBytes;
  } else {
    layout.block_bytes = kWordRowBytes * (type == DeltaType::kSparse24Int4   ? 3
                                          : type == DeltaType::kSparse24Int2 ? 2
                                          : type == DeltaType::kDenseInt4    ? 4
                                                                             : 8);
    layout.scale_bytes = align_up(layout.num_groups * kScaleRowBytes, kWordRowBytes);
    layout.panel_bytes = layout.scale_bytes + layout.num_blocks * layout.block_bytes;
    layout.total_bytes = layout.num_panels * layout.panel_bytes;
  }
  layout.total_bytes = align_up(layout.total_bytes, kWordRowBytes);
  return layout;
}

}  // namespace
}  // namespace deltazip::cpu
