#include "backend/cuda/kernels/sbmm/tiling.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "backend/cuda/kernels/sbmm/record.h"
#include "deltazip/base/error.h"

namespace deltazip::cuda {
namespace {

constexpr int kTiles = 4;  // of 32 columns, and of 16 rows, in a record

// What a code that stands for zero, or as near as the type has one, fills a padded block with.
int padding_byte(DeltaType type) {
  if (type == DeltaType::kDenseInt8) return 0x80;
  return type == DeltaType::kSparse24Int4 || type == DeltaType::kDenseInt4 ? 0x88 : 0;
}

template <typename Word>
Word load(const std::uint8_t* from) {
  Word word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

void store(std::uint8_t* to, std::uint32_t word) { std::memcpy(to, &word, sizeof(word)); }

// One record's rows as the file has them, padded: [row][tile of 32 columns][bytes of a block].
struct Rows {
  std::uint8_t values[kRecordRows * kTiles * 32];
  std::uint8_t indices[kRecordRows * kTiles * 4];
  std::int64_t value_bytes;  // of a block

  const std::uint8_t* value(int row, int tile) const {
    return values + (row * kTiles + tile) * value_bytes;
  }
  std::uint32_t index(int row, int tile) const {
    return load<std::uint32_t>(indices + (row * kTiles + tile) * 4);
  }
};

// Index words: [pair][lane][r][2], word i of lane 4 q + c for tile 2 i + c / 2, half c % 2.
void put_indices(std::uint8_t* out, const Rows& rows) {
  for (int r = 0; r < 4; ++r) {
    for (int q = 0; q < 8; ++q) {
      for (int i = 0; i < 2; ++i) {
        for (int s = 0; s < 2; ++s) {
          const std::uint32_t low = rows.index(16 * r + q, 2 * i + s);
          const std::uint32_t high = rows.index(16 * r + q + 8, 2 * i + s);
          std::uint8_t* word = out + 4 * (((r / 2 * 32 + 4 * q + 2 * s) * 2 + r % 2) * 2 + i);
          store(word, (low & 0xFFFFu) | high << 16);
          store(word + 16, low >> 16 | (high & 0xFFFF0000u));
        }
      }
    }
  }
}

// Nibble i of each group's byte, of groups c and c + 4 of a tile: byte c is (group c) | (c + 4)
// << 4.
std::uint32_t pair_nibbles(std::uint64_t row, int high) {
  const std::uint64_t nibbles = row >> (4 * high) & 0x0F0F0F0F0F0F0F0FULL;
  return static_cast<std::uint32_t>(nibbles) | static_cast<std::uint32_t>(nibbles >> 32) << 4;
}

void put_int4(std::uint8_t* out, const Rows& rows) {
  for (int r = 0; r < 4; ++r) {
    for (int q = 0; q < 8; ++q) {
      for (int j = 0; j < kTiles; ++j) {
        const auto upper = load<std::uint64_t>(rows.value(16 * r + q, j));
        const auto lower = load<std::uint64_t>(rows.value(16 * r + q + 8, j));
        const std::array<std::uint32_t, 4> parts{pair_nibbles(upper, 0), pair_nibbles(lower, 0),
                                                 pair_nibbles(upper, 1), pair_nibbles(lower, 1)};
        for (int c = 0; c < 4; ++c) {
          std::uint32_t word = 0;
          for (unsigned p = 0; p < 4; ++p) word |= (parts[p] >> (8 * c) & 0xFFu) << (8 * p);
          store(out + 4 * ((r * 32 + 4 * q + c) * 4 + j), word);
        }
      }
    }
  }
}

// The codes of a tile's groups c and c + 4 in rows q and q + 8, as four fields of two bits:
// `shift` 0 takes the first kept, 2 the second.
std::uint32_t int2_fields(std::uint32_t upper, std::uint32_t lower, int c, int shift) {
  const int low = 4 * c + shift, high = low + 16;
  return (upper >> low & 3u) | (lower >> low & 3u) << 2 | (upper >> high & 3u) << 4 |
         (lower >> high & 3u) << 6;
}

void put_int2(std::uint8_t* out, const Rows& rows) {
  for (int r = 0; r < 4; ++r) {
    for (int q = 0; q < 8; ++q) {
      for (int i = 0; i < 2; ++i) {
        std::uint32_t upper[2], lower[2];
        for (int t = 0; t < 2; ++t) {
          upper[t] = load<std::uint32_t>(rows.value(16 * r + q, 2 * i + t));
          lower[t] = load<std::uint32_t>(rows.value(16 * r + q + 8, 2 * i + t));
        }
        for (int c = 0; c < 4; ++c) {
          std::uint32_t word = 0;
          for (int t = 0; t < 2; ++t) {
            word |= int2_fields(upper[t], lower[t], c, 0) << (8 * t);
            word |= int2_fields(upper[t], lower[t], c, 2) << (8 * t + 16);
          }
          store(out + 4 * (((r / 2 * 32 + 4 * q + c) * 2 + r % 2) * 2 + i), word << 1 | word >> 31);
        }
      }
    }
  }
}

// Two codes of ten bits to two bits of each plane, a plane a byte: a, b, c, s0, s1.
std::array<std::uint64_t, 1024> make_ternary_table() {
  const auto states = ternary_states();
  std::array<std::uint64_t, 32> single{};
  for (std::size_t code = 0; code < 32; ++code) {
    const TernaryState& state = states[code];
    unsigned index0 = state.index0, index1 = state.index1;
    bool first_minus = state.value0 < 0, second_minus = state.value1 < 0;
    const bool is_single = state.value0 == 0 || state.value1 == 0;
    if (is_single) {
      // Any single place is one of the pairs (0,1) and (2,3), and equal signs keep the first.
      const unsigned place = state.value0 != 0 ? index0 : index1;
      const bool minus = state.value0 + state.value1 < 0;
      index0 = place & 2u, index1 = index0 + 1;
      first_minus = place % 2 == 0 ? minus : !minus;
      second_minus = minus;
    }
    unsigned a = 0, b = 0, c = 0;
    if (index0 == 0 && index1 == 1) {
      c = is_single;
    } else if (index0 == 2) {
      b = 1, c = is_single;
    } else {
      a = 1, b = index0, c = index1 - 2;
    }
    single[code] = std::uint64_t{a} | std::uint64_t{b} << 8 | std::uint64_t{c} << 16 |
                   std::uint64_t{first_minus} << 24 | std::uint64_t{second_minus} << 32;
  }
  std::array<std::uint64_t, 1024> table{};
  for (std::size_t codes = 0; codes < 1024; ++codes) {
    table[codes] = single[codes % 32] | single[codes / 32] << 1;
  }
  return table;
}

// Bit p to bit 4 p.
constexpr std::uint32_t spread_nibble(std::uint32_t v) {
  return (v & 1u) | (v & 2u) << 3 | (v & 4u) << 6 | (v & 8u) << 9;
}

// See decode.cuh for the places of the bits.
void put_ternary(std::uint8_t* out, const Rows& rows) {
  static const std::array<std::uint64_t, 1024> kTable = make_ternary_table();
  for (int pair = 0; pair < 2; ++pair) {
    std::uint32_t words[32][5] = {};  // of a lane: planes a, b, c, signs of rows q, of rows q + 8
    for (int row = 0; row < 32; ++row) {
      const int r = row / 16, r8 = row / 8 % 2, q = row % 8;
      for (int j = 0; j < kTiles; ++j) {
        const std::uint8_t* from = rows.value(32 * pair + row, j);
        const std::uint64_t codes = load<std::uint32_t>(from) | static_cast<std::uint64_t>(from[4])
                                                                    << 32;
        std::uint64_t bytes = 0;  // bit 4 h + p of a plane's byte
        for (unsigned i = 0; i < 4; ++i) bytes |= kTable[codes >> (10 * i) & 1023u] << (2 * i);
        const int s = j % 2, e = j / 2 * 2 + r;
        for (int h = 0; h < 2; ++h) {
          std::uint32_t* lanes = words[4 * q + 2 * s + h];
          for (int plane = 0; plane < 3; ++plane) {
            const auto groups = static_cast<std::uint32_t>(bytes >> (8 * plane + 4 * h) & 15u);
            lanes[plane] |= spread_nibble(groups) << (16 * r8 + e);
          }
          for (int p = 0; p < 4; ++p) {
            const auto signs = static_cast<std::uint32_t>(bytes >> (24 + 4 * h + p));
            words[4 * q + p][3 + r8] |= ((signs & 1u) | (signs >> 8 & 1u) << 16)
                                        << (8 * s + 4 * h + e);
          }
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        store(out + 4 * ((pair * 32 + lane) * 4 + i), words[lane][i]);
      }
      store(out + kTernaryLowerSigns + 4 * (pair * 32 + lane), words[lane][4]);
    }
  }
}

// A lane of tile (r, j) holds rows q and q + 8, columns 2 c, 2 c + 1 and those 8, 16, 24 further:
// the registers of two dense 16x8x16 products.
void put_dense(std::uint8_t* out, const Rows& rows, bool is_int4) {
  for (int r = 0; r < 4; ++r) {
    for (int j = 0; j < kTiles; ++j) {
      for (int lane = 0; lane < 32; ++lane) {
        const int q = lane / 4, c = lane % 4;
        const std::uint8_t* upper = rows.value(16 * r + q, j);
        const std::uint8_t* lower = rows.value(16 * r + q + 8, j);
        for (int half = 0; half < 2; ++half) {
          const int column = 16 * half + 2 * c;
          if (is_int4) {
            // Byte i of the file is columns 2 i and 2 i + 1: registers a[0..3] in the nibbles of
            // int4_nibble().
            const int at = column / 2;
            const std::array<std::uint32_t, 4> a{upper[at], upper[at + 4], lower[at],
                                                 lower[at + 4]};
            std::uint32_t word = 0;
            for (unsigned i = 0; i < 4; ++i) {
              word |= (a[i] & 15u) << (4 * i) | (a[i] >> 4) << (4 * i + 16);
            }
            store(out + 4 * (((r * kTiles + j) * 32 + lane) * 2 + half), word);
          } else {
            for (int i = 0; i < 2; ++i) {
              const int at = column + 8 * i;
              const std::uint32_t word = upper[at] | static_cast<std::uint32_t>(lower[at]) << 8 |
                                         static_cast<std::uint32_t>(upper[at + 1]) << 16 |
                                         static_cast<std::uint32_t>(lower[at + 1]) << 24;
              store(out + 4 * (((r * kTiles + j) * 32 + lane) * 4 + 2 * half + i), word);
            }
          }
        }
      }
    }
  }
}

void put_record(std::uint8_t* out, DeltaType type, const RecordLayout& layout, const Rows& rows) {
  switch (type) {
    case DeltaType::kSparse24Int4:
      put_int4(out, rows);
      return put_indices(out + layout.values_bytes, rows);
    case DeltaType::kSparse24Int2:
      put_int2(out, rows);
      return put_indices(out + layout.values_bytes, rows);
    case DeltaType::kSparse24Ternary:
      return put_ternary(out, rows);
    case DeltaType::kDenseInt4:
    case DeltaType::kDenseInt8:
      return put_dense(out, rows, type == DeltaType::kDenseInt4);
    case DeltaType::kSparse14Sign:  // comes as ternary
      return;
  }
}

}  // namespace

std::size_t tiled_delta_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                              std::int32_t group_size) {
  check_delta_shape(rows, columns, group_size);
  const RecordLayout layout = record_layout(type, rows, columns, group_size);
  return static_cast<std::size_t>(layout.row_blocks * layout.records * layout.record_bytes);
}

void tile_delta(void* tiled, const DeltaSource& source) {
  check_delta_source(source);
  const RecordLayout layout =
      record_layout(source.type, source.rows, source.columns, source.group_size);
  const std::int64_t blocks = (source.columns + kDeltaBlockColumns - 1) / kDeltaBlockColumns;
  const std::int64_t groups = (source.columns + source.group_size - 1) / source.group_size;
  Rows rows;
  rows.value_bytes = delta_block_bytes(source.type);

  const auto* values = reinterpret_cast<const std::uint8_t*>(source.values.data());
  const auto* indices = reinterpret_cast<const std::uint8_t*>(source.indices.data());
  const auto* scales = reinterpret_cast<const std::uint8_t*>(source.scales.data());
  const std::int64_t part_columns = kRecordColumns / layout.scale_parts;
  auto* out = static_cast<std::uint8_t*>(tiled);
  for (std::int64_t block = 0; block < layout.row_blocks; ++block) {
    const std::int64_t first_row = block * kRecordRows;
    const auto num_rows =
        static_cast<int>(std::min<std::int64_t>(kRecordRows, source.rows - first_row));
    for (std::int64_t record = 0; record < layout.records; ++record, out += layout.record_bytes) {
      const std::int64_t first_block = record * kTiles;
      const std::int64_t num_blocks = std::min<std::int64_t>(kTiles, blocks - first_block);
      if (num_rows < kRecordRows || num_blocks < kTiles) {
        std::memset(rows.values, padding_byte(source.type), sizeof(rows.values));
        std::memset(rows.indices, 0x44, sizeof(rows.indices));
      }
      for (int row = 0; row < num_rows; ++row) {
        const std::int64_t at = (first_row + row) * blocks + first_block;
        std::memcpy(rows.values + row * kTiles * rows.value_bytes, values + at * rows.value_bytes,
                    static_cast<std::size_t>(num_blocks * rows.value_bytes));
        if (has_indices(source.type)) {
          std::memcpy(rows.indices + row * kTiles * 4, indices + at * 4,
                      static_cast<std::size_t>(num_blocks * 4));
        }
      }
      put_record(out, source.type, layout, rows);
      std::uint8_t* scale_out = out + layout.scales_offset;
      std::memset(scale_out, 0, static_cast<std::size_t>(layout.scale_parts * kScalePartBytes));
      for (int part = 0; part < layout.scale_parts; ++part, scale_out += kScalePartBytes) {
        const std::int64_t column = record * kRecordColumns + part * part_columns;
        if (column >= source.columns) break;
        const std::int64_t group = column / source.group_size;
        for (int row = 0; row < num_rows; ++row) {
          std::memcpy(scale_out + 2 * scale_place(row),
                      scales + ((first_row + row) * groups + group) * 2, 2);
        }
      }
    }
  }
}

}  // namespace deltazip::cuda
